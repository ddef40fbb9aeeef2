"""Whether a training step's gradients are right, before it is timed.

Each method is compared with float64 at two blocks and two rows of the same width and length, where float64 is cheap:
its error may be at most twice that of PEFT's eager layers. At full size the first step, which is
counted too, is compared with PEFT's eager layers, and so are compiled methods, which are compiled once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import fast_steps
import liger
import torch
from batches import Batch, batch_of
from fast_steps import FastSteps
from gate import WrongResult
from models import MEMORY, PRECISION, Models, base_model, gradients, like
from shapes import StepShape
from torch import Tensor

#: Relative error of all adapter gradients that 16 bits explain through some tens of random blocks; float32's.
WHOLE_MODEL = {torch.bfloat16: 0.15, torch.float32: 1e-3}
#: A vocabulary whose head and embedding cost next to nothing.
SMALL_VOCABULARY = 1024
_BLOCKS, _ROWS = 2, 2


def dtype_of(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; float32 on a CPU, whose 16-bit products say little."""
    return PRECISION if device.type == "cuda" else torch.float32


def models_of(shape: StepShape, depth: int, device: torch.device) -> Models:
    """The models of a shape's methods at a depth, over one set of random weights made on the device."""
    dtype = dtype_of(device)
    base = base_model(shape.model, depth, 2 * shape.m, device, dtype, shape.precision)
    base.config.use_cache = False  # as the Trainer sets it: keys and values are not kept for generation
    if shape.question == "block":
        base.enable_input_require_grads()  # as inside a deep model: gradients reach the block's input
    models = Models.of(base, shape.model.family, shape.r, dtype)
    if shape.has_liger and liger.refusal(device) is None:
        models.put_over_liger()
    return models


class Truth:
    """The adapters' gradients of a batch over PEFT's eager layers, each formula once."""

    def __init__(self, models: Models, batch: Batch) -> None:
        self.models, self.batch = models, batch
        self._wide: Models | None = None
        self._known: dict[tuple[str, bool], Tensor] = {}

    def gradients(self, formula: str, exact: bool) -> Tensor:
        """All gradients in one tensor, computed in float64 where ``exact``, else in the models' dtype."""
        if exact and self._wide is None:
            self._wide = copy.copy(self.models)
            self._wide.stock = copy.deepcopy(self.models.stock).double()
        models = self._wide if exact and self._wide is not None else self.models
        if (formula, exact) not in self._known:
            loss = _plain_loss(formula, models, self.batch)
            self._known[formula, exact] = _flat(gradients(models, loss))
        return self._known[formula, exact]

    def require(self, method: str, grads: dict[str, Tensor], exact: bool) -> float:
        """Return the relative error of a method's gradients, against float64 or against eager PEFT.

        Raises:
            WrongResult: it is too large.
        """
        formula, own, limit = _formula(method), _flat(grads), WHOLE_MODEL[dtype_of(self.batch.pair["labels"].device)]
        peer, truth = (self.gradients(formula, wide) for wide in (False, exact))
        error, theirs = (float((g - truth).norm() / truth.norm()) for g in (own, peer))
        if not exact:
            limit *= 2  # both are rounded
        elif method not in liger.ROWS:  # whose other layers round differently
            limit = min(limit, 2 * theirs + torch.finfo(grads[next(iter(grads))].dtype).eps)
        if not error <= limit:
            raise WrongResult(f"adapter gradients: relative error {error:.2e} > {limit:.2e} (eager PEFT {theirs:.2e})")
        return error


def small_errors(shape: StepShape, methods: Iterable[str], device: torch.device) -> dict[str, float | Exception]:
    """Each method's relative error against float64 at two blocks and two rows, or what was raised.

    With nf4 weights, which have no float64 form, against PEFT's eager layers.
    """
    model = replace(shape.model, vocabulary=min(SMALL_VOCABULARY, shape.model.vocabulary))
    few = replace(shape, model=model, B=min(_ROWS, shape.B))
    depth = min(_BLOCKS, shape.depth or model.layers)
    models, batch = models_of(few, depth, device), batch_of(few, device)
    truth, fast = Truth(models, batch), FastSteps(models)
    found: dict[str, float | Exception] = {}
    for method in methods:
        if models.refusal(method) is not None:
            continue
        try:
            if method in fast_steps.CAPTURED:
                grads = fast.collected(method, fast.ready(method, batch))
            else:
                grads = gradients(models, models.loss(method, batch))
            found[method] = truth.require(method, grads, exact=shape.precision != "nf4")
        except Exception as error:  # the other methods go on
            found[method] = error
    return found


def _formula(method: str) -> str:
    """What a method computes: "lora", "input-fusion", or a fusion with "flare"'s states or the authors'."""
    if fast_steps.is_fast(method):
        method = fast_steps.eager_form(method)
    method = like(method)
    if method in MEMORY:
        return "flare"
    return {"peft-lora": "lora", "authors": "states", "eager-sdpa": "states"}.get(method, method)


def _plain_loss(formula: str, models: Models, batch: Batch) -> Tensor:
    """A formula over PEFT's own layers with the stock model's attention."""
    if formula == "lora":
        return models.stock(**batch.target).loss
    if formula == "input-fusion":
        return models.stock(**batch.joined).loss
    states = models.block_outputs if formula == "flare" else models.all_states
    return models.eager_loss(models.stock, batch, states(models.stock, batch))


def _flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.double().flatten() for _, grad in sorted(grads.items())])
