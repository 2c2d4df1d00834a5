"""The files of a tokenizer, read into a `Source` and written back.

    tokenizer.model   SentencePiece BPE (Llama, Vicuna, the original LLaVA)
    tokenizer.json    SentencePiece-style BPE (what transformers ≥ 5 saves for Llama)
    tokenizer.json    byte-level BPE (Qwen1.5, Qwen2, Llama-3)
    tokenizer_config.json, special_tokens_map.json, added_tokens.json: settings and added tokens of any of these

Below data/tokenizer.py, which is what the rest of the project sees. The reference is transformers, which makes
a BPE of `tokenizers` out of a tokenizer.model. A file that asks for anything that is not done here is refused
by name.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llava_min.cli import UserError, printable
from llava_min.data.added_tokens import AddedToken
from llava_min.data.bpe import BYTE_TO_CHAR, GPT2_SPLIT, SPLITS, ByteLevelBPE, Pairs, SentencePieceBPE
from llava_min.files import check_file, read_json

IDS = ("bos", "eos", "unk", "pad")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_ID = 1 << 24                                        # above any vocabulary, below a giant allocation
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
SURROGATE = re.compile("[\ud800-\udfff]")

PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DECODERS = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@dataclass
class Source:
    """What a folder says of its tokenizer."""
    kind: str                                           # sentencepiece, metaspace or byte-level
    vocab: dict[str, int]
    bpe: SentencePieceBPE | ByteLevelBPE
    scheme: str = "never"                               # the dummy space ▁: always, first (of a text) or never
    prepend: bool = False                               # ▁ is put in before added tokens are sought, not after
    nfc: bool = False
    sp: SentencePieceProcessor | None = None            # of the tokenizer.model, if there is one
    sp_inside: SentencePieceProcessor | None = None     # the same without its dummy space
    add_bos: bool = False
    add_eos: bool = False
    added: list[tuple[AddedToken, Path]] = field(default_factory=list)       # and the file that declares it
    special: list[str] = field(default_factory=list)    # to be added too, under free ids
    named: dict[str, str | None] = field(default_factory=dict)               # bos_token → <s>
    files: dict[str, bytes] = field(default_factory=dict)
    config: dict = field(default_factory=dict)          # tokenizer_config.json


def fault(path: Path | str, what: str, mend: str = "restore the file as the checkpoint published it") -> UserError:
    return UserError(f"{printable(path)}: {printable(what)}; {mend}")


def unknown(path: Path, what: str, got: object, expected: str) -> UserError:
    got = got if isinstance(got, str) else json.dumps(got)
    return fault(path, f"{what} is {got[:300]}, which is not implemented (expected {expected})",
                 "use a Llama, Mistral, Qwen1.5/2 or Llama-3 tokenizer")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What lies in `path` is taken as it should be; where it is not, the file is named."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as e:
        raise fault(path, f"not laid out as a tokenizer file ({type(e).__name__}: {str(e)[:200]})") from None


def read_optional(path: Path) -> dict:
    return read_json(path) if os.path.lexists(path) else {}


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


def read_pieces(path: Path, data: bytes) -> SentencePieceProcessor:
    """A SentencePiece BPE model that treats text as Llama's does. Any other is refused: transformers reads it
    as Llama's all the same, and gives other ids than the ones it was trained with."""
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
        raise fault(path, "not a SentencePiece model (empty, cut short, or another kind of file)",
                    "download it again") from None
    if trainer.get(3, 1) != 2:
        name = {1: "unigram", 3: "word", 4: "char"}.get(trainer.get(3, 1), "unknown")
        raise unknown(path, "model_type", name, "bpe")
    if normalizer.get(2):
        raise unknown(path, "normalization", normalizer.get(1, b"").decode(errors="replace"), "identity")
    for number, name, expected in ((3, "add_dummy_prefix", True), (4, "remove_extra_whitespaces", False),
                                   (5, "escape_whitespaces", True)):
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


def read_sentencepiece(sp: SentencePieceProcessor, path: Path) -> Source:
    vocab = vocab_of(sp)
    bpe = SentencePieceBPE(vocab, pairs_of(sp, vocab), unk_id=sp.unk_id(), fuse_unk=True,
                           byte_fallback=has_bytes(sp), strip=True)
    added = [(AddedToken(sp.id_to_piece(i), i), path) for i in range(len(sp)) if sp.is_control(i) or sp.is_unknown(i)]
    ids = sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.pad_id()
    named = {f"{name}_token": sp.id_to_piece(i) for name, i in zip(IDS, ids) if i >= 0}
    return Source("sentencepiece", vocab, bpe, "always", add_bos=True, added=added, named=named)


# ------------------------------------------------------------------------------------------ tokenizer.json

