"""The tokenizers: ours = transformers and SentencePiece, saved = loaded, streamed = decoded, bad
file = line.

Tiny tokenizers are made on the spot. The real Llama and Qwen1.5 files and llama.cpp's vectors for
them lie outside the repository (../shared/assets/tokenizers); tests that need them skip where they
are not.
"""

import json
import pickle
import random
import re
import struct
import time
import unicodedata
from pathlib import Path

import pytest
import sentencepiece

from llava_min.data.tokenizer import Tokenizer, bpe
from llava_min.errors import UserError

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets" / "tokenizers"
REAL = {
    "tokenizer.model": "llama_tokenizer.model",
    "tokenizer.json": "qwen1_5_tokenizer.json",
    "tokenizer_config.json": "qwen1_5_tokenizer_config.json",
}
TEXT = [
    "A chat between a curious user and an assistant.",
    "USER: What is in it? ASSISTANT: A red circle.",
    "the quick brown fox jumps over the lazy dog  and   then    sleeps",
    "There are 12 squares, 3 stars.",
    "def f(x):\n    return x  # code\n\n\tpass",
    "naïve café, Ünïcödé, 한국어 中文 🦙",
]
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def asset(name: str) -> Path:
    path = ASSETS / REAL.get(name, name)
    if not path.exists():
        pytest.skip(f"needs {path.name} of ../shared/assets/tokenizers, which is not here")
    return path


def write(folder: Path, name: str, value: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return folder


def edit(folder: Path, name: str, change) -> None:
    value = json.loads((folder / name).read_bytes())
    change(value)
    write(folder, name, value)


def train(path: Path, lines: list[str] = TEXT * 8, **options) -> Path:
    options = (
        dict(
            vocab_size=420,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.98,
            num_threads=1,
            minloglevel=2,
            allow_whitespace_only_pieces=True,
        )
        | options
    )
    prefix = str(path.with_suffix(""))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=prefix, **options
    )
    return path


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> bytes:
    """As in Llama's, `▁▁` has the lowest score: SentencePiece merges it last, transformers 5 by its
    id.
    """
    model = train(tmp_path_factory.mktemp("sp") / "tokenizer.model").read_bytes()
    start = model.index(b"\x0a\x06\xe2\x96\x81\xe2\x96\x81\x15") + 9
    return model[:start] + struct.pack("<f", -1e9) + model[start + 4 :]


def added(content: str, id: int, **flags) -> dict:
    return (
        dict(
            id=id,
            content=content,
            single_word=False,
            lstrip=False,
            rstrip=False,
            normalized=False,
            special=True,
        )
        | flags
    )


def byte_level(regex: str | None = QWEN, nfc: bool = True, ignore_merges: bool = False) -> dict:
    """A tokenizer.json of 256 bytes and the merges of a few words."""
    vocab = {c: i for i, c in enumerate(bpe.BYTE_TO_CHAR.values())}
    merges = []
    for word in (
        " the",
        " quick",
        "ing",
        "'s",
        "'ll",
        "   ",
        "\n\n",
        "é",
        "中",
        "🦙",
        "USER",
        " image",
        "ab",
        "bc",
        "abc",
        "!!",
    ):
        chars = [bpe.BYTE_TO_CHAR[b] for b in word.encode()]
        while len(chars) > 1:
            if chars[0] + chars[1] not in vocab:
                vocab[chars[0] + chars[1]] = len(vocab)
                merges.append([chars[0], chars[1]])
            chars[:2] = [chars[0] + chars[1]]
    # no merge leads there: found by ignore_merges alone
    vocab["Ġzq"] = len(vocab)
    n = len(vocab)
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": regex is None,
    }
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "NFC"} if nfc else None,
        "added_tokens": [added("<|endoftext|>", n), added("<|im_end|>", n + 1)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]} if regex else level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }


