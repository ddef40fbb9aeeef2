"""Make tables of all rows (results of variants, see cases.py), and format durations, sizes and conditions.

The column "floor" has the least time in which the bytes of a case can be moved. "theory" has the expected time, divided
by the expected time of plain LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from costs import costs

Row = dict[str, Any]


def seconds(value: float) -> str:
    """Format a duration with a suitable unit and three significant digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def size(value: float | None) -> str:
    """Format a number of bytes with a suitable unit."""
    if value is None:
        return "-"
    for unit, least in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= least:
            return f"{value / least:.3g} {unit}"
    return f"{value:.0f} B"


def caption(run: dict[str, Any], conditions: Iterable[str] = ()) -> str:
    """Return device, versions, commit, date and conditions of a run as text."""
    device = (
        run["device"]
        if run["device"] != "cpu"
        else f"CPU ({run['cpu']}, {run['threads']} thread{'s' * (run['threads'] > 1)})"
    )
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton", "transformers", "peft"))
    text = "; ".join(dict.fromkeys(conditions))
    commit = run["commit"] or f"sources {run['sources']}"
    return f"{device}; {versions}; commit {commit}, {run['date'][:10]}." + (f" Conditions: {text}." if text else "")


# --- the table --------------------------------------------------------------------------------------------------------


def table(run: dict[str, Any], rows: list[Row]) -> str:
    """Return Markdown: first what each method costs, then all rows, with one section per question."""
    parts = [f"Measured on {caption(run)}"]
    if any(row["stand_in"] for row in rows):
        parts.append(
            "**Small stand-ins on a CPU**: FLOPs, bytes and launches are exact; seconds hold for this CPU only."
        )
    parts += ["# What each method costs", costs(rows), "# Every row"]
    for question, title in _TITLES.items():
        question_rows = [row for row in rows if row["question"] == question]
        if question_rows:
            parts += [f"## {title}", f"{question_rows[0]['conditions']}.", section(question, question_rows)]
    return "\n\n".join(parts) + "\n"


_TITLES = {
    "projection": "q and v projections",
    "kernels": "Kernels against their floors",
    "block": "One transformer block",
    "step": "A training step",
    "host": "What the host does in a step",
    "decode": "Adapters while decoding",
    "generate": "generate",
    "scaling": "How cost grows",
}


def _speed(row: Row, rows: list[Row]) -> str:
    """Return the time of a row divided by the time of this package's row of the same case."""
    ours = next((r for r in rows if r["case"] == row["case"] and r["variant"] in _OURS and "median_s" in r), None)
    return "-" if ours is None else f"{row['median_s'] / ours['median_s']:.2f}"


def _over(row: Row, rows: list[Row], variant: str, number: Callable[[Row], float | None]) -> str:
    """Return a number of a row divided by the same number of another variant of the same case."""
    other = next((r for r in rows if (r["case"], r["variant"]) == (row["case"], variant)), None)
    value, other_value = number(row), None if other is None else number(other)
    return f"{value / other_value:.2f}" if value and other_value else "-"


def _theory(row: Row, rows: list[Row]) -> str:
    """Return the expected time divided by the expected time of plain LoRA, both in the units of models.UNITS."""
    if "theory_units" not in row:
        return "-"
    return f"{row['theory_units'] / 2:g}" + (" and attention" if row["variant"] == "input-fusion" else "")


