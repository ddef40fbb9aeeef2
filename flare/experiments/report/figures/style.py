"""Style and save the figures. Their colors suit color-blind readers (palette of Okabe and Ito).

A figure has no title. Its caption is stored as the matplotlib figure's label, and report.md prints the caption below
the figure.

matplotlib is imported inside the functions, so that without matplotlib a report can be written without figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_COLORS = {
    "zero-shot": "#999999",
    "translate-test": "#444444",
    "lora": "#0072B2",
    "input-fusion": "#E69F00",
    "x-mixup": "#009E73",
    "flare-mt": "#CC79A7",
    "flare": "#D55E00",
    "add_relu": "#D55E00",  # FLARE's default fusion has the color of FLARE
}
_OTHERS = ("#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#E69F00", "#444444")
_HATCHES = (None, "///", "...", "xxx", "\\\\\\", "++")
_MARKERS = "osD^vPX*<>hp"
#: Widths of a column and of a page in the ACL style (and many other two-column styles), in inches.
COLUMN, PAGE = 3.03, 6.30
#: Font sizes in points, for figures that are included at these widths without scaling.
SMALL, NORMAL = 6.5, 7.5
_DPI = 300


class NothingToDraw(Exception):
    """The runs lack the data of a figure; the message says what is missing."""


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of width x height inches, without a window.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path, formats: Iterable[str]) -> list[Path]:
    """Write a figure as path.<format> for every format, and return the paths; equal figures give equal bytes.

    Ids are fixed, dates are left out, and text in PDF and SVG remains text.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    # a dollar sign in a name does not start math; only tick labels that matplotlib wrote (\mathdefault) contain math
    for text in figure.findobj(Text):
        text.set_parse_math(r"\mathdefault" in text.get_text())
    written = []
    figure.draw_without_rendering()  # one layout for all formats
    figure.set_layout_engine("none")
    with rc_context({"svg.hashsalt": "flare", "svg.fonttype": "none", "pdf.fonttype": 42}):
        for kind in formats:
            target = path.with_name(f"{path.name}.{kind}")
            stamp: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
            figure.savefig(target, dpi=_DPI, metadata=stamp)
            written.append(target)
    return written


def caption(figure: Any, text: str) -> None:
    """Set a figure's caption, which :func:`caption_of` returns."""
    figure.set_label(text)


def caption_of(figure: Any) -> str:
    """Return a figure's caption."""
    return str(figure.get_label())


def plain_axes(axes: Any) -> None:
    """Remove the top and right edge of the axes, and thin the other lines.

    Light horizontal grid lines are drawn behind the data.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_linewidth(0.6)
    axes.tick_params(labelsize=SMALL, width=0.6, length=2.5, pad=2)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)


def looks(methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return the color, hatch and marker of each entry of a figure (a bar or a plotted line), given their methods.

    Entries of one method share a color; up to seven of them differ in shade or hatch.
    """
    taken: dict[str, int] = {}
    colors = dict(_COLORS)
    used = {colors[method] for method in methods if method in colors}
    others = itertools.cycle([color for color in _OTHERS if color not in used] or list(_OTHERS))
    styles = []
    for index, method in enumerate(methods):
        if method not in colors:
            colors[method] = next(others)
        color = colors[method]
        repeats = taken.get(color, 0)
        taken[color] = repeats + 1
        shown = color if repeats == 0 else _lighter(color, 0.25 + 0.15 * (repeats % 3))
        hatch = _HATCHES[repeats % len(_HATCHES)]
        styles.append({"color": shown, "hatch": hatch, "marker": _MARKERS[index % len(_MARKERS)]})
    return styles


def _lighter(color: str, share: float) -> str:
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def is_dark(color: str) -> bool:
    """Return whether white letters are easier to read on a color than black letters."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 128


def rows_of(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """Split the items into as few rows of at most `most` items as possible, evenly filled."""
    count = -(-len(items) // most)
    size = -(-len(items) // count)
    return [items[i : i + size] for i in range(0, len(items), size)]


def text_width(text: str, points: float = SMALL) -> float:
    """Return the approximate width of a text in inches."""
    return len(text) * points * 0.0082


def legend_rows(names: Sequence[str], width: float) -> int:
    """Return the number of rows that a legend with these names needs in a figure of `width` inches."""
    longest = max((text_width(name) for name in names), default=1.0)
    return -(-len(names) // max(1, int(width / (longest + 0.38))))


def legend_below(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Add one legend below all axes, with as few rows as the width allows."""
    columns = -(-len(names) // legend_rows(names, figure.get_figwidth()))  # evenly filled rows
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.0,
        handletextpad=0.5,
        borderaxespad=0.2,
    )
