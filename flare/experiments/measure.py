"""What a training step costs: seconds, live tensor bytes, bytes kept for the backward pass, FLOPs, launches.

The process's own memory says little about a training step (allocators keep what was freed), so memory is counted in
tensor storages here: each storage once, however many views it has.

    with peak_bytes(live=model.parameters()) as peak, saved_bytes(ignore=model.parameters()) as saved:
        model(**batch).loss.backward()
    print(peak.peak, saved.total)

On the CPU both counts are exact for tensors that PyTorch operators return; scratch memory inside one operator is not
seen there. Measure on a step of its own: the counting slows it down.

`count_flops`, `count_ops` and `count_calls` count arithmetic, launches and executions of modules in the same manner:
they tell a regression of cost on any machine, where seconds would only hint at one.
"""

from __future__ import annotations

import functools
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from flare_kernels.launch_mode import counting


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in nested containers and iterators, such as ``[model.parameters(), batch]``; the rest is skipped."""
    for value in tree_iter(list(values)):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Iterator):
            yield from _tensors(value)


class _Storages:
    """The storages seen so far that still live, each once.

    Keyed by identity with a weak reference, not by address: an address is used again as soon as its storage is freed.
    PyTorch hands out one Python object per storage as long as the storage lives, so the reference tells when it dies.
    """

    def __init__(self, on_free: Callable[[int], None] | None = None) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._on_free = on_free

    def add(self, tensor: Tensor, count_as: int | None = None) -> int:
        """By how many bytes the storage of `tensor` is new, or has grown; `count_as` replaces its own size."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._entries.get(key)
        if known is not None:
            if count_as is not None or known[1] == 0:
                return 0
            grown = storage.nbytes() - known[1]
            if grown:
                self._entries[key] = (known[0], storage.nbytes())
            return grown
        size = storage.nbytes() if count_as is None else count_as
        self._entries[key] = (weakref.ref(storage, functools.partial(self._freed, key)), size)
        return size

    def _freed(self, key: int, _: Any) -> None:
        _, size = self._entries.pop(key)
        if self._on_free is not None:
            self._on_free(size)

    def clear(self) -> None:
        """Forget everything; the weak references stop reporting."""
        self._entries.clear()


@dataclass
class PeakBytes:
    """Result of `peak_bytes`.

    Attributes:
        at_start: bytes of the storages named as `live` (CUDA: allocated bytes on entry).
        current: bytes counted as living now (CUDA: set when the block ends).
        peak: the highest value of `current` inside the block.
    """

    at_start: int = 0
    current: int = 0
    peak: int = 0

    @property
    def above_start(self) -> int:
        """How far the peak lay above the start."""
        return self.peak - self.at_start

    @property
    def transient(self) -> int:
        """How far the peak lay above what still lived at the end: memory that was only passed through."""
        return self.peak - self.current

    def _change(self, by: int) -> None:
        self.current += by
        self.peak = max(self.peak, self.current)


class _AllocationMode(TorchDispatchMode):
    """Counts the storages that operators return and takes them off again when they die."""

    def __init__(self, result: PeakBytes, live: Iterable[Any]) -> None:
        super().__init__()
        self._result = result
        self._storages = _Storages(on_free=lambda size: result._change(-size))
        for tensor in _tensors(live):
            result._change(self._storages.add(tensor))
        result.at_start = result.current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # What goes in without having come out of an operator was there before the block and was not named: it counts 0.
        for tensor in _tensors([args, kwargs]):
            self._storages.add(tensor, count_as=0)
        result = func(*args, **kwargs)
        for tensor in _tensors([result]):
            self._result._change(self._storages.add(tensor))
        return result

    def stop(self) -> None:
        """Leave the counts as they are; what dies later is no part of the block."""
        self._storages.clear()