def sequence(part: dict | None, key: str) -> list[dict]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def content_of(token: object) -> str:
    """A token as the config files write it: a string, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or SURROGATE.search(content):
        raise ValueError(f"expected a token, got {json.dumps(token)[:100]}")
    return content


def read_added(entry: object, id: object, path: Path) -> tuple[AddedToken, Path]:
    if isinstance(id, str) and id.isascii() and id.isdigit() and len(id) < 10:
        id = int(id)
    if type(id) is not int or not 0 <= id < MAX_ID or not isinstance(entry, dict) or not content_of(entry):
        raise fault(path, f"added token {json.dumps(entry)[:200]} with id {json.dumps(id)[:20]}, expected a "
                          f"non-empty content and an id from 0 to {MAX_ID - 1}")
    flags = {k: entry.get(k, False) for k in ("special", "lstrip", "rstrip", "single_word")}
    flags["normalized"] = entry.get("normalized", not flags["special"])
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise fault(path, f"added token {entry['content'][:200]}: its flags must be true or false")
    return AddedToken(entry["content"], id, **flags), path


def read_model(model: dict, path: Path) -> tuple[dict[str, int], Pairs]:
    vocab = model["vocab"]
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
    return vocab, pairs


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


def read_tokenizer_json(spec: dict, path: Path) -> Source:
    splitters = sequence(spec.get("pre_tokenizer"), "pretokenizers")
    read = read_byte_level if any(part["type"] == "ByteLevel" for part in splitters) else read_metaspace
    source = read(spec["model"], sequence(spec.get("normalizer"), "normalizers"), splitters,
                  sequence(spec.get("decoder"), "decoders"), path)
    source.added = [read_added(entry, entry.get("id"), path) for entry in spec.get("added_tokens") or []]
    bos, source.add_eos = read_template(spec, path)
    if bos:
        source.named["bos_token"] = bos
    source.add_bos = bos is not None
    return source


def read_metaspace(model: dict, normalizers: list[dict], splitters: list[dict], decoders: list[dict],
                   path: Path) -> Source:
    """`▁` is put in by a Metaspace pre-tokenizer, in older files by Prepend and Replace normalizers."""
    vocab, pairs = read_model(model, path)
    for part in normalizers:
        if part not in (PREPEND, REPLACE):
            raise unknown(path, "normalizer", part, "Prepend ▁, Replace ' ' → ▁, or NFC before ByteLevel")
    prepend = PREPEND in normalizers
    scheme = "always" if prepend else "never"
    for part in splitters:
        if part["type"] != "Metaspace" or part.get("replacement") != "▁" or part.get("split", True):
            raise unknown(path, "pre_tokenizer", part, "Metaspace with split false, or ByteLevel")
        scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
    if (REPLACE in normalizers) + len(splitters) != 1 or prepend and splitters \
            or scheme not in ("always", "first", "never"):
        raise unknown(path, "pre_tokenizer", splitters, "▁ for a space by Metaspace or by normalizers")
    if decoders not in (DECODERS, DECODERS + [STRIP]):
        raise unknown(path, "decoder", decoders, "Replace ▁ → ' ', ByteFallback, Fuse, Strip")
    if model.get("ignore_merges"):
        raise unknown(path, "model.ignore_merges", True, "false beside Metaspace")
    unk_id = None if model.get("unk_token") is None else vocab[model["unk_token"]]
    bpe = SentencePieceBPE(vocab, pairs, unk_id=unk_id, fuse_unk=bool(model.get("fuse_unk")),
                           byte_fallback=bool(model.get("byte_fallback")), strip=STRIP in decoders)
    named = {name: token for name, token in zip(NAMED, ("<s>", "</s>", "<unk>")) if token in vocab}
    return Source("metaspace", vocab, bpe, scheme, prepend, named=named)


def read_byte_level(model: dict, normalizers: list[dict], splitters: list[dict], decoders: list[dict],
                    path: Path) -> Source:
    vocab, pairs = read_model(model, path)
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
    missing = [f"0x{b:02X}" for b, c in BYTE_TO_CHAR.items() if c not in vocab]
    if missing:
        raise fault(path, f"the byte-level vocabulary has no token for byte {', '.join(missing[:8])}")
    bpe = ByteLevelBPE(vocab, pairs, split=regex, ignore_merges=bool(model.get("ignore_merges")))
    return Source("byte-level", vocab, bpe, nfc=bool(normalizers))


# ------------------------------------------------------------------------------------------ the other files

def read_settings(source: Source, folder: Path, path: Path) -> None:
    """The config files on top of what the model's file says."""
    source.config = config = read_optional(path)
    for key in ("legacy", "add_bos_token", "add_eos_token", "add_prefix_space"):
        if config.get(key) not in (None, True, False):
            raise fault(path, f"{key} is {json.dumps(config[key])[:100]}, expected true or false", "correct it")
    kind = config.get("tokenizer_class")
    if source.kind == "sentencepiece" and kind not in (None, *LLAMA):
        raise unknown(path, "tokenizer_class", kind, "LlamaTokenizer beside a tokenizer.model")
    # transformers' LlamaTokenizer takes these two from the config even where tokenizer.json differs.
    # Where the config is silent the file stands: it says how the model was trained.
    if source.kind == "sentencepiece" or source.kind == "metaspace" and kind in LLAMA:
        if config.get("add_prefix_space") is False:
            source.scheme, source.prepend, source.bpe.strip = "never", False, False
        elif config.get("legacy") is not None:
            source.scheme, source.prepend = "always" if config["legacy"] else "first", False

    source.added += [read_added(entry, id, path) for id, entry in (config.get("added_tokens_decoder") or {}).items()]
    names = read_optional(folder / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    source.named = {name: content_of(names[name]) if names.get(name) is not None else source.named.get(name)
                    for name in NAMED if config.get(name, "") is not None}
    source.special = [content for content in source.named.values() if content]
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        value = names.get(key, [])
        if not isinstance(value, list | dict):
            raise fault(path, f"{key} is {type(value).__name__}, expected a list of tokens", "correct it")
        source.special += filter(None, map(content_of, value.values() if isinstance(value, dict) else value))
    extra = folder / "added_tokens.json"
    for content, id in read_optional(extra).items():
        source.added.append(read_added({"content": content, "special": content in source.special}, id, extra))

    if config.get("add_bos_token") is not None:
        source.add_bos = config["add_bos_token"]
    if config.get("add_eos_token") is not None:
        source.add_eos = config["add_eos_token"]
    if source.add_eos and source.named.get("eos_token"):
        raise fault(path, "add_eos_token is true (or tokenizer.json's post-processor adds one): every "
                          "prompt would end in EOS", "set add_eos_token to false")


def read_folder(folder: Path) -> Source:
    """tokenizer.json if there is one, else tokenizer.model (as transformers chooses), with the settings of
    the other files where present. UserError names the file that is absent, malformed or not implemented."""
    files, sp, sp_inside, source = {}, None, None, None
    for name in ("tokenizer.model", "tokenizer.json"):
        path = folder / name
        if os.path.lexists(path):
            check_file(path)
            files[name] = path.read_bytes()
    if "tokenizer.model" in files:
        path = folder / "tokenizer.model"
        with reading(path):
            sp = read_pieces(path, files[path.name])
            # a field appended to a protobuf overrides it: normalizer_spec { add_dummy_prefix: false }
            sp_inside = SentencePieceProcessor(model_proto=files[path.name] + b"\x1a\x02\x18\x00")
            source = None if "tokenizer.json" in files else read_sentencepiece(sp, path)
    if "tokenizer.json" in files:
        path = folder / "tokenizer.json"
        with reading(path):
            source = read_tokenizer_json(read_json(path), path)
            if sp and any(source.vocab.get(piece) != i for piece, i in vocab_of(sp).items()):
                raise fault(path, "gives other ids than the tokenizer.model beside it",
                            "remove the file of another checkpoint")
    if source is None:
        what = "no tokenizer.json and no tokenizer.model here" if folder.is_dir() else "no such folder"
        raise fault(folder, what, "give a checkpoint folder that has one of the two")
    source.files, source.sp, source.sp_inside = files, sp, sp_inside
    path = folder / "tokenizer_config.json"
    with reading(path):
        read_settings(source, folder, path)
    return source


def as_tokenizer_json(sp: SentencePieceProcessor, added: list[dict], legacy: bool,
                      bos: tuple[str, int] | None) -> dict:
    """A SentencePiece model as a tokenizer.json, the way transformers 5 converts it; `bos` is put in front."""
    vocab = vocab_of(sp)
    pieces = list(vocab)
    merges = [[pieces[a], pieces[b]] for a, b in pairs_of(sp, vocab)]
    special = lambda n: [{"SpecialToken": {"id": bos[0], "type_id": n}}] if bos else []
    text = lambda n: {"Sequence": {"id": "AB"[n], "type_id": n}}
    template = {"type": "TemplateProcessing", "single": [*special(0), text(0)],
                "pair": [*special(0), text(0), *special(1), text(1)],
                "special_tokens": {bos[0]: {"id": bos[0], "ids": [bos[1]], "tokens": [bos[0]]}} if bos else {}}
    model = {"type": "BPE", "dropout": None, "unk_token": sp.id_to_piece(sp.unk_id()),
             "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
             "byte_fallback": has_bytes(sp), "ignore_merges": False, "vocab": vocab, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "split": False,
                              "prepend_scheme": "always" if legacy else "first"},
            "post_processor": template, "decoder": {"type": "Sequence", "decoders": [*DECODERS, STRIP]},
            "model": model}
