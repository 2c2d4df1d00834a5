"""What a config.json may say: a table for each part, and the relations between its fields.

A field of a wrong type or out of range is an error that names the file and the dotted key. An
option that would change the result and is not implemented is refused by name. Fields that are left
out are config.py's business: it fills in the defaults before the relations are checked.
"""

import re
import reprlib
from pathlib import PurePath
from typing import Any, NamedTuple, NoReturn

from llava_min.errors import UserError

MAX_SIZE = 1 << 20  # no width or vocabulary of a published model is larger
MAX_LAYERS = 1 << 10
ONLY = "(nothing else is implemented)"
OTHER_CHECKPOINT = "give another checkpoint"
OTHER_FILE = "is it this model's file?"


class Range(NamedTuple):
    """A value of one type, from low to high; null only where it has a meaning."""

    kind: type
    low: float = 1
    high: float = MAX_SIZE
    null: bool = False


class Only(NamedTuple):
    """The values that are implemented; null is as if left out."""

    values: tuple = ()


SIZE, LAYERS, FLAG = Range(int), Range(int, high=MAX_LAYERS), Range(bool, 0, 1)
SIZE_OR_NULL = Range(int, null=True)
UNQUANTIZED = Only()
DTYPE = Only(("float32", "float16", "bfloat16"))
# also for `rope_scaling` and `rope_parameters`; every other key there is a kind of scaling
PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}

VISION = {
    "model_type": Only(("clip_vision_model",)),
    "quantization_config": UNQUANTIZED,
    "hidden_act": Only(("quick_gelu", "gelu")),
    "attention_dropout": Only((0.0,)),
    "num_channels": Only((3,)),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": SIZE,
    "image_size": SIZE,
    "patch_size": SIZE,
    "projection_dim": SIZE,
    "layer_norm_eps": Range(float, 0, 1),
}
TEXT = {
    "hidden_act": Only(("silu",)),
    "attention_bias": Only((False,)),
    "mlp_bias": Only((False,)),
    "attention_dropout": Only((0.0,)),
    "partial_rotary_factor": Only((1.0,)),
    "quantization_config": UNQUANTIZED,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE_OR_NULL,
    "head_dim": SIZE_OR_NULL,
    "max_position_embeddings": SIZE,
    "rms_norm_eps": Range(float, 0, 1),
    "rope_theta": Range(float, 1, 1e12),
    "sliding_window": SIZE_OR_NULL,
    "bos_token_id": Range(int, 0, null=True),
    "pad_token_id": Range(int, -1, null=True),
}
OPTIONAL_WINDOW = {"use_sliding_window": FLAG, "max_window_layers": Range(int, 0)}
# LLaVA-1.6 splits an image into tiles; a fork may say so in either layout
WHOLE_IMAGE = {
    "mm_patch_merge_type": Only(("flat",)),
    "image_aspect_ratio": Only(("pad", "square")),
}
LLAVA = WHOLE_IMAGE | {
    "auto_map": Only(),
    "projector_hidden_act": Only(("gelu",)),
    "vision_feature_select_strategy": Only(("default", "full")),
    "image_token_index": Range(int, 0),
    "image_token_id": Range(int, 0),
    "vision_feature_layer": Range(int, -MAX_SIZE),
    "multimodal_projector_bias": FLAG,
    "tie_word_embeddings": FLAG,
}
ORIGINAL = WHOLE_IMAGE | {
    "auto_map": Only(),
    "mm_use_im_start_end": Only((False,)),
    "mm_use_im_patch_token": Only((False,)),
    "mm_vision_select_feature": Only(("patch", "cls_patch")),
    "mm_vision_select_layer": Range(int, -MAX_SIZE),
    "tie_word_embeddings": FLAG,
}
# towers other than transformers' CLIPVisionModel, by their published names
NOT_CLIP = re.compile(
    r"siglip|intern.?vit|convnext|dino|mobileclip|fastvit|aimv2|pixtral|moonvit"
    r"|languagebind|imagebind|(?<![a-z])(eva|sam|mae|swin|c?radio)(?![a-z])"
)