@contextmanager
def peak_bytes(live: Iterable[Any] = (), device: torch.device | str | None = None) -> Iterator[PeakBytes]:
    """Measure the most tensor bytes that are alive at one time inside the block.

    Args:
        live: tensors (or nested containers of them) that exist already and shall count, such as parameters and
            optimizer state. On the CPU every other tensor from before the block counts nothing, neither while it lives
            nor when it is freed.
        device: a CUDA device whose allocator to ask instead (`torch.cuda.max_memory_allocated`, which counts all that
            lives on that device; `live` is not used). Default: count storages, as for the CPU.

    Yields:
        A `PeakBytes`, complete when the block ends.
    """
    result = PeakBytes()
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        result.at_start = result.current = result.peak = torch.cuda.memory_allocated(device)
        try:
            yield result
        finally:
            torch.cuda.synchronize(device)
            result.current = torch.cuda.memory_allocated(device)
            result.peak = torch.cuda.max_memory_allocated(device)
        return
    mode = _AllocationMode(result, live)
    del live  # or the block could not free what it names
    try:
        with mode:
            yield result
    finally:
        mode.stop()


@dataclass
class SavedBytes:
    """Result of `saved_bytes`: `total` bytes in `storages` storages were kept for the backward pass."""

    total: int = 0
    storages: int = 0


@contextmanager
def saved_bytes(ignore: Iterable[Any] = ()) -> Iterator[SavedBytes]:
    """Count the bytes that autograd keeps for the backward pass of what runs inside the block.

    A storage counts once and in full, whichever part of it was saved: all of it stays alive. What a function keeps
    elsewhere than in `save_for_backward` is not seen.

    Args:
        ignore: tensors (or nested containers of them) whose storages do not count: parameters, inputs.

    Yields:
        A `SavedBytes`, which grows while the block runs.
    """
    result = SavedBytes()
    storages = _Storages()
    # Held until the block ends, or a freed one's storage could return as a new tensor's.
    ignored = list(_tensors(ignore))
    for tensor in ignored:
        storages.add(tensor, count_as=0)

    def pack(tensor: Tensor) -> Tensor:
        new = storages.add(tensor)
        result.total += new
        result.storages += new > 0
        # Detached, since an output that its own node holds with its graph would never be freed.
        return tensor.detach()

    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield result
    finally:
        storages.clear()


def transient_bytes(call: Callable[[], object], *, device: torch.device | str | None = None) -> int:
    """Bytes that a call needs for a while: its peak minus what lives after it, its result and what backward needs.

    What the call consumes must be made inside it, or its death would not be seen (see `peak_bytes`).
    """
    with peak_bytes(device=device) as peak:
        kept = call()
    transient = peak.transient
    del kept
    return transient


# --- arithmetic, launches, executions ---------------------------------------------------------------------------------

_aten: Any = torch.ops.aten
_Shape = tuple[int, ...]


def _addmm_flops(added: _Shape, a: _Shape, b: _Shape) -> int:
    """(..., M, K) by (..., K, N)."""
    return 2 * int(torch.Size(a).numel()) * b[-1]


def _attention_flops(query: _Shape, key: _Shape, value: _Shape, *_: _Shape) -> int:
    """Scores and values of query (B, heads, m, c), key (B, heads, k, c), value (B, heads, k, v)."""
    scores = query[0] * query[1] * query[2] * key[2]
    return 2 * scores * (query[3] + value[3])


def _attention_backward_flops(grad: _Shape, query: _Shape, key: _Shape, value: _Shape, *_: _Shape) -> int:
    """Scores once more, and four products for the gradients of scores, query, key and value."""
    scores = query[0] * query[1] * query[2] * key[2]
    return 2 * scores * (3 * query[3] + 2 * value[3])


#: Products that PyTorch's own counter does not know: in place, and attention on a CPU.
_MORE_FLOPS: dict[Any, Any] = {
    _aten.addmm_: _addmm_flops,
    _aten.baddbmm_: _addmm_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}

#: Operators that give a tensor its shape, its memory or its name, and compute nothing. Views are recognised as such.
_NO_WORK = {
    *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
    *("detach", "detach_", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "set_", "resize_"),
    *("is_same_size", "sym_size", "sym_stride", "sym_numel", "_local_scalar_dense", "item"),
}


@dataclass
class FlopCount:
    """Result of `count_flops`: floating-point operations of all products (2 per multiply-add), and by operator."""

    total: int = 0
    by_op: dict[str, int] = field(default_factory=dict)


