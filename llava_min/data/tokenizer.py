"""Text ↔ ids, as the checkpoint's own tokenizer does it: three sources behind one surface.

    tokenizer.model   SentencePiece BPE (Llama, Vicuna, the original LLaVA)
    tokenizer.json    SentencePiece-style BPE (what transformers ≥ 5 saves for Llama)
    tokenizer.json    byte-level BPE (Qwen1.5, Qwen2, Llama-3)

Between chat templates and the processor. The reference is transformers (which makes a BPE of `tokenizers` out
of a tokenizer.model), and for `encode_prefixed` SentencePiece itself. A file that asks for anything this page
does not do is refused by name. Text never becomes a special token unless asked: BOS and `<image>` come by id.
"""

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece

from llava_min.cli import UserError, printable, warn
from llava_min.data.bpe import BYTE_TO_CHAR, GPT2_SPLIT, SPLITS, ByteLevelBPE, Pairs, SentencePieceBPE

IDS = ("bos", "eos", "unk", "pad")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_ID = 1 << 24                                        # above any vocabulary, below a giant allocation
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
SURROGATE = re.compile("[\ud800-\udfff]")
JOINERS_AND_CIRCLED = re.compile("[\u200c\u200d\u24b6-\u24e9"
                                 "\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]")
AS_WRITTEN = "PreTrainedTokenizerFast"                 # the class for which transformers obeys tokenizer.json


@dataclass
class AddedToken:
    """A token found in text before BPE, with the flags of `tokenizers`: strip the space on a side, match only
    whole words, match the normalized text."""
    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


# ------------------------------------------------------------------------------------------ reading files

def fault(path: Path, what: str, mend: str = "restore the file as the checkpoint published it") -> UserError:
    return UserError(f"{printable(path)}: {printable(what)}; {mend}")


def unknown(path: Path, what: str, got: object, expected: str) -> UserError:
    got = got if isinstance(got, str) else json.dumps(got)
    return fault(path, f"{what} is {got[:300]}, which is not implemented (expected {expected})",
                 "use a Llama, Mistral, Qwen1.5/2 or Llama-3 tokenizer")


def read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise fault(path, f"cannot be read ({e.strerror})", "give a readable tokenizer file") from None
    if data.startswith(b"version https://git-lfs"):
        raise fault(path, "is a git-lfs pointer, not the file", "run `git lfs pull` in its folder")
    return data


def parse_json(data: bytes, path: Path) -> dict:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as e:
        raise fault(path, f"bad JSON at line {e.lineno} column {e.colno}: {e.msg}") from None
    except UnicodeDecodeError as e:
        raise fault(path, f"not UTF-8 at byte {e.start}") from None
    except RecursionError:
        raise fault(path, "JSON nested too deeply") from None
    except ValueError as e:                             # an integer of thousands of digits
        raise fault(path, f"bad JSON: {str(e)[:200]}") from None
    if not isinstance(value, dict):
        raise fault(path, f"expected a JSON object, got {type(value).__name__}")
    return value


