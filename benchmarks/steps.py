"""A training step as a case: the methods of models.py as variants, gated, counted, and ready to be timed in turn."""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from typing import Any

import fast_steps
import liger
import shapes
import torch
from batches import Batch, batch_of
from cases import Variant, Variants
from fast_steps import FastSteps
from gate import WrongResult
from models import EXECUTIONS, METHODS, UNITS, Models, blocks_below, quiet, refusal
from shapes import StepShape
from step_gate import SMALL_VOCABULARY, Truth, dtype_of, models_of, small_errors
from timing import Effort, device_work, wall_seconds
from torch import Tensor

import flare_kernels
from flare.experiments.measure import count_calls, count_flops, count_ops, peak_bytes, saved_bytes

#: The rows whose growth is drawn.
SCALED = ("lora", "input-fusion", "authors", "eager-sdpa", "flare", "flare-offload", "flare-recompute", "flare-warm")
#: The eager rows of a padded step.
_PADDED = ("peft-lora", "lora", "input-fusion", "eager-sdpa", "flare", "flare-warm")
#: Rows that take the most memory.
_HUNGRY = ("input-fusion", "authors")
#: Rows of PEFT's own layers in eager mode.
_PEFTS_OWN = ("peft-lora", "authors", "eager-sdpa")
_READ_SOURCE = ("authors", "eager-sdpa", "flare", "flare-offload", "flare-recompute")


def effort(device: torch.device) -> Effort:
    """A whole step is long: fewer rounds on a GPU; on a CPU as many as its neighbours ask for."""
    return Effort(6.0, 3, 20, 1) if device.type == "cuda" else Effort(0.6, 11, 20, 1)


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
    if shape.question == "scaling":
        return SCALED
    eager = _PADDED if shape.padded else METHODS
    return (*eager, *(liger.ROWS if shape.has_liger else ()), *fast_steps.methods_of(shape))


def build(shape: StepShape, device: torch.device) -> Variants:
    """Every method on one set of weights; where memory does not suffice, at half the depth."""
    reason = refusal(shape.precision)
    if reason is not None:
        return dict.fromkeys(methods_of(shape), reason)
    if shape.question == "block":
        vocabulary = min(SMALL_VOCABULARY, shape.model.vocabulary)
        shape = replace(shape, model=replace(shape.model, vocabulary=vocabulary))
    refused = {method: _refusal(method, shape, device) for method in methods_of(shape)}
    alone = ("frozen", *fast_steps.COMPILED)  # transformers' own; compiling twice would take too long
    runnable = [method for method, why in refused.items() if why is None and method not in alone]
    with quiet():
        errors = small_errors(shape, runnable, device)
    depth = depth_that_fits(shape, device)
    while True:
        try:
            _give_back(device)
            with quiet():
                return _build(shape, depth, device, refused, errors)
        except torch.OutOfMemoryError:
            if depth == 1:
                raise
            depth //= 2


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _refusal(method: str, shape: StepShape, device: torch.device) -> str | None:
    if fast_steps.is_fast(method):
        return fast_steps.refusal(method, shape.question, device)
    return liger.refusal(device) if method in liger.ROWS else None


def _build(
    shape: StepShape,
    depth: int,
    device: torch.device,
    refused: dict[str, str | None],
    errors: dict[str, float | Exception],
) -> Variants:
    models, batch = models_of(shape, depth, device), batch_of(shape, device)
    optimizer = None if shape.question == "block" else torch.optim.AdamW(models.trained, lr=1e-5)
    case = _Case(models, shape, depth, batch, optimizer, errors)
    for method in ("lora", *_HUNGRY):  # the optimizer's state exists from here on
        if method in refused and (method == "lora" or device.type == "cuda"):
            case.step(method)  # where the memory's worst is too much, all methods get less
    variants: dict[str, Variant | str] = {}
    for method, why in refused.items():
        reason = why or models.refusal(method)
        make = case.fast_variant if fast_steps.is_fast(method) else case.variant
        variants[method] = reason or make(method)
    return variants


