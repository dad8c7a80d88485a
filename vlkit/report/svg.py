"""Drawing: a figure as SVG for the page, in the reader's light or dark colours, and as PNG for elsewhere."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vlkit.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What the page's style sheet sets anew, by theme. Models differ by shape or line as well as by colour.
INK, FAINT, TUNED, BASE, THIRD = "#1b1f24", "#9aa1ab", "#0b6e99", "#b35c00", "#7a3e9d"
VARIABLES = {INK: "--ink", FAINT: "--faint", TUNED: "--tuned", BASE: "--base", THIRD: "--third"}
COLOURS = {"tuned": TUNED, "base": BASE}
NAMES = {"tuned": "tuned", "base": "untouched"}
LINES = {"tuned": "-", "base": "--"}
MARKERS = {"tuned": "o", "base": "s"}
WIDTH, HEIGHT = 5.2, 3.1
PNG_DPI = 150
FURTHER_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans"),
    *("Noto Sans Devanagari", "Noto Sans Thai", "Nirmala UI", "Noto Sans", "Arial Unicode MS"),
)


@dataclass(frozen=True)
class Plot:
    """A figure, drawn.

    Attributes:
        name: of its PNG file, without suffix.
        title: what it shows.
        told: the same for whoever cannot see it.
        svg: for the page.
        png: for elsewhere.
    """

    name: str
    title: str
    told: str
    svg: str
    png: bytes

    def write(self, folder: Path) -> None:
        """Write the PNG file."""
        with atomic_file(folder / f"{self.name}.png") as aside:
            aside.write_bytes(self.png)


def plot(
    name: str, title: str, told: str, draw: Callable[[Axes], None], *, width: float = WIDTH, height: float = HEIGHT
) -> Plot:
    """Draw one pair of axes."""
    with _style(name):
        figure = _figure(width, height)
        draw(figure.add_subplot())
        return _rendered(figure, name, title, told)


def legend_below(axes: Axes) -> None:
    """The legend below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))


@contextmanager
def _style(name: str) -> Iterator[None]:
    import matplotlib

    settings = {
        "svg.fonttype": "none",  # Text stays text: it can be read aloud, and searched.
        "svg.hashsalt": name,
        "text.parse_math": False,  # A class may be called $x$.
        "font.size": 10,
        "font.family": ["DejaVu Sans", *_further_fonts()],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.alpha": 0.35,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.rc_context(settings):
        yield


@cache
def _further_fonts() -> list[str]:
    """Fonts of this system for the scripts that DejaVu, which comes with matplotlib, does not have."""
    from matplotlib import font_manager

    known = set(font_manager.get_font_names())
    return [name for name in FURTHER_FONTS if name in known]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _rendered(figure: Figure, name: str, title: str, told: str) -> Plot:
    png, svg = io.BytesIO(), io.StringIO()
    with warnings.catch_warnings():
        # A letter that no font here has is a box in the PNG; the page has the browser's fonts.
        warnings.filterwarnings("ignore", "Glyph")
        # Where everything goes is found once, and is then the same in both.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        figure.savefig(png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Plot(name, title, told, _inline(svg.getvalue(), name), png.getvalue())


def _inline(svg: str, name: str) -> str:
    """An SVG that stands in a page: no prolog, names of its own, the page's colours, as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r'\1aria-hidden="true" focusable="false"', svg, count=1)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