def content_of(token: object) -> str:
    """A token as the config files write it: a string, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or SURROGATE.search(content):
        raise ValueError(f"expected a token, got {json.dumps(token)[:100]}")
    return content


def read_added(entry: object, id: object, path: Path) -> AddedToken:
    if isinstance(id, str) and id.isascii() and id.isdigit() and len(id) < 10:
        id = int(id)
    if type(id) is not int or not 0 <= id < MAX_ID or not isinstance(entry, dict) or not content_of(entry):
        raise fault(path, f"added token {json.dumps(entry)[:200]} with id {json.dumps(id)[:20]}, expected a "
                          f"non-empty content and an id from 0 to {MAX_ID - 1}")
    flags = {k: entry.get(k, False) for k in ("special", "lstrip", "rstrip", "single_word")}
    flags["normalized"] = entry.get("normalized", not flags["special"])
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise fault(path, f"added token {entry['content'][:200]}: its flags must be true or false")
    return AddedToken(entry["content"], id, **flags)


# ------------------------------------------------------------------------------------------ tokenizer.model

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
            yield tag >> 3, data[at:at + size]
            at += size


def read_sentencepiece(path: Path, data: bytes) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE model that treats text as Llama's does. Any other is refused: transformers reads it
    as Llama's all the same, and gives other ids than the ones it was trained with."""
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.load_from_serialized_proto(data)
        if not len(sp):
            raise ValueError
        parts = list(proto_fields(data))
        trainer = dict(proto_fields(next((v for k, v in parts if k == 2), b"")))
        normalizer = dict(proto_fields(next((v for k, v in parts if k == 3), b"")))
        kinds = {dict(proto_fields(v)).get(3, 1) for k, v in parts if k == 1}
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, OSError):
        raise fault(path, "not a SentencePiece model (empty, cut short, or another kind of file)",
                    "download it again") from None
    if trainer.get(3, 1) != 2:
        name = {1: "unigram", 3: "word", 4: "char"}.get(trainer.get(3, 1), "unknown")
        raise unknown(path, "model_type", name, "bpe")
    if normalizer.get(2):
        raise unknown(path, "normalization", normalizer.get(1, b"").decode(errors="replace"), "identity")
    for field, name, expected in ((3, "add_dummy_prefix", True), (4, "remove_extra_whitespaces", False),
                                  (5, "escape_whitespaces", True)):
        if normalizer.get(field, True) != expected:
            raise unknown(path, name, not expected, json.dumps(expected))
    for kind, name in ((4, "user-defined"), (5, "unused")):
        if kind in kinds:
            raise unknown(path, "a piece's type", name, "normal, byte, control or unknown")
    return sp


def pairs_of_pieces(sp: sentencepiece.SentencePieceProcessor, vocab: dict[str, int]) -> Pairs:
    """The merges that transformers draws from a tokenizer.model: every way to halve a piece into two pieces,
    ranked by the piece's id. (SentencePiece ranks by score: `▁▁` comes first here, last there.) Byte tokens
    are for characters that have no piece, never for a text that spells `<0x0A>`."""
    pairs = {}
    for piece, id in vocab.items():
        if len(piece) > 1 and not sp.is_byte(id):
            for i in range(1, len(piece)):
                a, b = vocab.get(piece[:i]), vocab.get(piece[i:])
                if a is not None and b is not None:
                    pairs[a, b] = len(pairs), id
    return pairs


# ------------------------------------------------------------------------------------------ tokenizer.json

