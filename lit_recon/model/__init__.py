"""A Hugging Face decoder, by facts instead of family names."""