def refuse(where: str, key: str, value: Any, expected: str, fix: str = OTHER_FILE) -> NoReturn:
    raise UserError(f"{where}: {key} is {reprlib.repr(value)}, expected {expected}; {fix}")


def check_fields(data: dict, table: dict[str, Range | Only], where: str, prefix: str = "") -> None:
    """Every field of `data` that is in `table` is as it says, or UserError."""
    for key in [key for key in table if key in data]:
        value, rule = data[key], table[key]
        if isinstance(rule, Only):
            if value is not None and value not in rule.values:
                values = " or ".join(map(repr, rule.values)) or "none"
                refuse(where, prefix + key, value, f"{values} {ONLY}", OTHER_CHECKPOINT)
            continue
        if value is None and rule.null:
            continue
        # an integer will do for a number, but True is no integer
        if type(value) is not rule.kind and not (rule.kind is float and type(value) is int):
            names = {int: "an integer", float: "a number", bool: "true or false"}
            refuse(where, prefix + key, value, names[rule.kind])
        if not rule.low <= value <= rule.high:
            refuse(where, prefix + key, value, f"a value from {rule.low:g} to {rule.high:g}")


def check_object(value: Any, where: str, key: str) -> None:
    if not isinstance(value, dict):
        refuse(where, key, value, "a JSON object")


def check_vision(data: dict, where: str, prefix: str) -> None:
    """A `vision_config` with its defaults filled in is a CLIP tower's, or UserError."""
    check_fields(data, VISION, where, prefix)
    width, heads = data["hidden_size"], data["num_attention_heads"]
    if width % heads:
        refuse(where, f"{prefix}num_attention_heads", heads, f"a divisor of {width}")
    if data["patch_size"] > data["image_size"]:
        most = f"at most image_size {data['image_size']}"
        refuse(where, f"{prefix}patch_size", data["patch_size"], most)


def check_family(data: dict, families: tuple[str, ...], where: str, prefix: str) -> None:
    check_fields(data, {"model_type": Only(families)}, where, prefix)


def check_text(data: dict, family: Any, where: str, prefix: str) -> None:
    """A `text_config` with the defaults of its `Family` filled in can be built, or UserError."""
    windowed = OPTIONAL_WINDOW if family.window == "optional" else {}
    check_fields(data, TEXT | windowed, where, prefix)
    check_rope(data, where, prefix)

    width, heads, head_dim = data["hidden_size"], data["num_attention_heads"], data["head_dim"]
    kv_heads = data["num_key_value_heads"] or heads
    if width % heads and (head_dim is None or family.heads_divide_width):
        expected = f"a divisor of hidden_size {width}"
        refuse(where, f"{prefix}num_attention_heads", heads, expected)
    if heads % kv_heads:
        expected = f"a divisor of num_attention_heads {heads}"
        refuse(where, f"{prefix}num_key_value_heads", kv_heads, expected)
    head_dim = head_dim or width // heads
    if head_dim % 2:
        expected = "an even number, which rotary embedding needs"
        refuse(where, f"{prefix}head_dim", head_dim, expected)
    check_eos(data, data["vocab_size"], where, prefix)


