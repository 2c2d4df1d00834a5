"""The page of a training run: its curves, what it answered over time, and its configuration."""

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from llava_min.data.data_uri import Encoded, from_data_uri, is_data_uri
from llava_min.data.parquet import Embedded
from llava_min.errors import UserError
from llava_min.report.curves import curve, figures, value_text
from llava_min.report.page import (
    MAX_TEXT,
    cut,
    escape,
    finite,
    heading,
    notes_list,
    number,
    page,
    settings_list,
    write,
)
from llava_min.report.thumbnails import MAX_BYTES, Thumbnails

MAX_SAMPLES, MAX_TIMES = 40, 20  # questions, and answers to each
FALLING = ("loss", "perplexity", "cut_answers")  # in the names of what is best when low
EMPTY = '<i class="muted">empty</i>'


def write_run_report(folder: str | os.PathLike) -> None:
    """Write `folder`/report.html: the curves of metrics.jsonl, the answers of samples.jsonl over
    time, and config.json.

    metrics.jsonl has lines {"step", "loss", "lr", …} and {"step", "eval_NAME", "remarks": [text]};
    of a step that was repeated after a resume the last value counts. samples.jsonl has lines
    {"step", "id", "earlier", "prompt", "reference", "prediction", "images": [path, data URI, or
    path, group, row and index of an image in a parquet file]}.

    What is missing or half written is left out, and the page counts the lines that could not be
    read: a report never stops a run for its contents. Raises UserError when the file cannot be
    written.
    """
    folder, notes = Path(folder), []
    metrics = read_lines(folder / "metrics.jsonl", notes)
    samples = read_lines(folder / "samples.jsonl", notes)
    config = read_config(folder, notes)
    notes += last_remarks(metrics)
    series = series_of(metrics)
    curves = [curve(name, values) for name, values in series.items()]
    drawn = figures(curves) or '<p class="empty">No step has been logged yet.</p>'
    name = folder.resolve().name
    under = [config[key] for key in ("recipe", "model") if config.get(key)]
    body = [
        heading("Training run", config.get("out") or name, under),
        tiles(series),
        notes_list(notes),
        f"<section><h2>Curves</h2>{drawn}</section>",
        samples_section(folder, samples),
        settings_list(config, "Configuration") if config else "",
    ]
    points = [c.points for c in curves]
    write(folder / "report.html", page(f"{name} – training", "\n".join(body), points, "run.js"))


# ---- what the run wrote


def read_config(folder: Path, notes: list[str]) -> dict:
    with suppress(OSError, ValueError, RecursionError):
        if isinstance(config := json.loads((folder / "config.json").read_bytes()), dict):
            return config
    notes.append("config.json could not be read.")
    return {}


def series_of(metrics: Iterable[dict]) -> dict[str, dict[float, float]]:
    """{name: {step: value}} of all numbers: the loss first, then the evaluations."""
    series: dict[str, dict[float, float]] = {}
    for line in metrics:
        if (step := finite(line.get("step"))) is None:
            continue
        for name, value in line.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and name not in ("step", "seconds"):
                series.setdefault(name, {})[step] = float(value)
    order = sorted(series, key=lambda name: (name != "loss", not name.startswith("eval_")))
    return {name: series[name] for name in order}


def last_remarks(metrics: list[dict]) -> list[str]:
    """The remarks of the last evaluation."""
    for line in reversed(metrics):
        if any(name.startswith("eval_") for name in line):
            remarks = line.get("remarks")
            found = remarks if isinstance(remarks, list) else []
            return [f"Last evaluation: {remark}" for remark in found]
    return []


