"""tokenizer.model: SentencePiece BPE (Llama, Vicuna, the original LLaVA), read into a `Source` and
rewritten as a tokenizer.json.

The reference is SentencePiece itself, which such a model was trained with: transformers 5 converts
it to a BPE of `tokenizers` that ranks merges by id, and so merges `▁▁` first where SentencePiece
merges it last.
"""

from collections.abc import Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llava_min.checks.tokenizer import check_sentencepiece, not_sentencepiece
from llava_min.data.tokenizer.added_tokens import AddedToken
from llava_min.data.tokenizer.bpe import Pairs, SentencePieceBPE
from llava_min.data.tokenizer.source import SPECIAL_NAMES, Source


def proto_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message, the format of a tokenizer.model.

    https://protobuf.dev/programming-guides/encoding
    """
    i = 0

    def varint() -> int:
        nonlocal i
        value = shift = 0
        while True:
            byte = data[i]
            value |= (byte & 127) << shift
            i, shift = i + 1, shift + 7
            if byte < 128:
                return value

    while i < len(data):
        tag = varint()
        wire_type = tag & 7
        if wire_type == 0:
            yield tag >> 3, varint()
        else:
            size = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            yield tag >> 3, data[i : i + size]
            i += size


def load_sentencepiece(path: Path, data: bytes) -> SentencePieceProcessor:
    """A SentencePiece BPE model that treats text as Llama's does. Any other is refused:
    transformers reads it as Llama's all the same, with other ids than it was trained with.
    """
    sp = SentencePieceProcessor()
    try:
        sp.load_from_serialized_proto(data)
        if not len(sp):
            raise ValueError
        fields = list(proto_fields(data))
        trainer = dict(proto_fields(next((v for k, v in fields if k == 2), b"")))
        normalizer = dict(proto_fields(next((v for k, v in fields if k == 3), b"")))
        types = {dict(proto_fields(v)).get(3, 1) for k, v in fields if k == 1}
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, OSError):
        raise not_sentencepiece(path) from None
    check_sentencepiece(trainer, normalizer, types, path)
    return sp


def pieces_of(sp: SentencePieceProcessor) -> dict[str, int]:
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
    vocab = pieces_of(sp)
    merges, byte_fallback = pairs_of(sp, vocab), has_bytes(sp)
    bpe = SentencePieceBPE(
        vocab, merges, sp.unk_id(), fuse_unk=True, byte_fallback=byte_fallback, strip=True
    )
    marks = [i for i in range(len(sp)) if sp.is_control(i) or sp.is_unknown(i)]
    added = [(AddedToken(sp.id_to_piece(i), i), path) for i in marks]
    ids = sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.pad_id()
    named = {f"{name}_token": sp.id_to_piece(i) for name, i in zip(SPECIAL_NAMES, ids) if i >= 0}
    spaces = ("always", True)
    return Source("sentencepiece", vocab, bpe, *spaces, add_bos=True, added=added, named=named)


def as_tokenizer_json(
    sp: SentencePieceProcessor, added: list[dict], bos: tuple[str, int] | None
) -> dict:
    """A SentencePiece model as a tokenizer.json, without its spaces (`write_spaces`); `bos` is put
    in front.
    """
    vocab = pieces_of(sp)
    pieces = list(vocab)
    special = lambda n: [{"SpecialToken": {"id": bos[0], "type_id": n}}] if bos else []
    text = lambda n: {"Sequence": {"id": "AB"[n], "type_id": n}}
    ids = {bos[0]: {"id": bos[0], "ids": [bos[1]], "tokens": [bos[0]]}} if bos else {}
    template = {
        "type": "TemplateProcessing",
        "single": [*special(0), text(0)],
        "pair": [*special(0), text(0), *special(1), text(1)],
        "special_tokens": ids,
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
        "merges": [[pieces[a], pieces[b]] for a, b in pairs_of(sp, vocab)],
    }
    order = "version truncation padding added_tokens normalizer pre_tokenizer post_processor"
    spec = dict.fromkeys([*order.split(), "decoder", "model"])
    return spec | {
        "version": "1.0",
        "added_tokens": added,
        "post_processor": template,
        "model": model,
    }
