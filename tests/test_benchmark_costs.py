"""Tests of the benchmarks' cost tables: every measured method has a row with a description and its ratios."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RECORDED = Path(__file__).with_name("recorded_benchmarks.json")


pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def module_at(path: Path) -> Any:
    """Import a module of benchmarks/ by its path, because a module in tests/ has the same name."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def costs_of(rows: list[dict[str, Any]]) -> str:
    """Return the cost tables, as Markdown."""
    text: str = importlib.import_module("costs").costs(rows)
    return text


def row(variant: str, seconds: float, peak: int, **more: Any) -> dict[str, Any]:
    """Return the recorded row of a timed step of XLM-R Large. ``seconds``: wall time; ``peak``: peak memory in MiB."""
    return {
        "case": "step/xlmr/plain/B16-m512-r64",
        "variant": variant,
        "question": "step",
        "model": "XLM-R Large",
        "stand_in": False,
        "shape": {"B": 16, "m": 512, "r": 64, "precision": "plain", "d": 1024},
        "status": "timed",
        "depth": 24,
        "dtype": "bfloat16",
        "target_tokens": 8192,
        "median_s": seconds / 2,
        "wall_median_s": seconds,
        "counters": {"peak_bytes": peak << 20, "saved_bytes": peak << 19},
        **more,
    }


def skipped(variant: str, reason: str) -> dict[str, Any]:
    """Return the recorded row of a method that was not run."""
    return {**row(variant, 0.0, 0), "status": "skipped", "reason": reason, "counters": {}}


STEP = [
    row("lora", 0.1, 100),
    row("input-fusion", 0.2, 400),
    row("flare", 0.12, 110),
    row("flare-warm", 0.25, 120),
]


def cells(text: str, name: str) -> list[str]:
    """Return the cells of the table line that begins with ``name``, without the first cell."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_table_of_a_case_has_times_memory_and_ratios() -> None:
    text = costs_of(STEP)
    assert "XLM-R Large: 24 blocks of width 1024, batch of 16, texts of 512 tokens, rank 64, bfloat16" in text
    assert cells(text, "method") == [
        *("ms", "tokens/s", "peak MiB", "saved MiB", "× input-level fusion", "× plain LoRA"),
    ]
    assert cells(text, "FLARE, this package") == ["120", "68,267", "110", "55.0", "0.60", "1.20"]
    assert cells(text, "plain LoRA") == ["100", "81,920", "100", "50.0", "0.50", "1.00"]
    assert (
        "FLARE takes 40 % less time and 72 % less peak memory than input-level fusion; with cached source states "
        "25 % more time." in text.replace("\n", " ")
    ), "the text must say where FLARE is slower, too"
    assert not re.search(r"flare-|input-fusion|lora\b", text), "rows show descriptions and not the methods' names"


def test_columns_are_aligned_and_no_line_of_prose_is_long() -> None:
    tables = [block for block in costs_of(STEP).split("\n\n") if block.startswith("|")]
    assert tables and all(len({len(line) for line in table.splitlines()}) == 1 for table in tables)
    prose = [line for line in costs_of(STEP).splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 120


def test_device_busy_time_has_a_column_if_it_was_measured() -> None:
    busy = row("flare", 0.12, 110)
    busy["counters"]["device_busy_s"] = 0.0386
    text = costs_of([STEP[0], busy])
    assert cells(text, "FLARE, this package")[2] == "38.6" and cells(text, "plain LoRA")[2] == "-"
    assert "× input-level fusion" not in text, "the ratio needs a row of input-level fusion"


def test_rows_that_did_not_run_are_listed_with_their_reason() -> None:
    rows = [
        *STEP,
        skipped("flare-captured", "CUDA graphs need a CUDA device"),
        skipped("flare-offload", "stored there already: see the row flare"),
        {**row("authors", 0.0, 0), "status": "failed", "reason": "out of memory"},
    ]
    text = costs_of(rows)
    assert "- FLARE, this package, as a CUDA graph: CUDA graphs need a CUDA device" in text
    assert "- FLARE, source states in host memory: stored there already: see FLARE, this package" in text
    assert "- FLARE as its authors run it: failed, out of memory" in text


def test_every_row_with_costs_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "plot.py", RECORDED], capture_output=True, text=True, check=True, cwd=BENCHMARKS
    )
    recorded = importlib.import_module("results").load(RECORDED)["cases"]
    assert done.stdout.strip() == costs_of(recorded)
    name_of = importlib.import_module("costs").name_of
    shown = [case for case in recorded if case["question"] in importlib.import_module("costs")._COSTS]
    assert {case["question"] for case in shown} >= {"step", "projection"}
    for case in shown:
        assert name_of(case) != case["variant"], "the row has a description"
        assert name_of(case) in done.stdout.replace("\n  ", " ")


def test_every_method_has_a_description(monkeypatch: pytest.MonkeyPatch) -> None:
    names = importlib.import_module("costs")
    models, projection = importlib.import_module("models"), importlib.import_module("test_projection")
    fast, generation = importlib.import_module("fast_steps"), module_at(BENCHMARKS / "test_decoding.py")
    methods = {*models.METHODS, *fast.CAPTURED, *fast.COMPILED}
    rows = [("step", method) for method in methods] + [("projection", method) for method in projection.VARIANTS]
    rows += [("generate", provider.name) for provider in generation.PROVIDERS]
    for question, variant in rows:
        assert names.name_of({"question": question, "variant": variant}) != variant, variant
