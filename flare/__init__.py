"""FLARE: LoRA adapters that fuse a source-language and a target-language stream, on fused kernels.

Importing this package registers ``peft_type: FLARE`` with PEFT, so ``PeftModel.from_pretrained`` finds saved adapters.
"""

from typing import Any

from flare_kernels import __version__

from .adopt import fast_lora
from .config import FlareConfig
from .model import FlareModel
from .source_states import SourceStates

__all__ = [
    "FlareConfig",
    "FlareModel",
    "SourceStates",
    "__version__",
    "fast_lora",
]
