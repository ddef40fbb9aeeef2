"""Compute the numbers that have targets, and some others, from the result files of one run.

    python benchmarks/summary.py results.json [more.json ...] --output summary.json

Most numbers are ratios of two rows of one case, which were timed in turn on the same device. ``targets`` tells which
targets are met. If the models are small stand-ins or there is no GPU, no target is judged, and ``note`` gives the
reason. A number is null if its rows are missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results

FAMILIES = ("llama", "xlmr")
_QUESTIONS = ("projection", "step", "decode")
#: Name of whole steps on padded rows in the summary. In result files their question is "step".
_PADDED = "padded-step"
Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]


@dataclass(frozen=True)
class Key:
    """One number of the summary.

    Attributes:
        name: key of the number in the summary.
        meaning: description of the number for the reader of the summary.
        number: computes the number from the rows of a model family.
        bound: relation that the number must have to its target: "<=", ">=" or ">". Empty if no family has a target.
        limits: the target of each family in `FAMILIES`, or None for a family without a target.
    """

    name: str
    meaning: str
    number: Callable[[Rows, str], float]
    bound: str = ""
    limits: tuple[float | None, float | None] = (None, None)

    def limit(self, family: str) -> float | None:
        """Return the target of a family, or None if the family has no target."""
        return self.limits[FAMILIES.index(family)]

    def met(self, family: str, value: float | None) -> bool | None:
        """Return whether a value meets the target of a family, or None if the value or the target is missing."""
        limit = self.limit(family)
        if limit is None or value is None:
            return None
        return {"<=": value <= limit, ">=": value >= limit, ">": value > limit}[self.bound]


def _seconds(rows: Rows, family: str, question: str, variant: str) -> float:
    return float(_row(rows, family, question, variant)["median_s"])


def _row(rows: Rows, family: str, question: str, variant: str) -> Row:
    return rows[f"{question}/{family}", variant]


def _over(question: str, slow: str, fast: str) -> Callable[[Rows, str], float]:
    """Return a function that divides the seconds of the row ``slow`` by the seconds of the row ``fast``."""
    return lambda rows, family: _seconds(rows, family, question, slow) / _seconds(rows, family, question, fast)


def _adapter_over_floor(rows: Rows, family: str) -> float:
    joint = _row(rows, family, "projection", "flare-joint")
    above = joint["median_s"] - _seconds(rows, family, "projection", "frozen")
    return float(above / joint["adapter_floor_s"])


def _adapter_alone(rows: Rows, family: str) -> float:
    row = _row(rows, family, "projection", "flare-adapter-only")
    return float(row["median_s"] / row["floor_s"])


def _against_addmm(rows: Rows, family: str) -> float:
    best = min(_seconds(rows, family, "projection", name) for name in ("addmm-separate", "addmm-joint"))
    return best / _seconds(rows, family, "projection", "flare-joint")


def _counter(question: str, name: str, ours: str, theirs: str) -> Callable[[Rows, str], float]:
    def number(rows: Rows, family: str) -> float:
        first, second = (_row(rows, family, question, variant)["counters"][name] for variant in (ours, theirs))
        return float(first / second)

    return number


def _wall_over_busy(variant: str) -> Callable[[Rows, str], float]:
    def number(rows: Rows, family: str) -> float:
        row = _row(rows, family, "step", variant)
        return float(row["wall_median_s"] / row["counters"]["device_busy_s"])

    return number


def _wall_over_device(rows: Rows, family: str) -> float:
    """Return wall time divided by device-busy time of the captured step, or of the eager step if none was captured."""
    captured = ("step/" + family, "flare-captured") in rows
    return _wall_over_busy("flare-captured" if captured else "flare")(rows, family)


def _adapter_share(rows: Rows, family: str) -> float:
    """Return the time of a frozen block with adapters, divided by its time without adapters.

    Both are times per token, because the two cases may have different numbers of tokens.
    """
    frozen, joint = (_row(rows, family, *which) for which in (("step", "frozen"), ("projection", "flare-joint")))
    block = frozen["counters"]["frozen_block_s"] / (frozen["shape"]["B"] * frozen["shape"]["m"])
    adapters = (joint["median_s"] - _seconds(rows, family, "projection", "frozen")) / joint["shape"]["M"]
    return float((block + adapters) / block)


KEYS = (
    Key(
        "adapter_over_floor",
        "time of the adapters of q and v, forward + backward (total minus the frozen products), divided by the least "
        "time in which their bytes can be moved",
        _adapter_over_floor,
        "<=",
        (1.35, 1.3),
    ),
    Key(
        "qv_speedup_vs_peft_bf16",
        "q and v with frozen products, forward + backward: time of PEFT's eager layers with bf16 adapters, divided by "
        "the time of this package",
        _over("projection", "peft-bf16", "flare-joint"),
        ">=",
        (1.25, 1.6),
    ),
    Key(
        "qv_speedup_vs_peft_fp32",
        "as qv_speedup_vs_peft_bf16, but PEFT and this package have float32 adapters under bf16 autocast (PEFT's "
        "default)",
        _over("projection", "peft-fp32-autocast", "flare-joint-fp32-autocast"),
        ">=",
        (1.75, 2.5),
    ),
    Key(
        "qv_speedup_vs_peft_dropout",
        "as qv_speedup_vs_peft_bf16, but PEFT and this package have lora_dropout 0.1",
        _over("projection", "peft-bf16-dropout", "flare-joint-dropout"),
        ">=",
        (1.45, 2.0),
    ),
    Key(
        "qv_speedup_vs_compile",
        "as qv_speedup_vs_peft_bf16, but PEFT's layers are compiled by torch.compile",
        _over("projection", "peft-bf16-compile", "flare-joint"),
        ">",
        (1.0, 1.0),
    ),
    Key(
        "qv_speedup_vs_addmm",
        "q and v with frozen products, forward + backward: time of the faster addmm form in plain PyTorch, divided by "
        "the time of this package",
        _against_addmm,
        ">",
        (1.0, 1.0),
    ),
    Key(
        "forward_transient_vs_eager",
        "bytes that the adapters' forward allocates and frees again, divided by the same bytes of PEFT's eager layers",
        _counter("projection", "transient_bytes", "flare-joint", "peft-bf16"),
        "<=",
        (0.05, 0.05),
    ),
    Key(
        "step_vs_lora",
        "time of a whole step, source states kept, divided by the time of plain LoRA",
        _over("step", "flare", "lora"),
        "<=",
        (1.5, 1.5),
    ),
    Key(
        "step_vs_input_fusion",
        "time of a whole step, m = 512, divided by the time of input-level fusion on texts of 2m tokens",
        _over("step", "flare", "input-fusion"),
        "<=",
        (0.76, 0.70),
    ),
    Key(
        "peak_vs_input_fusion",
        "peak memory of a whole step, divided by the peak memory of input-level fusion on texts of 2m tokens",
        _counter("step", "peak_bytes", "flare", "input-fusion"),
    ),
    Key(
        "step_speedup_vs_authors",
        "time of a whole step of FLARE as its authors run it, divided by the time of this package",
        _over("step", "authors", "flare"),
        ">=",
        (1.5, 1.5),
    ),
    Key(
        "step_wall_over_device",
        "a whole step, source states kept, captured in a CUDA graph (eager if none was captured): wall time divided by "
        "device-busy time",
        _wall_over_device,
        "<=",
        (1.15, 1.15),
    ),
    Key(
        "adapter_share_of_frozen_step",
        "device seconds of one frozen block, forward + dx, with the adapters of q and v (both streams, forward + "
        "backward), divided by the device seconds of the frozen block alone",
        _adapter_share,
        "<=",
        (1.025, None),
    ),
    Key(
        "padded_step_vs_input_fusion",
        "time of a whole step on rows with 3/8 padding and masks, source states kept, divided by the time of "
        "input-level fusion on the same rows, joined without their padding",
        _over(_PADDED, "flare", "input-fusion"),
    ),
    Key(
        "graphed_step_vs_lora",
        "time of a whole step in a CUDA graph, source states kept, divided by the time of plain LoRA in a CUDA graph",
        _over("step", "flare-captured", "lora-captured"),
    ),
)
#: Further numbers. In the summary they are under the key "beside".
OTHER_KEYS = (
    Key(
        "warm_step_vs_lora",
        "time of a whole step with all source states in a cache on the device, divided by the time of plain LoRA",
        _over("step", "flare-warm", "lora"),
        "<=",
        (1.05, 1.05),
    ),
    Key(
        "warm_step_vs_input_fusion",
        "time of a whole step with all source states in a cache on the device, divided by the time of input-level "
        "fusion on texts of 2m tokens",
        _over("step", "flare-warm", "input-fusion"),
        "<=",
        (0.55, 0.55),
    ),
    Key(
        "recompute_step_vs_lora",
        "time of a whole step with the source states recomputed in backward, divided by the time of plain LoRA",
        _over("step", "flare-recompute", "lora"),
    ),
    Key(
        "recompute_peak_vs_lora",
        "peak memory of a whole step with the source states recomputed in backward, divided by the peak memory of "
        "plain LoRA",
        _counter("step", "peak_bytes", "flare-recompute", "lora"),
        "<=",
        (1.1, 1.1),
    ),
    Key(
        "captured_wall_vs_busy",
        "a captured step, source states kept: wall time divided by device-busy time",
        _wall_over_busy("flare-captured"),
        "<=",
        (1.15, 1.15),
    ),
    Key(
        "step_vs_eager_sdpa",
        "time of a whole eager step, source states kept, divided by the time of FLARE on PEFT's layers with fused "
        "attention",
        _over("step", "flare", "eager-sdpa"),
        "<=",
        (1.0, 1.0),
    ),
    Key(
        "offload_step_vs_lora",
        "time of a whole step with the source states in host memory, divided by the time of plain LoRA",
        _over("step", "flare-offload", "lora"),
    ),
    Key(
        "adapter_alone_over_floor",
        "time of the adapters alone, measured directly, divided by the least time in which their bytes can be moved",
        _adapter_alone,
    ),
    Key(
        "decode_launches",
        "number of kernels that one block's adapters launch for one new token of each row",
        lambda rows, family: float(_row(rows, family, "decode", "flare")["counters"]["launches"]),
        "<=",
        (2, 2),
    ),
)


def headline_rows(loaded: list[dict[str, Any]]) -> Rows:
    """Return the rows that the summary uses. The key of a row is ("question/family", variant)."""
    return {
        (f"{_PADDED if _is_padded(row) else row['question']}/{row['family']}", row["variant"]): row
        for result in loaded
        for row in result["cases"]
        if (row["headline"] or _is_padded(row)) and row["status"] == "timed" and row["question"] in _QUESTIONS
    }


def _is_padded(row: Row) -> bool:
    return bool(row["shape"].get("padded"))


def summarise(loaded: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the summary of the result files of one run.

    Raises:
        ValueError: there are no files, or they were measured with different source files or on different devices.
    """
    if not loaded:
        raise ValueError("no result files were given")
    for name in ("sources", "device"):
        values = {result["run"][name] for result in loaded}
        if len(values) > 1:
            raise ValueError(f"the result files are of different runs: they have different {name}, {sorted(values)}")
    rows = headline_rows(loaded)
    numbers: dict[str, dict[str, float | None]] = {}
    targets: dict[str, dict[str, Any]] = {}
    run = loaded[0]["run"]
    judged = run["device"] != "cpu" and bool(rows) and not any(row["stand_in"] for row in rows.values())
    for key in (*KEYS, *OTHER_KEYS):
        numbers[key.name] = {family: _number(key, rows, family) for family in FAMILIES}
        targeted = {family: limit for family in FAMILIES if (limit := key.limit(family)) is not None}
        if targeted:
            targets[key.name] = {
                family: {
                    "target": f"{key.bound} {limit:g}",
                    "met": key.met(family, numbers[key.name][family]) if judged else None,
                }
                for family, limit in targeted.items()
            }
    return {
        **{key.name: numbers[key.name] for key in KEYS},
        "beside": {key.name: numbers[key.name] for key in OTHER_KEYS},
        "targets": targets,
        "judged": judged,
        "note": "" if judged else "small stand-in models or no GPU: these numbers say nothing about the targets",
        "device": run["device"],
        "versions": run["versions"],
        "commit": run["commit"],
        "sources": run["sources"],
        "date": run["date"],
        "ceilings": run.get("ceilings"),
        "conditions": {row["case"]: row["conditions"] for row in rows.values()},
        "depths": {row["case"]: row["depth"] for row in rows.values() if "depth" in row},
        "spread": _spread(rows),
        "meaning": {key.name: key.meaning for key in (*KEYS, *OTHER_KEYS)},
    }


