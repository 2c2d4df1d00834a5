"""Refuses tokenizer files that are malformed, and by name whatever in them is not implemented."""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_min.errors import UserError, escape_controls, preview

MAX_ID = 1 << 24  # above any vocabulary, below a giant allocation
SURROGATE = re.compile("[\ud800-\udfff]")
NFC = {"type": "NFC"}
RESTORE = "restore the file as the checkpoint published it"

# fields of SentencePiece's sentencepiece_model.proto, by number
BPE = 2
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.model_type
PIECE_TYPES = {4: "user-defined", 5: "unused"}  # not implemented: each has rules of its own
NORMALIZER = {  # NormalizerSpec: name, expected
    3: ("add_dummy_prefix", True),
    4: ("remove_extra_whitespaces", False),
    5: ("escape_whitespaces", True),
}


def bad_file(path: Path | str, what: str, fix: str = RESTORE) -> UserError:
    return UserError(f"{escape_controls(path)}: {escape_controls(what)}; {fix}")


def unsupported(path: Path, key: str, got: object, expected: str) -> UserError:
    got = got if isinstance(got, str) else json.dumps(got)
    what = f"{key} is {got[:300]}, which is not implemented (expected {expected})"
    return bad_file(path, what, "use a Llama, Mistral, Qwen1.5/2 or Llama-3 tokenizer")


def check_rows(path: Path, rows: list[tuple[bool, str, object, str]]) -> None:
    """Each row: whether it fits, the key, what it is, what was expected."""
    for fits, key, got, expected in rows:
        if not fits:
            raise unsupported(path, key, got, expected)


@contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """Within, the content of `path` is read by plain look-ups; one that fails names the file."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as e:
        what = f"not laid out as a tokenizer file ({type(e).__name__}: {str(e)[:200]})"
        raise bad_file(path, what) from None


def check_text(text: str) -> None:
    if surrogate := SURROGATE.search(text):
        code, i = ord(surrogate[0]), surrogate.start()
        raise UserError(
            f"lone surrogate U+{code:04X} at character {i}, which is no text; use UTF-8", "text"
        )


# ---- tokens


def check_content(content: object, token: object) -> None:
    if not isinstance(content, str) or SURROGATE.search(content):
        raise ValueError(f"expected a token, got {json.dumps(token)[:100]}")


def check_added(entry: Any, id: object, path: Path) -> None:
    """`entry` is an object with the content and flags of an added token."""
    if isinstance(entry, dict):
        check_content(entry.get("content"), entry)
    if type(id) is not int or not 0 <= id < MAX_ID or not entry or not entry["content"]:
        raise bad_file(
            path,
            f"added token {json.dumps(entry)[:200]} with id {json.dumps(id)[:20]}, expected a "
            f"non-empty content and an id from 0 to {MAX_ID - 1}",
        )
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    if not all(isinstance(entry.get(flag, False), bool) for flag in flags):
        raise bad_file(
            path, f"added token {entry['content'][:200]}: its flags must be true or false"
        )


def check_clash(token: Any, id: int | None, other: str | None, path: Path | str) -> None:
    """Neither the content of `token` has another `id`, nor its id another content."""
    if id not in (None, token.id):
        clash = f"it has id {id}"
    elif other not in (None, token.content):
        clash = f"the id is taken by {other}"[:100]
    else:
        return
    what = f"added token {token.content[:100]} with id {token.id}: {clash}"
    raise bad_file(path, what, "correct the tokenizer files so that they agree")


def check_token_list(key: str, value: object, path: Path) -> None:
    if not isinstance(value, list | dict):
        what = f"{key} is {type(value).__name__}, expected a list of tokens"
        raise bad_file(path, what, "correct it")


# ---- tokenizer.model


def not_sentencepiece(path: Path) -> UserError:
    what = "not a SentencePiece model (empty, cut short, or another kind of file)"
    return bad_file(path, what, "download it again")


def check_sentencepiece(trainer: dict, normalizer: dict, types: set[int], path: Path) -> None:
    """A BPE model that treats text as Llama's does: fields by number, and the types of pieces."""
    model_type, charsmap = trainer.get(3, 1), normalizer.get(2)
    got = MODEL_TYPES.get(model_type, "unknown")
    rows = [(model_type == BPE, "model_type", got, "bpe")]
    name = normalizer.get(1, b"").decode(errors="replace")
    rows.append((not charsmap, "normalization", name, "identity"))
    for number, (key, expected) in NORMALIZER.items():
        fits = normalizer.get(number, True) == expected
        rows.append((fits, key, not expected, json.dumps(expected)))
    for number, got in PIECE_TYPES.items():
        expected = "normal, byte, control or unknown"
        rows.append((number not in types, "a piece's type", got, expected))
    check_rows(path, rows)


# ---- tokenizer.json


def check_model(model: dict, path: Path) -> None:
    vocab, kind = model["vocab"], model.get("type", "BPE")
    unused = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    rows = [(not model.get(key), f"model.{key}", model.get(key), "none") for key in unused]
    check_rows(path, [(kind == "BPE", "model.type", kind, "BPE"), *rows])
    if not vocab or not all(type(id) is int and 0 <= id < MAX_ID for id in vocab.values()):
        raise bad_file(path, f"model.vocab must give each token an id from 0 to {MAX_ID - 1}")
    if SURROGATE.search("".join(vocab)):
        raise bad_file(path, "model.vocab has a token with a lone surrogate")


