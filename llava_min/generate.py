"""From a prompt with pictures to new tokens: greedy, sampling, beam search and streaming.

What each option means, and the order in which options act on the scores, is `generate` of Hugging Face
transformers 5.23; given the same logits the ids are equal, sampled ones included.

The pictures and the prompt are read once into a `KVCache`, whatever follows; a caller may keep a `Conversation`
of it for the next turn. Greedy decoding and sampling then yield a column of ids per step, so that a batch and a
stream are one loop; beams and several answers per prompt are branches of the cache. On a GPU nothing in the loops
waits for the device, except a look at every CHECK_EVERY-th step.

Shapes: B prompts, N answers or beams per prompt, R = B * N rows, T prompt tokens, V vocabulary,
M max_new_tokens.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llava_min.cli import UserError
from llava_min.conversation import Conversation, roomy
from llava_min.llama import LAST, KVCache
from llava_min.llava import Llava
from llava_min.options import Options, read_options

CHECK_EVERY = 16  # steps between two looks at whether all rows have ended, where a look waits for the device
NEVER = -1e9  # the score of what is not there, as transformers writes it

new_cache = Conversation  # the name it has in the package


# The prompt


def read_batch(model: Llava, batch: Mapping) -> tuple[Tensor, Tensor, Tensor | None]:
    """The processor's dict -> ids (B, T), which of them are real (B, T) bool, pictures (N, 3, S, S) or None.

    Padding may stand on either side; it is moved to the left, where it parts no prompt from its answer.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise UserError(f"batch: {type(batch).__name__} without input_ids, expected the dict that the processor makes")
    ids, mask, pixels = (batch.get(key) for key in ("input_ids", "attention_mask", "pixel_values"))
    model.check(ids, pixels, mask)
    ids = ids.to(model.device, torch.long)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(model.device).bool()
    lengths = real.sum(-1).tolist()
    if min(lengths) == 0:
        raise UserError("input_ids: a row without a token; give every row a prompt")
    order = real.int().argsort(dim=-1, stable=True)[:, ids.shape[1] - max(lengths) :]
    return ids.gather(1, order), real.gather(1, order), pixels if pixels is not None and len(pixels) else None


def prefill(model: Llava, ids: Tensor, real: Tensor | None, pixels: Tensor | None, cache: KVCache) -> Tensor:
    """Read ids (B, T), padded on the left where `real` says so, and their pictures -> the last's logits (B, V)."""
    x = model.embed(ids, pixels)
    cache.grow(ids.shape[1])
    positions, mask = cache.place(ids.shape[1], real)
    x = model.language_model(x, positions, mask, cache, LAST)
    return model.lm_head(x[:, 0]).float()


def read_prompt(model: Llava, ids: Tensor, real: Tensor, pixels: Tensor | None, o: Options,
                cache: Conversation | None, compile: bool) -> tuple[KVCache, Tensor]:
    """The cache with the prompt in it, branched as the options want, and logits (R, V) for the first token."""
    rows, tokens = ids.shape
    model.check_length(tokens + o.max_new_tokens)
    slots = tokens if o.branches > 1 else tokens + o.max_new_tokens
    if compile and o.branches > 1:
        raise UserError("compile: works for one answer per prompt; "
                        "leave it out with num_beams or num_return_sequences above 1")
    if cache is None:
        slots = roomy(slots) if compile else slots
        cache = KVCache(model.config.text, rows, slots, model.dtype, model.device, static=compile)
        logits = prefill(model, ids, None if real.all() else real, pixels, cache)
    else:
        if rows != 1 or not isinstance(cache, Conversation) or cache.config != model.config.text:
            raise UserError(f"cache: came with {rows} prompts, expected one, and new_cache(model) of this model")
        prompt = ids[0].tolist()
        start, pixels = cache.rewind(prompt, pixels, slots)
        cache.static = cache.static or compile
        logits = prefill(model, ids[:, start:], None, pixels, cache)
        cache.ids = prompt
    if o.branches > 1:
        cache.branch(o.branches, o.max_new_tokens)
        logits = logits.repeat_interleave(o.branches, dim=0)
    return cache, logits


# One step


