"""The command `flare`: parse, call, print. What a command takes and does stands in `flare.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .commands import bench, demo, evaluate, finetune, info, report, train, translate
from .processes import is_main

#: In the order of their use.
COMMANDS = (finetune, translate, train, evaluate, report, demo, bench, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 2 something the user can mend, 130 interrupted)."""
    parser = _parser()
    parsed, unknown = parser.parse_known_args(argv)
    arguments = vars(parsed)
    command = arguments.pop("command")
    if "rest" in arguments:
        arguments["rest"] = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(command(**arguments))
    except KeyboardInterrupt:
        if is_main():
            print("\nInterrupted.", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse, in one of several processes: all of them read the same command line."""
        if is_main():
            super().error(message)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flare", description="FLARE: LoRA adapters that fuse a source- and a target-language stream.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
