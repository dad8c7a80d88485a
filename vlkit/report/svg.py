"""Draw a figure as SVG for the page, in the reader's light or dark colours, and as PNG for other uses."""

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

# The page's style sheet replaces these colours by theme. Models also differ by marker and line, not only by colour.
INK, FAINT, TUNED, BASE, THIRD = "#1b1f24", "#9aa1ab", "#0b6e99", "#b35c00", "#7a3e9d"
CSS_VARIABLES = {INK: "--ink", FAINT: "--faint", TUNED: "--tuned", BASE: "--base", THIRD: "--third"}
MODEL_COLOURS = {"tuned": TUNED, "base": BASE}
MODEL_NAMES = {"tuned": "tuned", "base": "untouched"}
MODEL_LINES = {"tuned": "-", "base": "--"}
MODEL_MARKERS = {"tuned": "o", "base": "s"}
WIDTH, HEIGHT = 5.2, 3.1
PNG_DPI = 150
# Fonts for scripts that DejaVu, which comes with matplotlib, does not cover.
FALLBACK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans"),
    *("Noto Sans Devanagari", "Noto Sans Thai", "Nirmala UI", "Noto Sans", "Arial Unicode MS"),
)


@dataclass(frozen=True)
class Plot:
    """A drawn figure.

    Attributes:
        name: name of its PNG file, without suffix.
        title: what it shows.
        alt_text: what it shows, for readers who cannot see it.
        svg: for the page.
        png: content of the PNG file.
    """

    name: str
    title: str
    alt_text: str
    svg: str
    png: bytes

    def write(self, folder: Path) -> None:
        """Write the PNG file."""
        with atomic_file(folder / f"{self.name}.png") as path:
            path.write_bytes(self.png)


def draw_plot(
    name: str, title: str, alt_text: str, draw: Callable[[Axes], None], *, width: float = WIDTH, height: float = HEIGHT
) -> Plot:
    """Draw one pair of axes."""
    with _style(name):
        figure = _figure(width, height)
        draw(figure.add_subplot())
        return _render(figure, name, title, alt_text)


def legend_below(axes: Axes) -> None:
    """Put the legend below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))


@contextmanager
def _style(name: str) -> Iterator[None]:
    import matplotlib

    settings = {
        "svg.fonttype": "none",  # Text stays text: it can be searched and read aloud.
        "svg.hashsalt": name,
        "text.parse_math": False,  # A class may be named $x$.
        "font.size": 10,
        "font.family": ["DejaVu Sans", *_fallback_fonts()],
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
def _fallback_fonts() -> list[str]:
    """Return the fallback fonts that this system has."""
    from matplotlib import font_manager

    known = set(font_manager.get_font_names())
    return [name for name in FALLBACK_FONTS if name in known]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _render(figure: Figure, name: str, title: str, alt_text: str) -> Plot:
    png, svg = io.BytesIO(), io.StringIO()
    with warnings.catch_warnings():
        # A glyph that no font here has is a box in the PNG; the page uses the fonts of the browser.
        warnings.filterwarnings("ignore", "Glyph")
        # The layout is computed once, so that it is the same in both formats.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        figure.savefig(png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Plot(name, title, alt_text, _to_inline(svg.getvalue(), name), png.getvalue())


def _to_inline(svg: str, name: str) -> str:
    """Turn an SVG file into an element of a page: no prolog, unique ids, the page's colours, its parent's width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r'\1aria-hidden="true" focusable="false"', svg, count=1)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
