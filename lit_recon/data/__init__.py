"""Sources of text, one file each; `data._target_` chooses, also one of your own (see TextSource in source.py)."""
