"""The command `python -m lit_recon.fit`: prune a language model and reconstruct it window by window."""
