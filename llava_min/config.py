"""The shapes of a LLaVA, from and to `config.json`: vision tower, language model, and their joint.

A missing field takes the default of transformers' own config class, as published files expect.
`checks/config.py` refuses what is wrong or not implemented; the page then uses plain look-ups.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from llava_min.checks import config as checks

IGNORE = -100  # the label of a token that is not supervised
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pick(cls: type, data: dict[str, Any]) -> Any:
    """A dataclass from those entries of `data` that are its fields."""
    known = {f.name: f.type for f in fields(cls) if f.name in data}
    return cls(**{k: float(data[k]) if kind is float else data[k] for k, kind in known.items()})


# ---- the vision tower

# A tower's file that leaves fields out means CLIP-B/32, as in the reference; VisionConfig's own
# defaults are those of LLaVA-1.5's tower.
CLIP_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    image_size=224, patch_size=32, projection_dim=512,
)  # fmt: skip


@dataclass(frozen=True)
class VisionConfig:
    """CLIP ViT; the defaults are CLIP-L/14 at 336 pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336  # pixels a side
    patch_size: int = 14  # pixels a side
    projection_dim: int = 768  # of CLIP's contrastive head, which LLaVA does not use
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    model_type: str = "clip_vision_model"  # a row of llava.TOWERS
    has_class_token: ClassVar[bool] = True

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, data: dict, where: str = "config.json", prefix: str = "") -> "VisionConfig":
        """Read a `vision_config`; errors name it as `where` and `prefix`. Raises UserError."""
        data = CLIP_DEFAULTS | data
        checks.check_vision(data, where, prefix)
        return pick(cls, {k: value for k, value in data.items() if value is not None})

    @classmethod
    def from_clip(cls, data: dict, where: str) -> "VisionConfig":
        """Read the config.json of a CLIP's own folder. Raises UserError."""
        checks.check_tower(data, where)
        if data.get("model_type") == "clip":  # the whole CLIP, as OpenAI publishes it
            return cls.from_hf(data.get("vision_config") or {}, where, "vision_config.")
        return cls.from_hf(data, where)

    def to_hf(self) -> dict:
        return {"model_type": self.model_type, **self.__dict__, "num_channels": 3}


# ---- the language model


@dataclass(frozen=True)
class Family:
    """The decoders of one `model_type`: their features, and the defaults of their config class."""

    defaults: dict[str, Any]
    qkv_bias: bool = False  # q_proj, k_proj and v_proj have biases
    window: Literal["none", "always", "optional"] = "none"  # optional: where use_sliding_window
    heads_divide_width: bool = False  # even where head_dim is given


_DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, sliding_window=4096,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_MISTRAL = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072)
_QWEN2 = dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
    max_position_embeddings=32768, bos_token_id=None, eos_token_id=None,
    use_sliding_window=False, max_window_layers=28,
)  # fmt: skip
FAMILIES = {  # a new decoder is a new row; the model reads its features and never its name
    "llama": Family(
        _DEFAULTS | dict(intermediate_size=11008, max_position_embeddings=2048),
        heads_divide_width=True,
    ),
    "mistral": Family(_DEFAULTS | _MISTRAL, window="always"),
    "qwen2": Family(_DEFAULTS | _QWEN2, window="optional", qkv_bias=True),
}


