"""Text <-> ids, as the checkpoint's own tokenizer does it: one `Tokenizer` for SentencePiece and
byte-level BPE.

files.py reads the folder, bpe.py merges, added_tokens.py finds words such as `<image>`. The
reference is transformers on the whole folder; for a tokenizer.model alone, and for
`encode_prefixed`, SentencePiece itself. Text never becomes a special token unless asked: BOS and
`<image>` come by id.
"""

import json
import os
import unicodedata
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from llava_min.checks.tokenizer import check_clash, check_text
from llava_min.data.tokenizer.added_tokens import AddedToken, Matcher
from llava_min.data.tokenizer.files import LLAMA, read_folder
from llava_min.data.tokenizer.sentencepiece_model import as_tokenizer_json
from llava_min.data.tokenizer.source import SPECIAL_NAMES, Source
from llava_min.data.tokenizer.tokenizer_json import write_spaces
from llava_min.errors import UserError, warn

# the class for which transformers obeys tokenizer.json
AS_WRITTEN = "PreTrainedTokenizerFast"


class Tokenizer:
    """Made by `load`. Special ids: `bos_id`, `eos_id`, `unk_id`, `pad_id` (None where there is
    none). `add_bos`: the checkpoint puts BOS before a text. `legacy`: it puts the dummy space after
    every special token, not only at the start (LlamaTokenizer). `added`: content → AddedToken. len:
    highest id + 1.
    """

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """The tokenizer of a folder, from the files and with the errors of `read_folder`."""
        return cls(read_folder(Path(folder)))

    def __init__(self, source: Source):
        self.files, self.config, self.kind = source.files, source.config, source.kind
        self.vocab, self.bpe = source.vocab, source.bpe
        self.scheme, self.prepend, self.nfc = source.scheme, source.prepend, source.nfc
        self.sp, self.sp_inside = source.sp, source.sp_inside
        self.tokens = {id: token for token, id in self.vocab.items()}
        self.size = max(self.tokens, default=-1) + 1
        self.added: dict[str, AddedToken] = {}
        for token, path in source.added:
            self.declare(token, path)
        for content in source.special:
            self.declare(AddedToken(content, self.free_id(content)))
        named = [source.named.get(f"{name}_token") for name in SPECIAL_NAMES]
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = (
            self.token_id(t) if t else None for t in named
        )
        self.add_bos = source.add_bos and self.bos_id is not None
        self.seal()

    @property
    def legacy(self) -> bool:
        return self.scheme == "always"

    # ---- the vocabulary

    def token_id(self, content: str) -> int | None:
        return self.added[content].id if content in self.added else self.vocab.get(content)

    def token(self, id: int) -> str | None:
        return self.tokens.get(id)

    def __len__(self) -> int:
        """Highest id + 1: as many rows as an embedding needs."""
        return self.size

    def free_id(self, content: str) -> int:
        known = self.token_id(content)
        return len(self) if known is None else known

    def declare(self, token: AddedToken, path: Path | str = "add_special") -> None:
        """Add `token`. The first declaration of a content counts; a later one may only make it
        special (as in `tokenizers`). `path`: the file that declares it, for the error.
        """
        check_clash(token, self.token_id(token.content), self.token(token.id), path)
        if first := self.added.get(token.content):
            first.special |= token.special
        else:
            self.added[token.content] = token
            self.tokens[token.id] = token.content
            self.size = max(self.size, token.id + 1)
        self.__dict__.pop("matchers", None)  # drop the cached ones

    def add_special(self, content: str, id: int | None = None) -> int:
        """Makes `content` a special token: with `id`, the id it has, or the next free one."""
        if not content:
            raise UserError("the token is empty; give its text, e.g. <image>", "add_special")
        check_text(content)
        token = AddedToken(content, self.free_id(content) if id is None else id)
        self.declare(token)
        self.seal()
        return token.id

    def seal(self) -> None:
        """Drop merges that produce special tokens, so that plain text never encodes to one."""
        self.bpe.forget({token.id for token in self.added.values() if token.special})

    # ---- text → ids

    def encode(self, text: str, *, at: str = "start", parse_special: bool = False) -> list[int]:
        """Ids of `text`, as transformers (or SentencePiece, see above) gives them, without BOS and
        EOS.

        at: what stands before it: "start" nothing (or BOS), "special" a token put in by id,
        "inside" text already encoded (then no dummy space). parse_special: special tokens spelled
        in the text become their ids; otherwise they stay text (transformers' split_special_tokens).
        Added tokens that are not special are words like any other, always found. UserError for a
        lone surrogate, which no tokenizer spells.
        """
        assert at in ("start", "special", "inside")
        check_text(text)
        raw, normalized = self.matchers
        ids = []
        for part in raw.cut(text, parse_special):
            pieces = [part]
            if isinstance(part, str):
                pieces = normalized.cut(self.normalize(part, at), parse_special)
            for piece in pieces:
                if isinstance(piece, str):
                    ids += self.bpe.encode(self.pre_tokenize(piece, at))
                else:  # an added token
                    ids.append(piece)
                at = "special"
        return ids

    def encode_prefixed(self, text: str, *, at: str = "start") -> list[int]:
        """Ids of `text` as the original LLaVA has them: each chunk between images is encoded on its
        own and has its dummy space, whatever `legacy` says. `at` as in `encode`: after `</s>` in a
        chunk `legacy` decides. Where there is a tokenizer.model, SentencePiece itself encodes.

        https://github.com/haotian-liu/LLaVA/blob/v1.2.2.post1/llava/mm_utils.py
        """
        check_text(text)
        prefixed = at == "start" or self.prefixed(at)
        if self.sp:
            return (self.sp if prefixed else self.sp_inside).encode(text)
        if self.kind == "byte-level":
            return self.encode(text)
        return self.bpe.encode("▁" * prefixed + text.replace(" ", "▁")) if text else []

    def prefixed(self, at: str) -> bool:
        """Whether a text there has the dummy space in front."""
        return self.scheme in {"start": ("always", "first"), "special": ("always",)}.get(at, ())

    def normalize(self, text: str, at: str) -> str:
        """The normalizer; added tokens marked `normalized` are sought in its result."""
        if self.nfc:
            return unicodedata.normalize("NFC", text)
        if self.prepend and text:
            return "▁" * (self.scheme == "always" and at != "inside") + text.replace(" ", "▁")
        return text

    def pre_tokenize(self, text: str, at: str) -> str:
        """The pre-tokenizer; Metaspace: ▁ for each space, and one in front unless there is one."""
        if self.kind == "byte-level":
            return text
        if self.prepend:
            return "▁" * (self.scheme == "first" and at == "start") + text
        text = text.replace(" ", "▁")
        return text if not self.prefixed(at) or text.startswith("▁") else "▁" + text

    @cached_property
    def matchers(self) -> tuple[Matcher, Matcher]:
        """Of the added tokens sought in the text as it came, and in the normalized text."""
        added = self.added.values()
        return (
            Matcher({t.content: t for t in added if not t.normalized}),
            Matcher({self.normalize(t.content, "start"): t for t in added if t.normalized}),
        )

    # ---- ids → text

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; ids without a token (padding rows of the head) are skipped."""
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.push(int(id)) for id in ids] + [stream.flush()])

    def stream(self, *, skip_special: bool = True) -> "Stream":
        return Stream(self, skip_special)

    # ---- writing

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the source file(s) and tokenizer_config.json; transformers and `load` read the
        same tokenizer from them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if len(self) != len(self.tokens):
            warn(
                f"{folder}: some ids below {len(self)} have no token; transformers will number "
                "without gaps"
            )
        added = [asdict(t) for t in sorted(self.added.values(), key=lambda t: t.id)]
        config = json.dumps(self.tokenizer_config(added), indent=2) + "\n"
        files = {
            "tokenizer.json": self.tokenizer_json(added),
            "tokenizer_config.json": config.encode(),
        }
        for name, data in (self.files | files).items():
            (folder / name).write_bytes(data)

    def tokenizer_config(self, added: list[dict]) -> dict:
        """The settings as they were read, with what this tokenizer does."""
        config = {k: v for k, v in self.config.items() if k != "auto_map"}
        if self.kind == "byte-level":
            config.setdefault("tokenizer_class", AS_WRITTEN)
        elif self.prepend or config.get("tokenizer_class") not in LLAMA:
            config["tokenizer_class"] = AS_WRITTEN
        if config["tokenizer_class"] in LLAMA:
            # add_prefix_space true would make transformers 4 look for a tokenizer.model
            prefix_space = False if self.scheme == "never" else None
            config |= {"legacy": self.legacy, "add_prefix_space": prefix_space}
        config |= {"add_bos_token": self.add_bos, "add_eos_token": False}
        for name in SPECIAL_NAMES:
            id = getattr(self, f"{name}_id")
            config[f"{name}_token"] = None if id is None else self.token(id)
        without_id = lambda t: {k: v for k, v in t.items() if k != "id"}
        config["added_tokens_decoder"] = {str(t["id"]): without_id(t) for t in added}
        return config

    def tokenizer_json(self, added: list[dict]) -> bytes:
        """The file as it was read, unless it differs from this tokenizer. A lone tokenizer.model
        gets one, too: beside a LLaVA's config.json transformers 5 reads that without its dummy
        space.
        """
        if data := self.files.get("tokenizer.json"):
            spec = known = json.loads(data)
        else:
            bos = (self.token(self.bos_id), self.bos_id) if self.add_bos else None
            spec, known = as_tokenizer_json(self.sp, added, bos), None
        if self.kind != "byte-level":
            spaces = self.scheme, self.prepend, self.bpe.strip
            spec = write_spaces(spec, spaces, Path("tokenizer.json"))
        spec = spec | {"added_tokens": added}
        if spec == known:
            return data
        return json.dumps(spec, ensure_ascii=False, indent=2 if known else None).encode()


class Stream:
    """Ids one by one -> the text that each completes; all pushes and the flush give `decode`."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.decoder = tokenizer.bpe.decoder()

    def push(self, id: int) -> str:
        token = self.tokenizer.token(id)
        added = self.tokenizer.added.get(token)
        if token is None or added and added.special and self.skip_special:
            return ""
        if added and added.normalized:  # `tokenizers` keeps the normalized spelling
            token = self.tokenizer.normalize(token, "start")
        return self.decoder.push(token)

    def flush(self) -> str:
        return self.decoder.flush()
