"""Build and load the model of each of the paper's methods, and make the collator of its batches.

A *form* (`flare.experiments.tasks.forms`) converts a task's examples to model rows.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from peft.utils import load_peft_weights

from ..._compat import FLARE, X_MIXUP
from ...baselines import InputFusionCollator, input_fusion, max_positions, plain_lora
from ...training.collator import FlareDataCollator
from ...tuner.convert import fast_lora
from ..tasks import JoinedForm
from ..tasks.forms.generative import GenerativeForm
from ..utils.errors import UserError, library_errors
from .records import RunRecord
from .setup import Setup

#: Methods that read a source text.
READS_SOURCE = ("input-fusion", "x-mixup", "flare")
_PEFT_TYPES = {"x-mixup": X_MIXUP.value}
_ADVICE = (
    "Train it again with flare train --no-resume, which keeps this adapter in earlier-N, or exclude it with --variant "
    "or --seeds"
)
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
    """Return the base with new adapters of a method, and the collator of its batches.

    Args:
        method: a name in `flare.experiments.runs.run_settings.METHODS`.
        setup: the base model, and the form of the task for this model.
        adapter: name -> value of FlareConfig's fields.
        fusion: fusion function of flare and flare-mt; None for other methods.
        latent_dim: width of the MT encoder of flare-mt; None for other methods.
        mixup_layer: index of the block in which x-mixup mixes both texts; None: the middle block.

    Raises:
        UserError: the method does not work on this model; the message gives the reason.
    """
    model = setup.load_model()
    collate = collator(method, setup, model)
    try:
        if method == "lora":
            return plain_lora(model, **adapter), collate
        if method == "input-fusion":
            return input_fusion(model, max_length=setup.max_length, **adapter), collate
        if method == "x-mixup":
            from ...baselines import x_mixup

            lora = {name: value for name, value in adapter.items() if name in _LORA_FIELDS}
            return x_mixup(model, layer=mixup_layer, **lora), collate
        if method == "flare-mt":
            return fast_lora(model, fusion=fusion, latent_dim=latent_dim, **adapter), collate
        return fast_lora(model, fusion=fusion, **adapter), collate
    except (ValueError, TypeError) as error:
        raise UserError(f"--method {method}: {error}") from error


def load(record: RunRecord, setup: Setup, folder: Path, advice: str = _ADVICE) -> tuple[Any, Any]:
    """Return the base with the trained adapters of a folder, and the collator of its batches.

    Args:
        record: run.json of the run that trained the adapters.
        setup: the base model, and the form of the task for this model.
        folder: folder of the saved adapter.
        advice: end of the error message: what to do if the adapter cannot be used.

    Raises:
        UserError: the adapter is damaged or incomplete, or does not match the record.
    """
    model = setup.load_model()
    collate = collator(record.method, setup, model)
    with library_errors(f"{folder}: the adapter cannot be used", advice=f". {advice}"):
        _check_config(record, peft.PeftConfig.from_pretrained(str(folder)))
        saved = load_peft_weights(str(folder), device="cpu")
        adapted = PeftModel.from_pretrained(model, str(folder))
        _check_weights(record, adapted, set(saved))
    return adapted, collate


def _check_config(record: RunRecord, config: Any) -> None:
    """Raise ValueError if a saved adapter does not match its run.json."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    expected = _PEFT_TYPES.get(record.method, FLARE.value)
    if kind != expected:
        raise ValueError(f"its peft_type is {kind}, and a run of {record.method} saves {expected}")
    for name in ("fusion", "r"):
        saved, trained = getattr(config, name, None), getattr(record, name)
        if saved != trained:
            raise ValueError(f"its adapter_config.json has {name}={saved!r}, and run.json has {name}={trained!r}")


def _check_weights(record: RunRecord, adapted: Any, saved: set[str]) -> None:
    """Raise ValueError if the saved file lacks weights, or if the run was trained with a fusion and no module fuses.

    PEFT would leave missing weights random.
    """
    missing = sorted(set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)) - saved)
    if missing:
        raise ValueError(f"its file lacks {len(missing)} weights, such as {missing[0]}")
    if record.fusion is not None and not adapted.base_model.fast_lora_report().fused:
        raise ValueError(f"none of its modules fuses on {record.base}, and the run was trained with {record.fusion}")


def for_method(method: str, setup: Setup) -> Setup:
    """Return the setup for a method.

    Only input-level fusion in a generating model needs another setup, whose form writes both texts into one prompt.

    Raises:
        UserError: the method does not support the task.
    """
    if method in ("x-mixup", "flare-mt") and setup.form.auto_class == "AutoModelForMultipleChoice":
        raise UserError(
            f"--method {method}: it reads one text per row, and a multiple-choice head reads one text per choice; use "
            "lora, flare or input-fusion, or a model that generates its answer"
        )
    if method != "input-fusion" or not isinstance(setup.form, GenerativeForm):
        return setup
    return replace(setup, form=JoinedForm(setup.form))


def collator(method: str, setup: Setup, model: Any) -> FlareDataCollator:
    """Return the collator of a method's batches.

    Raises:
        UserError: max_length (twice max_length for input-level fusion) exceeds the model's positions.
    """
    limit = max_positions(model) if setup.form.layout == "encoder" else None
    if limit is not None and setup.max_length > limit:
        raise UserError(
            f"--max-length {setup.max_length}: the model {setup.model} reads texts of up to {limit} tokens; "
            f"use {limit} or less"
        )
    if method != "input-fusion":
        return FlareDataCollator(setup.tokenizer, require_source=False, **setup.batches)
    if isinstance(setup.form, JoinedForm):  # the form's rows already hold both texts
        batches = {**setup.batches, "max_length": 2 * setup.max_length}
        return FlareDataCollator(setup.tokenizer, require_source=False, **batches)
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
    """Return the name of the folder that holds a run's folder seed-N.

    The name contains the method and each setting that is not the default. ``r`` is None if it is the default.
    """
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
