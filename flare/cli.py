"""The command `flare`: parse the command line, run the command, print errors."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from flare_kernels import __version__

from .experiments.commands import bench, error_messages, info, report
from .experiments.commands.experiment import CHECK, DEMO, EVALUATE, FINETUNE, PREDICT, TRAIN, TRANSLATE
from .experiments.utils import extra
from .experiments.utils.processes import is_main, prints_errors
from .experiments.utils.progress import quiet_libraries_in_log_files

#: The commands, in the order of the help text.
_ADD_PARSERS = (
    FINETUNE.add_parser,
    TRANSLATE.add_parser,
    CHECK.add_parser,
    TRAIN.add_parser,
    EVALUATE.add_parser,
    PREDICT.add_parser,
    report.add_parser,
    DEMO.add_parser,
    bench.add_parser,
    info.add_parser,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 success, 1 a defect or a closed standard output, 2 an error that the user can fix, 130
        interrupted. `flare bench` without --tune returns the exit status of pytest.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the stream's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    parsed, unknown = parser.parse_known_args(argv)
    arguments = vars(parsed)
    name, command = arguments.pop("subcommand"), arguments.pop("command")
    after_interrupt = arguments.pop("after_interrupt", "")
    if "rest" in arguments:  # the command reads flags that this parser does not know
        arguments["rest"] = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    quiet_libraries_in_log_files()
    try:
        if name != "info":
            extra.require(name)
        return int(command(**arguments) or 0)
    except KeyboardInterrupt:
        if is_main():
            print(f"\nInterrupted. {_resume(after_interrupt, argv)}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # for example, flare info | head -1; the rest of the output is discarded
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message, status = error_messages.explain(error)
        if prints_errors():
            print(f"flare {name}: error: {message}", file=sys.stderr)
        return status


def _resume(after_interrupt: str, argv: Sequence[str] | None) -> str:
    """Return the message after Ctrl-C, with the command line to repeat, from which --no-resume is removed."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--no-resume"]
    return after_interrupt.replace("{command}", shlex.join(["flare", *words]))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with status 2; only the main process prints, because all processes parse the same command line."""
        if is_main():
            super().error(message)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flare", description="FLARE: LoRA adapters that fuse a text with its translation.")
    parser.add_argument("--version", action="version", version=f"flare-kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="subcommand", required=True)
    for add_parser in _ADD_PARSERS:
        add_parser(commands)
    return parser