def step(model: Llava, ids: Tensor, cache: KVCache) -> Tensor:
    """ids (R,), already counted by `cache.grow(1)` -> logits (R, V) of what follows."""
    positions, mask = cache.place(1)
    x = model.language_model(model.language_model.embed_tokens(ids[:, None]), positions, mask, cache)
    return model.lm_head(x[:, -1]).float()


@functools.cache
def compiled_step() -> Callable[[Llava, Tensor, KVCache], Tensor]:
    torch._dynamo.config.recompile_limit = 64  # one program per batch size and cache size, never per token
    return torch.compile(step, fullgraph=True, dynamic=False)


def captured_step(model: Llava, cache: KVCache, rows: int) -> Callable[[Llava, Tensor, KVCache], Tensor]:
    """The compiled step as one CUDA graph: a launch per token instead of hundreds."""
    into = torch.zeros(rows, dtype=torch.long, device=model.device)
    counters = cache.positions, cache.next_slot
    before = [x.clone() for x in counters]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    cache.grow(1)  # not fresh: what is captured is a step, not a prompt
    with torch.cuda.stream(stream):  # once for real: compiles, and sets up what cannot be while capturing
        compiled_step()(model, into, cache)
        for x, old in zip(counters, before):
            x.copy_(old)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compiled_step()(model, into, cache)
    cache.length -= 1  # what `grow` counted

    def replay(model: Llava, ids: Tensor, cache: KVCache) -> Tensor:
        into.copy_(ids)
        graph.replay()
        return out

    return replay


# Choosing


def setup(model: Llava, ids: Tensor, real: Tensor,
          o: Options) -> tuple[Tensor, Tensor | None, Tensor | None, torch.Generator | None]:
    """(Ids that end an answer, ids never chosen, `seen` (R, V) bool, source of randomness), None where not asked.

    `seen` is what the repetition penalty acts on: the prompt's tokens, its pictures' included, then the answer's.
    """
    seen = None
    if o.repetition_penalty != 1:
        counts = torch.zeros(len(ids), model.config.text.vocab_size, device=ids.device)
        seen = (counts.scatter_add_(1, ids, real.float()) > 0).repeat_interleave(o.branches, dim=0)
    generator = None if o.seed is None else torch.Generator(model.device).manual_seed(o.seed)
    return o.stops(model), o.suppressed(model), seen, generator


def process(scores: Tensor, i: int, o: Options, stops: Tensor, suppress: Tensor | None,
            seen: Tensor | None) -> Tensor:
    """The i-th new token's scores (R, V), fp32 logits or log probabilities, after the options that act on them."""
    if seen is not None:
        less = torch.where(scores < 0, scores * o.repetition_penalty, scores / o.repetition_penalty)
        scores = torch.where(seen, less, scores)
    if i < o.min_new_tokens:
        scores = scores.index_fill(1, stops, -math.inf)
    if suppress is not None:
        scores = scores.index_fill(1, suppress, -math.inf)
    if not o.temperature:
        return scores
    least = 1 if o.num_beams == 1 else max(2, 1 + len(stops))  # so that beams have something to go on with
    scores = scores / o.temperature
    if o.top_k:
        worst = scores.topk(min(max(o.top_k, least), scores.shape[-1]))[0][:, -1:]
        scores = scores.masked_fill(scores < worst, -math.inf)
    if o.top_p < 1:
        ascending, order = scores.sort()
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - o.top_p
        drop[:, -least:] = False
        scores = scores.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return scores


