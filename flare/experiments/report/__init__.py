"""Runs in; tables and pictures out: `flare report`."""

from .collect import ReportError
from .write import write_report

__all__ = ["ReportError", "write_report"]
