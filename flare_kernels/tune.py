"""The offline tuner: times the kernels with every candidate configuration, and their plain PyTorch form, on this GPU.

For each shape, rank and number of tokens, each step runs on random data that rotates through more memory than the L2
cache holds. A candidate counts only if its result is as close to float32 mathematics as the plain form's; the fastest
one goes into the launch table (:mod:`flare_kernels.launch_table`), and the plain form where no candidate beats it.
Nothing is tuned while a model runs.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import torch_ops
from .forms import table_key
from .launch_mode import forcing, recording
from .launch_table import Entry, Key, LaunchTable
from .selection import backends, interpreting
from .triton_ops.config import FORMS

FUSION = "add_relu"
STEPS = ("shrink", "expand", "grad_bottleneck", "grad_weight", "grad_input", "decode")


@dataclass(frozen=True)
class Shape:
    """Query and value projection of one block: d wide in, ``widths`` out."""

    name: str
    d: int
    widths: tuple[int, ...]


#: The shapes of the papers' models, from their published configurations.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("llama-3.1-8b", 4096, (4096, 1024)),
        Shape("xlm-r-large", 1024, (1024, 1024)),
        Shape("gemma-2-9b", 3584, (4096, 2048)),
        Shape("mt5-xl", 2048, (2048, 2048)),
    )
}


@dataclass
class Problem:
    """One step at one size: how to run its Triton and its plain form on a set of inputs."""

    step: str
    shape: Shape
    M: int
    r: int
    key: Key
    kernels: tuple[str, ...]
    make: Callable[..., dict[str, Any]]
    run: Callable[[Any, dict[str, Any]], list[Tensor]]

    def __str__(self) -> str:
        return f"{self.step:<16}{self.shape.name:<14}M={self.M:<7}r={self.r:<5}"


@dataclass
class Finding:
    """What a problem's timing gave: microseconds of the plain form and of the best configuration, and that one."""

    problem: Problem
    torch_us: float
    triton_us: float | None
    tiles: dict[str, dict[str, int]] = field(default_factory=dict)
    general_us: float | None = None
    tried: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def form(self) -> str:
        won = self.triton_us is not None and self.triton_us <= self.torch_us
        return "triton" if won or "torch" not in FORMS[self.problem.step] else "torch"

    def entry(self) -> Entry:
        us = {"torch": self.torch_us}
        us |= {} if self.triton_us is None else {"triton": self.triton_us}
        us |= {} if self.general_us is None else {"triton, general rule": self.general_us}
        return Entry(self.form, self.tiles if self.form == "triton" else {}, {k: round(v, 3) for k, v in us.items()})

    def __str__(self) -> str:
        best = "-" if self.triton_us is None else f"{self.triton_us:9.1f}"
        general = "-" if self.general_us is None else f"{self.general_us:9.1f}"
        return f"{self.problem}{self.torch_us:9.1f}{best:>10}{general:>10}   {self.form:<7}{_short(self.tiles)}"


HEADER = f"{'step':<16}{'shape':<14}{'tokens':<9}{'rank':<7}{'torch us':>9}{'best us':>10}{'rule us':>10}   taken"


def _short(tiles: dict[str, dict[str, int]]) -> str:
    letters = {"BLOCK_M": "M", "BLOCK_K": "K", "BLOCK_N": "N", "num_warps": " w", "num_stages": " s", "programs": " p"}
    return "; ".join(
        "".join(f"{letters[k]}{v}" for k, v in one.items() if v and k in letters) for one in tiles.values()
    )


def problems(
    shapes: Iterable[Shape],
    tokens: Sequence[int],
    ranks: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Problem]:
    """Every step at every size; decode only where few tokens are, the others only where many are."""
    from .triton_ops.config import operand_class
    from .triton_ops.decode import MAX_RANK, MAX_ROWS

    operands = operand_class(dtype.itemsize, dtype.itemsize, True)
    for shape, M, r in itertools.product(shapes, tokens, ranks):
        R, N = len(shape.widths) * r, max(shape.widths)
        sizes = {"shrink": (R, shape.d), "expand": (r, N), "grad_bottleneck": (r, N)}
        sizes |= {"grad_weight": (R, shape.d), "grad_input": (R, shape.d), "decode": (r, shape.d)}
        for step, (rank, width) in sizes.items():
            if (step == "decode") != (M <= MAX_ROWS and r <= MAX_RANK):
                continue
            key = table_key(step, operands, rank, M, width)
            kernels = ("shrink_decode", "expand_decode") if step == "decode" else (step,)
            yield Problem(step, shape, M, r, key, kernels, _inputs(shape, M, r, dtype, device), _RUN[step])


