"""Using a trained adapter: from a text, with its source or a translation of it, to a prediction."""
