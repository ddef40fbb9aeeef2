"""`flare demo`: compare the methods in a few minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..utils.progress import print_line

_INTERRUPTED = """\
Finished rows are in results.json in the output folder, and a finished base model is kept. The demo does not resume:
if you repeat the command, it starts again and moves these results to earlier-N.
  {command}"""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `flare`."""
    demo = commands.add_parser(
        "demo",
        help="compare zero-shot, LoRA, input-level fusion and FLARE in a few minutes",
        description="Compare cross-lingual transfer by zero-shot, plain LoRA, input-level fusion and FLARE.\n"
        "Without --model and --data it takes a few minutes on a CPU, on a small generated parallel corpus.\n"
        "Where a default is written A / B, A is the default for this corpus and B the default for real data.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        epilog="example on real data:\n  flare demo --model PATH_OR_HUB_ID --data FOLDER_OR_HUB_ID "
        "--source english --target acehnese",
    )
    demo.set_defaults(command=run, after_interrupt=_INTERRUPTED)
    _options(demo)


def run(**options: Any) -> None:
    """Run the demo."""
    from ..demo import DemoSettings, run_demo

    run_demo(DemoSettings(**options), print_fn=print_line)


def _add(group: Any, flag: str, text: str, kind: type = str, metavar: str | None = None) -> None:
    """Add an option without a default (the parser suppresses it), so that DemoSettings uses its own."""
    group.add_argument(flag, type=kind, metavar=metavar, help=text)


def _options(demo: argparse.ArgumentParser) -> None:
    run = demo.add_argument_group("run")
    _add(run, "--output", "folder for results.json, a table and a figure (default: flare-demo)", Path, "DIR")
    _add(run, "--seeds", "number of seeds (default: 3)", int, "N")
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="replace earlier results in the folder (default: move them to its sub-folder earlier-N)",
    )
    _add(run, "--rows", "use at most N rows of every split, for a quick test", int, "N")
    _add(run, "--threads", "CPU threads (default: 1 / PyTorch's choice)", int, "N")
    _add(
        run,
        "--cache-dir",
        "folder that keeps the pretrained base of the generated corpus (default: ~/.cache/flare-kernels)",
        Path,
        "DIR",
    )
    run.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")

    data = demo.add_argument_group("real data and a real model")
    _add(data, "--model", "folder or hub id of a transformers model", metavar="MODEL")
    _add(
        data,
        "--data",
        "hub id, or folder with one sub-folder per language that holds train.csv and test.csv (id, text, label)",
        metavar="DATA",
    )
    _add(data, "--source", "language that the base is fine-tuned on", metavar="LANGUAGE")
    _add(data, "--target", "language that the adapters are trained for", metavar="LANGUAGE")

    recipe = demo.add_argument_group("hyper-parameters")
    _add(recipe, "--fusion", "add, mul, add_relu or mul_relu (default: add_relu)", metavar="NAME")
    _add(recipe, "--noise", "share of damaged words in the noisy source; 0: no noisy rows (default: 0.15)", float, "X")
    _add(recipe, "--r", "rank of the adapters (default: 16 / 64)", int, "R")
    _add(recipe, "--alpha", "lora_alpha of the adapters (default: 32 / 128)", float, "ALPHA")
    _add(recipe, "--epochs", "epochs of training the adapters (default: 10 / 8)", int, "N")
    _add(recipe, "--batch-size", "rows per step (default: 32 / 32)", int, "N")
    _add(recipe, "--lr", "learning rate of the adapters (default: 5e-3 / 1e-3)", float, "LR")
    _add(recipe, "--max-length", "tokens per text (default: 24 / 64)", int, "M")
    _add(recipe, "--finetune-epochs", "epochs of fine-tuning on the source language (default: 15 / 5)", int, "N")
    _add(recipe, "--finetune-batch-size", "rows per step of fine-tuning (default: 32 / 16)", int, "N")
    _add(recipe, "--finetune-lr", "learning rate of fine-tuning (default: 1e-3 / 5e-5)", float, "LR")
    _add(
        recipe,
        "--pretrain-steps",
        "pretraining steps (masked language modelling) of the base of the generated corpus (default: 500)",
        int,
        "N",
    )
