"""report.html: what an evaluation or a training run gave, as one file that opens anywhere and asks no network.

The last station: `eval.py` hands over its rows and scores, `train.py` its run folder. Python writes everything that
stands still (scores, settings, curves as SVG); eval.js draws the examples as they are scrolled to and filters them,
run.js shows the values under the pointer.

Whatever comes from data is hostile until shown. Static text goes through `escape`, the examples travel as JSON in
which `<`, `>` and `&` are written as \\u escapes and come out through textContent alone, pictures are JPEGs made here.
The policy in the page's head (CSP level 3, W3C) names our script and style by their hashes; nothing else runs or loads.
"""

import base64
import contextlib
import hashlib
import html
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from llava_min.cli import UserError, printable
from llava_min.data.image import to_rgb, open_image
from llava_min.files import replace
from llava_min.report.curves import curve, figures

# What a page may weigh: beyond it pictures shrink and then stop, texts are cut, rows are left out, and the page says so.
PICTURES = 24 * 2**20  # bytes of all thumbnails as base64
TEXT = 16 * 2**20  # characters of all questions, references and answers
LONGEST = 4000  # characters of one of them
ROWS = 20_000  # examples
SIDES = (192, 144, 96, 64)  # pixels of a thumbnail's longer side
SMALLEST = 1500  # bytes; a thumbnail of a share below it would be a smudge
SAMPLES, TIMES = 40, 20  # in a run's page: questions, and answers to each


# ---- text


def shown(x: object) -> str:
    """`x` as text whose control and bidirectional-override characters are visible; lines, tabs and joined emoji stay."""
    return re.sub(r"[^\n\t\u200c\u200d]+", lambda m: printable(m[0]), str(x))


def cut(x: object, limit: int) -> str:
    text = str(x)
    return shown(text) if len(text) <= limit else f"{shown(text[:limit])} … ({len(text) - limit:,} characters more)"


def escape(x: object) -> str:
    return html.escape(shown(x), quote=True)


def number(x: object) -> str:
    if finite(x) is None:
        return "–"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


def finite(x: object) -> float | None:
    """A score that is one: NaN, infinity and what is no number are none."""
    return float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None


def flat(settings: dict, prefix: str = "") -> dict:
    """{"lora": {"r": 16}} → {"lora.r": 16}"""
    out = {}
    for key, value in settings.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return out


# ---- pictures


