"""How the options turn a step's logits into the next tokens. The order in which they act on the
scores is that of `generate` of Hugging Face transformers 5.23; given the same logits the ids are
equal, sampled ones included. To compare:
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/generation/logits_process.py

Shapes: R rows (answers or beams of all prompts), V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_min.checks.options import check_suppressed, check_token_ids
from llava_min.llava import Llava
from llava_min.options import Options


@dataclass
class LogitsProcessor:
    """The options that act on the scores, in transformers' order, and the draw."""

    options: Options
    eos: Tensor  # ids that end an answer
    suppressed: Tensor | None = None  # ids that are never chosen
    # (R, V) bool: ids in the prompt (image tokens too) or in the answer so far
    seen: Tensor | None = None
    generator: torch.Generator | None = None

    @classmethod
    def of(cls, model: Llava, ids: Tensor, valid: Tensor, o: Options) -> "LogitsProcessor":
        tensor = lambda ids: torch.tensor(ids, dtype=torch.long, device=model.device)
        vocabulary, eos = model.config.text.vocab_size, o.eos_ids(model)
        suppressed = seen = generator = None
        if o.suppress_tokens is not None:
            suppressed = check_token_ids("suppress_tokens", o.suppress_tokens, vocabulary)
            check_suppressed(suppressed, eos, vocabulary, o.min_new_tokens)
            suppressed = tensor(suppressed)
        if o.repetition_penalty != 1:
            counts = torch.zeros(len(ids), vocabulary, device=ids.device)
            seen = counts.scatter_add_(1, ids, valid.float()) > 0
            seen = seen.repeat_interleave(o.forks, dim=0)
        if o.seed is not None:
            generator = torch.Generator(model.device).manual_seed(o.seed)
        return cls(o, tensor(eos), suppressed, seen, generator)

    def __call__(self, scores: Tensor, i: int) -> Tensor:
        """Scores (R, V) of the i-th new token: fp32 logits, or log probabilities of beams."""
        o = self.options
        if self.seen is not None:
            scaled = scores * o.repetition_penalty
            scaled = torch.where(scores < 0, scaled, scores / o.repetition_penalty)
            scores = torch.where(self.seen, scaled, scores)
        if i < o.min_new_tokens:
            scores = scores.index_fill(1, self.eos, -math.inf)
        if self.suppressed is not None:
            scores = scores.index_fill(1, self.suppressed, -math.inf)
        if not o.temperature:
            return scores
        # beams: a candidate that is no EOS besides all EOS ids, so that a beam can continue
        keep = 1 if o.num_beams == 1 else max(2, 1 + len(self.eos))
        scores = scores / o.temperature
        if o.top_k:
            k = min(max(o.top_k, keep), scores.shape[-1])
            scores = scores.masked_fill(scores < scores.topk(k)[0][:, -1:], -math.inf)
        if o.top_p < 1:
            ascending, order = scores.sort()
            drop = ascending.softmax(-1).cumsum(-1) <= 1 - o.top_p
            drop[:, -keep:] = False
            scores = scores.masked_fill(drop.scatter(1, order, drop), -math.inf)
        return scores

    def sample(self, scores: Tensor, n: int) -> Tensor:
        """n different indices of each row (R, n), drawn with the probabilities softmax(scores).

        An exponential race, p / Exp(1): the draw of `torch.multinomial`, which first looks at the
        values, and so waits for the device and, on CUDA, ends the process at a NaN.
        """
        probabilities = scores.softmax(-1)
        noise = torch.empty_like(probabilities).exponential_(1, generator=self.generator)
        return (probabilities / noise).topk(n)[1]

    def update(self, ids: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Token ids (R,) were appended to `rows` of the answers so far."""
        if self.seen is not None:
            self.seen = self.seen[rows].scatter(1, ids[:, None], True)
