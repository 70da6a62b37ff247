"""Two kinds of picture, as plain SVG: bars with ranges, and lines over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, LEFT, RIGHT, ROW, TOP = 760, 250, 110, 26, 40
HEIGHT, BOTTOM, SIDE = 150, 24, 70
_HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" '
    'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
)


def bars(title: str, items: Sequence[tuple[str, float, float, float]], number: Callable[[float], str]) -> str:
    """One bar for each (name, median, min, max), with a whisker from min to max."""
    most = max((high for *_, high in items), default=0.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / most
    height = TOP + ROW * len(items) + 12
    parts = [_HEAD.format(w=WIDTH, h=height), _text(12, 24, title, weight="bold")]
    for place, (name, middle, low, high) in enumerate(items):
        y = TOP + ROW * place
        colour = "#2b6cb0" if name.startswith("nih-sched") else "#a0aec0"
        parts.append(_text(LEFT - 8, y + 14, name, anchor="end"))
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{max(middle * scale, 1):.1f}" height="18" fill="{colour}"/>')
        x1, x2 = LEFT + low * scale, LEFT + high * scale
        parts.append(f'<path d="M{x1:.1f} {y + 9}H{x2:.1f}" stroke="black" stroke-width="1.5"/>')
        parts.append(_text(max(x2, LEFT + middle * scale) + 6, y + 14, number(middle)))
    return "\n".join([*parts, "</svg>\n"])


def lines(
    title: str, seconds: Sequence[float], series: Mapping[str, Sequence[float]], number: Callable[[float], str]
) -> str:
    """One small panel for each series, all over the same time."""
    end = max(seconds, default=0.0) or 1.0
    height = TOP + (HEIGHT + BOTTOM) * len(series) + 20
    parts = [_HEAD.format(w=WIDTH, h=height), _text(12, 24, title, weight="bold")]
    across = WIDTH - SIDE - 20
    for place, (name, values) in enumerate(series.items()):
        top = TOP + (HEIGHT + BOTTOM) * place
        most = max(values, default=0.0) or 1.0
        points = " ".join(
            f"{SIDE + across * at / end:.1f},{top + HEIGHT - (HEIGHT - 16) * value / most:.1f}"
            for at, value in zip(seconds, values, strict=True)
        )
        parts.append(f'<path d="M{SIDE} {top + 16}V{top + HEIGHT}H{WIDTH - 20}" fill="none" stroke="#718096"/>')
        parts.append(f'<polyline points="{points}" fill="none" stroke="#2b6cb0" stroke-width="1.5"/>')
        parts.append(_text(SIDE - 6, top + 20, number(most), anchor="end"))
        parts.append(_text(SIDE - 6, top + HEIGHT, "0", anchor="end"))
        parts.append(_text(SIDE + 6, top + 10, name))
    parts.append(_text(WIDTH - 20, height - 10, f"{end:.0f} s", anchor="end"))
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
