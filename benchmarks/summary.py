"""Compute one number per target from the result files of one run.

    python benchmarks/summary.py results.json [more.json ...] --output summary.json

Almost every number is a ratio of two rows that were timed in turn on the same device. ``targets`` tells which targets
are met. With stand-in sizes or without a GPU, none is judged and ``note`` gives the reason. A number with missing rows
is null.
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
#: Name of the question about whole steps on padded rows.
_PADDED = "padded-step"
Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]


@dataclass(frozen=True)
class Key:
    """One number of the summary.

    Attributes:
        name: its key in the summary.
        meaning: its description.
        number: computes it from the rows for a model family.
        bound: "<=", ">=" or ">".
        limits: the target of each family; None: no target.
    """

    name: str
    meaning: str
    number: Callable[[Rows, str], float]
    bound: str = ""
    limits: tuple[float | None, float | None] = (None, None)

    def limit(self, family: str) -> float | None:
        """Return the target of a family; None if it has none."""
        return self.limits[FAMILIES.index(family)]

    def met(self, family: str, value: float | None) -> bool | None:
        """Return whether a value meets its target; None without a target or a value."""
        limit = self.limit(family)
        if limit is None or value is None:
            return None
        return {"<=": value <= limit, ">=": value >= limit, ">": value > limit}[self.bound]


def _seconds(rows: Rows, family: str, question: str, variant: str) -> float:
    return float(_row(rows, family, question, variant)["median_s"])


def _row(rows: Rows, family: str, question: str, variant: str) -> Row:
    return rows[f"{question}/{family}", variant]


def _over(question: str, slow: str, fast: str) -> Callable[[Rows, str], float]:
    """Return a function that divides the seconds of one row by those of another."""
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
    """Return wall over busy time of the captured step; of the eager step if none was captured."""
    captured = ("step/" + family, "flare-captured") in rows
    return _wall_over_busy("flare-captured" if captured else "flare")(rows, family)


def _adapter_share(rows: Rows, family: str) -> float:
    """Return the ratio, computed per token because the two cases may have different numbers of tokens."""
    frozen, joint = (_row(rows, family, *which) for which in (("step", "frozen"), ("projection", "flare-joint")))
    block = frozen["counters"]["frozen_block_s"] / (frozen["shape"]["B"] * frozen["shape"]["m"])
    adapters = (joint["median_s"] - _seconds(rows, family, "projection", "frozen")) / joint["shape"]["M"]
    return float((block + adapters) / block)


KEYS = (
    Key(
        "adapter_over_floor",
        "adapters of q and v, forward + backward (total minus the frozen products), over their DRAM floor",
        _adapter_over_floor,
        "<=",
        (1.35, 1.3),
    ),
    Key(
        "qv_speedup_vs_peft_bf16",
        "q and v with frozen products, forward + backward: PEFT eager, bf16 adapters, over ours",
        _over("projection", "peft-bf16", "flare-joint"),
        ">=",
        (1.25, 1.6),
    ),
    Key(
        "qv_speedup_vs_peft_fp32",
        "the same over PEFT's default: float32 adapters under bf16 autocast",
        _over("projection", "peft-fp32-autocast", "flare-joint-fp32-autocast"),
        ">=",
        (1.75, 2.5),
    ),
    Key(
        "qv_speedup_vs_peft_dropout",
        "the same with lora_dropout 0.1 in both",
        _over("projection", "peft-bf16-dropout", "flare-joint-dropout"),
        ">=",
        (1.45, 2.0),
    ),
    Key(
        "qv_speedup_vs_compile",
        "the same over torch.compile of the eager form",
        _over("projection", "peft-bf16-compile", "flare-joint"),
        ">",
        (1.0, 1.0),
    ),
    Key(
        "qv_speedup_vs_addmm",
        "the same over the faster of the hand-written addmm forms",
        _against_addmm,
        ">",
        (1.0, 1.0),
    ),
    Key(
        "forward_transient_vs_eager",
        "transient bytes of the adapters' forward over PEFT eager's",
        _counter("projection", "transient_bytes", "flare-joint", "peft-bf16"),
        "<=",
        (0.05, 0.05),
    ),
    Key(
        "step_vs_lora",
        "a whole step, source states kept, over plain LoRA's",
        _over("step", "flare", "lora"),
        "<=",
        (1.5, 1.5),
    ),
    Key(
        "step_vs_input_fusion",
        "a whole step, m = 512, over input-level fusion's at 2m",
        _over("step", "flare", "input-fusion"),
        "<=",
        (0.76, 0.70),
    ),
    Key(
        "peak_vs_input_fusion",
        "peak memory of a whole step over input-level fusion's at 2m",
        _counter("step", "peak_bytes", "flare", "input-fusion"),
    ),
    Key(
        "step_speedup_vs_authors",
        "FLARE as the authors run it over ours, a whole step",
        _over("step", "authors", "flare"),
        ">=",
        (1.5, 1.5),
    ),
    Key(
        "step_wall_over_device",
        "a whole step, source states kept, captured in a CUDA graph (eager if none was captured): wall time over "
        "device-busy time",
        _wall_over_device,
        "<=",
        (1.15, 1.15),
    ),
    Key(
        "adapter_share_of_frozen_step",
        "one frozen block, forward + dx, with the adapters of q and v (both streams, forward + backward), over the "
        "frozen block alone; device seconds",
        _adapter_share,
        "<=",
        (1.025, None),
    ),
    Key(
        "padded_step_vs_input_fusion",
        "a whole step on rows with 3/8 padding and masks, source states kept, over input-level fusion's on the same "
        "rows, joined without their pads",
        _over(_PADDED, "flare", "input-fusion"),
    ),
    Key(
        "graphed_step_vs_lora",
        "a whole step in a CUDA graph, source states kept, over plain LoRA's in a CUDA graph",
        _over("step", "flare-captured", "lora-captured"),
    ),
)
#: Further numbers, under the key "beside" of the summary.
OTHER_KEYS = (
    Key(
        "warm_step_vs_lora",
        "a whole step with every source row in a cache on the device, over plain LoRA's",
        _over("step", "flare-warm", "lora"),
        "<=",
        (1.05, 1.05),
    ),
    Key(
        "warm_step_vs_input_fusion",
        "the same over input-level fusion's at 2m",
        _over("step", "flare-warm", "input-fusion"),
        "<=",
        (0.55, 0.55),
    ),
    Key(
        "recompute_step_vs_lora",
        "a whole step with the source recomputed in backward, over plain LoRA's",
        _over("step", "flare-recompute", "lora"),
    ),
    Key(
        "recompute_peak_vs_lora",
        "its peak memory over plain LoRA's",
        _counter("step", "peak_bytes", "flare-recompute", "lora"),
        "<=",
        (1.1, 1.1),
    ),
    Key(
        "captured_wall_vs_busy",
        "a captured step, source states kept: wall time over device-busy time",
        _wall_over_busy("flare-captured"),
        "<=",
        (1.15, 1.15),
    ),
    Key(
        "step_vs_eager_sdpa",
        "a whole eager step, source states kept, over FLARE on PEFT's layers with fused attention",
        _over("step", "flare", "eager-sdpa"),
        "<=",
        (1.0, 1.0),
    ),
    Key(
        "offload_step_vs_lora",
        "a whole step with the source states in host memory, over plain LoRA's",
        _over("step", "flare-offload", "lora"),
    ),
    Key("adapter_alone_over_floor", "the adapters' node alone, measured directly, over its own floor", _adapter_alone),
    Key(
        "decode_launches",
        "kernels of one block's adapters while decoding",
        lambda rows, family: float(_row(rows, family, "decode", "flare")["counters"]["launches"]),
        "<=",
        (2, 2),
    ),
)


def headline_rows(loaded: list[dict[str, Any]]) -> Rows:
    """Return the rows that the summary uses, by (question/family, variant)."""
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
        ValueError: there are no files, or they are of different sources or devices.
    """
    if not loaded:
        raise ValueError("no result files were given")
    for name in ("sources", "device"):
        values = {result["run"][name] for result in loaded}
        if len(values) > 1:
            raise ValueError(f"the result files are of different runs: {name} {sorted(values)}")
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
        "note": "" if judged else "stand-in sizes or no GPU: these numbers say nothing about the targets",
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
    """Return for each case the largest IQR / median of its rows. Smaller differences are noise."""
    spread: dict[str, float] = {}
    for row in rows.values():
        relative = (row["q75_s"] - row["q25_s"]) / row["median_s"]
        spread[row["case"]] = round(max(spread.get(row["case"], 0.0), relative), 4)
    return spread


def main(arguments: list[str] | None = None) -> None:
    """Read result files, write the summary, and print which targets are met."""
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
