"""`flare demo`: the comparison of the methods in a few minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..utils.progress import print_line

_INTERRUPTED = """\
Finished rows are in results.json in the output folder, and a finished base model is kept. The demo does not resume:
the same command starts again and moves these results to earlier-N.
  {command}"""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `flare`."""
    demo = commands.add_parser(
        "demo",
        help="compare zero-shot, LoRA, input-level fusion and FLARE in a few minutes",
        description="Compare cross-lingual transfer by zero-shot, plain LoRA, input-level fusion and FLARE.\n"
        "Without --model and --data it takes a few minutes on a CPU, on a small generated parallel corpus.\n"
        "Where a default is written A / B, A is for this embedded corpus and B for real data.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example on real data:\n  flare demo --model PATH_OR_HUB_ID --data FOLDER_OR_HUB_ID "
        "--source english --target acehnese",
    )
    demo.set_defaults(command=run, after_interrupt=_INTERRUPTED)
    _options(demo)


def run(**options: Any) -> None:
    """Run the demo."""
    from ..demo import DemoSettings, run_demo

    run_demo(DemoSettings(**options), say=print_line)


def _options(demo: argparse.ArgumentParser) -> None:
    # DemoSettings holds the defaults; an option that is not given is not passed on.
    missing = argparse.SUPPRESS

    def add(group: argparse._ArgumentGroup, flag: str, text: str, kind: type = str, metavar: str | None = None) -> None:
        group.add_argument(flag, type=kind, default=missing, metavar=metavar, help=text)

    run = demo.add_argument_group("run")
    add(run, "--output", "folder for results.json, a table and a figure (default: flare-demo)", Path, "DIR")
    add(run, "--seeds", "number of seeds (default: 3)", int, "N")
    run.add_argument(
        "--overwrite",
        action="store_true",
        default=missing,
        help="replace earlier results in the folder (default: move them to its sub-folder earlier-N)",
    )
    add(run, "--rows", "use at most N rows of every part, for a quick look", int, "N")
    add(run, "--threads", "CPU threads (default: 1 / PyTorch's choice)", int, "N")
    add(run, "--cache-dir", "folder that keeps the embedded base (default: ~/.cache/flare-kernels)", Path, "DIR")
    run.add_argument("--no-progress", dest="progress", action="store_false", default=missing, help="no progress bars")

    data = demo.add_argument_group("real data and a real model")
    add(data, "--model", "folder or hub id of a transformers model", metavar="MODEL")
    add(
        data,
        "--data",
        "hub id, or folder with one sub-folder per language that holds train.csv and test.csv (id, text, label)",
        metavar="DATA",
    )
    add(data, "--source", "language that the base is fine-tuned on", metavar="LANGUAGE")
    add(data, "--target", "language that the adapters are trained for", metavar="LANGUAGE")

    recipe = demo.add_argument_group("hyper-parameters")
    add(recipe, "--fusion", "add, mul, add_relu or mul_relu (default: add_relu)", metavar="NAME")
    add(recipe, "--noise", "share of damaged words in the noisy source; 0: no noisy rows (default: 0.15)", float, "X")
    add(recipe, "--r", "rank of the adapters (default: 16 / 64)", int, "R")
    add(recipe, "--alpha", "lora_alpha of the adapters (default: 32 / 128)", float, "ALPHA")
    add(recipe, "--epochs", "epochs over the pairs (default: 10 / 8)", int, "N")
    add(recipe, "--batch-size", "rows per step (default: 32 / 32)", int, "N")
    add(recipe, "--lr", "learning rate of the adapters (default: 5e-3 / 1e-3)", float, "LR")
    add(recipe, "--max-length", "tokens per text (default: 24 / 64)", int, "M")
    add(recipe, "--finetune-epochs", "epochs of fine-tuning on the source language (default: 15 / 5)", int, "N")
    add(recipe, "--finetune-batch-size", "rows per step of fine-tuning (default: 32 / 16)", int, "N")
    add(recipe, "--finetune-lr", "learning rate of fine-tuning (default: 1e-3 / 5e-5)", float, "LR")
    add(recipe, "--pretrain-steps", "masked-language-modelling steps of the embedded base (default: 500)", int, "N")
