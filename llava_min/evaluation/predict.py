"""Answers for a file of questions, and what they are worth: the one path that `eval.py` and
`train.py` share.

    records -> predict -> rows -> score -> {"exact_match": {"score", "low", "high", "n"}, …}

A row is {id, prompt, prediction, references, record, scores}; `record` is a hash of the whole
conversation and of its pictures' names and sizes. `stopped` is "limit" in the row of an answer that
was cut at max_new_tokens. A row whose pictures cannot be read has an empty prediction and an
`error`; it is never scored, and neither is one without references.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llava_min.checks.formats import check_text
from llava_min.data.chat import render, text_of
from llava_min.data.data_uri import Encoded
from llava_min.data.dataset import Dataset, evaluation_batch
from llava_min.data.formats import Record
from llava_min.data.loader import loader
from llava_min.data.parquet import Embedded
from llava_min.data.processor import Processor
from llava_min.errors import UserError, escape_controls, preview, shorten, warn
from llava_min.evaluation.metrics import Rule, blind, find, interval, measure, resampled
from llava_min.generate import generate
from llava_min.llava import Llava
from llava_min.options import Options
from llava_min.parallel.fsdp import uneven_forwards
from llava_min.parallel.ranks import World, all_gather, all_reduce_sum
from llava_min.training.batch_size import count_supervised
from llava_min.training.log import clock

EVERY = 2.0  # seconds between two lines of progress


# ---- answers


def predict(
    model: Llava,
    processor: Processor,
    records: Sequence[Record],
    batch_size: int = 8,
    exif: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    *,
    world: World | None = None,
    done: dict[int, dict] | None = None,
    save: Callable[[list[dict]], None] = lambda rows: None,
    asked: Callable[[], int] = lambda: 0,
    logprob: bool = False,
    **options,
) -> list[dict]:
    """One row per record, in their order, without scores.

    Records of like length share a batch, the longest first; the answers do not depend on its size.
    Of several ranks each answers its part, and all of them get all rows. `options` go to
    `generate`.

    done: rows that are there already, by the index of their record; these are not asked again save:
    gets the rows of each batch as soon as they are there asked: of a split model, true on any rank
    breaks all off by Interrupted logprob: rows get `logprob`, the mean log probability of the
    answer's tokens, from one more pass over each batch
    """
    world = world or World(0, 1, 0, model.device)
    options |= {
        "eos_token_id": processor.stop_ids,
        "suppress_tokens": processor.suppressed_ids(model.config.text.vocab_size),
    }
    rows = dict(done or {})
    order = sorted(
        (i for i in range(len(records)) if i not in rows), key=lambda i: -records[i].length
    )
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    mine = batches[world.rank :: world.size]
    was_training = model.training
    model.eval()
    start = told = time.perf_counter()
    answered = {}
    with uneven_forwards(model, world, asked):
        prepared = ahead(
            lambda chosen: batch_of(processor, [records[i] for i in chosen], exif), mine
        )
        for n, (chosen, (found, batch)) in enumerate(zip(mine, prepared, strict=True), 1):
            if batch:
                answer(model, processor, found, batch, logprob, options)
            answered.update(zip(chosen, found, strict=True))
            save(found)
            here = min(n * world.size, len(batches))
            now = time.perf_counter()
            if now - told >= EVERY or here == len(batches):
                left = clock((now - start) / here * (len(batches) - here))
                progress(
                    f"answered {min(here * batch_size, len(order)) + len(rows)} of {len(records)} "
                    f"· {left} left"
                )
                told = now
    model.train(was_training)
    for part in all_gather(world, answered):
        rows |= part
    return [rows[i] for i in range(len(records))]


def check_room(
    model: Llava, processor: Processor, records: Sequence[Record], max_new_tokens: int
) -> None:
    """Each question leaves room for its answer in the context of `model`, which may be on meta;
    UserError names the record.
    """
    tokens, room = Dataset([], processor).tokens, model.config.text.context - max_new_tokens
    for record in records:
        if tokens(record, room) > room:  # perhaps: its right answer is counted, too
            asked, _ = processor.encode(
                render(processor.template_name, record.messages[:-1], answer=False)
            )
            if len(asked) > room:
                raise UserError(
                    f"max_new_tokens: {max_new_tokens} and the {len(asked)} tokens of record "
                    f"{shorten(record.id)} are more "
                    f"than the model's context of {model.config.text.context}; lower "
                    "it, or shorten the record"
                )


def ahead(f: Callable, items: Sequence) -> Iterator:
    """f of each item, in a thread that is always one item ahead: the next pictures are read while
    the model works.
    """
    with ThreadPoolExecutor(1) as pool:
        before = None
        for item in items:
            coming = pool.submit(f, item)
            if before:
                yield before.result()
            before = coming
        if before:
            yield before.result()


def check_metrics(names: Sequence[str], best: str | None) -> None:
    """Each metric of `names` can be had, and `best` is what they or the loss give, or UserError."""
    metrics = find(names)
    if not (best or "loss").startswith(("loss", *metrics)):  # pope_f1 is of pope
        raise UserError(
            f"--best-metric: {escape_controls(best)} is not evaluated; give one of "
            f"{', '.join(['loss', *metrics])}"
        )


def on_held_out(
    model: Llava,
    dataset: Dataset,
    records: Sequence[Record],
    loss_of: Callable[[dict], Tensor],
    world: World,
    metrics: Sequence[str],
    batch_size: int,
    asked: Callable[[], int],
    **options,
) -> tuple[dict[str, float], list[dict], list[str]]:
    """{"loss": per supervised token, and each of `metrics`} of the held-out `records`, which the
    ranks share; their rows; and what the scores do not tell, a line each.

    dataset: the training view of the records. loss_of: a batch -> its loss, summed. The rest as in
    `predict`.
    """
    nll, tokens = 0.0, 0
    mine = [(i,) for i in range(world.rank, len(dataset), world.size)]
    model.eval()
    with torch.no_grad(), uneven_forwards(model, world, asked) as check:
        for batch, _ in loader(
            dataset, [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        ):
            nll, tokens = nll + float(loss_of(batch)), tokens + count_supervised(batch)
            check()
    rows = predict(
        model,
        dataset.processor,
        records,
        batch_size,
        dataset.exif,
        world=world,
        asked=asked,
        **options,
    )
    model.train()
    nll, tokens = all_reduce_sum(world, nll, tokens)
    scores = score(rows, metrics)
    said = blind.told(scores) + cut_answers(rows, options["max_new_tokens"])
    return {"loss": nll / tokens} | {name: m["score"] for name, m in scores.items()}, rows, said


def batch_of(
    processor: Processor, records: list[Record], exif: bool
) -> tuple[list[dict], dict[str, Tensor] | None]:
    """The rows of a batch without answers, and the batch of those whose pictures can be read, None
    if there are none.
    """
    rows, ready = [], []
    for record in records:
        rows.append(unanswered(record))
        try:
            ready.append(replace(record, images=record.open_images(exif)))
        except UserError as e:
            rows[-1]["error"] = str(e)
    return rows, evaluation_batch(ready, processor)[0] if ready else None


def unanswered(record: Record) -> dict:
    """The row of a record without its answer."""
    whole = json.dumps([record.messages, [picture_key(p, record) for p in record.images]])
    return {
        "id": record.id,
        "prompt": text_of(record.messages[-2]),
        "prediction": "",
        "references": references(record),
        "record": hashlib.sha256(whole.encode()).hexdigest()[:16],
    }


def picture_key(p: object, record: Record) -> list:
    """What tells a picture from others, before it is opened: its name in its folder, and the size
    of its file.
    """
    if isinstance(p, Embedded):
        return [p.path.name, p.group, p.row, p.index]
    if isinstance(p, Encoded):
        return [hashlib.sha256(p.data).hexdigest()]
    if not isinstance(p, Path):
        return []  # it is in memory alone
    try:
        return [os.path.relpath(p, record.root), os.path.getsize(p)]
    except OSError:  # as will be said when it is opened
        return [os.path.relpath(p, record.root)]


def answer(
    model: Llava,
    processor: Processor,
    rows: list[dict],
    batch: dict[str, Tensor],
    logprob: bool,
    options: dict,
) -> None:
    rows = [row for row in rows if "error" not in row]
    answers = generate(model, batch, **options)
    most = options.get("max_new_tokens", Options.max_new_tokens)
    for row, ids in zip(rows, answers, strict=True):
        row["prediction"] = processor.decode(ids).strip()
        if len(ids) == most:  # an end token is one of the `most` and not among the ids
            row["stopped"] = "limit"
    if logprob:
        for row, value in zip(rows, mean_logprobs(model, batch, answers), strict=True):
            row["logprob"] = value


def cut_answers(rows: Sequence[dict], max_new_tokens: int) -> list[str]:
    """A line about the answers that stopped at the limit, if there are any."""
    cut = [row["id"] for row in rows if row.get("stopped") == "limit"]
    if not cut:
        return []
    return [
        f"{len(cut)} of {len(rows)} answers were cut at --max-new-tokens {max_new_tokens}, "
        f"before their end: {preview(map(shorten, cut), ', ')}; raise it"
    ]


def references(record: Record) -> list[str]:
    """The right answers: the list `references` that the record has beside its conversation, else
    its last answer.
    """
    found = record.extra.get("references", [text_of(record.messages[-1])])
    try:
        if not isinstance(found, list) or not all(isinstance(r, str) for r in found):
            raise UserError(f"references is {shorten(json.dumps(found))}, expected a list of texts")
        for r in found:
            check_text(r, "references")
    except UserError as e:
        raise UserError(f"record {shorten(record.id)}: {e}; correct the record") from None
    return found


@torch.no_grad()
def mean_logprobs(
    model: Llava, batch: dict[str, Tensor], answers: list[list[int]]
) -> list[float | None]:
    """Of each answer's tokens, given what stands before them; None where there is no token."""
    length, longest = batch["input_ids"].shape[1], max(map(len, answers))
    if not longest:
        return [None] * len(answers)
    ids = torch.tensor([[*a, *[0] * (longest - len(a))] for a in answers])  # (B, A)
    real = torch.tensor([[i < len(a) for i in range(longest)] for a in answers])  # (B, A)
    x = model.hidden_states(
        torch.cat([batch["input_ids"], ids], 1).to(model.device),
        batch.get("pixel_values"),
        # (B, T + A, C)
        torch.cat([batch["attention_mask"], real], 1).to(model.device),
    )
    logs = model.lm_head(x[:, length - 1 : -1]).float().log_softmax(-1).cpu()  # (B, A, V)
    found = logs.gather(2, ids[:, :, None])[:, :, 0]  # (B, A)
    return [float(row[: len(a)].mean()) if a else None for row, a in zip(found, answers)]