def metaspace(model: bytes, scheme: str) -> dict:
    """A tokenizer.json with the pieces of a tokenizer.model; scheme "prepend": the older form."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
    merges = [
        [p[:i], p[i:]]
        for p in vocab
        for i in range(1, len(p))
        if {p[:i], p[i:]} <= vocab.keys() and p[0] != "<"
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    bos = {
        "type": "TemplateProcessing",
        "pair": [a, b],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, a],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": prepend if scheme == "prepend" else None,
        "pre_tokenizer": None if scheme == "prepend" else space,
        "post_processor": bos,
        "added_tokens": [added("<unk>", 0), added("<s>", 1), added("</s>", 2)],
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


FLAGS = [
    dict(content="<L>", lstrip=True),
    dict(content="<R>", rstrip=True),
    dict(content="qwörd", single_word=True, special=False),
    dict(content="<LR>", lstrip=True, rstrip=True, special=False),
    dict(content="<LRx", normalized=True, special=False),
    dict(content="<LRxy", normalized=True, special=False),
    dict(content="<image>", normalized=True, special=False),
    dict(content="<e\u0301 f>", normalized=True, special=False),
]


def with_flags(spec: dict) -> dict:
    n = max(spec["model"]["vocab"].values()) + 1
    n = max([n] + [token["id"] + 1 for token in spec["added_tokens"]])
    spec["added_tokens"] += [added(**{"id": n + i} | flags) for i, flags in enumerate(FLAGS)]
    return spec


AS_WRITTEN = {"tokenizer_class": "PreTrainedTokenizerFast"}
# transformers 5 ranks their merges by id: not the reference
MODEL_ALONE = ["llama legacy", "llama", "tiny legacy", "tiny"]
SOURCES = [
    "llama legacy",
    "llama",
    "llama saved by transformers",
    "qwen",
    "tiny legacy",
    "tiny",
    "tiny saved by transformers",
    "tiny prepend",
    "tiny always",
    "tiny first",
    "tiny never",
    "tiny qwen",
    "tiny llama-3",
    "tiny gpt-2",
]


def make(source: str, tmp: Path, tiny_model: bytes) -> Path:
    """The folder of a source; what transformers makes of it is the reference."""
    kind, _, rest = source.partition(" ")
    if source == "qwen":
        write(tmp, "tokenizer_config.json", asset("tokenizer_config.json").read_bytes())
        return write(tmp, "tokenizer.json", asset("tokenizer.json").read_bytes())
    if rest in ("qwen", "llama-3", "gpt-2"):
        regex = {"qwen": QWEN, "llama-3": LLAMA3, "gpt-2": None}[rest]
        spec = byte_level(regex, nfc=rest != "llama-3", ignore_merges=rest == "llama-3")
        write(tmp, "tokenizer.json", with_flags(spec))
        return write(tmp, "tokenizer_config.json", AS_WRITTEN | {"eos_token": "<|im_end|>"})
    if rest in ("prepend", "always", "first", "never"):
        write(tmp, "tokenizer.json", with_flags(metaspace(tiny_model, rest)))
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return write(tmp, "tokenizer_config.json", AS_WRITTEN | named)
    model = asset("tokenizer.model").read_bytes() if kind == "llama" else tiny_model
    if rest == "bare":
        return write(tmp, "tokenizer.model", model)
    write(
        tmp,
        "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": rest == "legacy",
            "add_bos_token": True,
            "pad_token": "<pad>",
        },
    )
    write(tmp, "tokenizer.model", model)
    if "saved" in rest:
        transformers = pytest.importorskip("transformers", reason="it is to write the folder")
        transformers.LlamaTokenizer.from_pretrained(tmp).save_pretrained(tmp / "saved")
        assert not (tmp / "saved" / "tokenizer.model").exists()
        return tmp / "saved"
    return tmp


# Code points assigned in Unicode 14: where Python's own tables are newer, the newer ones are left
# out.
ASSIGNED = [
    chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
]
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<image>",
    "<|im_end|>",
    "<|endoftext|>",
    "<0x0A>",
    "<L>",
    "<R>",
    " <L> ",
    "<LRxy",
    "<R>\x85 ",
    "\xa0<LR>\n",
    "<LRx",
    "<LR>>",
    "qwörd",
    "qwörds",
    "aqwörd",
    "qwörd\u0301",
    "\u24d0qwörd",
    "<e\u0301 f>",
    "<é f>",
]
ODD = [
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n",
    "\n \n",
    "\t\t ",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
    "\x1c",
    "\0",
    "\x1f",
    "\x0b",
    "\u200b",
    "🦙",
    "👨\u200d👩\u200d👧",
    "🇩🇪",
    "👍🏽",
    "é",
    "e\u0301",
    "ǅ",
    "ﬁ",
    "İ",
    "ſ",
    "'ſ",
    "'S",
    "'LL",
    "'re",
    "한국",
    "①",
    "½",
    "Ⅷ",
    "٣",
    "▁",
    "▁▁",
    "a▁b",
    "\ufffd",
    "\ufeff",
]
PLAIN = (
    "the quick Brown fox USER: ASSISTANT: What's in image Answer they'll don't I've zq x aa aaaa "
    "abcabc "
    "ababc"
).split()


def random_text(r: random.Random) -> str:
    parts = []
    for _ in range(r.randrange(12)):
        parts.append(
            r.choice(
                [
                    lambda: "".join(r.choices(ASSIGNED, k=r.randrange(1, 8))),
                    lambda: " " * r.randrange(1, 7),
                    lambda: r.choice(ODD),
                    lambda: r.choice(SPECIAL),
                    lambda: str(r.randrange(10 ** r.randrange(1, 9))),
                    lambda: "".join(r.choices("abc()[]<>/|_-'\";:,.?", k=4)),
                    lambda: "".join(chr(r.randrange(0x4E00, 0x9FFC)) for _ in range(4)),
                    lambda: r.choice(["", " "]) + r.choice(PLAIN),
                    lambda: r.choice(["", " "]) + r.choice(PLAIN),
                ]
            )()
        )
    return "".join(parts)


def random_ids(r: random.Random, size: int) -> list[int]:
    """Any ids, past the end of the vocabulary too; half of them bytes, whole and broken UTF-8
    alike.
    """
    return [
        r.randrange(size + 20) if r.random() < 0.5 else r.randrange(259)
        for _ in range(r.randrange(16))
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_equals_transformers(source, tmp_path, tiny_model):
    transformers = pytest.importorskip("transformers", reason="the reference of the tokenizers")
    folder = make(source, tmp_path, tiny_model)
    ours = Tokenizer.load(folder)
    if source in MODEL_ALONE:
        folder = tmp_path / "to"
        ours.save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    r, exact = random.Random(source), dict(clean_up_tokenization_spaces=False)
    assert len(ours) == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.unk_id, ours.pad_id) == (theirs.unk_token_id, theirs.pad_token_id)
    assert ours.encode("hi", parse_special=True) == theirs("hi").input_ids[ours.add_bos :]
    assert ours.add_bos == (theirs("hi").input_ids[0] == ours.bos_id)
    texts = [random_text(r) for _ in range(500 if source.startswith("tiny") else 5000)]
    bare = dict(add_special_tokens=False, return_attention_mask=False)  # many at once, quicker
    parsed = theirs(texts, **bare).input_ids
    split = theirs(texts, split_special_tokens=True, **bare).input_ids
    for n, text in enumerate(texts):
        assert ours.encode(text, parse_special=True) == parsed[n], (n, text)
        ids = ours.encode(text)
        assert ids == split[n], (n, text)
        for ids in (ids, random_ids(r, len(ours))) if n % 5 == 0 else ():
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, **exact), (
                n,
                ids,
            )
            assert ours.decode(ids, skip_special=False) == theirs.decode(ids, **exact), (n, ids)


def bare(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Without its dummy space: a field appended to a protobuf overrides the one before."""
    return sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("name", ["tiny", "tokenizer.model", "tokenizer.model.v1"])
