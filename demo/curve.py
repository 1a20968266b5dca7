"""Draw loss curves as one SVG picture, with nothing but text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

# All lengths are SVG user units.
WIDTH, HEIGHT = 760.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 16.0, 52.0, 40.0
_INK, _GRID, _PAPER = "#24292f", "#d0d7de", "#ffffff"


@dataclass(frozen=True, slots=True)
class Line:
    """A curve: the loss by step. `over` draws it wide and pale, to lie under another."""

    label: str
    colour: str
    losses: Mapping[int, float]
    wide: bool = False
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """Steps `first` to `last` of the run, and what trained them."""

    label: str
    first: int
    last: int


def draw(title: str, lines: Sequence[Line], parts: Sequence[Part]) -> str:
    """The picture: the lines in their order, one over the other, and the parts named above."""
    values = [loss for line in lines for loss in line.losses.values()]
    steps = [step for line in lines for step in line.losses]
    last, top, low = max(steps), max(values), min(values)
    low, top = low - 0.05 * (top - low), top + 0.05 * (top - low)

    def x(step: float) -> float:
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * step / last, 1)

    def y(loss: float) -> float:
        return round(_TOP + (HEIGHT - _TOP - _BOTTOM) * (top - loss) / (top - low), 1)

    body = [f'<rect width="{WIDTH:.0f}" height="{HEIGHT:.0f}" fill="{_PAPER}"/>']
    body.append(_text(_LEFT, 20, title, size=15, weight="600"))
    for tick in range(int(low) + 1, int(top) + 1):
        body.append(_stroke([(x(0), y(tick)), (x(last), y(tick))], _GRID, 1))
        body.append(_text(_LEFT - 8, y(tick) + 4, str(tick), anchor="end"))
    for part in parts:
        middle = (x(part.first - 1) + x(part.last)) / 2
        body.append(_text(middle, 42, part.label, anchor="middle"))
        if part.first > 1:
            edge = x(part.first - 0.5)
            body.append(_stroke([(edge, 30), (edge, HEIGHT - _BOTTOM)], _INK, 1, dashed=True))
    body.append(_text((x(0) + x(last)) / 2, HEIGHT - 8, "step", anchor="middle"))
    for tick in range(0, last + 1, 10):
        body.append(_text(x(tick), HEIGHT - _BOTTOM + 16, str(tick), anchor="middle"))
    for line in lines:
        points = [(x(step), y(loss)) for step, loss in sorted(line.losses.items())]
        body.append(_stroke(points, line.colour, 6 if line.wide else 1.8, dashed=line.dashed))
    body += _legend(lines)
    inside = "\n".join(body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{_INK}" role="img">\n'
        f"<title>{escape(title)}</title>\n{inside}\n</svg>\n"
    )


def _legend(lines: Sequence[Line]) -> list[str]:
    found = []
    for number, line in enumerate(lines):
        at = _TOP + 18 + 20 * number
        start = _LEFT + 110
        width = 6 if line.wide else 1.8
        found.append(
            _stroke([(start, at - 4), (start + 26, at - 4)], line.colour, width, dashed=line.dashed)
        )
        found.append(_text(start + 34, at, line.label))
    return found


def _stroke(
    points: Sequence[tuple[float, float]], colour: str, width: float, *, dashed: bool = False
) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="4 4"' if dashed else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
        f'stroke-linejoin="round"{dash}/>'
    )


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "400"
) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )
