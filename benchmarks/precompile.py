"""Compile the kernels that benchmarks and tests of a GPU launch, on all processors, into Triton's cache.

    python benchmarks/precompile.py [--jobs N] [--seconds S] [--most N]

A benchmark runs in one process and a launch compiles what is missing, one kernel after the other: compiled here first,
a run of all cases starts timing minutes earlier. Launches are recorded on the device, so that they follow its launch
table, and nothing is launched; the frozen products do run. Tests of kernels run in several processes and compile their
own. Without a GPU the launches are those of sm_90.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# a compiler process imports this module as well: what is heavy is imported where it is used
_CPU_CAPABILITY = 90
_SHARED_BYTES = 227 * 1024


def _projections(device: Any) -> None:
    """Forward and backward of q and v, jointly and one by one; with dropout; float32 adapters under autocast."""
    import shapes
    import torch

    from flare_kernels import fused_lora, fused_lora_qkv

    bf16 = torch.bfloat16
    for shape in shapes.projections(shapes.grid()):
        d, M, r = shape.model.d, shape.M, shape.r
        widths = {"q": shape.model.n_q, "v": shape.model.n_v}
        x, x_source = (torch.zeros(M, d, device=device, dtype=bf16) for _ in range(2))
        x.requires_grad_()
        bases = {name: torch.zeros(M, n, device=device, dtype=bf16) for name, n in widths.items()}
        weights = {name: torch.zeros(n, d, device=device, dtype=bf16) for name, n in widths.items()}
        for dtype, p in ((bf16, 0.0), (bf16, 0.1), (torch.float32, 0.0)):
            factors = {
                name: [torch.zeros(*size, device=device, dtype=dtype).requires_grad_() for size in ((r, d), (n, r))]
                for name, n in widths.items()
            }
            options: dict[str, Any] = {"fusion": "add_relu", "dropout_p": p, "training": True}
            cast = torch.autocast(x.device.type, bf16) if dtype != bf16 else contextlib.nullcontext()
            adapters = {name: (*pair, 2.0) for name, pair in factors.items()}
            for owned in (weights, None):
                with cast:
                    own = {name: y.clone() for name, y in bases.items()}
                    ys = fused_lora_qkv(x, x_source, own, adapters, weights=owned, **options)
                torch.autograd.backward(list(ys.values()), list(bases.values()))
            for name, pair in factors.items():
                with cast:
                    y = fused_lora(x, x_source, bases[name].clone(), *pair, scaling=2.0, **options)
                y.backward(bases[name])


def _kernels(device: Any) -> None:
    import shapes
    from primitives import operands, run

    from flare_kernels.triton_ops import primitives

    for shape in shapes.kernels(shapes.grid()):
        run(shape.primitive, primitives, operands(shape, device))


def _decoding(device: Any) -> None:
    import shapes
    import torch
    from test_generation import decode_fused, decode_inputs

    with torch.no_grad():
        for shape in shapes.decoding(shapes.grid()):
            decode_fused("auto")(decode_inputs(shape, device))


def _steps(device: Any) -> None:
    """Two blocks of Llama and XLM-R, at the batch sizes of whole steps and of their gate."""
    import shapes
    import step_gate
    import torch
    from batches import batch_of
    from models import quiet

    for shape in shapes.steps(shapes.grid()):
        if shape.precision != "plain" or shape.model.family not in ("llama", "xlmr"):
            continue
        shape = replace(shape, model=replace(shape.model, vocabulary=min(1024, shape.model.vocabulary)))
        with quiet():
            models = step_gate.models_of(shape, min(2, shape.model.layers), device)
            for B in (shape.B, 2):
                for method in ("lora", "input-fusion", "flare", "flare-recompute"):
                    models.loss(method, batch_of(replace(shape, B=B), device)).backward()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _models_of_tests(device: Any) -> None:
    """The tiny models that several test processes would compile for at once."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from cached_states import FAMILIES, batch_of, fused, step

    for family in FAMILIES:
        batch = {name: value.to(device) for name, value in batch_of(family).items()}
        for options in ({}, {"lora_dropout": 0.3}):
            model = fused(family, **options).to(device).train()
            step(model, batch)


#: What is recorded, in order: what needs the fewest imports first, so that compiling starts early.
SOURCES: dict[str, Callable[[Any], None]] = {
    "projections": _projections,
    "kernels": _kernels,
    "decoding": _decoding,
    "steps": _steps,
    "models of tests": _models_of_tests,
}


def units(device: Any) -> Iterator[tuple[str, list[Any]]]:
    """Return for each source its name and the units to compile that none before it had.

    A source that fails is reported with its error and costs its own units only.
    """
    from flare_kernels import aot
    from flare_kernels.launch_mode import recording
    from flare_kernels.testing import launches_left_out
    from flare_kernels.triton_ops.launch import shared_memory_bytes

    on_gpu = device.type == "cuda"
    capability, shared_bytes = _CPU_CAPABILITY, _SHARED_BYTES
    if on_gpu:
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        capability, shared_bytes = 10 * major + minor, shared_memory_bytes(device)
    seen: dict[Any, None] = {}
    for name, record in SOURCES.items():
        # without a GPU the kernels' path is taken where launches are left out; recording them comes before that
        with contextlib.nullcontext() if on_gpu else launches_left_out(), recording(shared_bytes) as launches:
            try:
                record(device)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
        new = dict.fromkeys(aot.specialise(launch, capability) for launch in launches)
        yield name, [unit for unit in new if unit not in seen]
        seen |= new


def _ready() -> None:
    """Do nothing: a process that has done it has started."""


def main(arguments: list[str] | None = None) -> int:
    """Record, compile, and print how long each took; return 1 where a unit failed to compile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes (default: one a core)"
    )
    parser.add_argument("--seconds", type=float, help="begin no compilation after so long")
    parser.add_argument("--most", type=int, help="compile so many kernels only (default: all)")
    options = parser.parse_args(arguments)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    # a server that has imported the compiler is forked, clean of CUDA and threads: one import for all processes, and it
    # happens while launches are recorded here
    context = get_context("forkserver")
    context.set_forkserver_preload(["flare_kernels.aot", "flare_kernels.triton_ops.primitives"])
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for _ in range(options.jobs):
            pool.submit(_ready)
        import torch

        from flare_kernels import aot

        say("imported")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pending: list[Future[dict[str, Any]]] = []
        for name, found in units(device):
            left = None if options.most is None else options.most - len(pending)
            pending += [pool.submit(aot.compile_unit, unit) for unit in found[:left]]
            say(f"{name}: {len(found)} kernels that were not there before")
        seconds = None if options.seconds is None else max(0.0, began + options.seconds - time.monotonic())
        done, late = wait(pending, timeout=seconds)
        cancelled = sum(future.cancel() for future in late)
        failed = [error for future in done if (error := future.result().get("error"))]
    for error in sorted(set(failed)):
        print(f"not compiled: {error[:300]}", flush=True)
    say(f"{len(pending) - cancelled - len(failed)} compiled, {len(failed)} failed, {cancelled} left for later")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
