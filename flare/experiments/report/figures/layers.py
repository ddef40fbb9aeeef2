"""Draw the mean |S| and |T| by block of the model, with one panel per target language.

S and T are the outputs of the adapter's down-projection (the bottleneck) for the source and for the target.
"""

from __future__ import annotations

import re
import statistics
from typing import Any

from ..collect import Entry, ReportError, RunGroup
from ..display import language_names
from .style import COLUMN, NORMAL, PAGE, SMALL, NothingToDraw, caption, legend_below, new_figure, plain_axes

#: Colors of the two streams.
STREAMS = {"S": "#0072B2", "T": "#D55E00"}
_NAMES = {"S": "source S", "T": "target T"}
_STYLES = ("-", "--", ":", "-.")


def layered_labels(group: RunGroup) -> list[str]:
    """Return the labels of lines whose runs measured the bottleneck.

    Lines of other test settings (" @ " in the label) are left out, because they belong to the same runs.
    """
    return [
        label
        for label in group.labels
        if " @ " not in label and any(entry.run.metrics.bottleneck for entry in group.of(label))
    ]


def draw_layers(group: RunGroup, label: str) -> Any:
    """Draw mean |S| and |T| by block, averaged over seeds.

    A band shows the standard deviation over seeds. Each kind of projection has its own line style.
    """
    panels = {one: [e for e in group.of(label, one) if e.run.metrics.bottleneck] for one in group.languages}
    panels = {language: entries for language, entries in panels.items() if entries}
    if not panels:
        raise NothingToDraw("no run measured the bottleneck")
    shown = language_names(panels)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(COLUMN if columns == 1 else PAGE, 0.75 + 1.35 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for axes, (language, entries) in zip(grid.flat, panels.items(), strict=False):
        seeds = [curves(entry) for entry in entries]
        kinds = list(dict.fromkeys(kind for seed in seeds for kind in seed))
        for kind, style in zip(kinds, _STYLES * len(kinds), strict=False):
            members = [seed[kind] for seed in seeds if kind in seed]
            blocks = sorted(set.intersection(*(set(member["S"]) for member in members)))
            for stream, color in STREAMS.items():
                values = [[member[stream][block] for member in members] for block in blocks]
                means = [statistics.fmean(value) for value in values]
                name = f"{_NAMES[stream]}" + (f", {kind}" if len(kinds) > 1 else "")
                dots = {"marker": "o", "markersize": 2} if len(blocks) <= 12 else {}
                handles[name] = axes.plot(blocks, means, style, color=color, linewidth=1.0, **dots)[0]
                if len(members) > 1:
                    wide = [statistics.stdev(value) for value in values]
                    low = [mean - one for mean, one in zip(means, wide, strict=True)]
                    high = [mean + one for mean, one in zip(means, wide, strict=True)]
                    axes.fill_between(blocks, low, high, color=color, alpha=0.18, linewidth=0)
        axes.set_title(shown[language], fontsize=NORMAL)
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain_axes(axes)
    # the limit is set after all panels are drawn, because setting it stops the autoscaling of the shared axes
    grid[0][0].set_ylim(bottom=0)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for column in range(columns):
        lowest = max(row for row in range(rows) if row * columns + column < len(panels))
        grid[lowest][column].set_xlabel("Block", fontsize=NORMAL)
        grid[lowest][column].tick_params(labelbottom=True, labelsize=SMALL)
    for row in grid:
        row[0].set_ylabel("Mean |activation|", fontsize=NORMAL)
    legend_below(figure, list(handles.values()), list(handles))
    count = max(map(len, panels.values()))
    caption(
        figure,
        f"{group.shown_task}, {group.labels[label]}: mean |S| and |T| (source and target) in the bottleneck by block"
        + (f"; bands are ± std over {count} seeds" if count > 1 else ""),
    )
    return figure


def curves(entry: Entry) -> dict[str, dict[str, dict[int, float]]]:
    """Return {kind of projection: {"S" | "T": {block: mean}}} of one run.

    The block is the first number in a layer's name, plus 1. The rest of the name gives the kind: the projection
    ("query" or "value"), preceded by "encoder" or "decoder" if the model has both. A part that all layers share is left
    out, so the kind is "" if there is only one. If a layer's name has no number, the block is the layer's position in
    the list, from 1.

    Raises:
        ReportError: the lists of S, T and layer names are empty or differ in length.
    """
    bottleneck = entry.run.metrics.bottleneck or {}
    source, target = bottleneck.get("S") or [], bottleneck.get("T") or []
    layers = [str(name) for name in bottleneck.get("layers") or range(len(source))]
    if not source or not len(source) == len(target) == len(layers):
        raise ReportError(
            f"{entry.run.folder / 'metrics.json'}: bottleneck has {len(source)} values of S, {len(target)} values of T "
            f"and {len(layers)} layers; expected equally many, and at least one"
        )
    matches = [re.fullmatch(r"(\D*)(\d+)(.*)", name) for name in layers]
    heads = {(match.group(1), match.group(3)) for match in matches if match}
    shown = {head: " ".join(part for part in _distinct(head, heads) if part) for head in heads}
    result: dict[str, dict[str, dict[int, float]]] = {}
    for place, (match, s, t) in enumerate(zip(matches, source, target, strict=True)):
        kind = shown[(match.group(1), match.group(3))] if match else ""
        block = int(match.group(2)) + 1 if match else place + 1
        curve = result.setdefault(kind, {"S": {}, "T": {}})
        curve["S"][block], curve["T"][block] = float(s), float(t)
    return result


def _distinct(head: tuple[str, str], heads: set[tuple[str, str]]) -> tuple[str, str]:
    """Return the stack ("encoder", "decoder") and the projection of a layer. A part that all layers share is ""."""
    stacks, projections = {one[0] for one in heads}, {one[1] for one in heads}
    stack = next((word for word in ("encoder", "decoder") if word in head[0]), head[0]) if len(stacks) > 1 else ""
    return stack, head[1].rpartition(".")[2] if len(projections) > 1 else ""
