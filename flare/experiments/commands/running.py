"""What the commands share: news on the terminal, threads, and the sentence in which an error ends."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from ..runs.options import add_options, read_settings
from ..runs.run_settings import NAMES
from ..utils.environment import use_threads
from ..utils.errors import UserError
from ..utils.processes import says_the_error


def say(line: str) -> None:
    """Print a line; tqdm's write keeps lines and progress bars apart."""
    from tqdm.auto import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def reported(command: str, call: Callable[[], Any], kinds: tuple[type[Exception], ...] = (UserError,)) -> int:
    """Call; print an error of the given kinds as `flare COMMAND: error: ...` and return 2, else 0."""
    try:
        call()
    except kinds as error:
        if says_the_error():
            print(f"flare {command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def add_experiment_parser(
    commands: Any,
    name: str,
    settings: type[Any],
    help: str,
    description: str,
    run: Callable[..., int],
    after_interrupt: str,
) -> None:
    """A command whose options are a settings class; with TrainingArguments' flags where the class has `training`.

    after_interrupt: what Ctrl-C leaves and how to resume; {command} stands for the command to give.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=task_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser, settings, training=any(one.name == "training" for one in fields(settings)))
    # flags that the parser does not know may be TrainingArguments': cli.main hands them over as rest
    parser.set_defaults(command=run, rest=[], after_interrupt=after_interrupt)


def task_list() -> str:
    """Return the tasks with their data sets on the hub, a paragraph for each."""
    from ..tasks import DATA_SETS, TASKS

    lines = ["tasks with a data set on the hub (columns -> label; the metric that checkpoints are chosen by):"]
    for task in TASKS.values():
        if task.hub_id is None:
            continue
        data = DATA_SETS[task.hub_id]
        others = dict.fromkeys(one.hub_id for one in data.english.values())
        english = "".join(f"; English {', '.join(data.english)} from {one}" for one in others)
        label = "answers" if task.kind == "qa" else task.label_column
        languages = " ".join(data.codes or (f"{data.languages} languages, named by FLORES-200's tags",))
        kinds = f"{', '.join(task.text_columns)} -> {label}; {task.metrics[0]}; {', '.join(data.splits)}{english}"
        apart = "" if data.parallel else "; languages are not translations of each other"
        text = f"{task.hub_id}: {kinds}{apart}; {languages}"
        lines += textwrap.wrap(f"  {task.name:<12} {text}", 110, subsequent_indent=" " * 15, break_on_hyphens=False)
    return "\n".join(lines)


def run_experiment_command(
    command: str, kind: type[Any], work: Callable[..., Any], given: dict[str, Any], rest: Sequence[str]
) -> int:
    """Read the settings, set the threads, work."""

    def call() -> None:
        settings = read_settings(kind, given, rest, NAMES)
        if settings.threads is not None:
            use_threads(settings.threads)
        work(settings, say)

    return reported(command, call)
