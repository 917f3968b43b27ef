"""How good a model is: perplexity, one layer at a time."""
