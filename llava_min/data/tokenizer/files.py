"""A folder's tokenizer files -> a `Source`, which `Tokenizer` is made of.

tokenizer.json    vocabulary and merges, if the folder has it (tokenizer_json.py)
tokenizer.model   else this, as transformers chooses (sentencepiece_model.py)
tokenizer_config.json, special_tokens_map.json, added_tokens.json
                  settings and added tokens on top of either
config.json       whether the settings override tokenizer.json (`is_rebuilt`)
"""

import os
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llava_min.checks.tokenizer import (
    check_class,
    check_found,
    check_no_eos,
    check_same_ids,
    check_settings,
    check_token_list,
    well_formed,
)
from llava_min.data.tokenizer.sentencepiece_model import (
    load_sentencepiece,
    pieces_of,
    read_sentencepiece,
)
from llava_min.data.tokenizer.source import Source
from llava_min.data.tokenizer.tokenizer_json import content_of, read_added, read_tokenizer_json
from llava_min.util.files import check_file, read_json, read_optional

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
# model types for which transformers reads no file as LlamaTokenizer
OBEYED = ("llava", "mistral", "qwen2")
# normalizer_spec { add_dummy_prefix: false }: a field appended to a protobuf overrides it
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def read_tokens(source: Source, folder: Path, path: Path) -> None:
    """Added and special tokens, which three files may declare beside the model's own."""
    config, extra = source.config, folder / "added_tokens.json"
    names = read_optional(folder / "special_tokens_map.json")
    names |= {k: v for k, v in config.items() if v is not None}

    # special tokens by name; a null in tokenizer_config.json removes the model's own
    given = [name for name in NAMED if config.get(name, "") is not None]
    named = {name: content_of(names[name]) for name in given if names.get(name) is not None}
    source.named = {name: named.get(name, source.named.get(name)) for name in given}
    source.special = [content for content in source.named.values() if content]

    # and in lists
    for key in LISTED:
        tokens = names.get(key, [])
        check_token_list(key, tokens, path)
        tokens = tokens.values() if isinstance(tokens, dict) else tokens
        source.special += filter(None, map(content_of, tokens))

    # added tokens with their ids
    decoder = config.get("added_tokens_decoder") or {}
    source.added += [read_added(entry, id, path) for id, entry in decoder.items()]
    for content, id in read_optional(extra).items():
        entry = {"content": content, "special": content in source.special}
        source.added.append(read_added(entry, id, extra))


def is_rebuilt(source: Source, path: Path) -> bool:
    """Whether transformers takes only the merges from tokenizer.json and the spaces from
    tokenizer_config.json: so does its LlamaTokenizer. Beside a LLaVA's config.json the file is
    obeyed as written, whatever class is named (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS in
    transformers' tokenization_auto.py).
    """
    model = read_optional(path.with_name("config.json"))
    named = source.config.get("tokenizer_class") or model.get("tokenizer_class")
    return source.kind == "metaspace" and named in LLAMA and model.get("model_type") not in OBEYED


def read_settings(source: Source, path: Path) -> None:
    """What tokenizer_config.json says of spaces, BOS and EOS, on top of the model's file. As in
    transformers, BOS is put in front where tokenizer.json says so, and by the settings only where
    there is none.
    """
    config, from_model = source.config, source.kind == "sentencepiece"
    check_settings(config, path)
    if from_model:
        check_class(config.get("tokenizer_class"), LLAMA, path)
    # where the config is silent the file decides: it says how the model was trained
    if from_model or is_rebuilt(source, path):
        if config.get("add_prefix_space") is False:
            source.scheme, source.prepend, source.bpe.strip = "never", False, False
        elif config.get("legacy") is not None:
            source.scheme = "always" if config["legacy"] else "first"
            source.prepend &= from_model
    if from_model and config.get("add_bos_token") is not None:
        source.add_bos = config["add_bos_token"]
    if config.get("add_eos_token") is not None:
        source.add_eos = config["add_eos_token"]
    check_no_eos(bool(source.add_eos and source.named.get("eos_token")), path)


def read_folder(folder: Path) -> Source:
    """tokenizer.json if there is one, else tokenizer.model (as transformers chooses), with the
    settings of the other files where present. UserError names the file that is absent, malformed or
    not implemented.
    """
    model, spec = folder / "tokenizer.model", folder / "tokenizer.json"
    config = folder / "tokenizer_config.json"
    files, sp, sp_inside = {}, None, None
    for path in (model, spec):
        if os.path.lexists(path):
            check_file(path)
            files[path.name] = path.read_bytes()
    check_found(files, folder)
    if model.name in files:
        with well_formed(model):
            data = files[model.name]
            sp = load_sentencepiece(model, data)
            sp_inside = SentencePieceProcessor(model_proto=data + NO_DUMMY_PREFIX)
    if spec.name in files:
        with well_formed(spec):
            source = read_tokenizer_json(read_json(spec), spec)
            check_same_ids(source.vocab, pieces_of(sp) if sp else {}, spec)
    else:
        source = read_sentencepiece(sp, model)
    source.files, source.sp, source.sp_inside = files, sp, sp_inside
    with well_formed(config):
        source.config = read_optional(config)
        read_tokens(source, folder, config)
        read_settings(source, config)
    return source
