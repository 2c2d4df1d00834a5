"""A folder's tokenizer files → a `Source`, which tokenizer.py is made of.

    tokenizer.json    what there is of a tokenizer, if the folder has it (tokenizer_json.py)
    tokenizer.model   else this, as transformers chooses (tokenizer_model.py)
    tokenizer_config.json, special_tokens_map.json, added_tokens.json: settings and added tokens on top of either
    config.json       whether the settings change what tokenizer.json says (`rebuilt`)

A file that asks for anything that is not done here is refused by name.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llava_min.data.tokenizer.from_json import content_of, read_added, read_tokenizer_json
from llava_min.data.tokenizer.from_sentencepiece import read_pieces, read_sentencepiece, vocab_of
from llava_min.data.tokenizer.source import Source, fault, unknown
from llava_min.errors import UserError
from llava_min.util.files import check_file, read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
# model types for which transformers reads no file as LlamaTokenizer
OBEYED = ("llava", "mistral", "qwen2")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What lies in `path` is taken as it should be; where it is not, the file is named."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as e:
        raise fault(
            path, f"not laid out as a tokenizer file ({type(e).__name__}: {str(e)[:200]})"
        ) from None


def read_optional(path: Path) -> dict:
    return read_json(path) if os.path.lexists(path) else {}


def read_tokens(source: Source, folder: Path, path: Path) -> None:
    """Added and special tokens, which three files may declare beside the model's own."""
    config, extra = source.config, folder / "added_tokens.json"
    names = read_optional(folder / "special_tokens_map.json") | {
        k: v for k, v in config.items() if v is not None
    }
    source.named = {
        name: content_of(names[name]) if names.get(name) is not None else source.named.get(name)
        for name in NAMED
        if config.get(name, "") is not None
    }
    source.special = [content for content in source.named.values() if content]
    for key in (
        "additional_special_tokens",
        "extra_special_tokens",
        "model_specific_special_tokens",
    ):
        value = names.get(key, [])
        if not isinstance(value, list | dict):
            raise fault(
                path, f"{key} is {type(value).__name__}, expected a list of tokens", "correct it"
            )
        source.special += filter(
            None, map(content_of, value.values() if isinstance(value, dict) else value)
        )
    source.added += [
        read_added(entry, id, path)
        for id, entry in (config.get("added_tokens_decoder") or {}).items()
    ]
    source.added += [
        read_added({"content": content, "special": content in source.special}, id, extra)
        for content, id in read_optional(extra).items()
    ]


def rebuilt(source: Source, path: Path) -> bool:
    """Whether transformers takes only the merges from tokenizer.json and the spaces from
    tokenizer_config.json: so does its LlamaTokenizer. Beside a LLaVA's config.json the file is
    obeyed as written, whatever class is named (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS in
    transformers' tokenization_auto.py).
    """
    model = read_optional(path.with_name("config.json"))
    named = source.config.get("tokenizer_class") or model.get("tokenizer_class")
    return source.kind == "metaspace" and named in LLAMA and model.get("model_type") not in OBEYED


def read_settings(source: Source, path: Path) -> None:
    """What tokenizer_config.json says of spaces, BOS and EOS, on top of the model's file. As
    transformers: BOS is put in front where tokenizer.json says so, and by the settings only where
    there is none.
    """
    config = source.config
    for key in ("legacy", "add_bos_token", "add_eos_token", "add_prefix_space"):
        if config.get(key) not in (None, True, False):
            raise fault(
                path,
                f"{key} is {json.dumps(config[key])[:100]}, expected true or false",
                "correct it",
            )
    kind = config.get("tokenizer_class")
    if source.kind == "sentencepiece" and kind not in (None, *LLAMA):
        raise unknown(path, "tokenizer_class", kind, "LlamaTokenizer beside a tokenizer.model")
    # Where the config is silent the file stands: it says how the model was trained.
    if source.kind == "sentencepiece" or rebuilt(source, path):
        if config.get("add_prefix_space") is False:
            source.scheme, source.prepend, source.bpe.strip = "never", False, False
        elif config.get("legacy") is not None:
            source.scheme = "always" if config["legacy"] else "first"
            source.prepend &= source.kind == "sentencepiece"
    if source.kind == "sentencepiece" and config.get("add_bos_token") is not None:
        source.add_bos = config["add_bos_token"]
    if config.get("add_eos_token") is not None:
        source.add_eos = config["add_eos_token"]
    if source.add_eos and source.named.get("eos_token"):
        raise fault(
            path,
            "add_eos_token is true (or tokenizer.json's post-processor adds one): every "
            "prompt would end in EOS",
            "set add_eos_token to false",
        )


def read_folder(folder: Path) -> Source:
    """tokenizer.json if there is one, else tokenizer.model (as transformers chooses), with the
    settings of the other files where present. UserError names the file that is absent, malformed or
    not implemented.
    """
    model, spec, config = (
        folder / name for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    )
    files, sp, sp_inside = {}, None, None
    for path in (model, spec):
        if os.path.lexists(path):
            check_file(path)
            files[path.name] = path.read_bytes()
    if not files:
        what = (
            "no tokenizer.json and no tokenizer.model here" if folder.is_dir() else "no such folder"
        )
        raise fault(folder, what, "give a checkpoint folder that has one of the two")
    if model.name in files:
        with reading(model):
            sp = read_pieces(model, files[model.name])
            # a field appended to a protobuf overrides it: normalizer_spec { add_dummy_prefix: false
            # }
            sp_inside = SentencePieceProcessor(model_proto=files[model.name] + b"\x1a\x02\x18\x00")
    path = spec if spec.name in files else model
    with reading(path):
        source = (
            read_tokenizer_json(read_json(spec), spec)
            if path == spec
            else read_sentencepiece(sp, model)
        )
        if sp and any(source.vocab.get(piece) != i for piece, i in vocab_of(sp).items()):
            raise fault(
                path,
                "gives other ids than the tokenizer.model beside it",
                "remove the file of another checkpoint",
            )
    source.files, source.sp, source.sp_inside = files, sp, sp_inside
    with reading(config):
        source.config = read_optional(config)
        read_tokens(source, folder, config)
        read_settings(source, config)
    return source
