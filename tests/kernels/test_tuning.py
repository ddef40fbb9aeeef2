"""Tests of launch tables: the file, the lookup, and how backend="auto" uses an entry. test_tuner.py tests the tuner.

An entry of a table gives the form (implementation) and the tiles of a step at one size on one GPU. Without an entry,
the general rule gives them: the first form in config.FORMS, with the tiles of config.choose.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import flare_kernels
from flare_kernels import aot, forms, launch_mode, launch_table, torch_ops
from flare_kernels.launch_table import Entry, Key, LaunchTable
from flare_kernels.triton_ops import config, launch
from flare_kernels.triton_ops import primitives as triton_ops
from flare_kernels.triton_ops.plan_text import launch_plan
from flare_kernels.triton_ops.shared_memory import least_shared_bytes

TILES = {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_N": 0, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3, "programs": 264}
KEY = Key("shrink", "narrow", 64, 4, 3)


@pytest.fixture(autouse=True)
def fresh_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Hide the tables of the user who runs the tests, and clear the cache of tables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(launch_table.ENVIRONMENT_VARIABLE, raising=False)
    launch_table.table_for.cache_clear()
    yield
    launch_table.table_for.cache_clear()


def test_a_saved_table_is_read_back_unchanged(tmp_path: Path) -> None:
    table = LaunchTable("Some GPU 1", {KEY: Entry("triton", {"shrink": TILES}, {"torch": 2.5})}, {"date": "today"})
    path = launch_table.user_path("Some GPU 1")
    assert path.name == "some-gpu-1.json" and not path.exists()
    assert launch_table.table_for("Some GPU 1").entries == {}
    launch_table.table_for.cache_clear()
    table.save(path)
    loaded = launch_table.table_for("Some GPU 1")
    assert (loaded.entries, loaded.about, loaded.path) == (table.entries, table.about, path)
    assert launch_table.table_for("Another GPU").entries == {}


DAMAGE = {
    "cut off": lambda text: text[:40],
    "another format": lambda text: text.replace('"format": 1', '"format": 9'),
    "unknown form": lambda text: text.replace('"triton"', '"cuda"'),
    "another step's form": lambda text: text.replace('"triton"', '"adapter_first"'),
    "unknown step": lambda text: text.replace('"step": "shrink"', '"step": "squeeze"'),
    "tiles of another form": lambda text: text.replace('"triton"', '"torch"'),
    "tiles": lambda text: text.replace('"BLOCK_M": 64', '"BLOCK_M": 65'),
    "huge tiles": lambda text: text.replace('"BLOCK_K": 64', '"BLOCK_K": 16384'),
    "warps": lambda text: text.replace('"num_warps": 4', '"num_warps": 3'),
    "stages": lambda text: text.replace('"num_stages": 3', '"num_stages": -1'),
    "missing field": lambda text: text.replace('"num_warps": 4,', ""),
    "extra field": lambda text: text.replace('"num_warps": 4,', '"num_warps": 4, "num_ctas": 2,'),
    "another kernel": lambda text: text.replace('"step": "shrink"', '"step": "expand"'),
    "decode tile smaller than the rank": lambda text: (
        text.replace('"step": "shrink"', '"step": "decode"')
        .replace('"shrink": {', '"shrink_decode": {')
        .replace('"BLOCK_R": 64', '"BLOCK_R": 16')
    ),
    "a list": lambda text: "[]",
    "another GPU": lambda text: text.replace("Some GPU", "Other GPU"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_table_is_reported_and_ignored(damage: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "table.json"
    LaunchTable("Some GPU", {KEY: Entry("triton", {"shrink": TILES})}).save(path)
    whole = path.read_text()
    monkeypatch.setenv(launch_table.ENVIRONMENT_VARIABLE, str(path))
    assert launch_table.table_for("Some GPU").entries
    launch_table.table_for.cache_clear()
    path.write_text(DAMAGE[damage](whole))
    assert path.read_text() != whole
    with pytest.warns(RuntimeWarning, match=r"table\.json is (not a launch table|for Other GPU)"):
        assert launch_table.table_for("Some GPU").entries == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there must be no second warning
        launch_table.table_for("Some GPU")


def test_a_user_without_a_readable_home_has_no_table(monkeypatch, tmp_path: Path) -> None:
    """A user in a container may have no home directory. A table is optional, so this is not an error."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert launch_table.table_for("Some GPU").entries == {}
    launch_table.table_for.cache_clear()
    monkeypatch.setattr(Path, "home", lambda: tmp_path)

    def unreadable(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", unreadable)
    assert launch_table.table_for("Some GPU").entries == {}


def test_concurrent_saves_do_not_conflict(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    tables = [LaunchTable("Some GPU", {KEY: Entry("triton", {"shrink": TILES})}, {"n": n}) for n in range(40)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda table: table.save(path), tables))
    assert LaunchTable.read(path).entries == tables[0].entries
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_entries_of_the_package_hold_where_the_users_table_has_none(monkeypatch, tmp_path: Path) -> None:
    """A tuner that stops early writes a table with few entries."""
    monkeypatch.setattr(launch_table, "package_path", lambda gpu: tmp_path / "packaged.json")
    other = dataclasses.replace(KEY, rows=KEY.rows + 1)
    LaunchTable("Some GPU", {KEY: Entry("triton"), other: Entry("tma")}).save(tmp_path / "packaged.json")
    LaunchTable("Some GPU", {KEY: Entry("torch")}).save(launch_table.user_path("Some GPU"))
    assert launch_table.table_for("Some GPU").entries == {KEY: Entry("torch"), other: Entry("tma")}


def test_an_empty_environment_variable_disables_tables(monkeypatch) -> None:
    LaunchTable("Some GPU", {KEY: Entry("torch")}).save(launch_table.user_path("Some GPU"))
    monkeypatch.setenv(launch_table.ENVIRONMENT_VARIABLE, "")
    assert launch_table.table_for("Some GPU").entries == {}


def test_sizes_share_entries_by_bucket() -> None:
    def key(rows: int, width: int, rank: int = 64) -> Key:
        return forms.table_key("shrink", "narrow", rank, rows, width)

    assert key(8192, 4096) == key(16384, 3585, 33)
    assert len({key(64, 1024), key(65, 1024), key(64, 1025), key(64, 1024, 65), key(10**6, 1024)}) == 5


def test_a_tuned_entry_applies_to_its_gpu_only(monkeypatch) -> None:
    """A simulated CUDA device gets the table's tiles if there is an entry, otherwise the general rule's tiles."""
    device = torch.device("cuda", 0)
    LaunchTable("Some GPU", {KEY: Entry("triton", {"shrink": TILES})}).save(launch_table.user_path("Some GPU"))
    monkeypatch.setattr(launch, "_cuda_shared_bytes", lambda index: config.SMALL_SHARED_BYTES)
    monkeypatch.setattr(forms, "_cuda_capability", lambda index: 80)
    general = config.choose("shrink", "narrow", 64, config.SMALL_SHARED_BYTES)

    def tiles(rows: int = 8192, device: torch.device = device) -> config.TileConfig:
        return launch.form_of_class(launch_mode.current, "shrink", "narrow", 64, rows, 4096, device)[1]["shrink"]

    for gpu, expected in (("Some GPU", config.TileConfig(**TILES)), ("Other GPU", general)):
        monkeypatch.setattr(forms, "_gpu_name", lambda index, gpu=gpu: gpu)
        assert tiles() == expected
    monkeypatch.setattr(forms, "_gpu_name", lambda index: "Some GPU")
    assert tiles(rows=64) == general
    assert tiles(device=torch.device("cpu")).programs == general.programs
    bf16 = torch.bfloat16
    plan = launch_plan(8192, 4096, (4096, 1024), 32, dtype=bf16, device=device)
    assert "BLOCK_M=64" in plan["shrink"] and "tuned table" in plan["shrink"]
    assert "general rule" in plan["expand"] and "decode" not in plan
    assert set(launch_plan(8, 4096, (4096,), 32, dtype=bf16, device=device)) >= {"decode", "grad_weight"}


def test_every_form_has_tiles_by_rule_and_by_table() -> None:
    """For every form, the general rule gives tiles that a table accepts, and the tuner has candidates.

    The first form of every step runs on any device.
    """
    for step, step_forms in config.FORMS.items():
        assert (step, next(iter(step_forms))) not in config.SUPPORTED
        for form, kernels in step_forms.items():
            tiles = {kernel: dataclasses.asdict(config.choose(kernel, "narrow", 64, 232448)) for kernel in kernels}
            row = {"step": step, "operands": "narrow", "rank": 64, "rows": 4, "width": 3, "form": form, "tiles": tiles}
            assert launch_table._parse(row)[1].form == form
            for kernel, operands in itertools.product(kernels, config.OPERAND_CLASSES):
                assert list(config.candidates(kernel, operands, 64, 232448))
    assert all(form in config.FORMS[step] for step, form in config.SUPPORTED)


def test_a_forced_form_comes_before_a_tuned_one_and_the_general_rule(monkeypatch) -> None:
    """A forced form comes before a tuned form, and a tuned form before the form of the general rule.

    If the device or the call does not support a form, the next one is taken.
    """
    device, sizes = torch.device("cuda", 0), ("narrow", 64, 8192, 4096)
    monkeypatch.setitem(config.FORMS, "shrink", {"triton": ("shrink",), "new": ("shrink",), "torch": ()})
    monkeypatch.setitem(config.SUPPORTED, ("shrink", "new"), lambda operands, capability: capability >= 90)
    monkeypatch.setattr(launch, "_cuda_shared_bytes", lambda index: config.SMALL_SHARED_BYTES)
    monkeypatch.setattr(forms, "_gpu_name", lambda index: "Some GPU")
    LaunchTable("Some GPU", {KEY: Entry("new", {"shrink": TILES})}).save(launch_table.user_path("Some GPU"))
    general = config.choose("shrink", "narrow", 64, config.SMALL_SHARED_BYTES)
    cases = (
        (90, (), "new", config.TileConfig(**TILES)),
        (80, (), "triton", general),
        (90, ("new",), "triton", general),
        (90, ("new", "triton"), "torch", None),
    )
    for capability, excluded, form, tiles in cases:
        monkeypatch.setattr(forms, "_cuda_capability", lambda index, capability=capability: capability)
        chosen = launch.form_of_class(launch_mode.current, "shrink", *sizes, device, excluded)
        assert chosen == (form, {} if tiles is None else {"shrink": tiles})
    with launch_mode.forcing(form="torch"):
        for excluded, form in (((), "torch"), (("torch",), "new")):
            mode = launch_mode.current
            assert launch.form_of_class(mode, "shrink", *sizes, device, excluded)[0] == form
        with launch_mode.forcing(shrink=general):  # the outer context still applies
            assert launch_mode.current.forced_form == "torch"
    with launch_mode.forcing(form="new", shrink=general):
        chosen = launch.form_of_class(launch_mode.current, "shrink", *sizes, torch.device("cpu"))
        assert chosen == ("new", {"shrink": general})
        assert launch.form_of_class(launch_mode.current, "expand", *sizes, torch.device("cpu"))[0] == "triton"


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_small_ranks_find_their_entry(rank: int, monkeypatch, device) -> None:
    """Tensors whose rows have only a few elements cannot be aligned.

    They are looked up under "narrow" (the class of aligned 16-bit operands), where the tuner stores their entries.
    """
    lookups: set[tuple[str, str]] = set()
    monkeypatch.setattr(forms, "tuned_entry", lambda step, operands, *_: lookups.add((step, operands)))
    x, y, B = (torch.randn(*size, device=device).bfloat16() for size in ((70, 64), (70, 32), (32, rank)))
    T, A = (torch.randn(*size, device=device).bfloat16() for size in ((70, rank), (rank, 64)))
    with launch_mode.forcing():
        ops = triton_ops.tuned
        ops.expand_([y], T, None, [B], scalings=[1.0], fusion=None)
        ops.grad_bottleneck([y], T, None, [B], scalings=[1.0], fusion=None, dT=torch.empty_like(T))
        ops.grad_weight(T, x, None, None, grad_dtype=torch.float32)
        ops.grad_input(T, A, dtype=x.dtype)
    assert lookups == {(step, "narrow") for step in ("expand", "grad_bottleneck", "grad_weight", "grad_input")}


def test_auto_takes_the_form_of_the_table(monkeypatch, device) -> None:
    """Each step takes plain PyTorch if its entry says so. The results are the same in both forms."""
    used: list[str] = []
    for step in ("shrink", "expand_", "grad_bottleneck", "grad_weight", "grad_input"):
        plain = getattr(torch_ops, step)

        def recorded(*args, _step=step, _plain=plain, **kwargs):
            used.append(_step.strip("_"))
            return _plain(*args, **kwargs)

        monkeypatch.setattr(torch_ops, step, recorded)
    x, x_source, A, B = (torch.randn(*size, device=device) for size in ((70, 24), (70, 24), (5, 24), (9, 5)))
    mask = torch.full((70, 3), 0b10110101, dtype=torch.uint8, device=device)

    def run(ops) -> list[torch.Tensor]:
        T, S = ops.shrink(x, x_source, A, compute_dtype=x.dtype)
        y = torch.zeros(70, 9, device=device)
        phi = {"scalings": [0.5], "fusion": "mul"}
        ops.expand_([y], T, S, [B], **phi)
        dT, dS = torch.empty_like(T), torch.empty_like(S)
        (dB,) = ops.grad_bottleneck([y], T, S, [B], dT=dT, dS=dS, B_grad_dtype=B.dtype, **phi)
        dA = ops.grad_weight(dT, x, dS, x_source, grad_dtype=A.dtype)
        return [T, S, y, dT, dS, dB, dA, ops.grad_input(dT, A, dtype=x.dtype)]

    def table(prefers_torch) -> None:
        monkeypatch.setattr(
            forms, "tuned_entry", lambda step, *_: Entry("torch") if prefers_torch in (step, "all") else None
        )

    expected_results = run(triton_ops.tuned)
    assert used == []
    for chosen in ("shrink", "expand", "grad_bottleneck", "grad_weight"):
        table(chosen)
        with launch_mode.forcing():
            run(triton_ops.tuned)
            for actual, expected in zip(run(triton_ops.tuned), expected_results, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            assert used == [chosen] * 2  # the second call has the same form
            run(triton_ops)
            assert used == [chosen] * 2  # backend="triton" does not follow the table
        used.clear()
    # dx without accumulation is one BLAS call by the general rule
    for entry, launched in ((None, []), (Entry("torch"), []), (Entry("triton"), ["grad_input_kernel"])):
        monkeypatch.setattr(forms, "tuned_entry", lambda *_, entry=entry: entry)
        with launch_mode.counting() as names:
            dx = triton_ops.tuned.grad_input(expected_results[3], A, dtype=x.dtype)
        torch.testing.assert_close(dx, expected_results[-1], rtol=1e-4, atol=1e-4)
        assert names == launched
    # with dropout, the kernels are always taken: they mask x and x_source without a copy
    table("all")
    dT = expected_results[3]
    with launch_mode.forcing():
        options = {"mask": mask, "keep_scale": 2.0}
        triton_ops.tuned.shrink(x, None, A, compute_dtype=x.dtype, **options)
        triton_ops.tuned.grad_weight(dT, x, None, None, grad_dtype=A.dtype, **options)
        triton_ops.tuned.grad_input(dT, A, dtype=x.dtype, **options)
    assert used == []
    # dx added to a buffer is one BLAS call
    out = torch.ones(70, 24, device=device)
    with launch_mode.counting() as names:
        assert triton_ops.tuned.grad_input(dT, A, dtype=x.dtype, out=out) is out
    assert names == []
    torch.testing.assert_close(out, 1 + dT @ A)


def test_launch_plan_says_torch_on_a_device_without_kernels() -> None:
    plan = flare_kernels.launch_plan(8192, 4096, (4096, 1024), 64, device="cpu")
    assert set(plan) == set(config.FORMS) - {"decode", "order"} and all(
        "torch (the backend for cpu" in step for step in plan.values()
    )


# --- the tables of the package ----------------------------------------------------------------------------------------

PACKAGE_TABLES = sorted(launch_table.package_path("").parent.glob("*.json"))
#: One number of rows and one width for each bucket, including the buckets above the last bound.
ROWS, WIDTHS = (32, 128, 512, 2048, 8192, 65536), (1024, 2048, 3584, 4096, 8192)


@pytest.mark.parametrize("path", PACKAGE_TABLES, ids=lambda path: path.stem)
def test_a_package_table_applies_to_its_gpu_and_sizes_only(path: Path, monkeypatch) -> None:
    table = launch_table.table_for(LaunchTable.read(path).gpu)
    assert table.path == path and table.entries and table.about["versions"]["triton"]
    device = torch.device("cuda", 0)
    monkeypatch.setattr(forms, "_gpu_name", lambda index: table.gpu)
    monkeypatch.setattr(forms, "_cuda_capability", lambda index: 90)
    monkeypatch.setattr(launch, "_cuda_shared_bytes", lambda index: aot.SHARED_BYTES[90])
    used: set[Key] = set()
    for step, rank, rows, width in itertools.product(config.FORMS, config.RANK_BUCKETS, ROWS, WIDTHS):
        sizes = ("narrow", rank, rows, width)
        key = forms.table_key(step, *sizes)
        entry, form = table.entries.get(key), next(iter(config.FORMS[step]))
        rule = {
            kernel: config.choose(kernel, "narrow", rank, aot.SHARED_BYTES[90]) for kernel in config.FORMS[step][form]
        }
        if entry is not None:
            used.add(key)
            form, rule = entry.form, {kernel: config.TileConfig(**tiles) for kernel, tiles in entry.tiles.items()}
            for kernel, tiles in rule.items():
                assert least_shared_bytes(kernel, tiles) <= aot.SHARED_BYTES[90]
        assert launch.form_of_class(launch_mode.current, step, *sizes, device) == (form, rule), key
    assert used == set(table.entries)
    assert launch_table.table_for("NVIDIA H200 NVL").entries == {}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler exists for Linux only")
@pytest.mark.parametrize("path", PACKAGE_TABLES, ids=lambda path: path.stem)
def test_the_entries_of_a_package_table_can_be_launched(path: Path) -> None:
    """Compiled for sm_90, the entries' kernels fit in the shared memory of a block and do not spill registers."""
    script = f"""
import itertools, pathlib, torch
from flare_kernels import aot, tuning
from flare_kernels.launch_mode import forcing, recording
from flare_kernels.launch_table import LaunchTable
from flare_kernels.triton_ops import primitives
from flare_kernels.triton_ops.config import TileConfig
table = LaunchTable.read(pathlib.Path({str(path)!r}))
limit, units, keys = aot.SHARED_BYTES[90], {{}}, set()
for problem in tuning.problems(tuning.SHAPES.values(), (8192, 4096, 2048, 512, 128, 8), (8, 16, 32, 64, 128)):
    entry = table.entries.get(problem.key)
    if entry is None:
        continue
    keys.add(problem.key)
    tiles = {{kernel: TileConfig(**fields) for kernel, fields in entry.tiles.items()}}
    if tiles:
        with forcing(form=entry.form, **tiles), recording(limit) as launches:
            problem.run(primitives.tuned, problem.make(torch.device("cpu"), real=False))
        assert any(launch.config in tiles.values() for launch in launches), problem
        units |= {{aot.specialise(launch, 90): problem for launch in launches}}
if __name__ == "__main__":
    assert keys == set(table.entries), set(table.entries) - keys
    for (unit, problem), result in zip(units.items(), aot.compile_units(units, 2)):
        assert "error" not in result and result["shared"] <= limit and not result["spills"], (problem, unit, result)
    print(len(units))
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(Path(__file__).parents[2])
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and int(done.stdout) >= len(PACKAGE_TABLES), done.stderr
