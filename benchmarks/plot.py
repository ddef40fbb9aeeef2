"""Make tables and figures from result files.

    python benchmarks/plot.py results.json [more.json ...] [--output FOLDER]

Without --output, the script prints what each method costs. With --output, it writes table.md and the figures for which
the files have rows: steps.png (time and memory of a step), scaling.png (time and memory for several text lengths m),
roofline.png (speed of each kernel and limits of the device) and parts.png (time of the parts of a step). The table
shows every row, including rows in which this package is slower, and skipped rows with the reason. The caption of a
figure gives device, versions, commit, date and conditions.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import results
from costs import costs, label, name_of
from tables import caption, table

Row = dict[str, Any]

#: Colours of the methods (Okabe and Ito's palette, which colour-blind readers can distinguish).
COLOURS = {
    "flare": "#0072B2",
    "flare-warm": "#009E73",
    "flare-recompute": "#F0E442",
    "flare-offload": "#000000",
    "lora": "#56B4E9",
    "input-fusion": "#E69F00",
    "authors": "#D55E00",
    "eager-sdpa": "#CC79A7",
    "peer": "#999999",
}
_PARTS = {"source": "#009E73", "forward": "#56B4E9", "backward": "#0072B2", "optimizer": "#999999"}
_MARKERS = {"shrink": "o", "expand": "s", "grad_bottleneck": "^", "grad_weight": "D", "grad_input": "v"}


# --- figures ----------------------------------------------------------------------------------------------------------


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
        }
    )
    return plt


def _save(figure: Any, path: Path, caption_text: str) -> None:
    """Save a figure with a caption under its axes. The caption is wrapped to the width of the figure."""
    width = int(figure.get_figwidth() * 15.5)
    lines = textwrap.wrap(caption_text, width)
    height = 0.17 * (len(lines) + 1) / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, height, 1, 1 - height))
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=7.5, color="#444444", va="bottom")
    figure.savefig(path, dpi=150)


def along_m(rows: list[Row]) -> dict[str, list[Row]]:
    """Return, for each model, the timed rows of the question "scaling" in which only the text length m varies.

    Models that were timed at a single m are left out.
    """
    timed = [row for row in rows if row["status"] == "timed" and row["question"] == "scaling"]
    by_model: dict[str, list[Row]] = {}
    for row in timed:
        by_model.setdefault(row["model"], []).append(row)
    for model, model_rows in by_model.items():
        first = model_rows[0]  # the first case is the base case, in which nothing is varied
        by_model[model] = [
            r
            for r in model_rows
            if all(r["shape"][key] == first["shape"][key] for key in ("B", "r", "precision"))
            and r["depth"] == first["depth"]
        ]
    return {model: varied for model, varied in by_model.items() if len({row["shape"]["m"] for row in varied}) > 1}


def draw_scaling(run: dict[str, Any], rows: list[Row], path: Path) -> bool:
    """Draw time per step and peak memory against m, with one column per model. Return whether there were rows."""
    models = along_m(rows)
    if not models:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(
        2, len(models), figsize=(max(6.4, 4.8 * len(models)), 6.6), squeeze=False, sharex="col", layout="constrained"
    )
    for column, (model, model_rows) in enumerate(models.items()):
        first = model_rows[0]
        for method in reversed(COLOURS):  # this package is drawn last, so that it is on top
            line = sorted((r for r in model_rows if r["variant"] == method), key=lambda r: r["shape"]["m"])
            if not line:
                continue
            lengths = [r["shape"]["m"] for r in line]
            style = {"color": COLOURS[method], "marker": "o", "markersize": 4, "label": label(method)}
            low = [1e3 * (r["median_s"] - r["q25_s"]) for r in line]
            high = [1e3 * (r["q75_s"] - r["median_s"]) for r in line]
            axes[0][column].errorbar(lengths, [1e3 * r["median_s"] for r in line], [low, high], capsize=2, **style)
            axes[1][column].plot(lengths, [r["counters"]["peak_bytes"] / 2**20 for r in line], **style)
        axes[0][column].set_title(
            f"{model}, B = {first['shape']['B']}, depth {first['depth']}, r = {first['shape']['r']}"
        )
        axes[1][column].set_xlabel("m, tokens of each text")
        for axis in (axes[0][column], axes[1][column]):
            axis.set_xscale("log", base=2)
            ticks = sorted({r["shape"]["m"] for r in model_rows})
            axis.set_xticks(ticks, [str(m) for m in ticks])
            axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("ms per step (median, quartiles)")
    axes[1][0].set_ylabel("peak memory, MiB")
    handles, labels = axes[0][0].get_legend_handles_labels()
    columns = 3 if axes.shape[1] > 1 else 2
    figure.legend(handles[::-1], labels[::-1], fontsize=8, ncols=columns, loc="outside upper center")
    _save(figure, path, caption(run, [r["conditions"] for model_rows in models.values() for r in model_rows]))
    plt.close(figure)
    return True


def draw_roofline(run: dict[str, Any], rows: list[Row], path: Path) -> bool:
    """Draw FLOP/s against FLOP per byte of each kernel, and the device's limits, which the same run measured.

    Return whether there were rows.
    """
    timed = [r for r in rows if r["question"] == "kernels" and r["status"] == "timed" and r["headline"]]
    if not timed or "ceilings" not in run:
        return False
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7.2, 5.2), layout="constrained")
    bandwidth, rate = run["ceilings"]["copy_bytes_per_s"], run["ceilings"]["matmul_flops_per_s"]
    intensities = [r["flops"] / r["floor_bytes"] for r in timed]
    left, right = min([*intensities, rate / bandwidth]) / 2, max([*intensities, rate / bandwidth]) * 2
    ridge = rate / bandwidth
    giga = 1e9
    axis.plot([left, ridge, right], [left * bandwidth / giga, rate / giga, rate / giga], color="black", linewidth=1.2)
    axis.annotate(
        f"copy {bandwidth / giga:,.0f} GB/s, matrix product {rate / giga:,.0f} GFLOP/s",
        (right, rate / giga),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
    )
    for row, intensity in zip(timed, intensities, strict=True):
        ours = row["variant"] == "flare"
        colour = COLOURS["flare" if ours else "peer"]
        axis.scatter(
            intensity,
            row["flops"] / row["median_s"] / giga,
            marker=_MARKERS[row["shape"]["primitive"]],
            s=48,
            facecolors=colour if row["family"] == "llama" else "none",
            edgecolors=colour,
            linewidths=1.4,
            zorder=3,
        )
    handles = [
        plt.Line2D([], [], marker=mark, linestyle="", color="#333333", label=name) for name, mark in _MARKERS.items()
    ]
    handles += [
        plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[name], label=label)
        for name, label in (("flare", "Triton kernel"), ("peer", "PyTorch form"))
        if any(r["variant"] == name for r in timed)
    ]
    handles += [
        plt.Line2D([], [], marker="o", linestyle="", color="#333333", label=timed_model(timed, True)),
        plt.Line2D([], [], marker="o", linestyle="", mfc="none", color="#333333", label=timed_model(timed, False)),
    ]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlim(left, right)
    axis.set_ylim(top=2 * rate / giga)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(lambda value, _: f"{value:,.4g}")
        side.set_minor_formatter(lambda value, _: "")
    axis.set_xlabel("FLOP per byte that must move")
    axis.set_ylabel("GFLOP/s")
    axis.set_title("Speed of each kernel, and the limits of the device")
    axis.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path, caption(run, [*(r["conditions"] for r in timed), run["ceilings"]["conditions"]]))
    plt.close(figure)
    return True


def timed_model(rows: list[Row], llama: bool) -> str:
    """Return the legend text for the filled marks (Llama models, if ``llama``) or the hollow marks (other models)."""
    names = dict.fromkeys(r["model"] for r in rows if (r["family"] == "llama") == llama)
    return f"{', '.join(names) or '-'} ({'filled' if llama else 'hollow'})"


def _bars(plt: Any, groups: list[list[Row]]) -> tuple[Any, Any]:
    """Return a figure and its axes, one per group of rows. Each row has a label and space for a horizontal bar."""
    heights = [len(group) for group in groups]
    size = (8.0, 1.6 + 0.7 * len(groups) + 0.24 * sum(heights))
    figure, axes = plt.subplots(
        len(groups), 1, figsize=size, squeeze=False, layout="constrained", gridspec_kw={"height_ratios": heights}
    )
    for axis, group in zip(axes[:, 0], groups, strict=True):
        axis.set_yticks(range(len(group)), [name_of(r).partition(" (")[0] for r in group], fontsize=8.5)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.12)
        shape = group[0]["shape"]
        padded = ", padded rows" if shape.get("padded") else ""
        title = f"{group[0]['model']}, {group[0]['depth']} blocks, B = {shape['B']}, m = {shape['m']}, r = {shape['r']}"
        axis.set_title(title + padded, fontsize=10)
    return figure, axes[:, 0]


def _label_bar(axis: Any, text: str, end: float, place: int) -> None:
    """Write a text to the right of a bar."""
    axis.annotate(text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def draw_steps(run: dict[str, Any], rows: list[Row], path: Path) -> bool:
    """Draw the wall time of each method's step, with the device's busy time and peak memory.

    Return whether there were rows.
    """
    timed = [r for r in rows if r["question"] == "step" and r["headline"] and r["status"] == "timed"]
    cases = list(dict.fromkeys(r["case"] for r in timed))
    if not cases:
        return False
    plt = _pyplot()
    groups = [[r for r in timed if r["case"] == case] for case in cases]
    figure, axes = _bars(plt, groups)
    on_device = False
    for axis, group in zip(axes, groups, strict=True):
        for place, row in enumerate(group):
            counters, wall = row.get("counters", {}), 1e3 * row["wall_median_s"]
            axis.barh(place, wall, color=COLOURS["lora"])
            if busy := counters.get("device_busy_s"):
                on_device = True
                axis.barh(place, min(1e3 * busy, wall), color=COLOURS["flare"])
            peak = counters.get("peak_bytes")
            text = f"{wall:.3g} ms" + (f", {peak / 2**30:.3g} GiB" if peak else "")
            _label_bar(axis, text, wall, place)
    axes[-1].set_xlabel("wall time of a step, ms" + (" (dark: the device is busy)" if on_device else ""))
    _save(figure, path, caption(run, [r["conditions"] for r in timed]))
    plt.close(figure)
    return True


def draw_parts(run: dict[str, Any], rows: list[Row], path: Path) -> bool:
    """Draw source pass, forward, backward and optimizer of each method's step as stacked bars.

    Return whether there were rows.
    """
    timed = [r for r in rows if r["question"] == "step" and r["headline"] and "parts_s" in r.get("counters", {})]
    timed = [r for r in timed if r["status"] == "timed"]
    models = list(dict.fromkeys(r["model"] for r in timed))
    if not models:
        return False
    plt = _pyplot()
    groups = [[r for r in timed if r["model"] == model] for model in models]
    figure, axes = _bars(plt, groups)
    for axis, group in zip(axes, groups, strict=True):
        for place, row in enumerate(group):
            left = 0.0
            for part, colour in _PARTS.items():
                width = 1e3 * row["counters"]["parts_s"][part]
                axis.barh(place, width, left=left, color=colour, label=part if place == 0 else None)
                left += width
            _label_bar(axis, f"{left:.3g}", left, place)
    axes[-1].set_xlabel("ms per part of a step (device synchronised before and after each part)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _PARTS.values()]
    figure.legend(handles, ["source pass", "forward", "backward", "optimizer"], ncols=4, loc="outside upper center")
    _save(figure, path, caption(run, [r["conditions"] for r in timed]))
    plt.close(figure)
    return True


def draw_all(loaded: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write the table and every figure that has rows; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    run = loaded[0]["run"]
    rows = [row for result in loaded for row in result["cases"]]
    written = [folder / "table.md"]
    written[0].write_text(table(run, rows))
    figures = {
        "steps.png": draw_steps,
        "scaling.png": draw_scaling,
        "roofline.png": draw_roofline,
        "parts.png": draw_parts,
    }
    for name, draw in figures.items():
        if draw(run, rows, folder / name):
            written.append(folder / name)
    return written


def main(arguments: list[str] | None = None) -> None:
    """Read result files; print what each method costs, or write table and figures."""
    parser = argparse.ArgumentParser(description="Table and figures from benchmark results.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="folder for table and figures (default: print the costs)")
    args = parser.parse_args(arguments)
    loaded = [results.load(path) for path in args.results if path.exists()]
    if args.output is None:
        print(costs([row for result in loaded for row in result["cases"]]))
        return
    for path in draw_all(loaded, args.output):
        print(path)


if __name__ == "__main__":
    main()
