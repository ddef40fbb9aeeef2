"""The data collator, the trainer, and training steps as CUDA graphs."""
