"""The shapes of a LLaVA: vision tower, language model and how they meet, to and from `config.json`.

A config is read strictly: a field of the wrong type is an error that names its key, and an option
that would change the result and is not implemented here is refused by name. Missing fields take the
defaults of transformers' own config class, because published files leave most of them out.
"""

import re
import reprlib
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from llava_min.errors import UserError

BIG = 1 << 20  # no width or vocabulary of a real model is larger
DEEP = 1 << 10  # nor depth
# of a decoder block
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IGNORE = -100  # the label of a token that is not learned
# Towers that are not CLIP as transformers' CLIPVisionModel is, by their published names.
NO_CLIP = re.compile(
    r"siglip|intern.?vit|convnext|dino|mobileclip|fastvit|aimv2|pixtral|moonvit"
    r"|languagebind|imagebind|(?<![a-z])(eva|sam|mae|swin|c?radio)(?![a-z])"
)
ALONE, OTHER = "(nothing else is implemented)", "give another checkpoint"


class Fields:
    """A JSON object whose fields are taken out with a type; errors name the file and the dotted
    key.
    """

    def __init__(self, data: Any, where: str, prefix: str = ""):
        self.data, self.where, self.prefix = data, where, prefix
        if not isinstance(data, dict):
            self.fail(prefix.rstrip(".") or "top level", data, "a JSON object")

    def fail(
        self, key: str, value: Any, expected: str, mend: str = "is it this model's file?"
    ) -> None:
        raise UserError(
            f"{self.where}: {key} is {reprlib.repr(value)}, expected {expected}; {mend}"
        )

    def take(
        self,
        key: str,
        kind: type,
        default: Any,
        low: float = 1,
        high: float = BIG,
        null: bool = False,
    ) -> Any:
        """The field's value, `default` where it is left out, and None for a null that is allowed."""
        value = self.data.get(key, default)
        if key not in self.data or (null and value is None):
            return value
        if type(value) is not kind and not (kind is float and type(value) is int):
            names = {int: "an integer", float: "a number", bool: "true or false"}
            self.fail(self.prefix + key, value, names[kind])
        if kind in (int, float) and not low <= value <= high:
            self.fail(self.prefix + key, value, f"a value from {low:g} to {high:g}")
        return kind(value)

    def sizes(self, defaults: dict[str, int]) -> dict[str, int]:
        return {
            k: self.take(k, int, n, high=DEEP if k == "num_hidden_layers" else BIG)
            for k, n in defaults.items()
        }

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse by name a setting that would change the result and is not implemented."""
        value = self.data.get(key)
        if value is not None and value not in allowed:
            names = " or ".join(map(repr, allowed)) or "none"
            self.fail(self.prefix + key, value, f"{names} {ALONE}", OTHER)

    def inner(self, key: str) -> "Fields":
        value = self.data.get(key)
        return Fields({} if value is None else value, self.where, f"{self.prefix}{key}.")


@dataclass(frozen=True)
class VisionConfig:
    """CLIP ViT; the defaults are CLIP-L/14 at 336 pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    projection_dim: int = 768  # of CLIP's contrastive head, which LLaVA has no use for
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    model_type: str = "clip_vision_model"  # a row of llava.TOWERS

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, f: Fields) -> "VisionConfig":
        f.only("model_type", "clip_vision_model")
        f.only("quantization_config")
        f.only("hidden_act", "quick_gelu", "gelu")
        f.only("attention_dropout", 0.0)
        f.only("num_channels", 3)
        # not our defaults: a file that leaves fields out means CLIP-B/32, the reference's
        defaults = dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=224,
            patch_size=32,
            projection_dim=512,
        )
        c = cls(
            **f.sizes(defaults),
            hidden_act=f.data.get("hidden_act") or "quick_gelu",
            layer_norm_eps=f.take("layer_norm_eps", float, 1e-5, 0, 1),
        )
        if c.hidden_size % c.num_attention_heads:
            f.fail(
                f"{f.prefix}num_attention_heads",
                c.num_attention_heads,
                f"a divisor of {c.hidden_size}",
            )
        if c.patch_size > c.image_size:
            f.fail(f"{f.prefix}patch_size", c.patch_size, f"at most image_size {c.image_size}")
        return c

    def to_hf(self) -> dict:
        return {"model_type": "clip_vision_model", **self.__dict__, "num_channels": 3}


