"""What may be asked of `generate`: the options, their ranges, and which of them go together.

Each means what it means in `generate` of Hugging Face transformers 5.23.
"""

import dataclasses
import difflib
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from llava_min.cli import UserError, printable, warn
from llava_min.llava import Llava

MOST_BRANCHES = 1024  # of a prompt: each has keys and values of its own
THEIRS = {"do_sample": "temperature", "max_length": "max_new_tokens", "min_length": "min_new_tokens"}  # transformers' -> ours


@functools.cache
def tell(line: str) -> None:
    """A warning, once in a process, however many answers are made."""
    warn(line)


def read_ids(name: str, ids: int | Iterable[int], vocabulary: int) -> list[int]:
    """The ids without repeats: of Python, numpy or torch, one or many. UserError for what is no id of the `vocabulary`."""
    found = []
    for id in ids if isinstance(ids, Iterable) and getattr(ids, "ndim", 1) else [ids]:
        try:
            i = -1 if isinstance(id, bool) else operator.index(id)
        except (TypeError, ValueError, RuntimeError):  # no number; a tensor of several
            i = -1
        if not 0 <= i < vocabulary:
            raise UserError(f"{name}: {id!r:.40} was given, expected a token id from 0 to {vocabulary - 1}")
        found.append(i)
    return list(dict.fromkeys(found))


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
    suppress_tokens: int | Sequence[int] | None = None  # ids never chosen

    def __post_init__(self):
        def need(name: str, kind: type, ok: Callable[[Any], bool], expected: str) -> None:
            value, numbers = getattr(self, name), Integral if kind is int else Real  # numpy's are among them
            number = isinstance(value, numbers) and not isinstance(value, bool) and (isinstance(value, Integral) or math.isfinite(value))
            if not number or not ok(value):
                raise UserError(f"{name}: {value!r:.40} was given, expected {expected}; correct it")
            object.__setattr__(self, name, int(value) if isinstance(value, Integral) else float(value))

        need("max_new_tokens", int, lambda n: n >= 1, "an integer of at least 1")
        most = self.max_new_tokens
        need("min_new_tokens", int, lambda n: 0 <= n <= most, f"an integer from 0 to max_new_tokens {most}")
        for name in ("num_beams", "num_return_sequences"):
            need(name, int, lambda n: 1 <= n <= MOST_BRANCHES, f"an integer from 1 to {MOST_BRANCHES}")
        need("length_penalty", float, lambda x: abs(x) <= 50, "a number from -50 to 50")
        need("temperature", float, lambda x: x == 0 or x >= 1e-5, "0 (greedy) or a number of at least 1e-5")
        need("top_k", int, lambda n: n >= 0, "an integer of at least 0 (0 is all tokens)")
        need("top_p", float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
        need("repetition_penalty", float, lambda x: 1e-3 <= x <= 1e3, "a number from 0.001 to 1000 (1 is no penalty)")
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
        return self.tensor(model, "eos_token_id", ids)

    def suppressed(self, model: Llava) -> Tensor | None:
        """The ids that are never chosen, on the model's device; None when there are none."""
        if self.suppress_tokens is None:
            return None
        ids, ends = self.tensor(model, "suppress_tokens", self.suppress_tokens), self.stops(model)
        if self.min_new_tokens and len({*ids.tolist(), *ends.tolist()}) == model.config.text.vocab_size:
            raise UserError("suppress_tokens: all ids but those that end an answer were given, and min_new_tokens lets none end; "
                            "leave some out")
        return ids

    @staticmethod
    def tensor(model: Llava, name: str, ids: int | Iterable[int]) -> Tensor:
        vocabulary = model.config.text.vocab_size
        ids = read_ids(name, ids, vocabulary)
        if len(ids) == vocabulary:
            raise UserError(f"{name}: all {vocabulary} ids were given, which leaves no token for an answer; leave some out")
        return torch.tensor(ids, dtype=torch.long, device=model.device)


def read_options(options: dict[str, Any]) -> Options:
    """`Options(**options)`, and UserError for a name it does not have, with the nearest that it has."""
    names = [field.name for field in dataclasses.fields(Options)]
    for name in options:
        if name not in names:
            near = [THEIRS[name]] if name in THEIRS else difflib.get_close_matches(name, names, 1)
            mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise UserError(f"{printable(name)[:100]}: no option of generate; {mend}")
    return Options(**options)
