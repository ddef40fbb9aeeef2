"""The PEFT tuner: configuration, adapter layers, and which module of a model is which."""
