"""The command `flare`: parse, call, print. What a command does stands in its own module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .commands import translate


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 2 something the user can mend, 130 interrupted)."""
    parser = _parser()
    arguments = vars(parser.parse_args(argv))
    command = arguments.pop("command")
    try:
        return int(command(**arguments))
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def _demo(**options: object) -> int:
    from .demo import DemoError, DemoSettings, run_demo

    try:
        run_demo(DemoSettings(**options), say=_say)  # type: ignore[arg-type]
    except DemoError as error:
        print(f"flare demo: error: {error}", file=sys.stderr)
        return 2
    return 0


def _bench(tune: bool, arguments: list[str], **options: object) -> int:
    from .bench import BenchError, run_benchmarks, run_tuner

    try:
        if not tune:
            if options:
                named = ", ".join(f"--{name}" for name in options)
                raise BenchError(f"{named}: only with --tune (what is meant for pytest goes behind --)")
            return run_benchmarks(arguments)
        if arguments:
            raise BenchError(f"{' '.join(arguments)}: --tune takes no arguments for pytest")
        run_tuner(**options, say=_say)  # type: ignore[arg-type]
    except BenchError as error:
        print(f"flare bench: error: {error}", file=sys.stderr)
        return 2
    return 0


def _info() -> int:
    from flare_kernels import backends

    from .environment import environment

    here = environment()
    for name, version in here["versions"].items():
        _say(f"{name:<15}{version}")
    _say(f"{'device':<15}{here['device']}")
    _say(f"{'processor':<15}{here['cpu']}, {here['threads']} threads")
    _say(f"{'platform':<15}{here['platform']}")
    _say("kernel backends")
    for name, status in backends().items():
        _say(f"  {name:<13}{status}")
    _say(f"{'launch table':<15}{_launch_table()}")
    return 0


def _launch_table() -> str:
    import torch

    from flare_kernels.launch_table import table_for

    if not torch.cuda.is_available():
        return "none (no CUDA device)"
    table = table_for(torch.cuda.get_device_name())
    if table.path is None:
        return "none: launches follow the general rule (flare bench --tune measures one)"
    return f"{len(table.entries)} entries from {table.path}, {table.about.get('date', 'undated')}"


def _say(line: str) -> None:
    # tqdm's write keeps lines and progress bars apart.
    from tqdm.auto import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flare", description="FLARE: LoRA adapters that fuse a source- and a target-language stream."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    info = commands.add_parser("info", help="versions, device and kernel backends", description="For bug reports.")
    info.set_defaults(command=_info)
    bench = commands.add_parser(
        "bench",
        help="run the benchmarks, or tune the kernels' launches for this GPU",
        description="Without --tune: pytest benchmarks/ of the checkout. With --tune: time every candidate launch and "
        "its plain PyTorch form on this GPU, print what was found, and write the table that later runs use.",
    )
    bench.set_defaults(command=_bench)
    _bench_options(bench)
    demo = commands.add_parser(
        "demo",
        help="compare zero-shot, LoRA, input-level fusion and FLARE",
        description="Cross-lingual transfer: zero-shot, plain LoRA, input-level fusion and FLARE on one base.\n"
        "Without --model and --data it runs in a few minutes on a CPU, on a parallel corpus made by rule.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example on real data:\n  flare demo --model PATH_OR_HUB_ID --data FOLDER_OR_HUB_ID "
        "--source english --target acehnese",
    )
    demo.set_defaults(command=_demo)
    _demo_options(demo)
    translate.add_parser(commands)
    return parser


def _bench_options(bench: argparse.ArgumentParser) -> None:
    missing = argparse.SUPPRESS
    bench.add_argument("--tune", action="store_true", help="tune instead of running the benchmarks")
    bench.add_argument("--shapes", nargs="+", default=missing, metavar="NAME", help="models' shapes to tune for")
    bench.add_argument("--tokens", nargs="+", type=int, default=missing, metavar="M", help="tokens in a call")
    bench.add_argument("--ranks", nargs="+", type=int, default=missing, metavar="R", help="ranks of the adapters")
    bench.add_argument("--budget", type=float, default=missing, metavar="SECONDS", help="begin nothing new after this")
    bench.add_argument("--jobs", type=int, default=missing, metavar="N", help="compiler processes (default: all)")
    bench.add_argument("--output", type=Path, default=missing, metavar="FILE", help="table (default: the user's cache)")
    bench.add_argument("--overwrite", action="store_true", default=missing, help="replace a table that is there")
    bench.add_argument("arguments", nargs="*", metavar="-- PYTEST", help="without --tune: arguments for pytest")


def _demo_options(demo: argparse.ArgumentParser) -> None:
    # Defaults stand in DemoSettings only; what is not given is not passed on.
    missing = argparse.SUPPRESS

    def add(group: argparse._ArgumentGroup, flag: str, text: str, kind: type = str, metavar: str | None = None) -> None:
        group.add_argument(flag, type=kind, default=missing, metavar=metavar, help=text)

    run = demo.add_argument_group("run (A / B: default on the embedded corpus / on real data)")
    add(
        run,
        "--output",
        "folder for what the run writes: results.json, a table, a picture (default: flare-demo)",
        Path,
        "DIR",
    )
    add(run, "--seeds", "number of seeds (default: 3)", int, "N")
    run.add_argument(
        "--overwrite",
        action="store_true",
        default=missing,
        help="replace earlier results in the folder (default: keep them in its sub-folder earlier-N)",
    )
    add(run, "--rows", "use at most N rows of every part, for a quick look", int, "N")
    add(run, "--threads", "CPU threads (default: 1 / PyTorch's choice)", int, "N")
    add(run, "--cache-dir", "where the embedded base model is kept (default: ~/.cache/flare-kernels)", Path, "DIR")
    run.add_argument("--no-progress", dest="progress", action="store_false", default=missing, help="no progress bars")

    data = demo.add_argument_group("real data and a real model")
    add(data, "--model", "folder or hub id of a transformers model", metavar="MODEL")
    add(
        data,
        "--data",
        "folder (one sub-folder per language, train.csv and test.csv with id, text, label) or hub id",
        metavar="DATA",
    )
    add(data, "--source", "language the base is fine-tuned on", metavar="LANGUAGE")
    add(data, "--target", "language the adapters are trained for", metavar="LANGUAGE")

    recipe = demo.add_argument_group("recipe (A / B: default on the embedded corpus / on real data)")
    add(recipe, "--fusion", "add, mul, add_relu or mul_relu (default: add_relu)", metavar="NAME")
    add(recipe, "--noise", "share of words damaged in the noisy source, 0 for none (default: 0.15)", float, "SHARE")
    add(recipe, "--r", "rank of the adapters (16 / 64)", int, "R")
    add(recipe, "--alpha", "scale of the adapters times r (32 / 128)", float, "ALPHA")
    add(recipe, "--epochs", "epochs over the pairs (10 / 8)", int, "N")
    add(recipe, "--batch-size", "rows per step (32 / 32)", int, "N")
    add(recipe, "--lr", "learning rate of the adapters (5e-3 / 1e-3)", float, "LR")
    add(recipe, "--max-length", "tokens per text (24 / 64)", int, "M")
    add(recipe, "--finetune-epochs", "epochs of full fine-tuning on the source language (15 / 5)", int, "N")
    add(recipe, "--finetune-batch-size", "rows per step of it (32 / 16)", int, "N")
    add(recipe, "--finetune-lr", "learning rate of it (1e-3 / 5e-5)", float, "LR")
    add(recipe, "--pretrain-steps", "masked-language modelling steps of the embedded base (500)", int, "N")