class _Case:
    """The variants of one shape over one set of weights."""

    def __init__(
        self,
        models: Models,
        shape: StepShape,
        depth: int,
        batch: Batch,
        optimizer: Any,
        errors: dict[str, float | Exception],
    ) -> None:
        self.models, self.shape, self.depth, self.batch, self.optimizer = models, shape, depth, batch, optimizer
        self.errors = errors
        self.device = batch.pair["input_ids"].device
        self.fast = FastSteps(models)
        self.truth = Truth(models, batch)
        self.at_first = [parameter.detach().clone() for parameter in models.trained]
        self._counted: dict[str, dict[str, Any]] = {}

    def step(self, method: str) -> dict[str, Tensor]:
        """Run forward, backward and the optimizer's step; return the adapters' gradients."""
        self.models.loss(method, self.batch).backward()
        if self.optimizer is not None and method != "frozen":
            self.optimizer.step()
        return self.fast.taken()

    @torch.no_grad()
    def restore(self) -> None:
        """Set the adapters to what they were before the first step: gradients are compared there."""
        torch._foreach_copy_(self.models.trained, self.at_first)

    def require(self, method: str, grads: dict[str, Tensor]) -> dict[str, float]:
        """Return a method's errors at two blocks (a compiled one's: of its eager form) and at full size.

        Raises what was raised at two blocks, or WrongResult. PEFT's own eager layers have nothing to be compared with
        at full size.
        """
        small = self.errors[fast_steps.COMPILED.get(method, method)]
        if isinstance(small, Exception):
            raise small
        if method in _PEFTS_OWN:
            return {"two_blocks": small}
        return {"two_blocks": small, "full_size": self.truth.require(method, grads, exact=False)}

    def _facts(self, method: str) -> dict[str, Any]:
        return {
            "theory_units": UNITS.get(method, 3),
            "depth": self.depth,
            "whole_model": self.depth == self.shape.model.layers,
            "target_tokens": self.batch.tokens,
            "dtype": str(dtype_of(self.device)).removeprefix("torch."),
            "attention": self.models.transformers_model(method).config._attn_implementation,
        }

    def fast_variant(self, method: str) -> Variant:
        """A row of fast_steps.py."""
        facts = self._facts(fast_steps.eager_form(method))

        def require(grads: dict[str, Tensor]) -> None:
            facts["gradient_error"] = self.require(method, grads)

        return fast_steps.variant(self.fast, method, self.batch, require, self.optimizer, facts, self.restore)

    def variant(self, method: str) -> Variant:
        """An eager row of models.py or liger.py."""
        facts = self._facts(liger.ROWS.get(method, method))

        def call() -> None:
            with quiet():
                self.step(method)

        def check() -> None:
            if method == "frozen":  # transformers' own model
                return
            self.restore()
            with quiet():  # one step is gated and counted: at full size each costs a part of the case's time
                grads, self._counted[method] = self._counted_step(method)
                self.restore()
                facts["gradient_error"] = self.require(method, grads)

        def count() -> dict[str, Any]:
            with quiet():
                return self._counters(method)

        return Variant(call, check, count, facts)

    def _counted_step(self, method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Run a step; return its gradients and counters, on a GPU with launches and device-busy seconds."""
        models, device = self.models, self.device
        if method == "flare-warm":  # from here on no source pass is due
            with torch.no_grad():
                models.loss(method, self.batch)
        # before the step, so that what only a first forward makes is not counted
        with saved_bytes(ignore=[models.stock.parameters(), self.batch.pair, self.batch.joined]) as saved:
            kept = models.loss(method, self.batch)
        del kept
        state = [] if self.optimizer is None else self.optimizer.state_dict()
        live = [models.trained, list(models.stock.parameters()), state]
        blocks, grads = models.blocks(method), {}
        with count_calls(blocks) as ran, peak_bytes(live=live, device=device) as peak:
            work = device_work(lambda: grads.update(self.step(method)), device, warmed=True)
            if work is None:
                grads.update(self.step(method))
        due = EXECUTIONS.get(liger.ROWS.get(method, method), 2) * len(blocks)
        if ran.total != due:
            raise WrongResult(f"a step ran {ran.total} blocks, {due} are due")
        self.fast.needs[method] = peak.above_start
        found = {
            "block_executions": ran.total,
            "saved_bytes": saved.total,
            "peak_bytes": peak.peak,
            "peak_bytes_above_start": peak.above_start,
        }
        return grads, found if work is None else {**found, "launches": work.launches, "device_busy_s": work.busy_s}

    def _counters(self, method: str) -> dict[str, Any]:
        models, device = self.models, self.device
        found = self._counted.pop(method, None) or self._counted_step(method)[1]
        if device.type != "cuda":
            with count_ops() as launched, count_flops() as flops:
                self.step(method)
            found["launches"] = launched.total
            # what runs inside a Triton kernel, or in bitsandbytes, is not seen
            if self.shape.precision == "plain" and flare_kernels.select_backend(device, dtype_of(device)) == "torch":
                found["flops"] = flops.total
        if method == "flare-warm":
            found["cache_bytes"] = models.cache.nbytes  # on the device, within peak_bytes
        if method == "frozen":
            found["frozen_block_s"] = block_seconds(models.frozen, self.batch, device)
        if method in METHODS and (device.type != "cuda" or shapes.grid() == "full"):
            found["parts_s"] = self._parts(method)
        return found

    def _parts(self, method: str) -> dict[str, float]:
        """Seconds of source pass, forward, backward and optimizer, each from an idle device to an idle device."""
        models, device = self.models, self.device
        found: dict[str, list[float]] = {"source": [], "forward": [], "backward": [], "optimizer": []}

        def source() -> object:
            if method in models.ours:
                source = self.batch.source
                return models.ours[method].encode_source(source["input_ids"], source.get("attention_mask"))
            return models.all_states(models.of_method(method), self.batch)

        for _ in range(1 if device.type == "cuda" else 3):
            kept: list[Tensor] = []
            forward = lambda kept=kept: kept.append(models.loss(method, self.batch))  # noqa: E731
            alone = wall_seconds(source, device) if method in _READ_SOURCE else 0.0
            whole = wall_seconds(forward, device)
            found["source"].append(alone)
            found["forward"].append(max(whole - alone, 0.0))
            found["backward"].append(wall_seconds(kept.pop().backward, device))
            steps = self.optimizer is not None and method != "frozen"
            found["optimizer"].append(wall_seconds(self.optimizer.step, device) if steps else 0.0)
            self.fast.drop()
        return {name: statistics.median(seconds) for name, seconds in found.items()}


def block_seconds(model: Any, batch: Batch, device: torch.device) -> float:
    """Seconds of forward and dx of the first block of a frozen model: device-busy ones; of the wall on a CPU."""
    block, given = blocks_below(model)[0], {}

    def note(block: Any, args: Any, kwargs: Any) -> None:
        given.update(args=args, kwargs=kwargs)

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**batch.target)
    handle.remove()
    x = given["args"][0].detach().requires_grad_()
    grad = torch.randn_like(x)

    def call() -> None:
        y = block(x, *given["args"][1:], **given["kwargs"])
        torch.autograd.grad(y if isinstance(y, Tensor) else y[0], x, grad)

    call()
    times = 3
    work = device_work(lambda: [call() for _ in range(times)], device, warmed=True)
    if work is not None:
        return work.busy_s / times
    return statistics.median(wall_seconds(call, device) for _ in range(times))
