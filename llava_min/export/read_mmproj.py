"""A tower and a projector read from llama.cpp's mmproj file, as `mmproj` and llama.cpp's converters
write them for LLaVA-1.5.

The file has only the blocks that LLaVA runs and no post_layernorm; the tower that is made of it
ends there, and its post_layernorm, which never runs, is that of a new one: ones and zeros.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_min.config import VisionConfig
from llava_min.data.image import ASPECTS, CLIP_MEAN, CLIP_STD, ImageConfig
from llava_min.errors import UserError, shorten
from llava_min.export.gguf_file import GGUFTensor, read_header
from llava_min.export.gguf_names import ASPECT_KEY
from llava_min.export.mmproj import IN_BLOCK, WHOLE
from llava_min.export.read_gguf import round_fp32
from llava_min.tensors import TensorInfo

SIZES = {  # ours -> the file's key
    "hidden_size": "clip.vision.embedding_length",
    "intermediate_size": "clip.vision.feed_forward_length",
    "num_hidden_layers": "clip.vision.block_count",
    "num_attention_heads": "clip.vision.attention.head_count",
    "image_size": "clip.vision.image_size",
    "patch_size": "clip.vision.patch_size",
    "layer_norm_eps": "clip.vision.attention.layer_norm_epsilon",
}
POST = "vision_tower.post_layernorm"
TRIPLES = ("clip.vision.image_mean", "clip.vision.image_std")


@dataclass(frozen=True)
class Fresh(TensorInfo):
    """A vector that no file has: one number, over and over."""

    value: float = 0.0

    def open(self) -> None:
        return None

    def rows(self, file: None, first: int, end: int) -> Tensor:
        return torch.full((end - first,), self.value)


@dataclass
class Vision:
    config: VisionConfig
    layer: int  # vision_feature_layer
    images: ImageConfig
    biased: bool  # the projector has biases
    tensors: dict[str, TensorInfo]  # by our names


def open_mmproj(path: Path) -> Vision:
    """Raises UserError for another projector than LLaVA-1.5's, and for what is missing."""
    metadata, stored = read_header(path)
    check_kind(path, metadata)
    config = read_sizes(path, metadata)
    tensors: dict[str, TensorInfo] = dict(ours(stored, config))
    last = "v.post_ln.weight" in stored  # with it the file has a whole CLIP
    layer = feature_layer(path, metadata, config.num_hidden_layers, last)
    if not last:
        shape = (config.hidden_size,)
        for leaf, value in (("weight", 1.0), ("bias", 0.0)):
            name = f"{POST}.{leaf}"
            tensors[name] = Fresh(path, name, shape, "F32", value=value)
    biased = "multi_modal_projector.linear_1.bias" in tensors
    return Vision(config, layer, read_images(path, metadata, config.image_size), biased, tensors)


def check_kind(path: Path, metadata: dict[str, Any]) -> None:
    kind = metadata.get("clip.projector_type", metadata.get("clip.vision.projector_type"))
    if metadata.get("general.architecture") != "clip" or kind != "mlp":
        raise UserError(
            f"{path}: an mmproj of projector type {shorten(kind)}, expected LLaVA-1.5's, mlp; give "
            "that of a LLaVA-1.5"
        )
    if metadata.get("clip.vision.image_grid_pinpoints"):
        raise UserError(
            f"{path}: cuts images into tiles as LLaVA-1.6 does, which is not implemented; give a "
            "LLaVA-1.5"
        )


def read_sizes(path: Path, metadata: dict[str, Any]) -> VisionConfig:
    data = {name: metadata.get(key) for name, key in SIZES.items()}
    if absent := [SIZES[name] for name, x in data.items() if not isinstance(x, int | float)]:
        found = shorten(metadata.get(absent[0], "missing"))
        raise UserError(f"{path}: {absent[0]} is {found}, expected a number; download it again")
    data["layer_norm_eps"] = round_fp32(data["layer_norm_eps"])
    data["hidden_act"] = "gelu" if metadata.get("clip.use_gelu") else "quick_gelu"
    width = metadata.get("clip.vision.projection_dim")
    return VisionConfig.from_hf(data | ({"projection_dim": width} if width else {}), str(path))


def feature_layer(path: Path, metadata: dict[str, Any], blocks: int, whole: bool) -> int:
    """The block whose output is read, counted from the last, which is -1. A file without the key
    has only the blocks to run, unless it is a whole CLIP, of which LLaVA leaves out the last.
    """
    found = metadata.get("clip.vision.feature_layer")
    if found is None:
        return -2 if whole else -1
    if not isinstance(found, list) or len(found) != 1 or found[0] not in range(1, blocks + 1):
        raise UserError(
            f"{path}: clip.vision.feature_layer is {shorten(found)}, expected one of {blocks} "
            "blocks; give the mmproj of a LLaVA-1.5"
        )
    return found[0] - blocks - 1


def read_images(path: Path, metadata: dict[str, Any], size: int) -> ImageConfig:
    for key in TRIPLES:
        x = metadata.get(key)
        numbers = isinstance(x, list) and all(isinstance(n, float) and math.isfinite(n) for n in x)
        if not numbers or len(x) != 3 or (key.endswith("std") and min(x) <= 0):
            raise UserError(f"{path}: {key} is {shorten(x)}, expected three numbers; correct it")
    mean, std = (as_published(metadata[key]) for key in TRIPLES)
    # mtmd pads an image to a square, as LLaVA-1.5 does
    return ImageConfig(size, mean, std, ASPECTS.get(metadata.get(ASPECT_KEY), "pad"))


def as_published(stored: list[float]) -> tuple[float, ...]:
    """The decimals that were rounded to fp32: CLIP's own, which have more than it keeps, or the
    shortest."""
    for known in (CLIP_MEAN, CLIP_STD):
        if [float(np.float32(n)) for n in known] == stored:
            return known
    return tuple(map(round_fp32, stored))


def ours(stored: dict[str, GGUFTensor], config: VisionConfig) -> Iterator[tuple[str, TensorInfo]]:
    """Our name of each tensor. Raises UserError for one that is no part of the tower."""
    names = {theirs: ours for ours, theirs in WHOLE.items()}
    names |= {f"v.post_ln.{leaf}": f"{POST}.{leaf}" for leaf in ("weight", "bias")}
    for i in range(config.num_hidden_layers):
        for mine, theirs in IN_BLOCK.items():
            for leaf in ("weight", "bias"):
                names[f"v.blk.{i}.{theirs}.{leaf}"] = f"vision_tower.layers.{i}.{mine}.{leaf}"
    # llama.cpp's old converter called fc1 ffn_down, and fc2 ffn_up
    down = stored.get("v.blk.0.ffn_down.bias")
    swapped = down is not None and down.shape == (config.intermediate_size,)
    for name, info in stored.items():
        if swapped and ".ffn_" in name:
            name = swap(name)
        if (x := names.get(name)) is None:
            raise UserError(
                f"{info.path}: tensor {shorten(name)} has no place in LLaVA-1.5's tower; give the "
                "mmproj of a LLaVA-1.5"
            )
        if x == "vision_tower.embeddings.class_embedding":
            info = replace(info, shape=(math.prod(info.shape),))
        yield x, info


def swap(name: str) -> str:
    down = ".ffn_down." in name
    return (
        name.replace(".ffn_down.", ".ffn_up.") if down else name.replace(".ffn_up.", ".ffn_down.")
    )
