"""`flare train`: train lora, input-fusion, x-mixup, flare and flare-mt."""

from __future__ import annotations

from typing import Any

from ..runs.run_settings import TrainSettings
from .running import add_experiment_parser, run_experiment_command

_DESCRIPTION = """\
Train every method on every target language with every seed, into OUTPUT/<target>/<method>/seed-N, and
evaluate the test split. Rates, epochs, ranks and lengths are the paper's; --paper sets the rest of its settings
(5 seeds, machine-translated text, fixed length). A finished run is skipped, an unfinished one goes on from its
last checkpoint."""


_INTERRUPTED = """\
Finished runs are kept. Resume with the same command:
  {command}
It skips what is finished and continues the interrupted run from its last checkpoint (one is written each epoch, or as
--save-steps says; before the first one it starts anew)."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    add_experiment_parser(
        commands,
        "train",
        TrainSettings,
        help="train lora, input-fusion, x-mixup, flare and flare-mt",
        description=_DESCRIPTION,
        run=run,
        after_interrupt=_INTERRUPTED,
    )


def run(rest: list[str], **given: Any) -> int:
    """Run it; 2 for an error that the user can mend."""

    def work(settings: TrainSettings, say: Any) -> None:
        from ..runs.train import run_train

        run_train(settings, say)

    return run_experiment_command("train", TrainSettings, work, given, rest)
