"""A training step as a case: the methods of models.py as variants, gated, counted, and ready to be timed in turn."""

from __future__ import annotations

import copy
import gc
import statistics
from dataclasses import replace
from typing import Any

import fast_steps
import torch
from cases import Variant, Variants
from fast_steps import FastSteps
from gate import WrongResult
from models import (
    EXECUTIONS,
    METHODS,
    PRECISION,
    UNITS,
    Models,
    base_model,
    batch_of,
    gradients,
    joined,
    quiet,
    refusal,
)
from shapes import StepShape
from timing import Effort, device_work, wall_seconds
from torch import Tensor

import flare_kernels
from flare.measure import count_calls, count_flops, count_ops, peak_bytes, saved_bytes

#: Relative error of all adapter gradients that 16 bits explain through some tens of random blocks; float32's.
WHOLE_MODEL = {torch.bfloat16: 0.15, torch.float32: 1e-3}
#: The block question's vocabulary: a head and an embedding that cost next to nothing.
_SMALL_VOCABULARY = 1024


def effort(device: torch.device) -> Effort:
    """A whole step is long: fewer rounds on a GPU; on a CPU as many as its neighbours ask for."""
    return Effort(6.0, 5, 30, 2) if device.type == "cuda" else Effort(0.6, 11, 20, 1)


