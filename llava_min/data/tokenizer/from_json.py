"""tokenizer.json of two kinds: SentencePiece-style BPE (what transformers >= 5 saves for Llama) and
byte-level BPE (Qwen1.5, Qwen2, Llama-3).

Below tokenizer_files.py. Such a file describes a pipeline of normalizers, pre-tokenizers, a model,
a post-processor and decoders; whatever asks for anything that is not done here is refused by name.
"""

import json
from pathlib import Path

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
from llava_min.data.tokenizer.source import IDS, MAX_ID, SURROGATE, Source, fault, unknown

# scheme and prepend of a Source, strip of its decoder
Spaces = tuple[str, bool, bool]

PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
DIGITS = {"type": "Digits", "individual_digits": True}  # SmolLM2's, before ByteLevel's regex
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def metaspace(scheme: str, mark: str = "▁") -> dict:
    return {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": False}


# Metaspace puts no mark before a text that begins with one. With every space gone already, the mark
# " " is always put
# in, and then made ▁: SentencePiece's dummy space, at the start of a text alone.
FIRST = [metaspace("first", " "), metaspace("never")]


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
    if (
        type(id) is not int
        or not 0 <= id < MAX_ID
        or not isinstance(entry, dict)
        or not content_of(entry)
    ):
        raise fault(
            path,
            f"added token {json.dumps(entry)[:200]} with id {json.dumps(id)[:20]}, expected a "
            f"non-empty content and an id from 0 to {MAX_ID - 1}",
        )
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
            raise fault(
                path,
                f"merge {rank} ({json.dumps(line)[:200]}) names a token outside the vocabulary",
            )
        pairs[vocab[a], vocab[b]] = rank, vocab[a + b]
    return vocab, pairs


def read_template(spec: dict, path: Path) -> tuple[str | None, bool]:
    """(BOS that the post-processor puts before a text, whether it puts EOS behind)."""
    bos, eos = None, False
    for part in sequence(spec.get("post_processor"), "processors"):
        if part["type"] == "TemplateProcessing":
            # None: the text
            single = [item.get("SpecialToken", {}).get("id") for item in part["single"]]
            before, behind = single[: single.index(None)], single[single.index(None) + 1 :]
            if len(before) > 1 or len(behind) > 1:
                raise unknown(
                    path, "post_processor", part["single"], "at most one token on each side"
                )
            bos, eos = before[0] if before else None, bool(behind)
        elif part["type"] != "ByteLevel":
            raise unknown(path, "post_processor", part["type"], "TemplateProcessing or ByteLevel")
    return bos, eos


def read_spaces(
    normalizers: list[dict], splitters: list[dict], decoders: list[dict], path: Path
) -> Spaces:
    """`▁` is put in by Prepend and Replace normalizers (what llava-hf published), or by a Metaspace
    pre-tokenizer.
    """
    for part in normalizers:
        if part not in (PREPEND, REPLACE):
            raise unknown(
                path, "normalizer", part, "Prepend ▁, Replace ' ' → ▁, or NFC before ByteLevel"
            )
    first = (normalizers, splitters) == ([REPLACE], FIRST)
    prepend = PREPEND in normalizers
    scheme = "always" if prepend else "never"
    for part in [] if first else splitters:
        if part["type"] != "Metaspace" or part.get("replacement") != "▁" or part.get("split", True):
            raise unknown(path, "pre_tokenizer", part, "Metaspace with split false, or ByteLevel")
        scheme = part.get(
            "prepend_scheme", "always" if part.get("add_prefix_space", True) else "never"
        )
    alone = (REPLACE in normalizers) + len(splitters) == 1 and not (prepend and splitters)
    if not first and not alone or scheme not in ("always", "first", "never"):
        raise unknown(
            path, "pre_tokenizer", splitters, "▁ for a space by Metaspace or by normalizers"
        )
    if decoders not in (DECODERS, DECODERS + [STRIP]):
        raise unknown(path, "decoder", decoders, "Replace ▁ → ' ', ByteFallback, Fuse, Strip")
    return "first" if first else scheme, first or prepend, STRIP in decoders


def write_spaces(spec: dict, spaces: Spaces, path: Path) -> dict:
    """`spec` as it is where it says `spaces`, else with other normalizers, pre-tokenizers and
    decoders that do.
    """
    if spec["decoder"] and read_spaces(*pipeline(spec), path) == spaces:
        return spec
    scheme, prepend, strip = spaces
    normalizers = [PREPEND] * (prepend and scheme == "always") + [REPLACE] * prepend
    splitters = [] if prepend and scheme == "always" else FIRST if prepend else [metaspace(scheme)]
    return spec | {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters} if splitters else None,
        "decoder": {"type": "Sequence", "decoders": DECODERS + [STRIP] * strip},
    }


