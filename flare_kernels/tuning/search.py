"""The offline tuner: times every form of every step, with all candidate tiles, on this GPU.

A step is one operation of the adapter, a form is one implementation of a step, and a variant is a form with its tiles.
A variant is valid if its error against float32 results is at most twice the error of the plain PyTorch form, plus the
dtype's epsilon times the largest entry. All valid variants are timed in a few rounds. The best variant of each form,
the best three overall and the general rule's variant are timed again, in alternation. The fastest of them goes into the
launch table (:mod:`flare_kernels.launch_table`); if the general rule's form is as fast within the noise, it is
preferred. The general rule (``triton_ops/config.py``) decides launches that have no entry in the table. Nothing is
tuned while a model runs.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import torch_ops
from ..forms import capability
from ..launch_mode import forcing
from ..launch_table import LaunchTable
from ..selection import backends, interpreting
from .problem import FUSION, Inputs, Problem
from .report import GENERAL_RULE, HEADER, Measurement, distances, summary
from .timing import DeviceTimer, Timer, copy_bandwidth, nbytes, rotation
from .variants import Variant, variants

#: Rounds of the first timing of all variants, and of the second timing of the best variants.
_FIRST_ROUNDS, _SECOND_ROUNDS = 2, 5
_FINALISTS = 3
#: Two medians with at most this ratio are considered equal.
_NOISE = 1.02
TIMING = "device events, launches queued ahead of the device, rotating inputs, median of 5 rounds of 10 calls"


class Check:
    """Correctness check of a problem's variants, against float32 results and plain PyTorch results computed once."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._problem, self._inputs = problem, problem.make(device)
        truth = problem.run(torch_ops, _copies(self._inputs, torch.float32))
        plain = problem.run(torch_ops, _fresh(self._inputs))
        epsilon = torch.finfo(problem.dtype).eps
        self._truth = truth
        #: largest allowed error of each result: twice the plain form's error plus epsilon times the largest entry
        self._allowed = [
            2 * (result.float() - exact).abs().max() + epsilon * exact.abs().max()
            for result, exact in zip(plain, truth, strict=True)
        ]
        #: least bytes that the step must move: its inputs read once, its results written once
        self.moved = nbytes(self._inputs.values()) + nbytes(plain)

    def __call__(self, run: Callable[[Inputs], list[Tensor]]) -> bool:
        """Return whether a variant's results are correct on the problem's inputs."""
        results = zip(run(_fresh(self._inputs)), self._truth, self._allowed, strict=True)
        # a comparison with NaN is false
        is_valid = [(result.float() - exact).abs().max() <= allowed for result, exact, allowed in results]
        return bool(torch.stack(is_valid).all())


def _fresh(inputs: Inputs) -> Inputs:
    """Return the inputs, with copies of those that a step changes in place."""
    return inputs | ({"ys": [y.clone() for y in inputs["ys"]]} if "ys" in inputs else {})


