"""Raise an error if weights, losses or logits are not finite, before they become a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tasks.data_error import some_ids
from ..utils.errors import DivergedError

_ADVICE = "train again with --no-resume and a smaller --lr, more --warmup_steps or a smaller --max_grad_norm"


class StopIfNotFinite(TrainerCallback):
    """Raise DivergedError if the loss or a trained weight is not finite, before anything is logged or saved."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if control.should_log or control.should_evaluate or control.should_save:
            check_weights(kw["model"], f"step {state.global_step}")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        check_weights(kw["model"], f"step {state.global_step}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kw: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(f"step {state.global_step}: the loss is {loss}; {_ADVICE}")


class CheckLogits(LogitsProcessor):
    """Logits processor that raises DivergedError for NaN or infinite logits of a generation step.

    ids: ids of the rows, for the message.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_logits(scores.masked_fill(scores == -math.inf, 0), self.ids)  # -inf marks a token that is not allowed
        return scores


def check_weights(model: nn.Module, where: str) -> None:
    """Raise DivergedError if a trained weight of the model is not finite."""
    wrong = [name for name, weight in model.named_parameters() if weight.requires_grad and not _finite(weight)]
    if wrong:
        shown = ", ".join(wrong[:2]) + (", ..." if len(wrong) > 2 else "")
        raise DivergedError(f"{where}: {len(wrong)} trained weights are NaN or infinite ({shown}); {_ADVICE}")


def has_finite_weights(model: nn.Module) -> bool:
    """Return whether all weights of a model are finite."""
    return all(map(_finite, model.parameters()))


def check_logits(logits: Tensor, ids: Sequence[str]) -> None:
    """Raise DivergedError if the logits of a row are NaN or infinite.

    Args:
        logits: (rows, ...).
        ids: one id per row, for the message.
    """
    finite = torch.isfinite(logits).flatten(1).all(1)
    if not bool(finite.all()):
        wrong_ids = [row for row, is_finite in zip(ids, finite.tolist(), strict=True) if not is_finite]
        raise DivergedError(
            f"the model's logits of {len(wrong_ids)} rows are NaN or infinite {some_ids(wrong_ids)}, because "
            f"the training diverged or the base overflows in its dtype. No score is computed; {_ADVICE}"
        )


def _finite(weight: Tensor) -> bool:
    return not weight.is_floating_point() or bool(torch.isfinite(weight.detach()).all())
