"""`flare bench`: run the benchmarks of a checkout, or tune the launches of the kernels for this GPU.

A launch is the configuration with which a kernel is started, such as the sizes of its tiles. A launch table lists the
fastest measured launches on one GPU, by model shape (widths of the adapted layers), tokens and rank. If it has no entry
for a call, a general rule (flare_kernels/triton_ops/config.py) chooses the launch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..utils.environment import environment, now
from ..utils.errors import UserError
from ..utils.extra import installed
from ..utils.progress import print_line

#: Defaults of --tune: model shapes (models of the paper or of similar size), tokens per call, and ranks. In each list,
#: the values that are used most come first, because the values are measured in this order.
SHAPES = ("llama-3.1-8b", "xlm-r-large", "gemma-2-9b", "mt5-xl")
TOKENS = (8192, 2048, 512, 1, 256, 32768)
RANKS = (64, 8, 128)


class BenchError(UserError):
    """An error of `flare bench` that the user can fix."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `flare`."""
    bench = commands.add_parser(
        "bench",
        help="run the benchmarks, or tune the kernels' launches for this GPU",
        description="Without --tune: run pytest on benchmarks/ of the checkout. With --tune: time every candidate "
        "launch of each kernel, and plain PyTorch, on this GPU, print the results, "
        "and write the table that later runs use.",
        argument_default=argparse.SUPPRESS,  # run_tuner has the defaults
    )
    bench.add_argument("--tune", action="store_true", default=False, help="tune instead of running the benchmarks")
    bench.add_argument("--shapes", nargs="+", metavar="NAME", help="model shapes to tune for")
    bench.add_argument("--tokens", nargs="+", type=int, metavar="M", help="tokens per call")
    bench.add_argument("--ranks", nargs="+", type=int, metavar="R", help="ranks of the adapters")
    bench.add_argument(
        "--budget", type=float, metavar="SECONDS", help="after this time, do not start to measure further sizes"
    )
    bench.add_argument(
        "--jobs", type=int, metavar="N", help="compiler processes (default: number of processors minus one)"
    )
    bench.add_argument("--output", type=Path, metavar="FILE", help="table to write (default: in the user's cache)")
    bench.add_argument("--overwrite", action="store_true", help="replace an existing table")
    bench.add_argument(
        "arguments", nargs="*", default=[], metavar="-- PYTEST", help="without --tune: arguments for pytest"
    )
    bench.set_defaults(command=run)


def run(tune: bool, arguments: list[str], **options: Any) -> int:
    """Run the benchmarks or the tuner; return the exit status."""
    if not tune:
        if options:
            flags = ", ".join(f"--{name}" for name in options)
            raise BenchError(f"{flags} can be used only with --tune (arguments for pytest follow --)")
        return run_benchmarks(arguments)
    if arguments:
        raise BenchError(f"{' '.join(arguments)}: --tune takes no arguments for pytest")
    run_tuner(**options, print_fn=print_line)
    return 0


def run_benchmarks(arguments: Sequence[str]) -> int:
    """Run pytest on `benchmarks/` of the checkout that contains this package; return pytest's exit status.

    Raises:
        BenchError: there is no checkout, or pytest-benchmark is not installed.
    """
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
    if not (folder / "conftest.py").exists():
        raise BenchError("the benchmarks are in the repository, not in the installed package: clone it and run there")
    if not installed("pytest_benchmark"):
        raise BenchError("pytest-benchmark is not installed: pip install 'flare-kernels[dev]'")
    # In a separate process, because pytest keeps state (plugins, conftests) that breaks a second run in one process.
    return subprocess.run([sys.executable, "-m", "pytest", str(folder), *arguments], check=False).returncode


def run_tuner(
    *,
    shapes: Sequence[str] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    ranks: Sequence[int] = RANKS,
    budget: float = float("inf"),
    jobs: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    print_fn: Callable[[str], None] = print,
) -> Path:
    """Measure the launch table of this GPU, write each entry when it is measured, and return the table's path.

    Args:
        shapes: names in ``flare_kernels.tuning.SHAPES``.
        tokens: numbers of tokens per call to measure, in this order.
        ranks: ranks of the adapters to measure, in this order.
        budget: seconds, including compilation. After this time, no measurement of a further size (a combination of
            shape, tokens and rank) starts.
        jobs: compiler processes (default: number of processors minus one).
        output: file to write. The default is in the user's cache, where later processes find it.
        overwrite: replace an existing table instead of raising.
        print_fn: prints a line.

    Raises:
        BenchError: torch finds no CUDA device, Triton is missing or does not support the device, a shape is unknown,
            `tokens` or `ranks` is empty or holds a number below 1, the file to write is a folder, or it exists and
            `overwrite` is False.
    """
    from flare_kernels import tuning
    from flare_kernels.launch_table import user_path

    unknown = sorted(set(shapes) - set(tuning.SHAPES))
    if unknown:
        raise BenchError(f"--shapes {', '.join(unknown)}: unknown; accepted are {', '.join(tuning.SHAPES)}")
    for name, values in (("--tokens", tokens), ("--ranks", ranks)):
        if not values or min(values) < 1:
            raise BenchError(f"{name} {list(values)}: give numbers of 1 or more")
    if not torch.cuda.is_available():
        raise BenchError(
            "--tune times the kernels on a CUDA device, and torch finds no CUDA device. Nothing was written; "
            "without a table, a general rule chooses the launches on any GPU."
        )
    if not installed("triton"):
        raise BenchError(
            "--tune times Triton kernels, and the package triton is not installed (it exists for Linux only)"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    path = output or user_path(gpu)
    if path.is_dir():
        raise BenchError(f"--output {path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise BenchError(f"{path} exists already: name another file with --output, or replace it with --overwrite")
    print_fn(f"tuning launches for {gpu}; every entry is written to {path} as soon as it is measured")
    try:
        table = tuning.tune(
            list(tuning.problems([tuning.SHAPES[name] for name in shapes], tokens, ranks)),
            device=device,
            about=environment() | {"date": now()},
            jobs=jobs or max(1, (os.cpu_count() or 1) - 1),
            budget_s=budget,
            log=print_fn,
            save=lambda table: table.save(path),
        )
    except ValueError as error:
        raise BenchError(str(error)) from error
    _summarise(table, path, print_fn)
    return path


def _summarise(table: Any, path: Path, print_fn: Callable[[str], None]) -> None:
    from flare_kernels.launch_table import package_path, user_path

    plain = sum(entry.form == "torch" for entry in table.entries.values())
    print_fn(f"{len(table.entries)} entries, {plain} of which use plain PyTorch, in {path}")
    if path == user_path(table.gpu):
        print_fn("later processes of this user read this table automatically")
    else:
        print_fn(f"to use this table, set FLARE_LAUNCH_TABLE={path}, or copy it to {user_path(table.gpu)}")
    print_fn(
        f"to ship this table for all users of this GPU, copy it to flare_kernels/tables/{package_path(table.gpu).name}"
    )
