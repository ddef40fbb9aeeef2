"""Make tables of what each method costs.

Every measured case (a question at one shape, see cases.py) of the questions in `_COSTS` has one table with a
description of each method. If FLARE and input-level fusion were both timed, a sentence below the table compares them.
`pytest benchmarks/` prints the tables, and table.md contains them. They are Markdown with aligned columns.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
_FAILED = ("failed", "wrong")
_MIB = 2**20

#: From the name of a variant to a description for readers who do not know the code. The part before a parenthesis is
#: the short label in figures.
NAMES = {
    "frozen": "frozen model (no adapter)",
    "no-adapters": "frozen model (no adapter)",
    "peft-lora": "plain LoRA, PEFT's own layers",
    "lora": "plain LoRA",
    "input-fusion": "input-level fusion (both texts concatenated)",
    "authors": "FLARE as its authors run it",
    "eager-sdpa": "FLARE on PEFT's layers, fused attention",
    "flare": "FLARE, this package",
    "flare-offload": "FLARE, source states in host memory",
    "flare-recompute": "FLARE, source states recomputed",
    "flare-warm": "FLARE with cached source states",
    "flare-offset0": "FLARE, source states a block earlier",
    "flare-shared": "FLARE, both texts in one pass",
}
#: Descriptions of the variants of the question "projection": the q and v projections of one block with FLARE adapters.
PROJECTIONS = {
    "frozen": "frozen products alone",
    "peft-bf16": "on PEFT's layers, bf16 adapters",
    "peft-bf16-dropout": "on PEFT's layers, bf16 adapters, dropout 0.1",
    "peft-fp32-autocast": "on PEFT's layers, float32 adapters, autocast (PEFT's default)",
    "peft-bf16-compile": "on PEFT's layers, bf16 adapters, torch.compile",
    "addmm-separate": "plain PyTorch (addmm), each projection alone",
    "addmm-joint": "plain PyTorch (addmm), q and v together",
    "flare-separate": "this package, each projection alone",
    "flare-joint": "this package, q and v together",
    "flare-frozen-first": "this package, frozen products first",
    "flare-adapter-first": "this package, adapters first",
    "flare-joint-dropout": "this package, dropout 0.1",
    "flare-joint-fp32-autocast": "this package, float32 adapters, autocast",
    "flare-adapter-only": "this package, adapters without the frozen products",
}
#: From a suffix of a variant's name to what the suffix adds to the description.
_ENDINGS = {"-captured": "as a CUDA graph", "-compiled": "under torch.compile", "-liger": "over Liger's kernels"}


def name_of(row: Row) -> str:
    """Return the description of a row's variant, or the variant's name if it has no description."""
    variant: str = row["variant"]
    if row["question"] == "projection":
        return PROJECTIONS.get(variant, variant)
    for ending, added in _ENDINGS.items():
        plain = variant.removesuffix(ending)
        plain = {"peft": "peft-lora"}.get(plain, plain)
        if variant.endswith(ending) and plain in NAMES:
            return f"{label(plain)}, {added}"
    return NAMES.get(variant, variant)


def label(variant: str) -> str:
    """Return the short description of a method, for a figure."""
    return NAMES.get(variant, variant).partition(" (")[0]


#: Title and explanation of the questions that compare methods between which a user chooses. The most important
#: questions are printed last, so that they stay on the screen.
_COSTS = {
    "projection": (
        "The query and value projections of one block with FLARE adapters",
        "Forward and backward, frozen products included (but not in adapters without the frozen products). ms: device "
        "time; peak: memory beyond the inputs.",
    ),
    "generate": (
        "Generating text",
        "Whole calls of generate, prompt included. peak: memory beyond the model.",
    ),
    "block": ("One transformer block", "Forward and backward of a model of one block."),
    "step": ("A training step", "Forward, backward and optimizer step."),
    "scaling": ("A training step as texts, batch, rank and depth change", "Forward, backward and optimizer step."),
}
_OF_A_STEP = (
    "ms: wall time; tokens/s: tokens of the target text; peak: peak memory, weights included; saved: what the forward "
    "pass saves for the backward pass. Ratios are of times."
)
_ON_A_CPU = (
    "Small random models. The Triton kernels do not run on a CPU: FLARE and plain LoRA use this package's PyTorch "
    "path. Memory is exact; the milliseconds hold for this machine only."
)


def costs(rows: list[Row]) -> str:
    """Return the tables as Markdown, or an empty string if no row belongs in them."""
    parts = []
    for question, (title, text) in _COSTS.items():
        question_rows = [row for row in rows if row["question"] == question]
        if not question_rows:
            continue
        trains = question in ("block", "step", "scaling")
        parts += [f"## {title}", f"{text} {_OF_A_STEP}" if trains else text]
        for case in dict.fromkeys(row["case"] for row in question_rows):
            parts += _of_case([row for row in question_rows if row["case"] == case])
        parts += _not_run(question_rows)
    if parts and any(row["stand_in"] for row in rows):
        parts.insert(0, _ON_A_CPU)
    return "\n\n".join(part if part.startswith("|") else _wrapped(part) for part in parts)


def _wrapped(text: str) -> str:
    hanging = {"- ": "  "}
    return "\n".join(
        textwrap.fill(line, 120, subsequent_indent=hanging.get(line[:2], "")) for line in text.splitlines()
    )


def _of_case(rows: list[Row]) -> list[str]:
    """Return title, table, failures and comparison of one case, or an empty list if all its rows were skipped."""
    timed = [row for row in rows if row["status"] == "timed"]
    failed = [f"- {name_of(row)}: {row['status']}, {row['reason']}" for row in rows if row["status"] in _FAILED]
    if not timed and not failed:
        return []
    parts = [f"**{_title(timed[0] if timed else rows[0])}**"]
    if timed:
        columns = _columns(timed)
        body = [[name_of(row), *(cell(row) for _, cell in columns)] for row in timed]
        head = "computation" if timed[0]["question"] == "projection" else "method"
        parts.append(aligned([head, *(name for name, _ in columns)], body))
    return [*parts, *(["\n".join(failed)] if failed else []), *_comparison(timed)]


def _not_run(rows: list[Row]) -> list[str]:
    """Return a list of one text, which names the skipped rows of each reason; an empty list if none was skipped."""
    skipped = [row for row in rows if row["status"] == "skipped"]
    names_by_reason: dict[str, list[str]] = {}
    for row in skipped:
        alone = all(other["status"] == "skipped" for other in rows if other["case"] == row["case"])
        name = _title(row) if alone else name_of(row)
        reason = re.sub(r"see the row (\S+)", lambda match: f"see {label(match[1])}", row["reason"])
        if name not in names_by_reason.setdefault(reason, []):
            names_by_reason[reason].append(name)
    lines = [f"- {'; '.join(names)}: {reason}" for reason, names in names_by_reason.items()]
    return ["\n".join(["Not run here:", *lines])] if lines else []


def _title(row: Row) -> str:
    """Return the title of a case: model and sizes."""
    shape = row["shape"]
    blocks = f"{row['depth']} block{'s' * (row['depth'] > 1)} of " if "depth" in row else ""
    parts = [f"{row['model']}: {blocks}width {shape['d']}"]
    if "M" in shape:
        parts.append(f"{shape['M']} tokens")
    else:
        texts = "prompts" if "new" in shape else "texts"
        parts.append(f"batch of {shape['B']}, {texts} of {shape['m']} tokens")
    parts += [f"{shape['new']} new tokens"] if "new" in shape else []
    parts += ["padded rows"] if shape.get("padded") else []
    parts += ["with the frozen key projection"] if shape.get("key") else []
    parts += [f"rank {shape['r']}"]
    parts += [f"{shape['precision']} weights"] if shape.get("precision", "plain") != "plain" else []
    parts += [row["dtype"]] if "dtype" in row else []
    return ", ".join(parts)


def _columns(timed: list[Row]) -> list[Column]:
    """Return the columns of the table of one case.

    Columns of busy time and of ratios are left out if no row has the numbers that they need.
    """
    question = timed[0]["question"]
    by_name = {row["variant"]: row for row in timed}
    seconds_of = _device_seconds if question == "projection" else _wall_seconds
    columns: list[Column] = [("ms", lambda row: _digits(1e3 * seconds_of(row)))]
    if question != "projection":
        columns.append(("tokens/s", lambda row: _tokens_per_s(row)))
    if any("device_busy_s" in row.get("counters", {}) for row in timed):
        columns.append(("GPU busy ms", lambda row: _digits(_counter(row, "device_busy_s"), 1e-3)))
    peak = "peak_bytes_above_start" if question == "generate" else "peak_bytes"
    columns.append(("peak MiB", lambda row: _digits(_counter(row, peak), _MIB)))
    if question != "generate":
        columns.append(("saved MiB", lambda row: _digits(_counter(row, "saved_bytes"), _MIB)))
    against = {
        "projection": {"frozen": "× frozen products", "peft-bf16": "× PEFT's layers, bf16"},
        "generate": {"lora": "× plain LoRA"},
    }
    usual = {"input-fusion": "× input-level fusion", "lora": "× plain LoRA"}
    for variant, name in against.get(question, usual).items():
        if variant in by_name:
            base = seconds_of(by_name[variant])
            columns.append((name, lambda row, base=base: f"{seconds_of(row) / base:.2f}"))  # type: ignore[misc]
    return columns


def _comparison(timed: list[Row]) -> list[str]:
    """Return a sentence that compares FLARE with input-level fusion, if both were timed."""
    by_name = {row["variant"]: row for row in timed}
    if not {"flare", "input-fusion"} <= set(by_name):
        return []
    ours, theirs = by_name["flare"], by_name["input-fusion"]
    time = _less(_wall_seconds(ours) / _wall_seconds(theirs), "time")
    memory = _less(ours["counters"]["peak_bytes"] / theirs["counters"]["peak_bytes"], "peak memory")
    sentence = f"FLARE takes {time} and {memory} than input-level fusion"
    if "flare-warm" in by_name:
        sentence += (
            f"; with cached source states {_less(_wall_seconds(by_name['flare-warm']) / _wall_seconds(theirs), 'time')}"
        )
    return [f"{sentence}."]


def _less(ratio: float, what: str) -> str:
    return f"{100 * abs(1 - ratio):.0f} % {'less' if ratio <= 1 else 'more'} {what}"


def _wall_seconds(row: Row) -> float:
    return float(row["wall_median_s"])


def _device_seconds(row: Row) -> float:
    return float(row["median_s"])


def _tokens_per_s(row: Row) -> str:
    return f"{row['target_tokens'] / _wall_seconds(row):,.0f}" if "target_tokens" in row else "-"


def _digits(value: float | None, unit: float = 1.0) -> str:
    """Format ``value / unit`` without an exponent: all digits before the decimal point, and up to two after it.

    Numbers from 1 to 1000 thus have three significant digits.
    """
    if value is None:
        return "-"
    value /= unit
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{decimals}f}"


def aligned(head: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table. Columns are as wide as their widest cell; all except the first are right-aligned."""
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    return "\n".join(line(cells) for cells in [head, rule, *body])


def _counter(row: Row, name: str) -> float | None:
    value: float | None = row.get("counters", {}).get(name)
    return value
