"""Generate text with a source: the frozen model continues the source while ``model.generate`` writes the target."""
