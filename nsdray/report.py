"""Figures that people look at, and the HTML report: one file, no network, for phones and desktops."""
from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nsdray.metrics.bootstrap import Estimate

MARGIN, HEADER = 6, 26
COLOURS = ("#1f6feb", "#d1495b", "#2e8b57", "#b8860b", "#7a4fbf", "#4a5568")  # told apart by people who see no red or green
TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class Cell:
    """What a table shows, and a smaller line below it, such as an interval."""

    text: str
    note: str = ""


def show(estimate: Estimate | None) -> Cell:
    """A mean with its interval, to as many digits (three or more) as the interval's width gives a meaning; a dash for None."""
    if estimate is None:
        return Cell("–")
    width = estimate.high - estimate.low
    n = max(3, 1 - math.floor(math.log10(width))) if width > 0 else 3
    return Cell(f"{estimate.mean:.{n}f}", f"{estimate.low:.{n}f} … {estimate.high:.{n}f}")


@dataclass(frozen=True)
class Row:
    """A line of a table; reference rows (chance, ceiling) stand back."""

    cells: Sequence[Cell]
    reference: bool = False


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Row]
    title: str = ""
    folded: bool = False
    """Shown on a click."""


@dataclass(frozen=True)
class Figure:
    """A picture as PNG, JPEG or SVG bytes."""

    data: bytes
    title: str = ""

    @property
    def uri(self) -> str:
        """The picture itself as an address."""
        if self.data.startswith(b"\x89PNG"):
            kind = "png"
        else:
            kind = "jpeg" if self.data.startswith(b"\xff\xd8") else "svg+xml"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Code:
    """Text as it stands, shown on a click."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    code: Sequence[Code] = field(default=())
    side_by_side: bool = False
    """Figures next to each other where there is room."""


def render(title: str, subtitle: str, sections: Sequence[Section], warning: str = "") -> str:
    """The report as one HTML page with everything in it. warning: a banner, such as that the data are simulated."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(title=title, subtitle=subtitle, sections=sections, warning=warning)


@dataclass(frozen=True)
class Line:
    """One line of a chart, with an optional band around it."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


def line_chart(lines: Mapping[str, Line], x_label: str, y_label: str, ticks: Sequence[str] | None = None) -> bytes:
    """A chart as SVG. ticks: names of the x positions 0, 1, … instead of numbers."""
    canvas, axes = _chart()
    for (name, line), colour in zip(lines.items(), COLOURS * len(lines)):
        axes.plot(line.x, line.y, "--" if line.dashed else "-", color=colour, label=name, marker="o" if ticks else None)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
    if ticks is not None:
        axes.set_xticks(range(len(ticks)), ticks)
    return _finished(canvas, axes, x_label, y_label)


def _chart(height: float = 3.4) -> tuple[Any, Any]:
    """An empty matplotlib figure (height in inches) and its axes; matplotlib's global state stays as it is."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.6, height), layout="constrained")
    FigureCanvasSVG(canvas)
    return canvas, canvas.subplots()


def _finished(canvas: Any, axes: Any, x_label: str, y_label: str) -> bytes:
    """Labels and legend, then the SVG."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return _svg(canvas)


def _svg(canvas: Any) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


@dataclass(frozen=True)
class Dots:
    """Points of one kind, each with a short label."""

    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str]
    hollow: Sequence[bool] = ()
    """Which are drawn as rings; empty: none."""


def dot_chart(
    groups: Mapping[str, Dots], x_label: str, y_label: str, fronts: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> bytes:
    """Labelled points over a logarithmic x axis as SVG. fronts: x and y of lines through the best; the first stands out."""
    canvas, axes = _chart()
    for i, (name, front) in enumerate(fronts.items()):
        style = ("#6b7686", 1.6, "-") if i == 0 else ("#b6bfca", 0.9, ("--", ":", "-.")[i % 3])
        axes.step(*front, where="post", label=name, zorder=1, **dict(zip(("color", "linewidth", "linestyle"), style)))
    for (name, dots), colour in zip(groups.items(), COLOURS * len(groups)):
        faces = ["none" if hollow else colour for hollow in dots.hollow] or colour
        axes.scatter(dots.x, dots.y, s=28, facecolors=faces, edgecolors=colour, zorder=2)
        axes.scatter([], [], s=28, color=colour, label=name)  # the legend's is full
        for x, y, label in zip(dots.x, dots.y, dots.labels):
            axes.annotate(label, (x, y), (4, 3), textcoords="offset points", fontsize=7, color=colour)
    axes.set_xscale("log")
    return _finished(canvas, axes, x_label, y_label)


def heat_map(values: np.ndarray, rows: Sequence[str], x_label: str, label: str) -> bytes:
    """A map as SVG: values (n_rows, n_columns), a name per row. Red is above 0, blue below, white 0. label: of the colours."""
    canvas, axes = _chart(1.2 + 0.3 * len(rows))
    limit = float(np.abs(values).max()) or 1.0
    image = axes.imshow(values, "RdBu_r", aspect="auto", interpolation="nearest", vmin=-limit, vmax=limit)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(x_label)
    canvas.colorbar(image, label=label)
    return _svg(canvas)


def picture_grid(columns: dict[str, np.ndarray], title: str, cell: int = 96, n_columns_side: int = 1) -> Image.Image:
    """A grid with one row per image: columns maps a heading to uint8 pictures (n, h, w, 3), all with the same n.

    cell: width of a picture in pixels. n_columns_side: blocks of rows set side by side, for many images.
    """
    n = len(next(iter(columns.values())))
    if any(len(pictures) != n for pictures in columns.values()):
        raise ValueError(f"picture_grid: columns differ in length: { {k: len(v) for k, v in columns.items()} }")
    n_rows = -(-n // n_columns_side)
    block = len(columns) * (cell + MARGIN) + 2 * MARGIN
    grid = Image.new("RGB", (block * n_columns_side, 2 * HEADER + n_rows * (cell + MARGIN) + MARGIN), "white")
    canvas = ImageDraw.Draw(grid)
    canvas.text((MARGIN, MARGIN), title, "black", ImageFont.load_default(15))
    for row in range(n):
        side, line = divmod(row, n_rows)
        for i, (heading, pictures) in enumerate(columns.items()):
            x = side * block + MARGIN + i * (cell + MARGIN)
            if line == 0:
                canvas.text((x, HEADER + MARGIN), heading, "black", ImageFont.load_default(13))
            picture = Image.fromarray(pictures[row]).resize((cell, cell), Image.Resampling.BICUBIC)
            grid.paste(picture, (x, 2 * HEADER + line * (cell + MARGIN)))
    return grid


def png(image: Image.Image) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()