def read_lines(path: Path, notes: list[str]) -> list[dict]:
    """The objects of a JSONL file; other lines are counted in a note, but not a last line that a
    kill cut short.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    out, bad = [], 0
    for i, line in enumerate(lines):
        try:
            out += [value] if isinstance(value := json.loads(line), dict) else []
            bad += not isinstance(value, dict)
        except (ValueError, RecursionError):
            # a complete file ends in a newline, so its last piece is empty
            bad += bool(line.strip()) and i < len(lines) - 1
    if bad:
        notes.append(f"{bad:,} lines of {path.name} could not be read.")
    return out


def stored_images(folder: Path, places: object) -> list[Path | Embedded | Encoded]:
    """The images at the `places` of a line of samples.jsonl."""
    out = []
    for p in places if isinstance(places, list) else ():
        if is_data_uri(p):
            with suppress(UserError):
                out.append(from_data_uri(p, "image"))
        elif isinstance(p, str):
            out.append(folder / p)
        elif isinstance(p, list) and [type(x) for x in p] == [str, int, int, int]:
            out.append(Embedded(folder / p[0], *p[1:]))
    return out


# ---- the sections


def tiles(series: dict[str, dict[float, float]]) -> str:
    """The numbers one looks for first: steps, loss, last and best value of each evaluation."""
    items = []
    if series:
        items.append(("steps", f"{max(max(s) for s in series.values()):,.0f}", ""))
    for name in sorted(series, key=lambda n: n != "loss"):
        values = {step: v for step, v in series[name].items() if math.isfinite(v)}
        if not values or not (name == "loss" or name.startswith("eval_")):
            continue
        falls = any(word in name for word in FALLING)
        best = (min if falls else max)(values, key=values.get)
        title = "eval loss" if name == "eval_loss" else name.removeprefix("eval_")
        under = f"best {tile_text(name, values[best])} at step {best:,.0f}"
        items.append((title, tile_text(name, values[max(values)]), under))
    cells = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}</dd>"
        f'<dd class="muted">{escape(under)}</dd></div>'
        for title, value, under in items
    )
    return f'<dl class="tiles">{cells}</dl>' if items else ""


def tile_text(name: str, value: float) -> str:
    """Aligned digits, but counts as whole numbers, and no small loss as 0.000."""
    if "cut_answers" in name or 0 < abs(value) < 1e-3:
        return value_text(value)
    return number(value, 3 if abs(value) < 10 else 1)


def samples_section(folder: Path, samples: list[dict]) -> str:
    """A card for each question, with its image, its reference and its answers by step."""
    by_id: dict[str, dict[float, dict]] = {}
    for sample in samples:
        if (step := finite(sample.get("step"))) is not None:
            by_id.setdefault(str(sample.get("id")), {})[step] = sample
    if not by_id:
        return ""
    chosen, notes = list(by_id.items())[:MAX_SAMPLES], []
    if len(by_id) > MAX_SAMPLES:
        notes.append(f"The first {MAX_SAMPLES} of {len(by_id):,} questions; samples.jsonl has all.")
    images = {id: stored_images(folder, group[max(group)].get("images")) for id, group in chosen}
    thumbnails = Thumbnails((im for found in images.values() for im in found), MAX_BYTES // 4)
    cards = ""
    for id, group in chosen:
        places = [thumbnails.place(image) for image in images[id]]
        cards += card(id, group, [thumbnails.urls[place] for place in places if place is not None])
    notes += thumbnails.notes()
    return (
        f"<section><h2>Answers over time</h2>{notes_list(notes)}"
        f'<div class="list">{cards}</div></section>'
    )


def card(id: str, group: dict[float, dict], urls: list[str]) -> str:
    """One question; `group` has its sample at each step, `urls` its images."""
    steps = sorted(group)
    last = group[steps[-1]]
    if len(steps) > MAX_TIMES:  # the first, the last, and evenly spaced ones between
        last_index = len(steps) - 1
        steps = [steps[round(k * last_index / (MAX_TIMES - 1))] for k in range(MAX_TIMES)]
    images = "".join(f'<img src="{url}" alt="">' for url in urls)
    images = f'<div class="images">{images}</div>' if images else ""
    before, prompt, reference = (
        escape(cut(last.get(k, ""), MAX_TEXT)) for k in ("earlier", "prompt", "reference")
    )
    before = before and f'<p class="earlier"><bdi>{before}</bdi></p>'
    return (
        f'<article class="example">{images}<div class="words">'
        f'<p class="id"><bdi>{escape(cut(id, 200))}</bdi></p>{before}'
        f'<p class="question"><bdi>{prompt}</bdi></p>'
        f'<dl class="texts"><dt>Reference</dt><dd><bdi>{reference}</bdi></dd></dl>'
        '<table class="times"><thead><tr><th>Step</th><td>Answer</td></tr></thead>'
        f"<tbody>{answer_rows(group, steps, last.get('reference', ''))}</tbody></table>"
        "</div></article>"
    )


def answer_rows(group: dict[float, dict], steps: list[float], reference: object) -> str:
    """A `<tr>` for each step; right answers and repeated ones are marked."""
    rows, before = "", None
    for step in steps:
        answer = str(group[step].get("prediction", ""))
        text = f"<bdi>{escape(cut(answer, MAX_TEXT))}</bdi>" if answer else EMPTY
        right = answer.strip() == str(reference).strip()
        mark = "right" if right else "again" if answer == before else ""
        rows += f'<tr class="{mark}"><th scope="row">{step:,.0f}</th><td>{text}</td></tr>'
        before = answer
    return rows