def draw(scores: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """n different indices a row (R, n) with the probabilities softmax(scores).

    The draw of `torch.multinomial` without its look at the values, which waits for the device and, on CUDA,
    ends the process at the first NaN.
    """
    probabilities = scores.softmax(-1)
    noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
    return (probabilities / noise).topk(n)[1] if n > 1 else (probabilities / noise).argmax(-1, keepdim=True)


class Watch:
    """Asks the device now and then whether to stop, and whether the numbers are still numbers."""

    def __init__(self, model: Llava):
        self.every = 1 if model.device.type == "cpu" else CHECK_EVERY
        self.finite = torch.ones((), dtype=torch.bool, device=model.device)

    def logits(self, logits: Tensor) -> Tensor:
        self.finite &= logits.isfinite().all()
        return logits

    def over(self, i: int, last: bool, ended: Tensor) -> bool:
        """`ended` (R,) bool: rows that need no further step."""
        if not last and (i + 1) % self.every:
            return False
        if not self.finite:
            raise UserError("the logits are not finite: the weights are damaged, or fp16 overflowed; "
                            "try dtype bf16 or fp32")
        return last or bool(ended.all())


# The loops


@torch.inference_mode()
def columns(model: Llava, batch: dict, o: Options, cache: Conversation | None = None,
            compile: bool = False) -> Iterator[Tensor]:
    """Greedy decoding and sampling: the new ids, a column (R,) per step. An ended row goes on unheard."""
    ids, real, pixels = read_batch(model, batch)
    stops, suppress, seen, generator = setup(model, ids, real, o)
    cache, logits = read_prompt(model, ids, real, pixels, o, cache, compile)
    advance = step
    if compile and o.max_new_tokens > 1:
        advance = captured_step(model, cache, len(logits)) if model.device.type == "cuda" else compiled_step()
    watch, fed = Watch(model), []
    ended = torch.zeros(len(logits), dtype=torch.bool, device=model.device)
    try:
        for i in range(o.max_new_tokens):
            scores = process(watch.logits(logits), i, o, stops, suppress, seen)
            ids = draw(scores, 1, generator)[:, 0] if o.temperature else scores.argmax(-1)  # (R,)
            ended |= (ids[:, None] == stops).any(-1)
            over = watch.over(i, i + 1 == o.max_new_tokens, ended)
            yield ids
            if over:
                return
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            cache.grow(1)
            logits = advance(model, ids, cache)
            fed.append(ids)
    finally:  # also when the reader of a stream goes away
        if isinstance(cache, Conversation):
            cache.settle(fed)


@torch.inference_mode()
def beam_search(model: Llava, batch: dict, o: Options, cache: Conversation | None = None,
                compile: bool = False) -> Tensor:
    """The best answers' ids (B * num_return_sequences, M), -1 after their end.

    N beams go on; the best N answers that have ended wait aside. Enough candidates are looked at each step that
    N are left to go on even if all the rest end. The arithmetic is transformers', so that ties fall alike.
    """
    ids, real, pixels = read_batch(model, batch)
    stops, suppress, seen, generator = setup(model, ids, real, o)
    cache, logits = read_prompt(model, ids, real, pixels, o, cache, compile)
    b, n, v, m, device = len(ids), o.num_beams, logits.shape[-1], o.max_new_tokens, model.device
    width = max(2, 1 + len(stops)) * n
    among_best = torch.arange(width, device=device) < n
    first_row = torch.arange(b, device=device)[:, None] * n
    running = torch.full((b, n, m), -1, device=device)  # ids
    running_scores = torch.zeros(b, n, device=device)
    running_scores[:, 1:] = NEVER  # all beams start alike: only the first counts
    finished, finished_scores = running.clone(), torch.full((b, n), NEVER, device=device)
    is_finished = torch.zeros(b, n, dtype=torch.bool, device=device)
    improvable = torch.ones(b, 1, dtype=torch.bool, device=device)
    # of x (B, X) or (B, X, M) the rows (B, Y)
    take = lambda x, rows: x.gather(1, rows if x.ndim == 2 else rows[..., None].expand(-1, -1, m))
    watch = Watch(model)
    try:
        for i in range(m):
            scores = process(watch.logits(logits).log_softmax(-1), i, o, stops, suppress, seen)
            scores = (scores.view(b, n, v) + running_scores[:, :, None]).view(b, n * v)
            index = draw(scores, width, generator) if o.temperature else scores.topk(width)[1]
            top, beam, token = scores.gather(1, index), index // v, index % v  # (B, width)
            candidates = take(running, beam)
            candidates[:, :, i] = token
            ends = (token[..., None] == stops).any(-1) | (i + 1 == m)

            alive = top + ends.float() * NEVER
            best = alive.topk(n)[1]  # (B, N)
            running, running_scores = take(candidates, best), take(alive, best)

            ending = ends & among_best
            top = top / (i + 1) ** o.length_penalty
            full = is_finished.all(-1, keepdim=True) & (o.early_stopping is True)
            for closed in (full, ~improvable, ~ending):
                top = top + closed.float() * NEVER
            finished_scores, best_ended = torch.cat([finished_scores, top], 1).topk(n)
            finished = take(torch.cat([finished, candidates], 1), best_ended)
            is_finished = take(torch.cat([is_finished, ending], 1), best_ended)

            longest = m if o.early_stopping == "never" and o.length_penalty > 0 else i + 1
            hope = running_scores[:, :1] / longest**o.length_penalty
            worst = torch.where(is_finished, finished_scores.min(1, keepdim=True)[0], NEVER)
            improvable = improvable & (hope > worst).any(-1, keepdim=True)
            # A row that is through keeps its answers, so it is no matter when the others let it stop.
            through = ~improvable | is_finished.all(-1, keepdim=True) & (o.early_stopping is True)
            if watch.over(i, i + 1 == m, through):
                break
            rows, ids = (take(beam, best) + first_row).flatten(), take(token, best).flatten()
            cache.reorder(rows)
            if seen is not None:
                seen = seen[rows].scatter(1, ids[:, None], True)
            cache.grow(1)
            logits = step(model, ids, cache)
    finally:
        if isinstance(cache, Conversation):
            cache.settle([])
    return finished[:, : o.num_return_sequences].flatten(0, 1)


def generate(model: Llava, batch: dict, *, cache: Conversation | None = None, compile: bool = False,
             **options: Any) -> list[list[int]]:
    """The new ids of every answer, `num_return_sequences` for each row in turn, without the end token.

    `batch` is the processor's dict: input_ids (B, T), attention_mask (B, T), pixel_values (pictures, 3, S, S) if
    there are any. `options` are the fields of `Options`. `cache` is a conversation's (`new_cache`). `compile`
    makes the step one fused program; that takes a while once and pays in long answers or many.

    Raises UserError for an option out of range, a prompt that leaves no room for max_new_tokens in the context,
    pictures and image tokens that do not match, and logits that are not finite.
    """
    o = read_options(options)
    stops = {*o.stops(model).tolist(), -1}
    if o.num_beams > 1:
        ids = beam_search(model, batch, o, cache, compile)
    else:
        ids = torch.stack(list(columns(model, batch, o, cache, compile)), dim=1)
    return [list(itertools.takewhile(lambda id: id not in stops, row)) for row in ids.tolist()]


def pieces(steps: Iterator[Tensor], tokenizer: Any, stops: set[int], ids: list[int]) -> Iterator[str]:
    text = tokenizer.stream()
    with contextlib.closing(steps):
        for column in steps:
            id = int(column)
            if id in stops:
                break
            ids.append(id)
            if piece := text.push(id):
                yield piece
    if piece := text.flush():
        yield piece


def stream(model: Llava, batch: dict, processor: Any = None, *, ids: list[int] | None = None,
           cache: Conversation | None = None, compile: bool = False, **options: Any) -> Iterator[str]:
    """The one answer's text in pieces as they come, never half a character.

    `processor` (or a tokenizer) turns ids to text, that of the loaded model if none is given; a processor's `stop_ids`
    end the answer unless `eos_token_id` is given. The new ids are appended to the list `ids`, if one is given. The rest as in `generate`.
    """
    processor = getattr(model, "processor", None) if processor is None else processor
    options.setdefault("eos_token_id", getattr(processor, "stop_ids", None))
    o = read_options(options)
    tokenizer, stops = getattr(processor, "tokenizer", processor), set(o.stops(model).tolist())
    if not hasattr(tokenizer, "stream"):
        raise UserError(f"processor: {type(processor).__name__}, expected the processor that `load` gives")
    if len(read_batch(model, batch)[0]) * o.num_beams * o.num_return_sequences != 1:
        raise UserError("stream: one answer to one prompt can be streamed; "
                        "use generate for batches, beams and several answers")
    return pieces(columns(model, batch, o, cache, compile), tokenizer, stops, [] if ids is None else ids)
