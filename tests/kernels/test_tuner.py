"""Tests of the tuner: its timer (on a simulated device), its correctness check, and the launch table that it writes.

A problem is one step of the adapter at one size. A variant is a form (an implementation of the step) with its tiles.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from flare_kernels import function, launch_mode, torch_ops, tuning
from flare_kernels.launch_table import ROW_BOUNDS, LaunchTable, bucket
from flare_kernels.selection import BackendStatus
from flare_kernels.triton_ops import config
from flare_kernels.triton_ops import primitives as triton_ops
from flare_kernels.triton_ops.shared_memory import least_shared_bytes
from flare_kernels.tuning import search, timing
from flare_kernels.tuning.report import HEADER
from flare_kernels.tuning.variants import Variant, variants

ROOT = Path(__file__).parents[2]
SMALL = tuning.Shape("small", 48, (40, 24))
LARGE = 227 * 1024


# --- the timer --------------------------------------------------------------------------------------------------------


class Device:
    """Simulated host and stream. A launch takes host time. Its kernel then starts as soon as the stream is free."""

    def __init__(self) -> None:
        # in microseconds: the time on the host, and the time at which the stream has run all its kernels
        self.host = self.free = 0.0

    def launch(self, host_us: float, device_us: float) -> None:
        self.host += host_us
        self.free = max(self.free, self.host) + device_us

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def Event(self, enable_timing: bool) -> Device.Mark:
        return Device.Mark(self)

    class Mark:
        def __init__(self, device: Device) -> None:
            self.device = device

        def record(self) -> None:
            self.at = max(self.device.free, self.device.host)

        def query(self) -> bool:
            return self.device.host >= self.at

        def elapsed_time(self, end: Device.Mark) -> float:
            return (end.at - self.at) / 1000


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    monkeypatch.setattr(timing, "cuda", fake)
    monkeypatch.setattr(timing, "perf_counter", lambda: fake.host / 1e6)
    monkeypatch.setattr(timing, "sleep_on_device", lambda cycles: fake.launch(5.0, cycles / 2000))
    return fake


def test_the_timer_measures_the_kernel_and_not_the_launch(fake: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    timer, used_sets = timing.DeviceTimer(), []

    def run(inputs: dict[str, int]) -> None:
        used_sets.append(inputs["set"])
        fake.launch(35.0, 15.0)

    inputs = [{"set": i} for i in range(3)]
    assert timer(run, inputs, rounds=3) == pytest.approx(15.0)
    assert used_sets == [i % 3 for i in range(32)]  # the sets rotate
    assert timer(lambda t: fake.launch(35.0, 80.0), inputs, rounds=1) == pytest.approx(80.0)
    # without the sleep, the measured time is the host's
    monkeypatch.setattr(timing, "sleep_on_device", lambda cycles: None)
    monkeypatch.setattr(Device.Mark, "query", lambda self: False)
    assert timer(run, inputs, rounds=3) == pytest.approx(35.0, rel=0.1)


def test_the_timer_sleeps_as_long_as_the_host_needs(fake: Device) -> None:
    timer = timing.DeviceTimer()
    least = timer.cycles
    assert timer(lambda t: fake.launch(500.0, 15.0), [{}], rounds=2) == pytest.approx(15.0)
    assert timer.cycles == pytest.approx(2 * 5e-3 * 2e9, rel=0.01)  # twice 5 ms of launches
    assert timer(lambda t: fake.launch(5.0, 15.0), [{}], rounds=1) == pytest.approx(15.0)
    assert timer.cycles == least
    # a host that slows down with every call
    slower = itertools.count(1)
    with pytest.raises(RuntimeError, match="could not queue 10 calls"):
        timer(lambda t: fake.launch(1e3 * 2 ** next(slower), 15.0), [{}], rounds=1)


# --- problems ---------------------------------------------------------------------------------------------------------


def test_problems_yield_the_most_used_sizes_first_and_each_entry_once() -> None:
    problems = list(tuning.problems(tuning.SHAPES.values(), (8192, 2048, 512, 1, 16), (64, 8)))
    first = [(p.shape.name, p.M) for p in problems if p.r == 64 and p.shape.tier == 0]
    sizes = list(itertools.product((8192, 2048, 512, 1), ("llama-3.1-8b", "xlm-r-large")))
    assert list(dict.fromkeys(first)) == [(name, M) for M, name in sizes]  # 16 tokens share an entry with 1
    tiers = [(p.shape.tier, p.r != 64) for p in problems]
    assert tiers == sorted(tiers)
    assert len({p.key for p in problems}) == len(problems)
    assert all(p.key.rows == bucket(p.M, ROW_BOUNDS) for p in problems)
    assert {p.step for p in problems if p.M == 8192} == set(config.FORMS) - {"decode"}
    assert {p.step for p in problems if p.M == 1} == {"decode"}


def test_the_bytes_of_a_step_are_its_lower_bound() -> None:
    """For the shape of Llama, the bytes of each step equal a count by hand to within 0.1 MB.

    Each input is read once and each result is written once; y is an input and a result.
    """
    expected = {"shrink": 139.5, "expand": 172.6, "grad_bottleneck": 94.2, "grad_weight": 140.5, "grad_input": 70.3}
    for problem in tuning.problems([tuning.SHAPES["llama-3.1-8b"]], [8192], [64]):
        if problem.step in expected:
            inputs = problem.make(torch.device("meta"), real=False)
            moved = timing.nbytes(inputs.values()) + timing.nbytes(problem.run(torch_ops, inputs))
            assert moved / 1e6 == pytest.approx(expected[problem.step], abs=0.1), problem


def test_wrong_results_are_detected(device) -> None:
    """The tuner's check fails for results that are 5 % off, and for NaN."""
    for problem in tuning.problems([SMALL], [70], [8]):
        check = search.Check(problem, device)
        assert check(lambda t, p=problem: p.run(triton_ops, t)), problem
        assert check(lambda t, p=problem: p.run(triton_ops, t)), "the inputs must not change"
        assert not check(lambda t, p=problem: [result * 1.05 for result in p.run(torch_ops, t)]), problem
        assert not check(lambda t, p=problem: [result * torch.nan for result in p.run(torch_ops, t)])


