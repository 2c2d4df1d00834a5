"""What may be asked of `generate`: the options, their ranges, and which of them go together.

Each means what it means in `generate` of Hugging Face transformers 5.23.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_min.cli import UserError, warn
from llava_min.llava import Llava


@functools.cache
def tell(line: str) -> None:
    """A warning, once in a process, however many answers are made."""
    warn(line)


def id_tensor(model: Llava, name: str, ids: Sequence[int]) -> Tensor:
    vocabulary = model.config.text.vocab_size
    for i in ids:
        if type(i) is not int or not 0 <= i < vocabulary:
            raise UserError(f"{name}: {i!r:.40} was given, expected a token id from 0 to {vocabulary - 1}")
    return torch.tensor(list(ids), dtype=torch.long, device=model.device)


@dataclass(frozen=True)
class Options:
    """How to choose the new tokens. `temperature` 0 is greedy; above it, sampling (of beams, if there are any)."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0  # no end token before so many others
    num_beams: int = 1
    num_return_sequences: int = 1  # answers per prompt
    length_penalty: float = 1.0  # beams are ranked by log probability / length ** length_penalty
    early_stopping: bool | str = False  # True, False or "never": when beams stop looking for better answers
    temperature: float = 0.0
    top_k: int = 0  # sample among so many best tokens; 0 is all
    top_p: float = 1.0  # sample among the fewest tokens that hold so much probability
    repetition_penalty: float = 1.0  # above 1: less of what the prompt or the answer already has
    seed: int | None = None
    eos_token_id: int | Sequence[int] | None = None  # what ends an answer; None: what the model's config says
    suppress_tokens: Sequence[int] | None = None  # ids never chosen

    def __post_init__(self):
        def need(name: str, kind: type, ok: Callable[[Any], bool], expected: str) -> None:
            value = getattr(self, name)
            number = type(value) is int or kind is float and type(value) is float and math.isfinite(value)
            if not number or not ok(value):
                raise UserError(f"{name}: {value!r:.40} was given, expected {expected}")

        need("max_new_tokens", int, lambda n: n >= 1, "an integer of at least 1")
        most = self.max_new_tokens
        need("min_new_tokens", int, lambda n: 0 <= n <= most, f"an integer from 0 to max_new_tokens {most}")
        need("num_beams", int, lambda n: n >= 1, "an integer of at least 1")
        need("num_return_sequences", int, lambda n: n >= 1, "an integer of at least 1")
        need("length_penalty", float, lambda x: abs(x) <= 50, "a number from -50 to 50")
        need("temperature", float, lambda x: x >= 0, "a number of at least 0 (0 is greedy)")
        need("top_k", int, lambda n: n >= 0, "an integer of at least 0 (0 is all tokens)")
        need("top_p", float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
        need("repetition_penalty", float, lambda x: x > 0, "a number above 0 (1 is no penalty)")
        if self.seed is not None:
            need("seed", int, lambda n: 0 <= n < 2**63, "an integer from 0 to 2**63 - 1")
        if type(self.early_stopping) is not bool and self.early_stopping != "never":
            raise UserError(f"early_stopping: {self.early_stopping!r:.40} was given, "
                            "expected True, False or 'never'")
        n, beams = self.num_return_sequences, self.num_beams
        if n > beams > 1:
            raise UserError(f"num_return_sequences: {n} answers were asked of {beams} beams; "
                            f"ask for at most {beams}, or raise num_beams")
        if n > 1 and beams == 1 and not self.temperature:
            raise UserError(f"num_return_sequences: {n} greedy answers would be the same; "
                            f"set temperature above 0, or num_beams to at least {n}")
        greedy, alone = not self.temperature, beams == 1
        for name, idle, without in (("top_k", greedy and self.top_k, "temperature above 0 (0 is greedy)"),
                                    ("top_p", greedy and self.top_p < 1, "temperature above 0 (0 is greedy)"),
                                    ("length_penalty", alone and self.length_penalty != 1, "num_beams above 1"),
                                    ("early_stopping", alone and self.early_stopping, "num_beams above 1")):
            if idle:
                tell(f"{name}: has no effect without {without}")

    @property
    def branches(self) -> int:
        """The ways in which a prompt goes on."""
        return max(self.num_beams, self.num_return_sequences)

    def stops(self, model: Llava) -> Tensor:
        """The ids that end an answer, on the model's device."""
        ids = model.config.text.eos_token_ids if self.eos_token_id is None else self.eos_token_id
        return id_tensor(model, "eos_token_id", [ids] if isinstance(ids, int) else ids)
