"""Data collator, trainer, and training steps as CUDA graphs."""
