"""Which options of `generate` go together, and which token ids they may name."""

import operator
from collections.abc import Iterable
from typing import Any

from llava_min.errors import UserError, guess, shorten, warn_once

# transformers' names for what `Options` has under another
SYNONYMS = {
    "do_sample": "temperature",
    "max_length": "max_new_tokens",
    "min_length": "min_new_tokens",
}


def check_option_names(names: Iterable[str], known: list[str]) -> None:
    """Every name is an option, or UserError with the nearest that there is."""
    for name in names:
        if name in known:
            continue
        near = [SYNONYMS[name]] if name in SYNONYMS else known
        fix = guess(SYNONYMS.get(name, name), near, f"there are {', '.join(known)}")
        raise UserError(f"no option of generate; {fix}", shorten(name, 100))


def check_together(o: Any) -> None:
    """The fields of `Options`, each in its range, go together, or UserError."""
    stop = getattr(o, "early_stopping", False)
    if type(stop) is not bool and stop != "never":
        raise UserError(
            f"{stop!r:.40} was given, expected True, False or 'never'", "early_stopping"
        )
    if o.min_new_tokens > o.max_new_tokens:
        raise UserError(
            f"{o.min_new_tokens} was given, expected an integer from 0 to max_new_tokens "
            f"{o.max_new_tokens}; correct it",
            "min_new_tokens",
        )
    check_answers(o.num_return_sequences, o.num_beams, o.temperature)
    warn_of_idle(o, stop)


def check_answers(answers: int, beams: int, temperature: float) -> None:
    if answers > beams > 1:
        raise UserError(
            f"{answers} answers were asked of {beams} beams; ask for at most {beams}, "
            "or raise num_beams",
            "num_return_sequences",
        )
    if answers > 1 and beams == 1 and not temperature:
        raise UserError(
            f"{answers} greedy answers would be the same; set temperature above 0, "
            f"or num_beams to at least {answers}",
            "num_return_sequences",
        )


def warn_of_idle(o: Any, early_stopping: bool | str) -> None:
    greedy, beamless = not o.temperature, o.num_beams == 1
    sampling, beams = "temperature above 0 (0 is greedy)", "num_beams above 1"
    for name, idle, without in (
        ("top_k", greedy and o.top_k, sampling),
        ("top_p", greedy and o.top_p < 1, sampling),
        ("length_penalty", beamless and o.length_penalty != 1, beams),
        ("early_stopping", beamless and early_stopping, beams),
    ):
        if idle:
            warn_once(f"has no effect without {without}", name)


def check_token_ids(name: str, ids: int | Iterable[int], vocabulary: int) -> list[int]:
    """The ids without repeats, of Python, numpy or torch, one or many; some of the vocabulary is
    left.
    """
    found = []
    for id in ids if isinstance(ids, Iterable) and getattr(ids, "ndim", 1) else [ids]:
        try:
            i = -1 if isinstance(id, bool) else operator.index(id)
        except (TypeError, ValueError, RuntimeError):  # no number; a tensor of several
            i = -1
        if not 0 <= i < vocabulary:
            expected = f"a token id from 0 to {vocabulary - 1}"
            raise UserError(f"{id!r:.40} was given, expected {expected}", name)
        found.append(i)
    ids = list(dict.fromkeys(found))
    if len(ids) == vocabulary:
        raise UserError(
            f"all {vocabulary} ids were given, which leaves no token for an answer; leave some out",
            name,
        )
    return ids


def check_suppressed(suppressed: list[int], eos: list[int], vocabulary: int, forced: int) -> None:
    """With `forced` tokens before EOS, some token is left that is neither."""
    if forced and len({*suppressed, *eos}) == vocabulary:
        raise UserError(
            "all ids but those that end an answer were given, and min_new_tokens lets none end; "
            "leave some out",
            "suppress_tokens",
        )


def check_cache(cache: Any, kind: type, config: Any, prompts: int) -> None:
    """`cache` is a chat's, of this model, and there is one prompt, or UserError."""
    if prompts != 1 or not isinstance(cache, kind) or cache.config != config:
        raise UserError(
            f"came with {prompts} prompts, expected one, and new_cache(model) of this model",
            "cache",
        )


def check_compile(compile: bool, forks: int, device: str) -> None:
    """device: its type. Raises UserError where a step cannot be compiled."""
    if compile and device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError:
            raise UserError(
                "wants a C++ compiler on a CPU and found none; install g++, or leave it out",
                "compile",
            ) from None
    if compile and forks > 1:
        raise UserError(
            "works for one answer per prompt; leave it out with num_beams or num_return_sequences "
            "above 1",
            "compile",
        )
