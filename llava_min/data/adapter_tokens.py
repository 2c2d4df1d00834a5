"""The tokenizer beside an adapter: the tokens that it adds to the base's, or an error.

PEFT's trainers, TRL and LLaMA-Factory all save one there. from_folder.py calls `add_tokens`; the
two are compared, and nothing but the added tokens is used.
"""

import os
from pathlib import Path

from llava_min.data.chat import IMAGE_TOKEN
from llava_min.data.tokenizer import Tokenizer
from llava_min.errors import UserError, shorten, warn_once

RULE_KEYS = ("add_bos_token", "legacy", "add_prefix_space")  # of tokenizer_config.json


def add_tokens(tokenizer: Tokenizer, adapter: Path, rows: int) -> None:
    """Add the tokens of the tokenizer in the folder `adapter` to `tokenizer`, the base's.

    Raises UserError if it differs in anything else, or a token has no row in the model's `rows`.
    """
    if not any(os.path.lexists(adapter / name) for name in ("tokenizer.json", "tokenizer.model")):
        return
    theirs, its = Tokenizer.load(adapter), f"{adapter}: the tokenizer beside the adapter"
    new = [t for t in theirs.added.values() if tokenizer.token(t.id) is None]
    texts = probes(tokenizer, [t.content for t in new])
    if what := difference(tokenizer, theirs, {t.id for t in new}, texts):
        raise UserError(
            f"{its} {what}, expected the base's or one that only adds tokens; give the "
            "base that it was made for, or take the tokenizer out of the folder"
        )
    # checks/from_folder.py says more of <image>
    if high := [t for t in new if t.id >= rows and t.content != IMAGE_TOKEN]:
        raise UserError(
            f"{its} adds {shorten(high[0].content)!r} as token {high[0].id}, and the "
            f"model has rows for {rows} tokens; give the larger base it was made for"
        )
    if prefix_rules(theirs) != prefix_rules(tokenizer):
        warn_once(
            f"{its} has other rules for BOS or the space before a text than the base's; the "
            "base's are taken, and the adapter may have been trained with the others"
        )
    for token in new:
        tokenizer.declare(token, adapter)
    tokenizer.seal()


def difference(ours: Tokenizer, theirs: Tokenizer, new: set[int], texts: list[str]) -> str | None:
    """How `theirs` differs in more than the tokens `new`, in words; None if it does not. Both
    tokenize the `texts`.
    """
    for id, token in ours.tokens.items():
        if (other := theirs.token(id)) != token:
            other = "nothing" if other is None else repr(shorten(other))
            return f"has {other} as token {id} where the base's has {shorten(token)!r}"
    if more := sorted(theirs.tokens.keys() - ours.tokens.keys() - new):
        first = shorten(theirs.token(more[0]))
        return f"has {len(more)} more words in its vocabulary, the first is {first!r}"
    for name in ("bos_id", "eos_id", "unk_id"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"has {name} {getattr(theirs, name)} where the base's has {getattr(ours, name)}"
    for key in RULE_KEYS:
        a, b = theirs.config.get(key), ours.config.get(key)
        if None not in (a, b) and a != b:
            return f"says {key} {str(a).lower()} where the base's says {str(b).lower()}"
    for text in texts:
        if ours.encode(text, at="inside") != theirs.encode(text, at="inside"):
            return f"tokenizes {shorten(text)!r} differently from the base's"
    return None


def prefix_rules(t: Tokenizer) -> list:
    """What goes before a text; transformers 5 loses it when it saves a lone tokenizer.model."""
    places = (("a b", "start"), ("a b", "special"), (" a", "special"))
    return [t.add_bos, *(t.encode(text, at=at) for text, at in places)]


def probes(tokenizer: Tokenizer, new: list[str]) -> list[str]:
    """Texts that tell tokenizers of one vocabulary apart: odd ones, and words from all over it."""
    step = max(1, len(tokenizer) // 1000)
    words = [token.replace("▁", " ") for _, token in sorted(tokenizer.tokens.items())[::step]]
    odd = "USER: What's in it?\n ASSISTANT: two  dogs,   1234.5 % Ünïcode 猫🙂\t(a_b)"
    texts = [odd, "trail ", " ".join(words), "".join(words)]
    return [text for text in texts if not any(token in text for token in new)]
