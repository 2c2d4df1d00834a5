"""Curves of a training run as inline SVG: axes, grid lines, faint raw values, a smoothed line.

All coordinates are computed here; the page's script only finds the point nearest to the pointer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llava_min.report.page import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 52, 12, 10, 26
FLOOR = HEIGHT - BOTTOM  # y of the horizontal axis
MAX_POINTS = 1000  # of a curve; of more, each stretch keeps its lowest and highest
MIN_TO_SMOOTH = 20  # a curve of more points gets a smoothed line, of fewer a dot at each


@dataclass
class Curve:
    """A drawn curve: `note` is a line below it, `points` {"x", "y": in the drawing, "t": text}."""

    name: str
    svg: str
    note: str
    points: dict


@dataclass
class Axes:
    """The ranges of a drawing, and where a step and a value are in it."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]  # of f(value)
    marks: list[float]  # values that get a grid line
    f: Callable[[float], float]  # log10 or the identity

    def x(self, step: float) -> float:
        low, high = self.x_range
        return round(LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(FLOOR - (self.f(value) - low) / (high - low) * (FLOOR - TOP), 1)


def figures(curves: list[Curve]) -> str:
    note = lambda c: f'<p class="muted">{escape(c.note)}</p>' if c.note else ""
    drawn = "".join(
        f'<figure class="chart"><figcaption><b><bdi>{escape(c.name)}</bdi></b><output></output>'
        f"</figcaption>{c.svg}{note(c)}</figure>"
        for c in curves
    )
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def curve(name: str, values: dict[float, float]) -> Curve:
    """Draw step → value; values that are not finite break the line and are counted in the note."""
    steps = sorted(values)
    good = [s for s in steps if math.isfinite(values[s])]
    bad = [s for s in steps if not math.isfinite(values[s])]
    raw = [values[s] for s in good]
    axes = make_axes(steps, raw)
    smooth = smoothed(raw) if noisy([axes.f(v) for v in raw]) else []
    keep = thinned(raw)

    # the faint raw line and the smoothed one over it, or the raw line alone
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} by step">']
    out += grid(axes)
    raw_points = [(axes.x(good[i]), axes.y(raw[i])) for i in keep]
    smooth_points = [(axes.x(good[i]), axes.y(smooth[i])) for i in keep if smooth]
    breaks = gaps(steps, set(bad), [good[i] for i in keep])
    out += path(raw_points, "raw" if smooth else "line", breaks)
    out += path(smooth_points, "line")
    if len(good) <= MIN_TO_SMOOTH:
        out += [f'<circle class="dot" cx="{x}" cy="{y}" r="2.5"/>' for x, y in raw_points]
    for x in map(axes.x, bad[:MAX_POINTS]):
        out.append(f'<line class="bad" x1="{x}" x2="{x}" y1="{FLOOR - 7}" y2="{FLOOR}"/>')

    # run.js moves these to the point at the pointer
    out.append(
        f'<line class="cursor" y1="{TOP}" y2="{FLOOR}" x1="-9" x2="-9"/>'
        '<circle class="cursor" r="3.5" cx="-9" cy="-9"/></svg>'
    )
    extra = lambda i: f" (smoothed {value_text(smooth[i])})" if smooth else ""
    text = lambda i: f"step {good[i]:,.0f}: {value_text(raw[i])}{extra(i)}"
    shown = smooth_points or raw_points
    points = {"x": [x for x, _ in shown], "y": [y for _, y in shown], "t": list(map(text, keep))}
    note = ""
    if bad:
        plural = "s" if len(bad) > 1 else ""
        note = f"{len(bad):,} value{plural} not finite, the first at step {bad[0]:,.0f}."
    return Curve(name, "".join(out), note, points)


# ---- the parts of a drawing


