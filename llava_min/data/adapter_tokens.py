"""The tokenizer that other tools save beside an adapter: the base's, or the base's with more tokens, or an error.

PEFT's trainers, TRL and LLaMA-Factory all write one. It is read, compared with the base's, and what it adds is added to that;
nothing else of it is used. Called by data/processor_files.py.
"""

import os
from pathlib import Path

from llava_min.cli import UserError, short, warn_once
from llava_min.data.processor import MARK
from llava_min.data.tokenizer import Tokenizer


def adopt(tokenizer: Tokenizer, adapter: Path, rows: int) -> None:
    """Give `tokenizer`, the base's, the tokens that the one in the folder `adapter` adds.

    Raises UserError where that one differs otherwise, and for a token without a row among the `rows` of the model.
    """
    if not any(os.path.lexists(adapter / name) for name in ("tokenizer.json", "tokenizer.model")):
        return
    theirs = Tokenizer.load(adapter)
    new = [t for t in theirs.added.values() if tokenizer.token(t.id) is None]
    if what := difference(tokenizer, theirs, {t.id for t in new}, probes(tokenizer, [t.content for t in new])):
        raise UserError(f"{adapter}: the tokenizer beside the adapter {what}, expected the base's or one that only adds tokens; "
                        "give the base that it was made for, or take the tokenizer's files out of the adapter's folder")
    if high := [t for t in new if t.id >= rows and t.content != MARK]:  # whose id processor.py looks at
        raise UserError(f"{adapter}: the tokenizer beside the adapter adds {short(high[0].content)!r} as token {high[0].id}, and "
                        f"the model has rows for {rows} tokens; give the base with the larger vocabulary that it was made for")
    rules = lambda t: [t.add_bos, *(t.encode(text, at=at) for text in ("a b", " a") for at in ("start", "special"))]
    if rules(theirs) != rules(tokenizer):  # transformers 5 loses them where the base has a tokenizer.model alone
        warn_once(f"{adapter}: the tokenizer beside the adapter has other rules for BOS or the space before a text than the base's; "
                  "the base's are taken, and the adapter may have been trained with the others")
    for token in new:
        tokenizer.declare(token, adapter)
    tokenizer.seal()


def difference(ours: Tokenizer, theirs: Tokenizer, new: set[int], texts: list[str]) -> str | None:
    """What is otherwise in `theirs` than that it has the tokens `new`, in words; `texts` are cut by both."""
    for id, token in ours.tokens.items():
        if theirs.token(id) != token:
            other = theirs.token(id)
            return f"has {'nothing' if other is None else repr(short(other))} as token {id} where the base's has {short(token)!r}"
    if more := sorted(theirs.tokens.keys() - ours.tokens.keys() - new):
        return f"has {len(more)} more words in its vocabulary, the first is {short(theirs.token(more[0]))!r}"
    for name in ("bos_id", "eos_id", "unk_id"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"has {name} {getattr(theirs, name)} where the base's has {getattr(ours, name)}"
    for key in ("add_bos_token", "legacy", "add_prefix_space"):
        pair = theirs.config.get(key), ours.config.get(key)
        if None not in pair and pair[0] != pair[1]:
            return f"says {key} {str(pair[0]).lower()} where the base's says {str(pair[1]).lower()}"
    cut = next((text for text in texts if ours.encode(text, at="inside") != theirs.encode(text, at="inside")), None)
    return None if cut is None else f"cuts {short(cut)!r} otherwise than the base's"


def probes(tokenizer: Tokenizer, new: list[str]) -> list[str]:
    """Texts by which tokenizers of one vocabulary are told apart: odd ones, and words from all over the vocabulary."""
    step = max(1, len(tokenizer) // 1000)
    words = [token.replace("▁", " ") for id, token in sorted(tokenizer.tokens.items()) if id % step == 0]
    texts = ["USER: What's in it?\n ASSISTANT: two  dogs,   1234.5 % Ünïcode 猫🙂\t(a_b)", "trail ", " ".join(words), "".join(words)]
    return [text for text in texts if not any(token in text for token in new)]
