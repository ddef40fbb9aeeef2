"""Training steps without Python in between: captured by `flare.GraphedStep`, or compiled by torch.compile (GPU only).

===================  =================================================================================================
lora-captured        the row lora as a CUDA graph
flare-captured       the row flare
flare-warm-captured  the row flare-warm: its rows are copied into the graph's buffers before the replay
peft-compiled        PEFT's LoRA, mode="default"
flare-compiled       the row flare, mode="default"
===================  =================================================================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import shapes
import torch
from cases import Variant
from models import Batch, Models, quiet
from timing import device_work
from torch import Tensor

import flare
from flare.measure import peak_bytes

CAPTURED = {"lora-captured": "lora", "flare-captured": "flare", "flare-warm-captured": "flare-warm"}
COMPILED = {"peft-compiled": "peft", "flare-compiled": "flare"}
#: Forwards and backwards of a shape until its graph is replayed.
_UNTIL_REPLAY = 4


def methods_of(question: str) -> tuple[str, ...]:
    """The methods of this file that belong to a question: one block is compiled, a whole step captured too."""
    return {"step": (*CAPTURED, *COMPILED), "block": (*COMPILED,)}.get(question, ())


def eager_form(method: str) -> str:
    """The row of models.METHODS that computes the same."""
    return CAPTURED.get(method) or {"peft": "lora"}.get(COMPILED[method], COMPILED[method])


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
        gradients: forward and backward of a method on a batch: adds to the adapters' .grad.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self._captured: dict[str, flare.GraphedStep] = {}
        self._compiled: dict[str, Any] = {}

    def gradients(self, method: str, batch: Batch) -> None:
        """Run forward and backward; a batch for a captured step stands on the host."""
        if method in COMPILED:
            self._loss_compiled(method, batch).backward()
            return
        if method not in self._captured:
            cache = self.models.cache if CAPTURED[method] == "flare-warm" else None
            model = self.models.of_method(CAPTURED[method])
            self._captured[method] = flare.GraphedStep(model, source_cache=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "cuda_graphs")  # a step that runs eagerly would be timed as a captured one
            self._captured[method](batch)

    def _loss_compiled(self, method: str, batch: Batch) -> Tensor:
        if method not in self._compiled:
            self._compiled[method] = torch.compile(self.models.of_method(COMPILED[method]))
        loss: Tensor = self._compiled[method](**batch).loss
        return loss

    def batch(self, method: str, batch: Batch) -> Batch:
        """A batch as the method takes it: without the source for LoRA, in pinned memory for a captured step."""
        if eager_form(method) == "lora":
            batch = {name: value for name, value in batch.items() if not name.startswith("source")}
        return {name: value.cpu().pin_memory() for name, value in batch.items()} if method in CAPTURED else batch

    def ready(self, method: str, batch: Batch) -> Batch:
        """Run a batch until its graph is replayed (or its code compiled), drop the gradients, and return the batch."""
        if CAPTURED.get(method) == "flare-warm":  # its rows are kept from here on
            with quiet(), torch.no_grad():
                self.models.loss("flare-warm", batch)
        batch = self.batch(method, batch)
        for _ in range(_UNTIL_REPLAY):
            self.gradients(method, batch)
            self.drop()
        return batch

    def drop(self) -> None:
        """Set the adapters' gradients to None."""
        for parameter in self.models.trained:
            parameter.grad = None

    def collected(self, method: str, batch: Batch) -> dict[str, Tensor]:
        """The adapters' gradients of a step that is replayed, or compiled, by name."""
        batch = self.ready(method, batch)
        self.gradients(method, batch)
        named = self.models.stock.named_parameters()
        found = {name: p.grad.clone() for name, p in named if "lora_" in name and p.grad is not None}
        self.drop()
        return found


def variant(
    fast: FastSteps, method: str, batch: Batch, require: Callable[[str], None], optimizer: Any, facts: dict[str, Any]
) -> Variant:
    """A method of this file as a variant; ``optimizer`` is None where a step ends with backward."""
    device = batch["input_ids"].device
    own: list[Batch] = []

    def call() -> None:
        with quiet():
            fast.gradients(method, own[0])
            if optimizer is not None:
                optimizer.step()
            fast.drop()

    def check() -> None:
        with quiet():
            require(method)
            own[:] = [fast.ready(method, batch)]

    def count() -> dict[str, Any]:
        call()
        with peak_bytes(device=device) as peak:
            call()
        work = device_work(call, device)
        assert work is not None
        return {"launches": work.launches, "device_busy_s": work.busy_s, "peak_bytes": peak.peak}

    return Variant(call, check, count, facts)
