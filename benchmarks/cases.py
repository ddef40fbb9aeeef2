"""Measure a case: check its variants for correctness, count their costs, and time them in turn.

A question is what a benchmark asks, for example the cost of a training step. A case is one question at one shape (a
model and sizes). A variant is one way to compute the case, for example a method. Its results are one row of a table.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import shapes
import timing
import torch
from gate import WrongResult


@dataclass
class Variant:
    """One way to compute a case.

    Attributes:
        call: computes the case once.
        check: raises an error if the results are wrong. It is called before counting and timing.
        count: returns bytes, launches and FLOPs of one call, by name.
        facts: further entries of the variant's row.
    """

    call: Callable[[], object]
    check: Callable[[], None]
    count: Callable[[], dict[str, Any]] = dict
    facts: dict[str, Any] = field(default_factory=dict)


class CannotRun(Exception):
    """Raised by a variant's check if the variant cannot run on this machine.

    Use it for reasons that are known only after the other variants have been set up, such as a lack of memory. Other
    reasons are known when the variants are built (see `Variants`).
    """


@dataclass(frozen=True)
class Skipped:
    """A variant that cannot run on this machine: the reason, and the counters that are known without running it."""

    reason: str
    counters: dict[str, Any]


#: Variants by name. A string in place of a variant is the reason why it cannot run on this machine.
Variants = Mapping[str, Variant | Skipped | str]


@dataclass
class Measured:
    """Result of a case: a row per variant (one in all if the case failed), and the samples of the timed variants."""

    case: str
    rows: dict[str, dict[str, Any]]
    samples: dict[str, timing.Samples]


def measure(
    shape: shapes.Shape,
    build: Callable[[], Variants],
    conditions: str,
    queue_ahead: bool,
    how: timing.Effort | None,
    device: torch.device,
) -> Measured:
    """Check, count and time every variant of a case. A variant that fails gets a row with the reason."""
    times = [time.perf_counter()]
    variants = build()
    times.append(time.perf_counter())
    rows = {name: _row_header(shape, name, conditions) for name in variants}
    ready: dict[str, Variant] = {}
    for name, variant in variants.items():
        if isinstance(variant, str):
            variant = Skipped(variant, {})
        if isinstance(variant, Skipped):
            rows[name].update(status="skipped", reason=variant.reason, counters=variant.counters)
            continue
        try:
            variant.check()
            rows[name].update(variant.facts, counters=variant.count())
            ready[name] = variant
        except CannotRun as error:
            rows[name].update(status="skipped", reason=str(error))
        except WrongResult as error:
            rows[name].update(status="wrong", reason=str(error))
        except torch.OutOfMemoryError as error:
            rows[name].update(status="failed", reason=f"out of memory: {str(error).splitlines()[0]}")
        except Exception as error:  # the rows of the other variants must not be lost
            rows[name].update(status="failed", reason=f"{type(error).__name__}: {error}")
    samples = {}
    times.append(time.perf_counter())
    if ready:
        calls = {name: variant.call for name, variant in ready.items()}
        samples = timing.interleave(calls, device, queue_ahead=queue_ahead, how=how)
        for name, variant_samples in samples.items():
            rows[name].update(status="timed", **variant_samples.row())
            if "peft" in samples:
                rows[name]["over_peft"] = variant_samples.over(samples["peft"])
            if "target_tokens" in rows[name]:
                rows[name]["tokens_per_s"] = rows[name]["target_tokens"] / variant_samples.median
    times.append(time.perf_counter())
    durations = dict(
        zip(("build", "gate_and_count", "time"), (b - a for a, b in itertools.pairwise(times)), strict=True)
    )
    for row in rows.values():
        row["case_took_s"] = durations
    return Measured(shape.case, rows, samples)


def failed(shape: shapes.Shape, variant: str, conditions: str, error: Exception) -> Measured:
    """Return the result of a case in which building or timing the variants failed: one row with the error."""
    row = {**_row_header(shape, variant, conditions), "reason": f"{type(error).__name__}: {error}"}
    return Measured(shape.case, {variant: row}, {})


def _row_header(shape: shapes.Shape, variant: str, conditions: str) -> dict[str, Any]:
    model = shape.model
    sizes = {key: value for key, value in asdict(shape).items() if key not in ("model", "question")}
    return {
        "case": shape.case,
        "variant": variant,
        "question": shape.question,
        "family": model.family,
        "model": model.name,
        "stand_in": model.stand_in,
        "headline": shape.headline,
        "shape": {**sizes, "d": model.d, "n_q": model.n_q, "n_v": model.n_v},
        "conditions": conditions,
        "status": "failed",
    }
