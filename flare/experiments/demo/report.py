"""Write the output of a demo run: results.json, run.json, a table (printed and as Markdown) and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..utils.atomic_files import replacing, write_json
from ..utils.escape import markdown
from ..utils.extra import INSTALL
from ..utils.result_folders import check_writable, move_earlier
from .demo_settings import DemoError

RESULTS, RUN, TABLE, FIGURE = "results.json", "run.json", "table.md", "results.png"
FILES = (RESULTS, RUN, TABLE, FIGURE)
_NAMES = {"zero-shot": "zero-shot", "lora": "LoRA", "input-fusion": "input-level fusion", "flare": "FLARE"}
_COLORS = {"zero-shot": "#9a9a9a", "lora": "#5b8db8", "input-fusion": "#e0a030", "flare": "#b8403a"}


# --- folder -----------------------------------------------------------------------------------------------------------


def prepare_folder(folder: Path) -> None:
    """Create the output folder and check that it is writable.

    Raises:
        DemoError: the folder cannot be created or written to.
    """
    try:
        check_writable(folder)
    except OSError as error:
        raise DemoError(f"--output {folder}: cannot be written to ({error}); name another folder") from error


def move_earlier_results(folder: Path, overwrite: bool, print_fn: Callable[[str], None]) -> None:
    """Move the results in a folder to its sub-folder `earlier-N`. If `overwrite`, delete them instead."""
    existing = [folder / name for name in FILES if (folder / name).exists()]
    if overwrite or not existing:
        for path in existing:
            path.unlink()
        return
    earlier = move_earlier(existing, folder)
    print_fn(f"Output: the earlier results in {folder} were moved to {earlier} (--overwrite deletes them)")


# --- summary ----------------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a dict per method and source, with macro F1 (mean, standard deviation) and median costs over the seeds."""
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row.get("source")), []).append(row)
    lines = []
    for (method, source), members in groups.items():
        scores = [row["macro_f1"] for row in members]
        line: dict[str, Any] = {
            "method": method,
            "source": source,
            "fusion": members[0].get("fusion"),
            "scores": scores,
            "mean": statistics.fmean(scores),
            "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        }
        for cost in ("seconds_per_step", "peak_bytes", "saved_bytes"):
            values = [row[cost] for row in members if row[cost] is not None]
            line[cost] = statistics.median(values) if values else None
        lines.append(line)
    return sorted(lines, key=lambda line: (line["source"] == "noisy", list(_NAMES).index(line["method"])))


_HEAD = ("method", "source", "macro F1", "ms/step", "peak memory", "saved for backward")


def _cells(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = []
    for line in lines:
        spread = "" if line["spread"] is None else f" ± {line['spread']:.1f}"
        name = _NAMES[line["method"]] + (f" ({line['fusion']})" if line["fusion"] else "")
        seconds = line["seconds_per_step"]
        cells.append(
            (
                name,
                line["source"] or "-",
                f"{line['mean']:.1f}{spread}",
                "-" if seconds is None else f"{1000 * seconds:.1f}",
                _mebibytes(line["peak_bytes"]),
                _mebibytes(line["saved_bytes"]),
            )
        )
    return cells


def _mebibytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table as plain text."""
    cells = [_HEAD, *_cells(summarize(rows))]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEAD))]

    def show(line: Sequence[str]) -> str:
        left = [line[i].ljust(widths[i]) for i in range(2)]
        right = [line[i].rjust(widths[i]) for i in range(2, len(line))]
        return "  ".join([*left, *right]).rstrip()

    return "\n".join([show(cells[0]), "  ".join("-" * width for width in widths), *map(show, cells[1:])])


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    body = ["| " + " | ".join(map(markdown, line)) + " |" for line in (_HEAD, *_cells(summarize(rows)))]
    return "\n".join([body[0], "|---|---|---:|---:|---:|---:|", *body[1:]])


def legend(run_info: dict[str, Any]) -> str:
    """Return the caption of the table: what it shows, and which rows may be compared."""
    settings, languages, sizes = run_info["settings"], run_info["languages"], run_info["sizes"]
    source, target = languages["source"], languages["target"]
    count = len(run_info["seeds"])
    over = f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed"
    base = statistics.fmean(run_info["source_macro_f1"])
    lines = [
        f"Macro F1 in percent on {sizes['test']} held-out {target} sentences, {over}.",
        'Compare only rows with the same source. Rows with the source "-" read only the '
        f"{target} text at prediction time; the other rows also read the {source} text of the same sentence.",
        f"All rows start from the same base, fine-tuned on {source}, with the same seeds. Given the {source} text "
        f"alone, this base reaches {base:.1f}.",
        f"Adapters: r={settings['r']}, alpha={settings['alpha']:g}, {settings['epochs']} epochs over "
        f"{sizes['train']} rows, batch {settings['batch_size']}, lr {settings['lr']:g}, texts padded to "
        f"{settings['max_length']} tokens "
        f"(input-level fusion: {2 * settings['max_length']}).",
    ]
    if settings["noise"]:
        lines.append(
            f"Source: gold is the unchanged {source} text; in a noisy source, {100 * settings['noise']:g} % of the "
            "words are dropped or replaced, in training and at prediction time."
        )
    lines.append(
        "Peak memory: the most bytes of tensors allocated during a training step, weights included. "
        "Saved for backward: activations that autograd keeps."
    )
    return "\n".join(lines)


# --- end of a run -----------------------------------------------------------------------------------------------------


def finish(
    folder: Path, rows: Sequence[dict[str, Any]], run_info: dict[str, Any], print_fn: Callable[[str], None]
) -> None:
    """Write the files of a finished run and print the table."""
    write_json(folder / RESULTS, list(rows))
    write_json(folder / RUN, run_info)
    languages = [markdown(run_info["languages"][which]) for which in ("source", "target")]
    heading = f"# flare demo: {' to '.join(languages)}"
    note = "\n\n".join(map(markdown, legend(run_info).splitlines()))
    with replacing(folder / TABLE) as file:
        file.write(f"{heading}\n\n{markdown_table(rows)}\n\n{note}\n")
    print_fn("")
    print_fn(text_table(rows))
    print_fn("")
    print_fn(legend(run_info))
    print_fn("")
    try:
        draw(folder / FIGURE, rows, run_info)
        written: Sequence[str] = FILES
    except ImportError:
        print_fn(f"No figure: matplotlib is not installed. Install it with: {INSTALL}")
        written = FILES[:-1]
    print_fn(f"Written to {folder}: {', '.join(written)} ({run_info['duration_s']:.0f} s)")


def draw(path: Path, rows: Sequence[dict[str, Any]], run_info: dict[str, Any]) -> None:
    """Draw the macro F1 and the costs of the methods, and save the figure as `path`.

    Costs are drawn for trained methods only, without the rows of the noisy source.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    lines = summarize(rows)
    costly = [line for line in lines if line["seconds_per_step"] is not None and line["source"] != "noisy"]
    height = 1.9 + 0.42 * len(lines)
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, width_ratios=(1.35, 1))
    quality = figure.add_subplot(grid[:, 0])
    names = [_label(line) for line in lines]
    patch = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for index, line in enumerate(lines):
        noisy = line["source"] == "noisy"
        color = _COLORS[line["method"]]
        quality.barh(
            index,
            line["mean"],
            color=color,
            alpha=0.45 if noisy else 0.9,
            height=0.66,
            hatch="///" if noisy else None,
            edgecolor="white" if noisy else color,
        )
        quality.plot(line["scores"], [index] * len(line["scores"]), "o", color="black", markersize=3.5, zorder=3)
        quality.text(
            max(line["mean"], *line["scores"]) + 1.8, index, f"{line['mean']:.1f}", va="center", fontsize=9, bbox=patch
        )
    base = statistics.fmean(run_info["source_macro_f1"])
    quality.axvline(base, color="black", linewidth=0.9, linestyle=":")
    quality.annotate(
        f"base on {run_info['languages']['source']}: {base:.1f}",
        (base, -0.62),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
    )
    quality.set_yticks(range(len(lines)), names)
    quality.set_ylim(len(lines) - 0.4, -0.95)
    quality.set_xlim(0, 112)
    quality.set_xticks(range(0, 101, 20))
    quality.set_xlabel("macro F1 (%)   bar: mean, dots: seeds")
    quality.set_title(f"Quality on {run_info['languages']['target']}", fontsize=11, loc="left")
    costs = (
        ("seconds_per_step", 1e3, "ms per training step (median)"),
        ("peak_bytes", 2.0**-20, "peak memory (MiB)"),
        ("saved_bytes", 2.0**-20, "saved for backward (MiB)"),
    )
    for position, (key, scale, title) in enumerate(costs):
        axes = figure.add_subplot(grid[position, 1])
        values = [scale * line[key] for line in costly]
        axes.barh(
            range(len(costly)), values, color=[_COLORS[line["method"]] for line in costly], alpha=0.9, height=0.66
        )
        for index, value in enumerate(values):
            axes.text(value, index, f" {value:.1f}", va="center", fontsize=8)
        axes.set_yticks(range(len(costly)), [_NAMES[line["method"]] for line in costly], fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * max(values, default=1.0))
        axes.set_title(title, fontsize=9, loc="left")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    settings, count = run_info["settings"], len(run_info["seeds"])
    figure.suptitle(
        f"{run_info['languages']['source']} → {run_info['languages']['target']}: r={settings['r']}, "
        f"{settings['epochs']} epochs, {count} seed{'s' if count > 1 else ''}, {run_info['environment']['device']}",
        fontsize=11,
    )
    for text in figure.findobj(Text):  # show dollar signs in names of languages as they are
        text.set_parse_math(False)
    figure.savefig(path, dpi=130)


def _label(line: dict[str, Any]) -> str:
    return _NAMES[line["method"]] + f"\n{line['source'] or 'no'} source"
