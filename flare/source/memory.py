"""How source states wait for the backward pass: the strategies of the source pass's node.

    mode        forward keeps                  backward reads x_S from         beside plain LoRA (a step: 2 units)
    keep        x_S, one copy on the device    the kept tensors                1 unit of compute, L M d elements
    offload     x_S in pinned host memory      a copy made one state ahead     1 unit, two states on the device
    recompute   nothing of width d             a second pass of the base       2 units, nothing of width d times depth

All give the same gradients: a second pass runs the same frozen model on the same tokens under the same autocast.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import uses_reentrant_checkpointing
from .fsdp import is_sharded
from .states import StateKey

#: Called with a state's rows (n, d), in the order in which they come.
RowVisitor = Callable[[StateKey, Tensor], None]
#: Brings the states again in backward: takes what the node saved, and a visitor.
Replayer = Callable[[Sequence[Tensor], RowVisitor], None]

#: "auto" keeps states where they are at most this share of the device's memory (of the machine's, on a CPU).
AUTO_SHARE = 1 / 8


class Keep:
    """One copy of each state on the device, saved by the node itself: saved-tensor hooks see it, and autograd frees it
    after backward, however long the loss is held.
    """

    name = "keep"

    def __init__(self) -> None:
        self.states: dict[StateKey, Tensor] = {}

    def put(self, key: StateKey, x: Tensor) -> None:
        self.states[key] = x

    def saved(self) -> list[Tensor]:
        """What the node must save, in the order that :meth:`replayer` expects."""
        return [self.states[key] for key in sorted(self.states)]

    def replayer(self) -> Replayer:
        """What the node keeps for its backward pass: hands every state to a visitor again. Holds no state itself."""
        keys = sorted(self.states)

        def replay(saved: Sequence[Tensor], visit: RowVisitor) -> None:
            for key, x in zip(keys, saved, strict=True):
                visit(key, x)

        return replay


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's copies. One for all passes: the allocator keeps freed memory apart by stream."""
    return torch.cuda.Stream(device)


class Offload:
    """Each state in host memory: copied out behind the forward pass, and back one state ahead of the backward pass.

    On CUDA the copies run on a stream of their own, from and to pinned memory.
    """

    name = "offload"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _copy_stream(device) if device.type == "cuda" else None
        self.host: dict[StateKey, Tensor] = {}
        self._leaving: tuple[Tensor, Any] | None = None  # the state that is being copied out, and when it is

    def put(self, key: StateKey, x: Tensor) -> None:
        if self.stream is None:
            self.host[key] = x.clone()
            return
        held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._let_go()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            held.copy_(x, non_blocking=True)
            self._leaving = x, self.stream.record_event()
        self.host[key] = held

    def _let_go(self) -> None:
        """Give the memory of the state before back: what comes to stand there waits, on the device, for its copy.

        In place of record_stream, for which the host would have to see that the copy is over: one that runs ahead of
        the device would find none of the states' memory free again.
        """
        if self._leaving is not None:
            torch.cuda.current_stream(self.device).wait_event(self._leaving[1])
            self._leaving = None

    def saved(self) -> list[Tensor]:
        self._let_go()
        return []

    def replayer(self) -> Replayer:
        return self._replay

    def _replay(self, saved: Sequence[Tensor], visit: RowVisitor) -> None:
        waiting = sorted(self.host)
        ahead = self._fetch(waiting[0]) if waiting else None
        for index, key in enumerate(waiting):
            x, arrived = ahead  # type: ignore[misc]
            ahead = self._fetch(waiting[index + 1]) if index + 1 < len(waiting) else None
            if self.stream is None:
                visit(key, x)
                continue
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(arrived)
            try:
                visit(key, x)
            finally:
                # x was allocated on the copies' stream: what comes to stand there waits until it was read
                self.stream.wait_stream(computing)

    def _fetch(self, key: StateKey) -> tuple[Tensor, Any]:
        if self.stream is None:
            return self.host[key], None
        with torch.cuda.stream(self.stream):
            return self.host[key].to(self.device, non_blocking=True), self.stream.record_event()


class Recompute:
    """Nothing kept: ``read`` runs the frozen model again, under the autocast state of the first time."""

    name = "recompute"

    def __init__(self, read: Callable[[RowVisitor], None], autocast: AutocastState, inputs: Sequence[Tensor]) -> None:
        self.read, self.autocast, self.inputs = read, autocast, inputs

    def put(self, key: StateKey, x: Tensor) -> None:
        return

    def saved(self) -> list[Tensor]:
        """The pass's inputs: autograd then refuses a backward pass after they were written to in place."""
        return list(self.inputs)

    def replayer(self) -> Replayer:
        return self._replay

    def _replay(self, saved: Sequence[Tensor], visit: RowVisitor) -> None:
        with self.autocast.again():
            self.read(visit)


StateMemory = Keep | Offload | Recompute


@dataclass(frozen=True)
class AutocastState:
    """Autocast as it was: backward runs outside the forward's, on threads that do not know it."""

    states: tuple[tuple[str, bool, torch.dtype], ...]
    cache: bool

    @classmethod
    def now(cls, device: torch.device) -> AutocastState:
        kinds = dict.fromkeys(kind for kind in (device.type, "cpu") if kind != "meta")
        states = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        return cls(states, torch.is_autocast_cache_enabled())

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """That state, for a while."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.states:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=self.cache))
            yield


_REENTRANT = "reentrant checkpointing sends no gradient into S (use_reentrant=False does)"


@dataclass(frozen=True)
class Choice:
    """A mode, and in words why it is not the one that was asked for (empty where it is)."""

    mode: str
    reason: str = ""


def choose(asked: str, model: nn.Module, device: torch.device, nbytes: int, *, dropout: bool, given: bool) -> Choice:
    """The mode of one pass, decided from sizes and settings; the model is not run for it.

    Args:
        asked: the config's source_memory.
        model: the transformers model.
        device: where the states are made.
        nbytes: what all states together would take.
        dropout: whether dropout is on in the pass (source_dropout).
        given: whether the states were computed before (source_states=) and are there anyway.
    """
    # the model's modules are only looked through where the answer counts: this runs before every pass
    if given or asked == "keep":
        return Choice("keep")
    if asked == "auto" and nbytes <= AUTO_SHARE * memory_of(device):
        return Choice("keep")
    if asked == "offload":
        hindrance = _REENTRANT if uses_reentrant_checkpointing(model) else ""
        if not hindrance and device.type == "cpu":
            hindrance = "the states are in host memory already"
    elif uses_reentrant_checkpointing(model):
        hindrance = _REENTRANT
    elif dropout:
        hindrance = "source_dropout=True: a second pass would draw other masks"
    elif is_sharded(model):
        hindrance = "the base model is sharded, and a pass inside backward would gather it again"
    else:
        hindrance = ""
    if asked != "auto":
        return Choice("keep", f"source_memory={asked!r} is 'keep' here: {hindrance}") if hindrance else Choice(asked)
    if hindrance:
        return Choice("keep")
    total = memory_of(device)
    sizes = f"{nbytes / 2**30:.1f} GiB of source states, {total / 2**30:.0f} GiB of memory"
    return Choice("recompute", f"source_memory='auto' picked 'recompute': {sizes}; 'keep' or 'offload' overrule it")


@torch.compiler.assume_constant_result
def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device; of the machine for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
