"""`flare report`: write tables and figures of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.progress import print_line

FORMATS = ("png", "pdf", "svg")

_INTERRUPTED = """\
The earlier report, if there was one, is unchanged. Start again with the same command:
  {command}"""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `flare`."""
    parser = commands.add_parser(
        "report",
        help="write tables and figures of finished runs",
        description="Read every run below the given folders (written by flare finetune, train and evaluate) and write "
        "tables (Markdown, CSV, LaTeX), figures, report.md and report.json.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders that contain runs, at any depth")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder to write to (default: report)")
    parser.add_argument(
        "--metric",
        dest="metrics",
        nargs="+",
        metavar="NAME",
        help="metrics to report; figures show the first one (default: all metrics of a task)",
    )
    parser.add_argument("--title", help="heading of report.md")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=["png", "pdf"],
        metavar="FORMAT",
        help="file formats of the figures: png, pdf, svg (default: png and pdf; png is always written)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier report instead of moving it to earlier-N"
    )
    parser.set_defaults(command=run, after_interrupt=_INTERRUPTED)


def run(
    runs: Sequence[Path],
    output: Path,
    metrics: Sequence[str] | None,
    title: str | None,
    formats: Sequence[str],
    overwrite: bool,
) -> None:
    """Write the report."""
    from ..report import write_report

    write_report(runs, output, metrics=metrics, title=title, formats=formats, overwrite=overwrite, print_fn=print_line)
