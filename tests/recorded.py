"""A CPU replacement for the CUDA graph recorder of flare.GraphedStep, and an eager step to compare with."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import tiny
import torch
from torch import Tensor, nn

import flare
from flare.training.graph_recorder import Recording


class CpuRecorder:
    """Recorder whose replay runs the captured step again, with the captured tensors and gradient buffers.

    Attributes:
        failing: function without arguments that each capture calls, and that raises an error to make the capture fail.
            None (default): not called.
        captures: number of captures.
        replays: number of replays.
        released: number of recordings that were released.
        depth: number of ``stream`` contexts that are entered.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.failing: Callable[[], None] | None = None
        self.captures = self.replays = self.released = self.depth = 0

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def capture(self, run: Callable[[], Tensor]) -> Recording:
        assert self.depth == 1, "steps and captures share one stream"
        self.captures += 1
        parameters = list(self.model.parameters())
        grads = [p.grad for p in parameters]
        values = [None if grad is None else grad.clone() for grad in grads]
        before = torch.get_rng_state()
        try:
            result = run().clone()
            if self.failing is not None:
                self.failing()
        finally:
            torch.set_rng_state(before)
            for grad, value in zip(grads, values, strict=True):
                if grad is not None:
                    grad.copy_(value)
        result.fill_(torch.nan)

        def replay() -> None:
            assert self.depth == 1
            self.replays += 1
            current = [p.grad for p in parameters]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            result.copy_(run())
            for parameter, grad in zip(parameters, current, strict=True):
                parameter.grad = grad

        def release() -> None:
            self.released += 1

        return Recording(result, replay, release)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cuda_graphs", UserWarning)
        yield


def graphed(model: nn.Module, *args: Any, **options: Any) -> tuple[flare.GraphedStep, CpuRecorder]:
    recorder = CpuRecorder(model)
    return flare.GraphedStep(model, *args, recorder=recorder, **options), recorder


def eager(model: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    def step(batch: dict[str, Any]) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step


def full(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with masks of ones, so that no position is padding."""
    return {name: torch.ones_like(value) if name.endswith("mask") else value for name, value in batch.items()}


def same_gradients(model: nn.Module, other: nn.Module) -> None:
    grads, other_grads = tiny.gradients(model), tiny.gradients(other)
    assert grads.keys() == other_grads.keys() and other_grads
    for name, grad in other_grads.items():
        assert torch.equal(grads[name], grad), name
