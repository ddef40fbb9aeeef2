"""Fused kernels for FLARE: LoRA whose bottleneck fuses a source-language and a target-language stream.

Needs torch, and Triton for the kernels. ``backends()`` lists the implementations, whether each can run on this machine,
and the reason if it cannot. The package does not import PEFT or transformers.
"""

from . import reference
from .function import fused_lora
from .fusion import FUSIONS
from .joint import fused_lora_qkv
from .selection import BackendStatus, backends, launch_plan, select_backend

__version__ = "0.1.0"

__all__ = [
    "FUSIONS",
    "BackendStatus",
    "backends",
    "fused_lora",
    "fused_lora_qkv",
    "launch_plan",
    "reference",
    "select_backend",
]
