"""tokenizer.model: SentencePiece BPE (Llama, Vicuna, the original LLaVA), read and rewritten as a
tokenizer.json.

Below tokenizer_files.py. The reference is SentencePiece itself, which such a model was trained
with: transformers 5 makes a BPE of `tokenizers` out of it that ranks merges by id, and so merges
`▁▁` first where SentencePiece merges it last.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llava_min.data.tokenizer.added_tokens import AddedToken
from llava_min.data.tokenizer.bpe import Pairs, SentencePieceBPE
from llava_min.data.tokenizer.source import IDS, Source, fault, unknown


def proto_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message, which is how a tokenizer.model is written."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            yield tag >> 3, data[at : at + size]
            at += size


def read_pieces(path: Path, data: bytes) -> SentencePieceProcessor:
    """A SentencePiece BPE model that treats text as Llama's does. Any other is refused:
    transformers reads it as Llama's all the same, and gives other ids than the ones it was trained
    with.
    """
    sp = SentencePieceProcessor()
    try:
        sp.load_from_serialized_proto(data)
        if not len(sp):
            raise ValueError
        parts = list(proto_fields(data))
        trainer = dict(proto_fields(next((v for k, v in parts if k == 2), b"")))
        normalizer = dict(proto_fields(next((v for k, v in parts if k == 3), b"")))
        kinds = {dict(proto_fields(v)).get(3, 1) for k, v in parts if k == 1}
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, OSError):
        raise fault(
            path,
            "not a SentencePiece model (empty, cut short, or another kind of file)",
            "download it again",
        ) from None
    if trainer.get(3, 1) != 2:
        name = {1: "unigram", 3: "word", 4: "char"}.get(trainer.get(3, 1), "unknown")
        raise unknown(path, "model_type", name, "bpe")
    if normalizer.get(2):
        raise unknown(
            path, "normalization", normalizer.get(1, b"").decode(errors="replace"), "identity"
        )
    for number, name, expected in (
        (3, "add_dummy_prefix", True),
        (4, "remove_extra_whitespaces", False),
        (5, "escape_whitespaces", True),
    ):
        if normalizer.get(number, True) != expected:
            raise unknown(path, name, not expected, json.dumps(expected))
    for kind, name in ((4, "user-defined"), (5, "unused")):
        if kind in kinds:
            raise unknown(path, "a piece's type", name, "normal, byte, control or unknown")
    return sp


def vocab_of(sp: SentencePieceProcessor) -> dict[str, int]:
    return {sp.id_to_piece(i): i for i in range(len(sp))}


def has_bytes(sp: SentencePieceProcessor) -> bool:
    return sp.is_byte(sp.piece_to_id("<0x00>"))


def pairs_of(sp: SentencePieceProcessor, vocab: dict[str, int]) -> Pairs:
    """Every way to halve a piece into two pieces, ranked by the piece's score as SentencePiece
    does: the merges of the tokenizer.json that llava-hf published, in its order. Pieces of one
    score (the runs of `▁`) go by their ids. Byte tokens are for characters that have no piece,
    never for a text that spells `<0x0A>`.
    """
    pairs = {}
    for piece, id in sorted(vocab.items(), key=lambda item: -sp.get_score(item[1])):
        if not sp.is_byte(id):
            halves = [(vocab.get(piece[:i]), vocab.get(piece[i:])) for i in range(1, len(piece))]
            for pair in sorted(pair for pair in halves if None not in pair):
                pairs[pair] = len(pairs), id
    return pairs


def read_sentencepiece(sp: SentencePieceProcessor, path: Path) -> Source:
    vocab = vocab_of(sp)
    bpe = SentencePieceBPE(
        vocab,
        pairs_of(sp, vocab),
        unk_id=sp.unk_id(),
        fuse_unk=True,
        byte_fallback=has_bytes(sp),
        strip=True,
    )
    added = [
        (AddedToken(sp.id_to_piece(i), i), path)
        for i in range(len(sp))
        if sp.is_control(i) or sp.is_unknown(i)
    ]
    ids = sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.pad_id()
    named = {f"{name}_token": sp.id_to_piece(i) for name, i in zip(IDS, ids) if i >= 0}
    return Source(
        "sentencepiece", vocab, bpe, "always", True, add_bos=True, added=added, named=named
    )


def as_tokenizer_json(
    sp: SentencePieceProcessor, added: list[dict], bos: tuple[str, int] | None
) -> dict:
    """A SentencePiece model as a tokenizer.json, but for its spaces (`write_spaces`); `bos` is put
    in front.
    """
    vocab = vocab_of(sp)
    pieces = list(vocab)
    merges = [[pieces[a], pieces[b]] for a, b in pairs_of(sp, vocab)]
    special = lambda n: [{"SpecialToken": {"id": bos[0], "type_id": n}}] if bos else []
    text = lambda n: {"Sequence": {"id": "AB"[n], "type_id": n}}
    template = {
        "type": "TemplateProcessing",
        "single": [*special(0), text(0)],
        "pair": [*special(0), text(0), *special(1), text(1)],
        "special_tokens": {bos[0]: {"id": bos[0], "ids": [bos[1]], "tokens": [bos[0]]}}
        if bos
        else {},
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": sp.id_to_piece(sp.unk_id()),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": has_bytes(sp),
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": template,
        "decoder": None,
        "model": model,
    }
