"""The source stream of a forward: its inputs, the frozen pass, its states and how they wait for backward."""
