"""The page of an evaluation: scores with their intervals, settings, every example, worst first.

eval.js draws the examples from the JSON that `pack_row` makes, with one letter per field.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_min.data.formats import Record
from llava_min.evaluation.metrics.blind import remark_lines
from llava_min.report.page import (
    MAX_TEXT,
    asset,
    cut,
    escape,
    finite,
    heading,
    notes_list,
    number,
    page,
    settings_list,
    shown,
    write,
)
from llava_min.report.thumbnails import Thumbnails

MAX_ALL_TEXT = 16 * 2**20  # characters of all questions, references and answers, else texts are cut
MAX_ROWS = 20_000  # examples; of more, the middle is left out, and the page says so
MAX_REFERENCES = 10  # different references of an example


def rows_to_show(
    records: Sequence[Record], rows: Sequence[dict], base_rows: Sequence[dict] | None = None
) -> list[dict]:
    """The rows of an evaluation, or of two, with what `write_eval_report` shows beside them."""
    out = [
        row | {"images": record.images, "earlier": record.history()}
        for row, record in zip(rows, records, strict=True)
    ]
    for row, base in zip(out, base_rows or ()):
        row["base_prediction"] = base["prediction"]
        row["base_scores"] = base["scores"]
        row["base_stopped"] = base.get("stopped")
    return out


def write_eval_report(
    path: str | os.PathLike,
    rows: Sequence[dict],
    table: dict[str, dict],
    settings: dict,
    compare: dict | None = None,
) -> None:
    """Write `path`, an HTML page of the scores, the settings and the examples, worst first.

    rows: {"id", "prompt", "prediction", "references": [str], "scores": {metric: float}}, and
        optionally "earlier": the turns before the prompt, "images": [path, embedded image of a
        record, or PIL image], "logprob": the answer's mean log probability, "stopped": "limit" for
        an answer that was cut; with `compare` also "base_prediction", "base_scores" and
        "base_stopped"
    table: {metric: {"score", "low", "high", "n"}}; the name `metric group` is a row under its
        metric; `remarks`, a list of lines, is shown under the scores
    settings: what made the numbers (model, data, prompt, template, decoding …), shown in their
        order; `remarks`, a list of lines, is shown under the scores
    compare: {"name": of the base, "table": its scores as above, "difference": {metric: {"score",
        "low", "high"}}}, the difference being this less the base, with its paired interval

    A value that is not finite is shown as no score. Raises UserError when the file cannot be
    written.
    """
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("scores", {})))
    indices, notes = choose_rows(rows, metrics[0] if metrics else None, compare is not None)
    limit = max(200, min(MAX_TEXT, MAX_ALL_TEXT // (5 * max(1, len(indices)))))

    # images have a budget: the worst example gets its images first, then the best, the second worst
    alternating = [i for pair in zip(indices, reversed(indices)) for i in pair]
    images = Thumbnails(p for i in alternating for p in rows[i].get("images") or [])
    notes += images.notes()
    for metric in metrics:
        if n := sum(finite(row.get("scores", {}).get(metric)) is None for row in rows):
            notes.append(f"{n:,} examples have no {shown(metric)}.")

    scales = {m: scale([row.get("scores", {}).get(m) for row in rows]) for m in metrics}
    data = {
        "metrics": [{"name": shown(m), "low": scales[m][0], "high": scales[m][1]} for m in metrics],
        "compare": compare is not None,
        "images": images.urls,
        "rows": [
            pack_row(rows[i], metrics, images, limit, compare is not None) for i in sorted(indices)
        ],
    }
    name = settings.get("adapter") or settings.get("model") or "Evaluation"
    under = [f"against {compare.get('name', 'the base')}"] if compare else []
    under += [settings["data"]] if settings.get("data") else []
    under += [f"{len(rows):,} examples"]
    remarks = notes_list(all_remarks(table, settings, compare))
    body = "\n".join(
        (
            heading("Comparison" if compare else "Evaluation", name, under),
            f"<section><h2>Scores</h2>{scores_table(table, scales, compare)}{remarks}</section>",
            settings_list({k: v for k, v in settings.items() if k != "remarks"}, "Settings"),
            asset("examples.html").replace("<!--notes-->", notes_list(notes)),
        )
    )
    write(Path(path), page(f"{name} – evaluation", body, data, "eval.js"))


def choose_rows(
    rows: Sequence[dict], metric: str | None, compared: bool
) -> tuple[list[int], list[str]]:
    """The indices of the rows to show, from the worst by `metric` to the best, and a note if some
    are left out. In a comparison those that lost most are the worst.
    """

    def rank(i: int) -> tuple[float, float]:
        score = finite(rows[i].get("scores", {}).get(metric))
        score = -math.inf if score is None else score
        base = finite(rows[i].get("base_scores", {}).get(metric)) if compared else None
        return (score - base if base is not None else 0.0), score

    order, half = sorted(range(len(rows)), key=rank), MAX_ROWS // 2
    if len(rows) <= MAX_ROWS:
        return order, []
    return order[:half] + order[-half:], [
        f"The {half:,} worst and {half:,} best of {len(rows):,} examples are here; "
        "predictions.jsonl has all."
    ]


def pack_row(
    row: dict, metrics: Sequence[str], images: Thumbnails, limit: int, compared: bool
) -> dict:
    """A row as eval.js reads it; texts are cut at `limit` characters.

    q question, a answer, r references with their counts, s scores; where there are any e earlier
    turns, p places of the images, l log probability, x cut at the token limit; of the base b
    answer, t scores, y cut, and d: whether the answers differ.
    """
    references = Counter(map(str, row["references"])).most_common()
    more = len(references) - MAX_REFERENCES
    out = {
        "id": cut(row["id"], 200),
        "q": cut(row["prompt"], limit),
        "a": cut(row["prediction"], limit),
        "r": [[cut(text, limit), n] for text, n in references[:MAX_REFERENCES]],
        "s": [finite(row.get("scores", {}).get(m)) for m in metrics],
    }
    if more > 0:
        out["r"].append([f"… {more:,} more", 1])
    if row.get("earlier"):
        out["e"] = cut(row["earlier"], limit)
    if row.get("images"):
        out["p"] = [images.place(p) for p in row["images"]]
    if finite(row.get("logprob")) is not None:
        out["l"] = round(row["logprob"], 4)
    if row.get("stopped") == "limit":
        out["x"] = True
    if compared:
        base = row.get("base_prediction", "")
        if row.get("base_stopped") == "limit":
            out["y"] = True
        out["b"], out["d"] = cut(base, limit), base != row["prediction"]
        out["t"] = [finite(row.get("base_scores", {}).get(m)) for m in metrics]
    return out


def all_remarks(table: dict[str, dict], settings: dict, compare: dict | None) -> list[str]:
    """What the metrics do not measure, of the base only what is not said already, and the remarks
    of the settings.
    """
    lines = remark_lines(table)
    if compare:
        name = compare.get("name", "the base")
        base_lines = remark_lines(compare.get("table", {}))
        lines += [f"{name}: {line}" for line in base_lines if line not in lines]
    return [*lines, *settings.get("remarks", ())]


def scale(values: Iterable[object]) -> tuple[float, float]:
    """The ends of a metric's axis: 0 to 1 for fractions, 0 to 100 for percentages, else the range
    of the values.
    """
    found = [v for v in map(finite, values) if v is not None] or [0.0]
    top = max(found)
    return min(0.0, *found, 0.0), 1.0 if top <= 1 else 100.0 if top <= 100 else top


def scores_table(table: dict[str, dict], scales: dict, compare: dict | None) -> str:
    """A row for each score; those of groups (`metric group`) follow their metric's."""
    if not table:
        return '<p class="empty">There is no score.</p>'
    under: dict[str, list[tuple[str, str]]] = {}
    for name in table:
        metric, _, group = name.partition(" ")
        metric, group = (metric, group) if metric in table else (name, "")
        under.setdefault(metric, []).append((name, group))
    body = "".join(
        score_row(name, group, table[name], scales.get(metric), compare)
        for metric, names in under.items()
        for name, group in names
    )
    names = ["Metric", "Score", "", "95 % interval", "n"]
    if compare:
        names = ["Metric", "Base", "Tuned", "", "95 % interval", "Change (95 %)", "n"]
    head = "".join(
        f'<th class="num">{n}</th>' if i else f"<th>{n}</th>" for i, n in enumerate(names)
    )
    kind = "scores pair" if compare else "scores"
    return (
        f'<div class="card"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def score_row(
    name: str, group: str, m: dict, ends: tuple[float, float] | None, compare: dict | None
) -> str:
    """One `<tr>`: the score `m` as a number and as a bar between `ends`, beside the base's."""
    old = compare.get("table", {}).get(name, {}) if compare else {}
    ends = ends or scale([m.get("score"), m.get("high"), old.get("score")])
    bars = bar(old, ends, "base", 3) + bar(m, ends, "own", 11) if old else bar(m, ends, "own", 7)
    difference = compare.get("difference", {}).get(name) if compare else None
    digits = 3 if ends[1] <= 1 else 1
    low, high = (number(m.get(end), digits) for end in ("low", "high"))
    cells = [
        f'<th scope="row"><bdi>{escape(group or name)}</bdi></th>',
        f'<td class="num muted old">{number(old.get("score"), digits)}</td>' if compare else "",
        f'<td class="num score">{number(m.get("score"), digits)}</td>',
        f'<td class="plot"><svg class="bar" height="{22 if old else 14}">{bars}</svg></td>',
        f'<td class="num muted ci">{low} – {high}</td>',
        change(difference, digits) if compare else "",
        f'<td class="num muted n">{m.get("n", 0):,}</td>',
    ]
    return f"<tr{' class=group' if group else ''}>{''.join(cells)}</tr>"


def change(d: dict | None, digits: int) -> str:
    """The difference from the base; coloured only if its interval excludes zero."""
    if d is None:
        return '<td class="change"></td>'
    score, low, high = (finite(d.get(k)) for k in ("score", "low", "high"))
    if None in (score, low, high):
        return '<td class="num muted change">–</td>'
    kind = "better" if low > 0 else "worse" if high < 0 else "muted"
    interval = f"({low:+.{digits}f} to {high:+.{digits}f})"
    return f'<td class="num {kind} change">{score:+.{digits}f} {interval}</td>'


def bar(m: dict, ends: tuple[float, float], kind: str, y: int) -> str:
    """The score as a bar, its interval as a whisker; lengths in percent fit any width."""
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
        out += "".join(
            f'<line class="whisker" x1="{x}" x2="{x}" y1="{y - 3}" y2="{y + 3}"/>' for x in (a, b)
        )
    return out