def test_the_order_problem_runs_in_the_forced_order(monkeypatch, device) -> None:
    """The step "order" chooses whether the frozen products or the adapters run first. A variant forces one order."""
    (problem,) = [problem for problem in tuning.problems([SMALL], [70], [8]) if problem.step == "order"]
    orders: list[object] = []
    choose_order = function.choose_order
    monkeypatch.setattr(function, "choose_order", lambda *args: orders.append(choose_order(*args)) or orders[-1])
    check = search.Check(problem, device)
    run = functools.partial(problem.run, triton_ops.tuned)
    sizes = ((70, 40), (70, 24))
    for form, order in (("frozen_first", None), ("adapter_first", sizes)):
        orders.clear()
        with Variant(form).forced():
            assert check(run)
        assert orders == [order]


# --- variants ---------------------------------------------------------------------------------------------------------


def test_variants_are_all_supported_forms_with_tiles_that_fit(monkeypatch) -> None:
    forms = {"triton": ("grad_weight",), "new": ("grad_weight",), "two": ("shrink", "grad_weight"), "torch": ()}
    monkeypatch.setitem(config.FORMS, "grad_weight", forms)
    monkeypatch.setitem(config.SUPPORTED, ("grad_weight", "new"), lambda operands, capability: capability >= 90)
    grid = ((64,), (64, 128), (0,), (4,), (2, 4), (256,))
    monkeypatch.setattr(config, "_CANDIDATES", dict.fromkeys(config.KERNELS, grid))
    problems = tuning.problems([tuning.SHAPES["llama-3.1-8b"]], [8192], [64])
    (problem,) = [problem for problem in problems if problem.step == "grad_weight"]
    all_variants = list(variants(problem, LARGE, 90))
    assert list(dict.fromkeys(v.form for v in all_variants)) == list(forms)
    assert [v.by_rule for v in all_variants] == [True] + [False] * (len(all_variants) - 1)
    for variant in all_variants:
        for kernel, tiles in variant.tiles.items():
            by_rule = tiles == config.choose(kernel, problem.key.operands, problem.key.rank, LARGE)
            assert by_rule or least_shared_bytes(kernel, tiles) <= LARGE
    sizes = {
        (v.tiles["grad_weight"].BLOCK_K, v.tiles["grad_weight"].num_stages) for v in all_variants if v.form == "triton"
    }
    assert sizes >= {(64, 2), (64, 4), (128, 2)} and (128, 4) not in sizes
    # in a form of two kernels, the tiles of one kernel are varied at a time
    rule = next(v for v in all_variants if v.form == "two")
    assert all(sum(v.tiles[k] != rule.tiles[k] for k in rule.tiles) <= 1 for v in all_variants if v.form == "two")
    assert "new" not in {v.form for v in variants(problem, LARGE, 80)}
    with rule.forced():
        assert launch_mode.current.forced_form == "two" and launch_mode.current.forced == rule.tiles


