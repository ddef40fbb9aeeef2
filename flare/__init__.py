"""FLARE: LoRA adapters that fuse a source-language and a target-language stream, on fused kernels.

Importing this package registers ``peft_type: FLARE`` with PEFT, so ``PeftModel.from_pretrained`` finds saved adapters.
The trainer and the recipes are imported on first use: transformers' Trainer brings datasets with it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flare_kernels import __version__

from . import (
    _compat,  # noqa: F401  (first: it checks versions before anything of PEFT is used)
    baselines,
)
from .source.latent_encoder import LatentEncoder
from .source.states import SourceStates
from .source_cache import SourceStateCache
from .training.collator import FlareDataCollator
from .tuner.config import FlareConfig
from .tuner.convert import fast_lora
from .tuner.model import FlareModel

if TYPE_CHECKING:
    from . import recipes
    from .experiments.prediction.pipeline import FlarePipeline
    from .recipes import Recipe, from_recipe
    from .training.graphed_step import GraphedStep
    from .training.replicated import replicate_adapters
    from .training.trainer import FlareSeq2SeqTrainer, FlareTrainer

__all__ = [
    "FlareConfig",
    "FlareDataCollator",
    "FlareModel",
    "FlarePipeline",
    "FlareSeq2SeqTrainer",
    "FlareTrainer",
    "GraphedStep",
    "LatentEncoder",
    "Recipe",
    "SourceStateCache",
    "SourceStates",
    "__version__",
    "baselines",
    "fast_lora",
    "from_recipe",
    "recipes",
    "replicate_adapters",
]

_LATER = {
    "FlareTrainer": ".training.trainer",
    "FlareSeq2SeqTrainer": ".training.trainer",
    "FlarePipeline": ".experiments.prediction.pipeline",
    "GraphedStep": ".training.graphed_step",
    "Recipe": ".recipes",
    "from_recipe": ".recipes",
    "recipes": ".recipes",
    "replicate_adapters": ".training.replicated",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LATER[name], __name__)
    value = module if _LATER[name] == f".{name}" else getattr(module, name)
    globals()[name] = value
    return value
