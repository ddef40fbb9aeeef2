"""Predict with a trained adapter, from texts and their source texts or translations."""
