"""FLARE: LoRA adapters that fuse a source language with a target language, on fused kernels.

:func:`fast_lora` adds such adapters to a transformers model, :class:`FlareConfig` configures them,
:class:`FlareDataCollator` and :class:`FlareTrainer` train them, and :class:`SourceStateCache` stores the hidden states
of the source texts between epochs::

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = flare.fast_lora(model, r=64, lora_alpha=128)
    trainer = flare.FlareTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

Importing this package registers the adapter types ``FLARE`` and ``FLARE_X_MIXUP`` (the baseline X-Mixup) with PEFT.
``PeftModel.from_pretrained`` needs this to load a saved adapter. The trainers, :class:`GraphedStep`,
:func:`replicate_adapters`, the recipes and the pipeline are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flare_kernels import __version__

from . import (
    _compat,  # noqa: F401  (first, because it checks the installed versions of torch, Triton, PEFT and others)
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

#: Public names that are imported when they are first used -> their modules.
_LAZY_NAMES = {
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
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LAZY_NAMES[name], __name__)
    value = module if _LAZY_NAMES[name] == f".{name}" else getattr(module, name)
    globals()[name] = value
    return value
