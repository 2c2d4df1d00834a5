"""The layout of LLaVA's own checkpoints (liuhaotian), streamed: a decoder, the projector in it, and
CLIP beside it.

Read by LLaVA's code and its forks, and by llama.cpp's old scripts. The vocabulary there has no row
for <image>, which is a mark in the text and never an id. To compare:
https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/model/builder.py
"""

from copy import copy
from pathlib import Path

import torch

from llava_min.config import LlavaConfig
from llava_min.data.chat import ORIGINAL_KEY, TEMPLATE_KEY
from llava_min.data.tokenizer import Tokenizer
from llava_min.data.tokenizer.tokenizer_json import content_of
from llava_min.errors import UserError, info, shorten, warn
from llava_min.export.proof import prove, running
from llava_min.export.stream import Row, Sums, write_file, write_shards
from llava_min.export.tensors import Merge, Tensors
from llava_min.names import to_layout
from llava_min.util.files import write_json
from llava_min.weights import NAMES

TOWER = "vision_tower."
CLIP = "clip"  # the tower's folder, in the model's
TABLES = ("language_model.embed_tokens.weight", "lm_head.weight")
LISTS = ("additional_special_tokens", "extra_special_tokens")  # of tokenizer_config.json
MODEL_TYPES = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen2"}
ARCHITECTURES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "qwen2": "LlavaQwen2ForCausalLM",
}


def write_original(model: Tensors, folder: Path, dtype: torch.dtype) -> float:
    """Write `model` to `folder`, its tower to clip/ there, and read all of it back.

    Raises UserError for what the layout has no place for: tokens behind <image>, a projector
    without biases, another tower's settings; and where what is read back is not what was meant.
    """
    config, tokenizer = model.model.config, model.processor.tokenizer
    check_layout(config, tokenizer)
    rows = config.image_token_id

    def read(name: str, dtype: torch.dtype) -> torch.Tensor:
        x = model.read(name, dtype)
        return x[:rows] if name in TABLES else x

    def shape(name: str) -> torch.Size:
        full = model.shape(name)
        return torch.Size((rows, *full[1:])) if name in TABLES else full

    tower = [name for name in model.names if name.startswith(TOWER)]
    rest = [name for name in model.names if not name.startswith(TOWER)]
    row = lambda name, layout: Row(name, to_layout(name, layout), shape(name), dtype)
    (folder / CLIP).mkdir()
    sums: Sums = {}
    clip = [row(name, "original_clip") for name in tower]
    with running(model, dtype, rows) as expected:  # the tower first, as it runs
        write_file(folder / CLIP / "model.safetensors", clip, read, sums)
        write_shards(folder, [row(name, "original") for name in rest], read, sums)
    if isinstance(model.read, Merge):
        model.read.check_changed()
    write_json(folder / "config.json", to_original(model, dtype))
    write_json(folder / CLIP / "config.json", config.vision.to_hf() | clip_extras(dtype))
    image = model.processor.image_config.to_hf() | {"image_processor_type": "CLIPImageProcessor"}
    write_json(folder / CLIP / "preprocessor_config.json", image)
    write_json(folder / "generation_config.json", generation(config))
    write_tokenizer(tokenizer, config.image_token_id, folder)
    # LLaVA's code does not look here; `load` asks as the source was asked
    asked = {TEMPLATE_KEY: model.processor.template_name, ORIGINAL_KEY: model.processor.original}
    write_json(folder / "processor_config.json", asked)
    return prove(model, folder, dtype, rows, sums, expected.result())


def check_layout(config: LlavaConfig, tokenizer: Tokenizer) -> None:
    pad = None if tokenizer.pad_id is None else tokenizer.token(tokenizer.pad_id)
    behind = [
        token
        for id, token in tokenizer.tokens.items()
        if id > config.image_token_id and token not in ("<pad>", pad)
    ]
    fix = "has no place for; choose hf"
    if behind:
        raise UserError(
            f"the tokenizer has {shorten(behind[0])!r} behind <image>, which original {fix}", "to"
        )
    if not config.projector_bias:
        raise UserError(f"the projector has no biases, which original {fix}", "to")


def to_original(model: Tensors, dtype: torch.dtype) -> dict:
    """The config.json: the decoder's own, with the mm_… keys among it."""
    config, processor = model.model.config, model.processor
    text = config.text
    if processor.template_name not in ("vicuna_v1", "plain"):
        warn(
            f"this model is asked with {processor.template_name}, and LLaVA's code takes "
            "a template by the folder's name (vicuna_v1 where it has v1 in it); say which there "
            "with --conv-mode",
            "template",
        )
    full = config.vision_feature_select_strategy == "full"
    return (
        text.to_hf()
        | generation(config)
        | {
            "architectures": [ARCHITECTURES[text.model_type]],
            "model_type": MODEL_TYPES[text.model_type],
            "vocab_size": config.image_token_id,
            "rope_theta": text.rope_theta,  # transformers 4.31, which LLaVA pins, looks for it here
            "pad_token_id": 0,
            "tie_word_embeddings": config.tie_word_embeddings,
            "torch_dtype": NAMES[dtype],
            "mm_vision_tower": CLIP,
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": config.vision.hidden_size,
            "mm_vision_select_layer": config.vision_feature_layer,
            "mm_vision_select_feature": "cls_patch" if full else "patch",
            "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            "image_aspect_ratio": "pad" if processor.image_config.aspect == "pad" else "square",
            "tokenizer_model_max_length": min(2048, text.context),
            "tokenizer_padding_side": "right",
            "use_cache": True,
        }
    )


def clip_extras(dtype: torch.dtype) -> dict:
    return {"architectures": ["CLIPVisionModel"], "torch_dtype": NAMES[dtype]}


def generation(config: LlavaConfig) -> dict:
    eos = list(config.text.eos_token_ids)
    return {
        "bos_token_id": config.text.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
    }


def write_tokenizer(tokenizer: Tokenizer, end: int, folder: Path) -> None:
    """The tokenizer as it is below the id `end`, which is <image>'s."""
    bare = copy(tokenizer)
    bare.added = {content: t for content, t in tokenizer.added.items() if t.id < end}
    bare.tokens = {id: token for id, token in tokenizer.tokens.items() if id < end}
    gone = tokenizer.added.keys() - bare.added.keys()
    keep = lambda value: [token for token in value if content_of(token) not in gone]
    bare.config = {
        key: keep(value) if isinstance(value, list) and key in LISTS else value
        for key, value in tokenizer.config.items()
    }
    if bare.pad_id is not None and bare.pad_id >= end:
        bare.pad_id = None
    bare.save(folder)
    if tokenizer.kind != "byte-level" and "tokenizer.model" not in tokenizer.files:
        info(
            f"{folder}: has a tokenizer.json alone, for the source has no tokenizer.model; LLaVA's "
            "own code wants one (use_fast=False), take Vicuna's"
        )


def export(model: Tensors, folder: Path, dtype: torch.dtype, type: str | None) -> str:
    worst = write_original(model, folder, dtype)
    info(
        f"mm_vision_tower is {CLIP!r}, in the folder; LLaVA's own code looks for it from where it "
        "is started, so start it in the folder, or write the full path there"
    )
    return f"original layout, every tensor read back, logits within {worst:.2g} of the source's"
