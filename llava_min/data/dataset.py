"""Records -> the two views of a record: one to train on, one to evaluate with.

Between records.py, which reads the files, and the model. `Dataset` and `collate` make training
batches, with the answers in the ids and the labels; `join` packs several records into one row;
loader.py runs them along a plan of sampler.py. `evaluation_batch` makes prompts from the same
records, which stop where the last answer begins.

Shapes: B batch (rows), T tokens, N images, S pixels a side.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from llava_min.checks.dataset import refuse_long, report_shortened
from llava_min.config import IGNORE
from llava_min.data.chat import Piece, count_images, render, text_of
from llava_min.data.formats import Record
from llava_min.data.processor import Processor
from llava_min.errors import UserError, shorten

# ---- the training view


class Dataset(torch.utils.data.Dataset):
    """Records as {input_ids, labels: lists of one length, pixel_values (N, 3, S, S) if any image}.

    `too_long` says what happens to a record of more than `max_length` tokens, images included:
        error    a UserError when the dataset is made: truncating would drop EOS, and sometimes
                 every supervised token
        shorten  its last turns are dropped whole until it fits, and the record if its first turn
                 alone is too long. A warning counts both.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: Processor,
        *,
        max_length: int = 2048,
        exif: bool = False,
        too_long: Literal["error", "shorten"] = "error",
    ):
        self.records, self.processor, self.exif = list(records), processor, exif
        long = {}  # index of a record that is too long -> how messages name it
        for i, r in enumerate(records):
            n = self.tokens(r, max_length)
            if n > max_length:
                long[i] = f"{shorten(r.id)} ({n})"
        if long and too_long == "error":
            refuse_long(list(long.values()), len(records), max_length)
        for i in long:
            self.records[i] = self.shortened(records[i], max_length)
        cut = [name for i, name in long.items() if self.records[i]]
        dropped = [name for i, name in long.items() if not self.records[i]]
        report_shortened(cut, dropped, len(records), max_length)
        self.records = [r for r in self.records if r]

    def pieces(self, r: Record) -> list[Piece]:
        """A record as text and special tokens; UserError if the template has no place for it."""
        try:
            return render(self.processor.template_name, r.messages, answer=True)
        except UserError as e:
            raise UserError(f"record {shorten(r.id)}: {e}") from None

    def tokens(self, r: Record, enough: int = 0) -> int:
        """The tokens of a record, or an upper bound if that is at most `enough`."""
        pieces = self.pieces(r)
        bound = self.token_bound(pieces)  # most records are short, and need no tokenizer here
        return bound if bound <= enough else len(self.processor.encode(pieces)[0])

    def token_bound(self, pieces: list[Piece]) -> int:
        """At least the number of their tokens, without the tokenizer.

        A token is at least a byte, and NFC (Unicode TR15) makes at most three bytes of one.
        """
        bound = 1  # BOS
        for piece in pieces:
            if piece.text is not None:
                bytes_of_one = 1 if piece.text.isascii() else 3
                bound += 2 + len(piece.text.encode()) * bytes_of_one
            else:
                bound += self.processor.tokens_per_image if piece.token == "image" else 1
        return bound

    def shortened(self, r: Record, max_length: int) -> Record | None:
        """As many of its first exchanges as fit; None if not even one does."""

        def first(n: int) -> Record:
            has_system = len(r.messages) % 2
            messages = r.messages[: has_system + 2 * n]
            images = count_images(messages)
            return replace(r, messages=messages, images=r.images[:images])

        # bisect: tokens grow with the number of exchanges
        exchanges = range(1, len(r.messages) // 2)
        size = lambda n: self.tokens(first(n), max_length)
        n = bisect_right(exchanges, max_length, key=size)
        # the rest must hold an answer that is learned
        answers = [m for m in first(n).messages if m["role"] == "assistant"]
        return first(n) if n and any(m.get("loss") is not False for m in answers) else None

    def lengths(self, exact: bool = False) -> list[int]:
        """What `sampler.plan` reads, negative for a record without images.

        The number of tokens if `exact`, else of words, with 256 for each image.
        """
        length = self.tokens if exact else lambda r: r.length
        return [length(r) if r.images else -length(r) for r in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        r = self.records[i]
        images = [r.open_images(self.exif)] if r.images else None
        return self.processor.training(r.messages, images)


def join(items: list[dict]) -> dict:
    """Pack several records into one row; `segments` numbers the record of each token."""
    out = {"input_ids": [], "labels": [], "segments": []}
    for n, x in enumerate(items):
        out["input_ids"] += x["input_ids"]
        # the last token of one record does not predict the first of the next
        out["labels"] += [IGNORE, *x["labels"][1:]]
        out["segments"] += [n] * len(x["input_ids"])
    pixels = [x["pixel_values"] for x in items if "pixel_values" in x]
    return out | {"pixel_values": torch.cat(pixels)} if pixels else out


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """input_ids, labels (B, T) int64, padded on the right; pixel_values (N, 3, S, S), in reading
    order; for joined records segments (B, T), −1 at padding.

    Without items it makes a row without supervised tokens, for a rank that has to run a step along
    with the others.
    """
    items = items or [{"input_ids": [0, 0], "labels": [IGNORE, IGNORE]}]
    T = max(len(x["input_ids"]) for x in items)

    def padded(key: str, value: int) -> torch.Tensor:
        out = torch.full((len(items), T), value)
        for row, x in zip(out, items):
            row[: len(x[key])] = torch.tensor(x[key])
        return out

    out = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORE)}
    if "segments" in items[0]:
        out["segments"] = padded("segments", -1)
    pixels = [x["pixel_values"] for x in items if "pixel_values" in x]
    return out | {"pixel_values": torch.cat(pixels)} if pixels else out


# ---- the evaluation view


def evaluation_batch(
    records: list[Record], processor: Processor, exif: bool = False
) -> tuple[dict[str, torch.Tensor], list[str], list[list[str]]]:
    """(batch padded on the left, last questions, references).

    A prompt is everything before the last answer of a record, and that answer is its reference.
    Earlier answers are those of the record.
    """
    images = [r.open_images(exif) for r in records]
    prompts = [r.messages[:-1] for r in records]
    batch = processor.chat(prompts, images if any(images) else None)
    questions = [text_of(r.messages[-2]) for r in records]
    return batch, questions, [[text_of(r.messages[-1])] for r in records]