# ---- answers on disk


def read_answers(folder: Path, records: Sequence[Record]) -> dict[int, dict]:
    """What the files predictions*.jsonl of a run that was interrupted hold, by the index of the
    record.

    A last line that was cut short is taken out of its file; an answer that stands twice counts
    once. Raises UserError for any other line that is no answer, and for answers to other questions
    or about other pictures.
    """
    key = lambda row: json.dumps([row[name] for name in ("id", "prompt", "references", "record")])
    waiting: dict[str, list[int]] = {}
    for i, r in enumerate(records):
        waiting.setdefault(key(unanswered(r)), []).append(i)
    found, strange, twice, n = {}, [], 0, 0
    for path in sorted(folder.glob("predictions*.jsonl")):
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            warn(f"{path}: its last line was cut short; that record is answered again")
            os.truncate(path, end)
        for number, line in enumerate(data[:end].split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                asked = key(row)
                row["prediction"].encode()  # an error unless it is text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(
                    f"{path}:{number}: is no answer of this program; remove the line, "
                    "or give another --out"
                ) from None
            n += 1
            if "error" in row:  # asked again: its pictures may have been mended
                continue
            if asked not in waiting:
                strange.append(row["id"])
            elif not waiting[asked]:
                twice += 1
            else:
                found[waiting[asked].pop(0)] = row
    if strange:
        raise UserError(
            f"{folder}: {len(strange)} of its {n} answers are to questions that --data does not "
            "hold, or about "
            f"other pictures ({preview(map(shorten, strange), ', ')}); give another --out"
        )
    if twice:
        warn(f"{folder}: {twice} of its {n} answers stand there twice and count once")
    return found


