"""What the commands share: news on the terminal, threads, and the sentence in which an error ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from ..environment import use_threads
from ..errors import UserError
from ..experiment.options import add_options, read_settings


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
        print(f"flare {command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def add_experiment_parser(
    commands: Any, name: str, settings: type[Any], help: str, description: str, run: Callable[..., int]
) -> None:
    """A command whose options are a settings class; with TrainingArguments' flags where the class has `training`."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser, settings, training=any(one.name == "training" for one in fields(settings)))
    # flags that the parser does not know may be TrainingArguments': cli.main hands them over as rest
    parser.set_defaults(command=run, rest=[])


def run_experiment_command(
    command: str, kind: type[Any], work: Callable[..., Any], given: dict[str, Any], rest: Sequence[str]
) -> int:
    """Read the settings, set the threads, work."""

    def call() -> None:
        settings = read_settings(kind, given, rest)
        if settings.threads is not None:
            use_threads(settings.threads)
        work(settings, say)

    return reported(command, call)
