"""Compile the kernels ahead of time and report registers, spills and shared memory.

``python -m flare_kernels.aot`` compiles the kernels in bfloat16 for sm_80, sm_89, sm_90 and sm_100 and for the ranks
16, 32, 64 and 128, and a few cases of other ranks, dtypes and options (:func:`ci_cases`). The configurations are those
of the general rule (``triton_ops/config.py``), which applies to launches without an entry in a tuned launch table.
``--all`` also compiles the combinations of target, dtype, rank, fusion, alignment and dropout in :func:`all_cases`. The
primitives (``triton_ops/primitives.py``) run on CPU tensors under :func:`flare_kernels.launch_mode.recording`, which
collects their launches. Each collected launch is compiled with the arguments, the configuration and the specialisation
that it would have on a GPU. The exit status is 1 if

* a kernel does not compile,
* a launch with aligned 2-byte operands and a rank up to 128 spills registers, or
* a kernel needs more shared memory than a block may use on its target.

Spills of other launches are printed but do not change the exit status. Needs Triton and the ``cuobjdump`` in its
package; needs neither a GPU nor a driver.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._compat import jit_source
from .fusion import FUSIONS

#: Shared memory that one block may use, by compute capability (90 for sm_90): in KB, and in bytes.
_SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_BYTES = {capability: kb * 1024 for capability, kb in _SHARED_KB.items()}

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A combination of dtypes, rank, fusion and options to call the primitives with, on one target."""

    capability: int
    dtype: str = "bfloat16"
    rank: int = 64
    fusion: str | None = "mul_relu"
    #: whether rows have a multiple of 16 bytes, as in every model; if not, M, K and N are odd
    aligned: bool = True
    dropout: bool = False
    #: projections in one launch (2: query and value)
    projections: int = 1
    #: dtype of A and B ("float32" is PEFT's default); None: ``dtype``
    adapter_dtype: str | None = None
    #: dtype of x and of G = dL/dy ("float32" under autocast); None: ``dtype``
    input_dtype: str | None = None
    #: the form to take in every step that has a form of this name (``FORMS`` in ``triton_ops/config.py``); "tma" needs
    #: sm_90 or newer. None: the general rule's choice
    form: str | None = None

    @property
    def spills_are_errors(self) -> bool:
        """Return whether spills are a violation: if all operands are aligned and 2-byte, and the rank is up to 128."""
        all_narrow = all(dtype in (None, "float16", "bfloat16") for dtype in (self.adapter_dtype, self.input_dtype))
        return self.aligned and self.dtype != "float32" and all_narrow and self.rank <= 128


@dataclass(frozen=True)
class Unit:
    """What one compilation needs: a kernel, and the specialisation of a launch. Picklable."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    #: position of an argument -> its attributes at launch, such as ("tt.divisibility", 16)
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[Any, ...], ...]], ...]
    num_warps: int
    num_stages: int
    capability: int


@dataclass(frozen=True)
class Report:
    """Resources that the compiler reports for a unit.

    ``spills`` is the size of the stack frame in bytes, because the kernels use the stack for spilled registers only.
    """

    kernel: str
    case: Case
    tiles: str
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    error: str = ""

    @property
    def violation(self) -> str:
        """The compiler's error, or the bytes used if a limit is exceeded; empty if there is no violation."""
        if self.error:
            return self.error
        available = SHARED_BYTES[self.case.capability]
        if self.shared > available:
            return f"{self.shared} bytes of shared memory, sm_{self.case.capability} has {available}"
        if self.spills and self.case.spills_are_errors:
            return f"{self.spills} bytes of spills"
        return ""


