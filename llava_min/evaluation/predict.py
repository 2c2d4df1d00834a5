"""Answers for a file of questions: the one path that `eval.py` and `train.py` share.

    records -> predict -> rows -> score.py -> {"exact_match": {"score", "low", "high", "n"}, …}

A row is {id, prompt, prediction, references, record}; `record` is a hash of the conversation and of
the names and sizes of its images. A row whose images cannot be read has an empty prediction and an
`error`. `stopped` is "limit" where the answer was cut at max_new_tokens.

Shapes: B batch, T tokens of the prompts, M tokens of the longest answer, C width, V vocabulary.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llava_min.checks.formats import check_text
from llava_min.data.chat import render, text_of
from llava_min.data.data_uri import Encoded
from llava_min.data.dataset import Dataset, evaluation_batch
from llava_min.data.formats import Record
from llava_min.data.parquet import Embedded
from llava_min.data.processor import Processor
from llava_min.errors import UserError, escape_controls, shorten
from llava_min.evaluation.loss import mean_loss
from llava_min.evaluation.metrics import blind, find
from llava_min.evaluation.score import cut_answers, score
from llava_min.generate import generate
from llava_min.llava import Llava
from llava_min.parallel.fsdp import uneven_forwards
from llava_min.parallel.ranks import World, all_gather
from llava_min.sampling import Options
from llava_min.training.log import clock

PROGRESS_SECONDS = 2.0


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
    stop_requested: Callable[[], int] = lambda: 0,
    logprob: bool = False,
    **options,
) -> list[dict]:
    """One row per record, in their order, without scores.

    Records of similar length share a batch, the longest first; the answers do not depend on the
    batch size. With several ranks each answers its part, and all of them return all rows. `options`
    go to `generate`.

    done: rows that exist already, by the index of their record; these are not asked again.
    save: called with the rows of each batch as soon as they exist.
    stop_requested: where it is true on any rank of a sharded model, all raise Interrupted.
    logprob: rows also get `logprob`, the mean log probability of the answer's tokens, at the cost
    of one more forward pass over each batch.
    """
    world = world or World(0, 1, 0, model.device)
    options |= {
        "eos_token_id": processor.stop_ids,
        "suppress_tokens": processor.suppressed_ids(model.config.text.vocab_size),
    }
    rows = dict(done or {})
    # sorted by length there is little padding; the longest first, so memory runs out at once
    order = [i for i in range(len(records)) if i not in rows]
    order.sort(key=lambda i: -records[i].length)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    own_batches = batches[world.rank :: world.size]
    prepare = lambda indices: make_batch(processor, [records[i] for i in indices], exif)

    answered: dict[int, dict] = {}
    start = last_line = time.perf_counter()
    was_training = model.training
    model.eval()
    with uneven_forwards(model, world, stop_requested):
        prepared = read_ahead(prepare, own_batches)
        for n, (indices, (new, batch)) in enumerate(zip(own_batches, prepared, strict=True), 1):
            if batch:
                answer(model, processor, new, batch, logprob, options)
            answered.update(zip(indices, new, strict=True))
            save(new)

            # the other ranks are about as far
            finished, now = min(n * world.size, len(batches)), time.perf_counter()
            if now - last_line >= PROGRESS_SECONDS or finished == len(batches):
                left = clock((now - start) / finished * (len(batches) - finished))
                count = min(finished * batch_size, len(order)) + len(rows)
                progress(f"answered {count} of {len(records)} · {left} left")
                last_line = now
    model.train(was_training)
    for part in all_gather(world, answered):
        rows |= part
    return [rows[i] for i in range(len(records))]


def read_ahead(f: Callable, items: Sequence) -> Iterator:
    """f(item) for each item, computed one item ahead in a thread: the next images are read while
    the model runs.
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


def make_batch(
    processor: Processor, records: list[Record], exif: bool
) -> tuple[list[dict], dict[str, Tensor] | None]:
    """The unanswered rows of `records`, and the model's inputs for those whose images can be read,
    or None if there are none.
    """
    rows, readable = [], []
    for record in records:
        rows.append(unanswered(record))
        try:
            readable.append(replace(record, images=record.open_images(exif)))
        except UserError as e:
            rows[-1]["error"] = str(e)
    return rows, evaluation_batch(readable, processor)[0] if readable else None


def answer(
    model: Llava,
    processor: Processor,
    rows: list[dict],
    batch: dict[str, Tensor],
    logprob: bool,
    options: dict,
) -> None:
    """Fill in `prediction` of the rows that `batch` is made of, and what `predict` adds to it."""
    rows = [row for row in rows if "error" not in row]
    answers = generate(model, batch, **options)
    limit = options.get("max_new_tokens", Options.max_new_tokens)
    for row, ids in zip(rows, answers, strict=True):
        row["prediction"] = processor.decode(ids).strip()
        if len(ids) == limit:  # EOS counts towards the limit and is not among the ids
            row["stopped"] = "limit"
    if logprob:
        for row, value in zip(rows, mean_logprobs(model, batch, answers), strict=True):
            row["logprob"] = value