def script(code: str) -> str:
    """Run code in a process that can compile kernels, and return its output."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler exists for Linux only")
def test_the_shared_memory_estimate_is_a_tight_lower_bound() -> None:
    """For tiles just below and just above the limit of sm_90, the estimate is 0.6 to 1.0 of the compiler's value."""
    printed = script(
        """
import json, torch
from flare_kernels import aot, tuning
from flare_kernels.launch_mode import forcing, recording
from flare_kernels.triton_ops import config, primitives
from flare_kernels.triton_ops.shared_memory import least_shared_bytes
limit, units = aot.SHARED_BYTES[90], {}
for problem in tuning.problems([tuning.SHAPES["llama-3.1-8b"]], [8192], [64]):
    inputs = problem.make(torch.device("cpu"), real=False)
    for form, kernels in config.FORMS[problem.step].items():
        for kernel in kernels:
            candidates = config.candidates(kernel, "narrow", problem.key.rank, limit)
            tiles = {least_shared_bytes(kernel, candidate): candidate for candidate in candidates}
            fit = sorted(size for size in tiles if 0 < size <= limit)
            for size in [*fit[-1:], *sorted(set(tiles) - set(fit) - {0})[:1]]:
                with forcing(form=form, **{kernel: tiles[size]}), recording(limit) as launches:
                    problem.run(primitives.tuned, inputs)
                for launch in launches:
                    if launch.config == tiles[size]:
                        units[aot.specialise(launch, 90)] = (kernel, size)
if __name__ == "__main__":
    for (kernel, size), result in zip(units.values(), aot.compile_units(units, 2)):
        print(json.dumps([kernel, size, result["shared"]]))
"""
    )
    rows = [json.loads(line) for line in printed.splitlines()]
    assert {kernel for kernel, *_ in rows} >= {"shrink", "expand", "grad_weight", "grad_input"}
    assert any(least > LARGE for _, least, _ in rows) and any(least <= LARGE for _, least, _ in rows)
    for kernel, least, shared in rows:
        assert 0.6 * shared <= least <= shared, (kernel, least, shared)


