"""Where source states are kept between forward and backward: one class per mode; ``source_memory`` sets the mode.

The costs are in addition to plain LoRA's 2 units per step. One unit is the compute of a forward pass of the frozen
model. There are L blocks, M tokens, and hidden states of width d:

    mode        forward keeps                  backward reads x_S from        added compute and memory
    keep        x_S, one copy on the device    the kept tensors               1 unit of compute, L M d elements
    offload     x_S in pinned host memory      a prefetched copy              1 unit, two states on the device
    recompute   nothing of width d             a second pass of the base      2 units, nothing of size L M d

All modes give the same gradients, because the second pass runs the same frozen model on the same tokens under the same
autocast state.
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
from .arguments import DECODER_ARGUMENTS
from .fsdp import is_sharded
from .runtime import Reads, Runtime
from .source_pass import Preparation, Reader
from .states import StateKey

#: Called with each state as rows (n, d), one per token, in the order of the source pass.
RowVisitor = Callable[[StateKey, Tensor], None]
#: Calls a visitor with every state again in the backward pass. The arguments are the tensors that the autograd node of
#: the source pass (flare.source.projected) saved, and the visitor.
Replayer = Callable[[Sequence[Tensor], RowVisitor], None]

#: "auto" keeps states that take at most this share of the device's memory (on a CPU, of the machine's memory).
AUTO_SHARE = 1 / 8


class Keep:
    """source_memory="keep": one copy of each state on the device.

    The autograd node saves the states, so saved-tensor hooks see them, and autograd frees them after backward even if
    the loss stays alive.
    """

    name = "keep"

    def __init__(self) -> None:
        self.states: dict[StateKey, Tensor] = {}

    def put(self, key: StateKey, x: Tensor) -> None:
        """Keep the rows (n, d) of a state."""
        self.states[key] = x

    def saved(self) -> list[Tensor]:
        """Return the tensors that the node must save, in the order that :meth:`replayer` expects."""
        return [self.states[key] for key in sorted(self.states)]

    def replayer(self) -> Replayer:
        """Return the function that passes every state to a visitor in backward. It does not keep the states alive."""
        keys = sorted(self.states)

        def replay(saved: Sequence[Tensor], visit: RowVisitor) -> None:
            for key, x in zip(keys, saved, strict=True):
                visit(key, x)

        return replay


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the copy stream of a device. All passes share it, because the allocator has a separate pool per stream."""
    return torch.cuda.Stream(device)


class Offload:
    """source_memory="offload": each state in host memory.

    States are copied to the host during the forward pass, and prefetched one state ahead in the backward pass. On CUDA
    the copies run on a separate stream, from and to pinned memory.
    """

    name = "offload"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _copy_stream(device) if device.type == "cuda" else None
        self.host: dict[StateKey, Tensor] = {}
        self._copying: tuple[Tensor, Any] | None = None  # the state being copied to the host, and the copy's event

    def put(self, key: StateKey, x: Tensor) -> None:
        if self.stream is None:
            self.host[key] = x.clone()
            return
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._release_previous()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            pinned.copy_(x, non_blocking=True)
            self._copying = x, self.stream.record_event()
        self.host[key] = pinned

    def _release_previous(self) -> None:
        """Free the previous state's buffer. The computing stream waits for the copy before it can reuse the buffer.

        record_stream is not enough: with it, the buffer is freed only when the host sees that the copy is done. If the
        host runs ahead of the device, it would then find no freed buffer and allocate another for every state.
        """
        if self._copying is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copying[1])
            self._copying = None

    def saved(self) -> list[Tensor]:
        self._release_previous()
        return []

    def replayer(self) -> Replayer:
        return self._replay

    def _replay(self, saved: Sequence[Tensor], visit: RowVisitor) -> None:
        keys = sorted(self.host)
        prefetched = self._fetch(keys[0]) if keys else None
        for index, key in enumerate(keys):
            x, arrived = prefetched  # type: ignore[misc]
            prefetched = self._fetch(keys[index + 1]) if index + 1 < len(keys) else None
            if self.stream is None:
                visit(key, x)
                continue
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(arrived)
            try:
                visit(key, x)
            finally:
                # x was allocated on the copy stream: its memory must not be reused before x was read
                self.stream.wait_stream(computing)

    def _fetch(self, key: StateKey) -> tuple[Tensor, Any]:
        if self.stream is None:
            return self.host[key], None
        with torch.cuda.stream(self.stream):
            return self.host[key].to(self.device, non_blocking=True), self.stream.record_event()


class Recompute:
    """source_memory="recompute": ``read`` runs the frozen model again in backward, under the same autocast state."""

    name = "recompute"

    def __init__(self, read: Callable[[RowVisitor], None], autocast: AutocastState, inputs: Sequence[Tensor]) -> None:
        self.read, self.autocast, self.inputs = read, autocast, inputs

    def put(self, key: StateKey, x: Tensor) -> None:
        return

    def saved(self) -> list[Tensor]:
        """Return the pass's inputs. Autograd then raises in backward if they were modified in place."""
        return list(self.inputs)

    def replayer(self) -> Replayer:
        return self._replay

    def _replay(self, saved: Sequence[Tensor], visit: RowVisitor) -> None:
        with self.autocast.restored():
            self.read(visit)


