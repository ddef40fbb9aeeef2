"""Tests of the benchmarks' tools: timing, checks of results, byte counts, result files, summary, table and figures."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_modules import KEYS, ROOT, module, run

RECORDED = Path(__file__).with_name("recorded_benchmarks.json")


pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


@pytest.fixture
def recorded() -> dict[str, Any]:
    """Return the recorded results of a CPU run, with a few rows."""
    result: dict[str, Any] = module("results").load(RECORDED)
    return result


def as_on_a_gpu(result: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of results that is marked as measured on a GPU with real sizes, so that targets are judged."""
    result = copy.deepcopy(result)
    result["run"]["device"] = "a GPU"
    for row in result["cases"]:
        row["stand_in"] = False
    return result


# --- rotating inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("set_bytes", "cache"), [(1, 50 << 20), (3 << 20, 50 << 20), (40 << 20, 60 << 20), (1 << 30, 60 << 20)]
)
def test_the_sets_between_two_uses_fill_twice_the_cache(set_bytes: int, cache: int) -> None:
    """A set is one copy of a call's inputs. Between two uses of a set, the other sets fill the cache twice.

    If that takes more than `_MOST_COPIES` sets, there are `_MOST_COPIES`.
    """
    timing = module("timing")
    copies = timing.copies_for(set_bytes, cache)
    assert copies >= 2
    assert (copies - 1) * set_bytes >= 2 * cache or copies == timing._MOST_COPIES


def test_rotation_uses_every_set_before_it_repeats_one(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = module("timing")
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 4096)
    rotation = timing.Rotation(lambda: {"x": torch.randn(256), "views": [torch.randn(256)]}, torch.device("cpu"))
    assert len(rotation.sets) == 5, "2 KiB per set, 8 KiB between two uses"
    seen = [id(rotation.next()) for _ in range(10)]
    assert len(set(seen[:5])) == 5 and seen[:5] == seen[5:]
    storages = {each["x"].untyped_storage().data_ptr() for each in rotation.sets}
    assert len(storages) == 5


def test_bytes_of_counts_a_storage_once() -> None:
    x = torch.randn(256)
    assert module("timing").bytes_of({"x": x, "again": [x.view(16, 16), x[3:]], "other": 1}) == 1024


def test_variants_are_timed_in_turn() -> None:
    timing = module("timing")
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    how = timing.Effort(budget_s=0.0, least=3, most=3, warmup=1)
    samples = timing.interleave(calls, torch.device("cpu"), how=how)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(one.device_s) == 3 for one in samples.values())


def test_the_timer_replays_the_measured_durations() -> None:
    clock = module("timing").Replay()
    clock.load([0.5, 0.25])
    readings = [clock() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [0.5, 0.25]


def test_ratios_of_variants_are_taken_round_by_round() -> None:
    samples = module("timing").Samples
    fast, slow = samples((1.0, 2.0, 9.0), (0.0,) * 3, "a clock"), samples((2.0, 4.0, 9.0), (0.0,) * 3, "a clock")
    assert slow.over(fast) == 2.0


def test_overlapping_kernels_count_once_in_busy_time() -> None:
    covered = module("timing").covered
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75)]) == 4.0 and covered([]) == 0.0


# --- checks -----------------------------------------------------------------------------------------------------------


def wrong(y: torch.Tensor, how: str) -> torch.Tensor | None:
    """Return a copy of y with the error that ``how`` names; None for "missing"."""
    y = y.clone()
    if how == "scaled":
        return y * 1.1
    if how == "one element":
        y[3, 5] += 0.2 * y.abs().max()
    elif how == "unwritten":
        y[-1, -1] = float("nan")
    elif how == "shape":
        return y[:-1]
    return None if how == "missing" else y


@pytest.mark.parametrize("how", ["scaled", "one element", "unwritten", "shape", "missing"])
def test_wrong_results_are_refused(how: str) -> None:
    gate = module("gate")
    truth = torch.randn(64, 64, dtype=torch.float64)
    plain = truth.to(torch.bfloat16)
    gate.require_correct({"y": plain}, {"y": truth}, {"y": plain}, dtype=torch.bfloat16)
    with pytest.raises(gate.WrongResult, match="y"):
        gate.require_correct({"y": wrong(plain, how)}, {"y": truth}, {"y": plain}, dtype=torch.bfloat16)


