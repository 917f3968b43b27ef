"""Text for calibration and evaluation, and the samples of tokens that are made of it.

source.py       TextSource, from which each source derives: three parts, samples of each
packing.py      documents to token sequences of one length, cached
python_docs.py  the reference of the Python language, without a download
files.py        text files of the user
hub.py          data sets of the Hugging Face Hub

`data._target_` chooses the source, also a class of the user's own (see TextSource).
"""
