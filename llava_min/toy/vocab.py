"""The vocabulary of the bundled tiny model: BPE as in Llama 2, from words.txt and the toy world.

Follows Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909) and SentencePiece (Kudo and
Richardson 2018, https://arxiv.org/abs/1808.06226). Byte fallback, split digits and ids (unk 0, bos
1, eos 2, no pad) are Llama 2's. The tiny model answers about shapes, but people ask and teach it
in everyday English: no such word costs more than MAX_PIECES pieces. A printed string is read letter
by letter.
"""

import io
import string
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from llava_min.toy import draw as toy

VOCAB_SIZE = 3072  # with 2048 a tenth of the words need more than MAX_PIECES, with 2560 a twentieth
MAX_PIECES = 3  # of an everyday word
MAX_ROUNDS = 40
ROLES = ("USER", "ASSISTANT")
STARTERS = (  # words that begin sentences
    "A An And Are At But Can Could Did Do Does Give Has Have He Here How I If In Is It List Look "
    "My Name No Not Now On One Please Read She Show So Tell That The Then There These They This "
    "To Two We What When Where Which Who Why Will Write Yes You Your Describe"
).split()


def words() -> list[str]:
    """About ten thousand English words, everyday ones first."""
    return Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()


def toy_words() -> list[str]:
    """Every word of the toy world except its printed strings, and all that begin sentences."""
    found = set(STARTERS)
    for task in toy.TASKS:
        for record, _ in toy.generate(task, 300):
            for turn in record["conversations"]:
                found.update(
                    w.strip("?.,") for w in turn["value"].removeprefix("<image>\n").split()
                )
    return sorted(w for w in found if w[1:].islower() or len(w) == 1 and w.islower())


def tokenizer_model(words: list[str], always: list[str], vocab_size: int = VOCAB_SIZE) -> bytes:
    """A `tokenizer.model`: `words` in few pieces each, those of `always` in one.

    BPE merges what is frequent, and the pieces of a long word may not be. So the words above
    MAX_PIECES count a quarter more in the next round, and the round that leaves the fewest wins.
    The same arguments give the same bytes.
    """
    weight = {w: 10.0 for w in words} | {w: 1000.0 for w in always}
    best, fewest = b"", len(words) + 1
    for _ in range(MAX_ROUNDS):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(weight),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        long = [w for w in words if len(pieces.encode(w)) > MAX_PIECES]
        if len(long) < fewest:
            best, fewest = model.getvalue(), len(long)
        if not long:
            break
        for w in long:
            weight[w] *= 1.25
    return best


def lines(weight: dict[str, float]) -> Iterator[str]:
    """The text to learn from: every word as often as its weight, then letters, digits and marks."""
    # a line may have at most 4192 bytes, so no word stands more than 40 times on it
    for w, times in weight.items():
        whole, rest = divmod(round(times), 40)
        yield from [" ".join([w] * 40)] * whole
        yield " ".join([w] * rest) or w
    yield string.punctuation
    for c in string.ascii_letters + string.digits:
        yield " ".join([c] * 1500)  # alone as a word: "▁K" is one piece
        yield " ".join([f"-{c}"] * 1500)
    # A role is merged from its left end only: "▁ASSISTAN" + "T". Pieces such as "AN" or "ER" would
    # swallow two letters of a printed string; the pieces that do arise have an S, which is never
    # printed.
    for role in ROLES:
        for n in range(2, len(role) + 1):
            yield from [" ".join([role[:n]] * 50)] * 20
            yield from [" ".join(["-" + role[:n]] * 50)] * 20