def record(case: Case, *, rows: int = 16384) -> list[Any]:
    """Return the launches of the primitives, forward and backward, in this case and for about ``rows`` tokens."""
    from .launch_mode import forcing, recording
    from .triton_ops import primitives as triton_ops

    dtype = _DTYPES[case.dtype]
    adapter_dtype = _DTYPES[case.adapter_dtype or case.dtype]
    input_dtype = _DTYPES[case.input_dtype or case.dtype]
    M, K, N, R, count = rows, 1024, 1024, case.rank, case.projections
    if not case.aligned:
        M, K, N = M - 3, K - 1, N - 3

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)  # never written, so no memory is committed

    x, x_source = empty(M, K, dtype=input_dtype), empty(M, K, dtype=input_dtype)
    # projections of different widths, as query and value may have
    widths = [N >> i for i in range(count)] if case.aligned else [N - i for i in range(count)]
    As, Bs = [empty(R, K, dtype=adapter_dtype)] * count, [empty(n, R, dtype=adapter_dtype) for n in widths]
    ys, Gs = [empty(M, n) for n in widths], [empty(M, n, dtype=input_dtype) for n in widths]
    T, dT = empty(M, count * R), empty(M, count * R)
    S, dS = (empty(M, count * R), empty(M, count * R)) if case.fusion else (None, None)
    source = x_source if case.fusion else None
    add = case.fusion == "add"
    common: dict[str, Any] = {"scalings": [2.0] * count, "fusion": case.fusion}
    with recording(SHARED_BYTES[case.capability]) as launches, forcing(form=case.form):
        masks: dict[str, Any] = {}
        if case.dropout:
            seed = torch.zeros((), dtype=torch.int64)
            masks = {"mask": triton_ops.dropout_mask(seed, M, K, 6554, 0), "keep_scale": 1.25}
        both_masks = masks | ({"mask_source": masks["mask"]} if masks and case.fusion else {})
        # stacked weights have the compute dtype; the weight of a single adapter is read in its own dtype
        A = triton_ops.stack(As, dtype) if count > 1 else As[0]
        triton_ops.shrink(x, source, A, compute_dtype=dtype, sum_streams=add, **both_masks)
        y_rows = [y[:8] for y in ys]
        # decode reads x_source or, instead of it, S; the variant with S is compiled at rank 64 only
        bottlenecks: list[list[Tensor]] = [[], [T[:8, :R]] * count] if case.fusion and R == 64 else [[]]
        for Ss in bottlenecks if triton_ops.can_decode(8, [R] * count) and not case.dropout else []:
            options: dict[str, Any] = {"compute_dtype": dtype, "save_for_backward": bool(Ss)} | common
            triton_ops.decode(
                x[:8], source[:8] if source is not None and not Ss else None, Ss, y_rows, As, Bs, **options
            )
        S, dS = (None, None) if add else (S, dS)  # "add" saves only the sum T + S
        common["fusion"] = None if add else case.fusion
        triton_ops.expand_(ys, T, S, Bs, **common)
        if not case.dropout:
            # With ``biases``, the adapter writes y before the frozen product (adapter_first in flare_kernels/order.py).
            # Biases have the dtype of the base model.
            for biases in ([None] * count, [empty(n) for n in widths]):
                triton_ops.expand_(ys, T, S, Bs, biases=biases, **common)
        triton_ops.grad_bottleneck(Gs, T, S, Bs, dT=dT, dS=dS, B_grad_dtype=adapter_dtype, **common)
        triton_ops.grad_weight(dT, x, dT if add else dS, source, grad_dtype=adapter_dtype, **both_masks)
        dx = triton_ops.grad_input(dT, A, dtype=input_dtype, **masks)
        if count > 1:
            triton_ops.grad_input(dT, A, dtype=input_dtype, out=dx, **masks)
    return launches