def test_a_tokenizer_model_alone_is_sentencepiece(name, legacy, tmp_path, tiny_model):
    """Merges ranked by score; each chunk between special tokens has its dummy space, or only the
    first (legacy false). Saved, too, and there transformers reads the same.
    """
    model = tiny_model if name == "tiny" else asset(name).read_bytes()
    folder = write(tmp_path / "from", "tokenizer.model", model)
    if legacy is not None:
        write(
            folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
        )
    ours, r = Tokenizer.load(folder), random.Random(name)
    ours.save(tmp_path / "to")
    saved = [Tokenizer.load(tmp_path / "to")]
    write(tmp_path / "to", "config.json", {"model_type": "llava"})
    saved += [Tokenizer.load(tmp_path / "to")]
    sp, inside = sentencepiece.SentencePieceProcessor(model_proto=model), bare(model)
    texts = [random_text(r) for _ in range(500 if name == "tiny" else 5000)]
    texts += [" " * n + "x" for n in range(40)] + ["a" * n for n in range(20)]
    for text in texts:
        ids = sp.encode(text)
        assert ours.encode(text) == ids, text
        assert all(t.encode(text) == ids for t in saved), text
        first, *rest = re.split("(<s>|</s>|<unk>)", text)
        ids = sp.encode(first)
        for mark, part in zip(rest[::2], rest[1::2]):
            ids += [sp.piece_to_id(mark)] + (inside if legacy is False else sp).encode(part)
        assert ours.encode(text, parse_special=True) == ids, text
        assert all(t.encode(text, parse_special=True) == ids for t in saved), text
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return
    theirs = AutoTokenizer.from_pretrained(tmp_path / "to")(texts).input_ids
    assert theirs == [[1] + saved[0].encode(text, parse_special=True) for text in texts]


@pytest.mark.parametrize("source", ["llama legacy", "tiny legacy", "tiny always"])
def test_legacy_survives_transformers_save(source, tmp_path, tiny_model):
    """transformers 5.23 writes legacy into tokenizer.json, and forgets it on reading; the file
    stands.
    """
    transformers = pytest.importorskip(
        "transformers", reason="the folder is to be written by transformers"
    )
    folder = make(source, tmp_path, tiny_model)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "again")
    ours, r = Tokenizer.load(tmp_path / "again"), random.Random(1)
    assert ours.legacy
    for _ in range(300):
        text = random_text(r)
        assert ours.encode(text, parse_special=True) == theirs.encode(
            text, add_special_tokens=False
        ), text


