"""The decoding loops: greedy, sampling and beam search, over one prefill and one step.

Images and prompt are prefilled once into a `KVCache`, whatever follows. Greedy decoding and
sampling then yield a column of ids per step, so that a batch and a stream are one loop; beams and
several answers per prompt are forks of the cache. On a GPU nothing in the loops waits for the
device, except a look at every CHECK_EVERY-th step.

Shapes: B batch (prompts), A answers or beams of a prompt, R = B * A rows, T tokens of the prompt,
V vocabulary, M max_new_tokens, N images, S pixels a side.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llava_min.cache import ChatCache, KVCache, round_up
from llava_min.checks.inputs import check_batch, check_length
from llava_min.checks.options import check_cache, check_compile
from llava_min.errors import UserError
from llava_min.fast import cuda_graph, fused
from llava_min.llama import Block, rotary
from llava_min.llava import Llava
from llava_min.options import Options
from llava_min.sampling import LogitsProcessor

# on a GPU, ask only every 16th step whether all rows have ended: asking waits for the device
CHECK_EVERY = 16
# the score of an unused or forbidden beam: finite as in transformers, so that sums and ties agree
NEG = -1e9


# ---- the prompt


def left_padded(model: Llava, batch: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """The processor's dict -> ids (B, T), valid (B, T) bool, pixels (N, 3, S, S) or None.

    Padding may be on either side; it is moved to the left, so that no padding separates a prompt
    from its answer.
    """
    check_batch(batch, model.config)
    ids, mask, pixels = (batch.get(key) for key in ("input_ids", "attention_mask", "pixel_values"))
    ids = ids.to(model.device, torch.long)
    valid = torch.ones_like(ids) if mask is None else mask.to(model.device)
    valid = valid.bool()
    longest = int(valid.sum(-1).max())
    order = valid.int().argsort(dim=-1, stable=True)[:, ids.shape[1] - longest :]
    pixels = pixels if pixels is not None and len(pixels) else None
    return ids.gather(1, order), valid.gather(1, order), pixels


def prefill(
    model: Llava, ids: Tensor, valid: Tensor | None, pixels: Tensor | None, cache: KVCache
) -> Tensor:
    """Read ids (B, T) and their images into the cache -> logits (B, V) of the next token."""
    x = model.embed(ids, pixels)
    cache.advance(ids.shape[1])
    positions, mask = cache.place_tokens(ids.shape[1], valid)
    x = model.language_model(x, positions, mask, cache, last_only=True)
    return model.lm_head(x[:, 0]).float()


def read_prompt(
    model: Llava,
    ids: Tensor,
    valid: Tensor,
    pixels: Tensor | None,
    o: Options,
    chat: ChatCache | None,
    compile: bool,
) -> tuple[KVCache, Tensor]:
    """The cache with the prompt in it, forked as the options want, and logits (R, V)."""
    rows, tokens = ids.shape
    check_length(model.config, tokens + o.max_new_tokens)
    check_compile(compile, o.forks, model.device.type)
    fused.arrange(model, compile and rows == 1, model.dtype)
    # forks have room for their answers in their own suffix
    slots = tokens if o.forks > 1 else tokens + o.max_new_tokens
    if chat is None:
        text, slots = model.config.text, round_up(slots) if compile else slots
        cache = KVCache(text, rows, slots, model.dtype, model.device, static_shapes=compile)
        logits = prefill(model, ids, None if valid.all() else valid, pixels, cache)
    else:
        check_cache(chat, ChatCache, model.config.text, rows)
        cache, prompt = chat, ids[0].tolist()
        start, pixels = chat.reuse_prefix(prompt, pixels, slots)
        chat.static_shapes = chat.static_shapes or compile
        logits = prefill(model, ids[:, start:], None, pixels, chat)
        chat.ids = prompt
    if o.forks > 1:
        cache.fork(o.forks, o.max_new_tokens)
        logits = logits.repeat_interleave(o.forks, dim=0)
    return cache, logits


# ---- one step


def step(model: Llava, ids: Tensor, cache: KVCache) -> Tensor:
    """ids (R,), already counted by `cache.advance(1)` -> logits (R, V) of the next token."""
    positions, mask = cache.place_tokens(1)
    x = model.language_model.embed_tokens(ids[:, None])
    x = model.language_model(x, positions, mask, cache)
    return model.lm_head(x[:, -1]).float()


def compiled_step(model: Llava, ids: Tensor, cache: KVCache) -> Tensor:
    """`step`, each block as one fused program, the same for all: compiling takes seconds."""
    positions, mask = cache.place_tokens(1)
    text, block = model.language_model, fused.compiled(Block.forward, model.device.type)
    x = text.embed_tokens(ids[:, None])
    cos, sin = rotary(positions, text.config, x.dtype)
    for layer, store in zip(text.layers, cache.layers()):
        x = block(layer, x, cos, sin, mask, store)
    return model.lm_head(text.norm(x)[:, -1]).float()


class StopCheck:
    """Asks the device now and then whether to stop, and whether the logits are still finite."""

    def __init__(self, model: Llava):
        self.every = 1 if model.device.type == "cpu" else CHECK_EVERY
        self.finite = torch.ones((), dtype=torch.bool, device=model.device)

    def observe(self, logits: Tensor) -> Tensor:
        self.finite &= logits.isfinite().all()
        return logits

    def should_stop(self, i: int, last: bool, done: Tensor) -> bool:
        """done: bool of any shape, True where no more steps are needed. last: this is the last
        step.
        """
        if not last and (i + 1) % self.every:
            return False
        if not self.finite:
            raise UserError(
                "the logits are not finite: the weights are damaged, or fp16 overflowed; "
                "try dtype bf16 or fp32"
            )
        return last or bool(done.all())


# ---- the loops


@torch.inference_mode()
def decode(
    model: Llava,
    batch: dict,
    o: Options,
    cache: ChatCache | None = None,
    compile: bool = False,
) -> Iterator[Tensor]:
    """Greedy decoding and sampling: the new ids, a column (R,) per step.

    The end token is yielded too. Finished rows keep decoding; the caller drops their tokens.
    """
    ids, valid, pixels = left_padded(model, batch)
    process = LogitsProcessor.of(model, ids, valid, o)
    cache, logits = read_prompt(model, ids, valid, pixels, o, cache, compile)
    next_logits = step
    if compile and o.max_new_tokens > 1:
        next_logits = compiled_step
        if cuda_graph.handles(model.device):
            next_logits = cuda_graph.capture(next_logits, model, cache, len(logits))
    check, decoded = StopCheck(model), []
    done = torch.zeros(len(logits), dtype=torch.bool, device=model.device)
    try:
        for i in range(o.max_new_tokens):
            # choose a token of each row
            scores = process(check.observe(logits), i)
            ids = process.sample(scores, 1)[:, 0] if o.temperature else scores.argmax(-1)  # (R,)
            done |= (ids[:, None] == process.eos).any(-1)
            stop = check.should_stop(i, i + 1 == o.max_new_tokens, done)
            yield ids
            if stop:
                return
            # feed it
            process.update(ids)
            cache.advance(1)
            logits = next_logits(model, ids, cache)
            decoded.append(ids)
    finally:  # also if the caller stops iterating
        if isinstance(cache, ChatCache):
            cache.commit(decoded)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[b, rows[b]] for every prompt b: x (B, X) or (B, X, M), rows (B, Y)."""
    index = rows if x.ndim == 2 else rows[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, index)


