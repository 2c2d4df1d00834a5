"""`Source`: what a folder's files, of either format, say of its tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llava_min.data.tokenizer.added_tokens import AddedToken
from llava_min.data.tokenizer.bpe import ByteLevelBPE, SentencePieceBPE

SPECIAL_NAMES = ("bos", "eos", "unk", "pad")


@dataclass
class Source:
    """What the files of a folder say of its tokenizer."""

    kind: str  # sentencepiece, metaspace or byte-level
    vocab: dict[str, int]
    bpe: SentencePieceBPE | ByteLevelBPE
    scheme: str = "never"  # the dummy space ▁: always, first (of a text) or never
    prepend: bool = False  # it stands before a space, too (SentencePiece); not in Metaspace
    nfc: bool = False
    sp: SentencePieceProcessor | None = None  # of the tokenizer.model, if there is one
    sp_inside: SentencePieceProcessor | None = None  # the same without its dummy space
    add_bos: bool = False
    add_eos: bool = False
    added: list[tuple[AddedToken, Path]] = field(default_factory=list)  # and the declaring file
    special: list[str] = field(default_factory=list)  # to be added too, under free ids
    named: dict[str, str | None] = field(default_factory=dict)  # bos_token -> <s>
    files: dict[str, bytes] = field(default_factory=dict)
    config: dict = field(default_factory=dict)  # tokenizer_config.json
