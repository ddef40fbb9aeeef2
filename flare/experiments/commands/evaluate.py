"""`flare evaluate`: zero-shot, translate-test, and trained adapters on the test split."""

from __future__ import annotations

from typing import Any

from ..runs.run_settings import EvaluateSettings
from .running import add_experiment_parser, run_experiment_command

_DESCRIPTION = """\
zero-shot: the base on the target's test texts.
translate-test: the base on the same texts in the source language.
translate-train: every trained adapter, also with the other source text (--source-text)."""


_INTERRUPTED = """\
Scores that were printed are saved. Resume with the same command, which skips them:
  {command}"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    add_experiment_parser(
        commands,
        "evaluate",
        EvaluateSettings,
        help="zero-shot, translate-test, and trained adapters on the test split",
        description=_DESCRIPTION,
        run=run,
        after_interrupt=_INTERRUPTED,
    )


def run(rest: list[str], **given: Any) -> int:
    """Run it; 2 for an error that the user can mend."""

    def work(settings: EvaluateSettings, say: Any) -> None:
        from ..runs.evaluate import run_evaluate

        run_evaluate(settings, say)

    return run_experiment_command("evaluate", EvaluateSettings, work, given, rest)
