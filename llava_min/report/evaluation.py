"""The page of an evaluation: scores with their intervals, settings, and every example, worst first."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_min.evaluation.metrics.blind import told
from llava_min.report.page import (
    LONGEST,
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
from llava_min.report.pictures import Thumbnails

TEXT = 16 * 2**20  # characters of all questions, references and answers; beyond it texts are cut
ROWS = 20_000  # examples; beyond it the middling ones are left out, and the page says so


def write_eval_report(
    path: str | os.PathLike,
    rows: Sequence[dict],
    table: dict[str, dict],
    settings: dict,
    compare: dict | None = None,
) -> None:
    """Write `path`, an HTML page of the scores, the settings and the examples, worst first.

    rows: {"id", "prompt", "prediction", "references": [str], "scores": {metric: float}}, and where
    there are any
        "earlier": what was said before the prompt, "images": [path, record's embedded picture or PIL image], "logprob":
        the answer's mean log-probability, and "stopped": "limit" for an answer that was cut;
        with `compare` also "base_prediction", "base_scores" and "base_stopped"
    table: {metric: {"score", "low", "high", "n"}}; the name `metric group` is a row under its
        metric; `remarks`, a list of lines, stands under the scores
    settings: what made the numbers (model, data, prompt, template, decoding …), shown in their order; `remarks`, a list of
        lines, stands under the scores
    compare: {"name": the base's, "table": its scores as above, "difference": {metric: {"score", "low", "high"}}},
        the difference being this less the base with its paired interval

    A value that is not finite is shown as no score. Raises UserError when the file cannot be
    written.
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
        notes.append(
            f"The {ROWS // 2:,} worst and {ROWS // 2:,} best of {total:,} examples are here; "
            "predictions.jsonl has all."
        )
    limit = max(200, min(LONGEST, TEXT // (5 * max(1, len(ordered)))))
    # the first of the ends get the room there is for pictures: the worst, the best, the second
    # worst …
    ends = [i for pair in zip(ordered, reversed(ordered)) for i in pair]
    pictures = Thumbnails(p for i in ends for p in rows[i].get("images") or [])
    notes += pictures.notes()
    missing = {m: sum(finite(r.get("scores", {}).get(m)) is None for r in rows) for m in metrics}
    notes += [f"{n:,} examples have no {shown(m)}." for m, n in missing.items() if n]

    def packed(i: int) -> dict:
        row = rows[i]
        references = Counter(map(str, row["references"])).most_common()
        more = [[f"… {len(references) - 10:,} more", 1]] if len(references) > 10 else []
        out = {
            "id": cut(row["id"], 200),
            "q": cut(row["prompt"], limit),
            "a": cut(row["prediction"], limit),
            "r": [[cut(t, limit), n] for t, n in references[:10]] + more,
            "s": [finite(row.get("scores", {}).get(m)) for m in metrics],
        }
        if row.get("earlier"):
            out["e"] = cut(row["earlier"], limit)
        if row.get("images"):
            out["p"] = [pictures.place(p) for p in row["images"]]
        if finite(row.get("logprob")) is not None:
            out["l"] = round(row["logprob"], 4)
        if row.get("stopped") == "limit":
            out["x"] = True
        if compare:
            if row.get("base_stopped") == "limit":
                out["y"] = True
            out["b"] = cut(row.get("base_prediction", ""), limit)
            out["d"] = row.get("base_prediction", "") != row["prediction"]
            out["t"] = [finite(row.get("base_scores", {}).get(m)) for m in metrics]
        return out

    scales = {m: scale([r.get("scores", {}).get(m) for r in rows]) for m in metrics}
    data = {
        "metrics": [{"name": shown(m), "low": scales[m][0], "high": scales[m][1]} for m in metrics],
        "compare": compare is not None,
        "pictures": pictures.urls,
        "rows": [packed(i) for i in sorted(ordered)],
    }
    name = settings.get("adapter") or settings.get("model") or "Evaluation"
    under = [
        *([f"against {compare.get('name', 'the base')}"] if compare else []),
        *([settings["data"]] if settings.get("data") else []),
        f"{total:,} examples",
    ]
    remarks = told(table)
    if compare:
        remarks += [
            f"{compare.get('name', 'the base')}: {line}"
            for line in told(compare.get("table", {}))
            if line not in remarks
        ]
    remarks += settings.get("remarks", ())
    body = "\n".join(
        (
            heading("Comparison" if compare else "Evaluation", name, under),
            f"<section><h2>Scores</h2>{scores_table(table, scales, compare)}{notes_list(remarks)}</section>",
            settings_list({k: v for k, v in settings.items() if k != "remarks"}, "Settings"),
            asset("examples.html").replace("<!--notes-->", notes_list(notes)),
        )
    )
    write(Path(path), page(f"{name} – evaluation", body, data, "eval.js"))


def scale(values: Iterable[object]) -> tuple[float, float]:
    """The ends of a metric's axis: fractions to 1, percents to 100, others as far as they go."""
    found = [v for v in map(finite, values) if v is not None] or [0.0]
    top = max(found)
    return min(0.0, *found, 0.0), 1.0 if top <= 1 else 100.0 if top <= 100 else top


def scores_table(table: dict[str, dict], scales: dict, compare: dict | None) -> str:
    """A row for each score, those of groups (`metric group`) under their metric's."""
    if not table:
        return '<p class="empty">There is no score.</p>'
    base, difference = (
        (compare.get("table", {}), compare.get("difference", {})) if compare else ({}, {})
    )
    under: dict[str, list[tuple[str, str]]] = {}
    for name in table:
        metric, _, group = name.partition(" ")
        metric, group = (metric, group) if metric in table else (name, "")
        under.setdefault(metric, []).append((name, group))
    out = ""
    for metric, names in under.items():
        for name, group in names:
            m, old = table[name], base.get(name, {})
            ends = scales.get(metric) or scale([m.get("score"), m.get("high"), old.get("score")])
            bars = (
                bar(old, ends, "base", 3) + bar(m, ends, "own", 11)
                if old
                else bar(m, ends, "own", 7)
            )
            cells = [
                f'<th scope="row"><bdi>{escape(group or name)}</bdi></th>',
                f'<td class="num muted old">{number(old.get("score"))}</td>' if compare else "",
                f'<td class="num score">{number(m.get("score"))}</td>',
                f'<td class="plot"><svg class="bar" height="{22 if old else 14}">{bars}</svg></td>',
                f'<td class="num muted ci">{number(m.get("low"))} – {number(m.get("high"))}</td>',
                change(difference.get(name), 3 if ends[1] <= 1 else 1) if compare else "",
                f'<td class="num muted n">{m.get("n", 0):,}</td>',
            ]
            out += f"<tr{' class=group' if group else ''}>{''.join(cells)}</tr>"
    names = [
        "Metric",
        "Base",
        "Tuned" if compare else "Score",
        "",
        "95 % interval",
        "Change (95 %)",
        "n",
    ]
    names = names if compare else [n for n in names if n not in ("Base", "Change (95 %)")]
    head = "".join(
        f'<th class="num">{n}</th>' if i else f"<th>{n}</th>" for i, n in enumerate(names)
    )
    return (
        '<div class="card"><table '
        f'class="scores{" pair" if compare else ""}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{out}</tbody></table></div>"
    )


def change(d: dict | None, digits: int) -> str:
    """The difference to the base; coloured only when its interval leaves zero out."""
    if d is None:
        return '<td class="change"></td>'
    score, low, high = (finite(d.get(k)) for k in ("score", "low", "high"))
    if None in (score, low, high):
        return '<td class="num muted change">–</td>'
    kind = "better" if low > 0 else "worse" if high < 0 else "muted"
    return f'<td class="num {kind} change">{score:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})</td>'


def bar(m: dict, ends: tuple[float, float], kind: str, y: int) -> str:
    """A bar of the score with its interval as a whisker; lengths are in percent, so that it fits
    any width.
    """
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
