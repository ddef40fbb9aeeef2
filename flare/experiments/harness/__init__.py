"""Evaluate FLARE adapters with lm-evaluation-harness. Importing this package registers the model ``flare``."""

try:
    import lm_eval  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flare.experiments.harness needs lm-evaluation-harness: pip install 'flare-kernels[harness]'"
    ) from error

from .model import FlareLM

__all__ = ["FlareLM"]