def test_poisoned_memory_is_nan() -> None:
    gate = module("gate")
    with gate.poisoned():
        empty, like, integers = torch.empty(4), torch.empty_like(torch.ones(3)), torch.empty(2, dtype=torch.int64)
    assert empty.isnan().all() and like.isnan().all() and not integers.is_floating_point()
    assert torch.zeros(2).sum() == 0


def test_a_wrong_kernel_fails_its_benchmark_and_is_not_timed(tmp_path: Path) -> None:
    """If torch_ops.grad_weight gives a dA that is a tenth too large, its row is "wrong" and has no time."""
    (tmp_path / "breaks.py").write_text(
        "import flare_kernels.torch_ops as ops\n"
        "right = ops.grad_weight\n"
        "ops.grad_weight = lambda *a, **k: right(*a, **k) * 1.1\n"
    )
    done = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "breaks", "-p", "no:cacheprovider", "benchmarks/test_kernels.py"),
        *("-k", "xlmr-q and (grad_weight or grad_input) and peer", "--results", str(tmp_path / "r.json")),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
        FLARE_BENCH_GRID="tiny",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {
        row["case"].split("/")[2]: row
        for row in module("results").load(tmp_path / "r.json")["cases"]
        if row["variant"] == "peer"
    }
    assert rows["grad_weight"]["status"] == "wrong" and "median_s" not in rows["grad_weight"]
    assert "dA" in rows["grad_weight"]["reason"]
    assert rows["grad_input"]["status"] == "timed", "other rows are still timed"


