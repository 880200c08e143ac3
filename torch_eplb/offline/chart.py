"""Small charts as SVG text, for pages that must not need a drawing library.

Imports numpy only.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Line", "bars", "lines", "ticks"]

_WIDTH, _HEIGHT = 1000, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 14, 40


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, its points ``(x, y)`` and the class that draws it."""

    name: str
    points: list[tuple[float, float]]
    style: str


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``most`` of them.

    >>> ticks(1.0, 1.62), ticks(0, 12000)
    ([1.0, 1.2, 1.4, 1.6], [0.0, 2000.0, 4000.0, 6000.0, 8000.0, 10000.0, 12000.0])
    """
    if high <= low:
        return [low]
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Axes:
    """Where numbers are on the picture."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        width = _WIDTH - _LEFT - _RIGHT
        return _LEFT + width * (value - self.x0) / max(self.x1 - self.x0, 1e-9)

    def y(self, value: float) -> float:
        height = _HEIGHT - _TOP - _BOTTOM
        return _HEIGHT - _BOTTOM - height * (value - self.y0) / max(self.y1 - self.y0, 1e-9)

    def draw(self, x_name: str, y_name: str) -> Iterable[str]:
        for value in ticks(self.y0, self.y1, 5):
            y = self.y(value)
            yield f'<path class="grid" d="M{_LEFT},{y:.1f} H{_WIDTH - _RIGHT}"/>'
            yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,.6g}</text>'
        for value in ticks(self.x0, self.x1, 8):
            y = _HEIGHT - _BOTTOM + 18
            text = f"{value:,.0f}" if value == int(value) else f"{value:g}"
            yield f'<text x="{self.x(value):.1f}" y="{y}" text-anchor="middle">{text}</text>'
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        yield f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{x_name}</text>'
        yield f'<text x="4" y="{_TOP - 2}">{y_name}</text>'


def lines(
    drawn: Sequence[Line],
    marks: Sequence[float],
    x_name: str,
    y_name: str,
    *,
    least: float,
) -> str:
    """A chart of lines, with triangles below it at ``marks``; ``least`` is its lower end."""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    axes = _Axes(min(xs), max(xs), least, max(max(ys), least * 1.05))
    parts = [*axes.draw(x_name, y_name)]
    for line in drawn:
        place = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line.points)
        title = f"<title>{html.escape(line.name)}</title>"
        if len(line.points) == 1:
            x, y = line.points[0]
            parts.append(
                f'<circle class="line {line.style}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" '
                f'r="3">{title}</circle>'
            )
        parts.append(f'<polyline class="line {line.style}" points="{place}">{title}</polyline>')
    bottom = _HEIGHT - _BOTTOM
    parts += [
        f'<path class="mark" d="M{axes.x(m) - 4:.1f},{bottom + 6} h8 l-4,-6 z">'
        f"<title>rebalance, seen at step {m:,.0f}</title></path>"
        for m in marks
        if axes.x0 <= m <= axes.x1
    ]
    return _svg(parts, _legend(drawn))


def _legend(drawn: Sequence[Line]) -> str:
    entries = "".join(
        f'<g transform="translate({_LEFT + 235 * index},0)"><line class="line {line.style}" x1="0" '
        f'x2="26" y1="8" y2="8"/><text x="32" y="12">{html.escape(line.name)}</text></g>'
        for index, line in enumerate(drawn)
    )
    return f'<svg viewBox="0 0 {_WIDTH} 18" aria-hidden="true">{entries}</svg>'


def bars(
    xs: Sequence[float],
    heights: Sequence[float],
    titles: Sequence[str],
    span: tuple[float, float],
    x_name: str,
    y_name: str,
) -> str:
    """A chart of bars at ``xs``; ``titles`` are shown when one is pointed at."""
    axes = _Axes(span[0], span[1], 0.0, 1.05 * max(heights))
    width = max(2.0, min(14.0, 0.7 * (_WIDTH - _LEFT - _RIGHT) / max(len(xs), 1)))
    parts = [*axes.draw(x_name, y_name)]
    for x, height, title in zip(xs, heights, titles, strict=True):
        top = axes.y(height)
        left = min(axes.x(x), _WIDTH - _RIGHT) - width / 2
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{max(axes.y(0) - top, 1):.1f}"><title>{html.escape(title)}</title></rect>'
        )
    return _svg(parts)


def _svg(parts: Iterable[str], below: str = "") -> str:
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f'<div class="chart">{picture}{below}</div>'
