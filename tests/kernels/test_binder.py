"""Tests of the arguments of kernel launches without a GPU. Triton's own binder binds them as for sm_90."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from flare_kernels import triton_ops

ROOT = Path(__file__).parents[2]
KERNELS = {
    name: kernel
    for module in pkgutil.iter_modules(triton_ops.__path__)
    for name, kernel in vars(importlib.import_module(f"flare_kernels.triton_ops.{module.name}")).items()
    if name.endswith("_kernel")
}


def run(script: str) -> str:
    """Run Python without Triton's interpreter and return its output."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_kernel_argument_has_a_name_that_triton_reserves() -> None:
    from triton.backends.nvidia.compiler import CUDAOptions

    reserved = {"stream", "device", "device_type", "grid", "warmup", "num_warps", "num_stages", "num_ctas", "debug"}
    reserved |= {"enable_fp_fusion", "launch_cooperative_grid", "maxnreg", "sanitize_overflow", "ir_override"}
    reserved |= set(CUDAOptions.__dataclass_fields__) | set(inspect.signature(triton.JITFunction.run).parameters)
    source = inspect.getsource(triton.JITFunction.run) + inspect.getsource(triton.JITFunction._pack_args)
    named = re.findall(r"\"(\w+)\" not in kwargs|kwargs\[\"(\w+)\"\]", source)
    assert {"stream", "device", "debug"} <= {name for pair in named for name in pair}
    reserved |= {name for pair in named for name in pair}
    assert len(KERNELS) == 12
    for name, kernel in KERNELS.items():
        assert not reserved & set(kernel.arg_names), name


BIND = """
import collections, itertools, torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from calls import LAYOUTS, SIZES, calls
from flare_kernels import launch_mode
from flare_kernels.triton_ops import primitives

class RecordingPlans(launch_mode.Plans):
    used = []
    def __getitem__(self, key):
        self.used.append(key)
        return super().__getitem__(key)

backend, binders = make_backend(GPUTarget("cuda", 90, 32)), {}
by_key, by_part = collections.defaultdict(set), collections.defaultdict(set)
bound_kernels, times, form = set(), collections.Counter(), None

def check(launch):
    kernel, values = launch.kernel, list(launch.args.values())
    if kernel not in binders:
        binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    bound, specialization, rest = binders[kernel](*values, enable_fp_fusion=True, **options)
    # arguments are in the kernel's order: tensors (or None) first, then numbers, then constants
    assert list(bound) == kernel.arg_names and all(a is b for a, b in zip(bound.values(), values, strict=True))
    kinds = [
        2 if parameter.is_constexpr else 0 if value is None or isinstance(value, Tensor) else 1
        for parameter, value in zip(kernel.params, values)
    ]
    assert kinds == sorted(kinds), kernel.fn.__name__
    axes = collections.defaultdict(list)
    for name, value in bound.items():
        base, separator, axis = name.partition("_stride_")
        if separator and axis != "stream":
            axes[base].append(value)
    for base, strides in axes.items():
        tensor = bound[base]
        expected = [0] * len(strides) if tensor is None else list(tensor.stride())[:len(strides)]
        assert strides == expected, (base, strides)
    bound_kernels.add(kernel.fn.__name__)
    return kernel.fn.__name__, tuple(specialization), str(sorted(options.items()))

def one_round(size, layout, which):
    for call in calls(primitives, size, layout, which):
        first, RecordingPlans.used[:] = len(launches), []
        call()
        for at, launch in enumerate(launches[first:]):
            key = (form, tuple(RecordingPlans.used), at)
            times[key] += 1
            specialisation = check(launch)
            by_key[key].add(specialisation)
            # the keys without their integers, which include the low bits of the addresses
            part = tuple(tuple(k for k in key if type(k) is not int) for key in RecordingPlans.used)
            by_part[form, part, at].add(specialisation)

with launch_mode.recording(227 * 1024) as launches:
    object.__setattr__(launch_mode.current, "plans", RecordingPlans())
    for size in SIZES:
        for layout in LAYOUTS:
            one_round(size, layout, 0)
            one_round(size, layout, 0)  # new tensors of the same layout have the same keys
    for which in range(1, 16):
        one_round(SIZES[0], "misaligned", which)
        one_round(SIZES[4][:3] + (16,), "misaligned", which)
for form in ("tma", "last_adds"):
    with launch_mode.forcing(form=form), launch_mode.recording(227 * 1024) as launches:
        object.__setattr__(launch_mode.current, "plans", RecordingPlans())
        for size, layout in itertools.product((SIZES[0], SIZES[3]), LAYOUTS):
            one_round(size, layout, 0)
            one_round(size, layout, 0)
wrong = [key for key, specialisations in by_key.items() if len(specialisations) > 1]
assert not wrong, wrong[0]
# without the low bits of the addresses, a key must have several specialisations; otherwise this test cannot fail
assert any(len(specialisations) > 1 for specialisations in by_part.values()), "no misaligned tensor was bound"
assert min(times.values()) >= 1 and sum(count > 1 for count in times.values()) > 500, len(times)
print(*sorted(bound_kernels))
"""


def test_equal_keys_have_equal_specialisations() -> None:
    """Launches whose plans have equal cache keys bind to the same compiled kernel, with arguments in its order."""
    assert set(run(BIND).split()) == set(KERNELS)


LEFT_OUT = """
import torch
import flare_kernels
from flare_kernels.testing import launches_left_out
x, base = torch.randn(128, 64, requires_grad=True), torch.zeros(128, 32)
A, B = torch.randn(8, 64, requires_grad=True), torch.randn(32, 8, requires_grad=True)
with launches_left_out() as names:
    y = flare_kernels.fused_lora(x, x.detach(), base, A, B, scaling=1.0, dropout_p=0.5, training=True)
    y.sum().backward()
assert (y.shape, x.grad.shape, A.grad.shape, B.grad.shape) == ((128, 32), x.shape, A.shape, B.shape)
print(*names)
"""


def test_launches_are_left_out_without_the_interpreter() -> None:
    """On a CPU, a forward and a backward pass list the kernels that they would launch, and launch none."""
    assert run(LEFT_OUT).split() == [
        *("dropout_mask_kernel", "dropout_mask_kernel", "shrink_kernel", "expand_kernel"),
        *("grad_bottleneck_kernel", "dropout_mask_kernel", "dropout_mask_kernel", "grad_weight_kernel"),
        "grad_input_kernel",
    ]