def _copies(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def copy(value: Any) -> Any:
        return [copy(item) for item in value] if isinstance(value, list) else value.to(dtype)

    return {name: copy(value) for name, value in inputs.items()}


def tune_one(problem: Problem, device: torch.device, timer: Timer, copy_rate: float) -> Measurement:
    """Return the measurement of a problem. A variant is timed if it compiles, runs and gives correct results.

    ``copy_rate``: bytes per microsecond that a copy reads and writes.
    """
    from ..triton_ops.launch import shared_memory_bytes
    from ..triton_ops.primitives import tuned

    def run(inputs: Inputs) -> list[Tensor]:
        return problem.run(tuned, inputs)

    inputs, check = rotation(problem, device), Check(problem, device)
    measurement = Measurement(problem, floor_us=None if problem.step == "order" else check.moved / copy_rate)
    timed: list[tuple[float, Variant]] = []
    for variant in variants(problem, shared_memory_bytes(device), capability(device)):
        measurement.tried += 1
        try:
            # the first launch compiles a kernel, and Triton then prints all assembly that ptxas rejects
            with variant.forced(), contextlib.redirect_stdout(io.StringIO()):
                if check(run):
                    timed.append((timer(run, inputs, rounds=_FIRST_ROUNDS), variant))
                else:
                    measurement.rejected.append(f"{variant}: wrong results")
        except Exception as error:  # compiler or GPU limits: shared memory, registers, internal limits
            measurement.rejected.append(f"{variant}: {type(error).__name__}: {str(error)[:200]}")
    rule = next((variant for _, variant in timed if variant.by_rule), None)
    finalists = _finalists(timed)
    us: dict[int, list[float]] = {index: [] for index in range(len(finalists))}
    for _ in range(_SECOND_ROUNDS):  # in alternation, so that a drift of clocks or heat affects all finalists
        for index, variant in enumerate(finalists):
            with variant.forced():
                us[index].append(timer(run, inputs, rounds=1))
    medians = sorted(((statistics.median(us[i]), variant) for i, variant in enumerate(finalists)), key=_time)
    for median, variant in medians:
        measurement.us.setdefault(variant.form, median)
        if variant is rule:
            measurement.us[variant.form + GENERAL_RULE] = median
    # prefer the general rule's form if it is slower than the fastest form by no more than the noise
    preferred = [v for median, v in medians if rule and v.form == rule.form and median <= _NOISE * medians[0][0]]
    measurement.best = next(iter(preferred + [variant for _, variant in medians]), None)
    return measurement


def _time(pair: tuple[float, Variant]) -> float:
    return pair[0]


def _finalists(timed: list[tuple[float, Variant]]) -> list[Variant]:
    """Return the general rule's variant, the best three, and the best of each form."""
    finalists, forms = [variant for _, variant in timed if variant.by_rule][:1], set()
    for rank, (_, variant) in enumerate(sorted(timed, key=_time)):
        if (rank < _FINALISTS or variant.form not in forms) and variant not in finalists:
            finalists.append(variant)
        forms.add(variant.form)
    return finalists


def tune(
    problems: Sequence[Problem],
    *,
    device: torch.device,
    about: dict[str, Any],
    timer: Timer | None = None,
    jobs: int = 0,
    budget_s: float = float("inf"),
    log: Callable[[str], None] = print,
    save: Callable[[LaunchTable], None] = lambda table: None,
) -> LaunchTable:
    """Measure problems and return the launch table of this GPU.

    Args:
        problems: the problems to measure, in this order (:func:`flare_kernels.tuning.problems`).
        device: a CUDA device.
        about: versions, commit and date, stored in the table.
        timer: the timer of calls; default: :class:`DeviceTimer`.
        jobs: number of processes that compile ahead of the timing; 0: kernels are compiled when they are launched.
        budget_s: seconds after which no new problem is started.
        log: called with each line of output.
        save: called with the table after each new entry, and at the end.

    Raises:
        ValueError: Triton cannot run on the device; the message gives the reason.
    """
    began = time.monotonic()
    status = backends()["triton"]
    if not status or (device.type != "cuda" and not interpreting()):
        reason = f"for CUDA devices, not {device}" if status else str(status)
        raise ValueError(f"nothing to tune: the triton backend is {reason}")
    from .compiling import Compiler

    timer = timer or DeviceTimer()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    table = LaunchTable(gpu, about=about | {"fusion": FUSION, "timing": TIMING})
    measurements: list[Measurement] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            forcing(table=table)
        )  # the variants of the step "order" launch the other steps with their tuned tiles
        compiler = stack.enter_context(Compiler(device, jobs)) if jobs else None
        if compiler is not None:
            log(f"compiling {compiler.submit(problems)} kernels in {jobs} processes, in the order of the rows below")
        copy_rate = copy_bandwidth(device, timer)
        table.about["copy_bytes_per_s"] = round(copy_rate * 1e6)
        log(HEADER)
        for problem in problems:
            left = budget_s - (time.monotonic() - began)
            if left <= 0 or (compiler is not None and not compiler.wait(problem, left)):
                break
            measurement = tune_one(problem, device, timer, copy_rate)
            measurements.append(measurement)
            log(str(measurement))
            if rejected := measurement.rejected:
                log(f"    {len(rejected)} of {measurement.tried} variants rejected; first: {rejected[0]}")
            if measurement.best is not None:
                table.entries[problem.key] = measurement.entry(measurement.best)
                save(table)
    if len(measurements) < len(problems):
        left = len(problems) - len(measurements)
        log(f"{left} problems were not measured: the budget of {budget_s:.0f} s was used up")
    table.about["seconds"] = round(time.monotonic() - began, 1)
    table.about["distances"] = distances(measurements)
    for line in summary(table.about["distances"], copy_rate):
        log(line)
    save(table)
    return table