def dtype_of(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; float32 on a CPU, whose 16-bit products say little."""
    return PRECISION if device.type == "cuda" else torch.float32


def depth_that_fits(shape: StepShape, device: torch.device) -> int:
    """The deepest model, up to the real one, whose hungriest method should fit the device's memory."""
    model, tokens = shape.model, shape.B * shape.m
    if device.type != "cuda":
        return shape.depth or model.layers
    total = 0.85 * torch.cuda.get_device_properties(device).total_memory
    of_head = 2 * 2 * model.vocabulary * model.d + 2 * tokens * model.vocabulary * 12
    if model.family == "xlmr":
        of_head = 2 * model.vocabulary * model.d
    weights = 2 * (2 * model.d * model.n_q + 2 * model.d * model.n_v + 3 * model.d * model.inner)
    twice_as_long = 2 * tokens * 2 * (12 * model.d + 5 * model.inner)
    eager_length = (2 if model.family == "gemma2" else 1) * shape.m  # Gemma 2 has no other attention
    scores = eager_length * twice_as_long // (2 * shape.m) + shape.B * model.heads * eager_length**2 * 8
    stacks = 2 if model.family == "mt5" else 1
    fits = int((total - of_head) / (stacks * (weights + max(twice_as_long, scores))))
    return max(1, min(shape.depth or model.layers, fits))


def methods_of(shape: StepShape) -> tuple[str, ...]:
    """The rows of a case."""
    return (*METHODS, *fast_steps.methods_of(shape.question))


def build(shape: StepShape, device: torch.device) -> Variants:
    """Every method on one set of weights; where memory does not suffice, at half the depth."""
    reason = refusal(shape.precision)
    if reason is not None:
        return dict.fromkeys(methods_of(shape), reason)
    depth = depth_that_fits(shape, device)
    while True:
        try:
            with quiet():
                return _build(shape, depth, device)
        except torch.OutOfMemoryError:
            if depth == 1:
                raise
            depth //= 2
            gc.collect()
            torch.cuda.empty_cache()


def _build(shape: StepShape, depth: int, device: torch.device) -> Variants:
    block_only = shape.question == "block"
    sized = (
        replace(shape.model, vocabulary=min(_SMALL_VOCABULARY, shape.model.vocabulary)) if block_only else shape.model
    )
    shape = replace(shape, model=sized)
    dtype = dtype_of(device)
    base = base_model(shape.model, depth, 2 * shape.m, device, dtype, shape.precision)
    if block_only:
        base.enable_input_require_grads()  # as inside a deep model: gradients reach the block's input
    models = Models.of(base, shape.model.family, shape.r, dtype)
    batch = batch_of(shape, device)
    optimizer = torch.optim.AdamW(models.trained, lr=1e-5)
    fast = FastSteps(models)
    truth = _Truth(models, fast, shape, device)
    variants: dict[str, Variant | str] = {}
    for method in METHODS:
        reason = models.refusal(method)
        variants[method] = reason or _variant(method, models, shape, depth, batch, optimizer, truth)
        if reason is None and device.type == "cuda":  # the memory's worst: where it is too much, all methods get less
            _step(method, models, batch, optimizer, block_only)
    for method in fast_steps.methods_of(shape.question):
        facts = _facts(fast_steps.eager_form(method), models, shape, depth, device)
        reason = fast_steps.refusal(method, shape.question, device)
        last = None if block_only else optimizer
        variants[method] = reason or fast_steps.variant(fast, method, batch, truth.require, last, facts)
    return variants


def _facts(method: str, models: Models, shape: StepShape, depth: int, device: torch.device) -> dict[str, Any]:
    return {
        "theory_units": UNITS.get(method, 3),
        "depth": depth,
        "whole_model": depth == shape.model.layers,
        "target_tokens": shape.B * shape.m,
        "dtype": str(dtype_of(device)).removeprefix("torch."),
        "attention": models.of_method(method).get_base_model().config._attn_implementation,
    }


def _step(method: str, models: Models, batch: dict[str, Tensor], optimizer: Any, block_only: bool) -> None:
    models.loss(method, batch).backward()
    if not block_only:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _variant(
    method: str,
    models: Models,
    shape: StepShape,
    depth: int,
    batch: dict[str, Tensor],
    optimizer: Any,
    truth: _Truth,
) -> Variant:
    device = batch["input_ids"].device
    block_only = shape.question == "block"

    def call() -> None:
        with quiet():
            _step(method, models, batch, optimizer, block_only)

    def check() -> None:
        with quiet():
            truth.require(method)

    def count() -> dict[str, Any]:
        call()  # the optimizer's state exists from here on, and the rows of flare-warm are kept
        live = [models.trained, list(models.stock.parameters()), optimizer.state_dict()]
        with count_calls(models.blocks(method)) as blocks:
            call()
        due = EXECUTIONS.get(method, 2) * len(models.blocks(method))
        if blocks.total != due:
            raise WrongResult(f"a step ran {blocks.total} blocks, {due} are due")
        with saved_bytes(ignore=[models.stock.parameters(), batch]) as saved:
            kept = models.loss(method, batch)
        del kept
        with peak_bytes(live=live, device=device) as peak:
            call()
        found: dict[str, Any] = {
            "block_executions": blocks.total,
            "saved_bytes": saved.total,
            "peak_bytes": peak.peak,
            "peak_bytes_above_start": peak.above_start,
        }
        with count_ops() as launched, count_flops() as flops:
            call()
        work = device_work(call, device)
        found["launches"] = launched.total if work is None else work.launches
        if work is not None:
            found["device_busy_s"] = work.busy_s
        # what runs inside a Triton kernel, or in bitsandbytes, is not seen
        if shape.precision == "plain" and flare_kernels.select_backend(device, dtype_of(device)) == "torch":
            found["flops"] = flops.total
        if method == "flare-warm":
            found["cache_bytes"] = models.cache.nbytes  # on the device, within peak_bytes; check's rows too
        found["parts_s"] = _parts(method, models, batch, optimizer, block_only)
        return found

    return Variant(call, check, count, _facts(method, models, shape, depth, device))


def _parts(method: str, models: Models, batch: dict[str, Tensor], optimizer: Any, block_only: bool) -> dict[str, float]:
    """Seconds of source pass, forward, backward and optimizer, each from an idle device to an idle device."""
    device = batch["input_ids"].device
    found: dict[str, list[float]] = {"source": [], "forward": [], "backward": [], "optimizer": []}

    def source() -> object:
        if method in models.ours:
            return models.ours[method].encode_source(batch["source_input_ids"])
        return models.all_states(models.of_method(method), batch)

    for _ in range(3):
        kept: list[Any] = []
        reads_source = method not in ("lora", "input-fusion", "flare-warm")
        alone = wall_seconds(source, device) if reads_source else 0.0
        whole = wall_seconds(lambda kept=kept: kept.append(models.loss(method, batch)), device)  # type: ignore[misc]
        found["source"].append(alone)
        found["forward"].append(max(whole - alone, 0.0))
        found["backward"].append(wall_seconds(kept.pop().backward, device))
        found["optimizer"].append(0.0 if block_only else wall_seconds(optimizer.step, device))
        optimizer.zero_grad(set_to_none=True)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


# --- the gate ---------------------------------------------------------------------------------------------------------


class _Truth:
    """Adapter gradients of a method in float64, or, where that does not fit, in another form of the same numbers."""

    def __init__(self, models: Models, fast: FastSteps, shape: StepShape, device: torch.device) -> None:
        self.models, self.fast = models, fast
        self.dtype = dtype_of(device)
        self.batch = batch_of(replace(shape, B=min(shape.B, 2)), device)
        self.exact = shape.precision != "nf4" and self._fits(device)

    def _fits(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return True
        weights = 8 * sum(p.numel() for p in self.models.stock.parameters())
        return weights < 0.3 * torch.cuda.get_device_properties(device).total_memory

    def require(self, method: str) -> None:
        """Raises WrongResult where a method's gradients are further from the truth than twice PEFT's eager ones."""
        if method in fast_steps.CAPTURED or method in fast_steps.COMPILED:
            own = _flat(self.fast.collected(method, self.batch))
            method = fast_steps.eager_form(method)
        else:
            own = _flat(gradients(self.models, self.models.loss(method, self.batch)))
        peer = _flat(gradients(self.models, _plain_loss(method, self.models, self.batch)))
        if self.exact:
            wide = copy.copy(self.models)
            wide.stock = copy.deepcopy(self.models.stock).double()
            truth = _flat(gradients(wide, _plain_loss(method, wide, self.batch)))
        else:
            truth = peer
        error, theirs = (float((g - truth).norm() / truth.norm()) for g in (own, peer))
        limit = WHOLE_MODEL[self.dtype]
        if self.exact:
            limit = min(limit, 2 * theirs + torch.finfo(self.dtype).eps)
        if not error <= limit:
            raise WrongResult(f"adapter gradients: relative error {error:.2e} > {limit:.2e} (eager PEFT {theirs:.2e})")


def _plain_loss(method: str, models: Models, batch: dict[str, Tensor]) -> Tensor:
    """What a method computes, over PEFT's own layers with the stock model's attention."""
    if method == "lora":
        return models.stock(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    if method == "input-fusion":
        return models.stock(**joined(batch)).loss
    states = models.block_outputs if method in models.ours else models.all_states
    return models.eager_loss(models.stock, batch, states(models.stock, batch))


def _flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.double().flatten() for _, grad in sorted(grads.items())])