@pytest.mark.parametrize(
    "name, vectors",
    [("tokenizer.model", "ggml-vocab-llama-spm.gguf"), ("tokenizer.json", "ggml-vocab-qwen2.gguf")],
)
def test_llama_cpp_vectors(name, vectors, tmp_path):
    """llama.cpp's own tests of the two real tokenizers: texts, and their ids without BOS."""
    ours = Tokenizer.load(write(tmp_path, name, asset(name).read_bytes()))
    ours.save(tmp_path / "to")
    saved = Tokenizer.load(tmp_path / "to")
    with open(asset(vectors + ".inp"), encoding="utf-8", newline="") as f:
        texts = f.read().split("\n__ggml_vocab_test__\n")
    lines = asset(vectors + ".out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines):
        ids = [int(i) for i in line.split()]
        assert ours.encode_prefixed(text) == ours.encode(text) == saved.encode(text) == ids, text


@pytest.mark.parametrize("name", ["tiny", "tokenizer.model", "tokenizer.model.v1"])
def test_encode_prefixed_is_sentencepiece(name, tmp_path, tiny_model):
    model = tiny_model if name == "tiny" else asset(name).read_bytes()
    ours, r = Tokenizer.load(write(tmp_path, "tokenizer.model", model)), random.Random(2)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    for _ in range(500):
        text = random_text(r) or "x"
        ids = sp.encode(text)
        assert ours.encode_prefixed(text) == ours.encode_prefixed(text, at="special") == ids, text
        assert ours.encode_prefixed(" " + text, at="inside") == ids, text


def test_dummy_space(tmp_path, tiny_model):
    """What stands before a text decides on its dummy space."""
    for source in ("tiny legacy", "tiny"):
        t = Tokenizer.load(make(source, tmp_path / source, tiny_model))
        assert t.legacy == (source == "tiny legacy")
        spaced, bare = t.encode("USER"), t.encode("USER", at="inside")
        assert t.decode(bare + bare) == "USERUSER" and t.decode(bare + spaced) == "USER USER"
        after = spaced if t.legacy else bare
        assert t.encode("USER", at="special") == t.encode_prefixed("USER", at="special") == after
        assert t.encode("</s>USER", parse_special=True) == [2, *after]
        assert t.encode_prefixed("USER") == spaced
        # SentencePiece puts its space before every text
        assert t.encode_prefixed(" USER") == t.encode(" USER") != spaced
        assert t.encode("") == t.encode_prefixed("") == t.encode("", at="inside") == []
        # drops one dummy space, once
        assert t.decode(t.encode("  a  b") + [2] + t.encode("  c")) == "  a  b   c"


@pytest.mark.parametrize("source, ids", [("llama legacy", [2, 3148, 1001]), ("llama", [2, 11889])])
def test_legacy_as_published(source, ids, tmp_path, tiny_model):
    ours = Tokenizer.load(make(source, tmp_path, tiny_model))
    assert (
        ours.encode("</s>USER", parse_special=True)
        == ids
        == [2, *ours.encode("USER", at="special")]
    )


def test_only_a_tokenizer_model(tmp_path, tiny_model):
    ours = Tokenizer.load(write(tmp_path, "tokenizer.model", tiny_model))
    assert ours.legacy and ours.add_bos
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2, None)
    assert list(ours.added) == ["<unk>", "<s>", "</s>"] and len(ours) == 420
    write(tmp_path, "tokenizer_config.json", {"add_bos_token": False, "legacy": False})
    ours = Tokenizer.load(tmp_path)
    assert not ours.legacy and not ours.add_bos and ours.bos_id == 1


def test_spelled_bytes_are_no_bytes(tmp_path):
    """`<0x41` and `>` may be pieces; together they are still text."""
    train(
        tmp_path / "tokenizer.model",
        ["a<0x41 b<0x41 c<0x41 d<0x41 >"] * 20,
        vocab_size=280,
        hard_vocab_limit=False,
        split_by_unicode_script=False,
        split_by_number=False,
    )
    ours = Tokenizer.load(tmp_path)
    ids = ours.encode("<0x41>", at="inside")
    assert {"<0x41", ">"} <= ours.vocab.keys() and ours.token_id("<0x41>") not in ids
    assert ours.decode(ids) == "<0x41>"


@pytest.mark.parametrize("source", SOURCES)
def test_text_stays_text(source, tmp_path, tiny_model):
    ours = Tokenizer.load(make(source, tmp_path, tiny_model))
    ours.encode("<image>")  # must leave no trace once <image> is added
    image = ours.add_special("<image>")
    special = {token.id for token in ours.added.values() if token.special}
    assert image in special and ours.encode("<image>", parse_special=True)[-1] == image
    for token in [t for t in ours.added.values() if t.special]:
        for text in (token.content, f"a{token.content}b", f" {token.content}\n{token.content}"):
            ids = ours.encode(text) + ours.encode(text, at="inside") + ours.encode_prefixed(text)
            assert not special & set(ids), text
            assert ours.decode(ours.encode(text)).lstrip(" ") == text.lstrip(" ")


@pytest.mark.parametrize(
    "source", ["tiny", "tiny prepend", "tiny qwen", "tiny llama-3", "llama", "qwen"]
)
def test_stream(source, tmp_path, tiny_model):
    ours, r = Tokenizer.load(make(source, tmp_path, tiny_model)), random.Random(3)
    for n in range(1000):
        text = re.sub("\ufffd|qwörd", "", random_text(r))
        ids = random_ids(r, len(ours)) if n % 2 else ours.encode(text, parse_special=True)
        stream = ours.stream()
        pieces = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(pieces) == ours.decode(ids)
        if n % 2 == 0:
            # never half a character
            assert not any("\ufffd" in piece for piece in pieces), text
    stream, ids = ours.stream(), ours.encode("a 中🦙 b")
    pieces = [stream.push(i) for i in ids]
    assert sum(map(bool, pieces)) > 2  # it comes in parts
    assert "".join(pieces + [stream.flush()]) == "a 中🦙 b"


