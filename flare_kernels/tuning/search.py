"""The offline tuner: times every form of every step with every candidate's tiles on this GPU.

A variant counts only if its result is as close to float32 mathematics as the plain form's. All are timed in a few
rounds, the best of each form and the best three once more in turn, and the fastest one goes into the launch table
(:mod:`flare_kernels.launch_table`). Nothing is tuned while a model runs.
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
from .report import GENERAL_RULE, HEADER, Finding, distances, summary
from .timing import DeviceTimer, Timer, copy_bandwidth, nbytes, rotation
from .variants import Variant, variants

#: Rounds of the first timing of every variant, and of the second of the best.
_FIRST_ROUNDS, _SECOND_ROUNDS = 2, 5
_FINALISTS = 3
#: Ratio of two medians that is noise.
_NOISE = 1.02
TIMING = "device events, launches queued ahead of the device, rotating inputs, median of 5 rounds of 10 calls"


class Check:
    """Whether a variant of a problem is right, against truth and plain form that are computed once."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._problem, self._inputs = problem, problem.make(device)
        truth = problem.run(torch_ops, _copies(self._inputs, torch.float32))
        plain = problem.run(torch_ops, _fresh(self._inputs))
        epsilon = torch.finfo(problem.dtype).eps
        self._truth = truth
        #: the most that each result may differ: twice the plain form's error plus one epsilon of the largest entry
        self._allowed = [
            2 * (usual.float() - want).abs().max() + epsilon * want.abs().max()
            for usual, want in zip(plain, truth, strict=True)
        ]
        #: bytes that the step must at least move: its inputs read once, its results written once
        self.moved = nbytes(self._inputs.values()) + nbytes(plain)

    def __call__(self, run: Callable[[Inputs], list[Tensor]]) -> bool:
        """Return whether a form is right on the problem's inputs."""
        results = zip(run(_fresh(self._inputs)), self._truth, self._allowed, strict=True)
        # NaN compares as not right
        return bool(torch.stack([(got.float() - want).abs().max() <= most for got, want, most in results]).all())


def _fresh(inputs: Inputs) -> Inputs:
    """The inputs with copies of those that a step changes."""
    return inputs | ({"ys": [y.clone() for y in inputs["ys"]]} if "ys" in inputs else {})


