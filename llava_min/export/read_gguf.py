"""A GGUF language model read: its config, its tensors, and its tokenizer as the files we read.

Every type that the `gguf` package can undo is taken (f32, f16, q8_0, q4_0, the K-types …). What the
file asks and is not implemented is refused by name.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_min.config import TextConfig
from llava_min.data.tokenizer.bpe import GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT
from llava_min.data.tokenizer.tokenizer_json import DIGITS
from llava_min.errors import UserError, shorten
from llava_min.export.gguf_file import GGUFTensor, read_header
from llava_min.export.gguf_names import ARCHITECTURES, LEGACY_KEY, from_gguf, turned_heads
from llava_min.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llava_min.export.spm import write_model
from llava_min.util.files import write_json
from llava_min.weights import Reader

IGNORED = ("rope_freqs.weight",)  # a table of Llama-3.1's rope scaling, refused by its settings
# what no default can stand for
NEEDED = (
    "embedding_length", "feed_forward_length", "block_count", "context_length",
    "attention.head_count", "attention.layer_norm_rms_epsilon",
)  # fmt: skip


@dataclass
class TextModel:
    """The language model of a GGUF file; tensors are read when they are asked for."""

    path: Path
    config: TextConfig
    tied: bool
    tensors: dict[str, GGUFTensor]  # by our names
    metadata: dict[str, Any]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The whole tensor, dequantized, its rows in our order; UserError unless it is finite."""
        x = torch.empty(self.tensors[name].shape, dtype=dtype)
        Reader().fill(x, self.tensors[name])
        return x