def test_kernels_compiled_ahead_have_the_specialisation_of_the_launches() -> None:
    """The compiler pool compiles each kernel once, with the specialisation of the launch."""
    printed = script(
        """
import torch
from flare_kernels import aot, tuning
from flare_kernels.tuning import compiling
from flare_kernels.triton_ops import config
config._CANDIDATES = dict.fromkeys(config.KERNELS, ((64,), (64,), (64,), (4,), (3,), (132,)))
compiling.capability = lambda device: 90
shape, device = tuning.Shape("small", 512, (512, 256)), torch.device("cpu")
problems = [p for p in tuning.problems([shape], [256, 2048], [64]) if p.step in ("shrink", "grad_input")]
units = {unit for p in problems for unit in compiling.units_of(p, device)}
with compiling.Compiler(device, 2) as compiler:
    print(compiler.submit(problems) == len(units), compiler.wait(problems[-1], 0.0))
    print(all(compiler.wait(p, float("inf")) for p in problems))
    print({future.result().get("error") for future in compiler._futures.values()})
print(*sorted({unit.kernel for unit in units}))
"""
    )
    assert printed.splitlines() == [
        "True False",
        "True",
        "{None}",
        "grad_input_kernel shrink_kernel shrink_tma_kernel split_k_reduce_kernel",
    ]


# --- the search -------------------------------------------------------------------------------------------------------


def simulated_timer(us: Callable[[launch_mode.Mode], float]) -> timing.Timer:
    """Return a timer whose result, in microseconds, depends only on the launch mode."""

    def timer(run, inputs, *, rounds: int) -> float:
        if rounds > 1:  # a timing of one round does not run the call, because the interpreter is slow
            run(inputs[0])
        return us(launch_mode.current)

    return timer


def test_the_tuner_chooses_the_fastest_valid_variant(monkeypatch, device) -> None:
    for step in ("shrink", "grad_weight"):
        monkeypatch.setitem(config.FORMS, step, {"triton": (step,), "torch": ()})
    # the general rule's variant is first; 8 warps with 2 stages are fastest but wrong; 8 warps with 3
    # stages are the second fastest
    grid = ((64,), (32,), (32,), (4, 8), (2, 3), (7,))
    monkeypatch.setattr(config, "_CANDIDATES", dict.fromkeys(config.KERNELS, grid))
    correct = search.Check.__call__

    def check(self: search.Check, run) -> bool:
        assert correct(self, run)
        tiles = next(iter(launch_mode.current.forced.values()), None)
        return tiles is None or (tiles.num_warps, tiles.num_stages) != (8, 2)

    monkeypatch.setattr(search.Check, "__call__", check)
    for problem in tuning.problems([SMALL], [70], [8]):
        if problem.step not in ("shrink", "grad_weight"):
            continue

        def us(mode: launch_mode.Mode, step: str = problem.step, factor: float = 1.0) -> float:
            if mode.forced_form == "torch":
                return 50.0
            tiles = mode.forced[step]
            return factor * ({4: 20.0, 8: 10.0}[tiles.num_warps] + tiles.num_stages)

        measurement = search.tune_one(problem, device, simulated_timer(us), 1e3)
        assert measurement.best is not None and measurement.best.form == "triton"
        tiles = measurement.best.tiles[problem.step]
        assert (tiles.num_warps, tiles.num_stages, tiles.programs) == (8, 3, 7)
        assert measurement.tried == 6 and len(measurement.rejected) == 1 and "wrong results" in measurement.rejected[0]
        assert measurement.us["torch"] == 50.0 and measurement.us["triton"] == 13.0
        rule = config.choose(problem.step, problem.key.operands, problem.key.rank, LARGE)
        assert measurement.us["triton, general rule"] == {4: 20.0, 8: 10.0}[rule.num_warps] + rule.num_stages
        entry = measurement.entry(measurement.best)
        assert entry.tiles[problem.step]["num_stages"] == 3 and entry.us["floor"] == round(measurement.floor_us, 3)
        slow = search.tune_one(problem, device, simulated_timer(lambda mode: us(mode, factor=9.0)), 1e3)
        assert slow.best == Variant("torch") and slow.entry(slow.best).tiles == {}
        assert slow.us["torch"] == 50.0 and slow.us["triton"] == 9 * 13.0
        with monkeypatch.context() as patch:  # no tiles of "triton" are valid
            patch.setattr(search.Check, "__call__", lambda self, run: launch_mode.current.forced_form == "torch")
            only_torch = search.tune_one(problem, device, simulated_timer(us), 1e3)
        assert only_torch.us == {"torch": 50.0}, "torch is not the general rule's form"