# ---- scores


class Measured(NamedTuple):
    """What every metric found: the indices of the rows that are scored, and per metric their
    statistics (N, K) and the rule that makes overall scores of their sums, and which of them it
    does not measure.
    """

    rows: np.ndarray
    parts: dict[str, tuple[np.ndarray, Rule]]
    unseen: dict[str, blind.Found]


def score(rows: list[dict], metrics: Sequence[str], seed: int = 0) -> dict[str, dict]:
    """{name: {"score", "low", "high", "n"}} with 95 % intervals, and `remarks`, a list of lines,
    where a metric does not measure some of the examples; every row gets its own `scores`.

    A metric that fails is named in a warning and has no entry. Raises UserError where no row can be
    scored.
    """
    return table(measure_all(rows, metrics), seed)


def measure_all(rows: list[dict], metrics: Sequence[str]) -> Measured:
    scored = [i for i, row in enumerate(rows) if row["references"] and "error" not in row]
    if not scored:
        raise UserError(
            f"none of {len(rows)} records has both an answer to score and one to compare it with; "
            "give --data with right answers, and pictures that can be read"
        )
    for row in rows:
        row["scores"] = {}
    predictions, right = (
        [rows[i]["prediction"] for i in scored],
        [rows[i]["references"] for i in scored],
    )
    parts, unseen = {}, {}
    for name, metric in find(metrics).items():
        try:
            scores, statistics, rule = measure(metric, predictions, right)
        except Exception as e:  # whatever a metric raises, the others are worth having
            kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
            warn(f"metric {name} failed and is left out: {kind}{escape_controls(e)}")
            continue
        parts[name], unseen[name] = (statistics, rule), blind.unseen(name, predictions, right)
        for i, value in zip(scored, scores):
            rows[i]["scores"][name] = value
    return Measured(np.array(scored), parts, unseen)


