"""`flare report`: its options, and the call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .running import reported, say

FORMATS = ("png", "pdf", "svg")


_INTERRUPTED = """\
The earlier report, if there was one, is unchanged. Start again with the same command:
  {command}"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "report",
        help="tables and pictures of finished runs",
        description="Read every run below the given folders (those of flare finetune, train and evaluate) and write "
        "tables (Markdown, CSV, LaTeX), pictures, report.md and report.json.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, at any depth")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder to write to (default: report)")
    parser.add_argument(
        "--metric",
        dest="metrics",
        nargs="+",
        metavar="NAME",
        help="metrics to report, the first one in the pictures (default: all of a task's)",
    )
    parser.add_argument("--title", help="heading of report.md")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=["png", "pdf"],
        metavar="FORMAT",
        help="of the pictures: png, pdf, svg (default: png and pdf; png is always written)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier report instead of keeping it as earlier-N"
    )
    parser.set_defaults(command=run, after_interrupt=_INTERRUPTED)


def run(
    runs: Sequence[Path],
    output: Path,
    metrics: Sequence[str] | None,
    title: str | None,
    formats: Sequence[str],
    overwrite: bool,
) -> int:
    """Write the report; return the exit status."""
    from ..report import write_report

    def work() -> None:
        write_report(runs, output, metrics=metrics, title=title, formats=formats, overwrite=overwrite, say=say)

    return reported("report", work)
