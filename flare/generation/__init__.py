"""``model.generate`` with a source, which is decoded along with the target."""
