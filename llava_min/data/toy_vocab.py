"""The vocabulary of the bundled tiny model: BPE in Llama's manner, from words.txt and the toy world.

Sennrich et al. 2016 (arXiv 1508.07909), Kudo & Richardson 2018 (arXiv 1808.06226). Byte fallback, split
digits and ids (unk 0, bos 1, eos 2, no pad) as Llama 2. The tiny model answers about shapes, but what is
typed to it, or taught to it, is everyday English: no such word costs more than PIECES pieces. A printed
string is read letter by letter.
"""

import io
import string
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from llava_min.data import toy

VOCAB_SIZE = 3072                           # 2048 leaves a tenth of the list above PIECES, 2560 a twentieth
PIECES = 3
ROUNDS = 40
ROLES = ("USER", "ASSISTANT")
STARTERS = ("A An And Are At But Can Could Did Do Does Give Has Have He Here How I If In Is It List Look My Name "
            "No Not Now On One Please Read She Show So Tell That The Then There These They This To Two We What "
            "When Where Which Who Why Will Write Yes You Your Describe").split()


def words() -> list[str]:
    """About ten thousand English words, everyday ones first."""
    return Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()


def toy_words() -> list[str]:
    """Every word of the toy world but its printed strings, and what sentences begin with."""
    said = set(STARTERS)
    for task in toy.TASKS:
        for record, _ in toy.generate(task, 300):
            for turn in record["conversations"]:
                said.update(w.strip("?.,") for w in turn["value"].removeprefix("<image>\n").split())
    return sorted(w for w in said if w[1:].islower() or len(w) == 1 and w.islower())


def tokenizer_model(words: list[str], always: list[str], vocab_size: int = VOCAB_SIZE) -> bytes:
    """A `tokenizer.model`, the same bytes each time: `words` in few pieces each, those of `always` in one.

    BPE merges what is frequent, and a long word's pieces may not be. So after each round the words above
    PIECES count a quarter more in the next; the round that leaves the fewest wins.
    """
    weight = {w: 10.0 for w in words} | {w: 1000.0 for w in always}
    best, fewest = b"", len(words) + 1
    for _ in range(ROUNDS):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(weight), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, character_coverage=1.0, normalization_rule_name="identity",
            add_dummy_prefix=True, remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            num_threads=1, minloglevel=2)
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        long = [w for w in words if len(pieces.encode(w)) > PIECES]
        if len(long) < fewest:
            best, fewest = model.getvalue(), len(long)
        if not long:
            break
        for w in long:
            weight[w] *= 1.25
    return best


def lines(weight: dict[str, float]) -> Iterator[str]:
    """Every word as often as it weighs (no line may exceed 4192 bytes), then what is no word."""
    for w, times in weight.items():
        whole, rest = divmod(round(times), 40)
        yield from [" ".join([w] * 40)] * whole
        yield " ".join([w] * rest) or w
    yield string.punctuation
    for c in string.ascii_letters + string.digits:
        yield " ".join([c] * 1500)          # alone as a word: "▁K" is one piece
        yield " ".join([f"-{c}"] * 1500)
    # A role is built from its left end only: "▁ASSISTAN" + "T". No piece such as "AN" or "ER" comes to be, which
    # would swallow two letters of a printed string; S, in all that are made, is never printed.
    for role in ROLES:
        for n in range(2, len(role) + 1):
            yield from [" ".join([role[:n]] * 50)] * 20
            yield from [" ".join(["-" + role[:n]] * 50)] * 20
