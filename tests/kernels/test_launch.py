"""Tests of launchers, which start a kernel, and of plans.

A plan is what a primitive computes once for calls with equal shapes, dtypes, strides and options, and then caches.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from calls import SIZES, calls

from flare_kernels import fused_lora, launch_mode, select_backend, selection, torch_ops
from flare_kernels.launch_mode import Mode, counting, forcing, recording
from flare_kernels.testing import launches_left_out
from flare_kernels.triton_ops import launch, primitives
from flare_kernels.triton_ops.config import TileConfig

CONFIG = TileConfig(BLOCK_M=16, BLOCK_K=0, BLOCK_N=0, BLOCK_R=0, num_warps=4, num_stages=2)
CPU = torch.device("cpu")


# --- the launch -------------------------------------------------------------------------------------------------------


class Kernel(triton.JITFunction):
    """Stand-in for a kernel on a GPU: records its launches and returns ``compiled``."""

    def __init__(self, compiled: Any) -> None:
        self.arg_names, self.compiled = ["x", "y", "M", "BLOCK_M"], compiled
        self.launches: list[Any] = []
        self.fn = types.SimpleNamespace(__name__="some_kernel")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            self.launches.append((grid, args, options))
            return self.compiled

        return run


class Compiled:
    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, stream=None: self.launches.append((grid, args))


def launcher_of(kernel: Kernel, device: torch.device = CPU, mode: Mode | None = None) -> launch.Launcher:
    return launch.Launcher(mode or Mode(), kernel, (7, 2), CONFIG, device, M=5)


def test_the_second_launch_calls_the_compiled_kernel() -> None:
    kernel = Kernel(Compiled())
    launcher = launcher_of(kernel)
    assert launcher.constants == (5, 16)
    for _ in range(3):
        launcher.run("x", None, *launcher.constants)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert kernel.launches == [((7, 2), ("x", None, 5, 16), options)]
    assert kernel.compiled.launches == [((7, 2, 1), ("x", None, 5, 16))] * 2


class TakesNames:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda x, y, M: pytest.fail("not by position")


@pytest.mark.parametrize(("compiled", "reason"), [(None, "returned NoneType"), (TakesNames(), "by position")])
def test_an_unknown_triton_release_launches_through_the_jit_and_warns_once(compiled: Any, reason: str) -> None:
    launch._warn_of_slow_launches.cache_clear()
    kernel = Kernel(compiled)
    with pytest.warns(RuntimeWarning, match=f"Triton {triton.__version__}: .*{reason}"):
        launcher_of(kernel).run("x", None, 5, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = launcher_of(kernel)
        for _ in range(2):
            again.run("x", None, 5, 16)
    assert len(kernel.launches) == 3


def test_the_device_is_entered_only_if_it_is_not_current(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        yield

    current = [0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch, "current_cuda_device", lambda: lambda: current[0])
    kernel = Kernel(Compiled())
    launcher = launcher_of(kernel, torch.device("cuda", 1))
    for current[0], count in ((0, 1), (0, 2), (1, 2)):
        launcher.run("x", None, 5, 16)
        assert entered == [1] * count
    assert len(kernel.launches) == 1 and len(kernel.compiled.launches) == 2


def test_counters_see_launches_through_the_jit_and_of_compiled_kernels() -> None:
    outer: list[str] = []
    inner: list[str] = []
    launcher = launcher_of(Kernel(Compiled()), mode=Mode(counters=(outer, inner)))
    for _ in range(3):
        launcher.run("x", None, 5, 16)
    assert outer == inner == ["some_kernel"] * 3


# --- plans ------------------------------------------------------------------------------------------------------------


def test_plans_are_cached_and_not_used_under_other_settings(device: torch.device) -> None:
    x, A = torch.randn(70, 24, device=device), torch.randn(5, 24, device=device)

    def shrink() -> Tensor:
        return primitives.shrink(x, None, A, compute_dtype=x.dtype)[0]

    def tiles_of(launches: list[Any]) -> list[int]:
        return [launch.args["BLOCK_M"] for launch in launches]

    expected = x @ A.T
    torch.testing.assert_close(shrink(), expected)
    plans = launch_mode.current.plans
    size = len(plans)
    torch.testing.assert_close(shrink(), expected)
    assert len(plans) == size and launch_mode.current.plans is plans
    with recording(227 * 1024) as launches:
        shrink(), shrink()
        with forcing(shrink=TileConfig(16, 32, 0, 16, 4, 2)):
            shrink()
        with counting() as names:
            shrink()
    assert tiles_of(launches) == [32, 32, 16, 32] and names == []
    with counting() as names, forcing(shrink=TileConfig(16, 32, 0, 16, 4, 2)):
        torch.testing.assert_close(shrink(), expected)
    assert names == ["shrink_kernel"]
    torch.testing.assert_close(shrink(), expected)
    assert launch_mode.current.plans is plans and len(plans) == size


def test_the_cache_of_plans_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_mode, "MAX_PLANS", 4)
    A = torch.zeros(4, 8)
    with launches_left_out() as names:
        for M in range(1, 11):
            primitives.shrink(torch.zeros(M, 8), None, A, compute_dtype=torch.float32)
        assert len(launch_mode.current.plans) <= 4 and len(names) == 10


# --- launches left out ------------------------------------------------------------------------------------------------


def counted(call: Callable[[], Any]) -> int:
    """Return the number of Python and C calls that the function ``call`` makes."""
    events: list[str] = []
    sys.setprofile(lambda frame, event, of: events.append(event) if event in ("call", "c_call") else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(events) - 2  # without the call of ``call`` and the call of setprofile


@pytest.mark.parametrize("namespace", [primitives, primitives.tuned], ids=["triton", "auto"])
def test_a_primitive_makes_at_most_six_calls(namespace: Any) -> None:
    """The calls are: the primitive, one per allocated tensor, one per launch, and at most one that splits a result."""
    for size in (SIZES[0], (*SIZES[4][:3], 16)):
        with launches_left_out() as names:
            for call in calls(namespace, size):
                call()
                before = len(names)
                count = counted(call)
                launches = len(names) - before
                assert count <= 3 + 2 * launches and count <= 6, (names[-1], count)


def test_launches_left_out_are_named_in_order_and_the_mode_is_restored() -> None:
    x, A, B = torch.zeros(128, 24), torch.zeros(5, 24), torch.zeros(9, 5)
    before = launch_mode.current
    forward = ["shrink_kernel", "expand_kernel"]
    with launches_left_out() as outer:
        assert select_backend("cpu", torch.float32) == select_backend("cuda", torch.bfloat16) == "triton"
        assert select_backend("cpu", torch.float64) == "torch"
        assert selection.primitives("triton", CPU, torch.float16) is primitives
        with pytest.raises(ValueError, match="no float64 form"):
            selection.primitives("triton", CPU, torch.float64)
        fused_lora(x, None, torch.zeros(128, 9), A, B, scaling=1.0)
        with pytest.raises(KeyError), launches_left_out() as inner:
            fused_lora(x, None, torch.zeros(128, 9), A, B, scaling=1.0)
            raise KeyError
        fused_lora(x[:4], None, torch.zeros(4, 9), A, B, scaling=1.0, backend="triton")
    assert outer == [*forward, "shrink_decode_kernel", "expand_decode_kernel"] and inner == forward
    assert launch_mode.current is before
    assert select_backend("cpu", torch.float32) == "torch" and selection.primitives("auto", CPU, x.dtype) is torch_ops
    assert not fused_lora(x, None, torch.zeros(128, 9), A, B, scaling=1.0).any() and len(outer) == 4


def test_leaving_launches_out_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(RuntimeError, match="needs the package triton"), launches_left_out():
        pass
