"""The data collator, the trainer, and training steps that run as CUDA graphs."""
