"""Answers for a file of questions: the one path that `eval.py` and the evaluation inside `train.py` share."""

from collections.abc import Callable, Sequence

import torch

from llava_min.data.dataset import Record, evaluation_batch
from llava_min.data.processor import Processor
from llava_min.generate import generate
from llava_min.llava import Llava
from llava_min.metrics import METRICS, summary


def predict(model: Llava, processor: Processor, records: Sequence[Record], batch_size: int = 8, exif: bool = False,
            progress: Callable[[str], None] = lambda line: None, **options) -> list[dict]:
    """One {id, prompt, prediction, references} per record, in their order.

    Rows of like length share a batch; the answers do not depend on its size. `options` go to `generate`.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(records)), key=lambda i: records[i].length)
    rows: list[dict] = [{}] * len(records)
    options |= {"eos_token_id": processor.stop_ids, "suppress_tokens": processor.silent_ids(model.config.text.vocab_size)}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch, prompts, references = evaluation_batch([records[i] for i in chosen], processor, exif=exif)
        answers = generate(model, batch, **options)
        for i, prompt, right, ids in zip(chosen, prompts, references, answers, strict=True):
            rows[i] = {"id": records[i].id, "prompt": prompt, "prediction": processor.decode(ids), "references": right}
        progress(f"answered {start + len(chosen)} of {len(records)}")
    model.train(was_training)
    return rows


def score(rows: list[dict], metrics: Sequence[str], seed: int = 0) -> dict[str, dict]:
    """The overall result of each metric; every row gets its own `scores`."""
    table = {}
    for name in metrics:
        scores = METRICS[name]([r["prediction"] for r in rows], [r["references"] for r in rows])
        for row, value in zip(rows, scores, strict=True):
            row.setdefault("scores", {})[name] = value
        table[name] = summary(scores, seed)
    return table
