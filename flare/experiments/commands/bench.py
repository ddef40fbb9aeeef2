"""`flare bench`: the benchmarks, or the tuner."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .running import say


def add_parser(commands: Any) -> None:
    """Register the command."""
    bench = commands.add_parser(
        "bench",
        help="run the benchmarks, or tune the kernels' launches for this GPU",
        description="Without --tune: pytest benchmarks/ of the checkout. With --tune: time every candidate launch and "
        "its plain PyTorch form on this GPU, print what was found, and write the table that later runs use.",
    )
    bench.set_defaults(command=run)
    _options(bench)


def run(tune: bool, arguments: list[str], **options: Any) -> int:
    """Run it; pytest's status, or 2 for an error that the user can mend."""
    import sys

    from .benchmarks import BenchError, run_benchmarks, run_tuner

    try:
        if not tune:
            if options:
                named = ", ".join(f"--{name}" for name in options)
                raise BenchError(f"{named}: only with --tune (what is meant for pytest goes behind --)")
            return run_benchmarks(arguments)
        if arguments:
            raise BenchError(f"{' '.join(arguments)}: --tune takes no arguments for pytest")
        run_tuner(**options, say=say)
    except BenchError as error:
        print(f"flare bench: error: {error}", file=sys.stderr)
        return 2
    return 0


def _options(bench: argparse.ArgumentParser) -> None:
    missing = argparse.SUPPRESS
    bench.add_argument("--tune", action="store_true", help="tune instead of running the benchmarks")
    bench.add_argument("--shapes", nargs="+", default=missing, metavar="NAME", help="models' shapes to tune for")
    bench.add_argument("--tokens", nargs="+", type=int, default=missing, metavar="M", help="tokens in a call")
    bench.add_argument("--ranks", nargs="+", type=int, default=missing, metavar="R", help="ranks of the adapters")
    bench.add_argument("--budget", type=float, default=missing, metavar="SECONDS", help="begin nothing new after this")
    bench.add_argument(
        "--jobs", type=int, default=missing, metavar="N", help="compiler processes (default: all but one)"
    )
    bench.add_argument("--output", type=Path, default=missing, metavar="FILE", help="table (default: the user's cache)")
    bench.add_argument("--overwrite", action="store_true", default=missing, help="replace a table that is there")
    bench.add_argument("arguments", nargs="*", metavar="-- PYTEST", help="without --tune: arguments for pytest")
