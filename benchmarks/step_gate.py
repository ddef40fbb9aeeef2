"""Check the gradients of a training step before the step is timed.

The gradients of each method are compared with float64 in a model of two blocks, on two rows of the full length. The
model has its full width, and float64 is cheap at this size. The relative error may be at most twice the error of PEFT's
eager layers plus one machine epsilon, and at most `WHOLE_MODEL`; for methods on Liger's kernels, only the second bound
is checked. At full size, the gradients of one step are compared with PEFT's eager layers in the same dtype, and the
error may be at most twice `WHOLE_MODEL`. With nf4 weights, which have no float64 form, this is also the check of the
model of two blocks. Compiled methods are checked at full size only, because compiling them a second time for the small
model takes too long.
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
from models import MEMORY, PRECISION, Models, base_model, gradients, without_liger
from shapes import StepShape
from torch import Tensor

#: Largest accepted relative error, against float64, of all adapter gradients of a model with random weights, by dtype.
WHOLE_MODEL = {torch.bfloat16: 0.15, torch.float32: 1e-3}
#: Vocabulary size for which head and embedding cost almost nothing.
SMALL_VOCABULARY = 1024
_BLOCKS, _ROWS = 2, 2


def dtype_of(device: torch.device) -> torch.dtype:
    """Return bf16 for a GPU, and float32 for a CPU, where timings in 16 bits tell little."""
    return PRECISION if device.type == "cuda" else torch.float32


def models_of(shape: StepShape, depth: int, device: torch.device) -> Models:
    """Return the models of a shape's methods, with ``depth`` blocks and one set of random weights on the device."""
    dtype = dtype_of(device)
    base = base_model(shape.model, depth, 2 * shape.m, device, dtype, shape.precision)
    base.config.use_cache = False  # as in training: no keys and values are stored for generation
    if shape.question == "block":
        base.enable_input_require_grads()  # as inside a deep model: gradients reach the block's input
    models = Models.of(base, shape.model.family, shape.r, dtype)
    if shape.has_liger and liger.refusal(device) is None:
        models.add_liger()
    return models


class Truth:
    """Gradients of the adapters for a batch on PEFT's eager layers, computed once per formula (see `_formula`)."""

    def __init__(self, models: Models, batch: Batch) -> None:
        self.models, self.batch = models, batch
        self._wide: Models | None = None
        self._cache: dict[tuple[str, bool], Tensor] = {}

    def gradients(self, formula: str, exact: bool) -> Tensor:
        """Return all gradients in one tensor, computed in float64 if ``exact``, otherwise in the models' dtype."""
        if exact and self._wide is None:
            self._wide = copy.copy(self.models)
            self._wide.stock = copy.deepcopy(self.models.stock).double()
        models = self._wide if exact and self._wide is not None else self.models
        if (formula, exact) not in self._cache:
            loss = _plain_loss(formula, models, self.batch)
            self._cache[formula, exact] = _flat(gradients(models, loss))
        return self._cache[formula, exact]

    def require(self, method: str, grads: dict[str, Tensor], exact: bool) -> float:
        """Return the relative error of a method's gradients.

        They are compared with float64 if ``exact``, otherwise with PEFT's eager layers in the models' dtype.

        Raises:
            WrongResult: the error is too large.
        """
        formula, flat, limit = _formula(method), _flat(grads), WHOLE_MODEL[dtype_of(self.batch.pair["labels"].device)]
        peer, truth = (self.gradients(formula, wide) for wide in (False, exact))
        error, peer_error = (float((g - truth).norm() / truth.norm()) for g in (flat, peer))
        if not exact:
            limit *= 2  # both gradients are rounded
        elif method not in liger.ROWS:  # Liger's layers round differently
            limit = min(limit, 2 * peer_error + torch.finfo(grads[next(iter(grads))].dtype).eps)
        if not error <= limit:
            raise WrongResult(
                f"adapter gradients: relative error {error:.2e} > {limit:.2e} (eager PEFT {peer_error:.2e})"
            )
        return error


def small_errors(shape: StepShape, methods: Iterable[str], device: torch.device) -> dict[str, float | Exception]:
    """Return each method's relative error at two blocks and two rows, or the exception that it raised.

    The gradients are compared with float64. With nf4 weights, which have no float64 form, they are compared with PEFT's
    eager layers. Methods that are not measured on this model are left out.
    """
    model = replace(shape.model, vocabulary=min(SMALL_VOCABULARY, shape.model.vocabulary))
    few = replace(shape, model=model, B=min(_ROWS, shape.B))
    depth = min(_BLOCKS, shape.depth or model.layers)
    models, batch = models_of(few, depth, device), batch_of(few, device)
    truth, fast = Truth(models, batch), FastSteps(models)
    errors: dict[str, float | Exception] = {}
    for method in methods:
        if models.refusal(method) is not None:
            continue
        try:
            if method in fast_steps.CAPTURED:
                grads = fast.step_gradients(method, fast.prepare(method, batch))
            else:
                grads = gradients(models, models.loss(method, batch))
            errors[method] = truth.require(method, grads, exact=shape.precision != "nf4")
        except Exception as error:  # the other methods are still checked
            errors[method] = error
    return errors


def _formula(method: str) -> str:
    """Return what a method computes: "lora", "input-fusion", "flare" or "states".

    "flare" fuses with the outputs of the source's blocks. "states" fuses with their inputs, as the authors do.
    """
    if fast_steps.is_fast(method):
        method = fast_steps.eager_form(method)
    method = without_liger(method)
    if method in MEMORY:
        return "flare"
    return {"peft-lora": "lora", "authors": "states", "eager-sdpa": "states"}.get(method, method)


def _plain_loss(formula: str, models: Models, batch: Batch) -> Tensor:
    """Return the loss of a formula on PEFT's own layers, with the attention of `Models.stock`."""
    if formula == "lora":
        return models.stock(**batch.target).loss
    if formula == "input-fusion":
        return models.stock(**batch.joined).loss
    states = models.block_outputs if formula == "flare" else models.all_states
    return models.eager_loss(models.stock, batch, states(models.stock, batch))


def _flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.double().flatten() for _, grad in sorted(grads.items())])
