"""LightningModules that reconstruct a window, one file each; `module._target_` chooses, also one of your own."""
