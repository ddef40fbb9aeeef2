"""Build the cases of a training step. Their variants (rows) are methods of models.py, liger.py and fast_steps.py."""

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

#: The methods (rows) of a case of the question "scaling".
SCALED = ("lora", "input-fusion", "authors", "eager-sdpa", "flare", "flare-offload", "flare-recompute", "flare-warm")
#: The eager methods that are measured on padded texts.
_PADDED = ("peft-lora", "lora", "input-fusion", "eager-sdpa", "flare", "flare-warm")
#: The methods that need the most memory.
_MOST_MEMORY = ("input-fusion", "authors")
#: The methods on PEFT's own layers, in eager mode.
_EAGER_PEFT = ("peft-lora", "authors", "eager-sdpa")
#: The methods whose step has a source pass.
_READ_SOURCE = ("authors", "eager-sdpa", "flare", "flare-offload", "flare-recompute")


def effort(device: torch.device) -> Effort:
    """Return how long to measure: 3 to 20 rounds on a GPU, where steps are long, and 11 to 20 rounds on a CPU."""
    return Effort(6.0, 3, 20, 1) if device.type == "cuda" else Effort(0.6, 11, 20, 1)


def depth_that_fits(shape: StepShape, device: torch.device) -> int:
    """Return the largest depth at which every method should fit into the device's memory.

    It is at most the depth of the shape, or of the model if the shape has none. Memory limits it on a GPU only.
    """
    model, tokens = shape.model, shape.B * shape.m
    if device.type != "cuda":
        return shape.depth or model.layers
    total = 0.85 * torch.cuda.get_device_properties(device).total_memory
    head_bytes = 2 * 2 * model.vocabulary * model.d + 2 * tokens * model.vocabulary * 12
    if model.family == "xlmr":
        head_bytes = 2 * model.vocabulary * model.d
    weights = 2 * (2 * model.d * model.n_q + 2 * model.d * model.n_v + 3 * model.d * model.inner)
    joined_bytes = 2 * tokens * 2 * (12 * model.d + 5 * model.inner)
    eager_length = (2 if model.family == "gemma2" else 1) * shape.m  # Gemma 2 has only eager attention
    scores = eager_length * joined_bytes // (2 * shape.m) + shape.B * model.heads * eager_length**2 * 8
    stacks = 2 if model.family == "mt5" else 1
    fits = int((total - head_bytes) / (stacks * (weights + max(joined_bytes, scores))))
    return max(1, min(shape.depth or model.layers, fits))


def methods_of(shape: StepShape) -> tuple[str, ...]:
    """Return the methods (rows) of a case."""
    if shape.question == "scaling":
        return SCALED
    eager = _PADDED if shape.padded else METHODS
    return (*eager, *(liger.ROWS if shape.has_liger else ()), *fast_steps.methods_of(shape))


def build(shape: StepShape, device: torch.device) -> Variants:
    """Return the variants of all methods, on one set of weights.

    If memory does not suffice, halve the depth and retry.
    """
    reason = refusal(shape.precision)
    if reason is not None:
        return dict.fromkeys(methods_of(shape), reason)
    if shape.question == "block":
        vocabulary = min(SMALL_VOCABULARY, shape.model.vocabulary)
        shape = replace(shape, model=replace(shape.model, vocabulary=vocabulary))
    refused = {method: _refusal(method, shape, device) for method in methods_of(shape)}
    unchecked = ("frozen", *fast_steps.COMPILED)  # frozen is transformers' own model; compiling twice takes too long
    runnable = [method for method, why in refused.items() if why is None and method not in unchecked]
    with quiet():
        errors = small_errors(shape, runnable, device)
    depth = depth_that_fits(shape, device)
    while True:
        try:
            _free_memory(device)
            with quiet():
                return _build(shape, depth, device, refused, errors)
        except torch.OutOfMemoryError:
            if depth == 1:
                raise
            depth //= 2


def _free_memory(device: torch.device) -> None:
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
    for method in ("lora", *_MOST_MEMORY):  # the first step creates the optimizer's state
        if method in refused and (method == "lora" or device.type == "cuda"):
            case.step(method)  # if this runs out of memory, the caller halves the depth for all methods
    variants: dict[str, Variant | str] = {}
    for method, why in refused.items():
        reason = why or models.refusal(method)
        make = case.fast_variant if fast_steps.is_fast(method) else case.variant
        variants[method] = reason or make(method)
    return variants


