"""The command `flare`: parse, call, print. What a command takes and does stands in `flare.experiments.commands`."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from flare_kernels import __version__

from .experiments.commands import (
    bench,
    check,
    demo,
    evaluate,
    finetune,
    info,
    predict,
    report,
    train,
    translate,
    unforeseen,
)
from .experiments.utils.processes import is_main, says_the_error
from .experiments.utils.progress import quiet_libraries_in_log_files

#: In the order of their use.
COMMANDS = (finetune, translate, check, train, evaluate, predict, report, demo, bench, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done, 1 a defect or output that nobody reads, 2 an error the user can fix, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name of another encoding is shown escaped
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    parsed, unknown = parser.parse_known_args(argv)
    arguments = vars(parsed)
    name, command = arguments.pop("subcommand"), arguments.pop("command")
    after = arguments.pop("after_interrupt", "")
    if "rest" in arguments:
        arguments["rest"] = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    quiet_libraries_in_log_files()
    try:
        return int(command(**arguments))
    except KeyboardInterrupt:
        if is_main():
            print(f"\nInterrupted. {_resume(after, argv)}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in flare info | head -1; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # each command reports its own UserErrors
        said, status = unforeseen.explained(error)
        if says_the_error():
            print(f"flare {name}: error: {said}", file=sys.stderr)
        return status


def _resume(after: str, argv: Sequence[str] | None) -> str:
    """What an interrupted command has left and how to resume it, with the command to give."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--no-resume"]
    return after.replace("{command}", shlex.join(["flare", *words])) if after else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse, in one of several processes: all of them read the same command line."""
        if is_main():
            super().error(message)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flare", description="FLARE: LoRA adapters that fuse a source- and a target-language stream.")
    parser.add_argument("--version", action="version", version=f"flare-kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="subcommand", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