def read_eos(f: Fields, vocab_size: int, default: int | None = None) -> tuple[int, ...]:
    """`eos_token_id`, which files write as an id, a list of ids or null."""
    eos = f.data.get("eos_token_id", default)
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(i) is not int or not 0 <= i < vocab_size for i in eos):
        f.fail(f"{f.prefix}eos_token_id", eos, f"token ids below vocab_size {vocab_size}")
    return tuple(eos)


# What the reference's config classes fill in when a file leaves a field out.
TEXT_DEFAULTS = {
    "llama": dict(
        vocab_size=32000,
        intermediate_size=11008,
        num_key_value_heads=None,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mistral": dict(
        vocab_size=32000,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen2": dict(
        vocab_size=151936,
        intermediate_size=22016,
        num_key_value_heads=32,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
    ),
}


@dataclass(frozen=True)
class TextConfig:
    """Llama and its family: Mistral differs by its sliding window, Qwen2 by biases on q, k and v."""

    model_type: str = "llama"
    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = (
        None  # sequences up to this length do not notice it; longer ones are refused
    )
    max_window_layers: int = 0  # Qwen2: the first so many layers have no window
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def context(self) -> int:
        """The longest sequence that is taken."""
        return min(
            self.max_position_embeddings, self.sliding_window or self.max_position_embeddings
        )

    @classmethod
    def from_hf(cls, f: Fields, kind: str | None = None) -> "TextConfig":
        """`kind` is the model_type where the file's own says something else."""
        if kind is None:
            f.only("model_type", *TEXT_DEFAULTS)
            kind = f.data.get("model_type") or "llama"
        for key, plain in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
            ("attention_dropout", 0.0),
            ("partial_rotary_factor", 1.0),
        ):
            f.only(key, plain)
        f.only("quantization_config")
        d = dict(
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **TEXT_DEFAULTS[kind]
        )
        n = f.sizes(
            {
                k: d[k]
                for k in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "max_position_embeddings",
                )
            }
        )
        heads, width = n["num_attention_heads"], n["hidden_size"]
        kv = f.take("num_key_value_heads", int, d["num_key_value_heads"], null=True) or heads
        head_dim = f.take("head_dim", int, None, null=True)
        if width % heads and (head_dim is None or kind == "llama"):
            f.fail(f"{f.prefix}num_attention_heads", heads, f"a divisor of hidden_size {width}")
        if heads % kv:
            f.fail(
                f"{f.prefix}num_key_value_heads", kv, f"a divisor of num_attention_heads {heads}"
            )
        head_dim = head_dim or width // heads
        if head_dim % 2:
            f.fail(f"{f.prefix}head_dim", head_dim, "an even number, which rotary embedding needs")
        spared = f.take("max_window_layers", int, 28, 0) if kind == "qwen2" else 0
        windowed = kind == "mistral" or (
            kind == "qwen2"
            and f.take("use_sliding_window", bool, False)
            and spared < n["num_hidden_layers"]
        )
        window = f.take("sliding_window", int, 4096, null=True)
        return cls(
            model_type=kind,
            **n,
            num_key_value_heads=kv,
            head_dim=head_dim,
            rms_norm_eps=f.take("rms_norm_eps", float, 1e-6, 0, 1),
            rope_theta=_rope_theta(f),
            sliding_window=window if windowed else None,
            max_window_layers=spared,
            bos_token_id=f.take("bos_token_id", int, d["bos_token_id"], 0, null=True),
            eos_token_ids=read_eos(f, n["vocab_size"], d["eos_token_id"]),
            pad_token_id=f.take("pad_token_id", int, None, -1, null=True),
        )

    def to_hf(self) -> dict:
        d = dict(self.__dict__)
        eos = list(d.pop("eos_token_ids"))
        d["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        d["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        d["hidden_act"] = "silu"
        if self.model_type == "qwen2":
            d["use_sliding_window"] = self.sliding_window is not None
        return d


def _rope_theta(f: Fields) -> float:
    """The base of the rotary embedding, where transformers looks for it; refuses any scaling."""
    plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    for key in ("rope_scaling", "rope_parameters"):  # before transformers 5, and since
        rope = f.inner(key).data
        if any(k != "rope_theta" and v != plain.get(k) for k, v in rope.items()):
            f.fail(
                f.prefix + key,
                rope,
                "plain rotary embedding (rope scaling is not implemented)",
                OTHER,
            )
    theta = f.take("rope_theta", float, 10000.0, 1, 1e12)
    rope = f.inner("rope_scaling" if f.data.get("rope_scaling") else "rope_parameters")
    return rope.take("rope_theta", float, theta, 1, 1e12)


@dataclass(frozen=True)
class LlavaConfig:
    """A vision tower, a language model, and the two-layer projector between them."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 32000
    vision_feature_layer: int = (
        -2
    )  # index into [embeddings, block 1, block 2, …], as transformers counts
    vision_feature_select_strategy: str = (
        "default"  # "default" drops the class token, "full" keeps it
    )
    projector_bias: bool = True
    tie_word_embeddings: bool = False
    dtype: str | None = None  # of the stored weights
    vision_source: str | None = (
        None  # original layout only: the CLIP folder or hub id that holds the tower
    )

    @property
    def vision_layers_used(self) -> int:
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision.num_hidden_layers + 1 + layer

    @property
    def tokens_per_image(self) -> int:
        return self.vision.num_patches + (self.vision_feature_select_strategy == "full")

    @classmethod
    def from_hf(cls, data: dict, where: str = "config.json") -> "LlavaConfig":
        """Read a `config.json` of the llava-hf or of the original (liuhaotian) layout.

        Raises UserError for another architecture, a field of a wrong type, an option that is not
        implemented.
        """
        f = Fields(data, where)
        f.only("quantization_config")
        f.only("auto_map")
        # a converted checkpoint may keep the original's keys: where the shapes stand is the layout
        inner = data.keys() & {"text_config", "vision_config"}
        nested = data.get("model_type") == "llava" and inner
        if not nested and ("mm_vision_tower" in data or data.get("model_type") == "llava_llama"):
            return cls._from_original(f)
        if data.get("model_type") != "llava":
            f.fail("model_type", data.get("model_type"), f"'llava' {ALONE}", OTHER)
        f.only("projector_hidden_act", "gelu")
        f.only("vision_feature_select_strategy", "default", "full")
        vision, text = f.inner("vision_config"), f.inner("text_config")
        tied = [g.take("tie_word_embeddings", bool, False) for g in (f, text)]
        c = cls(
            VisionConfig() if data.get("vision_config") is None else VisionConfig.from_hf(vision),
            TextConfig.from_hf(text),
            image_token_id=f.take(
                "image_token_index", int, f.take("image_token_id", int, 32000, 0), 0
            ),
            vision_feature_layer=f.take("vision_feature_layer", int, -2, -BIG),
            vision_feature_select_strategy=data.get("vision_feature_select_strategy") or "default",
            projector_bias=f.take("multimodal_projector_bias", bool, True),
            tie_word_embeddings=any(tied),
            dtype=_dtype_name(f) or _dtype_name(text),
        )
        return c._checked(f)

    @classmethod
    def _from_original(cls, f: Fields) -> "LlavaConfig":
        kinds = {
            "llava": "llama",
            "llava_llama": "llama",
            "llava_mistral": "mistral",
            "llava_qwen2": "qwen2",
        }
        f.only("model_type", *kinds)
        for key, *allowed in (
            ("mm_use_im_start_end", False),
            ("mm_use_im_patch_token", False),
            ("mm_vision_select_feature", "patch", "cls_patch"),
            ("mm_patch_merge_type", "flat"),
            ("image_aspect_ratio", "pad", "square"),
        ):
            f.only(key, *allowed)
        projector, tower = f.data.get("mm_projector_type"), f.data.get("mm_vision_tower")
        if projector != "mlp2x_gelu":
            f.fail("mm_projector_type", projector, f"'mlp2x_gelu', LLaVA-1.5's {ALONE}", OTHER)
        named = isinstance(tower, str) and tower.strip()
        if not named or NO_CLIP.search(PurePath(tower).name.lower()):
            f.fail("mm_vision_tower", tower, f"the folder or hub id of a CLIP {ALONE}", OTHER)
        text = TextConfig.from_hf(f, kinds[f.data.get("model_type") or "llava"])
        # Every reader of the llava-hf layout wants a row for <image>: the vocabulary grows as its
        # converter
        # grows it, <image> and <pad> added, then up to a multiple of 64.
        image_id = text.vocab_size
        strategy = "full" if f.data.get("mm_vision_select_feature") == "cls_patch" else "default"
        return cls(
            text=replace(
                text, vocab_size=(image_id + 2 + 63) // 64 * 64, pad_token_id=image_id + 1
            ),
            image_token_id=image_id,
            vision_source=tower,
            dtype=_dtype_name(f),
            vision_feature_layer=f.take("mm_vision_select_layer", int, -2, -BIG),
            vision_feature_select_strategy=strategy,
            tie_word_embeddings=f.take("tie_word_embeddings", bool, False),
        )

    def _checked(self, f: Fields) -> "LlavaConfig":
        n = self.vision.num_hidden_layers
        if not -n - 1 <= self.vision_feature_layer <= n:
            layer = self.vision_feature_layer
            f.fail("vision_feature_layer", layer, f"{-n - 1} to {n}: the tower has {n} blocks")
        if self.image_token_id >= self.text.vocab_size:
            f.fail(
                "image_token_index",
                self.image_token_id,
                f"an id below vocab_size {self.text.vocab_size}",
            )
        return self

    def with_vision(self, vision: VisionConfig, where: str = "config.json") -> "LlavaConfig":
        """The config of an original checkpoint once its tower is known."""
        return replace(self, vision=vision)._checked(Fields({}, where))

    def to_hf(self) -> dict:
        """The llava-hf `config.json`, which transformers, vLLM and llama.cpp's converters read."""
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": self.image_token_id,
            "image_seq_length": self.tokens_per_image,
            "vision_feature_layer": self.vision_feature_layer,
            "vision_feature_select_strategy": self.vision_feature_select_strategy,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": self.projector_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "pad_token_id": self.text.pad_token_id,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
            "vision_config": self.vision.to_hf(),
            "text_config": {**self.text.to_hf(), "tie_word_embeddings": self.tie_word_embeddings},
        }


