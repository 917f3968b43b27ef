"""Text for calibration and evaluation, and the samples of tokens that are made of it.

source.py          TextSource, from which each source derives: three parts, samples of each
documents.py       texts cut and joined; conversations, by the chat template of a tokenizer
packing.py         documents to token sequences of one length, cached
python_docs.py     the reference of the Python language, without a download
formats.py         rows of .txt, .md, .json, .jsonl, .csv and .parquet files, also compressed
files.py           text files of the user
hub.py             data sets of the Hugging Face Hub
self_generated.py  text that the dense model samples itself
generation.py      documents sampled from a model, in batches
mixture.py         samples of several sources, by weight

`data._target_` chooses the source, also a class of the user's own (see TextSource).
"""
