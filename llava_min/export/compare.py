"""How far merged models are from the trained one: what each says next, over the same rows.

An adapter that was trained over quantized weights is at home on those. Merged into the weights that
they came from, the model is another, by as much as quantizing changed it; on rows with answers that
is measured by

    mean KL          Σ p (log p - log q) of a token, p the trained model's, q the merged one's
    top-1 agreement  share of the tokens whose most likely next token is the same

over the supervised tokens, in nats. One model is in memory at a time, and beside it the log
probabilities of the trained one: 4 bytes for each token and entry of the vocabulary.

Shapes: S supervised tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_min.config import IGNORE
from llava_min.data.dataset import Dataset
from llava_min.data.loader import loader
from llava_min.errors import UserError
from llava_min.llava import Llava

ROWS = 8  # that a model reads at once


@dataclass(frozen=True)
class Distance:
    kl: float
    agreement: float  # 0 to 1


def batches_of(dataset: Dataset) -> list[dict[str, Tensor]]:
    """The rows of `dataset`, a few at a time. Raises UserError for what a record lacks."""
    rows = [(i,) for i in range(len(dataset))]
    made, errors = zip(*loader(dataset, [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]))
    if found := sum(errors, []):
        raise UserError(found[0])
    return list(made)


@torch.no_grad()
def log_probs(model: Llava, batch: dict[str, Tensor]) -> Tensor:
    """(S, V) fp32 on the CPU: of what comes at each supervised place of a batch."""
    ids, labels = batch["input_ids"].to(model.device), batch["labels"].to(model.device)
    x = model.hidden_states(ids, batch.get("pixel_values"))[:, :-1]
    logits = model.lm_head(x[labels[:, 1:] != IGNORE])
    return logits.float().log_softmax(-1).cpu()


def distance(model: Llava, batches: list[dict[str, Tensor]], trained: list[Tensor]) -> Distance:
    """Of `model` from the one whose `log_probs` of each batch are `trained`."""
    kl = same = tokens = 0
    for batch, p in zip(batches, trained, strict=True):
        q = log_probs(model, batch)
        kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    return Distance(max(kl, 0.0) / tokens, same / tokens)  # rounding may leave it below 0
