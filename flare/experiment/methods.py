"""The methods of the paper: what each does to the base model, how its batches are made, how it is loaded again."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from safetensors import SafetensorError

from ..baselines import InputFusionCollator, input_fusion, max_positions, plain_lora
from ..errors import UserError
from ..training.collator import FlareDataCollator
from ..tuner.convert import fast_lora
from .setup import Setup

#: Methods that read a source text.
READS_SOURCE = ("input-fusion", "x-mixup", "flare")
_LORA_FIELDS = {one.name for one in fields(peft.LoraConfig)}


def build(
    method: str,
    setup: Setup,
    adapter: dict[str, Any],
    *,
    fusion: str | None = None,
    latent_dim: int | None = None,
    mixup_layer: int | None = None,
) -> tuple[Any, Any]:
    """The base with new adapters of a method, and the collator of its batches.

    Args:
        method: a name of `flare.experiment.settings.METHODS`.
        setup: the base and its form.
        adapter: FlareConfig's fields.
        fusion: of flare and flare-mt.
        latent_dim: of flare-mt.
        mixup_layer: of x-mixup; None: its default.

    Raises:
        UserError: the method cannot be had on this model, with the reason.
    """
    model = setup.load_model()
    collate = collator(method, setup, model)
    try:
        if method == "lora":
            return plain_lora(model, **adapter), collate
        if method == "input-fusion":
            limit = None if setup.form.layout == "causal" else setup.max_length
            return input_fusion(model, max_length=limit, **adapter), collate
        if method == "x-mixup":
            from ..baselines import x_mixup

            lora = {name: value for name, value in adapter.items() if name in _LORA_FIELDS}
            return x_mixup(model, layer=mixup_layer, **lora), collate
        if method == "flare-mt":
            return fast_lora(model, fusion=fusion, latent_dim=latent_dim, **adapter), collate
        return fast_lora(model, fusion=fusion, **adapter), collate
    except (ValueError, TypeError) as error:
        raise UserError(f"--method {method}: {error}") from error


def load(method: str, setup: Setup, folder: Path) -> tuple[Any, Any]:
    """The base with the trained adapters of a folder, and the collator of its batches."""
    model = setup.load_model()
    collate = collator(method, setup, model)
    try:
        if method == "x-mixup":
            from ..baselines import load_x_mixup

            return load_x_mixup(model, folder), collate
        return PeftModel.from_pretrained(model, str(folder)), collate
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter cannot be loaded: {error}") from error


def collator(method: str, setup: Setup, model: Any) -> FlareDataCollator:
    """Makes batches of a method's rows.

    Raises:
        UserError: a text, or with input-level fusion two, may be longer than the model has positions for.
    """
    limit = max_positions(model) if setup.form.layout == "encoder" else None
    if limit is not None and setup.max_length > limit:
        raise UserError(
            f"--max-length {setup.max_length}: the model {setup.model} reads texts of up to {limit} tokens; "
            f"use {limit} or less"
        )
    if method != "input-fusion":
        return FlareDataCollator(setup.tokenizer, require_source=False, **setup.batches)
    try:
        return InputFusionCollator.for_model(model, setup.tokenizer, require_source=False, **setup.batches)
    except ValueError as error:
        raise UserError(f"--method input-fusion: {error}") from error


def variant_name(
    method: str,
    fusion: str | None,
    r: int | None,
    *,
    source_text: str | None,
    target_text: str | None,
    train_only: bool = False,
) -> str:
    """The folder of a run: the method, and what departs from the defaults (r is None for the default rank)."""
    name = method
    if fusion not in (None, "add_relu"):
        name += "-" + str(fusion).replace("_", "-")
    if r is not None:
        name += f"-r{r}"
    if source_text == "mt":
        name += "-mt-source"
    if target_text == "mt":
        name += "-mt-target"
    return name + ("-train-only" if train_only else "")