def test_a_case_that_cannot_be_built_is_tried_once_and_reported(tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(
        "import sys\n"
        "def pytest_collection_finish(session):\n"
        "    def fails(*a):\n"
        "        print('BUILT')\n"
        "        raise RuntimeError('no such luck')\n"
        "    sys.modules['test_kernels'].variants = fails\n"
    )
    done = run(
        *(sys.executable, "-m", "pytest", "-q", "-s", "-p", "breaks", "-p", "no:cacheprovider"),
        *("benchmarks/test_kernels.py", "-k", "xlmr-q/shrink", "--results", str(tmp_path / "r.json")),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
        FLARE_BENCH_GRID="tiny",
    )
    assert done.returncode == 1 and done.stdout.count("BUILT") == 1, done.stdout + done.stderr
    (row,) = module("results").load(tmp_path / "r.json")["cases"]
    assert row["status"] == "failed" and "no such luck" in row["reason"]


@pytest.mark.parametrize(("model", "megabytes"), [("LLAMA", 139.5 + 172.6 + 93.6 + 140.5 + 137.4), ("XLMR", 226.3)])
def test_the_adapters_floor_is_the_sum_of_its_steps(model: str, megabytes: float) -> None:
    """The floor is the least number of bytes that the adapters must read and write.

    The expected sums are computed by hand for M = 8192, r = 64, bf16: down-projection, up-projection, gradients of the
    bottleneck, dA, and dx added to the frozen layers' dx.
    """
    shapes = module("shapes")
    shape = shapes.ProjectionShape(getattr(shapes, model), 8192, 64)
    floor = module("bytes_moved").adapter_bytes
    assert floor(shape, accumulate_dx=True) / 1e6 == pytest.approx(megabytes, rel=2e-3)
    assert floor(shape, accumulate_dx=True) - floor(shape, accumulate_dx=False) == 2 * 8192 * shape.model.d


def test_adapters_that_run_first_move_a_fifth_fewer_bytes() -> None:
    """Adapters that run after the frozen layers must also read the frozen layers' results, in forward and backward.

    The numbers are for Llama 8B, M = 8192, r = 64, bf16.
    """
    shapes, bytes_moved = module("shapes"), module("bytes_moved")
    shape = shapes.ProjectionShape(shapes.LLAMA, 8192, 64)
    steps = {order: bytes_moved.step_bytes(shape, order) for order in bytes_moved.ORDERS}
    total = {order: sum(step_bytes.values()) for order, step_bytes in steps.items()}
    assert total["frozen_first"] == bytes_moved.adapter_bytes(shape, accumulate_dx=True)
    assert total["frozen_first"] / 1e6 == pytest.approx(684, abs=1)
    assert total["adapter_first"] <= 0.8 * total["frozen_first"]
    assert total["adapter_first"] / 1e6 == pytest.approx(533.2, abs=0.1)
    moved = bytes_moved.moved_reads(shape)
    assert len(moved) == 3 and sum(moved.values()) == 2 * 8192 * (4096 + 1024 + 4096)  # 151 MB
    assert total["frozen_first"] - total["adapter_first"] == sum(moved.values())
    assert {step for step in steps["frozen_first"] if steps["frozen_first"][step] != steps["adapter_first"][step]} == {
        "expand",
        "grad_input",
    }
    with pytest.raises(ValueError, match="not one of frozen_first"):
        bytes_moved.step_bytes(shape, "adapters first")


# --- result files -----------------------------------------------------------------------------------------------------


def test_result_files_are_complete_after_every_case(tmp_path: Path, recorded: dict[str, Any]) -> None:
    results = module("results")
    recorder = results.Recorder(tmp_path / "folder" / "r.json")
    recorder.run = recorded["run"]
    for row in recorded["cases"][:3]:
        recorder.add([row])
        assert results.load(recorder.path)["cases"][-1] == row
    recorder.add([{**recorded["cases"][0], "median_s": 1.0}])
    assert len(results.load(recorder.path)["cases"]) == 3, "a case measured again replaces its rows"
    assert [path.name for path in recorder.path.parent.iterdir()] == ["r.json"]


def test_only_finished_cases_measured_with_the_same_code_are_skipped(tmp_path: Path) -> None:
    results = module("results")
    rows = [
        {"case": "a", "variant": "x", "status": "timed"},
        {"case": "a", "variant": "y", "status": "skipped"},
        {"case": "b", "variant": "x", "status": "timed"},
        {"case": "b", "variant": "y", "status": "failed"},
    ]
    for name, sources in (("same", results.fingerprint()), ("other", "0" * 12)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "r.json").write_text(results.dumps({"schema": 1, "run": {"sources": sources}, "cases": rows}))
        (folder / "other.json").write_text("[]")
    assert results.finished_cases([tmp_path / "same", tmp_path / "none"]) == {"a"}
    assert results.finished_cases([tmp_path / "other"]) == set()


def test_the_fingerprint_of_the_code_sees_a_changed_kernel(tmp_path: Path) -> None:
    results = module("results")
    for path in ("flare_kernels/a.py", "flare/b.py", "benchmarks/c.py", "benchmarks/plot.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("1")
    before = results.fingerprint(tmp_path)
    (tmp_path / "benchmarks/plot.py").write_text("2")
    assert results.fingerprint(tmp_path) == before
    (tmp_path / "flare_kernels/a.py").write_text("2")
    assert results.fingerprint(tmp_path) != before


def test_parts_of_a_sweep_hold_every_case_once_and_are_balanced() -> None:
    sweep = module("sweep")
    for which in ("main", "full"):
        parts = sweep.parts(which)
        names = [name for part in parts for name in part]
        cases = {shape.case: shape.estimate_s for shape in sweep.all_cases(which)}
        assert len(names) == len(set(names)) and set(names) == set(cases)
        loads = [sum(cases[name] for name in part) for part in parts]
        assert max(loads) < 500 and max(loads) - min(loads) <= max(cases.values())


def test_a_part_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLARE_BENCH_GRID", "tiny")
    with pytest.raises(ValueError, match="parts 1 to"):
        module("sweep").cases_of(99)


# --- summary ----------------------------------------------------------------------------------------------------------


def rows_of(result: dict[str, Any], question: str) -> dict[str, dict[str, Any]]:
    """Return a dictionary variant -> row, for the headline rows of XLM-R in one group of benchmarks ("question")."""
    rows = [r for r in result["cases"] if r["question"] == question and r["family"] == "xlmr" and r["headline"]]
    return {r["variant"]: r for r in rows}


def test_the_summary_has_every_key_and_its_numbers_are_the_rows_ratios(recorded: dict[str, Any]) -> None:
    summary = module("summary").summarise([recorded])
    assert set(summary) >= KEYS | {"device", "versions", "commit", "date", "conditions", "targets"}
    projection, step = rows_of(recorded, "projection"), rows_of(recorded, "step")
    joint = projection["flare-joint"]
    expected = {
        "adapter_over_floor": (joint["median_s"] - projection["frozen"]["median_s"]) / joint["adapter_floor_s"],
        "qv_speedup_vs_peft_bf16": projection["peft-bf16"]["median_s"] / joint["median_s"],
        "qv_speedup_vs_peft_dropout": projection["peft-bf16-dropout"]["median_s"]
        / projection["flare-joint-dropout"]["median_s"],
        "step_vs_input_fusion": step["flare"]["median_s"] / step["input-fusion"]["median_s"],
        "step_speedup_vs_authors": step["authors"]["median_s"] / step["flare"]["median_s"],
        "forward_transient_vs_eager": joint["counters"]["transient_bytes"]
        / projection["peft-bf16"]["counters"]["transient_bytes"],
    }
    for name, value in expected.items():
        assert summary[name]["xlmr"] == pytest.approx(value, rel=1e-3), name
    assert all(summary[name]["llama"] is None for name in KEYS), "no such rows were recorded"


def test_a_cpus_numbers_are_not_judged(recorded: dict[str, Any]) -> None:
    summary = module("summary").summarise([recorded])
    assert not summary["judged"] and summary["note"]
    assert {verdict["met"] for key in summary["targets"].values() for verdict in key.values()} == {None}


def test_targets_are_judged_on_both_sides_of_their_limits(recorded: dict[str, Any]) -> None:
    result = as_on_a_gpu(recorded)
    projection = rows_of(result, "projection")
    for median, met in ((1.61, True), (1.59, False)):
        projection["flare-joint"]["median_s"], projection["peft-bf16"]["median_s"] = 1.0, median
        summary = module("summary").summarise([result])
        assert summary["targets"]["qv_speedup_vs_peft_bf16"]["xlmr"] == {"target": ">= 1.6", "met": met}
        assert summary["targets"]["qv_speedup_vs_peft_bf16"]["llama"]["met"] is None
    for above, met in ((1.29, True), (1.31, False)):
        floor = projection["flare-joint"]["adapter_floor_s"]
        projection["frozen"]["median_s"] = 1.0 - above * floor
        summary = module("summary").summarise([result])
        assert summary["targets"]["adapter_over_floor"]["xlmr"] == {"target": "<= 1.3", "met": met}


def test_the_summary_refuses_rows_of_different_runs(recorded: dict[str, Any]) -> None:
    other = copy.deepcopy(recorded)
    other["run"]["sources"] = "0" * 12
    with pytest.raises(ValueError, match="sources"):
        module("summary").summarise([recorded, other])
    with pytest.raises(ValueError, match="no result files"):
        module("summary").summarise([])


def test_a_row_that_was_not_timed_gives_no_number(recorded: dict[str, Any]) -> None:
    rows_of(recorded, "projection")["flare-joint"]["status"] = "wrong"
    summary = module("summary").summarise([recorded])
    assert summary["qv_speedup_vs_peft_bf16"]["xlmr"] is None


# --- table and figures ------------------------------------------------------------------------------------------------


def test_table_has_every_row_and_figures_are_drawn(tmp_path: Path, recorded: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    written = module("plot").draw_all([recorded], tmp_path)
    assert [path.name for path in written] == ["table.md", "steps.png", "scaling.png", "roofline.png", "parts.png"]
    assert all(path.stat().st_size > 10_000 for path in written[1:])
    text = written[0].read_text()
    run_ = recorded["run"]
    for part in ("CPU", run_["versions"]["torch"], run_["commit"], run_["date"][:10], "stand-ins"):
        assert part in text
    assert text.count("| ") > 0
    for row in recorded["cases"]:
        assert row["conditions"] in text
        if row["status"] != "timed":
            assert f"{row['status']}: {row['reason']}" in text, "the table says why a row was not timed"
        else:
            assert f"| {row['case'].partition('/')[2]} | {row['variant']} |" in text


def test_rows_where_the_package_is_slower_are_shown(tmp_path: Path, recorded: dict[str, Any]) -> None:
    projection = rows_of(recorded, "projection")
    projection["peft-bf16"]["median_s"] = projection["flare-joint"]["median_s"] / 2
    text = module("tables").table(recorded["run"], recorded["cases"])
    line = next(line for line in text.splitlines() if "| peft-bf16 |" in line)
    assert "| 0.50 |" in line


@pytest.mark.parametrize(("value", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (3e-9, "3 ns")])
def test_durations_are_formatted_with_a_unit(value: float, text: str) -> None:
    assert module("tables").seconds(value) == text
