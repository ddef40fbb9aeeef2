"""The tuner: its clock (on a made-up device), its check, what it compares, and the table that it writes."""

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
from flare_kernels.triton_ops import config
from flare_kernels.triton_ops import primitives as triton_ops
from flare_kernels.triton_ops.shared_memory import least_shared_bytes
from flare_kernels.tuning import search, timing
from flare_kernels.tuning.report import HEADER
from flare_kernels.tuning.variants import Variant, variants

ROOT = Path(__file__).parents[2]
SMALL = tuning.Shape("small", 48, (40, 24))
LARGE = 227 * 1024


# --- the clock --------------------------------------------------------------------------------------------------------


class Device:
    """A stream and its host: a launch takes the host time, and its kernel begins when host and stream are ready."""

    def __init__(self) -> None:
        self.host = self.free = 0.0  # microseconds

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


def test_the_clock_measures_the_kernel_and_not_the_launch(fake: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    timer, turn = timing.DeviceTimer(), []

    def run(inputs: dict[str, int]) -> None:
        turn.append(inputs["set"])
        fake.launch(35.0, 15.0)

    inputs = [{"set": i} for i in range(3)]
    assert timer(run, inputs, rounds=3) == pytest.approx(15.0)
    assert turn == [i % 3 for i in range(32)]  # each set in its turn
    assert timer(lambda t: fake.launch(35.0, 80.0), inputs, rounds=1) == pytest.approx(80.0)
    # without the sleep the same device shows the host's time
    monkeypatch.setattr(timing, "sleep_on_device", lambda cycles: None)
    monkeypatch.setattr(Device.Mark, "query", lambda self: False)
    assert timer(run, inputs, rounds=3) == pytest.approx(35.0, rel=0.1)


def test_the_clock_sleeps_as_long_as_the_host_needs(fake: Device) -> None:
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


def test_the_most_used_sizes_come_first_and_each_entry_once() -> None:
    wanted = list(tuning.problems(tuning.SHAPES.values(), (8192, 2048, 512, 1, 16), (64, 8)))
    first = [(p.shape.name, p.M) for p in wanted if p.r == 64 and p.shape.tier == 0]
    sizes = list(itertools.product((8192, 2048, 512, 1), ("llama-3.1-8b", "xlm-r-large")))
    assert list(dict.fromkeys(first)) == [(name, M) for M, name in sizes]  # 16 tokens share an entry with 1
    tiers = [(p.shape.tier, p.r != 64) for p in wanted]
    assert tiers == sorted(tiers)
    assert len({p.key for p in wanted}) == len(wanted)
    assert all(p.key.rows == bucket(p.M, ROW_BOUNDS) for p in wanted)
    assert {p.step for p in wanted if p.M == 8192} == set(config.FORMS) - {"decode"}
    assert {p.step for p in wanted if p.M == 1} == {"decode"}


def test_the_bytes_of_a_step_are_the_least_it_moves() -> None:
    """Megabytes of the Llama shape, as counted by hand: inputs once, results once, y read and written."""
    expected = {"shrink": 139.5, "expand": 172.6, "grad_bottleneck": 94.2, "grad_weight": 140.5, "grad_input": 70.3}
    for problem in tuning.problems([tuning.SHAPES["llama-3.1-8b"]], [8192], [64]):
        if problem.step in expected:
            inputs = problem.make(torch.device("meta"), real=False)
            moved = timing.nbytes(inputs.values()) + timing.nbytes(problem.run(torch_ops, inputs))
            assert moved / 1e6 == pytest.approx(expected[problem.step], abs=0.1), problem


def test_wrong_numbers_are_seen(device) -> None:
    """The tuner's own check fails for a form that is slightly off, and for NaN."""
    for problem in tuning.problems([SMALL], [70], [8]):
        check = search.Check(problem, device)
        assert check(lambda t, p=problem: p.run(triton_ops, t)), problem
        assert check(lambda t, p=problem: p.run(triton_ops, t)), "the inputs are as they were"
        assert not check(lambda t, p=problem: [one * 1.05 for one in p.run(torch_ops, t)]), problem
        assert not check(lambda t, p=problem: [one * torch.nan for one in p.run(torch_ops, t)])


def test_both_orders_are_run(monkeypatch, device) -> None:
    """The problem runs in the order that is forced, and in the one of the table in force."""
    (problem,) = [one for one in tuning.problems([SMALL], [70], [8]) if one.step == "order"]
    orders: list[object] = []
    order_of = function.order_of
    monkeypatch.setattr(function, "order_of", lambda *args: orders.append(order_of(*args)) or orders[-1])
    check = search.Check(problem, device)
    run = functools.partial(problem.run, triton_ops.tuned)
    sizes = ((70, 40), (70, 24))
    for form, order in (("frozen_first", None), ("adapter_first", sizes)):
        orders.clear()
        with Variant(form).forced():
            assert check(run)
        assert orders == [order]


# --- what is compared -------------------------------------------------------------------------------------------------


def test_every_form_that_can_run_is_compared_and_tiles_that_cannot_fit_are_not(monkeypatch) -> None:
    forms = {"triton": ("grad_weight",), "new": ("grad_weight",), "two": ("shrink", "grad_weight"), "torch": ()}
    monkeypatch.setitem(config.FORMS, "grad_weight", forms)
    monkeypatch.setitem(config.SUPPORTED, ("grad_weight", "new"), lambda operands, capability: capability >= 90)
    grid = ((64,), (64, 128), (0,), (4,), (2, 4), (256,))
    monkeypatch.setattr(config, "_CANDIDATES", dict.fromkeys(config.KERNELS, grid))
    wanted = tuning.problems([tuning.SHAPES["llama-3.1-8b"]], [8192], [64])
    (problem,) = [one for one in wanted if one.step == "grad_weight"]
    found = list(variants(problem, LARGE, 90))
    assert list(dict.fromkeys(one.form for one in found)) == list(forms)
    assert next(iter(found)).by_rule and sum(one.by_rule for one in found) == len(forms)
    for one in found:
        for kernel, tiles in one.tiles.items():
            assert one.by_rule or least_shared_bytes(kernel, tiles) <= LARGE
    sizes = {one.tiles["grad_weight"] for one in found if one.form == "triton"}
    assert {(one.BLOCK_K, one.num_stages) for one in sizes} >= {(64, 2), (64, 4), (128, 2)}
    assert (128, 4) not in {(one.BLOCK_K, one.num_stages) for one in sizes}
    # of two kernels one is varied at a time
    rule = next(one for one in found if one.form == "two")
    assert all(sum(one.tiles[k] != rule.tiles[k] for k in rule.tiles) <= 1 for one in found if one.form == "two")
    assert "new" not in {one.form for one in variants(problem, LARGE, 80)}
    with rule.forced():
        assert launch_mode.current.forced_form == "two" and launch_mode.current.forced == rule.tiles


def script(code: str) -> str:
    """What code prints in a process that can compile."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is there for Linux only")
def test_the_least_shared_memory_is_what_the_compiler_takes() -> None:
    """On both sides of what a block of sm_90 may have: never more than the compiler's figure, and seldom much less."""
    printed = script(
        """
import json, torch
from flare_kernels import aot, tuning
from flare_kernels.launch_mode import forcing, recording
from flare_kernels.triton_ops import config, primitives
from flare_kernels.triton_ops.shared_memory import least_shared_bytes
limit, found = aot.SHARED_BYTES[90], {}
for problem in tuning.problems([tuning.SHAPES["llama-3.1-8b"]], [8192], [64]):
    inputs = problem.make(torch.device("cpu"), real=False)
    for form, kernels in config.FORMS[problem.step].items():
        for kernel in kernels:
            of_kernel = config.candidates(kernel, "narrow", problem.key.rank, limit)
            tiles = {least_shared_bytes(kernel, one): one for one in of_kernel}
            fit = sorted(size for size in tiles if 0 < size <= limit)
            for size in [*fit[-1:], *sorted(set(tiles) - set(fit) - {0})[:1]]:
                with forcing(form=form, **{kernel: tiles[size]}), recording(limit) as launches:
                    problem.run(primitives.tuned, inputs)
                for launch in launches:
                    if launch.config == tiles[size]:
                        found[aot.specialise(launch, 90)] = (kernel, size)
if __name__ == "__main__":
    for (kernel, size), result in zip(found.values(), aot.compile_units(found, 2)):
        print(json.dumps([kernel, size, result["shared"]]))
"""
    )
    rows = [json.loads(line) for line in printed.splitlines()]
    assert {kernel for kernel, *_ in rows} >= {"shrink", "expand", "grad_weight", "grad_input"}
    assert any(least > LARGE for _, least, _ in rows) and any(least <= LARGE for _, least, _ in rows)
    for kernel, least, shared in rows:
        assert 0.6 * shared <= least <= shared, (kernel, least, shared)


def test_variants_are_compiled_ahead_as_they_will_be_launched() -> None:
    """What is compiled in advance is what a launch with those tiles asks for, once, in another process."""
    printed = script(
        """
import torch
from flare_kernels import aot, tuning
from flare_kernels.tuning import compiling
from flare_kernels.triton_ops import config
config._CANDIDATES = dict.fromkeys(config.KERNELS, ((64,), (64,), (64,), (4,), (3,), (132,)))
compiling.capability = lambda device: 90
shape, device = tuning.Shape("small", 512, (512, 256)), torch.device("cpu")
wanted = [p for p in tuning.problems([shape], [256, 2048], [64]) if p.step in ("shrink", "grad_input")]
units = {unit for p in wanted for unit in compiling.units_of(p, device)}
results = []
with compiling.Compiler(device, 2) as compiler:
    print(compiler.submit(wanted) == len(units), compiler.wait(wanted[-1], 0.0))
    print(all(compiler.wait(p, float("inf")) for p in wanted))
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


def told(us: Callable[[launch_mode.Mode], float]) -> timing.Timer:
    """A clock that runs a call and reads its time off what is forced."""

    def timer(run, inputs, *, rounds: int) -> float:
        if rounds > 1:  # the interpreter is slow: the second timing does not run
            run(inputs[0])
        return us(launch_mode.current)

    return timer


def test_the_tuner_takes_the_fastest_that_is_right(monkeypatch, device) -> None:
    for step in ("shrink", "grad_weight"):
        monkeypatch.setitem(config.FORMS, step, {"triton": (step,), "torch": ()})
    # the first is the general rule's; 8 warps with 2 stages are "fastest", but wrong; 8 with 3 come next
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

        measurement = search.tune_one(problem, device, told(us), 1e3)
        assert measurement.best is not None and measurement.best.form == "triton"
        tiles = measurement.best.tiles[problem.step]
        assert (tiles.num_warps, tiles.num_stages, tiles.programs) == (8, 3, 7)
        assert measurement.tried == 6 and len(measurement.rejected) == 1 and "wrong results" in measurement.rejected[0]
        assert measurement.us["torch"] == 50.0 and measurement.us["triton"] == 13.0
        rule = config.choose(problem.step, problem.key.operands, problem.key.rank, LARGE)
        assert measurement.us["triton, general rule"] == {4: 20.0, 8: 10.0}[rule.num_warps] + rule.num_stages
        entry = measurement.entry(measurement.best)
        assert entry.tiles[problem.step]["num_stages"] == 3 and entry.us["floor"] == round(measurement.floor_us, 3)
        slow = search.tune_one(problem, device, told(lambda mode: us(mode, factor=9.0)), 1e3)
        assert slow.best == Variant("torch") and slow.entry(slow.best).tiles == {}
        assert slow.us["torch"] == 50.0 and slow.us["triton"] == 9 * 13.0


def test_a_table_is_written_as_it_grows_and_says_how_far_each_step_is_from_its_floor(
    monkeypatch, device, tmp_path: Path
) -> None:
    if device.type == "cuda":
        pytest.skip("the interpreter's table is for the CPU")
    monkeypatch.setattr(config, "_CANDIDATES", dict.fromkeys(config.KERNELS, ((64,), (32,), (32,), (4,), (2,), (7,))))
    said: list[str] = []
    path = tmp_path / "table.json"
    sizes: list[int] = []

    def save(table: LaunchTable) -> None:
        table.save(path)
        sizes.append(len(json.loads(path.read_text())["entries"]))

    adapter_first: list[tuple[str, ...]] = []

    def us(mode: launch_mode.Mode) -> float:
        if mode.forced_form == "adapter_first":  # the steps in it take what was found for them
            adapter_first.append(tuple(key.step for key in mode.table.entries))
        return 2.0 if mode.forced_form in ("torch", "frozen_first") else 1.0

    wanted = list(tuning.problems([SMALL], [70, 3], [8]))
    table = tuning.tune(wanted, device=device, about={"date": "today"}, timer=told(us), log=said.append, save=save)
    assert {key.step: entry.form for key, entry in table.entries.items()} == dict.fromkeys(config.FORMS, "triton") | {
        "order": "adapter_first"
    }
    assert set(adapter_first) == {("shrink", "expand", "grad_bottleneck", "grad_weight", "grad_input")}
    steps = len(config.FORMS)
    assert sizes == [*range(1, steps + 1), steps]
    read = LaunchTable.read(path)
    assert read.entries == table.entries and read.about == table.about
    assert said[0] == HEADER and sum("triton" in line for line in said[1 : steps + 1]) == steps - 1
    rows = {row["step"]: row for row in read.about["distances"]}
    assert set(rows) == set(config.FORMS) - {"order"}
    copied = read.about["copy_bytes_per_s"] / 1e6
    R, M = 16, 70
    floor = (2 * 2 * M * 48 + 2 * R * 48 + 2 * 2 * M * R) / copied
    assert rows["shrink"]["floor_us"] == pytest.approx(floor, abs=1e-3)
    assert rows["shrink"]["ratio"] == pytest.approx(1.0 / rows["shrink"]["floor_us"], rel=0.1)
    (line,) = [line for line in said if line.startswith("5 steps")]
    assert line.split()[:5] == ["5", "steps", "small", "70", "8"] and line.split()[5] == "5.0"


def test_the_budget_leaves_the_last_sizes_out(device) -> None:
    said: list[str] = []
    wanted = list(tuning.problems([SMALL], [70], [8]))
    options = {"device": device, "about": {}, "timer": told(lambda mode: 1.0), "log": said.append}
    table = tuning.tune(wanted, budget_s=-1.0, **options)
    assert not table.entries and any(f"{len(wanted)} problems were not measured" in line for line in said)


def test_the_tuner_says_why_it_cannot_run(monkeypatch) -> None:
    monkeypatch.setattr(search, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="nothing to tune: the triton backend is"):
        tuning.tune([], device=torch.device("meta"), about={}, log=lambda line: None)
