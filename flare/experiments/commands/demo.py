"""`flare demo`: compare the methods in a few minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..utils.progress import print_line
from .arguments import add_option

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


def _options(demo: argparse.ArgumentParser) -> None:
    run = demo.add_argument_group("run")
    add_option(run, "--output", "folder for results.json, a table and a figure (default: flare-demo)", Path, "DIR")
    add_option(run, "--seeds", "number of seeds (default: 3)", int, "N")
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="replace earlier results in the folder (default: move them to its sub-folder earlier-N)",
    )
    add_option(run, "--rows", "use at most N rows of every split, for a quick test", int, "N")
    add_option(run, "--threads", "CPU threads (default: 1 / PyTorch's choice)", int, "N")
    add_option(
        run,
        "--cache-dir",
        "folder that keeps the pretrained base of the generated corpus (default: ~/.cache/flare-kernels)",
        Path,
        "DIR",
    )
    run.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")

    data = demo.add_argument_group("real data and a real model")
    add_option(data, "--model", "folder or hub id of a transformers model", metavar="MODEL")
    add_option(
        data,
        "--data",
        "hub id, or folder with one sub-folder per language that holds train.csv and test.csv (id, text, label)",
        metavar="DATA",
    )
    add_option(data, "--source", "language that the base is fine-tuned on", metavar="LANGUAGE")
    add_option(data, "--target", "language that the adapters are trained for", metavar="LANGUAGE")

    recipe = demo.add_argument_group("hyper-parameters")
    add_option(recipe, "--fusion", "add, mul, add_relu or mul_relu (default: add_relu)", metavar="NAME")
    add_option(
        recipe, "--noise", "share of damaged words in the noisy source; 0: no noisy rows (default: 0.15)", float, "X"
    )
    add_option(recipe, "--r", "rank of the adapters (default: 16 / 64)", int, "R")
    add_option(recipe, "--alpha", "lora_alpha of the adapters (default: 32 / 128)", float, "ALPHA")
    add_option(recipe, "--epochs", "epochs of training the adapters (default: 10 / 8)", int, "N")
    add_option(recipe, "--batch-size", "rows per step (default: 32 / 32)", int, "N")
    add_option(recipe, "--lr", "learning rate of the adapters (default: 5e-3 / 1e-3)", float, "LR")
    add_option(recipe, "--max-length", "tokens per text (default: 24 / 64)", int, "M")
    add_option(recipe, "--finetune-epochs", "epochs of fine-tuning on the source language (default: 15 / 5)", int, "N")
    add_option(recipe, "--finetune-batch-size", "rows per step of fine-tuning (default: 32 / 16)", int, "N")
    add_option(recipe, "--finetune-lr", "learning rate of fine-tuning (default: 1e-3 / 5e-5)", float, "LR")
    add_option(
        recipe,
        "--pretrain-steps",
        "pretraining steps (masked language modelling) of the base of the generated corpus (default: 500)",
        int,
        "N",
    )
