"""A SentencePiece model written from its pieces: the protobuf that `tokenizer.model` is.

The numbers of the fields are those of sentencepiece_model.proto; the settings are Llama's.
"""

import struct
from pathlib import Path

BPE = 2


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def block(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def write_model(path: Path, tokens: list[str], scores: list[float], kinds: list[int]) -> None:
    """Pieces with their scores and kinds (normal 1, unknown 2, control 3, byte 6), in id order."""
    pieces = [
        block(1, block(1, t.encode()) + b"\x15" + struct.pack("<f", s) + number(3, k))
        for t, s, k in zip(tokens, scores, kinds)
    ]
    has_bytes = 6 in kinds
    trainer = number(3, BPE) + number(4, len(tokens)) + number(35, has_bytes)
    ids = {name: tokens.index(name) for name in ("<unk>", "<s>", "</s>") if name in tokens}
    for field, name in ((40, "<unk>"), (41, "<s>"), (42, "</s>")):
        if name in ids:
            trainer += number(field, ids[name])
    trainer += varint(43 << 3) + varint((1 << 64) - 1)  # pad_id: -1
    # identity, with a dummy space in front and every space kept
    normalizer = block(1, b"identity") + number(3, 1) + number(4, 0) + number(5, 1)
    path.write_bytes(b"".join(pieces) + block(2, trainer) + block(3, normalizer))
