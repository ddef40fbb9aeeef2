"""Write the report of `flare report`: tables and figures from finished runs."""

from .collect import ReportError
from .write import write_report

__all__ = ["ReportError", "write_report"]
