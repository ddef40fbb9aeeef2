"""A case: one shape of one question, and the variants that answer it; gated, counted, and timed in turn."""

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
    """One way to do what a case asks.

    Attributes:
        call: runs it once.
        check: raises where its results are wrong; runs before anything is counted or timed.
        count: bytes, launches and FLOPs of one call.
        facts: what else belongs in its row.
    """

    call: Callable[[], object]
    check: Callable[[], None]
    count: Callable[[], dict[str, Any]] = dict
    facts: dict[str, Any] = field(default_factory=dict)


class NotHere(Exception):
    """Raised by a variant's check: it cannot run here, which shows only after the others were set up."""


@dataclass(frozen=True)
class Skipped:
    """A variant that cannot run here: why, and what can be counted nevertheless."""

    reason: str
    counters: dict[str, Any]


#: A variant, or the reason why it cannot run here.
Variants = Mapping[str, Variant | Skipped | str]


@dataclass
class Measured:
    """What came of a case: a row for every variant, and the samples of those that were timed."""

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
    """Gate, count and time every variant of a case; one that fails is reported, and keeps no other from its row."""
    began = [time.perf_counter()]
    variants = build()
    began.append(time.perf_counter())
    rows = {name: _head(shape, name, conditions) for name in variants}
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
        except NotHere as error:
            rows[name].update(status="skipped", reason=str(error))
        except WrongResult as error:
            rows[name].update(status="wrong", reason=str(error))
        except torch.OutOfMemoryError as error:
            rows[name].update(status="failed", reason=f"out of memory: {str(error).splitlines()[0]}")
        except Exception as error:  # the other variants' rows must not be lost with it
            rows[name].update(status="failed", reason=f"{type(error).__name__}: {error}")
    samples = {}
    began.append(time.perf_counter())
    if ready:
        calls = {name: variant.call for name, variant in ready.items()}
        samples = timing.interleave(calls, device, queue_ahead=queue_ahead, how=how)
        for name, taken in samples.items():
            rows[name].update(status="timed", **taken.row())
            if "peft" in samples:
                rows[name]["over_peft"] = taken.over(samples["peft"])
            if "target_tokens" in rows[name]:
                rows[name]["tokens_per_s"] = rows[name]["target_tokens"] / taken.median
    began.append(time.perf_counter())
    took = dict(zip(("build", "gate_and_count", "time"), (b - a for a, b in itertools.pairwise(began)), strict=True))
    for row in rows.values():
        row["case_took_s"] = took
    return Measured(shape.case, rows, samples)


def failed(shape: shapes.Shape, variant: str, conditions: str, error: Exception) -> Measured:
    """A case whose variants could not even be built: one row that says so."""
    row = {**_head(shape, variant, conditions), "reason": f"{type(error).__name__}: {error}"}
    return Measured(shape.case, {variant: row}, {})


def _head(shape: shapes.Shape, variant: str, conditions: str) -> dict[str, Any]:
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