@pytest.mark.parametrize("source", SOURCES + ["tiny bare"])
def test_saved_is_loaded(source, tmp_path, tiny_model):
    folder = make(source, tmp_path, tiny_model)
    extra = {"auto_map": {"AutoTokenizer": "evil.py"}, "chat_template": "{{ x }}"}
    if source != "tiny bare":
        edit(folder, "tokenizer_config.json", lambda config: config.update(extra))
    ours, r = Tokenizer.load(folder), random.Random(4)
    size = len(ours)
    assert (
        ours.add_special("<new>") == size
        and ours.add_special("<new>") == size
        and len(ours) == size + 1
    )
    ours.save(tmp_path / "to")
    again = Tokenizer.load(tmp_path / "to")
    config = json.loads((tmp_path / "to" / "tokenizer_config.json").read_bytes())
    assert "auto_map" not in config and (
        source == "tiny bare" or config["chat_template"] == "{{ x }}"
    )
    if (tmp_path / "to" / "tokenizer.json").exists():
        spec = json.loads((tmp_path / "to" / "tokenizer.json").read_bytes())
        assert (spec["added_tokens"][-1]["content"], spec["added_tokens"][-1]["id"]) == (
            "<new>",
            size,
        )
    assert again.added == ours.added and len(again) == len(ours) and again.token(size) == "<new>"
    for name in ("bos_id", "eos_id", "unk_id", "pad_id", "legacy", "add_bos", "scheme", "prepend"):
        assert getattr(again, name) == getattr(ours, name), name
    try:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(tmp_path / "to")
    except ImportError:
        theirs = None
    for _ in range(200):
        text = random_text(r) + r.choice(["", "<new>", " <new> x"])
        ids = ours.encode(text, parse_special=True)
        assert again.encode(text, parse_special=True) == ids, text
        assert again.encode(text, at="special") == ours.encode(text, at="special"), text
        assert again.decode(ids) == ours.decode(ids)
        if theirs:
            assert theirs(text).input_ids == [ours.bos_id] * ours.add_bos + ids, text
            text = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert text == ours.decode(ids)


