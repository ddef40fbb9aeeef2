"""`flare check`: what a training would read and cost, before it is started."""

from __future__ import annotations

from typing import Any

from ..runs.run_settings import CheckSettings
from .running import add_experiment_parser, run_experiment_command

_DESCRIPTION = """\
Say, before hours of training, what will be paired with what, how many texts are cut, how the labels are
distributed, what the tokenizer makes of each language, what the base scores on the source language, and how long and
with how much memory each method will train on this machine. Takes the flags of `flare train`. `flare check` writes
nothing (but --json FILE), and needs no fine-tuned base (--model)."""

_INTERRUPTED = """\
Nothing was written. Start again with the same command:
  {command}"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    add_experiment_parser(
        commands,
        "check",
        CheckSettings,
        help="data, lengths, vocabulary, time and memory, before training",
        description=_DESCRIPTION,
        run=run,
        after_interrupt=_INTERRUPTED,
    )


def run(rest: list[str], **given: Any) -> int:
    """Run it; 2 for an error that the user can mend."""

    def work(settings: CheckSettings, say: Any) -> None:
        from ..check.run import run_check

        run_check(settings, say)

    return run_experiment_command("check", CheckSettings, work, given, rest)
