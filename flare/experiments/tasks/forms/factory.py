"""Create the form of a task for a family of models."""

from __future__ import annotations

from typing import Any

from ...utils.errors import UserError
from ..registry import Task
from .base import Form
from .classification import ChoiceForm, ClassificationForm, MultiLabelForm, RegressionForm
from .generative import CausalForm, Seq2SeqForm
from .spans import SpanForm
from .tokens import TokenForm

FAMILIES = ("encoder", "causal", "seq2seq")
_HEADS: dict[str, type[Form]] = {
    "classification": ClassificationForm,
    "qa": SpanForm,
    "token-classification": TokenForm,
    "multiple-choice": ChoiceForm,
    "multi-label": MultiLabelForm,
    "regression": RegressionForm,
}
#: Kinds of task that a model can answer by generating text.
_GENERATIVE = ("classification", "qa", "multiple-choice")


def make_form(task: Task, tokenizer: Any, family: str, max_length: int | None = None) -> Form:
    """Return the form of a task for a family of models.

    Args:
        task: the task; if its kind has labels, they must be known (see `flare.experiments.tasks.resolve_labels`).
        tokenizer: the model's tokenizer.
        family: "encoder": a model with a head for the task; "causal": a decoder that generates the label or answer
            after a prompt; "seq2seq": an encoder-decoder that reads the prompt and generates the label or answer.
        max_length: maximum tokens of one text; None: `task.max_length`.

    Raises:
        UserError: the family is not known or cannot solve this kind of task, or the form cannot be made for the task's
            columns and labels, the tokenizer or `max_length`.
    """
    if family not in FAMILIES:
        raise UserError(f"the model family {family!r} is not known; accepted: {', '.join(FAMILIES)}")
    head_form = _HEADS[task.kind]
    if family == "encoder":
        return head_form(task, tokenizer, max_length)
    if task.kind not in _GENERATIVE:
        raise UserError(
            f"task {task.name} ({task.kind}) needs a model with a head and cannot be answered by generated text: use "
            f"--form encoder ({head_form.auto_class})"
        )
    return (CausalForm if family == "causal" else Seq2SeqForm)(task, tokenizer, max_length)
