"""`flare finetune`: learn the task in the source language, merged into the base."""

from __future__ import annotations

from typing import Any

from ..runs.run_settings import FinetuneSettings
from .running import add_experiment_parser, run_experiment_command

_DESCRIPTION = """\
Train an adapter (or --full: all weights) on the task in the source language and save the merged model, one
per seed, into OUTPUT/base/seed-N. Rates, epochs, ranks and lengths are the paper's; --paper sets the rest of its
settings (5 seeds, fixed length). A finished run is skipped, an unfinished one goes on from its last checkpoint."""


_INTERRUPTED = """\
Finished runs are kept. Resume with the same command:
  {command}
It skips what is finished and continues the interrupted run from its last checkpoint (one is written each epoch, or as
--save-steps says; before the first one it starts anew)."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    add_experiment_parser(
        commands,
        "finetune",
        FinetuneSettings,
        help="learn the task in the source language, merged into the base",
        description=_DESCRIPTION,
        run=run,
        after_interrupt=_INTERRUPTED,
    )


def run(rest: list[str], **given: Any) -> int:
    """Run it; 2 for an error that the user can mend."""

    def work(settings: FinetuneSettings, say: Any) -> None:
        from ..runs.finetune import run_finetune

        run_finetune(settings, say)

    return run_experiment_command("finetune", FinetuneSettings, work, given, rest)