def sequence(part: dict | None, key: str) -> list[dict]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def read_model(spec: dict, path: Path) -> tuple[dict, dict[str, int], Pairs]:
    model, vocab = spec["model"], spec["model"]["vocab"]
    if model.get("type", "BPE") != "BPE":
        raise unknown(path, "model.type", model["type"], "BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise unknown(path, f"model.{key}", model[key], "none")
    if not vocab or not all(type(id) is int and 0 <= id < MAX_ID for id in vocab.values()):
        raise fault(path, f"model.vocab must give each token an id from 0 to {MAX_ID - 1}")
    if SURROGATE.search("".join(vocab)):
        raise fault(path, "model.vocab has a token with a lone surrogate")
    pairs = {}
    for rank, line in enumerate(model["merges"]):
        a, b = line.split(" ") if isinstance(line, str) else line
        if a not in vocab or b not in vocab or a + b not in vocab:
            raise fault(path, f"merge {rank} ({json.dumps(line)[:200]}) names a token outside the vocabulary")
        pairs[vocab[a], vocab[b]] = rank, vocab[a + b]
    return model, vocab, pairs


def read_template(spec: dict, path: Path) -> tuple[str | None, bool]:
    """(BOS that the post-processor puts before a text, whether it puts EOS behind)."""
    bos, eos = None, False
    for part in sequence(spec.get("post_processor"), "processors"):
        if part["type"] == "TemplateProcessing":
            single = [item.get("SpecialToken", {}).get("id") for item in part["single"]]      # None: the text
            before, behind = single[:single.index(None)], single[single.index(None) + 1:]
            if len(before) > 1 or len(behind) > 1:
                raise unknown(path, "post_processor", part["single"], "at most one token on each side")
            bos, eos = before[0] if before else None, bool(behind)
        elif part["type"] != "ByteLevel":
            raise unknown(path, "post_processor", part["type"], "TemplateProcessing or ByteLevel")
    return bos, eos


PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DECODERS = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


# ------------------------------------------------------------------------------------------ the tokenizer

class Tokenizer:
    """Made by `load`. Special ids: `bos_id`, `eos_id`, `unk_id`, `pad_id` (None where there is none).
    `add_bos`: the checkpoint puts BOS before a text. `legacy`: it puts the dummy space after every special
    token, not only at the start (LlamaTokenizer). `added`: content → AddedToken. len: highest id + 1."""

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads tokenizer.json if there is one, else tokenizer.model (as transformers chooses), with the
        settings of tokenizer_config.json, added_tokens.json and special_tokens_map.json where present.
        UserError names the file that is absent, malformed, or asks for something that is not implemented."""
        return cls(Path(folder))

    def __init__(self, folder: Path):
        self.files = {name: read_bytes(folder / name) for name in ("tokenizer.json", "tokenizer.model")
                      if os.path.lexists(folder / name)}
        if not self.files:
            what = "no tokenizer.json and no tokenizer.model here" if folder.is_dir() else "no such folder"
            raise fault(folder, what, "give a checkpoint folder that has one of the two")
        self.config = self.read_json(folder, "tokenizer_config.json")
        self.added: dict[str, AddedToken] = {}
        self.sp = None
        try:
            if "tokenizer.model" in self.files:
                path = folder / "tokenizer.model"
                self.sp = read_sentencepiece(path, self.files[path.name])
                # a field appended to a protobuf overrides it: normalizer_spec { add_dummy_prefix: false }
                self.sp_inside = type(self.sp)(model_proto=self.files[path.name] + b"\x1a\x02\x18\x00")
            if "tokenizer.json" in self.files:
                path = folder / "tokenizer.json"
                self.from_json(parse_json(self.files[path.name], path), path)
            else:
                self.from_sentencepiece()
            path = folder / "tokenizer_config.json"
            self.read_settings(folder, path)
            self.seal()
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as e:
            what = f"not laid out as a tokenizer file ({type(e).__name__}: {str(e)[:200]})"
            raise fault(path, what) from None

    def read_json(self, folder: Path, name: str) -> dict:
        path = folder / name
        return parse_json(read_bytes(path), path) if os.path.lexists(path) else {}

    # ---- the three sources

    def from_sentencepiece(self) -> None:
        sp = self.sp
        self.kind, self.scheme, self.prepend, self.nfc = "sentencepiece", "always", False, False
        self.vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
        self.tokens = {id: token for token, id in self.vocab.items()}
        for i in range(len(sp)):
            if sp.is_control(i) or sp.is_unknown(i):
                self.declare(AddedToken(sp.id_to_piece(i), i))
        ids = sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.pad_id()
        self.defaults = {f"{name}_token": sp.id_to_piece(i) for name, i in zip(IDS, ids) if i >= 0}
        self.add_bos, self.add_eos = True, False
        pairs, byte_fallback = pairs_of_pieces(sp, self.vocab), sp.is_byte(sp.piece_to_id("<0x00>"))
        self.bpe = SentencePieceBPE(self.vocab, pairs, unk_id=sp.unk_id(), fuse_unk=True,
                                    byte_fallback=byte_fallback, strip=True)

    def from_json(self, spec: dict, path: Path) -> None:
        model, self.vocab, pairs = read_model(spec, path)
        self.tokens = {id: token for token, id in self.vocab.items()}
        for entry in spec.get("added_tokens") or []:
            self.declare(read_added(entry, entry.get("id"), path), path)
        bos, self.add_eos = read_template(spec, path)
        self.add_bos, self.defaults = bos is not None, {"bos_token": bos} if bos else {}
        normalizers = sequence(spec.get("normalizer"), "normalizers")
        splitters = sequence(spec.get("pre_tokenizer"), "pretokenizers")
        decoders = sequence(spec.get("decoder"), "decoders")
        if any(part["type"] == "ByteLevel" for part in splitters):
            self.from_byte_level(model, pairs, normalizers, splitters, decoders, path)
        else:
            self.from_metaspace(model, pairs, normalizers, splitters, decoders, path)

    def from_metaspace(self, model: dict, pairs: Pairs, normalizers: list[dict], splitters: list[dict],
                       decoders: list[dict], path: Path) -> None:
        """`▁` is put in by a Metaspace pre-tokenizer, in older files by Prepend and Replace normalizers."""
        self.kind, self.scheme, self.prepend, self.nfc = "metaspace", "never", False, False
        for part in normalizers:
            if part not in (PREPEND, REPLACE):
                raise unknown(path, "normalizer", part, "Prepend ▁, Replace ' ' → ▁, or NFC before ByteLevel")
        if PREPEND in normalizers:
            self.scheme, self.prepend = "always", True
        for part in splitters:
            if part["type"] != "Metaspace" or part.get("replacement") != "▁" or part.get("split", True):
                raise unknown(path, "pre_tokenizer", part, "Metaspace with split false, or ByteLevel")
            default = "always" if part.get("add_prefix_space", True) else "never"
            self.scheme = part.get("prepend_scheme", default)
        if (REPLACE in normalizers) + len(splitters) != 1 or self.prepend and splitters \
                or self.scheme not in ("always", "first", "never"):
            raise unknown(path, "pre_tokenizer", splitters, "▁ for a space by Metaspace or by normalizers")
        if decoders not in (DECODERS, DECODERS + [STRIP]):
            raise unknown(path, "decoder", decoders, "Replace ▁ → ' ', ByteFallback, Fuse, Strip")
        if model.get("ignore_merges"):
            raise unknown(path, "model.ignore_merges", True, "false beside Metaspace")
        unk_id = None if model.get("unk_token") is None else self.vocab[model["unk_token"]]
        self.bpe = SentencePieceBPE(self.vocab, pairs, unk_id=unk_id, fuse_unk=bool(model.get("fuse_unk")),
                                    byte_fallback=bool(model.get("byte_fallback")), strip=STRIP in decoders)
        llama = {name: token for name, token in zip(NAMED, ("<s>", "</s>", "<unk>")) if token in self.vocab}
        self.defaults = llama | self.defaults
        if self.sp and any(self.vocab.get(self.sp.id_to_piece(i)) != i for i in range(len(self.sp))):
            raise fault(path, "gives other ids than the tokenizer.model beside it",
                        "remove the file of another checkpoint")

    def from_byte_level(self, model: dict, pairs: Pairs, normalizers: list[dict], splitters: list[dict],
                        decoders: list[dict], path: Path) -> None:
        self.kind, self.scheme, self.prepend, self.nfc = "byte-level", "never", False, bool(normalizers)
        if normalizers not in ([], [{"type": "NFC"}]):
            raise unknown(path, "normalizer", normalizers, "NFC or none")
        *split, level = splitters
        if level["type"] != "ByteLevel" or level.get("add_prefix_space", True) or len(split) > 1 \
                or level.get("use_regex", True) == bool(split) or split and split[0]["type"] != "Split":
            raise unknown(path, "pre_tokenizer", splitters,
                          "Split, then ByteLevel without regex and prefix space; or ByteLevel with its regex")
        regex = GPT2_SPLIT
        if split:
            regex = split[0]["pattern"].get("Regex")
            if split[0].get("behavior") != "Isolated" or split[0].get("invert"):
                raise unknown(path, "pre_tokenizer", splitters, "Split with behavior Isolated, not inverted")
        if regex not in SPLITS:
            raise unknown(path, "pre_tokenizer regex", regex, "the one of GPT-2, Qwen2 or Llama-3")
        if [part["type"] for part in decoders] != ["ByteLevel"]:
            raise unknown(path, "decoder", decoders, "ByteLevel")
        if model.get("byte_fallback"):
            raise unknown(path, "model.byte_fallback", True, "false in a byte-level model")
        if self.sp:
            raise fault(path, "is byte-level, and a tokenizer.model lies beside it",
                        "remove the file of another checkpoint")
        missing = [f"0x{b:02X}" for b, c in BYTE_TO_CHAR.items() if c not in self.vocab]
        if missing:
            raise fault(path, f"the byte-level vocabulary has no token for byte {', '.join(missing[:8])}")
        ignore_merges = bool(model.get("ignore_merges"))
        self.bpe = ByteLevelBPE(self.vocab, pairs, split=regex, ignore_merges=ignore_merges)

    # ---- settings and added tokens

    def read_settings(self, folder: Path, path: Path) -> None:
        config = self.config
        for key in ("legacy", "add_bos_token", "add_eos_token", "add_prefix_space"):
            if config.get(key) not in (None, True, False):
                got = json.dumps(config[key])[:100]
                raise fault(path, f"{key} is {got}, expected true or false", "correct it")
        kind = config.get("tokenizer_class")
        if self.kind == "sentencepiece" and kind not in (None, *LLAMA):
            raise unknown(path, "tokenizer_class", kind, "LlamaTokenizer beside a tokenizer.model")
        # transformers' LlamaTokenizer takes these two from the config even where tokenizer.json differs.
        # Where the config is silent the file stands: it says how the model was trained.
        if self.kind == "sentencepiece" or self.kind == "metaspace" and kind in LLAMA:
            if config.get("add_prefix_space") is False:
                self.scheme, self.prepend, self.bpe.strip = "never", False, False
            elif config.get("legacy") is not None:
                self.scheme, self.prepend = "always" if config["legacy"] else "first", False

        for id, entry in (config.get("added_tokens_decoder") or {}).items():
            self.declare(read_added(entry, id, path), path)
        names = self.read_json(folder, "special_tokens_map.json")
        names |= {k: v for k, v in config.items() if v is not None}
        extra = []
        for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
            value = names.get(key, [])
            if not isinstance(value, list | dict):
                raise fault(path, f"{key} is {type(value).__name__}, expected a list of tokens", "correct it")
            extra += map(content_of, value.values() if isinstance(value, dict) else value)
        named = {name: content_of(names[name]) if names.get(name) is not None else self.defaults.get(name)
                 for name in NAMED if config.get(name, "") is not None}
        special = [content for content in [*named.values(), *extra] if content]
        extra_path = folder / "added_tokens.json"
        for content, id in self.read_json(folder, extra_path.name).items():
            entry = {"content": content, "special": content in special}
            self.declare(read_added(entry, id, extra_path), extra_path)
        for content in special:
            self.declare(AddedToken(content, self.free_id(content)))

        named = [named.get(f"{name}_token") for name in IDS]
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = (self.token_id(t) if t else None for t in named)
        if config.get("add_bos_token") is not None:
            self.add_bos = config["add_bos_token"]
        self.add_bos = self.add_bos and self.bos_id is not None
        if config.get("add_eos_token") is not None:
            self.add_eos = config["add_eos_token"]
        if self.add_eos and self.eos_id is not None:
            raise fault(path, "add_eos_token is true (or tokenizer.json's post-processor adds one): every "
                              "prompt would end in EOS", "set add_eos_token to false")

    @property
    def legacy(self) -> bool:
        return self.scheme == "always"

    def declare(self, token: AddedToken, path: Path = Path("add_special")) -> None:
        """The first declaration of a content stands; any may make it special (as in `tokenizers`)."""
        known, other = self.token_id(token.content), self.token(token.id)
        if known not in (None, token.id) or other not in (None, token.content):
            taken = f"the id is taken by {other}"[:100]
            clash = taken if known in (None, token.id) else f"it has id {known}"
            raise fault(path, f"added token {token.content[:100]} with id {token.id}: {clash}",
                        "correct the tokenizer files so that they agree")
        if first := self.added.get(token.content):
            first.special |= token.special
        else:
            self.added[token.content] = token
            self.tokens[token.id] = token.content
        self.__dict__.pop("_matchers", None)

    def free_id(self, content: str) -> int:
        known = self.token_id(content)
        return len(self) if known is None else known

    def add_special(self, content: str, id: int | None = None) -> int:
        """Makes `content` a special token, with the next free id unless it has one or one is given."""
        if not content:
            raise UserError("add_special: the token is empty; give its text, e.g. <image>")
        check_text(content)
        token = AddedToken(content, self.free_id(content) if id is None else id)
        self.declare(token)
        self.seal()
        return token.id

    def seal(self) -> None:
        """No text may spell its way to a special token through the merges."""
        self.bpe.forget({token.id for token in self.added.values() if token.special})

    def token_id(self, content: str) -> int | None:
        return self.added[content].id if content in self.added else self.vocab.get(content)

    def token(self, id: int) -> str | None:
        return self.tokens.get(id)

    def __len__(self) -> int:
        """Highest id + 1: as many rows as an embedding needs."""
        return max(self.tokens) + 1

    # ---- text → ids

    def encode(self, text: str, *, at: str = "start", parse_special: bool = False) -> list[int]:
        """Ids of `text`, as transformers gives them, without BOS and EOS.

        at: what stands before it: "start" nothing (or BOS), "special" a token put in by id, "inside" text
        already encoded (then no dummy space). parse_special: special tokens spelled in the text become their
        ids; otherwise they stay text (transformers' split_special_tokens). Added tokens that are not special
        are words like any other, always found. UserError for a lone surrogate, which no tokenizer spells."""
        assert at in ("start", "special", "inside")
        check_text(text)
        raw, normalized = self.matchers
        ids = []
        for part in find_added(text, raw, parse_special):
            if isinstance(part, str):
                for piece in find_added(self.normalize(part, at), normalized, parse_special):
                    ids += [piece] if isinstance(piece, int) else self.bpe.encode(self.dummy(piece, at))
                    at = "special"
            else:
                ids.append(part)
            at = "special"
        return ids

    def encode_prefixed(self, text: str, *, at: str = "start") -> list[int]:
        """Ids of `text` as the original LLaVA has them: each chunk between pictures is encoded by itself and
        has its dummy space, whatever `legacy` says (mm_utils.py tokenizer_image_token). `at` as in `encode`:
        after `</s>` in a chunk `legacy` decides. SentencePiece itself where there is a tokenizer.model."""
        check_text(text)
        prefixed = at == "start" or self.prefixed(at)
        if self.sp:
            return (self.sp if prefixed else self.sp_inside).encode(text)
        if self.kind == "byte-level":
            return self.encode(text)
        return self.bpe.encode("▁" * prefixed + text.replace(" ", "▁")) if text else []

    def prefixed(self, at: str) -> bool:
        return at == "start" and self.scheme != "never" or at == "special" and self.scheme == "always"

    def normalize(self, text: str, at: str) -> str:
        """What the normalizer does, before the added tokens marked `normalized` are sought."""
        if self.nfc:
            return unicodedata.normalize("NFC", text)
        if self.prepend and text:
            return "▁" * self.prefixed(at) + text.replace(" ", "▁")
        return text

    def dummy(self, text: str, at: str) -> str:
        """What Metaspace does: ▁ for each space, and one in front unless the text begins with one."""
        if self.kind == "byte-level" or self.prepend:
            return text
        text = text.replace(" ", "▁")
        return text if not self.prefixed(at) or text.startswith("▁") else "▁" + text

    @property
    def matchers(self) -> tuple["Matcher", "Matcher"]:
        """The added tokens sought in the text as it came, and those sought in the normalized text."""
        if "_matchers" not in self.__dict__:
            added = self.added.values()
            self._matchers = (Matcher({t.content: t for t in added if not t.normalized}),
                              Matcher({self.normalize(t.content, "start"): t for t in added if t.normalized}))
        return self._matchers

    # ---- ids → text

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; ids that no token has (padding rows of the head) are skipped."""
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.push(int(id)) for id in ids] + [stream.flush()])

    def stream(self, *, skip_special: bool = True) -> "Stream":
        return Stream(self, skip_special)

    # ---- writing

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the source file(s) and tokenizer_config.json; both transformers and `load` agree with it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in self.config.items() if k != "auto_map"}
        added = {t.id: asdict(t) for t in sorted(self.added.values(), key=lambda t: t.id)}
        files = dict(self.files)
        if "tokenizer.json" in files:
            spec = json.loads(files["tokenizer.json"].decode("utf-8-sig"))
            if spec.get("added_tokens") != list(added.values()):
                spec["added_tokens"] = list(added.values())
                files["tokenizer.json"] = json.dumps(spec, ensure_ascii=False, indent=2).encode()
        elif self.kind == "sentencepiece":  # beside a LLaVA, transformers 5 misreads a lone tokenizer.model
            files["tokenizer.json"] = json.dumps(self.as_json(list(added.values())), ensure_ascii=False).encode()
        if self.kind == "sentencepiece":
            config["tokenizer_class"] = LLAMA[0]
        elif self.kind == "byte-level":
            config.setdefault("tokenizer_class", AS_WRITTEN)
        elif self.prepend or config.get("tokenizer_class") not in LLAMA:
            config["tokenizer_class"] = AS_WRITTEN
        if config["tokenizer_class"] in LLAMA:
            config |= {"legacy": self.legacy, "add_prefix_space": self.scheme != "never"}
        config |= {"add_bos_token": self.add_bos, "add_eos_token": False}
        for name in IDS:
            id = getattr(self, f"{name}_id")
            config[f"{name}_token"] = None if id is None else self.token(id)
        config["added_tokens_decoder"] = {str(id): {k: v for k, v in token.items() if k != "id"}
                                          for id, token in added.items()}
        files["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        if len(self) != len(self.tokens):
            warn(f"{folder}: some ids below {len(self)} have no token; transformers will number without gaps")
        for name, data in files.items():
            (folder / name).write_bytes(data)


    def as_json(self, added: list[dict]) -> dict:
        """The SentencePiece model as a tokenizer.json, the way transformers 5 converts it."""
        text, bos = {"Sequence": {"id": "A", "type_id": 0}}, self.token(self.bos_id) if self.add_bos else None
        first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
        second = [{**part, next(iter(part)): {**next(iter(part.values())), "type_id": 1}} for part in first]
        merges = [[self.tokens[a], self.tokens[b]] for a, b in pairs_of_pieces(self.sp, self.vocab)]
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "split": False,
                                  "prepend_scheme": "always" if self.legacy else "first"},
                "post_processor": {"type": "TemplateProcessing", "single": [*first, text],
                                   "pair": [*first, text, *second, {"Sequence": {"id": "B", "type_id": 1}}],
                                   "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}} if bos else {}},
                "decoder": {"type": "Sequence", "decoders": [*DECODERS, STRIP]},
                "model": {"type": "BPE", "dropout": None, "unk_token": self.token(self.unk_id), "continuing_subword_prefix": None,
                          "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": self.sp.is_byte(self.sp.piece_to_id("<0x00>")),
                          "ignore_merges": False, "vocab": self.vocab, "merges": merges}}


