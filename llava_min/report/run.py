"""The page of a training run: its curves, what it answered over time, and its configuration."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path

from llava_min.data.data_uri import Encoded, from_data_uri, is_data_uri
from llava_min.data.parquet import Embedded
from llava_min.errors import UserError
from llava_min.report.curves import curve, figures
from llava_min.report.page import (
    LONGEST,
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
from llava_min.report.pictures import PICTURES, Thumbnails

SAMPLES, TIMES = 40, 20  # questions, and answers to each


def write_run_report(folder: str | os.PathLike) -> None:
    """Write `folder`/report.html: the curves of metrics.jsonl, the answers of samples.jsonl over
    time, config.json.

    metrics.jsonl: {"step", "loss", "lr", …} and {"step", "eval_NAME", "remarks": [text]} a line; of
    a step that was done again after a
        resume the last value counts. samples.jsonl: {"step", "id", "earlier", "prompt", "reference", "prediction",
        "images": [path, or path, group, row and index of a picture in a parquet file]}.
    What is absent or half written is left out, and the page counts the lines that could not be read: a report never
    stops a run for its contents. Raises UserError when the file cannot be written.
    """
    folder, notes = Path(folder), []
    metrics, samples = (
        read_lines(folder / f"{name}.jsonl", notes) for name in ("metrics", "samples")
    )
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        config = {}
        notes.append("config.json could not be read.")

    series: dict[str, dict[float, float]] = {}
    for line in metrics:
        if (step := finite(line.get("step"))) is None:
            continue
        for name, value in line.items():
            if (
                name not in ("step", "seconds")
                and isinstance(value, (int, float))
                and not isinstance(value, bool)
            ):
                series.setdefault(name, {})[step] = float(value)
    order = sorted(series, key=lambda n: (n != "loss", not n.startswith("eval_")))
    last = next(
        (line for line in reversed(metrics) if any(n.startswith("eval_") for n in line)), {}
    )
    if isinstance(lines := last.get("remarks"), list):
        notes += [f"Last evaluation: {line}" for line in lines]
    curves = [curve(name, series[name]) for name in order]
    name = folder.resolve().name
    drawn = figures(curves) or '<p class="empty">No step has been logged yet.</p>'
    body = [
        heading(
            "Training run",
            config.get("out") or name,
            [config[k] for k in ("recipe", "model") if config.get(k)],
        ),
        tiles(series),
        notes_list(notes),
        f"<section><h2>Curves</h2>{drawn}</section>",
        samples_section(folder, samples),
        settings_list(config, "Configuration") if config else "",
    ]
    write(
        folder / "report.html",
        page(f"{name} – training", "\n".join(body), [c.points for c in curves], "run.js"),
    )


def read_lines(path: Path, notes: list[str]) -> list[dict]:
    """The objects of a JSONL file; the last line may be torn by a kill, others are counted."""
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
            bad += bool(line.strip()) and i < len(lines) - 1  # a whole file ends in a newline
    if bad:
        notes.append(f"{bad:,} lines of {path.name} could not be read.")
    return out


def tiles(series: dict[str, dict[float, float]]) -> str:
    """The numbers one looks for first: how far, the loss, the best and the last of each evaluation."""
    items = []
    if series:
        items.append(("steps", f"{max(max(s) for s in series.values()):,.0f}", ""))
    for name in sorted(series, key=lambda n: n != "loss"):
        values = {step: v for step, v in series[name].items() if math.isfinite(v)}
        if not values or not (name == "loss" or name.startswith("eval_")):
            continue
        least = any(word in name for word in ("loss", "perplexity", "cut_answers"))
        best = (min if least else max)(values, key=values.get)
        items.append(
            (
                name.removeprefix("eval_") if name != "eval_loss" else "eval loss",
                number(values[max(values)]),
                f"best {number(values[best])} at step {best:,.0f}",
            )
        )
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd "
        f'class="muted">{escape(under)}</dd></div>'
        for name, value, under in items
    )
    return f'<dl class="tiles">{cells}</dl>' if items else ""


def samples_section(folder: Path, samples: list[dict]) -> str:
    groups: dict[str, dict[float, dict]] = {}
    for s in samples:
        if (step := finite(s.get("step"))) is not None:
            groups.setdefault(str(s.get("id")), {})[step] = s
    if not groups:
        return ""
    chosen, notes = list(groups.items())[:SAMPLES], []
    if len(groups) > SAMPLES:
        notes.append(f"The first {SAMPLES} of {len(groups):,} questions; samples.jsonl has all.")
    images = {i: found(folder, g[max(g)].get("images")) for i, g in chosen}
    pictures = Thumbnails((p for places in images.values() for p in places), PICTURES // 4)
    cards = ""
    for i, group in chosen:
        steps = sorted(group)
        last = group[steps[-1]]
        places = [place for p in images[i] if (place := pictures.place(p)) is not None]
        picture = "".join(f'<img src="{pictures.urls[place]}" alt="">' for place in places)
        if len(steps) > TIMES:  # the first, the last, and even steps between
            steps = [steps[round(k * (len(steps) - 1) / (TIMES - 1))] for k in range(TIMES)]
        before, prompt, reference = (
            escape(cut(last.get(k, ""), LONGEST)) for k in ("earlier", "prompt", "reference")
        )
        before = before and f'<p class="earlier"><bdi>{before}</bdi></p>'
        answers, last_answer = "", None
        for step in steps:
            answer = str(group[step].get("prediction", ""))
            said = (
                f"<bdi>{escape(cut(answer, LONGEST))}</bdi>"
                if answer
                else '<i class="muted">empty</i>'
            )
            right = answer.strip() == str(last.get("reference", "")).strip()
            answers += (
                f'<tr class="{"right" if right else "again" if answer == last_answer else ""}">'
                f'<th scope="row">{step:,.0f}</th><td>{said}</td></tr>'
            )
            last_answer = answer
        cards += (
            f'<article class="example">{f"<div class=pictures>{picture}</div>" if picture else ""}<div class="words">'
            f'<p class="id"><bdi>{escape(cut(i, 200))}</bdi></p>{before}<p '
            f'class="question"><bdi>{prompt}</bdi></p>'
            f'<dl class="texts"><dt>Reference</dt><dd><bdi>{reference}</bdi></dd></dl>'
            '<table class="times"><thead><tr><th>Step</th><td>Answer</td></tr></thead>'
            f"<tbody>{answers}</tbody></table></div></article>"
        )
    notes += pictures.notes()
    return f'<section><h2>Answers over time</h2>{notes_list(notes)}<div class="list">{cards}</div></section>'


def found(folder: Path, places: object) -> list[Path | Embedded | Encoded]:
    """Where samples.jsonl says that pictures are."""
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