class _Case:
    """Builds the variants of one case. They share one set of weights."""

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
        self.initial = [parameter.detach().clone() for parameter in models.trained]
        self._counted: dict[str, dict[str, Any]] = {}

    def step(self, method: str) -> dict[str, Tensor]:
        """Run forward, backward and the optimizer's step; return the gradients of the adapters."""
        self.models.loss(method, self.batch).backward()
        if self.optimizer is not None and method != "frozen":
            self.optimizer.step()
        return self.fast.pop_gradients()

    @torch.no_grad()
    def restore(self) -> None:
        """Reset the adapters to their initial weights. Compared gradients are always computed at these weights."""
        torch._foreach_copy_(self.models.trained, self.initial)

    def require(self, method: str, grads: dict[str, Tensor]) -> dict[str, float]:
        """Return the errors of a method's gradients in the model of two blocks and at full size.

        For a compiled method, the first error is the error of its eager form. Methods on PEFT's eager layers have no
        error at full size, because these layers are the reference there.

        Raises:
            Exception: the exception that the method raised in the model of two blocks.
            WrongResult: the error at full size is too large.
        """
        small = self.errors[fast_steps.COMPILED.get(method, method)]
        if isinstance(small, Exception):
            raise small
        if method in _EAGER_PEFT:
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
        """Return the variant of a method of fast_steps.py."""
        facts = self._facts(fast_steps.eager_form(method))

        def require(grads: dict[str, Tensor]) -> None:
            facts["gradient_error"] = self.require(method, grads)

        return fast_steps.variant(self.fast, method, self.batch, require, self.optimizer, facts, self.restore)

    def variant(self, method: str) -> Variant:
        """Return the variant of an eager method of models.py or liger.py."""
        facts = self._facts(liger.ROWS.get(method, method))

        def call() -> None:
            with quiet():
                self.step(method)

        def check() -> None:
            if method == "frozen":  # transformers' own model needs no check
                return
            self.restore()
            with quiet():  # the same step is checked and counted, because steps at full size are slow
                grads, self._counted[method] = self._counted_step(method)
                self.restore()
                facts["gradient_error"] = self.require(method, grads)

        def count() -> dict[str, Any]:
            with quiet():
                return self._counters(method)

        return Variant(call, check, count, facts)

    def _counted_step(self, method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Run a step and return its gradients and counters.

        On a GPU, counters include launches and device-busy seconds.
        """
        models, device = self.models, self.device
        if method == "flare-warm":  # fill the cache, so that no source pass runs
            with torch.no_grad():
                models.loss(method, self.batch)
        # This forward runs before the measured step, which therefore excludes memory that only a first forward
        # allocates.
        with saved_bytes(ignore=[models.stock.parameters(), self.batch.pair, self.batch.joined]) as saved:
            loss = models.loss(method, self.batch)
        del loss
        state = [] if self.optimizer is None else self.optimizer.state_dict()
        live = [models.trained, list(models.stock.parameters()), state]
        blocks, grads = models.blocks(method), {}
        with count_calls(blocks) as ran, peak_bytes(live=live, device=device) as peak:
            work = device_work(lambda: grads.update(self.step(method)), device, warmed=True)
            if work is None:
                grads.update(self.step(method))
        expected = EXECUTIONS.get(liger.ROWS.get(method, method), 2) * len(blocks)
        if ran.total != expected:
            raise WrongResult(f"a step ran {ran.total} blocks, expected {expected}")
        self.fast.eager_bytes[method] = peak.above_start
        counters: dict[str, Any] = {
            "block_executions": ran.total,
            "saved_bytes": saved.total,
            "peak_bytes": peak.peak,
            "peak_bytes_above_start": peak.above_start,
        }
        return grads, counters if work is None else {
            **counters,
            "launches": work.launches,
            "device_busy_s": work.busy_s,
        }

    def _counters(self, method: str) -> dict[str, Any]:
        models, device = self.models, self.device
        counters = self._counted.pop(method, None) or self._counted_step(method)[1]
        if device.type != "cuda":
            with count_ops() as ops, count_flops() as flops:
                self.step(method)
            counters["launches"] = ops.total
            # FLOPs inside Triton kernels and bitsandbytes are not counted, so FLOPs are reported only if neither runs
            if self.shape.precision == "plain" and flare_kernels.select_backend(device, dtype_of(device)) == "torch":
                counters["flops"] = flops.total
        if method == "flare-warm":
            counters["cache_bytes"] = models.cache.nbytes  # the cache is on the device, so peak_bytes includes it
        if method == "frozen":
            counters["frozen_block_s"] = block_seconds(models.frozen, self.batch, device)
        if method in METHODS and (device.type != "cuda" or shapes.grid() == "full"):
            counters["parts_s"] = self._parts(method)
        return counters

    def _parts(self, method: str) -> dict[str, float]:
        """Return the seconds of source pass, forward without the source pass, backward and optimizer.

        The device is idle before and after each timed call.
        """
        models, device = self.models, self.device
        parts: dict[str, list[float]] = {"source": [], "forward": [], "backward": [], "optimizer": []}

        def source() -> object:
            if method in models.ours:
                source = self.batch.source
                return models.ours[method].encode_source(source["input_ids"], source.get("attention_mask"))
            return models.all_states(models.model_of(method), self.batch)

        for _ in range(1 if device.type == "cuda" else 3):
            losses: list[Tensor] = []
            forward = lambda losses=losses: losses.append(models.loss(method, self.batch))  # noqa: E731
            source_s = wall_seconds(source, device) if method in _READ_SOURCE else 0.0
            forward_s = wall_seconds(forward, device)
            parts["source"].append(source_s)
            parts["forward"].append(max(forward_s - source_s, 0.0))
            parts["backward"].append(wall_seconds(losses.pop().backward, device))
            steps = self.optimizer is not None and method != "frozen"
            parts["optimizer"].append(wall_seconds(self.optimizer.step, device) if steps else 0.0)
            self.fast.clear_gradients()
        return {name: statistics.median(seconds) for name, seconds in parts.items()}


def block_seconds(model: Any, batch: Batch, device: torch.device) -> float:
    """Return the device-busy seconds (wall seconds on a CPU) of forward and dx of the first block of a frozen model."""
    block, inputs = blocks_below(model)[0], {}

    def note(block: Any, args: Any, kwargs: Any) -> None:
        inputs.update(args=args, kwargs=kwargs)

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**batch.target)
    handle.remove()
    x = inputs["args"][0].detach().requires_grad_()
    grad = torch.randn_like(x)

    def call() -> None:
        y = block(x, *inputs["args"][1:], **inputs["kwargs"])
        torch.autograd.grad(y if isinstance(y, Tensor) else y[0], x, grad)

    call()
    times = 3
    work = device_work(lambda: [call() for _ in range(times)], device, warmed=True)
    if work is not None:
        return work.busy_s / times
    return statistics.median(wall_seconds(call, device) for _ in range(times))
