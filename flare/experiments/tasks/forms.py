"""The form of a task for a family of models."""

from __future__ import annotations

from typing import Any

from ..utils.errors import UserError
from .causal_form import CausalForm
from .choice_form import ChoiceForm
from .encoder_form import ClassificationForm
from .form import Form
from .label_forms import MultiLabelForm, RegressionForm
from .registry import Task
from .seq2seq_form import Seq2SeqForm
from .span_form import SpanForm
from .token_form import TokenForm

FAMILIES = ("encoder", "causal", "seq2seq")
_HEADS: dict[str, type[Form]] = {
    "classification": ClassificationForm,
    "qa": SpanForm,
    "token-classification": TokenForm,
    "multiple-choice": ChoiceForm,
    "multi-label": MultiLabelForm,
    "regression": RegressionForm,
}
#: Kinds that a model can answer in writing.
_WRITTEN = ("classification", "qa", "multiple-choice")


def make_form(task: Task, tokenizer: Any, family: str, max_length: int | None = None) -> Form:
    """How the task's examples become rows for a model of a family.

    Args:
        task: one with labels needs them (see `flare.experiments.tasks.resolve_labels`).
        tokenizer: the model's.
        family: "encoder": a head; "causal": a decoder that writes label or answer behind a prompt;
            "seq2seq": an encoder-decoder that does.
        max_length: tokens of one text; None: the task's.

    Raises:
        UserError: an unknown family, or a task or tokenizer that cannot have the form.
    """
    if family not in FAMILIES:
        raise UserError(f"the model family {family!r} is not known; one of {', '.join(FAMILIES)}")
    form = _HEADS[task.kind]
    if family == "encoder":
        return form(task, tokenizer, max_length)
    if task.kind not in _WRITTEN:
        raise UserError(
            f"task {task.name} ({task.kind}) is answered by a head, not in writing: read the model with a head, "
            f"--form encoder ({form.auto_class})"
        )
    return (CausalForm if family == "causal" else Seq2SeqForm)(task, tokenizer, max_length)
