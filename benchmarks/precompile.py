"""Fill Triton's cache with the kernels that the GPU benchmarks and some tests launch, compiled on all CPU cores.

    python benchmarks/precompile.py [--jobs N] [--seconds S] [--most N]

A benchmark runs in one process and compiles missing kernels one after the other. Compiling them in advance lets a run
of all cases start timing minutes earlier. The launches are recorded on the device, so that they have the tiles of the
device's tuned launch table, but they are not executed. The products with the frozen weights are executed. The launches
of tests/kernels are not included. Without a GPU, the kernels are compiled for sm_90.
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

# Compiler processes also import this module. Imports that take long are therefore inside the functions.
_CPU_CAPABILITY = 90
_SHARED_BYTES = 227 * 1024


def _projections(device: Any) -> None:
    """Run forward and backward of q and v, jointly and separately; also with dropout and with float32 adapters."""
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
            for frozen_weights in (weights, None):
                with cast:
                    outputs = {name: y.clone() for name, y in bases.items()}
                    ys = fused_lora_qkv(x, x_source, outputs, adapters, weights=frozen_weights, **options)
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
    from test_decoding import decode_fused, decode_inputs

    with torch.no_grad():
        for shape in shapes.decoding(shapes.grid()):
            decode_fused("auto")(decode_inputs(shape, device))


def _steps(device: Any) -> None:
    """Run two blocks of Llama and XLM-R, at the batch sizes of whole steps and of their correctness check."""
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
    """Run the tiny models for which several test processes would otherwise compile the same kernels."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from cached_states import FAMILIES, batch_of, fused, step

    for family in FAMILIES:
        batch = {name: value.to(device) for name, value in batch_of(family).items()}
        for options in ({}, {"lora_dropout": 0.3}):
            model = fused(family, **options).to(device).train()
            step(model, batch)


#: Functions whose launches are recorded. Functions with few imports come first, so that compiling starts early.
SOURCES: dict[str, Callable[[Any], None]] = {
    "projections": _projections,
    "kernels": _kernels,
    "decoding": _decoding,
    "steps": _steps,
    "models of tests": _models_of_tests,
}


def units(device: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield, for each function in `SOURCES`, its name and the units to compile that no earlier function needs.

    A unit is one kernel with one set of compile-time arguments. If a function fails, its error is printed, and the
    units of the other functions are still yielded.
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
        # without a GPU, launches_left_out() makes CPU tensors take the kernels' code path instead of plain PyTorch's
        with contextlib.nullcontext() if on_gpu else launches_left_out(), recording(shared_bytes) as launches:
            try:
                record(device)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
        new = dict.fromkeys(aot.specialise(launch, capability) for launch in launches)
        yield name, [unit for unit in new if unit not in seen]
        seen |= new


def _ready() -> None:
    """Do nothing. Submitting this function starts a process of the pool."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a kernel failed to compile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes (default: one per core)"
    )
    parser.add_argument("--seconds", type=float, help="start no compilation after this many seconds")
    parser.add_argument("--most", type=int, help="compile at most this many kernels (default: all)")
    options = parser.parse_args(arguments)
    start = time.monotonic()

    def log(text: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {text}", flush=True)

    # The fork server imports the compiler once for all processes, while this process records launches. The server uses
    # neither CUDA nor threads, so forking it is safe.
    context = get_context("forkserver")
    context.set_forkserver_preload(["flare_kernels.aot", "flare_kernels.triton_ops.primitives"])
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for _ in range(options.jobs):
            pool.submit(_ready)
        import torch

        from flare_kernels import aot

        log("imported")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pending: list[Future[dict[str, Any]]] = []
        for name, new_units in units(device):
            left = None if options.most is None else options.most - len(pending)
            pending += [pool.submit(aot.compile_unit, unit) for unit in new_units[:left]]
            log(f"{name}: {len(new_units)} kernels that no earlier function needs")
        seconds = None if options.seconds is None else max(0.0, start + options.seconds - time.monotonic())
        done, late = wait(pending, timeout=seconds)
        cancelled = sum(future.cancel() for future in late)
        failed = [error for future in done if (error := future.result().get("error"))]
    for error in sorted(set(failed)):
        print(f"not compiled: {error[:300]}", flush=True)
    log(f"{len(pending) - cancelled - len(failed)} compiled, {len(failed)} failed, {cancelled} not started")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
