"""The commands of `flare`, one module each."""
