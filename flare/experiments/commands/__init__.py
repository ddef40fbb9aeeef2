"""The commands of `flare`: their options, and the functions that they call."""
