"""The options of `generate`: what each means is `generate` of Hugging Face transformers 5.23."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from llava_min.checks.options import check_option_names, check_together, check_token_ids
from llava_min.checks.ranges import (
    MAX_FLOAT,
    MAX_INT,
    NonNegativeInt,
    PositiveInt,
    Range,
    Seed,
    check_ranges,
)

if TYPE_CHECKING:
    from llava_min.llava import Llava

Forks = Annotated[int, Range(1, 1024)]  # answers or beams of one prompt: each has a KV cache
GREEDY = "0 (greedy) or a number of at least 1e-5"
Temperature = Annotated[float, Range(1e-5, MAX_FLOAT, GREEDY, zero=True)]
TopK = Annotated[int, Range(0, MAX_INT, "an integer of at least 0 (0 is all tokens)")]
TopP = Annotated[float, Range(math.ulp(0.0), 1, "a number above 0 and at most 1")]
LengthPenalty = Annotated[float, Range(-50, 50)]
NO_PENALTY = "a number from 0.001 to 1000 (1 is no penalty)"
RepetitionPenalty = Annotated[float, Range(1e-3, 1e3, NO_PENALTY)]


@dataclass(frozen=True)
class NumericOptions:
    """The options that are numbers; each is a flag of sample.py, too."""

    max_new_tokens: PositiveInt = 256  # maximum tokens of an answer
    min_new_tokens: NonNegativeInt = 0  # minimum tokens before EOS
    temperature: Temperature = 0.0  # 0 is greedy; higher is more random
    top_p: TopP = 1.0  # sample among the fewest tokens that hold this much probability
    top_k: TopK = 0  # sample among the k most likely tokens; 0 = all
    num_beams: Forks = 1  # 1 is no beam search
    num_return_sequences: Forks = 1  # answers per prompt, by beams or by sampling
    length_penalty: LengthPenalty = 1.0  # rank beams by log probability / length ** length_penalty
    repetition_penalty: RepetitionPenalty = 1.0  # above 1, repeats less of prompt and answer
    seed: Seed | None = None  # makes sampling repeatable; else torch's global generator draws

    def __post_init__(self):
        self.__dict__.update(check_ranges(self))
        check_together(self)

    def numbers(self) -> dict[str, int | float | None]:
        return {f.name: getattr(self, f.name) for f in fields(NumericOptions)}


@dataclass(frozen=True)
class Options(NumericOptions):
    """How to choose the new tokens: greedily at temperature 0, above it by sampling."""

    early_stopping: bool | str = False  # when to stop looking for better beams: or True, "never"
    eos_token_id: int | Sequence[int] | None = None  # None: what the model's config says
    suppress_tokens: int | Sequence[int] | None = None  # ids that are never chosen

    @property
    def forks(self) -> int:
        """Answers or beams that share a prompt."""
        return max(self.num_beams, self.num_return_sequences)

    def eos_ids(self, model: "Llava") -> list[int]:
        """The ids that end an answer."""
        text = model.config.text
        ids = text.eos_token_ids if self.eos_token_id is None else self.eos_token_id
        return check_token_ids("eos_token_id", ids, text.vocab_size)


def read_options(options: dict[str, Any]) -> Options:
    """`Options(**options)`; UserError for a name it does not have."""
    check_option_names(options, [field.name for field in fields(Options)])
    return Options(**options)