def read_metaspace(
    model: dict, normalizers: list[dict], splitters: list[dict], decoders: list[dict], path: Path
) -> Source:
    vocab, pairs = read_model(model, path)
    scheme, prepend, strip = read_spaces(normalizers, splitters, decoders, path)
    if model.get("ignore_merges"):
        raise unknown(path, "model.ignore_merges", True, "false beside Metaspace")
    unk_id = None if model.get("unk_token") is None else vocab[model["unk_token"]]
    bpe = SentencePieceBPE(
        vocab,
        pairs,
        unk_id=unk_id,
        fuse_unk=bool(model.get("fuse_unk")),
        byte_fallback=bool(model.get("byte_fallback")),
        strip=strip,
    )
    named = {
        f"{name}_token": token
        for name, token in zip(IDS, ("<s>", "</s>", "<unk>"))
        if token in vocab
    }
    return Source("metaspace", vocab, bpe, scheme, prepend, named=named)


def read_byte_level(
    model: dict, normalizers: list[dict], splitters: list[dict], decoders: list[dict], path: Path
) -> Source:
    vocab, pairs = read_model(model, path)
    if normalizers not in ([], [{"type": "NFC"}]):
        raise unknown(path, "normalizer", normalizers, "NFC or none")
    *split, level = splitters
    digits = split == [DIGITS] and level.get("use_regex", True)
    split = [] if digits else split
    if (
        level["type"] != "ByteLevel"
        or level.get("add_prefix_space", True)
        or len(split) > 1
        or level.get("use_regex", True) == bool(split)
        or split
        and split[0]["type"] != "Split"
    ):
        raise unknown(
            path,
            "pre_tokenizer",
            splitters,
            "Split, then ByteLevel without regex and prefix space; or ByteLevel with its regex",
        )
    regex = SMOLLM_SPLIT if digits else GPT2_SPLIT
    if split:
        regex = split[0]["pattern"].get("Regex")
        if split[0].get("behavior") != "Isolated" or split[0].get("invert"):
            raise unknown(
                path, "pre_tokenizer", splitters, "Split with behavior Isolated, not inverted"
            )
    if regex not in SPLITS:
        raise unknown(path, "pre_tokenizer regex", regex, "the one of GPT-2, Qwen2 or Llama-3")
    if [part["type"] for part in decoders] != ["ByteLevel"]:
        raise unknown(path, "decoder", decoders, "ByteLevel")
    if model.get("byte_fallback"):
        raise unknown(path, "model.byte_fallback", True, "false in a byte-level model")
    needed = {b: c for b, c in BYTE_TO_CHAR.items() if b not in UNPRINTABLE}
    missing = [f"0x{b:02X}" for b, c in needed.items() if c not in vocab]
    if missing:
        raise fault(
            path, f"the byte-level vocabulary has no token for byte {', '.join(missing[:8])}"
        )
    bpe = ByteLevelBPE(vocab, pairs, split=regex, ignore_merges=bool(model.get("ignore_merges")))
    return Source("byte-level", vocab, bpe, nfc=bool(normalizers))


def pipeline(spec: dict) -> tuple[list[dict], list[dict], list[dict]]:
    """(normalizers, pre-tokenizers, decoders)."""
    keys = (
        ("normalizer", "normalizers"),
        ("pre_tokenizer", "pretokenizers"),
        ("decoder", "decoders"),
    )
    return tuple(sequence(spec.get(one), many) for one, many in keys)


def read_tokenizer_json(spec: dict, path: Path) -> Source:
    parts = pipeline(spec)
    read = (
        read_byte_level if any(part["type"] == "ByteLevel" for part in parts[1]) else read_metaspace
    )
    source = read(spec["model"], *parts, path)
    source.added = [
        read_added(entry, entry.get("id"), path) for entry in spec.get("added_tokens") or []
    ]
    bos, source.add_eos = read_template(spec, path)
    if bos:
        source.named["bos_token"] = bos
    source.add_bos = bos is not None
    return source
