"""``model.generate`` with a source: the source decoded next to the target."""
