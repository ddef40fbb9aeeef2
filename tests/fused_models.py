"""Tiny models with a fusing adapter, and inputs without their source."""

from __future__ import annotations

import peft
import tiny
import torch

import flare


def fused(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> peft.PeftModel:
    model = flare.fast_lora(tiny.model(family, seed=seed, dtype=dtype), **{"r": 5, "lora_alpha": 7, **overrides})
    tiny.randomize_lora(model)
    return model


def without_source(inputs: dict) -> dict:
    return {k: v for k, v in inputs.items() if not k.startswith("source_")}
