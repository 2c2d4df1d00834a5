"""tokenizer.json, read into a `Source`: a pipeline of normalizers, pre-tokenizers, a model, a
post-processor and decoders, as HF `tokenizers` writes it, which is the reference.

Two kinds are implemented: SentencePiece-style BPE (what transformers >= 5 saves for Llama) and
byte-level BPE (Qwen1.5, Qwen2, Llama-3).
"""

from pathlib import Path

from llava_min.checks.tokenizer import (
    bad_merge,
    check_added,
    check_byte_level,
    check_content,
    check_model,
    check_rows,
    check_spaces,
    check_template,
)
from llava_min.data.tokenizer.added_tokens import AddedToken
from llava_min.data.tokenizer.bpe import (
    BYTE_TO_CHAR,
    GPT2_SPLIT,
    SMOLLM_SPLIT,
    SPLITS,
    UNPRINTABLE,
    ByteLevelBPE,
    Pairs,
    SentencePieceBPE,
)
from llava_min.data.tokenizer.source import SPECIAL_NAMES, Source

# ---- the spaces

PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
DIGITS = {"type": "Digits", "individual_digits": True}  # SmolLM2's, before ByteLevel's regex


def metaspace(scheme: str, mark: str = "▁") -> dict:
    return {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": False}


# Metaspace puts no mark before a text that begins with one. After Replace there is no space left,
# so the mark " " is always put in and then becomes ▁: SentencePiece's dummy space, at the start of
# a text alone.
FIRST = [metaspace("first", " "), metaspace("never")]
# (scheme, prepend) of a Source <-> the normalizers and pre-tokenizers that do it; writing takes the
# first that fits
SPACES = [
    (("always", True), [PREPEND, REPLACE], []),  # what llava-hf published
    (("always", True), [REPLACE, PREPEND], []),
    (("first", True), [REPLACE], FIRST),
    (("always", False), [], [metaspace("always")]),
    (("first", False), [], [metaspace("first")]),
    (("never", False), [], [metaspace("never")]),
    (("never", False), [REPLACE], []),
]
Spaces = tuple[str, bool, bool]  # scheme, prepend, and strip of the decoder
Parts = tuple[list[dict], list[dict], list[dict]]  # normalizers, pre-tokenizers, decoders


def sequence(part: dict | None, key: str) -> list[dict]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def in_full(splitter: dict) -> dict:
    """A Metaspace with its defaults, and without the fields that mean nothing."""
    if splitter["type"] != "Metaspace":
        return splitter
    scheme = "always" if splitter.get("add_prefix_space", True) else "never"
    full = metaspace(splitter.get("prepend_scheme", scheme), splitter.get("replacement"))
    return full | {"split": splitter.get("split", True)}


def pipeline(spec: dict) -> Parts:
    return (
        sequence(spec.get("normalizer"), "normalizers"),
        [in_full(part) for part in sequence(spec.get("pre_tokenizer"), "pretokenizers")],
        sequence(spec.get("decoder"), "decoders"),
    )


def read_spaces(model: dict, parts: Parts, path: Path) -> Spaces:
    known = [(normalizers, splitters) for _, normalizers, splitters in SPACES]
    check_spaces(model, parts, known, [DECODERS, DECODERS + [STRIP]], path)
    scheme, prepend = SPACES[known.index(parts[:2])][0]
    return scheme, prepend, STRIP in parts[2]


def write_spaces(spec: dict, spaces: Spaces, path: Path) -> dict:
    """`spec`, with normalizers, pre-tokenizers and decoders that do `spaces`."""
    if spec["decoder"] and read_spaces(spec["model"], pipeline(spec), path) == spaces:
        return spec
    normalizers, splitters = next(row[1:] for row in SPACES if row[0] == spaces[:2])
    as_sequence = lambda key, parts: {"type": "Sequence", key: parts} if parts else None
    return spec | {
        "normalizer": as_sequence("normalizers", normalizers),
        "pre_tokenizer": as_sequence("pretokenizers", splitters),
        "decoder": as_sequence("decoders", DECODERS + [STRIP] * spaces[2]),
    }


# ---- the model and the tokens


def content_of(token: object) -> str:
    """A token as the config files write it: a string, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    check_content(content, token)
    return content


def read_added(entry: object, id: object, path: Path) -> tuple[AddedToken, Path]:
    if isinstance(id, str) and id.isascii() and id.isdigit() and len(id) < 10:
        id = int(id)
    check_added(entry, id, path)
    flags = {k: entry.get(k, False) for k in ("special", "lstrip", "rstrip", "single_word")}
    flags["normalized"] = entry.get("normalized", not flags["special"])
    return AddedToken(entry["content"], id, **flags), path


def read_model(model: dict, path: Path) -> tuple[dict[str, int], Pairs]:
    check_model(model, path)
    vocab, pairs = model["vocab"], {}
    for rank, line in enumerate(model["merges"]):
        a, b = line.split(" ") if isinstance(line, str) else line
        try:
            pairs[vocab[a], vocab[b]] = rank, vocab[a + b]
        except KeyError:
            raise bad_merge(rank, line, path) from None
    return vocab, pairs


def read_template(spec: dict, path: Path) -> tuple[str | None, bool]:
    """(BOS that the post-processor puts before a text, whether it puts EOS behind)."""
    bos, eos = None, False
    for part in sequence(spec.get("post_processor"), "processors"):
        kind = part["type"]
        fits = kind in ("TemplateProcessing", "ByteLevel")
        check_rows(path, [(fits, "post_processor", kind, "TemplateProcessing or ByteLevel")])
        if kind == "TemplateProcessing":
            # the text itself is None
            single = [item.get("SpecialToken", {}).get("id") for item in part["single"]]
            before, after = single[: single.index(None)], single[single.index(None) + 1 :]
            check_template(part, before, after, path)
            bos, eos = before[0] if before else None, bool(after)
    return bos, eos


def read_metaspace(model: dict, parts: Parts, path: Path) -> Source:
    vocab, pairs = read_model(model, path)
    scheme, prepend, strip = read_spaces(model, parts, path)
    unk = model.get("unk_token")
    bpe = SentencePieceBPE(
        vocab,
        pairs,
        None if unk is None else vocab[unk],
        fuse_unk=bool(model.get("fuse_unk")),
        byte_fallback=bool(model.get("byte_fallback")),
        strip=strip,
    )
    tokens = zip(SPECIAL_NAMES, ("<s>", "</s>", "<unk>"))
    named = {f"{name}_token": token for name, token in tokens if token in vocab}
    return Source("metaspace", vocab, bpe, scheme, prepend, named=named)


def read_byte_level(model: dict, parts: Parts, path: Path) -> Source:
    vocab, pairs = read_model(model, path)
    normalizers, splitters, _ = parts
    # without a Split before it, ByteLevel cuts the words itself, SmolLM2's after each digit
    regex = splitters[0].get("pattern", {}).get("Regex") if len(splitters) > 1 else GPT2_SPLIT
    if splitters[:-1] == [DIGITS]:
        regex = SMOLLM_SPLIT
        parts = (normalizers, splitters[-1:], parts[2])
    needed = {b: char for b, char in BYTE_TO_CHAR.items() if b not in UNPRINTABLE}
    check_byte_level(model, parts, regex, SPLITS, needed, path)
    bpe = ByteLevelBPE(vocab, pairs, split=regex, ignore_merges=bool(model.get("ignore_merges")))
    return Source("byte-level", vocab, bpe, nfc=bool(normalizers))


def read_tokenizer_json(spec: dict, path: Path) -> Source:
    parts = pipeline(spec)
    byte_level = any(part["type"] == "ByteLevel" for part in parts[1])
    source = (read_byte_level if byte_level else read_metaspace)(spec["model"], parts, path)
    added = spec.get("added_tokens") or []
    source.added = [read_added(entry, entry.get("id"), path) for entry in added]
    bos, source.add_eos = read_template(spec, path)
    if bos:
        source.named["bos_token"] = bos
    source.add_bos = bos is not None
    return source
