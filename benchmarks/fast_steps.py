"""Training steps without Python in between: captured by `flare.GraphedStep`, or compiled by torch.compile (GPU only).

=====================  ===============================================================================================
flare-captured         the row flare as a CUDA graph
lora-captured          the row lora
flare-warm-captured    the row flare-warm: its rows are copied into the graph's buffers before the replay
peft-lora-captured     PEFT's LoRA
input-fusion-captured  the row input-fusion
peft-compiled          PEFT's LoRA, mode="default"
lora-compiled          the row lora, mode="default"
flare-compiled         the row flare, mode="default"
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
from cases import NotHere, Variant
from models import Models, arguments, quiet
from timing import device_work
from torch import Tensor

import flare
from flare.experiments.measure import peak_bytes

#: Row -> the row of models.METHODS that computes the same. The first rows get what memory there is.
CAPTURED = {
    "flare-captured": "flare",
    "lora-captured": "lora",
    "flare-warm-captured": "flare-warm",
    "peft-lora-captured": "peft-lora",
    "input-fusion-captured": "input-fusion",
}
COMPILED = {"peft-compiled": "peft-lora", "lora-compiled": "lora", "flare-compiled": "flare"}
#: Captured rows of big models, whose steps the device decides: a graph saves them little and holds its activations.
_OF_BIG_MODELS = ("flare-captured", "lora-captured")
#: Captured rows on padded texts, of small models.
_PADDED = ("flare-captured", "lora-captured")
#: Forwards and backwards of a shape until its graph is replayed.
_UNTIL_REPLAY = 4


def methods_of(shape: shapes.StepShape) -> tuple[str, ...]:
    """The methods of this file for a shape: one block is compiled, a whole step captured too."""
    big = shape.model.d > 1024
    if shape.padded:
        return () if big else _PADDED
    captured = _OF_BIG_MODELS if big else tuple(CAPTURED)
    return {"step": (*captured, *COMPILED), "block": ("peft-compiled", "flare-compiled")}.get(shape.question, ())


def is_fast(method: str) -> bool:
    """Whether a row is one of this file's."""
    return method in CAPTURED or method in COMPILED


def eager_form(method: str) -> str:
    """The row of models.METHODS that computes the same."""
    return CAPTURED.get(method) or COMPILED[method]


def refusal(method: str, question: str, device: torch.device) -> str | None:
    """Why a method cannot run here; None where it can."""
    if device.type != "cuda":
        return (
            "CUDA graphs need a CUDA device" if method in CAPTURED else "compiled steps are compared on a CUDA device"
        )
    if method in COMPILED and question == "step" and shapes.grid() != "full":
        return "compiling a whole model takes minutes: see the block's rows, or set FLARE_BENCH_GRID=full"
    return None


class FastSteps:
    """The captured and compiled steps of one set of weights.

    Attributes:
        needs: bytes that the step of each eager row takes above what was there, noted by whoever measured them.
        graph_bytes: bytes that each captured step's graph holds.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.needs: dict[str, int] = {}
        self.graph_bytes: dict[str, int] = {}
        self._captured: dict[str, flare.GraphedStep] = {}
        self._compiled: dict[str, Any] = {}

    def gradients(self, method: str, batch: dict[str, Tensor]) -> None:
        """Run forward and backward of a batch from :meth:`ready`: adds to the adapters' .grad."""
        if method in COMPILED:
            if method not in self._compiled:
                self._compiled[method] = torch.compile(self.models.of_method(COMPILED[method]))
            self._compiled[method](**batch).loss.backward()
            return
        if method not in self._captured:
            cache = self.models.cache if CAPTURED[method] == "flare-warm" else None
            model = self.models.of_method(CAPTURED[method])
            self._captured[method] = flare.GraphedStep(model, source_cache=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "cuda_graphs")  # a step that runs eagerly would be timed as a captured one
            self._captured[method](batch)

    def ready(self, method: str, batch: Batch) -> dict[str, Tensor]:
        """Run a batch until its graph is replayed (or its code compiled), and drop the gradients.

        Returns:
            The batch as the method takes it, in pinned memory for a captured step.
        """
        if CAPTURED.get(method) == "flare-warm":  # its rows are kept from here on
            with quiet(), torch.no_grad():
                self.models.loss("flare-warm", batch)
        given = arguments(eager_form(method), batch)
        if method in CAPTURED:
            given = {name: value.cpu().pin_memory() for name, value in given.items()}
        before = self._make_room(method) if method in CAPTURED else 0
        for _ in range(_UNTIL_REPLAY):
            self.gradients(method, given)
            self.drop()
        if method in CAPTURED:
            torch.cuda.empty_cache()
            self.graph_bytes[method] = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - before
        return given

    def _make_room(self, method: str) -> int:
        """Return the bytes that are reserved with nothing cached, beyond those of living tensors: earlier graphs'.

        Raises:
            NotHere: the graph's activations would leave no room for the hungriest eager row.
        """
        torch.cuda.empty_cache()
        needed = self.needs.get(CAPTURED[method], 0) + max(self.needs.values(), default=0)
        free, total = torch.cuda.mem_get_info()
        if 1.05 * needed > free:
            gc.collect()  # takes a large part of a second where many models live
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
        if 1.05 * needed > free:
            raise NotHere(
                f"its graph holds its activations, and together with the largest eager row's that is "
                f"{needed / 2**30:.0f} GiB; {free / 2**30:.0f} of {total / 2**30:.0f} GiB are free"
            )
        return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def drop(self) -> None:
        """Set the adapters' gradients to None."""
        for parameter in self.models.trained:
            parameter.grad = None

    def taken(self) -> dict[str, Tensor]:
        """Return the adapters' gradients by name, and set them to None."""
        named = self.models.stock.named_parameters()
        found = {name: p.grad for name, p in named if "lora_" in name and p.grad is not None}
        self.drop()
        return found

    def collected(self, method: str, ready: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapters' gradients of a step that is replayed, or compiled, by name."""
        self.gradients(method, ready)
        return {name: grad.clone() for name, grad in self.taken().items()}


def variant(
    fast: FastSteps,
    method: str,
    batch: Batch,
    require: Callable[[dict[str, Tensor]], None],
    optimizer: Any,
    facts: dict[str, Any],
    restore: Callable[[], None],
) -> Variant:
    """A method of this file as a variant.

    Args:
        require: raises where the adapters' gradients are wrong, with the adapters as ``restore`` leaves them.
        optimizer: None where a step ends with backward.
    """
    device = batch.pair["input_ids"].device
    own: dict[str, Tensor] = {}

    def call() -> None:
        with quiet():
            fast.gradients(method, own)
            if optimizer is not None:
                optimizer.step()
            fast.drop()

    def check() -> None:
        restore()
        with quiet():
            own.update(fast.ready(method, batch))
            require(fast.collected(method, own))

    def count() -> dict[str, Any]:
        with peak_bytes(device=device) as peak:
            work = device_work(call, device, warmed=True)
        assert work is not None
        held = fast.graph_bytes.get(method, 0)
        return {"launches": work.launches, "device_busy_s": work.busy_s, "peak_bytes": peak.peak + held}

    return Variant(call, check, count, facts)