_OURS = ("flare-joint", "flare")
_COLUMNS: dict[str, list[tuple[str, Callable[[Row, list[Row]], str]]]] = {
    "time": [
        ("median", lambda row, rows: seconds(row["median_s"])),
        ("IQR", lambda row, rows: seconds(row["q75_s"] - row["q25_s"])),
        ("host clock", lambda row, rows: seconds(row["wall_median_s"])),
        ("× ours", _speed),
    ],
    "memory": [
        ("saved", lambda row, rows: size(_counter(row, "saved_bytes"))),
        ("transient", lambda row, rows: size(_counter(row, "transient_bytes"))),
        ("peak", lambda row, rows: size(_counter(row, "peak_bytes"))),
    ],
    "work": [
        ("launches", lambda row, rows: _count(row, "launches")),
        ("GFLOP", lambda row, rows: _giga(_counter(row, "flops"))),
    ],
    "floor": [
        ("floor", lambda row, rows: seconds(row["floor_s"]) if "floor_s" in row else "-"),
        ("× floor", lambda row, rows: f"{row['median_s'] / row['floor_s']:.2f}" if "floor_s" in row else "-"),
        ("transient", lambda row, rows: size(_counter(row, "transient_bytes"))),
        ("launches", lambda row, rows: _count(row, "launches")),
    ],
    "theory": [
        ("× LoRA", lambda row, rows: _over(row, rows, "lora", lambda r: r.get("median_s"))),
        ("theory", _theory),
        ("peak × LoRA", lambda row, rows: _over(row, rows, "lora", lambda r: _counter(r, "peak_bytes"))),
    ],
    "host": [
        ("median", lambda row, rows: seconds(row["median_s"])),
        ("× PEFT", lambda row, rows: f"{row['over_peft']:.2f}" if "over_peft" in row else "-"),
        ("calls/block", lambda row, rows: _count(row, "calls_per_block")),
        ("× PEFT", lambda row, rows: _over(row, rows, "peft", lambda r: _counter(r, "calls_per_block"))),
        ("kernels/block", lambda row, rows: _count(row, "kernels_per_block")),
        ("launches", lambda row, rows: _count(row, "launches")),
    ],
    "busy": [("wall / device-busy", lambda row, rows: _wall_over_busy(row))],
    "tokens": [("tokens/s", lambda row, rows: f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "-")],
    "blocks": [
        ("depth", lambda row, rows: str(row.get("depth", "-"))),
        ("block runs", lambda row, rows: _count(row, "block_executions")),
    ],
    "saved": [
        ("saved", lambda row, rows: size(_counter(row, "saved_bytes"))),
        ("peak", lambda row, rows: size(_counter(row, "peak_bytes"))),
    ],
}
_KINDS = {
    "projection": ("time", "memory", "work"),
    "kernels": ("time", "floor"),
    "block": ("time", "saved", "work", "blocks"),
    "step": ("time", "theory", "tokens", "saved", "work", "blocks", "busy"),
    "host": ("host", "busy"),
    "scaling": ("time", "theory", "tokens", "saved", "work", "blocks"),
    "decode": ("time", "floor"),
    "generate": ("time", "tokens"),
}


def _counter(row: Row, name: str) -> float | None:
    value: float | None = row.get("counters", {}).get(name)
    return value


def _wall_over_busy(row: Row) -> str:
    busy = _counter(row, "device_busy_s")
    return "-" if busy is None else f"{row['wall_median_s'] / busy:.2f}"


def _count(row: Row, name: str) -> str:
    value = _counter(row, name)
    return "-" if value is None else f"{value:.0f}"


def _giga(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.3g}"


def section(question: str, rows: list[Row]) -> str:
    """Return the rows of one question as a Markdown table."""
    columns = [column for kind in _KINDS[question] for column in _COLUMNS[kind]]
    lines = [
        "| case | row | " + " | ".join(name for name, _ in columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for row in _folded(rows):
        case = row["case"].partition("/")[2]
        if row["status"] != "timed":
            # the number of launches may be known although the variant did not run
            counted = [cell(row, rows) if name == "launches" else "" for name, cell in columns[1:]]
            cells = [f"{row['status']}: {row['reason']}", *("" if cell == "-" else cell for cell in counted)]
        else:
            cells = [cell(row, rows) for _, cell in columns]
        lines.append(f"| {case} | {row['variant']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _folded(rows: list[Row]) -> list[Row]:
    """Return the rows. Merge the rows of a case into one if none was timed and all have the same status and reason."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    folded = []
    for case_rows in by_case.values():
        reasons = {(row["status"], row.get("reason")) for row in case_rows}
        same = len(case_rows) > 1 and len(reasons) == 1 and case_rows[0]["status"] != "timed"
        folded += [{**case_rows[0], "variant": f"all {len(case_rows)}"}] if same else case_rows
    return folded
