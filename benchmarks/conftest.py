"""Fixtures and options of all benchmarks: which cases run, how a case is measured, and where its rows are written.

A case is one question (such as the cost of a training step) at one shape. It has several variants (ways to compute it),
and each variant is a test. The first test of a case builds, checks, counts and times all variants. The other tests only
report the row (the results) of their variant. `--results FILE` saves the rows.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import results
import shapes
import sweep
import tables
import timing
import torch
from cases import Measured, Variants, failed, measure
from costs import costs

os.environ.setdefault("HF_HUB_OFFLINE", "1")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_CLOCK = timing.Replay()
_recorder = results.Recorder(None)
_last: Measured | None = None
_ceilings: timing.Ceilings | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flare benchmarks")
    group.addoption("--results", type=Path, help="save the rows of this run in a JSON file, written after every case")
    group.addoption("--part", type=int, help="run only this part of the grid (see benchmarks/sweep.py)")


def pytest_configure(config: pytest.Config) -> None:
    _recorder.path = config.getoption("--results")
    if config.getoption("--part") is not None:
        _recorder.resume()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Set the timer of each benchmark. With --part, deselect cases of other parts and skip cases that have results."""
    part = config.getoption("--part")
    part_cases = None if part is None else sweep.cases_of(part)
    finished = set() if part is None else results.finished_cases(sweep.result_folders())
    selected = []
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):  # `pytest tests benchmarks` collects the tests too
            selected.append(item)
            continue
        item.add_marker(pytest.mark.benchmark(timer=_CLOCK))
        case = getattr(getattr(item, "callspec", None), "params", {}).get("shape")
        if case is not None and part_cases is not None and case.case not in part_cases:
            continue
        if case is not None and case.case in finished:
            item.add_marker(pytest.mark.skip(reason="this case already has results of the current source code"))
        selected.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


@pytest.fixture
def device() -> torch.device:
    """Return the device of the benchmarks: the GPU if there is one, otherwise the CPU."""
    return DEVICE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ceilings() -> timing.Ceilings:
    """Return the copy bandwidth and the matrix-product rate of the device, which are measured once per run."""
    global _ceilings
    if _ceilings is None:
        _ceilings = timing.ceilings(DEVICE)
        _recorder.run = results.run_conditions(grid=shapes.grid(), ceilings=asdict(_ceilings))
    return _ceilings


@pytest.fixture
def compare(benchmark: Any, ceilings: timing.Ceilings) -> Callable[..., None]:
    """Return a function that measures a case once and reports one of its variants to pytest-benchmark.

    The function takes the shape, the variant's name, ``build`` (called once to make the variants), the conditions (one
    line for the row), ``queue_ahead`` (see timing.py; False for calls that synchronise with the device) and ``how``
    (how long to measure; None: the default of timing.py).
    """

    def run(
        shape: shapes.Shape,
        variant: str,
        build: Callable[[], Variants],
        conditions: str,
        *,
        queue_ahead: bool = True,
        how: timing.Effort | None = None,
    ) -> None:
        global _last
        if _last is None or _last.case != shape.case:
            _last = None
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
            try:
                _last = measure(shape, build, conditions, queue_ahead, how, DEVICE)
            except Exception as error:  # building or timing failed, and every variant reports this error
                _last = failed(shape, variant, conditions, error)
            gc.collect()
            _recorder.add(_last.rows.values())
        row = _last.rows.get(variant) or next(iter(_last.rows.values()))
        benchmark.group = shape.case
        benchmark.extra_info.update({key: row[key] for key in row if key not in ("case", "variant")})
        if row["status"] == "skipped":
            pytest.skip(row["reason"])
        if row["status"] != "timed":
            pytest.fail(f"{variant} was not timed: {row['reason']}", pytrace=False)
        durations = _last.samples[variant].device_s
        _CLOCK.load(durations)
        benchmark.pedantic(lambda: None, rounds=len(durations), iterations=1, warmup_rounds=0)

    return run


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the work of the host in a step, then what each method costs."""
    host = [row for row in _recorder.cases if row["question"] == "host"]
    if host:
        terminalreporter.section("host time")
        terminalreporter.write_line(tables.section("host", host))
    summary = costs(_recorder.cases)
    if summary:
        terminalreporter.section("what each method costs")
        terminalreporter.write_line(summary)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Add device, versions, commit and date to the results, and remove the name of the machine."""
    machine_info.pop("node", None)
    machine_info.update(results.run_conditions())
