"""lit_recon: local reconstruction of pruned language models, one window at a time, with PyTorch Lightning."""

__version__ = "0.2.0"
