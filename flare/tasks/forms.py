"""The form of a task for a family of models."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .causal_form import CausalForm
from .encoder_form import ClassificationForm
from .form import Form
from .registry import Task
from .seq2seq_form import Seq2SeqForm
from .span_form import SpanForm

FAMILIES = ("encoder", "causal", "seq2seq")


def make_form(task: Task, tokenizer: Any, family: str, max_length: int | None = None) -> Form:
    """How the task's examples become rows for a model of a family.

    Args:
        task: a classification needs its labels (see `flare.tasks.resolve_labels`).
        tokenizer: the model's.
        family: "encoder": a head (class or span); "causal": a decoder that writes label or answer behind a prompt;
            "seq2seq": an encoder-decoder that does.
        max_length: tokens of one text; None: the task's.

    Raises:
        UserError: an unknown family, or a task or tokenizer that cannot have the form.
    """
    if family not in FAMILIES:
        raise UserError(f"the model family {family!r} is not known; one of {', '.join(FAMILIES)}")
    if family == "encoder":
        return (SpanForm if task.kind == "qa" else ClassificationForm)(task, tokenizer, max_length)
    return (CausalForm if family == "causal" else Seq2SeqForm)(task, tokenizer, max_length)
