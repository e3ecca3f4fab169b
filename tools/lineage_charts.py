"""Curves, bars and pictures of the lineage's page, as SVG: text and shapes only, so that the page loads nothing."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_jax import command_line

Points = Sequence[tuple[float, float]]
COLORS = {"training": "#8fb4e3", "held out": "#1f4e8c", "reward": "#d9822b", "gold": "#b8860b", "KL": "#7b5ea7"}
_FALLBACK = "#3b7dd8"


def escape(text: object) -> str:
    """Text of models and documents as text of the page; what could reorder the page around it is shown as a code."""
    return html.escape(command_line.escape(str(text)))


def short(value: float) -> str:
    """A number of at most a few digits."""
    if value and abs(value) < 0.01:
        return f"{value:.1g}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from `low` to `high`."""
    span = high - low or 1.0
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 10) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _bounds(lines: Mapping[str, Points]) -> tuple[float, float, float, float]:
    points = [point for line in lines.values() for point in line if math.isfinite(point[1])]
    if not points:
        return 0.0, 1.0, 0.0, 1.0
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    room = 0.06 * (high - low) or 0.5
    return left, right if right > left else left + 1, low - room, high + room


def _path(line: Points, x, y) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line if math.isfinite(b))


def chart(title: str, lines: Mapping[str, Points], *, width: int = 320, height: int = 190, below: str = "") -> str:
    """A figure of curves against updates, with axes and the last value of each."""
    left, right, low, high = _bounds(lines)
    x0, x1, y0, y1 = 42.0, width - 8.0, height - 24.0, 8.0

    def x(value: float) -> float:
        return x0 + (value - left) / (right - left) * (x1 - x0)

    def y(value: float) -> float:
        return y0 - (value - low) / (high - low) * (y0 - y1)

    parts = []
    for value in ticks(low, high):
        parts.append(f'<line class="grid" x1="{x0}" x2="{x1}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x0 - 5}" y="{y(value) + 3.5:.1f}" text-anchor="end">{short(value)}</text>'
        )
    for value in ticks(left, right):
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{y0 + 15}" text-anchor="middle">{short(value)}</text>')
    named = []
    for name, line in lines.items():
        color = COLORS.get(name, _FALLBACK)
        dots = name == "held out" or len(line) <= 12
        parts.append(f'<polyline points="{_path(line, x, y)}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.4" fill="{color}"/>' for a, b in line if dots]
        if line:
            named.append(
                f'<span class="key"><i class="{key_class(name)}"></i>{escape(name)} {short(line[-1][1])}</span>'
            )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> {"".join(named)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"{f'<p class=note>{escape(below)}</p>' if below else ''}</figure>"
    )


def key_class(name: str) -> str:
    """Name of the style of a curve's key."""
    return "k-" + name.replace(" ", "-").lower()


def sparkline(line: Points, *, width: int = 150, height: int = 34) -> str:
    """A curve without axes, for a card of the tree."""
    if len(line) < 2:
        return ""
    left, right, low, high = _bounds({"": line})
    drawn = _path(
        line, lambda a: (a - left) / (right - left) * width, lambda b: height - (b - low) / (high - low) * height
    )
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{drawn}" fill="none" stroke="{_FALLBACK}" stroke-width="1.5" '
        'vector-effect="non-scaling-stroke"/></svg>'
    )


def data_uri(path: Path) -> str:
    """The file as an address that holds it."""
    kind = path.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def boxes_on(path: Path, drawn: Sequence[tuple[Sequence[tuple[float, float]], str]], side: int = 128) -> str:
    """A picture with boxes over it.

    Args:
      drawn: corners in thousandths of the picture, and the class of each box.
    """
    parts = []
    for points, name in drawn:
        (left, top), (right, bottom) = (tuple(side * edge / 1000 for edge in point) for point in points)
        parts.append(
            f'<rect class="{name}" x="{min(left, right):.1f}" y="{min(top, bottom):.1f}" '
            f'width="{abs(right - left):.1f}" height="{abs(bottom - top):.1f}"/>'
        )
    return (
        f'<svg class="seen" viewBox="0 0 {side} {side}" role="img" aria-label="a picture of the questions">'
        f'<image href="{data_uri(path)}" width="{side}" height="{side}"/>{"".join(parts)}</svg>'
    )


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """A table of bars: (name, length, what stands behind it)."""
    longest = max((value for _, value, _ in rows), default=0.0) or 1.0
    lines = []
    for name, value, told in rows:
        share = 100 * value / longest
        drawn = f'<svg viewBox="0 0 100 10" preserveAspectRatio="none"><rect width="{share:.2f}" height="10"/></svg>'
        lines.append(f'<tr><td>{escape(name)}</td><td class="bar">{drawn}</td><td>{escape(told)}</td></tr>')
    return f'<table class="bars">{"".join(lines)}</table>'