def _copies(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def copy(value: Any) -> Any:
        return [copy(one) for one in value] if isinstance(value, list) else value.to(dtype)

    return {name: copy(value) for name, value in inputs.items()}


def tune_one(problem: Problem, device: torch.device, timer: Timer, copy_rate: float) -> Finding:
    """Time every variant of a problem that compiles, runs and is right.

    ``copy_rate``: bytes per microsecond that a copy reads and writes.
    """
    from ..triton_ops.launch import shared_memory_bytes
    from ..triton_ops.primitives import tuned

    def run(inputs: Inputs) -> list[Tensor]:
        return problem.run(tuned, inputs)

    inputs, check = rotation(problem, device), Check(problem, device)
    finding = Finding(problem, floor_us=None if problem.step == "order" else check.moved / copy_rate)
    timed: list[tuple[float, Variant]] = []
    for variant in variants(problem, shared_memory_bytes(device), capability(device)):
        finding.tried += 1
        try:
            # what could not be compiled ahead is compiled here; Triton prints the whole assembly that ptxas refuses
            with variant.forced(), contextlib.redirect_stdout(io.StringIO()):
                if check(run):
                    timed.append((timer(run, inputs, rounds=_FIRST_ROUNDS), variant))
                else:
                    finding.refused.append(f"{variant}: wrong numbers")
        except Exception as error:  # what a compiler or a card refuses: shared memory, registers, an internal limit
            finding.refused.append(f"{variant}: {type(error).__name__}: {str(error)[:200]}")
    rule = next((variant for _, variant in timed if variant.by_rule), None)
    finalists = _finalists(timed)
    us: dict[int, list[float]] = {index: [] for index in range(len(finalists))}
    for _ in range(_SECOND_ROUNDS):  # in turn: what drifts (clocks, heat) drifts for all of them
        for index, variant in enumerate(finalists):
            with variant.forced():
                us[index].append(timer(run, inputs, rounds=1))
    medians = sorted(((statistics.median(us[i]), one) for i, one in enumerate(finalists)), key=_first)
    for median, variant in medians:
        finding.us.setdefault(variant.form, median)
        if variant is rule:
            finding.us[variant.form + GENERAL_RULE] = median
    # the general rule's form stays where another one's lead is within the noise
    usual = [one for us, one in medians if rule and one.form == rule.form and us <= _NOISE * medians[0][0]]
    finding.best = next(iter(usual + [one for _, one in medians]), None)
    return finding


def _first(pair: tuple[float, Variant]) -> float:
    return pair[0]


def _finalists(timed: list[tuple[float, Variant]]) -> list[Variant]:
    """The general rule's variant, the best three, and the best of each form."""
    found, forms = [variant for _, variant in timed if variant.by_rule][:1], set()
    for place, (_, variant) in enumerate(sorted(timed, key=_first)):
        if (place < _FINALISTS or variant.form not in forms) and variant not in found:
            found.append(variant)
        forms.add(variant.form)
    return found


def tune(
    wanted: Sequence[Problem],
    *,
    device: torch.device,
    about: dict[str, Any],
    timer: Timer | None = None,
    jobs: int = 0,
    budget_s: float = float("inf"),
    say: Callable[[str], None] = print,
    save: Callable[[LaunchTable], None] = lambda table: None,
) -> LaunchTable:
    """Return the launch table of this GPU, printed row by row and handed to ``save`` after each.

    Args:
        wanted: what to measure, in this order (:func:`flare_kernels.tuning.problems`).
        device: a CUDA device.
        about: versions, commit and date, kept in the table.
        timer: how a call is timed; default: :class:`DeviceTimer`.
        jobs: processes that compile ahead of the timing; 0: each launch compiles its own.
        budget_s: seconds after which no new problem is started.
        say: prints a line. save: called with the table whenever an entry was added, and at the end.

    Raises:
        ValueError: Triton cannot run on the device; the message gives the reason.
    """
    began = time.monotonic()
    status = backends()["triton"]
    if not status or (device.type != "cuda" and not interpreting()):
        raise ValueError(f"nothing to tune: the triton backend is {status or f'for CUDA devices, not {device}'}")
    from .compiling import Compiler

    timer = timer or DeviceTimer()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    table = LaunchTable(gpu, about=about | {"fusion": FUSION, "timing": TIMING})
    findings: list[Finding] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(forcing(table=table))  # the order is measured with the tiles found for its steps
        compiler = stack.enter_context(Compiler(device, jobs)) if jobs else None
        if compiler is not None:
            say(f"compiling {compiler.submit(wanted)} kernels on {jobs} processors, those of the first row first")
        copy_rate = copy_bandwidth(device, timer)
        table.about["copy_bytes_per_s"] = round(copy_rate * 1e6)
        say(HEADER)
        for problem in wanted:
            left = budget_s - (time.monotonic() - began)
            if left <= 0 or (compiler is not None and not compiler.wait(problem, left)):
                break
            finding = tune_one(problem, device, timer, copy_rate)
            findings.append(finding)
            say(str(finding))
            if finding.refused:
                say(f"    {len(finding.refused)} of {finding.tried} variants refused; first: {finding.refused[0]}")
            if finding.best is not None:
                table.entries[problem.key] = finding.entry(finding.best)
                save(table)
    if len(findings) < len(wanted):
        say(f"{len(wanted) - len(findings)} problems were left out: the budget of {budget_s:.0f} s was used up")
    table.about["seconds"] = round(time.monotonic() - began, 1)
    table.about["distances"] = distances(findings)
    for line in summary(table.about["distances"], copy_rate):
        say(line)
    save(table)
    return table