def make_axes(steps: list[float], values: list[float]) -> Axes:
    """Round marks that cover the values, or powers of ten within them on a logarithmic axis."""
    if log_scaled(values):
        low, high = ends([math.log10(v) for v in values])
        marks = [10.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
        return Axes(ends(steps), (low, high), marks, math.log10)
    marks = ticks(*ends(values), 4)
    return Axes(ends(steps), (marks[0], marks[-1]), marks, float)


def grid(axes: Axes) -> list[str]:
    """Grid lines with their values, the steps below, the horizontal axis."""
    right = WIDTH - RIGHT
    out = []
    for value, y in zip(axes.marks, map(axes.y, axes.marks)):
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
            f'<text x="{LEFT - 7}" y="{y + 3.5}" text-anchor="end">{short_number(value)}</text>'
        )
    low, high = axes.x_range
    for step in ticks(low, high, 5):
        if low <= step <= high:
            position = f'x="{axes.x(step)}" y="{HEIGHT - 8}" text-anchor="middle"'
            out.append(f"<text {position}>{short_number(step)}</text>")
    return [*out, f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{FLOOR}" y2="{FLOOR}"/>']


def path(points: list[tuple[float, float]], kind: str, breaks: set[int] = frozenset()) -> list[str]:
    """A line through `points`, broken before those whose index is in `breaks`; [] for no points."""
    if not points:
        return []
    d = " ".join(
        f"{'M' if i == 0 or i in breaks else 'L'}{x} {y}" for i, (x, y) in enumerate(points)
    )
    return [f'<path class="{kind}" d="{d}"/>']


def gaps(steps: list[float], bad: set[float], kept: list[float]) -> set[int]:
    """The indices of `kept` steps with a `bad` one between them and the kept step before."""
    out, index, after_bad = set(), 0, False
    for step in steps:
        if step in bad:
            after_bad = True
        elif index < len(kept) and step == kept[index]:
            if after_bad and index > 0:
                out.add(index)
            index, after_bad = index + 1, False
    return out


def ends(values: list[float]) -> tuple[float, float]:
    """Lowest and highest, apart even if all values are equal."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = 0.0 if high > low else abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def log_scaled(values: list[float]) -> bool:
    """Positive values whose maximum is far above the median: one spike would flatten the rest."""
    median = sorted(values)[len(values) // 2] if values else 0.0
    return len(values) > 2 and min(values) > 0 and max(values) > 50 * median


def ticks(low: float, high: float, n: int) -> list[float]:
    """About `n` round numbers that cover low..high (Heckbert, Graphics Gems 1990)."""
    rough = (high - low) / n
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    return [k * step for k in range(first, math.ceil(high / step - 1e-9) + 1)]


def noisy(values: list[float]) -> bool:
    """Whether the values go up and down far more than they move overall; a schedule does not."""
    if len(values) <= MIN_TO_SMOOTH:
        return False
    return float(np.abs(np.diff(values)).sum()) > 4 * (max(values) - min(values))


def smoothed(values: list[float]) -> list[float]:
    """The interquartile mean of a window around each value: no lag, and a spike has no effect."""
    half, out = max(2, min(len(values) // 40, 500)), []
    for i in range(len(values)):
        near = np.sort(values[max(0, i - half) : i + half + 1])
        out.append(float(near[len(near) // 4 : len(near) - len(near) // 4].mean()))
    return out


def thinned(values: list[float]) -> list[int]:
    """Indices of at most MAX_POINTS values: all, or the lowest and highest of each stretch, and
    the last.
    """
    n, stretches = len(values), MAX_POINTS // 2 - 1
    if n <= MAX_POINTS:
        return list(range(n))
    keep = {n - 1}
    for k in range(stretches):
        part = range(k * n // stretches, (k + 1) * n // stretches)
        keep |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    return sorted(keep)


def short_number(v: float) -> str:
    """As on an axis: 20k, 1.5M, 2e-5."""
    for size, divisor, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(v) >= size:
            return f"{v / divisor:.4g}{letter}"
    if abs(v) < 1e-12:
        return "0"
    if abs(v) < 1e-3:
        return f"{v:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{v:.4g}"


def value_text(v: float) -> str:
    """As in the caption, with four digits."""
    if v and abs(v) < 1e-3:
        return f"{v:.3e}"
    return f"{v:,.0f}" if abs(v) >= 1e4 else f"{v:.4g}"
