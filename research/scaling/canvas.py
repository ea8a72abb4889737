# SPDX-License-Identifier: Apache-2.0
"""What every picture is drawn with: one style, PNG and SVG from one drawing, points that tell their run.

Ordered things (budgets, sizes) are told apart by one colour scale that stays readable to colour-blind readers and in
grey (viridis) and by markers; single series use the palette of Okabe and Ito (2008) and differ in line style too.
Figures are drawn without pyplot, so no display and no global state are touched.
"""

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from research.scaling.ladder import short_count

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
GREY, BEYOND = "#777777", "#F1F1F1"
MARKERS = "osD^vP*X<>"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
}
Draw = Callable[[Any], None]
Pictures = Mapping[str, bytes]  # by format: "png", "svg"


def picture(draw: Draw, *, name: str, width: float = 7.2, height: float = 4.8) -> Pictures:
    """One panel; ``draw`` is handed the axes. Sizes in inches."""
    return panels([draw], name=name, columns=1, width=width, height=height)


def panels(draws: Sequence[Draw], *, name: str, columns: int, width: float, height: float, title: str = "") -> Pictures:
    """Several panels in one picture, row by row, as PNG and SVG; width and height of the whole in inches. name: told
    apart from other pictures of one page by it."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        figure.lab_titles = {}  # what each point says: filled in by ``point``
        rows = math.ceil(len(draws) / columns)
        for index, draw in enumerate(draws):
            draw(figure.add_subplot(rows, columns, index + 1))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.set_layout_engine("none")  # the SVG lies as the PNG does: laying out takes half of the time
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return {"png": png.getvalue(), "svg": _told(svg.getvalue(), figure.lab_titles, name).encode()}


def point(axes: Any, x: float, y: float, marker: str, *, says: str, **style: Any) -> None:
    """One marker which says something when a pointer rests on it, in SVG."""
    titles = getattr(axes.figure, "lab_titles", {})
    key = f"point-{len(titles)}"
    titles[key] = says
    axes.plot([x], [y], marker, gid=key, **style)


def _told(svg: str, titles: Mapping[str, str], name: str) -> str:
    """The SVG, with its points' words inside, and ids that no other picture has."""

    def with_title(match: re.Match[str]) -> str:
        words = html.escape(titles[match[1]])
        return f'<g id="{name}-{match[1]}" class="run"><title>{words}</title>'

    svg = re.sub(r'<g id="(point-\d+)">', with_title, svg[svg.index("<svg") :])
    # beyond one page's pictures ids are of axes, ticks and glyphs: only what is referred to must differ
    for kind in ('id="', 'xlink:href="#', "url(#"):
        svg = re.sub(rf"{re.escape(kind)}(?!{re.escape(name)}-)", f"{kind}{name}-", svg)
    return svg


def ordered(count: int) -> list[Any]:
    """Colours for ``count`` ordered things; the last, yellow part of the scale is hard to see on white."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](position) for position in np.linspace(0.0, 0.82, max(1, count))][:count]


def log_loss(axes: Any, losses: Sequence[float], *, both: bool = False) -> None:
    """Log scale for losses, with plain numbers at round steps."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(losses) * 0.985, max(losses) * 1.02
    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if (high - low) / s <= 9), 10)
    ticks = [step * k for k in range(1, int(high * 2 / step) + 2)]
    digits = 2 if step < 0.1 else 1
    for name in ("x", "y") if both else ("y",):
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{digits}f}"))
    if not both:
        axes.set_ylim(low, high)


def plain_counts(*sides: Any) -> None:
    """Counts as plain words on axes of sizes and tokens: 1, 2 and 5 of each power of ten, or the powers alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in sides:
        low, high = sorted(axis.get_view_interval())
        decades = math.log10(high / low) if low > 0 else 9
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if decades < 3 else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axis.set_minor_formatter(NullFormatter())


def power(value: float) -> str:
    """1.6e+12 -> "1.6e12"."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def tex(value: float) -> str:
    """A number in TeX, with a power of ten where it is large or small."""
    if 0.01 <= value < 1e5:
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} \\times 10^{{{int(exponent)}}}"
