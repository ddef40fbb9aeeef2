"""Checks of settings, data and costs before training: ``flare check``."""
