"""The tasks of the paper and your own: examples, languages, reading and pairing, forms for a model, metrics."""

from .examples import Answer, Example, Pair

__all__ = ["Answer", "Example", "Pair"]
