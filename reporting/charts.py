"""Charts of a report, as SVG. Imports no Paddle."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from reporting.page import Content, join

WIDTH, HEIGHT = 400, 240  # so that the text is legible where the chart is as wide as a phone
LEFT, RIGHT, TOP, BOTTOM = 42, WIDTH - 10, 8, HEIGHT - 24  # the edges of what the axes enclose
TICKS_OF_A_LOGARITHM = (1, 2, 5)  # of each power of ten
FIGURE = Markup(
    '<figure><figcaption>{}</figcaption><ul class="legend">{}</ul>'
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{{}}</svg></figure>'
)
LEGEND = Markup(
    '<li class="series-{}"><svg viewBox="0 0 20 10" aria-hidden="true"><path class="line" d="M0 5H20"/></svg>{}</li>'
)
SERIES = Markup('<g class="series-{}">{}</g>')
PATH = Markup('<path class="{}" d="{}"/>')
TEXT = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')


class Line(NamedTuple):
    """A line of a chart, and the interval around it, if there is one: percentages, float64 [P] each."""

    name: Content
    y: np.ndarray
    interval: tuple[np.ndarray, np.ndarray] | None = None


def line_chart(caption: Content, x: np.ndarray, lines: Sequence[Line]) -> Markup:
    """Lines over the same x on a logarithmic axis; y is from 0 to 100. x: int64 [P], ascending from 1."""
    width = math.log(max(2, x[-1]))

    def across(values: Sequence[int] | np.ndarray) -> np.ndarray:
        return LEFT + (RIGHT - LEFT) * np.log(values) / width

    def up(percentages: Sequence[float] | np.ndarray) -> np.ndarray:
        return BOTTOM - (BOTTOM - TOP) * np.asarray(percentages) / 100

    powers = [10**power for power in range(len(str(x[-1])))]
    x_ticks = [step * power for power in powers for step in TICKS_OF_A_LOGARITHM if step * power <= x[-1]]
    y_ticks = range(0, 101, 20)
    labels = [[str(tick) for tick in ticks] for ticks in (x_ticks, y_ticks)]
    parts = [_axes(across(x_ticks), labels[0], up(y_ticks), labels[1])]
    for number, line in enumerate(lines):
        shapes = [PATH.format("line", _path(across(x), up(line.y)))]
        if line.interval:
            low, high = line.interval
            outline = _path(np.append(across(x), across(x)[::-1]), np.append(up(high), up(low)[::-1]))
            shapes.insert(0, PATH.format("band", outline + "Z"))
        parts.append(SERIES.format(number, join(shapes)))
    return _figure(caption, [line.name for line in lines], parts)


def histogram(caption: Content, edges: np.ndarray, lines: Sequence[Line]) -> Markup:
    """Shares of values between edges, float64 [P + 1]; all lines are scaled so that the largest share fits."""
    highest = max(float(line.y.max()) for line in lines)
    step = (edges[-1] - edges[0]) / 4
    x_values = edges[0] + step * np.arange(5)

    def across(values: np.ndarray) -> np.ndarray:
        return LEFT + (RIGHT - LEFT) * (values - edges[0]) / (edges[-1] - edges[0])

    def up(percentages: np.ndarray) -> np.ndarray:
        return BOTTOM - (BOTTOM - TOP) * percentages / highest

    y_values = highest * np.arange(5) / 4
    labels = [f"{value:.3g}" for value in x_values], [f"{value:.2g}" for value in y_values]
    parts = [_axes(across(x_values), labels[0], up(y_values), labels[1])]
    for number, line in enumerate(lines):
        x, y = across(np.repeat(edges, 2)), up(np.concatenate([[0], np.repeat(line.y, 2), [0]]))
        parts.append(SERIES.format(number, PATH.format("filled", _path(x, y) + "Z")))
    return _figure(caption, [line.name for line in lines], parts)


def _figure(caption: Content, names: Iterable[Content], parts: Iterable[Markup]) -> Markup:
    return FIGURE.format(caption, join(LEGEND.format(number, name) for number, name in enumerate(names)), join(parts))


def _axes(x: np.ndarray, x_labels: Sequence[str], y: np.ndarray, y_labels: Sequence[str]) -> Markup:
    """Labels at places along both axes, and a line across the chart at each of y."""
    below = [TEXT.format(place, HEIGHT - 6, "middle", label) for place, label in zip(x, x_labels, strict=True)]
    beside = [
        PATH.format("axis", f"M{LEFT} {place:.1f}H{RIGHT}") + TEXT.format(LEFT - 6, place + 4, "end", label)
        for place, label in zip(y, y_labels, strict=True)
    ]
    return join([*below, *beside])


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """The `d` of an SVG path through points."""
    return "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in zip(x, y, strict=True))