def _inputs(shape: Shape, M: int, r: int, dtype: torch.dtype, device: torch.device) -> Callable[..., dict[str, Any]]:
    R = len(shape.widths) * r

    def make(real: bool = True) -> dict[str, Any]:
        """Random inputs; not ``real``: tensors of their sizes on the CPU, never touched."""

        def randn(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            if not real:
                return torch.empty(rows, columns, dtype=dtype)
            return torch.randn(rows, columns, device=device, dtype=dtype) * scale

        As = [randn(r, shape.d, shape.d**-0.5) for _ in shape.widths]
        return {
            "x": randn(M, shape.d),
            "x_source": randn(M, shape.d),
            "As": As,
            "A": torch.cat(As),
            "Bs": [randn(n, r, r**-0.5) for n in shape.widths],
            "ys": [randn(M, n) for n in shape.widths],
            "T": randn(M, R),
            "S": randn(M, R),
        }

    return make


def _shrink(ops: Any, t: dict[str, Any]) -> list[Tensor]:
    return list(ops.shrink(t["x"], t["x_source"], t["A"], compute_dtype=t["x"].dtype))


def _phi(t: dict[str, Any]) -> dict[str, Any]:
    return {"scalings": [0.5] * len(t["ys"]), "fusion": FUSION}


def _expand(ops: Any, t: dict[str, Any]) -> list[Tensor]:
    # in place, as in use: the sums grow by the same amount each time and stay finite
    ops.expand_(t["ys"], t["T"], t["S"], t["Bs"], **_phi(t))
    return list(t["ys"])


def _grad_bottleneck(ops: Any, t: dict[str, Any]) -> list[Tensor]:
    dT, dS = torch.empty_like(t["T"]), torch.empty_like(t["S"])
    dBs = ops.grad_bottleneck(t["ys"], t["T"], t["S"], t["Bs"], dT=dT, dS=dS, B_grad_dtype=torch.float32, **_phi(t))
    return [dT, dS, *dBs]


def _grad_weight(ops: Any, t: dict[str, Any]) -> list[Tensor]:
    return [ops.grad_weight(t["T"], t["x"], t["S"], t["x_source"], grad_dtype=torch.float32)]


def _grad_input(ops: Any, t: dict[str, Any]) -> list[Tensor]:
    return [ops.grad_input(t["T"], t["A"], dtype=t["x"].dtype)]


def _decode(ops: Any, t: dict[str, Any]) -> list[Tensor]:
    if hasattr(ops, "decode"):
        call = _phi(t) | {"compute_dtype": t["x"].dtype, "keep": False}
        ops.decode(t["x"], t["x_source"], [], t["ys"], t["As"], t["Bs"], **call)
    else:
        T, S = ops.shrink(t["x"], t["x_source"], ops.stack(t["As"], t["x"].dtype), compute_dtype=t["x"].dtype)
        ops.expand_(t["ys"], T, S, t["Bs"], **_phi(t))
    return list(t["ys"])


_RUN: dict[str, Callable[[Any, dict[str, Any]], list[Tensor]]] = {
    "shrink": _shrink,
    "expand": _expand,
    "grad_bottleneck": _grad_bottleneck,
    "grad_weight": _grad_weight,
    "grad_input": _grad_input,
    "decode": _decode,
}


def is_correct(problem: Problem, run: Callable[[dict[str, Any]], list[Tensor]]) -> bool:
    """Whether a form's error against float32 mathematics is at most twice the plain form's plus one epsilon."""

    def copies(t: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
        def copy(value: Any) -> Any:
            return (
                [copy(one) for one in value] if isinstance(value, list) else value.to(dtype or value.dtype, copy=True)
            )

        return {name: copy(value) for name, value in t.items()}

    t = problem.make()
    truth = problem.run(torch_ops, copies(t, torch.float32))
    plain = problem.run(torch_ops, copies(t))
    for got, usual, want in zip(run(copies(t)), plain, truth, strict=True):
        scale = torch.finfo(t["x"].dtype).eps * want.abs().max()
        if not bool(((got.float() - want).abs().max() <= 2 * (usual.float() - want).abs().max() + scale).item()):
            return False
    return True


#: Times a call on rotating inputs, in microseconds.
Timer = Callable[[Callable[[dict[str, Any]], object], list[dict[str, Any]]], float]


def time_on_device(
    run: Callable[[dict[str, Any]], object], inputs: list[dict[str, Any]], *, rounds: int = 7, calls: int = 20
) -> float:
    """Median over rounds of the device's time per call, in microseconds, by events around several calls in a row."""
    turn = itertools.cycle(inputs)
    for _ in range(max(3, len(inputs))):
        run(next(turn))
    found = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run(next(turn))
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(found)


def _rotation(problem: Problem, device: torch.device) -> list[dict[str, Any]]:
    """Enough sets of inputs that together they are twice the L2 cache (one, away from CUDA)."""
    first = problem.make()
    if device.type != "cuda":
        return [first]
    size = sum(t.nbytes for value in first.values() for t in (value if isinstance(value, list) else [value]))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(problem.make() for _ in range(min(8, 2 * cache // size)))]


def variants(problem: Problem, shared_bytes: int) -> Iterator[dict[str, Any]]:
    """Kernel -> configuration: the general rule's first; of a step of two kernels one is varied at a time."""
    from .triton_ops.config import candidates

    key = problem.key
    lists = {name: list(candidates(name, key.operands, key.rank, shared_bytes)) for name in problem.kernels}
    general = {name: of_one[0] for name, of_one in lists.items()}
    yield general
    for name, of_one in lists.items():
        for config in of_one[1:]:
            yield general | {name: config}


def _as_tiles(configs: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {kernel: asdict(config) for kernel, config in configs.items()}


def precompile(wanted: Iterable[Problem], device: torch.device, jobs: int, say: Callable[[str], None] = print) -> int:
    """Compile every variant into Triton's cache on several processors; how many there were.

    A launch compiles what is not there anyway: this saves time, no more.
    """
    from . import aot
    from .triton_ops import primitives as triton_ops
    from .triton_ops.launch import shared_memory_bytes

    capability = 10 * torch.cuda.get_device_capability(device)[0] + torch.cuda.get_device_capability(device)[1]
    shared = shared_memory_bytes(device)
    units: dict[Any, None] = {}
    for problem in wanted:
        t = problem.make(real=False)
        for configs in variants(problem, shared):
            with forcing(**configs), recording(shared) as launches:
                problem.run(triton_ops, t)
            units |= dict.fromkeys(aot.specialise(launch, capability) for launch in launches)
    say(f"compiling {len(units)} kernels on {jobs} processors")
    for done, _ in enumerate(aot.compile_units(units, jobs), 1):
        if done % 100 == 0:
            say(f"    {done} of {len(units)}")
    return len(units)


def tune_one(problem: Problem, device: torch.device, timer: Timer) -> Finding:
    """Time one problem: the plain form, and every candidate that compiles, runs and is right."""
    from .triton_ops import primitives as triton_ops
    from .triton_ops.launch import shared_memory_bytes

    inputs = _rotation(problem, device)
    finding = Finding(problem, timer(lambda t: problem.run(torch_ops, t), inputs), None)
    for configs in variants(problem, shared_memory_bytes(device)):
        finding.tried += 1
        try:
            with forcing(**configs):
                if not is_correct(problem, lambda t: problem.run(triton_ops, t)):
                    finding.refused.append(f"{_short(_as_tiles(configs))}: wrong numbers")
                    continue
                us = timer(lambda t: problem.run(triton_ops, t), inputs)
        except Exception as error:  # what a compiler or a card refuses: shared memory, registers, an internal limit
            finding.refused.append(f"{_short(_as_tiles(configs))}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if finding.tried == 1:
            finding.general_us = us
        if finding.triton_us is None or us < finding.triton_us:
            finding.triton_us = us
            finding.tiles = _as_tiles(configs)
    return finding


def tune(
    shapes: Iterable[Shape],
    tokens: Sequence[int],
    ranks: Sequence[int],
    *,
    device: torch.device,
    about: dict[str, Any],
    timer: Timer = time_on_device,
    budget_s: float = float("inf"),
    say: Callable[[str], None] = print,
    save: Callable[[LaunchTable], None] = lambda table: None,
) -> LaunchTable:
    """The launch table of this GPU, printed row by row and handed to ``save`` after each.

    Args:
        shapes, tokens, ranks: what to tune for; sizes in between take the bucket they fall in.
        device: a CUDA device.
        about: versions, commit and date, kept in the table.
        timer: how a call is timed.
        budget_s: seconds after which no new problem is begun.
        say: prints a line. save: called with the table whenever an entry was added.

    Raises:
        ValueError: Triton cannot run on the device; the message says why.
    """
    status = backends()["triton"]
    if not status or (device.type != "cuda" and not interpreting()):
        raise ValueError(f"nothing to tune: the triton backend is {status or f'for CUDA devices, not {device}'}")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    table = LaunchTable(gpu, about=about | {"fusion": FUSION, "timing": "device events, rotating inputs, median"})
    began, left_out = time.monotonic(), 0
    say(HEADER)
    for problem in problems(shapes, tokens, ranks, device):
        if time.monotonic() - began > budget_s:
            left_out += 1
            continue
        finding = tune_one(problem, device, timer)
        say(str(finding))
        if finding.refused:
            say(f"    {len(finding.refused)} of {finding.tried} configurations refused; first: {finding.refused[0]}")
        if problem.key in table.entries:
            say("    its sizes share an entry with a row above, which stays")
            continue
        table.entries[problem.key] = finding.entry()
        save(table)
    if left_out:
        say(f"{left_out} problems were left out: the budget of {budget_s:.0f} s was used up")
    return table