@dataclass(frozen=True)
class TextConfig:
    """A decoder of one of FAMILIES; the defaults are LLaVA-1.5-7B's."""

    model_type: str = "llama"
    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096  # tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # Up to this many tokens a window changes nothing; longer sequences are refused.
    sliding_window: int | None = None
    max_window_layers: int = 0  # Qwen2: the first layers, which have no window
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.model_type].qkv_bias

    @property
    def context(self) -> int:
        """The longest sequence that is accepted, in tokens."""
        longest = self.max_position_embeddings
        return min(longest, self.sliding_window or longest)

    @classmethod
    def from_hf(
        cls, data: dict, where: str = "config.json", prefix: str = "", kind: str | None = None
    ) -> "TextConfig":
        """Read a `text_config`. kind: the row of FAMILIES where the file's model_type is not one.

        Errors name the file as `where` and the object in it as `prefix`. Raises UserError.
        """
        if kind is None:
            checks.check_family(data, tuple(FAMILIES), where, prefix)
            kind = data.get("model_type") or "llama"
        family = FAMILIES[kind]
        data = family.defaults | data
        checks.check_text(data, family, where, prefix)
        heads = data["num_attention_heads"]
        optional = family.window == "optional"
        unwindowed = data["max_window_layers"] if optional else 0
        some_windowed = optional and unwindowed < data["num_hidden_layers"]
        windowed = family.window == "always" or (some_windowed and data["use_sliding_window"])
        ours = dict(
            model_type=kind,
            num_key_value_heads=data["num_key_value_heads"] or heads,
            head_dim=data["head_dim"] or data["hidden_size"] // heads,
            rope_theta=_rope_theta(data),
            sliding_window=data["sliding_window"] if windowed else None,
            max_window_layers=unwindowed,
            eos_token_ids=_token_ids(data["eos_token_id"]),
        )
        return pick(cls, data | ours)

    def to_hf(self) -> dict:
        d = dict(self.__dict__)
        eos = list(d.pop("eos_token_ids"))
        d["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        d["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        d["hidden_act"] = "silu"
        if FAMILIES[self.model_type].window == "optional":
            d["use_sliding_window"] = self.sliding_window is not None
        return d


def _rope_theta(data: dict) -> float:
    """The base of the rotary embedding, in the order in which transformers looks for it."""
    # rope_scaling is older than transformers 5, rope_parameters newer
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    return rope.get("rope_theta", data.get("rope_theta", 10000.0))


def _token_ids(ids: int | list[int] | None) -> tuple[int, ...]:
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def read_eos(data: dict, vocab_size: int, where: str) -> tuple[int, ...]:
    """`eos_token_id` of a `generation_config.json`. Raises UserError."""
    checks.check_eos(data, vocab_size, where, "")
    return _token_ids(data.get("eos_token_id"))


# ---- the whole


# the original layout's model_type -> its decoder's
ORIGINAL_TYPES = {"llava": "llama"} | {f"llava_{family}": family for family in FAMILIES}


@dataclass(frozen=True)
class LlavaConfig:
    """A vision tower, a language model, and the two-layer projector between them."""

    vision: VisionConfig | None = field(default_factory=VisionConfig)  # None: answers texts alone
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 32000
    # index into [embeddings, block 1, block 2, …], as transformers counts
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"  # without the class token; "full": with it
    projector_bias: bool = True
    tie_word_embeddings: bool = False
    dtype: str | None = None  # of the stored weights
    vision_source: str | None = None  # original layout: the tower's CLIP folder or hub id
    quantization: Any = None  # quant.folder.Stored: how its quantized layers are stored

    @property
    def vision_layers_used(self) -> int:
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision.num_hidden_layers + 1 + layer

    @property
    def tokens_per_image(self) -> int:
        keeps_class_token = self.vision_feature_select_strategy == "full"
        return self.vision.num_patches + (self.vision.has_class_token and keeps_class_token)

    @classmethod
    def from_hf(cls, data: dict, where: str = "config.json") -> "LlavaConfig":
        """Read a `config.json` of the llava-hf or of the original (liuhaotian) layout.

        Raises UserError for another architecture, a field of a wrong type or out of range, and an
        option that is not implemented.
        """
        checks.check_object(data, where, "top level")
        if checks.is_original(data):
            return cls._from_original(data, where)
        checks.check_llava(data, where)
        text, vision = data.get("text_config") or {}, VisionConfig()  # LLaVA's default: CLIP-L/336
        if data.get("vision_config") is not None:
            vision = VisionConfig.from_hf(data["vision_config"], where, "vision_config.")
        config = cls(
            vision,
            TextConfig.from_hf(text, where, "text_config."),
            image_token_id=data.get("image_token_index", data.get("image_token_id", 32000)),
            vision_feature_layer=data.get("vision_feature_layer", -2),
            vision_feature_select_strategy=data.get("vision_feature_select_strategy") or "default",
            projector_bias=data.get("multimodal_projector_bias", True),
            tie_word_embeddings=any(d.get("tie_word_embeddings", False) for d in (data, text)),
            dtype=checks.stored_dtype(data) or checks.stored_dtype(text),
            quantization=checks.stored_layers(data, where),
        )
        checks.check_joined(config, where)
        return config

    @classmethod
    def _from_original(cls, data: dict, where: str) -> "LlavaConfig":
        checks.check_original(data, tuple(ORIGINAL_TYPES), where)
        kind = ORIGINAL_TYPES[data.get("model_type") or "llava"]
        text = TextConfig.from_hf(data, where, kind=kind)
        # The vocabulary grows as llava-hf's converter grows it, which needs a row for <image>:
        # <image> and <pad> are added, then it is rounded up to a multiple of 64.
        image_id = text.vocab_size
        rows = (image_id + 2 + 63) // 64 * 64
        has_class_token = data.get("mm_vision_select_feature") == "cls_patch"
        return cls(
            text=replace(text, vocab_size=rows, pad_token_id=image_id + 1),
            image_token_id=image_id,
            vision_feature_layer=data.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy="full" if has_class_token else "default",
            tie_word_embeddings=data.get("tie_word_embeddings", False),
            dtype=checks.stored_dtype(data),
            vision_source=data["mm_vision_tower"],
            quantization=checks.stored_layers(data, where),
        )

    def with_vision(self, vision: VisionConfig, where: str) -> "LlavaConfig":
        """The config of an original checkpoint once its tower is known. Raises UserError."""
        config = replace(self, vision=vision)
        checks.check_joined(config, where)
        return config

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
