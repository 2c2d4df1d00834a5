"""What the files of a tokenizer say, as one `Source`, and the two lines that refuse a file.

Below tokenizer_model.py, tokenizer_json.py and tokenizer_files.py, which fill it; tokenizer.py is
made of it.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llava_min.data.tokenizer.added_tokens import AddedToken
from llava_min.data.tokenizer.bpe import ByteLevelBPE, SentencePieceBPE
from llava_min.errors import UserError, escape_controls

IDS = ("bos", "eos", "unk", "pad")
# above any vocabulary, below a giant allocation
MAX_ID = 1 << 24
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Source:
    """What a folder says of its tokenizer."""

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
    added: list[tuple[AddedToken, Path]] = field(
        default_factory=list
    )  # and the file that declares it
    special: list[str] = field(default_factory=list)  # to be added too, under free ids
    named: dict[str, str | None] = field(default_factory=dict)  # bos_token → <s>
    files: dict[str, bytes] = field(default_factory=dict)
    config: dict = field(default_factory=dict)  # tokenizer_config.json


def fault(
    path: Path | str, what: str, mend: str = "restore the file as the checkpoint published it"
) -> UserError:
    return UserError(f"{escape_controls(path)}: {escape_controls(what)}; {mend}")


def unknown(path: Path, what: str, got: object, expected: str) -> UserError:
    got = got if isinstance(got, str) else json.dumps(got)
    return fault(
        path,
        f"{what} is {got[:300]}, which is not implemented (expected {expected})",
        "use a Llama, Mistral, Qwen1.5/2 or Llama-3 tokenizer",
    )