class Thumbnails:
    """Pictures → JPEG data URLs that together stay within `budget` bytes; `index[picture]` is a place in `urls`, or
    None for one that could not be opened (`broken`) or had no room left (`left_out`)."""

    def __init__(self, pictures: Iterable, budget: int = PICTURES):
        self.urls: list[str] = []
        self.index: dict[object, int | None] = {}
        self.broken = self.left_out = self.shrunk = 0
        places: dict[bytes, int] = {}
        keys = {key(p): p for p in pictures}
        with ThreadPoolExecutor() as pool, contextlib.redirect_stderr(io.StringIO()):  # the run has warned already
            for i, (k, data) in enumerate(zip(keys, pool.map(thumbnail, keys.values()), strict=True)):
                share = max(SMALLEST, budget // (len(keys) - i)) * 3 // 4  # what one leaves, the others may use
                full, self.index[k] = data, None
                for side in SIDES[1:]:
                    if data and len(data) > share:
                        data = jpeg(Image.open(io.BytesIO(full)), side)
                if not data or len(data) > share or len(data) * 4 / 3 + 32 > budget:
                    self.broken += not data
                    self.left_out += bool(data)
                    continue
                self.shrunk += data is not full
                if data not in places:  # the same picture under another name
                    places[data] = len(self.urls)
                    self.urls.append("data:image/jpeg;base64," + base64.b64encode(data).decode())
                    budget -= len(self.urls[-1]) + 3
                self.index[k] = places[data]

    def notes(self) -> list[str]:
        return [text.format(n) for n, text in (
            (self.shrunk, f"{{:,}} pictures are smaller than {SIDES[0]} pixels, to keep this file small."),
            (self.left_out, "{:,} pictures are left out, to keep this file small."),
            (self.broken, "{:,} pictures could not be opened.")) if n]


def key(picture: object) -> object:
    """What names a picture: its path, its place in a parquet file, or the decoded image itself."""
    return id(picture) if isinstance(picture, Image.Image) else picture


def thumbnail(picture: object) -> bytes | None:
    try:
        if isinstance(picture, (str, Path)):
            picture = open_image(picture)
        elif not isinstance(picture, Image.Image):
            picture = picture.open(False)
        return jpeg(to_rgb(picture, "picture"), SIDES[0])
    except UserError:
        return None


def jpeg(im: Image.Image, side: int) -> bytes:
    scale = min(1, side / max(im.size))
    size = max(1, round(im.width * scale)), max(1, round(im.height * scale))
    if size != im.size:
        im = im.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    out = io.BytesIO()
    im.save(out, "JPEG", quality=76, optimize=True)
    return out.getvalue()


# ---- the page


def asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def page(title: str, body: str, data: object, script: str) -> str:
    """A whole HTML file: `body` is ours, `data` is what `script` draws."""
    css, js = asset("page.css"), asset(script)
    allow = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in (css, js)]
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = re.sub("[<>&\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-{allow[0]}'; \
script-src 'sha256-{allow[1]}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>{css}</style>
<body>
{body}
<script type="application/json" id="data">{text}</script>
<script>{js}</script>
</html>
"""


def write(path: Path, text: str) -> None:
    """`path` is the old page or the new one, never half of it. Raises UserError when it cannot be written."""
    try:
        replace(path, text)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or printable(e)}); "
                        "free space or give another path") from None


def heading(kind: str, title: object, under: Iterable[object]) -> str:
    parts = "".join(f"<span>{escape(x)}</span>" for x in under)
    return f'<header><p class="kind">{kind}</p><h1>{escape(title)}</h1><p class="under">{parts}</p></header>'


def settings_list(settings: dict, title: str) -> str:
    items = ""
    for name, value in flat(settings).items():
        value = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        value = "none" if value is None else value
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        wide = ' class="wide"' if len(text) > 60 or "\n" in text else ""
        items += f'<div{wide}><dt>{escape(name)}</dt><dd><bdi>{escape(cut(text, LONGEST))}</bdi></dd></div>'
    return (f'<section><details open><summary><h2>{title}</h2></summary>'
            f'<dl class="settings">{items}</dl></details></section>')


def notes_list(notes: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(n)}</li>" for n in notes)}</ul>' if notes else ""


# ---- an evaluation


def write_eval_report(path: str | os.PathLike, rows: Sequence[dict], table: dict[str, dict], settings: dict,
                      compare: dict | None = None) -> None:
    """Write `path`, an HTML page of the scores, the settings and the examples, worst first.

    rows: {"id", "prompt", "prediction", "references": [str], "scores": {metric: float}}, and where there are any
        "images": [path, record's embedded picture or PIL image] and "logprob": the answer's mean log-probability;
        with `compare` also "base_prediction" and "base_scores"
    table: {metric: {"score", "low", "high", "n"}}; the name `metric group` is a row under its metric
    settings: what made the numbers (model, data, prompt, template, decoding …), shown in their order
    compare: {"name": the base's, "table": its scores as above, "difference": {metric: {"score", "low", "high"}}},
        the difference being this less the base with its paired interval

    A value that is not finite is shown as no score. Raises UserError when the file cannot be written.
    """
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("scores", {})))
    first = metrics[0] if metrics else None

    def rank(row: dict) -> tuple[float, float]:
        score = finite(row.get("scores", {}).get(first))
        score = -math.inf if score is None else score
        base = finite(row.get("base_scores", {}).get(first)) if compare else None
        return (score - base if base is not None else 0.0), score

    notes, total = [], len(rows)
    ordered = sorted(range(total), key=lambda i: rank(rows[i]))
    if total > ROWS:
        ordered = ordered[: ROWS // 2] + ordered[-(ROWS // 2) :]
        notes.append(f"The {ROWS // 2:,} worst and {ROWS // 2:,} best of {total:,} examples are here; "
                     "predictions.jsonl has all.")
    limit = max(200, min(LONGEST, TEXT // (5 * max(1, len(ordered)))))
    # the first of the ends get the room there is for pictures: the worst, the best, the second worst …
    ends = [i for pair in zip(ordered, reversed(ordered)) for i in pair]
    pictures = Thumbnails(p for i in ends for p in rows[i].get("images") or [])
    notes += pictures.notes()
    missing = {m: sum(finite(r.get("scores", {}).get(m)) is None for r in rows) for m in metrics}
    notes += [f"{n:,} examples have no {shown(m)}." for m, n in missing.items() if n]

    def packed(i: int) -> dict:
        row = rows[i]
        references = Counter(map(str, row["references"])).most_common()
        more = [[f"… {len(references) - 10:,} more", 1]] if len(references) > 10 else []
        out = {"id": cut(row["id"], 200), "q": cut(row["prompt"], limit), "a": cut(row["prediction"], limit),
               "r": [[cut(t, limit), n] for t, n in references[:10]] + more,
               "s": [finite(row.get("scores", {}).get(m)) for m in metrics]}
        if row.get("images"):
            out["p"] = [pictures.index[key(p)] for p in row["images"]]
        if finite(row.get("logprob")) is not None:
            out["l"] = round(row["logprob"], 4)
        if compare:
            out["b"] = cut(row.get("base_prediction", ""), limit)
            out["d"] = row.get("base_prediction", "") != row["prediction"]
            out["t"] = [finite(row.get("base_scores", {}).get(m)) for m in metrics]
        return out

    scales = {m: scale([r.get("scores", {}).get(m) for r in rows]) for m in metrics}
    data = {"metrics": [{"name": shown(m), "low": scales[m][0], "high": scales[m][1]} for m in metrics],
            "compare": compare is not None, "pictures": pictures.urls, "rows": [packed(i) for i in sorted(ordered)]}
    name = settings.get("adapter") or settings.get("model") or "Evaluation"
    under = [*([f"against {compare.get('name', 'the base')}"] if compare else []),
             *([settings["data"]] if settings.get("data") else []), f"{total:,} examples"]
    body = "\n".join((heading("Comparison" if compare else "Evaluation", name, under),
                      f"<section><h2>Scores</h2>{scores_table(table, scales, compare)}</section>",
                      settings_list(settings, "Settings"),
                      asset("examples.html").replace("<!--notes-->", notes_list(notes))))
    write(Path(path), page(f"{name} – evaluation", body, data, "eval.js"))


def scale(values: Iterable[object]) -> tuple[float, float]:
    """The ends of a metric's axis: fractions to 1, percents to 100, others as far as they go."""
    found = [v for v in map(finite, values) if v is not None] or [0.0]
    top = max(found)
    return min(0.0, *found, 0.0), 1.0 if top <= 1 else 100.0 if top <= 100 else top


def scores_table(table: dict[str, dict], scales: dict, compare: dict | None) -> str:
    base, difference = (compare.get("table", {}), compare.get("difference", {})) if compare else ({}, {})
    out = ""
    for name, m in table.items():
        parent = next((p for p in scales if name.startswith(p + " ")), None)
        ends = scales.get(parent or name) or scale([m.get("score"), m.get("high"), base.get(name, {}).get("score")])
        bars = bar(base[name], ends, "base", 3) + bar(m, ends, "own", 11) if name in base else bar(m, ends, "own", 7)
        cells = [f'<th scope="row"><bdi>{escape(name[len(parent) + 1 :] if parent else name)}</bdi></th>',
                 f'<td class="num muted old">{number(base.get(name, {}).get("score"))}</td>' if compare else "",
                 f'<td class="num score">{number(m.get("score"))}</td>',
                 f'<td class="plot"><svg class="bar" height="{22 if name in base else 14}">{bars}</svg></td>',
                 f'<td class="num muted ci">{number(m.get("low"))} – {number(m.get("high"))}</td>',
                 change(difference.get(name, {}), 3 if ends[1] <= 1 else 1) if compare else "",
                 f'<td class="num muted n">{m.get("n", 0):,}</td>']
        out += f'<tr{" class=group" if parent else ""}>{"".join(cells)}</tr>'
    names = ["Metric", "Base", "Score", "", "95 % interval", "Change (95 %)", "n"]
    names = names if compare else [n for n in names if n not in ("Base", "Change (95 %)")]
    head = "".join(f'<th class="num">{n}</th>' if i else f"<th>{n}</th>" for i, n in enumerate(names))
    return (f'<div class="card"><table class="scores{" pair" if compare else ""}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{out}</tbody></table></div>")


def change(d: dict, digits: int) -> str:
    """The difference to the base; coloured only when its interval leaves zero out."""
    score, low, high = (finite(d.get(k)) for k in ("score", "low", "high"))
    if None in (score, low, high):
        return '<td class="num muted change">–</td>'
    kind = "better" if low > 0 else "worse" if high < 0 else "muted"
    return f'<td class="num {kind} change">{score:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})</td>'


def bar(m: dict, ends: tuple[float, float], kind: str, y: int) -> str:
    """A bar of the score with its interval as a whisker; lengths are in percent, so that it fits any width."""
    low, high = ends
    at = lambda v: f"{100 * min(1, max(0, (v - low) / ((high - low) or 1))):.2f}%"
    values = [finite(m.get(k)) for k in ("score", "low", "high")]
    if values[0] is None:
        return ""
    out = f'<rect class="track" y="{y - 3}" width="100%" height="6" rx="3"/>'
    out += f'<rect class="{kind}" y="{y - 3}" width="{at(values[0])}" height="6" rx="3"/>'
    if None not in values:
        a, b = at(values[1]), at(values[2])
        out += f'<line class="whisker" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>'
        out += "".join(f'<line class="whisker" x1="{x}" x2="{x}" y1="{y - 3}" y2="{y + 3}"/>' for x in (a, b))
    return out


# ---- a training run


def write_run_report(folder: str | os.PathLike) -> None:
    """Write `folder`/report.html: the curves of metrics.jsonl, the answers of samples.jsonl over time, config.json.

    metrics.jsonl: {"step", "loss", "lr", …} and {"step", "eval_NAME"} a line; of a step that was done again after a
        resume the last value counts. samples.jsonl: {"step", "id", "prompt", "reference", "prediction", "image"}.
    What is absent or half written is left out, and the page counts the lines that could not be read: a report never
    stops a run for its contents. Raises UserError when the file cannot be written.
    """
    folder, notes = Path(folder), []
    metrics, samples = (read_lines(folder / f"{name}.jsonl", notes) for name in ("metrics", "samples"))
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
            if name not in ("step", "seconds") and isinstance(value, (int, float)) and not isinstance(value, bool):
                series.setdefault(name, {})[step] = float(value)
    order = sorted(series, key=lambda n: (n != "loss", not n.startswith("eval_")))
    curves = [curve(name, series[name]) for name in order]
    name = folder.resolve().name
    drawn = figures(curves) or '<p class="empty">No step has been logged yet.</p>'
    body = [heading("Training run", config.get("out") or name, [config[k] for k in ("recipe", "model") if config.get(k)]),
            tiles(series), notes_list(notes), f"<section><h2>Curves</h2>{drawn}</section>",
            samples_section(folder, samples), settings_list(config, "Configuration") if config else ""]
    write(folder / "report.html", page(f"{name} – training", "\n".join(body), [c.points for c in curves], "run.js"))


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
        best = (min if "loss" in name or "perplexity" in name else max)(values, key=values.get)
        items.append((name.removeprefix("eval_") if name != "eval_loss" else "eval loss", number(values[max(values)]),
                      f"best {number(values[best])} at step {best:,.0f}"))
    cells = "".join(f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="muted">{escape(under)}</dd></div>'
                    for name, value, under in items)
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
    images = {i: folder / s["image"] for i, g in chosen for s in g.values() if isinstance(s.get("image"), str)}
    pictures = Thumbnails(images.values(), PICTURES // 4)
    cards = ""
    for i, group in chosen:
        steps = sorted(group)
        last = group[steps[-1]]
        place = pictures.index.get(images.get(i))
        picture = f'<img src="{pictures.urls[place]}" alt="">' if place is not None else ""
        if len(steps) > TIMES:  # the first, the last, and even steps between
            steps = [steps[round(k * (len(steps) - 1) / (TIMES - 1))] for k in range(TIMES)]
        prompt, reference = (escape(cut(last.get(k, ""), LONGEST)) for k in ("prompt", "reference"))
        answers, before = "", None
        for step in steps:
            answer = str(group[step].get("prediction", ""))
            right = answer.strip() == str(last.get("reference", "")).strip()
            answers += (f'<tr class="{"right" if right else "again" if answer == before else ""}">'
                        f'<th scope="row">{step:,.0f}</th><td><bdi>{escape(cut(answer, LONGEST))}</bdi></td></tr>')
            before = answer
        cards += (f'<article class="example">{f"<div class=pictures>{picture}</div>" if picture else ""}<div class="words">'
                  f'<p class="id"><bdi>{escape(cut(i, 200))}</bdi></p><p class="question"><bdi>{prompt}</bdi></p>'
                  f'<dl class="texts"><dt>Reference</dt><dd><bdi>{reference}</bdi></dd></dl>'
                  '<table class="times"><thead><tr><th>Step</th><td>Answer</td></tr></thead>'
                  f"<tbody>{answers}</tbody></table></div></article>")
    notes += pictures.notes()
    return f'<section><h2>Answers over time</h2>{notes_list(notes)}<div class="list">{cards}</div></section>'
