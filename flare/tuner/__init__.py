"""The PEFT tuner: its configuration, its adapter layers, and the map of a model's modules."""