def _number(key: Key, rows: Rows, family: str) -> float | None:
    try:
        return float(f"{key.number(rows, family):.4g}")
    except (KeyError, ZeroDivisionError, TypeError):
        return None


def _spread(rows: Rows) -> dict[str, float]:
    """Return, for each case, the largest IQR / median of its rows. Smaller relative differences are noise."""
    spread: dict[str, float] = {}
    for row in rows.values():
        relative = (row["q75_s"] - row["q25_s"]) / row["median_s"]
        spread[row["case"]] = round(max(spread.get(row["case"], 0.0), relative), 4)
    return spread


def main(arguments: list[str] | None = None) -> None:
    """Read result files, write the summary if --output is given, and print which targets are met."""
    parser = argparse.ArgumentParser(description="Write summary.json from benchmark results.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    summary = summarise([results.load(path) for path in args.results if path.exists()])
    text = json.dumps(summary, indent=1) + "\n"
    if args.output:
        args.output.write_text(text)
    for key in (*KEYS, *OTHER_KEYS):
        where = summary if key in KEYS else summary["beside"]
        for family in FAMILIES:
            target = summary["targets"].get(key.name, {}).get(family, {"target": "", "met": None})
            verdict = {True: "met", False: "NOT MET", None: ""}[target["met"]]
            print(f"{key.name:32}{family:7}{where[key.name][family]!s:>10}  {target['target']:8}{verdict}")
    if summary["note"]:
        print(summary["note"])


if __name__ == "__main__":
    main()