class _FlopMode(TorchDispatchMode):
    """PyTorch's formulas without its module tracker, whose hooks do not bear `torch.autograd.grad`."""

    def __init__(self, result: FlopCount) -> None:
        super().__init__()
        self._result = result
        self._formulas: dict[Any, Any] = {**flop_registry}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        op = func._overloadpacket
        own = _MORE_FLOPS.get(op)
        if own is None and op not in self._formulas:
            with self:  # an operator made of others counts as these
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        if own is not None:
            self._note(op, own(*(tuple(arg.shape) for arg in args if isinstance(arg, Tensor))))
        elif op in self._formulas:
            self._note(op, self._formulas[op](*args, **kwargs, out_val=out))
        return out

    def _note(self, op: Any, flops: int) -> None:
        self._result.total += flops
        self._result.by_op[str(op)] = self._result.by_op.get(str(op), 0) + flops


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the FLOPs of matrix products and attention inside the block, forward and backward.

    Element-wise work is not counted, nor is what runs inside a Triton kernel. An attention operator counts as its
    products: 2 forward, and 5 backward where it computes the scores again.
    """
    result = FlopCount()
    with _FlopMode(result):
        yield result


@dataclass
class OpCount:
    """Result of `count_ops`.

    Attributes:
        ops: names of the operators that computed something, in order; each is at least one launch on a GPU.
        kernels: names of this package's Triton kernels, in order.
    """

    ops: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Launches: operators plus kernels."""
        return len(self.ops) + len(self.kernels)

    @property
    def by_op(self) -> dict[str, int]:
        """How often each occurred, the most frequent first."""
        return dict(Counter([*self.ops, *self.kernels]).most_common())


class _OpMode(TorchDispatchMode):
    def __init__(self, ops: list[str]) -> None:
        super().__init__()
        self._ops = ops

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("profiler", "prim") or func.is_view or name in _NO_WORK:
            return result
        outputs = list(_tensors([result]))
        if outputs and all(output.numel() == 0 for output in outputs):
            return result
        self._ops.append(name)
        return result


@contextmanager
def count_ops() -> Iterator[OpCount]:
    """Count the operators inside the block that compute: no views, no bare allocations, nothing of size 0."""
    result = OpCount()
    with counting() as names, _OpMode(result.ops):
        yield result
    result.kernels = list(names)


@dataclass
class CallCount:
    """Result of `count_calls`: how often the modules ran, each time counted (a checkpoint's recompute too)."""

    total: int = 0


@contextmanager
def count_calls(modules: Iterable[nn.Module]) -> Iterator[CallCount]:
    """Count forward calls of modules inside the block, for instance executions of a model's blocks."""
    result = CallCount()

    def called(*_: Any) -> None:
        result.total += 1

    handles = [module.register_forward_pre_hook(called) for module in modules]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class StepTimer:
    """Seconds per step, warm-up left out of the median.

        timer = StepTimer(warmup=3)
        for batch in batches:
            with timer.step():
                train(batch)
        print(timer.median)

    Attributes:
        warmup: how many first steps do not count; where that would leave none, all count.
        device: a CUDA device to wait for before the clock is read.
        seconds: every step's duration, warm-up included.
    """

    warmup: int = 3
    device: torch.device | str | None = None
    seconds: list[float] = field(default_factory=list)
    _began: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup must be a number of steps, 0 or more; got {self.warmup}")

    def start(self) -> None:
        """Begin a step."""
        self._began = self._now()

    def stop(self) -> None:
        """End the step that `start` began."""
        if self._began is None:
            raise RuntimeError("stop() without start(): begin the step first, or use `with timer.step():`")
        self.seconds.append(self._now() - self._began)
        self._began = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step; a step that raises is not counted."""
        self.start()
        try:
            yield
        except BaseException:
            self._began = None
            raise
        self.stop()

    @property
    def median(self) -> float | None:
        """Median seconds per step after the warm-up, or None before the first step."""
        if not self.seconds:
            return None
        return statistics.median(self.seconds[self.warmup :] or self.seconds)

    def _now(self) -> float:
        if self.device is not None and torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