def open_gguf(path: Path) -> TextModel:
    """The language model in `path`, all its tensors accounted for, or UserError."""
    metadata, stored = read_header(path)
    config = read_config(path, metadata)
    tensors = {}
    for name, t in stored.items():
        if name in IGNORED:
            continue
        if (ours := from_gguf(name)) is None:
            raise UserError(
                f"{path}: tensor {shorten(name)} has no place in a {config.model_type} decoder; "
                "give a plain Llama, Mistral or Qwen2 language model"
            )
        if heads := turned_heads(ours, config):
            t = replace(t, start=None, head=t.shape[0] // heads)
        tensors[ours] = t
    tied = "lm_head.weight" not in tensors
    model = TextModel(path, config, tied, tensors, metadata)
    check_shapes(model)
    return model


def check_shapes(model: TextModel) -> None:
    from llava_min.llama import Llama

    with torch.device("meta"):
        want = {f"language_model.{n}": p.shape for n, p in Llama(model.config).named_parameters()}
    if not model.tied:
        want["lm_head.weight"] = want["language_model.embed_tokens.weight"]
    for name in sorted(want.keys() ^ model.tensors.keys()):
        what = "is missing" if name in want else "is not of this architecture"
        raise UserError(f"{model.path}: {name} {what}; download the file again")
    for name, shape in want.items():
        if (found := model.tensors[name].shape) != shape:
            raise UserError(
                f"{model.path}: {name} is {list(found)}, expected {list(shape)} by its metadata; "
                "download the file again"
            )


def read_config(path: Path, metadata: dict[str, Any]) -> TextConfig:
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES.values():
        raise UserError(
            f"{path}: architecture {shorten(kind)}, expected llama or qwen2; "
            "give a plain Llama, Mistral or Qwen2 language model"
        )
    own = {
        key.removeprefix(f"{kind}."): x for key, x in metadata.items() if key.startswith(f"{kind}.")
    }
    check_sizes(path, kind, own)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise UserError(f"{path}: no tokenizer.ggml.tokens; give a file with its tokenizer")
    heads = own["attention.head_count"]
    data = {
        "model_type": kind,
        "vocab_size": len(tokens),
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": own.get("attention.key_length", own.get("rope.dimension_count")),
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": round_fp32(own["attention.layer_norm_rms_epsilon"]),
        "rope_theta": round_fp32(own.get("rope.freq_base", 10000.0)),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    return TextConfig.from_hf(data, str(path))


def check_sizes(path: Path, kind: str, own: dict[str, Any]) -> None:
    """What the decoder is made of is said, and is implemented, or UserError by the key's name."""
    for key in NEEDED:
        if not isinstance(own.get(key), int | float):
            found = f"is {shorten(own[key])}, expected a number" if key in own else "is missing"
            raise UserError(
                f"{path}: {kind}.{key} {found}; download the file again, or give another"
            )
    if own.get("rope.scaling.type", "none") != "none" or own.get("expert_count"):
        raise UserError(
            f"{path}: asks for rope scaling or experts, which are not implemented; "
            "give another language model"
        )
    width = own.get("attention.key_length", own.get("rope.dimension_count"))
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, width) != width:
            raise UserError(
                f"{path}: {kind}.{key} is {shorten(own[key])} and a head is {shorten(width)} wide, "
                "which is not implemented; give another language model"
            )


def round_fp32(x: object) -> object:
    """The shortest decimal of a number stored as fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x))) if isinstance(x, float) else x


# ---- the tokenizer


def write_tokenizer(model: TextModel, folder: Path) -> None:
    """tokenizer.json or tokenizer.model, and tokenizer_config.json, for `Tokenizer.load`."""
    m = {
        key.removeprefix("tokenizer.ggml."): x
        for key, x in model.metadata.items()
        if key.startswith("tokenizer.") or key == LEGACY_KEY
    }
    tokens, kinds = m["tokens"], m.get("token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise UserError(f"{model.path}: no token_type for each token; give another file")
    write = {"gpt2": write_byte_level, "llama": write_sentencepiece}.get(m.get("model"))
    if write is None:
        raise UserError(
            f"{model.path}: tokenizer {shorten(m.get('model'))}, expected llama or gpt2; "
            "give another language model"
        )
    added = [
        added_token(id, token, kinds[id] != USER_DEFINED)
        for id, token in enumerate(tokens)
        if kinds[id] in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    settings = write(model.path, folder, m, added)
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for theirs, ours in named.items():
        if (id := m.get(f"{theirs}_token_id")) is not None and 0 <= id < len(tokens):
            settings[f"{ours}_token"] = tokens[id]
    settings["added_tokens_decoder"] = {
        str(t["id"]): {k: x for k, x in t.items() if k != "id"} for t in added
    }
    template = model.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings)


def added_token(id: int, content: str, special: bool) -> dict:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"id": id, "content": content, "special": special, **flags}


def write_byte_level(path: Path, folder: Path, m: dict, added: list[dict]) -> dict:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut = lambda regex: [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        level | {"use_regex": False},
    ]
    splits = {
        "smollm": [DIGITS, level | {"use_regex": True}],
        "gpt-2": cut(GPT2_SPLIT),
        "qwen2": cut(QWEN2_SPLIT),
        "llama-bpe": cut(LLAMA3_SPLIT),
    }
    if m.get("pre") not in splits:
        raise UserError(
            f"{path}: the tokenizer's regex is {shorten(m.get('pre'))}, expected one of "
            f"{', '.join(splits)}; give another language model"
        )
    vocab = {token: id for id, token in enumerate(m["tokens"]) if m["token_type"][id] != UNUSED}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if m["pre"] == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits[m["pre"]]},
        "post_processor": bos_template(m) if m.get("add_bos_token") else None,
        "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": m["pre"] == "llama-bpe",
            "vocab": vocab,
            "merges": [line.split(" ", 1) for line in m["merges"]],
        },
    }
    write_json(folder / "tokenizer.json", spec)
    return {"tokenizer_class": "PreTrainedTokenizerFast"}


def bos_template(m: dict) -> dict:
    id = m["bos_token_id"]
    token = m["tokens"][id]
    bos, text = (
        {"SpecialToken": {"id": token, "type_id": 0}},
        lambda n: {"Sequence": {"id": "AB"[n], "type_id": n}},
    )
    return {
        "type": "TemplateProcessing",
        "single": [bos, text(0)],
        "pair": [bos, text(0), text(1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def write_sentencepiece(path: Path, folder: Path, m: dict, added: list[dict]) -> dict:
    """The pieces in front, without what was added behind them, as a tokenizer.model."""
    kinds, n = m["token_type"], len(m["tokens"])
    while n and kinds[n - 1] in (UNUSED, USER_DEFINED, CONTROL):
        n -= 1
    scores = m.get("scores")
    if not isinstance(scores, list) or len(scores) < n:
        raise UserError(f"{path}: no tokenizer.ggml.scores; give another file")
    if bad := [
        m["tokens"][i] for i in range(n) if kinds[i] not in (NORMAL, UNKNOWN, CONTROL, BYTE)
    ]:
        raise UserError(
            f"{path}: the token {shorten(bad[0])} among the pieces is of a kind that is not "
            "implemented; give another language model"
        )
    write_model(folder / "tokenizer.model", m["tokens"][:n], scores[:n], kinds[:n])
    del added[: sum(t["id"] < n for t in added)]
    space = m.get("add_space_prefix", True)
    legacy = m.get(LEGACY_KEY) is not False
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    settings |= {"add_bos_token": bool(m.get("add_bos_token", True)), "add_eos_token": False}
    return settings if space else settings | {"add_prefix_space": False}