def test_added_tokens_of_the_config_files(tmp_path, tiny_model):
    write(tmp_path, "tokenizer.model", tiny_model)
    write(tmp_path, "added_tokens.json", {"<image>": 420, "word": 421})
    special = {"additional_special_tokens": ["<image>"], "pad_token": {"content": "<pad>"}}
    write(tmp_path, "special_tokens_map.json", special)
    ours = Tokenizer.load(tmp_path)
    assert ours.added["<image>"].special and not ours.added["word"].special
    assert (ours.token_id("<image>"), ours.token_id("word"), ours.pad_id, len(ours)) == (
        420,
        421,
        422,
        423,
    )
    write(tmp_path, "added_tokens.json", {"<image>": 5})
    with pytest.raises(
        UserError, match="added_tokens.json: .*<image> with id 5: the id is taken by <0x02>"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("source", ["tiny", "tiny first", "tiny llama-3"])
def test_special_is_out_of_reach_of_the_merges(source, tmp_path, tiny_model):
    """A piece that text spells by merging, once it is declared special, is only ever put in by id."""
    ours = Tokenizer.load(make(source, tmp_path, tiny_model))
    piece = "▁the" if source != "tiny llama-3" else "Ġthe"
    assert ours.encode(" the", at="inside") == [ours.token_id(piece)]
    id = ours.add_special(piece)
    assert id == ours.vocab[piece] and id not in ours.encode(" the", at="inside") + ours.encode(
        " the"
    )
    assert ours.decode(ours.encode("x the")) == "x the"
    assert ours.decode([id]) == ""


@pytest.mark.parametrize("source", ["tiny", "tiny first", "tiny qwen"])
def test_copies_travel_to_workers(source, tmp_path, tiny_model):
    ours = Tokenizer.load(make(source, tmp_path, tiny_model))
    ids = ours.encode("the quick")
    again = pickle.loads(pickle.dumps(ours))
    assert again.encode("the quick </s>x") == ours.encode("the quick </s>x")
    assert again.decode(ids) == "the quick"
    assert again.encode_prefixed(" the") == ours.encode_prefixed(" the")


def test_merge_equals_the_textbook():
    """The heap against the definition: while any pair is known, merge the lowest-ranked, leftmost
    one.
    """
    r = random.Random(5)
    for _ in range(300):
        pairs = {(r.randrange(9), r.randrange(9)): r.randrange(3, 9) for _ in range(12)}
        pairs = {pair: (rank, new) for rank, (pair, new) in enumerate(pairs.items())}
        ids = slow = [r.randrange(4) for _ in range(r.randrange(20))]
        while known := [(pairs[p][0], i) for i, p in enumerate(zip(slow, slow[1:])) if p in pairs]:
            i = min(known)[1]
            slow = slow[:i] + [pairs[slow[i], slow[i + 1]][1]] + slow[i + 2 :]
        assert bpe.merge(ids, pairs) == slow


def test_a_pair_that_changed_waits_for_its_own_rank():
    """a b c d: b+c goes first, and then bc+d, though a+b, whose b is gone, was to be the second."""
    pairs = {(1, 2): (0, 4), (0, 1): (1, 5), (4, 3): (2, 6), (0, 4): (3, 7)}
    assert bpe.merge([0, 1, 2, 3], pairs) == [0, 6]


def test_words_that_are_remembered_have_a_bound():
    words = bpe.WordCache(len)
    assert [words[str(i)] for i in range(70_000)] == [len(str(i)) for i in range(70_000)] and len(
        words
    ) <= 1 << 16
    assert words["x" * 65] == 65 and "x" * 65 not in words


@pytest.mark.parametrize("fuse, ids", [(True, [1, 0, 1]), (False, [1, 0, 0, 1])])
def test_unknown_characters_are_one_token_where_the_file_says_so(fuse, ids):
    assert (
        bpe.SentencePieceBPE(
            {"<unk>": 0, "a": 1}, {}, byte_fallback=False, unk_id=0, fuse_unk=fuse, strip=False
        ).encode("aéèa")
        == ids
    )


def test_a_piece_may_reach_over_a_space():
    vocab = {"a": 0, "▁": 1, "b": 2, "a▁": 3, "a▁b": 4}
    whole = bpe.SentencePieceBPE(
        vocab,
        {(0, 1): (0, 3), (3, 2): (1, 4)},
        byte_fallback=False,
        unk_id=None,
        fuse_unk=True,
        strip=False,
    )
    assert whole.encode("a▁b") == [4]


def test_no_dummy_space_where_the_config_says_so(tmp_path, tiny_model):
    folder = make("tiny", tmp_path, tiny_model)
    spaced = Tokenizer.load(folder)
    edit(folder, "tokenizer_config.json", lambda config: config.update(add_prefix_space=False))
    t = Tokenizer.load(folder)
    assert (
        t.encode("USER") == spaced.encode("USER", at="inside")
        and t.decode(t.encode(" USER")) == " USER"
    )


def test_llavas_own_rule_has_its_dummy_space_though_the_tokenizer_has_none(tmp_path, tiny_model):
    never, first = (
        Tokenizer.load(make(f"tiny {scheme}", tmp_path / scheme, tiny_model))
        for scheme in ("never", "first")
    )
    assert (
        never.encode("USER")
        != never.encode_prefixed("USER")
        == first.encode_prefixed("USER")
        == first.encode("USER")
    )


def test_ids_may_have_gaps(tmp_path, tiny_model, capsys):
    t = Tokenizer.load(make("tiny", tmp_path, tiny_model))
    n = len(t)
    t.add_special("<far>", n + 5)
    assert len(t) == n + 6
    t.save(tmp_path / "to")
    assert f"some ids below {n + 6} have no token" in capsys.readouterr().err


def test_words_join_up():
    text = "I'LL say\n\n\xa0Ünï12   ٣e\u0301!?\n \x1c"
    for split in bpe.SPLITS.values():
        cut = [
            text[m.start() : m.end()]
            for m in re.finditer(split, text.translate(bpe.KINDS), re.ASCII)
        ]
        assert "".join(cut) == text and all(cut)


def test_words_of_the_three_regexes():
    kinds = "It'S 1234\n\n  x".translate(bpe.KINDS)
    cuts = {
        name: [m[0] for m in re.finditer(bpe.SPLITS[regex], kinds, re.ASCII)]
        for name, regex in (("gpt2", bpe.GPT2_SPLIT), ("qwen", QWEN), ("llama3", LLAMA3))
    }
    assert cuts["gpt2"] == ["It", "'", "S", " 1234", "\n\n ", " x"]
    assert cuts["qwen"] == ["It", "'S", " ", "1", "2", "3", "4", "\n\n", " ", " x"]
    assert cuts["llama3"] == ["It", "'S", " ", "123", "4", "\n\n", " ", " x"]
    assert "½Ⅷéſ中\xa0\x1c\u200b".translate(bpe.KINDS) == "00aSa\t!!"


@pytest.mark.parametrize("source", ["tiny", "tiny always", "tiny qwen"])
def test_text_at_the_edges(source, tmp_path, tiny_model):
    ours = Tokenizer.load(make(source, tmp_path, tiny_model))
    for text in ("a\0b", "   ", "\u202eabc", "a" * 300 + " " * 300):
        # Metaspace adds none here
        assert ours.decode(ours.encode(text)) == text.removeprefix(" " * (source == "tiny always"))
    for encode in (ours.encode, ours.encode_prefixed, ours.add_special):
        with pytest.raises(UserError, match="lone surrogate U\\+D83D at character 2"):
            encode("ab\ud83d")
    for text in ("a" * 50_000, " " * 50_000, "漢字🦙" * 17_000, "ab c" * 12_500):
        start = time.perf_counter()
        assert ours.encode(text)
        assert time.perf_counter() - start < 5  # ~0.2 s; a quadratic merge takes minutes


def set_(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(spec):
        for key in keys:
            spec = spec[key]
        spec[last] = value

    return change


REFUSED = [
    (
        "tiny first",
        lambda spec: spec["post_processor"]["single"].extend(
            [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 2
        ),
        "at most one token",
    ),
    (
        "tiny qwen",
        set_("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", r"\p{L}"),
        "regex is .*L",
    ),
    (
        "tiny qwen",
        set_("pre_tokenizer", "pretokenizers", 0, "behavior", "Removed"),
        "pre_tokenizer.*Removed",
    ),
    ("tiny qwen", set_("pre_tokenizer", "pretokenizers", 0, "invert", True), "pre_tokenizer"),
    (
        "tiny qwen",
        set_("pre_tokenizer", "pretokenizers", 0, {"type": "Digits"}),
        "pre_tokenizer.*Digits",
    ),
    (
        "tiny qwen",
        set_("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True),
        "pre_tokenizer",
    ),
    ("tiny qwen", set_("pre_tokenizer", "pretokenizers", 1, "use_regex", True), "pre_tokenizer"),
    (
        "tiny llama-3",
        set_("pre_tokenizer", {"type": "BertPreTokenizer"}),
        "pre_tokenizer.*BertPreTokenizer",
    ),
    ("tiny qwen", set_("normalizer", {"type": "Lowercase"}), "normalizer.*Lowercase"),
    ("tiny qwen", set_("decoder", {"type": "WordPiece"}), "decoder.*WordPiece"),
    (
        "tiny qwen",
        set_("post_processor", {"type": "BertProcessing"}),
        "post_processor.*BertProcessing",
    ),
    ("tiny qwen", set_("model", "type", "Unigram"), "model.type.*Unigram"),
    ("tiny qwen", set_("model", "dropout", 0.1), "model.dropout"),
    ("tiny qwen", set_("model", "end_of_word_suffix", "</w>"), "end_of_word_suffix"),
    ("tiny qwen", set_("model", "merges", 0, ["zz", "zz"]), "merge 0.*zz"),
    ("tiny qwen", set_("model", "merges", 0, ["a"]), "not laid out"),
    ("tiny qwen", set_("model", "vocab", "Ġ", -1), "id from 0"),
    ("tiny qwen", set_("model", "vocab", "Ġ", 1 << 40), "id from 0"),
    ("tiny qwen", set_("model", "vocab", {}), "vocab"),
    ("tiny qwen", lambda spec: spec["model"]["vocab"].pop("{"), "no token for byte 0x7B"),
    ("tiny qwen", set_("added_tokens", 0, "content", ""), "added token"),
    ("tiny qwen", set_("added_tokens", 0, "lstrip", "yes"), "flags"),
    ("tiny qwen", set_("added_tokens", 0, "id", 3), "taken"),
    ("tiny qwen", set_("added_tokens", 7), "not laid out"),
    ("tiny first", set_("pre_tokenizer", "split", True), "pre_tokenizer"),
    ("tiny first", set_("pre_tokenizer", "prepend_scheme", "last"), "pre_tokenizer"),
    ("tiny first", set_("pre_tokenizer", None), "pre_tokenizer"),
    ("tiny first", set_("normalizer", {"type": "NFKC"}), "normalizer.*NFKC"),
    ("tiny first", set_("decoder", {"type": "Metaspace"}), "decoder.*Metaspace"),
    (
        "tiny first",
        set_("post_processor", "single", [{"Sequence": {}}, {"SpecialToken": {"id": "</s>"}}]),
        "add_eos_token",
    ),
]


@pytest.mark.parametrize("source, change, named", REFUSED, ids=range(len(REFUSED)))
def test_refused_by_name(source, change, named, tmp_path, tiny_model):
    folder = make(source, tmp_path, tiny_model)
    # the control: it is the change that is refused
    Tokenizer.load(folder)
    edit(folder, "tokenizer.json", change)
    with pytest.raises(UserError, match=f"tokenizer.*json: .*({named})") as e:
        Tokenizer.load(folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < 2000


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(model_type="unigram", hard_vocab_limit=False), "unigram"),
        (dict(normalization_rule_name="nmt_nfkc"), "nmt_nfkc"),
        (dict(remove_extra_whitespaces=True), "remove_extra_whitespaces"),
        (dict(add_dummy_prefix=False), "add_dummy_prefix"),
        (dict(user_defined_symbols=["<x>"]), "user-defined"),
    ],
)
def test_other_sentencepiece_models_are_refused(options, named, tmp_path):
    train(tmp_path / "tokenizer.model", **options)
    with pytest.raises(UserError, match=f"tokenizer.model: .*{named}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("tokenizer.json", b"", "line 1 column 1"),
        ("tokenizer.json", b'{"a": 1,\n}', "line 2"),
        ("tokenizer.json", b"[]", "object"),
        ("tokenizer.json", b"\xff\xfe{", "not UTF-8"),
        ("tokenizer.json", b"[" * 100_000, "RecursionError"),
        ("tokenizer.json", b"{}", "KeyError"),
        ("tokenizer.json", b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("tokenizer.model", b"", "not a SentencePiece"),
        ("tokenizer.model", b"hello", "not a SentencePiece"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("tokenizer_config.json", b"{", "line 1"),
        ("tokenizer_config.json", {"legacy": "no"}, "legacy is .no."),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "T5Tokenizer"},
            "tokenizer_class is T5Tokenizer",
        ),
        ("tokenizer_config.json", {"add_eos_token": True}, "add_eos_token"),
        ("tokenizer_config.json", {"bos_token": 3}, "expected a token"),
        ("tokenizer_config.json", {"additional_special_tokens": "<x>"}, "expected a list"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "<x>"}}},
            "added token",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"99999999999": {"content": "<x>"}}},
            "added token",
        ),
        ("added_tokens.json", {"<x>": None}, "added token"),
        ("special_tokens_map.json", [], "object"),
    ],
)
def test_malformed_files(name, data, said, tmp_path, tiny_model):
    write(tmp_path, "tokenizer.model", tiny_model)
    write(tmp_path, name, data)
    with pytest.raises(UserError, match=said) as e:
        Tokenizer.load(tmp_path)
    assert name in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 2000