def table(found: Measured, seed: int = 0, among: Sequence[int] | None = None) -> dict[str, dict]:
    """Overall scores of the rows, or of those `among` them."""
    keep = np.isin(found.rows, among) if among is not None else slice(None)
    out = {}
    for name, (values, n) in overall(
        {name: (s[keep], rule) for name, (s, rule) in found.parts.items()}, seed
    ).items():
        out[name] = interval(values, n)
        if lines := blind.remarks(found.unseen.get(name, ()), keep):
            out[name]["remarks"] = lines
    return out


def overall(
    parts: dict[str, tuple[np.ndarray, Rule]], seed: int
) -> dict[str, tuple[np.ndarray, int]]:
    """(1 + R,) scores of the rows and of R resamples of them, the same ones for every metric, and
    how many rows.
    """
    if not parts or not all(len(s) for s, _ in parts.values()):
        return {}
    sums, at, out = resampled(np.concatenate([s for s, _ in parts.values()], 1), seed), 0, {}
    for name, (s, rule) in parts.items():
        for suffix, values in rule(sums[:, at : at + s.shape[1]]).items():
            if np.isfinite(values[0]):
                out[name + suffix] = values, len(s)
            else:
                warn(
                    f"metric {name}{suffix} is not defined on these {len(s)} answers and is left "
                    "out"
                )
        at += s.shape[1]
    return out


def difference(
    base: Measured, tuned: Measured, seed: int = 0, among: Sequence[int] | None = None
) -> dict[str, dict]:
    """What `tuned` scores more than `base` on the rows that both have, or on those `among` them,
    with the interval of a paired bootstrap: {name: {"base", "tuned", "score", "low", "high", "n"}},
    `score` being the difference.
    """
    rows, i, j = np.intersect1d(base.rows, tuned.rows, return_indices=True)
    if among is not None:
        i, j = i[keep := np.isin(rows, among)], j[keep]
    names = [name for name in base.parts if name in tuned.parts] if len(i) else []
    a = overall({name: (base.parts[name][0][i], base.parts[name][1]) for name in names}, seed)
    b = overall({name: (tuned.parts[name][0][j], tuned.parts[name][1]) for name in names}, seed)
    return {
        name: {
            "base": float(a[name][0][0]),
            "tuned": float(b[name][0][0]),
            **interval(b[name][0] - a[name][0], len(i)),
        }
        for name in a
        if name in b
    }
