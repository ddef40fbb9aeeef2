"""`flare bench`: the benchmarks of a checkout, and the offline tuner of the kernels' launches."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flare_kernels import tuning
from flare_kernels.launch_table import LaunchTable, package_path, user_path

from ..utils.environment import environment, now
from ..utils.errors import UserError

#: What `--tune` measures unless told: the papers' models, the most used sizes first.
SHAPES = ("llama-3.1-8b", "xlm-r-large", "gemma-2-9b", "mt5-xl")
TOKENS = (8192, 2048, 512, 1, 256, 32768)
RANKS = (64, 8, 128)


class BenchError(UserError):
    """Something the user can mend."""


def run_benchmarks(arguments: Sequence[str]) -> int:
    """`pytest benchmarks/` of the checkout that this package runs from; pytest's exit status.

    Raises:
        BenchError: there is no checkout, or pytest-benchmark is not installed.
    """
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
    if not (folder / "conftest.py").exists():
        raise BenchError("the benchmarks are in the repository, not in the installed package: clone it and run there")
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise BenchError("pytest-benchmark is not installed: pip install 'flare-kernels[dev]'")
    # A process of its own: pytest keeps state (plugins, imported conftests) that does not survive a second run in one.
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
    say: Callable[[str], None] = print,
) -> Path:
    """Measure this GPU's launch table and write it, entry by entry; where it is.

    Args:
        shapes: names in ``flare_kernels.tuning.SHAPES``. tokens, ranks: sizes to measure, in this order.
        budget: seconds after which no new size is begun, compiling included.
        jobs: compiler processes (default: one for each processor but one).
        output: file to write; default: the user's cache, where every later process finds it.
        overwrite: replace a table that is there (default: refuse).

    Raises:
        BenchError: no CUDA device that the kernels run on, an unknown shape, sizes that are not positive, or a table
            that is already there.
    """
    unknown = sorted(set(shapes) - set(tuning.SHAPES))
    if unknown:
        raise BenchError(f"--shapes {', '.join(unknown)}: known are {', '.join(tuning.SHAPES)}")
    for name, values in (("--tokens", tokens), ("--ranks", ranks)):
        if not values or min(values) < 1:
            raise BenchError(f"{name} {list(values)}: give numbers of 1 and more")
    if not torch.cuda.is_available():
        raise BenchError(
            "--tune times the kernels on a CUDA device, and torch sees none. Nothing was written; without a table "
            "launches follow the general rule."
        )
    if importlib.util.find_spec("triton") is None:
        raise BenchError(
            "--tune times Triton kernels, and the package triton is not installed (it exists for Linux only)"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    path = output or user_path(gpu)
    if path.is_dir():
        raise BenchError(f"--output {path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise BenchError(f"{path} is already there: name another file with --output, or replace it with --overwrite")
    about = environment() | {"date": now()}
    wanted = list(tuning.problems([tuning.SHAPES[name] for name in shapes], tokens, ranks))
    say(f"tuning launches for {gpu}; entries go to {path} as they are found")
    try:
        table = tuning.tune(
            wanted,
            device=device,
            about=about,
            jobs=jobs or max(1, (os.cpu_count() or 1) - 1),
            budget_s=budget,
            log=say,
            save=lambda table: table.save(path),
        )
    except ValueError as error:
        raise BenchError(str(error)) from error
    _summarise(table, path, say)
    return path


def _summarise(table: LaunchTable, path: Path, say: Callable[[str], None]) -> None:
    plain = sum(entry.form == "torch" for entry in table.entries.values())
    say(f"{len(table.entries)} entries, {plain} of them plain PyTorch, in {path}")
    if path == user_path(table.gpu):
        say("later processes of this user take it by themselves")
    else:
        say(f"to use it: FLARE_LAUNCH_TABLE={path}, or copy it to {user_path(table.gpu)}")
    say(f"a table for everybody with this card belongs in flare_kernels/tables/{package_path(table.gpu).name}")