def check_rope(data: dict, where: str, prefix: str) -> None:
    """Plain rotary embedding: a base and no scaling, or UserError."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = {} if data.get(key) is None else data[key]
        check_object(rope, where, prefix + key)
        if any(k != "rope_theta" and value != PLAIN_ROPE.get(k) for k, value in rope.items()):
            expected = "plain rotary embedding (rope scaling is not implemented)"
            refuse(where, prefix + key, rope, expected, OTHER_CHECKPOINT)
        check_fields(rope, {"rope_theta": TEXT["rope_theta"]}, where, f"{prefix}{key}.")


def check_eos(data: dict, vocab_size: int, where: str, prefix: str) -> None:
    """`eos_token_id` is an id, a list of ids or null, or UserError."""
    eos = data.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
        expected = f"token ids below vocab_size {vocab_size}"
        refuse(where, f"{prefix}eos_token_id", ids, expected)


def stored_dtype(data: dict) -> str | None:
    return data.get("dtype") or data.get("torch_dtype")  # the new name and the old


def check_dtype(data: dict, where: str, prefix: str = "") -> None:
    key = "dtype" if data.get("dtype") else "torch_dtype"
    check_fields(data, {key: DTYPE}, where, prefix)


def is_original(data: dict) -> bool:
    """Whether a config.json is of the original layout (liuhaotian), which is flat.

    A converted checkpoint may keep the original's keys, so nested shapes decide.
    """
    if data.get("model_type") == "llava" and data.keys() & {"text_config", "vision_config"}:
        return False
    return "mm_vision_tower" in data or data.get("model_type") == "llava_llama"


def check_llava(data: dict, where: str) -> None:
    """A config.json of the llava-hf layout, up to its two inner objects' fields, or UserError."""
    if data.get("model_type") != "llava":
        expected = f"'llava' {ONLY}"
        refuse(where, "model_type", data.get("model_type"), expected, OTHER_CHECKPOINT)
    check_fields(data, LLAVA, where)
    text = data.get("text_config")
    for key in ("vision_config", "text_config"):
        if data.get(key) is not None:
            check_object(data[key], where, key)
    check_fields(text or {}, {"tie_word_embeddings": FLAG}, where, "text_config.")
    check_dtype(data, where)
    if not stored_dtype(data):
        check_dtype(text or {}, where, "text_config.")


def check_original(data: dict, model_types: tuple[str, ...], where: str) -> None:
    """A config.json of the original layout, but for its decoder's shapes, or UserError."""
    check_fields(data, {"model_type": Only(model_types)} | ORIGINAL, where)
    check_dtype(data, where)
    projector, tower = data.get("mm_projector_type"), data.get("mm_vision_tower")
    if projector != "mlp2x_gelu":
        expected = f"'mlp2x_gelu', LLaVA-1.5's {ONLY}"
        refuse(where, "mm_projector_type", projector, expected, OTHER_CHECKPOINT)
    named = isinstance(tower, str) and tower.strip()
    if not named or NOT_CLIP.search(PurePath(tower).name.lower()):
        expected = f"the folder or hub id of a CLIP {ONLY}"
        refuse(where, "mm_vision_tower", tower, expected, OTHER_CHECKPOINT)


def stored_layers(data: dict, where: str) -> Any:
    """The `quantization_config` as a quant.folder.Stored, or None. Raises UserError."""
    if data.get("quantization_config") is None:
        return None
    from llava_min.quant.folder import read_config  # with torch, which no flag waits for

    return read_config(data["quantization_config"], where)


def check_tower(data: dict, where: str) -> None:
    """The config.json of a tower's own folder is that of a CLIP or of its vision part."""
    check_fields(data, {"model_type": Only(("clip", "clip_vision_model"))}, where)
    if data.get("vision_config") is not None:
        check_object(data["vision_config"], where, "vision_config")


def check_joined(config: Any, where: str) -> None:
    """A `LlavaConfig`: the tower has the layer that is read, the vocabulary the image's token."""
    n, layer = config.vision.num_hidden_layers, config.vision_feature_layer
    if not -n - 1 <= layer <= n:
        expected = f"{-n - 1} to {n}: the tower has {n} blocks"
        refuse(where, "vision_feature_layer", layer, expected)
    if config.image_token_id >= config.text.vocab_size:
        expected = f"an id below vocab_size {config.text.vocab_size}"
        refuse(where, "image_token_index", config.image_token_id, expected)