def test_the_table_is_saved_after_each_entry_and_has_the_lower_bounds(monkeypatch, device, tmp_path: Path) -> None:
    if device.type == "cuda":
        pytest.skip("this test expects the device name of the interpreter")
    monkeypatch.setattr(config, "_CANDIDATES", dict.fromkeys(config.KERNELS, ((64,), (32,), (32,), (4,), (2,), (7,))))
    lines: list[str] = []
    path = tmp_path / "table.json"
    sizes: list[int] = []

    def save(table: LaunchTable) -> None:
        table.save(path)
        sizes.append(len(json.loads(path.read_text())["entries"]))

    adapter_first: list[tuple[str, ...]] = []

    def us(mode: launch_mode.Mode) -> float:
        if mode.forced_form == "adapter_first":  # the steps of this order use the entries that are already tuned
            adapter_first.append(tuple(key.step for key in mode.table.entries))
        return 2.0 if mode.forced_form in ("torch", "frozen_first") else 1.0

    problems = list(tuning.problems([SMALL], [70, 3], [8]))
    options = {"device": device, "about": {"date": "today"}, "timer": simulated_timer(us)}
    table = tuning.tune(problems, **options, log=lines.append, save=save)
    assert {key.step: entry.form for key, entry in table.entries.items()} == dict.fromkeys(config.FORMS, "triton") | {
        "order": "adapter_first"
    }
    assert set(adapter_first) == {("shrink", "expand", "grad_bottleneck", "grad_weight", "grad_input")}
    steps = len(config.FORMS)
    assert sizes == [*range(1, steps + 1), steps]
    read = LaunchTable.read(path)
    assert read.entries == table.entries and read.about == table.about
    assert lines[0] == HEADER and sum("triton" in line for line in lines[1 : steps + 1]) == steps - 1
    rows = {row["step"]: row for row in read.about["distances"]}
    assert set(rows) == set(config.FORMS) - {"order"}
    copied = read.about["copy_bytes_per_s"] / 1e6
    R, M = 16, 70
    floor = (2 * 2 * M * 48 + 2 * R * 48 + 2 * 2 * M * R) / copied
    assert rows["shrink"]["floor_us"] == pytest.approx(floor, abs=1e-3)
    assert rows["shrink"]["ratio"] == pytest.approx(1.0 / rows["shrink"]["floor_us"], rel=0.1)
    (line,) = [line for line in lines if line.startswith("5 steps")]
    assert line.split()[:5] == ["5", "steps", "small", "70", "8"] and line.split()[5] == "5.0"


def test_problems_beyond_the_budget_are_not_measured(device) -> None:
    lines: list[str] = []
    problems = list(tuning.problems([SMALL], [70], [8]))
    options = {"device": device, "about": {}, "timer": simulated_timer(lambda mode: 1.0), "log": lines.append}
    table = tuning.tune(problems, budget_s=-1.0, **options)
    assert not table.entries and any(f"{len(problems)} problems were not measured" in line for line in lines)


def test_the_tuner_gives_the_reason_if_it_cannot_run(monkeypatch) -> None:
    options = {"device": torch.device("meta"), "about": {}, "log": lambda line: None}
    monkeypatch.setattr(search, "interpreting", lambda: False)
    for status, reason in (
        (BackendStatus(True), "for CUDA devices, not meta"),
        (BackendStatus(False, "old"), ".*: old"),
    ):
        monkeypatch.setattr(search, "backends", lambda status=status: {"triton": status})
        with pytest.raises(ValueError, match=f"nothing to tune: the triton backend is {reason}"):
            tuning.tune([], **options)
