"""The command `flare`: parse, call, print. What a command takes and does stands in `flare.commands`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from flare_kernels import __version__

from .commands import bench, check, demo, evaluate, finetune, info, report, train, translate
from .processes import is_main
from .progress import quiet_libraries_in_log_files

#: In the order of their use.
COMMANDS = (finetune, translate, check, train, evaluate, report, demo, bench, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 2 something the user can mend, 130 interrupted)."""
    parser = _parser()
    parsed, unknown = parser.parse_known_args(argv)
    arguments = vars(parsed)
    command = arguments.pop("command")
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


def _resume(after: str, argv: Sequence[str] | None) -> str:
    """What an interrupted command has left and how to resume it, with the command to give."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--no-resume"]
    return after.replace("{command}", shlex.join(["flare", *words])) if after else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flare", description="FLARE: LoRA adapters that fuse a source- and a target-language stream."
    )
    parser.add_argument("--version", action="version", version=f"flare-kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