def specialise(launch: Any, capability: int) -> Unit:
    """Return the unit that Triton's JIT would compile for a launch.

    Compiling the unit stores the kernel in Triton's cache, where the launch finds it.
    """
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages, "enable_fp_fusion": True}
    signature, constants, attributes = jit_source(launch.kernel, launch.args, capability, options)
    return Unit(
        module=launch.kernel.fn.__module__,
        kernel=launch.kernel.fn.__name__,
        signature=tuple(signature.items()),
        constants=tuple(constants.items()),
        attributes=tuple((path, tuple(map(tuple, values))) for path, values in attributes.items()),
        num_warps=launch.config.num_warps,
        num_stages=launch.config.num_stages,
        capability=capability,
    )


def compile_unit(unit: Unit) -> dict[str, Any]:
    """Compile one unit and return its registers, spills and shared memory, or its error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        getattr(importlib.import_module(unit.module), unit.kernel),
        signature=dict(unit.signature),
        constexprs=dict(unit.constants),
        attrs={path: [list(one) for one in values] for path, values in unit.attributes},
    )
    options = {"num_warps": unit.num_warps, "num_stages": unit.num_stages, "enable_fp_fusion": True}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints all assembly that ptxas rejects
            compiled = triton.compile(source, target=GPUTarget("cuda", unit.capability, 32), options=options)
    except Exception as error:
        return {"registers": 0, "spills": 0, "shared": 0, "error": f"{type(error).__name__}: {error}"}
    registers, spills = _resource_usage(compiled.asm["cubin"])
    return {"registers": registers, "spills": spills, "shared": int(compiled.metadata.shared)}


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return (registers per thread, bytes of stack frame) of a cubin with one kernel."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(usage[1]), int(usage[2])


def ci_cases() -> Iterator[Case]:
    """Yield the cases that CI compiles: the general rule in bfloat16, and a few other dtypes, options and forms."""
    for capability, rank in itertools.product((80, 90, 100), (16, 32, 64, 128)):
        yield Case(capability, rank=rank)
    # sm_89 stands for sm_86 and sm_120 too: they get the same configurations and have as much shared memory
    yield from (Case(89, rank=rank) for rank in (16, 32, 64, 128))
    yield Case(90, dtype="float32")
    yield Case(90, aligned=False)
    yield Case(90, rank=256)
    yield Case(90, adapter_dtype="float32")
    yield Case(90, dropout=True)
    for capability in (80, 90, 100, 89):
        yield Case(capability, projections=2)  # query and value
    yield Case(90, projections=3)
    for capability, rank in itertools.product((90, 100), (16, 32, 64, 128, 256)):
        yield Case(capability, rank=rank, form="tma")
    for capability, rank in itertools.product((80, 89, 90, 100), (16, 64, 128)):
        yield Case(capability, rank=rank, form="last_adds")
    # Triton compiles a separate kernel for group_chunks == 1, which the general rule passes to grad_bottleneck. The
    # form rows_first passes other values.
    yield from (Case(90, rank=rank, form="rows_first") for rank in (64, 128))
    yield Case(90, projections=2, adapter_dtype="float32")


def all_cases() -> Iterator[Case]:
    """Yield the cases of :func:`ci_cases`, and combinations of target, dtype, rank, fusion, alignment and dropout.

    All combinations are yielded for the ranks 8, 16, 64, 128 and 256, and for rank 32 the combinations with one fusion
    and without dropout. The cases with bfloat16 products but float32 A and B (and x) have aligned rows and one fusion,
    at every rank, with and without dropout.
    """
    yield from ci_cases()
    fusions = (None, *FUSIONS)
    for capability, dtype, rank, fusion, aligned, dropout in itertools.product(
        SHARED_BYTES, _DTYPES, (8, 16, 64, 128, 256), fusions, (True, False), (False, True)
    ):
        yield Case(capability, dtype, rank, fusion, aligned, dropout)
    for capability, dtype, aligned in itertools.product(SHARED_BYTES, _DTYPES, (True, False)):
        yield Case(capability, dtype, 32, aligned=aligned)
    for capability, rank, dropout in itertools.product(SHARED_BYTES, (8, 16, 32, 64, 128, 256), (False, True)):
        yield Case(capability, rank=rank, dropout=dropout, adapter_dtype="float32")
        yield Case(capability, rank=rank, dropout=dropout, adapter_dtype="float32", input_dtype="float32")


def compile_cases(cases: Iterable[Case], jobs: int = 2) -> Iterator[Report]:
    """Compile every distinct launch of the cases in parallel; report each launch with the first case that makes it."""
    units: dict[Unit, tuple[Case, Any]] = {}
    for case in cases:
        for launch in record(case):
            units.setdefault(specialise(launch, case.capability), (case, launch))
    for result, (case, launch) in zip(compile_units(units, jobs), units.values(), strict=True):
        tiles = launch.config.tiles_of(launch.kernel.arg_names)
        yield Report(
            kernel=launch.kernel.fn.__name__.removesuffix("_kernel"),
            case=case,
            tiles=" ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in tiles.items()),
            num_warps=launch.config.num_warps,
            num_stages=launch.config.num_stages,
            **result,
        )


def compile_units(units: Iterable[Unit], jobs: int = 2) -> Iterator[dict[str, Any]]:
    """Yield the result of :func:`compile_unit` for each unit, in order, from ``jobs`` processes."""
    with compiler_pool(jobs) as pool:
        yield from pool.map(compile_unit, units)


def compiler_pool(jobs: int) -> ProcessPoolExecutor:
    """Return a pool of processes for :func:`compile_unit`."""
    # a fork server without threads: forking this process, which runs threads of torch and LLVM, could deadlock
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", f"{__package__}.triton_ops.primitives"])
    return ProcessPoolExecutor(jobs, mp_context=context)


_COLUMNS = ("kernel", "target", "dtype", "rank", "case", "tiles", "warps", "stages", "registers", "spills", "shared")


def _row(report: Report) -> tuple[str, ...]:
    case = report.case
    kind = (
        case.fusion or "plain",
        "" if case.aligned else "unaligned",
        "dropout" if case.dropout else "",
        f"{case.projections} projections" if case.projections > 1 else "",
        f"A,B {case.adapter_dtype}" if case.adapter_dtype else "",
        f"x {case.input_dtype}" if case.input_dtype else "",
        case.form or "",
    )
    case_cells = (report.kernel, f"sm_{case.capability}", case.dtype, str(case.rank), " ".join(filter(None, kind)))
    resources = (report.num_warps, report.num_stages, report.registers, report.spills, report.shared)
    return (*case_cells, report.tiles, *map(str, resources))


def _print_row(cells: Iterable[str]) -> None:
    widths = (12, 7, 9, 5, 27, 16, 6, 7, 10, 7, 7)
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: compile, print a row per launch, and return the exit status.

    Returns:
        0 without a violation, 1 with a violation, 2 if Triton is not installed or interprets the kernels.
    """
    parser = argparse.ArgumentParser(prog="python -m flare_kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--all",
        action="store_true",
        help="also compile the other combinations of target, dtype, rank and options (about half an hour)",
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compiler processes (default 2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        import triton
    except ImportError:
        print("flare_kernels.aot needs Triton, which is not installed", file=sys.stderr)
        return 2
    if triton.knobs.runtime.interpret:
        print("flare_kernels.aot cannot compile under TRITON_INTERPRET=1: unset it", file=sys.stderr)
        return 2

    reports = []
    if not options.json:
        _print_row(_COLUMNS)
    for report in compile_cases(all_cases() if options.all else ci_cases(), options.jobs):
        reports.append(report)
        if not options.json:
            _print_row(_row(report))
            if report.violation:
                print(f"    VIOLATION: {report.violation}", flush=True)
    violations = [report for report in reports if report.violation]
    if options.json:
        rows = [dataclasses.asdict(report) | {"violation": report.violation} for report in reports]
        print(json.dumps(rows, indent=1))
    else:
        print(f"{len(reports)} launches compiled, {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
