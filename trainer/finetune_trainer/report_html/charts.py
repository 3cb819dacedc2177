"""The pictures of report.html: SVG with its text as text, in the colours of the page, the same for the same figures."""

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# What matplotlib paints with stands for a colour of the page, which has others in the dark.
_COLOURS = {"#010101": "--ink", "#020202": "--faint", "#030303": "--one", "#040404": "--two", "#050505": "--line"}
_INK, _FAINT, _ONE, _TWO, _LINE = _COLOURS
_WIDTH_IN, _DPI = 8.0, 72
_STYLE: Any = {"svg.fonttype": "none", "font.size": 11, "text.color": _INK, "axes.labelcolor": _FAINT}
_BEFORE_SVG = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>\s*", re.DOTALL)
_GROUP_ID = re.compile(r'<g id="[^"]*"')
_FONT = re.compile(r"font(-family)?: ([0-9.]+px )?[^;\"]*'DejaVu Sans'[^;\"]*")
_SIZE = re.compile(r'<svg [^>]*?(view[B]ox="[^"]*")[^>]*>')


class Bar(NamedTuple):
    """A bar with what it stands for: `kept` of it in the first colour, `lost` behind that in the second."""

    label: str
    kept: float
    lost: float = 0.0
    said: str = ""  # beside it


def bars(title: str, given: Sequence[Bar]) -> Markup:
    """Return horizontal bars, one below the other. title: for those who hear the page."""
    figure, axes = _figure(0.34 * len(given) + 0.2)
    places = range(len(given))
    axes.barh(places, [bar.kept for bar in given], height=0.62, color=_ONE)
    lefts = [bar.kept for bar in given]
    axes.barh(places, [bar.lost for bar in given], left=lefts, height=0.62, color=_TWO)
    longest = max([bar.kept + bar.lost for bar in given], default=0.0) or 1.0
    for place, bar in enumerate(given):
        axes.text(bar.kept + bar.lost + longest * 0.012, place, bar.said, va="center", color=_INK)
    axes.set_yticks(list(places), [bar.label for bar in given], color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.35)  # room for what is said beside the longest
    axes.xaxis.set_visible(False)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    figure.subplots_adjust(left=0.26, right=0.99, top=0.98, bottom=0.0275)
    return _svg(figure, title)


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[float], unit: str, marks: dict[str, float]
) -> Markup:
    """Return how many there are of each size. edges: one more than counts; marks: sizes to point at, by their name."""
    figure, axes = _figure(2.8)
    axes.bar(edges[:-1], counts, width=[b - a for a, b in pairwise(edges)], align="edge", color=_ONE)
    top = max([*counts, 1])
    for step, (name, at) in enumerate(sorted(marks.items(), key=lambda mark: mark[1])):
        axes.axvline(at, color=_TWO, linewidth=1.2)
        axes.annotate(
            f"{name} {at:,.0f}", (at, top * (1.14 - 0.11 * (step % 3))), xytext=(4, 0), textcoords="offset points",
            color=_INK, fontsize=10,
        )  # fmt: skip
    axes.set_ylim(0, top * 1.24)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_thousands))
    axes.tick_params(colors=_FAINT, length=0)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    figure.subplots_adjust(left=0.09, right=0.97, top=0.97, bottom=0.2)
    return _svg(figure, title)


def _thousands(value: float, _place: int) -> str:
    return f"{value:,.0f}"


def _figure(height_in: float) -> tuple[Figure, Any]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=_DPI)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure, title: str) -> Markup:
    """Return the figure for a page: without a head of its own, ids that others have too, and fonts and colours."""
    written = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure.savefig(written, format="svg", metadata={"Date": None}, transparent=True)
    text = _METADATA.sub("", _BEFORE_SVG.sub("", written.getvalue()))
    text = _FONT.sub(lambda found: f"font: {found[2] or '11px '}var(--font)", _GROUP_ID.sub("<g", text))
    for painted, name in _COLOURS.items():
        text = text.replace(painted, f"var({name})")
    label = escape(title)
    return Markup(_SIZE.sub(rf'<svg role="img" aria-label="{label}" \1>', text, count=1))
