"""From a prompt with images to an answer: `generate` for batches, `stream` for one as it comes.

The loops are in decoding.py, and what each option does is in sampling.py.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llava_min.cache import ChatCache
from llava_min.decoding import beam_search, decode, left_padded
from llava_min.errors import UserError
from llava_min.llava import Llava
from llava_min.options import read_options

new_cache = ChatCache  # public as `llava_min.new_cache`


def generate(
    model: Llava,
    batch: dict,
    *,
    cache: ChatCache | None = None,
    compile: bool = False,
    **options: Any,
) -> list[list[int]]:
    """The new ids of every answer, `num_return_sequences` for each row in turn, without the end
    token.

    batch: the processor's dict of input_ids (B, T), attention_mask (B, T) and, if there are images,
    pixel_values (images, 3, S, S). options: those of `Options`. cache: a chat's (`new_cache`).
    compile: make the step one fused program, which takes a while once and pays in long answers.

    Raises UserError for an option out of range, a prompt that leaves no room for max_new_tokens in
    the context, images and image tokens that do not match, and logits that are not finite.
    """
    o = read_options(options)
    if o.num_beams > 1:
        ids = beam_search(model, batch, o, cache, compile)
    else:
        ids = torch.stack(list(decode(model, batch, o, cache, compile)), dim=1)
    stop = {*o.eos_ids(model), -1}
    return [list(itertools.takewhile(lambda id: id not in stop, row)) for row in ids.tolist()]


def stream(
    model: Llava,
    batch: dict,
    processor: Any = None,
    *,
    ids: list[int] | None = None,
    cache: ChatCache | None = None,
    compile: bool = False,
    **options: Any,
) -> Iterator[str]:
    """The one answer's text in pieces as they come, never half a character.

    processor (or a tokenizer) turns ids to text, None: the one that `load` attached to the model; a
    processor's `stop_ids` end the answer unless `eos_token_id` is given. The new ids are appended
    to the list `ids`, if one is given. The rest as in `generate`.
    """
    processor = getattr(model, "processor", None) if processor is None else processor
    options.setdefault("eos_token_id", getattr(processor, "stop_ids", None))
    o = read_options(options)
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "stream"):
        expected = "expected the processor that `load` gives"
        raise UserError(f"{type(processor).__name__}, {expected}", "processor")
    if len(left_padded(model, batch)[0]) * o.forks != 1:
        raise UserError(
            "one answer to one prompt can be streamed; "
            "use generate for batches, beams and several answers",
            "stream",
        )
    steps = decode(model, batch, o, cache, compile)
    return text_pieces(steps, tokenizer, set(o.eos_ids(model)), [] if ids is None else ids)


def text_pieces(
    steps: Iterator[Tensor], tokenizer: Any, eos: set[int], ids: list[int]
) -> Iterator[str]:
    """Columns of one row as text, up to an id of `eos`; the ids are appended to `ids`."""
    text = tokenizer.stream()
    with contextlib.closing(steps):
        for column in steps:
            id = int(column)
            if id in eos:
                break
            ids.append(id)
            if piece := text.push(id):
                yield piece
    if piece := text.flush():
        yield piece