@torch.no_grad()
def mean_logprobs(
    model: Llava, batch: dict[str, Tensor], answers: list[list[int]]
) -> list[float | None]:
    """The mean log probability of each answer's tokens, in nats; None for an empty answer."""
    length, longest = batch["input_ids"].shape[1], max(map(len, answers))
    if not longest:
        return [None] * len(answers)
    # teacher forcing: the answers follow their prompts in one pass
    ids = torch.tensor([[*a, *[0] * (longest - len(a))] for a in answers])  # (B, M)
    valid = torch.tensor([[i < len(a) for i in range(longest)] for a in answers])  # (B, M)
    x = model.hidden_states(
        torch.cat([batch["input_ids"], ids], 1).to(model.device),
        batch.get("pixel_values"),
        torch.cat([batch["attention_mask"], valid], 1).to(model.device),
    )  # (B, T + M, C)
    # the token before an answer's first predicts it, and its last predicts nothing
    logprobs = model.lm_head(x[:, length - 1 : -1]).float().log_softmax(-1).cpu()  # (B, M, V)
    chosen = logprobs.gather(2, ids[:, :, None])[:, :, 0]  # (B, M)
    return [float(row[: len(a)].mean()) if a else None for row, a in zip(chosen, answers)]


# ---- a record's row


def unanswered(record: Record) -> dict:
    """The row of a record without its answer. Raises UserError for bad `references`."""
    whole = json.dumps([record.messages, [image_key(p, record) for p in record.images]])
    return {
        "id": record.id,
        "prompt": text_of(record.messages[-2]),
        "prediction": "",
        "references": references(record),
        "record": hashlib.sha256(whole.encode()).hexdigest()[:16],
    }


def image_key(image: object, record: Record) -> list:
    """What identifies an image without opening it: its path in its folder, and its file's size."""
    if isinstance(image, Embedded):
        return [image.path.name, image.group, image.row, image.index]
    if isinstance(image, Encoded):
        return [hashlib.sha256(image.data).hexdigest()]
    if not isinstance(image, Path):
        return []  # it exists in memory alone
    path = os.path.relpath(image, record.root)
    try:
        return [path, os.path.getsize(image)]
    except OSError:  # opening it raises the error that the user reads
        return [path]


def references(record: Record) -> list[str]:
    """The right answers: the record's list `references`, else its last message.

    Raises UserError where `references` is not a list of texts.
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


# ---- before and during training


def check_room(
    model: Llava, processor: Processor, records: Sequence[Record], max_new_tokens: int
) -> None:
    """Every question leaves room for its answer in the context of `model`, which may be on meta;
    UserError names the first record that does not.
    """
    context = model.config.text.context
    room, upper_bound = context - max_new_tokens, Dataset([], processor).tokens
    for record in records:
        if upper_bound(record, room) <= room:  # cheap; it counts the right answer, too
            continue
        pieces = render(processor.template_name, record.messages[:-1], answer=False)
        ids, _ = processor.encode(pieces)
        if len(ids) > room:
            raise UserError(
                f"{max_new_tokens} and the {len(ids)} tokens of record {shorten(record.id)} are "
                f"more than the model's context of {context}; lower it, or shorten the record",
                "max_new_tokens",
            )


def check_metrics(names: Sequence[str], best: str | None) -> None:
    """Every metric of `names` is available, and `best` is one of their scores, or UserError."""
    known = ["loss", *find(names)]
    if best and not best.startswith(tuple(known)):  # pope gives pope_f1, too
        raise UserError(
            f"{escape_controls(best)} is not evaluated; give one of {', '.join(known)}",
            "best_metric",
        )


def on_held_out(
    model: Llava,
    dataset: Dataset,
    records: Sequence[Record],
    loss_of: Callable[[dict], Tensor],
    world: World,
    metrics: Sequence[str],
    batch_size: int,
    stop_requested: Callable[[], int],
    **options,
) -> tuple[dict[str, float], list[dict], list[str]]:
    """Evaluate held-out `records` during training; the ranks share the work.

    dataset: the training view of the records. loss_of: a batch -> its summed loss. The rest as in
    `predict`. Returns {"loss": per supervised token, metric: score}, the rows, and lines about what
    the scores do not show.
    """
    model.eval()
    loss = mean_loss(model, dataset, loss_of, batch_size, world, stop_requested)
    options |= {"world": world, "stop_requested": stop_requested}
    rows = predict(model, dataset.processor, records, batch_size, dataset.exif, **options)
    model.train()

    scores = score(rows, metrics)
    lines = blind.remark_lines(scores) + cut_answers(rows, options["max_new_tokens"])
    values = {name: m["score"] for name, m in scores.items()}
    return {"loss": loss} | values, rows, lines
