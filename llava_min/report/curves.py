"""Curves of a training run as inline SVG: axes, gridlines, the raw values faint and a smoothed line
over them.

Everything is placed here in Python; the page's script only looks up the point nearest to the
pointer.
"""

import math
from dataclasses import dataclass

import numpy as np

from llava_min.report.page import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 52, 12, 10, 26
POINTS = 1000  # of a curve; of more, each stretch keeps its lowest and highest
SMOOTH = 20  # a curve of more points gets a smoothed line


@dataclass
class Curve:
    name: str
    svg: str
    note: str
    points: dict  # x, y in the drawing; t what to say of each


def figures(curves: list[Curve]) -> str:
    note = lambda c: f'<p class="muted">{escape(c.note)}</p>' if c.note else ""
    drawn = "".join(
        f'<figure class="chart"><figcaption><b><bdi>{escape(c.name)}</bdi></b><output></output></figcaption>'
        f"{c.svg}{note(c)}</figure>"
        for c in curves
    )
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def curve(name: str, values: dict[float, float]) -> Curve:
    """step → value; what is not finite breaks the line and is counted."""
    steps = sorted(values)
    good = [(s, values[s]) for s in steps if math.isfinite(values[s])]
    bad = [s for s in steps if not math.isfinite(values[s])]
    note = (
        f"{len(bad):,} value{'s' * (len(bad) > 1)} not finite, the first at step {bad[0]:,.0f}."
        if bad
        else ""
    )
    log = log_scaled([v for _, v in good])
    f = math.log10 if log else float
    smooth = smoothed([v for _, v in good]) if noisy([f(v) for _, v in good]) else []
    (x0, x1), (y0, y1) = ends(steps), ends([f(v) for _, v in good])
    if log:
        marks = [10.0**k for k in range(math.ceil(y0), math.floor(y1) + 1)]
    else:
        marks = ticks(y0, y1, 4)
        y0, y1 = marks[0], marks[-1]
    px = lambda s: round(LEFT + (s - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)
    py = lambda v: round(HEIGHT - BOTTOM - (f(v) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} by step">']
    for value in marks:
        y = py(value)
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text x="{LEFT - 7}" y="{y + 3.5}" text-anchor="end">{short(value)}</text>'
        )
    for s in ticks(x0, x1, 5):
        if x0 <= s <= x1:
            out.append(f'<text x="{px(s)}" y="{HEIGHT - 8}" text-anchor="middle">{short(s)}</text>')
    out.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" '
        f'y2="{HEIGHT - BOTTOM}"/>'
    )
    keep = thinned([v for _, v in good])
    at = {s: i for i, s in enumerate(steps)}
    gaps = set()  # a point before which the line is broken
    for i, j in zip(keep, keep[1:]):
        if any(not math.isfinite(values[s]) for s in steps[at[good[i][0]] : at[good[j][0]]]):
            gaps.add(j)
    if keep:
        path = " ".join(
            ("M" if i == keep[0] or i in gaps else "L") + f"{px(good[i][0])} {py(good[i][1])}"
            for i in keep
        )
        out.append(f'<path class="{"raw" if smooth else "line"}" d="{path}"/>')
    if smooth:
        out.append(
            '<path class="line" d="M'
            + " L".join(f"{px(good[i][0])} {py(smooth[i])}" for i in keep)
            + '"/>'
        )
    if len(good) <= SMOOTH:
        out += [f'<circle class="dot" cx="{px(s)}" cy="{py(v)}" r="2.5"/>' for s, v in good]
    floor = HEIGHT - BOTTOM
    out += [
        f'<line class="bad" x1="{px(s)}" x2="{px(s)}" y1="{floor - 7}" y2="{floor}"/>'
        for s in bad[:POINTS]
    ]
    out.append(
        f'<line class="cursor" y1="{TOP}" y2="{floor}" x1="-9" x2="-9"/>'
        '<circle class="cursor" r="3.5" cx="-9" cy="-9"/></svg>'
    )
    extra = lambda i: f" (smoothed {value_text(smooth[i])})" if smooth else ""
    say = lambda i: f"step {good[i][0]:,.0f}: {value_text(good[i][1])}{extra(i)}"
    points = {
        "x": [px(good[i][0]) for i in keep],
        "y": [py((smooth or [v for _, v in good])[i]) for i in keep],
        "t": [say(i) for i in keep],
    }
    return Curve(name, "".join(out), note, points)


def ends(values: list[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = 0.0 if high > low else abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def log_scaled(values: list[float]) -> bool:
    """One spike would flatten all else: positive values whose highest is far from the usual."""
    return (
        len(values) > 2 and min(values) > 0 and max(values) > 50 * sorted(values)[len(values) // 2]
    )


def ticks(low: float, high: float, n: int) -> list[float]:
    """About `n` round numbers that cover low..high (Heckbert's nice numbers, Graphics Gems 1990)."""
    rough = (high - low) / n
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    return [k * step for k in range(first, math.ceil(high / step - 1e-9) + 1)]


def noisy(values: list[float]) -> bool:
    """It goes up and down far more than it gets anywhere; a schedule does not."""
    return len(values) > SMOOTH and float(np.abs(np.diff(values)).sum()) > 4 * (
        max(values) - min(values)
    )


def smoothed(values: list[float]) -> list[float]:
    """The mean of the middle half of what lies around each value: it neither lags behind nor
    follows a spike.
    """
    half, out = max(2, min(len(values) // 40, 500)), []
    for i in range(len(values)):
        near = np.sort(values[max(0, i - half) : i + half + 1])
        out.append(float(near[len(near) // 4 : len(near) - len(near) // 4].mean()))
    return out


def thinned(values: list[float]) -> list[int]:
    """Places of at most POINTS values: all, or the lowest and highest of each stretch, and the
    last.
    """
    n = len(values)
    if n <= POINTS:
        return list(range(n))
    keep = {n - 1}
    for k in range(POINTS // 2 - 1):
        part = range(k * n // (POINTS // 2 - 1), (k + 1) * n // (POINTS // 2 - 1))
        keep |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    return sorted(keep)


def short(v: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(v) >= size:
            return f"{v / (1e3 if letter == 'k' else size):.4g}{letter}"
    return (
        "0"
        if abs(v) < 1e-12
        else f"{v:.1e}".replace(".0e", "e").replace("e-0", "e-")
        if abs(v) < 1e-3
        else f"{v:.4g}"
    )


def value_text(v: float) -> str:
    return f"{v:.3e}" if v and abs(v) < 1e-3 else f"{v:,.0f}" if abs(v) >= 1e4 else f"{v:.4g}"
