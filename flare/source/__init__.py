"""The source stream of a forward pass: its inputs, the frozen pass, its states and how they are kept for backward."""
