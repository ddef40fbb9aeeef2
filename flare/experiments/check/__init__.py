"""Check settings and data and estimate costs before training: ``flare check``."""