def test_absent_files(tmp_path, tiny_model):
    with pytest.raises(UserError, match="no tokenizer.json and no tokenizer.model here; give"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="absent: no such folder"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match="tokenizer.json: not a regular file"):
        Tokenizer.load(tmp_path)


def test_two_tokenizers_that_disagree(tmp_path, tiny_model):
    folder = make("tiny first", tmp_path, tiny_model)
    write(folder, "tokenizer.model", tiny_model)
    ours, sp = Tokenizer.load(folder), sentencepiece.SentencePieceProcessor(model_proto=tiny_model)
    assert ours.encode_prefixed("  a  b") == sp.encode("  a  b")
    ours.save(tmp_path / "to")
    assert (tmp_path / "to" / "tokenizer.model").read_bytes() == tiny_model
    train(folder / "tokenizer.model", vocab_size=400)
    with pytest.raises(UserError, match="other ids than the tokenizer.model beside it"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "source, name",
    [
        ("tiny qwen", "tokenizer.json"),
        ("tiny first", "tokenizer.json"),
        ("tiny", "tokenizer.model"),
        ("tiny", "tokenizer_config.json"),
        ("tiny qwen", "tokenizer_config.json"),
    ],
)
def test_fuzzed_files(source, name, tmp_path, tiny_model):
    """Whatever a file holds: it loads and works, or one UserError."""
    folder, r, outcomes = make(source, tmp_path, tiny_model), random.Random(6), [0, 0]
    good = (folder / name).read_bytes()
    if name.endswith("config.json"):
        extra = {"added_tokens_decoder": {"600": {"content": "<x>", "special": True}}}
        good = json.dumps(json.loads(good) | extra).encode()
    for _ in range(400):
        data = bytearray(good)
        for _ in range(r.randrange(1, 4)):
            i, j = r.randrange(len(data)), r.randrange(len(data))
            kind = r.randrange(4)
            if kind == 0:
                data[i] = r.randrange(256)
            elif kind == 1:
                del data[i : i + r.choice([1, 2, 50])]
            elif kind == 2:
                data[i:i] = bytes(r.randrange(256) for _ in range(3))
            else:
                data[i:i] = data[j : j + 30]
        write(folder, name, bytes(data))
        try:
            ours = Tokenizer.load(folder)
            ours.decode(
                ours.encode("the quick <x> 🦙 </s>", parse_special=True)
                + ours.encode_prefixed(" x")
            )
            outcomes[0] += 1
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 2000
            outcomes[1] += 1
    assert min(outcomes) > 5, outcomes


def test_added_tokens_in_text(tmp_path, tiny_model):
    """The flags of an added token, by example (the random texts compare the same with
    transformers).
    """
    ours = Tokenizer.load(make("tiny first", tmp_path, tiny_model))
    ids = {content: token.id for content, token in ours.added.items()}
    raw = ours.matchers[0]
    assert list(raw.cut("a <L> b", True)) == ["a", ids["<L>"], " b"]
    assert list(raw.cut("a <R> b", True)) == ["a ", ids["<R>"], "b"]
    assert list(raw.cut("a <LR> b", True)) == ["a", ids["<LR>"], "b"]
    assert list(raw.cut("qwörds qwörd", True)) == ["qwörds ", ids["qwörd"]]
    assert list(raw.cut("</s>x</s>", False)) == ["</s>x</s>"]