def _dtype_name(f: Fields) -> str | None:
    key = "dtype" if f.data.get("dtype") else "torch_dtype"
    f.only(key, "float32", "float16", "bfloat16")
    return f.data.get(key)


def _llama(
    width: int, depth: int, heads: int, mlp: int, image_token_id: int = 32000, **other
) -> LlavaConfig:
    text = dict(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        num_key_value_heads=heads,
        head_dim=width // heads,
    )
    return LlavaConfig(text=TextConfig(**{**text, **other}), image_token_id=image_token_id)


# The named sizes of `bench` and `train.py --dry-run`; 7b and 13b are LLaVA-1.5's.
SIZES = {
    "300m": _llama(1024, 16, 16, 2816),
    "1b": _llama(2048, 22, 32, 5632),
    "7b": _llama(4096, 32, 32, 11008),
    "13b": _llama(5120, 40, 40, 13824),
    "mistral-7b": _llama(
        4096,
        32,
        32,
        14336,
        model_type="mistral",
        num_key_value_heads=8,
        rope_theta=1e6,
        max_position_embeddings=32768,
    ),
    "qwen1.5-4b": _llama(
        2560,
        40,
        20,
        6912,
        151646,
        model_type="qwen2",
        vocab_size=151936,
        rope_theta=5e6,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_ids=(151643,),
    ),
}
