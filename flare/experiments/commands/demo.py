"""`flare demo`: the comparison in a few minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .running import reported, say

_INTERRUPTED = """\
Rows that were finished are in the output folder's results.json, and a finished base model is kept. The demo does not
resume: the same command starts again and moves these results to earlier-N.
  {command}"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    demo = commands.add_parser(
        "demo",
        help="compare zero-shot, LoRA, input-level fusion and FLARE",
        description="Cross-lingual transfer: zero-shot, plain LoRA, input-level fusion and FLARE on one base.\n"
        "Without --model and --data it runs in a few minutes on a CPU, on a parallel corpus made by rule.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example on real data:\n  flare demo --model PATH_OR_HUB_ID --data FOLDER_OR_HUB_ID "
        "--source english --target acehnese",
    )
    demo.set_defaults(command=run, after_interrupt=_INTERRUPTED)
    _options(demo)


def run(**options: Any) -> int:
    """Run it; 2 for an error that the user can mend."""
    from ..demo import DemoSettings, run_demo

    return reported("demo", lambda: run_demo(DemoSettings(**options), say=say))


def _options(demo: argparse.ArgumentParser) -> None:
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