def check_text(text: str) -> None:
    if surrogate := SURROGATE.search(text):
        code, at = ord(surrogate[0]), surrogate.start()
        raise UserError(f"text: lone surrogate U+{code:04X} at character {at}, which is no text; use UTF-8")


# ------------------------------------------------------------------------ added tokens in text, streaming

def is_space(char: str) -> bool:
    return char.isspace() and not "\x1c" <= char <= "\x1f"      # White_Space of Unicode; Python has four more


def is_word(char: str) -> bool:
    r"""\w of Unicode (UTS 18), which `single_word` looks for."""
    kind = unicodedata.category(char)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or JOINERS_AND_CIRCLED.match(char) is not None


class Matcher:
    """Added tokens by their spelling: leftmost first, then longest (`tokenizers`, added_vocabulary.rs)."""

    def __init__(self, tokens: dict[str, AddedToken]):
        self.tokens = tokens
        spellings = sorted(tokens, key=len, reverse=True)
        self.find = re.compile("|".join(map(re.escape, spellings)) if spellings else r"(?!)").finditer


def find_added(text: str, matcher: Matcher, parse_special: bool) -> Iterator[str | int]:
    """`text` cut at its added tokens: strings between them, ids for them."""
    done = 0
    for match in matcher.find(text):
        token, (start, stop) = matcher.tokens[match[0]], match.span()
        if token.special and not parse_special:
            continue
        joined = start and is_word(text[start - 1]) or stop < len(text) and is_word(text[stop])
        if token.single_word and joined:
            continue
        while token.lstrip and start > done and is_space(text[start - 1]):
            start -= 1
        while token.rstrip and stop < len(text) and is_space(text[stop]):
            stop += 1
        if start > done:
            yield text[done:start]
        yield token.id
        done = stop
    if done < len(text):
        yield text[done:]


class Stream:
    """Ids one by one → the text that each completes; pushes and flush together are `decode` of the ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self.tokenizer, self.skip_special, self.decoder = tokenizer, skip_special, tokenizer.bpe.decoder()

    def push(self, id: int) -> str:
        token = self.tokenizer.token(id)
        added = self.tokenizer.added.get(token)
        if token is None or added and added.special and self.skip_special:
            return ""
        if added and added.normalized:                  # `tokenizers` keeps the normalized spelling
            token = self.tokenizer.normalize(token, "start")
        return self.decoder.push(token)

    def flush(self) -> str:
        return self.decoder.flush()