@torch.inference_mode()
def beam_search(
    model: Llava,
    batch: dict,
    o: Options,
    cache: ChatCache | None = None,
    compile: bool = False,
) -> Tensor:
    """The best answers' ids (B * num_return_sequences, M), -1 after their end.

    A running beams are continued; the A best finished ones are kept aside. Each step looks at
    enough candidates that A are left to continue even if all the others end. The arithmetic is that
    of transformers (`_beam_search` in generation/utils.py), so that ties fall alike.
    """
    ids, valid, pixels = left_padded(model, batch)
    process = LogitsProcessor.of(model, ids, valid, o)
    cache, logits = read_prompt(model, ids, valid, pixels, o, cache, compile)
    b, n, v, m = len(ids), o.num_beams, logits.shape[-1], o.max_new_tokens
    device = model.device
    candidates = max(2, 1 + len(process.eos)) * n  # of each prompt, at each step
    is_top_n = torch.arange(candidates, device=device) < n
    first_row = torch.arange(b, device=device)[:, None] * n
    running = torch.full((b, n, m), -1, device=device)  # ids
    running_scores = torch.zeros(b, n, device=device)  # sums of log probabilities
    running_scores[:, 1:] = NEG  # all beams start alike: only the first counts
    finished = running.clone()
    finished_scores = torch.full((b, n), NEG, device=device)
    is_finished = torch.zeros(b, n, dtype=torch.bool, device=device)
    can_improve = torch.ones(b, 1, dtype=torch.bool, device=device)
    check = StopCheck(model)
    try:
        for i in range(m):
            # the best continuations of all beams: their scores, beams and tokens (B, candidates)
            scores = process(check.observe(logits).log_softmax(-1), i)
            scores = (scores.view(b, n, v) + running_scores[:, :, None]).view(b, n * v)
            draw = process.sample if o.temperature else lambda scores, n: scores.topk(n)[1]
            index = draw(scores, candidates)
            top, beam, token = scores.gather(1, index), index // v, index % v
            extended = take(running, beam)
            extended[:, :, i] = token
            # the last step ends every beam
            ends = (token[..., None] == process.eos).any(-1) | (i + 1 == m)

            # the n best that have not ended run on
            alive = top + ends.float() * NEG
            best = alive.topk(n)[1]
            running, running_scores = take(extended, best), take(alive, best)

            # those of the n best that have ended join the finished, and the n best of these stay
            ending = ends & is_top_n
            final_scores = top / (i + 1) ** o.length_penalty
            # with early_stopping=True, a prompt with n finished beams takes no more
            full = is_finished.all(-1, keepdim=True) & (o.early_stopping is True)
            for excluded in (full, ~can_improve, ~ending):
                final_scores = final_scores + excluded.float() * NEG
            finished_scores, kept = torch.cat([finished_scores, final_scores], 1).topk(n)
            finished = take(torch.cat([finished, extended], 1), kept)
            is_finished = take(torch.cat([is_finished, ending], 1), kept)

            # a prompt is done once no running beam can beat its worst finished one
            longest = m if o.early_stopping == "never" and o.length_penalty > 0 else i + 1
            best_possible = running_scores[:, :1] / longest**o.length_penalty
            worst_finished = finished_scores.min(1, keepdim=True)[0]
            worst_finished = torch.where(is_finished, worst_finished, NEG)
            can_improve = can_improve & (best_possible > worst_finished).any(-1, keepdim=True)
            # a finished row cannot change, so it may run until the whole batch is done
            full = is_finished.all(-1, keepdim=True) & (o.early_stopping is True)
            if check.should_stop(i, i + 1 == m, ~can_improve | full):
                break

            # feed the chosen tokens, each row with the cache of the beam it continues
            rows = (take(beam, best) + first_row).flatten()
            ids = take(token, best).flatten()
            cache.reorder(rows)
            process.update(ids, rows)
            cache.advance(1)
            logits = step(model, ids, cache)
    finally:
        if isinstance(cache, ChatCache):
            cache.commit([])
    return finished[:, : o.num_return_sequences].flatten(0, 1)
