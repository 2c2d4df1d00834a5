"""The tower and the projector as llama.cpp's multimodal part (mtmd) reads them: the mmproj file.

Names and settings of its legacy converter, the one that knew CLIP
(tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py). Only the blocks that LLaVA runs are
written, and no post_layernorm, which would be run. `feature_layer` is written, without which mtmd
runs a block less (llama.cpp#25817).

mtmd of autumn 2026 puts the class token behind the patches, and still drops the first row and looks
positions up in order (llama.cpp#25814): the model is given patches 1, 2, … and the class token in
the places of patches 0, 1, … Its features of a patch then differ from ours by a tenth (a cosine of
0.995 on the bundled model, where 97 of 100 answers are the same). The table of positions is written
in CLIP's order all the same, as every converter does. Turned by one row it makes each feature equal
(2e-4), but the shift of places stays, the answers are no better, and the file would be wrong for a
reader that is mended.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from llava_min.errors import UserError, warn
from llava_min.export.gguf_file import read_header
from llava_min.export.gguf_names import ASPECT_KEY, import_gguf
from llava_min.export.tensors import Tensors
from llava_min.weights import Reader

IN_BLOCK = {  # ours -> theirs, fc1 and fc2 as gguf's own table has them
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
WHOLE = {
    "vision_tower.embeddings.class_embedding": "v.class_embd",
    "vision_tower.embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "vision_tower.embeddings.position_embedding.weight": "v.position_embd.weight",
    "vision_tower.pre_layrnorm.weight": "v.pre_ln.weight",
    "vision_tower.pre_layrnorm.bias": "v.pre_ln.bias",
    "multi_modal_projector.linear_1.weight": "mm.0.weight",
    "multi_modal_projector.linear_1.bias": "mm.0.bias",
    "multi_modal_projector.linear_2.weight": "mm.2.weight",
    "multi_modal_projector.linear_2.bias": "mm.2.bias",
}


def names(model: Tensors) -> dict[str, str]:
    """Our name -> the file's, of the tensors that are run."""
    found = {ours: theirs for ours, theirs in WHOLE.items() if ours in model.names}
    for i in range(model.model.config.vision_layers_used):
        for ours, theirs in IN_BLOCK.items():
            for leaf in ("weight", "bias"):
                found[f"vision_tower.layers.{i}.{ours}.{leaf}"] = f"v.blk.{i}.{theirs}.{leaf}"
    return found


def settings(model: Tensors, f32: bool) -> dict[str, object]:
    config, images = model.model.config, model.processor.image_config
    vision, used = config.vision, config.vision_layers_used
    return {
        "general.type": "mmproj",
        "general.file_type": 0 if f32 else 1,
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": vision.hidden_act == "gelu",  # else quick_gelu
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.projection_dim": vision.projection_dim,
        "clip.vision.block_count": used,
        "clip.vision.feature_layer": [used],
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": vision.layer_norm_eps,
        "clip.vision.image_mean": list(images.mean),
        "clip.vision.image_std": list(images.std),
        ASPECT_KEY: images.aspect,
    }


def check_layout(model: Tensors) -> None:
    if model.model.config.vision_feature_select_strategy != "default":
        raise UserError("llama.cpp gives the patches alone, and this model reads CLS, too", "to")


def write(model: Tensors, path: Path, f32: bool) -> None:
    """Write the file in f16, or f32, and read it back; UserError where the two differ."""
    from llava_min.export.gguf import add_metadata, write_rows

    check_layout(model)
    if model.processor.image_config.aspect != "pad":
        warn("llama.cpp pads an image to a square, and this model crops: its answers will differ")
    writer = import_gguf().GGUFWriter(path, "clip")
    add_metadata(writer, settings(model, f32))
    write_rows(writer, rows(model, f32))
    check(model, path, f32)


def rows(model: Tensors, f32: bool) -> Iterable:
    for ours, theirs in names(model).items():
        shape = model.shape(ours)
        # llama.cpp's CPU convolution wants f16, and of positions f32
        narrow = len(shape) > 1 and "position_embd" not in theirs
        type = "f16" if narrow and (not f32 or "patch_embd" in theirs) else "f32"
        yield theirs, shape, type, lambda ours=ours: model.read(ours, torch.float32)


def check(model: Tensors, path: Path, f32: bool) -> None:
    metadata, stored = read_header(path)
    for ours, theirs in names(model).items():
        right = model.read(ours, torch.float32)
        x = torch.empty_like(right)
        Reader().fill(x, stored[theirs])
        if not torch.allclose(x, right, rtol=1e-3, atol=1e-6):
            raise UserError(f"{path}: {theirs} reads back otherwise than it was; write it again")
    for key, value in settings(model, f32).items():
        there = metadata[key]
        same = there == value or torch.allclose(
            torch.tensor(there, dtype=torch.float64), torch.tensor(value, dtype=torch.float64)
        )
        if not same:
            raise UserError(f"{path}: {key} reads back as {there}, expected {value}")