def bad_merge(rank: int, line: object, path: Path) -> UserError:
    what = f"merge {rank} ({json.dumps(line)[:200]}) names a token outside the vocabulary"
    return bad_file(path, what)


def check_template(part: dict, before: list, after: list, path: Path) -> None:
    """At most one special token on each side of the text."""
    if len(before) > 1 or len(after) > 1:
        raise unsupported(path, "post_processor", part["single"], "at most one token on each side")


def check_spaces(
    model: dict,
    parts: tuple[list[dict], list[dict], list[dict]],
    known: list[tuple[list[dict], list[dict]]],
    known_decoders: list[list[dict]],
    path: Path,
) -> None:
    """`▁` is put in by one of the `known` pairs of normalizers and pre-tokenizers."""
    normalizers, splitters, decoders = parts
    allowed = [part for pair in known for part in pair[0]]
    rows = []
    for part in normalizers:
        expected = "Prepend ▁, Replace ' ' → ▁, or NFC before ByteLevel"
        rows.append((part in allowed, "normalizer", part, expected))
    fits = (normalizers, splitters) in known
    expected = "▁ for a space by Metaspace with split false, or by normalizers; or ByteLevel"
    rows.append((fits, "pre_tokenizer", splitters, expected))
    expected = "Replace ▁ → ' ', ByteFallback, Fuse, Strip"
    rows.append((decoders in known_decoders, "decoder", decoders, expected))
    ignore = model.get("ignore_merges")
    rows.append((not ignore, "model.ignore_merges", ignore, "false beside Metaspace"))
    check_rows(path, rows)


def check_byte_level(
    model: dict,
    parts: tuple[list[dict], list[dict], list[dict]],
    regex: str,
    regexes: Collection[str],
    bytes_of: dict[int, str],
    path: Path,
) -> None:
    """A Split by one of `regexes`, if any, then ByteLevel; every byte has a token."""
    normalizers, splitters, decoders = parts
    *split, level = splitters
    fits = (
        level["type"] == "ByteLevel"
        and not level.get("add_prefix_space", True)
        and level.get("use_regex", True) != bool(split)
        and [part["type"] for part in split] in ([], ["Split"])
    )
    layout = "Split, then ByteLevel without regex and prefix space; or ByteLevel with its regex"
    isolated = all(p.get("behavior") == "Isolated" and not p.get("invert") for p in split)
    behavior = "Split with behavior Isolated, not inverted"
    names = "the one of GPT-2, Qwen2 or Llama-3"
    decoder = [part["type"] for part in decoders] == ["ByteLevel"]
    fallback = model.get("byte_fallback")
    check_rows(
        path,
        [
            (normalizers in ([], [NFC]), "normalizer", normalizers, "NFC or none"),
            (fits, "pre_tokenizer", splitters, layout),
            (isolated, "pre_tokenizer", splitters, behavior),
            (regex in regexes, "pre_tokenizer regex", regex, names),
            (decoder, "decoder", decoders, "ByteLevel"),
            (not fallback, "model.byte_fallback", fallback, "false in a byte-level model"),
        ],
    )
    missing = [f"0x{b:02X}" for b, char in bytes_of.items() if char not in model["vocab"]]
    if missing:
        what = f"the byte-level vocabulary has no token for byte {preview(missing, ', ')}"
        raise bad_file(path, what)


# ---- tokenizer_config.json, and the folder


def check_settings(config: dict, path: Path) -> None:
    for key in ("legacy", "add_bos_token", "add_eos_token", "add_prefix_space"):
        if config.get(key) not in (None, True, False):
            what = f"{key} is {json.dumps(config[key])[:100]}, expected true or false"
            raise bad_file(path, what, "correct it")


def check_class(name: str | None, known: Collection[str], path: Path) -> None:
    if name not in (None, *known):
        expected = "LlamaTokenizer beside a tokenizer.model"
        raise unsupported(path, "tokenizer_class", name, expected)


def check_no_eos(add_eos: bool, path: Path) -> None:
    if add_eos:
        what = (
            "add_eos_token is true (or tokenizer.json's post-processor adds one): every prompt "
            "would end in EOS"
        )
        raise bad_file(path, what, "set add_eos_token to false")


def check_found(found: Collection[str], folder: Path) -> None:
    if not found:
        absent = "no tokenizer.json and no tokenizer.model here"
        what = absent if folder.is_dir() else "no such folder"
        raise bad_file(folder, what, "give a checkpoint folder that has one of the two")


def check_same_ids(vocab: dict[str, int], pieces: dict[str, int], path: Path) -> None:
    """The vocabulary of a tokenizer.json has the pieces of the tokenizer.model beside it."""
    if any(vocab.get(piece) != i for piece, i in pieces.items()):
        what = "gives other ids than the tokenizer.model beside it"
        raise bad_file(path, what, "remove the file of another checkpoint")
