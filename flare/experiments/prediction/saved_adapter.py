"""Describe a saved adapter that does not belong to a run, from its folder and the options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..._compat import FLARE, X_MIXUP
from ..runs.records import RunRecord
from ..tasks import get_task
from ..utils.errors import UserError, library_errors
from .predict_settings import PipelineSettings

CONFIG_FILE = "adapter_config.json"
# PEFT's task_type -> (default task, kind of model). If the task is None, the user must name it.
_TASKS = {
    "SEQ_CLS": ("classification", "encoder"),
    "QUESTION_ANS": ("qa", "encoder"),
    "CAUSAL_LM": (None, "causal"),
    "SEQ_2_SEQ_LM": (None, "seq2seq"),
}


def record_of(folder: Path, settings: PipelineSettings) -> tuple[RunRecord, list[str]]:
    """Return the record that a run with this adapter would have, and notes on what was assumed.

    Raises:
        UserError: information is missing, or an option contradicts the adapter.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        task_type, _ = config.get("task_type"), config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    method = _method(folder, config, settings)
    if task_type is not None and task_type not in _TASKS:
        raise UserError(f"--adapter {folder}: its task_type is {task_type}; accepted: {', '.join(_TASKS)}")
    default_task, family = _TASKS.get(task_type, (None, None))
    name = settings.task or default_task
    if name is None:
        raise UserError(
            f"--adapter {folder}: the folder does not say which task the adapter was trained on; name the task with "
            "--task (and the prompt with --prompt, if the adapter was trained with another prompt than the task's)"
        )
    base = settings.base or config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"--adapter {folder}: the folder does not name the base model; name it with --base")
    task = get_task(name, text_columns=settings.text_columns, labels=settings.labels, max_length=settings.max_length)
    labels = task.labels
    if task.kind == "classification" and labels is None:
        labels = _labels_of(folder, str(base)) if task_type == "SEQ_CLS" else None
        if labels is None:
            size = _head_size(folder)
            count = f" {size}" if size else ""
            raise UserError(
                f"--adapter {folder}: the folder does not name its{count} labels; give them with --labels, in the "
                "order of their indices (or name a task with known labels by --task)"
            )
    if method == "flare-mt" and settings.mt_model is None:
        raise UserError(
            f"--adapter {folder}: it reads states of an MT encoder (latent_dim); name the MT model with --mt-model"
        )
    if method == "flare-mt" and settings.target is None and settings.mt_language is None:
        raise UserError(f"--adapter {folder}: name the language of the texts with --target (or --mt-language)")
    padding = settings.padding or "longest"
    record = RunRecord(
        kind="train",
        status="done",
        task=name,
        source_language=settings.source or "english",
        target_language=settings.target,
        method=method,
        variant=folder.name,
        seed=0,
        fusion=config.get("fusion"),
        r=config.get("r"),
        settings={
            "labels": list(labels or ()) or None,
            "text_columns": list(task.text_columns),
            "label_column": task.label_column,
            "family": family,
            "max_length": task.max_length,
            "padding": padding,
            "mt_model": settings.mt_model,
            "mt_language": settings.mt_language,
        },
        base=str(base),
    )
    assumed = f"{folder} is not a run of flare train: assuming {method} on {name}"
    if labels:
        assumed += f" with the labels {', '.join(labels)}"
    return record, [
        f"{assumed}; texts of up to {task.max_length} tokens (--max-length), padded to {_PADDED_TO[padding]}"
    ]


_PADDED_TO = {"longest": "the longest of a batch (--padding)", "max_length": "that length"}


def _method(folder: Path, config: dict[str, Any], settings: PipelineSettings) -> str:
    kind, method = str(config["peft_type"]), None
    if kind == X_MIXUP.value:
        method = "x-mixup"
    elif kind == FLARE.value and config.get("latent_dim") is not None:
        method = "flare-mt"
    elif kind == FLARE.value and config.get("fusion") is not None:
        method = "flare"
    elif kind == FLARE.value:
        return settings.method or "lora"
    if method is None:
        raise UserError(
            f"--adapter {folder}: its peft_type is {kind}; accepted: {FLARE.value}, {X_MIXUP.value}. PEFT's own "
            "adapters read no source: use them with transformers.pipeline"
        )
    if settings.method is not None:
        raise UserError(f"--method {settings.method}: {folder} is a {method} adapter; leave --method out")
    return method


def _labels_of(folder: Path, base: str) -> tuple[str, ...] | None:
    """Return the labels in the base's configuration.

    Return None if the configuration cannot be read, if the labels are unnamed (LABEL_0, ...), or if their number is not
    the number of classes of the adapter's head.
    """
    from transformers import AutoConfig

    try:
        names = AutoConfig.from_pretrained(base, trust_remote_code=False).id2label
    except (OSError, ValueError):  # reported when the base is loaded
        return None
    labels = tuple(str(names[index]) for index in sorted(names))
    generic = labels == tuple(f"LABEL_{index}" for index in range(len(labels)))
    return None if generic or len(labels) != _head_size(folder) else labels


def _head_size(folder: Path) -> int | None:
    """Return the number of classes of the saved head, or None if the adapter has no head."""
    from peft.utils import load_peft_weights

    with library_errors(f"--adapter {folder}: its weights cannot be read"):
        weights = load_peft_weights(str(folder), device="cpu")
    saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("modules_to_save") or ()
    heads = [name for name, weight in weights.items() if weight.dim() == 2 and set(name.split(".")) & set(saved)]
    return min((weights[name].shape[0] for name in heads), default=None)
