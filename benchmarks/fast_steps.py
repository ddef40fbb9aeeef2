"""Run training steps that are captured by `flare.GraphedStep` or compiled by torch.compile (GPU only).

A row is one method in the tables of results. Each row of this file computes the same as an eager row of models.py:

=====================  ===============================================================================================
flare-captured         the row flare as a CUDA graph
lora-captured          the row lora as a CUDA graph
flare-warm-captured    the row flare-warm as a CUDA graph: cached states are copied into its buffers before each replay
peft-lora-captured     the row peft-lora as a CUDA graph
input-fusion-captured  the row input-fusion as a CUDA graph
peft-compiled          the row peft-lora under torch.compile (its mode "default")
lora-compiled          the row lora under torch.compile
flare-compiled         the row flare under torch.compile
=====================  ===============================================================================================
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import shapes
import torch
from batches import Batch
from cases import CannotRun, Variant
from models import Models, arguments, quiet
from timing import device_work
from torch import Tensor

import flare
from flare.experiments.measure import peak_bytes

#: From each captured row to the eager row of models.METHODS that computes the same. The rows are captured in this
#: order, so if memory does not suffice for all graphs, the first rows get it.
CAPTURED = {
    "flare-captured": "flare",
    "lora-captured": "lora",
    "flare-warm-captured": "flare-warm",
    "peft-lora-captured": "peft-lora",
    "input-fusion-captured": "input-fusion",
}
#: From each compiled row to the eager row that computes the same.
COMPILED = {"peft-compiled": "peft-lora", "lora-compiled": "lora", "flare-compiled": "flare"}
#: Captured rows that are measured on big models. The device, not Python, limits the speed of their steps, so a graph
#: saves little time, but needs memory for its activations.
_OF_BIG_MODELS = ("flare-captured", "lora-captured")
#: Captured rows that are measured on padded texts, on small models only.
_PADDED = ("flare-captured", "lora-captured")
#: Number of steps of one shape after which its graph is replayed.
_UNTIL_REPLAY = 4


def methods_of(shape: shapes.StepShape) -> tuple[str, ...]:
    """Return the methods of this file for a shape.

    For the question "block", steps are compiled. For the question "step", they are captured and compiled, but on padded
    rows they are only captured, and only for small models. Other questions have no methods of this file.
    """
    big = shape.model.d > 1024
    if shape.padded:
        return () if big else _PADDED
    captured = _OF_BIG_MODELS if big else tuple(CAPTURED)
    return {"step": (*captured, *COMPILED), "block": ("peft-compiled", "flare-compiled")}.get(shape.question, ())


def is_fast(method: str) -> bool:
    """Return whether a row belongs to this file."""
    return method in CAPTURED or method in COMPILED


def eager_form(method: str) -> str:
    """Return the eager row of models.METHODS that computes the same as a row of this file."""
    return CAPTURED.get(method) or COMPILED[method]


def refusal(method: str, question: str, device: torch.device) -> str | None:
    """Return why a method is not timed on this device with the chosen grid, or None if it is timed."""
    if device.type != "cuda":
        return (
            "CUDA graphs need a CUDA device" if method in CAPTURED else "compiled steps are timed on a CUDA device only"
        )
    if method in COMPILED and question == "step" and shapes.grid() != "full":
        return "compiling a whole model takes minutes: see the rows of one block, or set FLARE_BENCH_GRID=full"
    return None


class FastSteps:
    """The captured and compiled steps of one set of weights.

    Attributes:
        eager_bytes: for each eager row, the peak memory of its step minus the memory at the start of the step. The
            caller sets it.
        graph_bytes: for each captured row, the bytes that its graph holds.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.eager_bytes: dict[str, int] = {}
        self.graph_bytes: dict[str, int] = {}
        self._captured: dict[str, flare.GraphedStep] = {}
        self._compiled: dict[str, Any] = {}

    def gradients(self, method: str, batch: dict[str, Tensor]) -> None:
        """Run forward and backward of a batch from :meth:`prepare`.

        The gradients are added to .grad of the adapters.
        """
        if method in COMPILED:
            if method not in self._compiled:
                self._compiled[method] = torch.compile(self.models.model_of(COMPILED[method]))
            self._compiled[method](**batch).loss.backward()
            return
        if method not in self._captured:
            cache = self.models.cache if CAPTURED[method] == "flare-warm" else None
            model = self.models.model_of(CAPTURED[method])
            self._captured[method] = flare.GraphedStep(model, source_cache=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "cuda_graphs")  # otherwise an eager step would be timed as a captured one
            self._captured[method](batch)

    def prepare(self, method: str, batch: Batch) -> dict[str, Tensor]:
        """Run a batch until later steps replay its graph or run compiled code, and clear the gradients.

        Returns:
            The method's arguments, in pinned memory for a captured step.
        """
        if CAPTURED.get(method) == "flare-warm":  # fills the cache
            with quiet(), torch.no_grad():
                self.models.loss("flare-warm", batch)
        inputs = arguments(eager_form(method), batch)
        if method in CAPTURED:
            inputs = {name: value.cpu().pin_memory() for name, value in inputs.items()}
        before = self._make_room(method) if method in CAPTURED else 0
        for _ in range(_UNTIL_REPLAY):
            self.gradients(method, inputs)
            self.clear_gradients()
        if method in CAPTURED:
            torch.cuda.empty_cache()
            self.graph_bytes[method] = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - before
        return inputs

    def _make_room(self, method: str) -> int:
        """Empty the allocator's cache, and return the reserved bytes that no live tensor uses (graphs hold them).

        Raises:
            CannotRun: the free memory cannot hold the activations of the graph and of the largest eager row together.
        """
        torch.cuda.empty_cache()
        needed = self.eager_bytes.get(CAPTURED[method], 0) + max(self.eager_bytes.values(), default=0)
        free, total = torch.cuda.mem_get_info()
        if 1.05 * needed > free:
            gc.collect()  # slow with many models in memory, so only if needed
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
        if 1.05 * needed > free:
            raise CannotRun(
                f"the activations of the graph and of the largest eager row need "
                f"{needed / 2**30:.0f} GiB; {free / 2**30:.0f} of {total / 2**30:.0f} GiB are free"
            )
        return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def clear_gradients(self) -> None:
        """Set the gradients of the adapters to None."""
        for parameter in self.models.trained:
            parameter.grad = None

    def pop_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the adapters by name, and set them to None."""
        named = self.models.stock.named_parameters()
        grads = {name: p.grad for name, p in named if "lora_" in name and p.grad is not None}
        self.clear_gradients()
        return grads

    def step_gradients(self, method: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the adapters by name, after one replayed or compiled step."""
        self.gradients(method, inputs)
        return {name: grad.clone() for name, grad in self.pop_gradients().items()}


def variant(
    fast: FastSteps,
    method: str,
    batch: Batch,
    require: Callable[[dict[str, Tensor]], None],
    optimizer: Any,
    facts: dict[str, Any],
    restore: Callable[[], None],
) -> Variant:
    """Return the variant of a captured or compiled method (see cases.py).

    Args:
        require: raises if the gradients of the adapters are wrong. Called after ``restore``.
        optimizer: None if a step ends with the backward pass.
        restore: resets the adapters to their initial weights.
    """
    device = batch.pair["input_ids"].device
    inputs: dict[str, Tensor] = {}

    def call() -> None:
        with quiet():
            fast.gradients(method, inputs)
            if optimizer is not None:
                optimizer.step()
            fast.clear_gradients()

    def check() -> None:
        restore()
        with quiet():
            inputs.update(fast.prepare(method, batch))
            require(fast.step_gradients(method, inputs))

    def count() -> dict[str, Any]:
        with peak_bytes(device=device) as peak:
            work = device_work(call, device, warmed=True)
        assert work is not None
        graph_bytes = fast.graph_bytes.get(method, 0)
        return {"launches": work.launches, "device_busy_s": work.busy_s, "peak_bytes": peak.peak + graph_bytes}

    return Variant(call, check, count, facts)
