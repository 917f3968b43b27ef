"""Hidden states of all samples, and what windows are trained on."""
