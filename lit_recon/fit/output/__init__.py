"""The output folder of a run: what it leaves behind.

folder.py      what may be written, what is cleared, what resume finds there
inputs.py      what a run reads, and that none of it lies in what it clears
checkpoint.py  the Hugging Face folder, written whole or growing with the walk
card.py        the model card, with the metadata of the Hub
push.py        upload to the Hub, where that is asked for
read_back.py   the checkpoint read as a user will read it
provenance.py  where all that a run reads came from
changed.py     what of that has changed since, as a study asks
results.py     results.json, the final table
library_run.py what the library has done to a model object, and the same files of it
"""