StateMemory = Keep | Offload | Recompute


@dataclass(frozen=True)
class AutocastState:
    """The autocast state of a forward pass. The backward pass, which runs on other threads, restores it."""

    states: tuple[tuple[str, bool, torch.dtype], ...]
    cache: bool

    @classmethod
    def current(cls, device: torch.device) -> AutocastState:
        """Return the current autocast state of this thread for a device and for the CPU."""
        kinds = dict.fromkeys(kind for kind in (device.type, "cpu") if kind != "meta")
        states = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        return cls(states, torch.is_autocast_cache_enabled())

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Enter the saved autocast state."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.states:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=self.cache))
            yield


_REENTRANT = (
    "with reentrant checkpointing, backward does not reach the node that fetches the states; use use_reentrant=False"
)


@dataclass(frozen=True)
class MemoryChoice:
    """How the states of one source pass are kept.

    Attributes:
        mode: "keep", "offload" or "recompute".
        reason: the warning to give, with the reason for the mode; "" if there is nothing to warn about.
    """

    mode: str
    reason: str = ""


def choose_memory(
    setting: str, model: nn.Module, device: torch.device, nbytes: int, *, dropout: bool, states_given: bool
) -> MemoryChoice:
    """Choose the mode of one pass from sizes and settings, without running the model.

    Args:
        setting: the config's source_memory.
        model: the transformers model.
        device: where the states are computed.
        nbytes: bytes of all states together.
        dropout: whether dropout is on in the pass (source_dropout).
        states_given: whether the caller passed the states (source_states=) and holds them anyway.
    """
    # This runs before every pass, so the cheap cases come before the walk over the model's modules.
    if states_given or setting == "keep":
        return MemoryChoice("keep")
    if setting == "auto" and nbytes <= AUTO_SHARE * memory_of(device):
        return MemoryChoice("keep")
    unsupported_reason = ""
    if uses_reentrant_checkpointing(model):
        unsupported_reason = _REENTRANT
    elif setting == "offload":
        if device.type == "cpu":
            unsupported_reason = "the states are in host memory already"
    elif dropout:
        unsupported_reason = "source_dropout=True: a second pass would draw other masks"
    elif is_sharded(model):
        unsupported_reason = "the base model is sharded, and a pass inside backward would gather its weights again"
    if setting != "auto":
        if unsupported_reason:
            return MemoryChoice("keep", f"source_memory={setting!r} is 'keep' here: {unsupported_reason}")
        return MemoryChoice(setting)
    if unsupported_reason:
        return MemoryChoice("keep")
    total = memory_of(device)
    sizes = f"{nbytes / 2**30:.1f} GiB of source states, {total / 2**30:.0f} GiB of memory"
    return MemoryChoice(
        "recompute", f"source_memory='auto' chose 'recompute': {sizes}; to override, set 'keep' or 'offload'"
    )


def memory_of_pass(
    model: nn.Module,
    runtime: Runtime,
    reads: Reads,
    source: dict[str, Any],
    reader: Reader,
    prepare: Preparation,
) -> StateMemory:
    """Return the memory for the states of a source pass. Warn once with the reason of :func:`choose_memory`, if any.

    Args:
        model: the transformers model.
        runtime: the state that the model's hooks share.
        reads: the source states that the active adapters read.
        source: the source arguments of the call.
        reader: reads the states; "recompute" calls it again.
        prepare: prepares the states for projection.
    """
    weight, choice = reads.weights()[0], mode_of_pass(model, runtime, reads, source)
    if choice.reason:
        runtime.warn_once(choice.reason)
    if choice.mode == "offload":
        return Offload(weight.device)
    if choice.mode == "keep":
        return Keep()

    def read_again(visit: RowVisitor) -> None:
        reader(lambda key, hidden: visit(key, prepare.rows(key, hidden)))

    inputs = [value for value in source.values() if isinstance(value, Tensor)]
    return Recompute(read_again, AutocastState.current(weight.device), inputs)


def mode_of_pass(model: nn.Module, runtime: Runtime, reads: Reads, source: dict[str, Any]) -> MemoryChoice:
    """Choose the mode of a source pass from the size of its states."""
    ids = next((source[name] for name in ("source_input_ids", *DECODER_ARGUMENTS) if name in source), None)
    weight = reads.weights()[0]
    dtype = Preparation.under_autocast(weight.device).dtype
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tokens = 0 if ids is None else ids.numel()
    return choose_memory(
        runtime.setting("source_memory", reads.adapters),
        model,
        weight.device,
        len(reads.keys) * tokens * weight.shape[-1] * dtype.itemsize,
        dropout=runtime.setting("source_dropout", reads.adapters),
        states_given="source_states" in source,
    )


@torch.compiler.assume_constant_result
def memory_of(device: torch.device) -> int:
    """Return the size of a device's memory in bytes; for a CPU, the size of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
