"""`flare predict`: a trained adapter on texts of your own."""

from __future__ import annotations

import sys
from typing import Any

from ..prediction.predict_settings import PredictSettings
from .running import add_experiment_parser, run_experiment_command

_DESCRIPTION = """\
Predict labels with probabilities, answers, or generated text for every row of a file, which keeps its columns.
A row's source text is read from the column source_<column>, from --source-input, or made with --translator. An
interrupted command goes on where it stopped when it is given again. See docs/predicting.md."""

_INTERRUPTED = """\
Finished batches are kept next to the output. Resume with the same command:
  {command}"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    add_experiment_parser(
        commands,
        "predict",
        PredictSettings,
        help="a trained adapter on texts of your own",
        description=_DESCRIPTION,
        run=run,
        after_interrupt=_INTERRUPTED,
    )


def run(rest: list[str], **given: Any) -> int:
    """Run it; 2 for an error that the user can fix."""

    def work(settings: PredictSettings, say: Any) -> None:
        from ..prediction.run import run_predict

        run_predict(settings, _aside if settings.output == "-" else say)

    return run_experiment_command("predict", PredictSettings, work, given, rest)


def _aside(line: str) -> None:
    """Print a line to standard error: standard output is the predictions'."""
    from tqdm.auto import tqdm

    tqdm.write(line, file=sys.stderr)
