"""config.py: read as transformers reads it, written so that transformers reads it back, refused by
name.
"""

import copy
import json

import pytest
from conftest import KINDS, TEXT, VISION, hf_config

from llava_min.checks.config_keys import KNOWN, unknown_keys
from llava_min.checks.config_keys import ORIGINAL as ORIGINAL_KEYS
from llava_min.config import LlavaConfig, TextConfig
from llava_min.errors import UserError
from llava_min.util.files import read_json
from llava_min.util.sizes import SIZES

TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "pad_token_id",
)
LLAVA_FIELDS = {
    "image_token_id": "image_token_id",
    "vision_feature_layer": "vision_feature_layer",
    "tie_word_embeddings": "tie_word_embeddings",
    "vision_feature_select_strategy": "vision_feature_select_strategy",
    "projector_bias": "multimodal_projector_bias",
}


def oracle(data: dict):
    transformers = pytest.importorskip(
        "transformers", reason="the oracle of this test; pip install -e '.[test]'"
    )
    return transformers.LlavaConfig(**copy.deepcopy(data))


def assert_same(ours: LlavaConfig, theirs) -> None:
    t, v = theirs.text_config, theirs.vision_config
    assert ours.text.model_type == t.model_type
    assert {k: getattr(ours.text, k) for k in TEXT_FIELDS} == {
        k: getattr(t, k) for k in TEXT_FIELDS
    }
    assert ours.text.head_dim == getattr(t, "head_dim", t.hidden_size // t.num_attention_heads)
    assert (
        t.rope_parameters["rope_type"] == "default"
        and ours.text.rope_theta == t.rope_parameters["rope_theta"]
    )
    eos = t.eos_token_id
    assert list(ours.text.eos_token_ids) == (
        eos if isinstance(eos, list) else [] if eos is None else [eos]
    )
    slides = {
        "llama": False,
        "mistral": True,
        "qwen2": "sliding_attention" in (getattr(t, "layer_types", None) or []),
    }[t.model_type]
    assert ours.text.sliding_window == (getattr(t, "sliding_window", None) if slides else None)
    for k, value in vars(ours.vision).items():
        assert value == getattr(v, k), k
    for k, name in LLAVA_FIELDS.items():
        assert getattr(ours, k) == getattr(theirs, name), k
    assert ours.dtype == (
        None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch.")
    )


PUBLISHED = {  # llava-hf/llava-1.5-7b-hf
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
}
GOOD = [
    {},
    PUBLISHED,
    {"vision_config": None, "text_config": None},
    {"vision_config": {"model_type": "clip_vision_model"}},  # CLIP-B/32 and not CLIP-L/336
    {"vision_config": {"hidden_size": 48, "num_attention_heads": 6}},
    {"vision_config": {**VISION, "hidden_act": "gelu", "layer_norm_eps": 1e-6}},
    *({"text_config": {"model_type": kind}} for kind in ("llama", "mistral", "qwen2")),
    *({"text_config": {**TEXT, **change}, "image_token_index": 320} for change in KINDS.values()),
    {
        "text_config": {
            "model_type": "llama",
            "num_key_value_heads": None,
            "head_dim": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    },
    {"text_config": {"model_type": "llama", "sliding_window": 5}},  # Llama knows none
    {"text_config": {"model_type": "mistral", "sliding_window": None}},
    {
        "text_config": {
            "model_type": "mistral",
            "sliding_window": 77,
            "hidden_size": 60,
            "num_attention_heads": 8,
            "head_dim": 8,
        }
    },
    {"text_config": {"model_type": "qwen2", "sliding_window": 77}},  # not in use
    {"text_config": {"model_type": "qwen2", "sliding_window": 77, "use_sliding_window": True}},
    {
        "text_config": {
            "model_type": "qwen2",
            "sliding_window": 77,
            "use_sliding_window": True,
            "max_window_layers": 32,
        }
    },
    {
        "text_config": {
            "model_type": "qwen2",
            "sliding_window": 77,
            "use_sliding_window": True,
            "max_window_layers": 0,
        }
    },
    *(
        {
            "text_config": {
                "model_type": "qwen2",
                "sliding_window": 77,
                "use_sliding_window": True,
                "num_hidden_layers": n,
            }
        }
        for n in (28, 29)
    ),
    {"text_config": {"model_type": "llama", "rope_theta": 500000.0}},
    {"text_config": {"model_type": "llama", "rope_theta": 500000}},
    {
        "text_config": {
            "model_type": "llama",
            "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
        }
    },
    {
        "text_config": {
            "model_type": "llama",
            "rope_theta": 5.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
        }
    },
    {
        "text_config": {
            "model_type": "llama",
            "rope_theta": 5.0,
            "rope_parameters": {"type": "default"},
        }
    },
    {"text_config": {"model_type": "llama", "rope_theta": 5.0, "rope_scaling": None}},
    {
        "text_config": {
            "model_type": "llama",
            "rope_parameters": {"rope_theta": 7e4, "partial_rotary_factor": 1.0},
        }
    },
    {"text_config": {"model_type": "llama", "eos_token_id": [2, 9, 4]}},
    {"text_config": {"model_type": "llama", "eos_token_id": []}},
    {"text_config": {"model_type": "qwen2", "tie_word_embeddings": True}},
    {"tie_word_embeddings": True},
    {"dtype": "float16"},
    {"torch_dtype": "bfloat16"},
    {"vision_feature_layer": 0},
    {"vision_feature_layer": 24},
    {"vision_feature_layer": -25},
    {
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
        "image_token_index": 5,
    },
]


@pytest.mark.parametrize("change", GOOD, ids=lambda change: json.dumps(change)[:60])
def test_read_and_written_as_transformers_does(change):
    data = {"model_type": "llava", "image_token_index": 9, **change}
    theirs = oracle(data)
    # as published, and as transformers writes
    for form in (data, theirs.to_dict(), theirs.to_diff_dict()):
        ours = LlavaConfig.from_hf(form)
        assert_same(ours, theirs)
    assert_same(ours, oracle(ours.to_hf()))
    assert LlavaConfig.from_hf(ours.to_hf()) == ours


def test_named_sizes_are_written_and_read():
    for name, config in SIZES.items():
        assert LlavaConfig.from_hf(config.to_hf()) == config, name
        assert_same(config, oracle(config.to_hf()))


ORIGINAL = {
    **TEXT,
    "model_type": "llava_llama",
    "vocab_size": 320,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "pad_token_id": 0,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "torch_dtype": "float16",
    "mm_hidden_size": 1024,
    "rope_scaling": None,
}


def test_the_original_layout():
    c = LlavaConfig.from_hf(ORIGINAL)
    # grown as the converter to llava-hf grows it
    assert (c.image_token_id, c.text.pad_token_id, c.text.vocab_size) == (320, 321, 384)
    assert c.vision_source == "openai/clip-vit-large-patch14-336" and c.dtype == "float16"
    assert c.text == TextConfig(**{**TEXT, "head_dim": 8, "eos_token_ids": (2,)})
    full = LlavaConfig.from_hf(
        {
            **ORIGINAL,
            "mm_vision_select_feature": "cls_patch",
            "mm_vision_select_layer": -1,
            "model_type": "llava",
        }
    )
    assert (
        full.vision_feature_layer,
        full.vision_feature_select_strategy,
        full.tokens_per_image,
    ) == (-1, "full", 577)
    grown = {
        n: LlavaConfig.from_hf({**ORIGINAL, "vocab_size": n}).text.vocab_size
        for n in (32000, 62, 63)
    }
    assert grown == {32000: 32064, 62: 64, 63: 128}
    kinds = {"llava_mistral": "mistral", "llava_qwen2": "qwen2", "llava_llama": "llama"}
    assert {
        k: LlavaConfig.from_hf({**ORIGINAL, "model_type": k}).text.model_type for k in kinds
    } == kinds


def changed(data: dict, key: str, value) -> dict:
    data = copy.deepcopy(data)
    *path, leaf = key.split(".")
    inner = data
    for k in path:
        inner = inner[k]
    inner[leaf] = value
    return data


WRONG = ["4096", 4096.5, True, None, -1, 0, 10**9, 10**400, [], {}, float("nan")]
SIZE_KEYS = [
    f"text_config.{k}"
    for k in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
]
SIZE_KEYS += [
    f"vision_config.{k}"
    for k in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "projection_dim",
    )
]
BAD = [  # (key, what is refused)
    *((key, value) for key in SIZE_KEYS for value in (*WRONG, 4096.0)),
    *(
        (f"text_config.{key}", value)
        for key in ("num_key_value_heads", "head_dim")
        for value in WRONG
        if value is not None
    ),
    *(
        (key, value)
        for key in ("text_config.rms_norm_eps", "vision_config.layer_norm_eps")
        for value in ("1e-5", None, -1, 2, True, float("nan"))
    ),
    *(
        ("text_config.rope_theta", value)
        for value in ("10000", None, 0, -1, True, float("inf"), 10**400)
    ),
    *(
        ("text_config.eos_token_id", value)
        for value in ("2", 2.0, True, -1, 384, [2, None], [384], {"a": 2})
    ),
    *(
        (f"text_config.{key}", value)
        for key in ("bos_token_id", "pad_token_id")
        for value in ("2", 2.0, True, -2, 10**9)
    ),
    # a million layers take minutes to build, even without memory
    ("text_config.num_hidden_layers", 1 << 20),
    ("vision_config.num_hidden_layers", 1 << 20),
    ("text_config.sliding_window", 0),  # only where there is one: the base is Mistral's here
    ("text_config.num_attention_heads", 5),
    ("text_config.num_key_value_heads", 3),
    ("vision_config.num_attention_heads", 5),
    ("text_config.head_dim", 7),
    ("vision_config.patch_size", 29),
    *(
        ("text_config.rope_scaling", value)
        for value in (
            {"type": "linear", "factor": 2.0},
            {"rope_type": "dynamic", "factor": 2.0},
            {"rope_type": "yarn"},
            {"rope_type": "default", "factor": 4.0},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            {"mrope_section": [1, 2]},
            {"partial_rotary_factor": 0.5},
            "linear",
            2.0,
            [1],
        )
    ),
    *(
        ("text_config.rope_parameters", value)
        for value in (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            {"full_attention": {"rope_type": "default"}},
            {"rope_theta": "x"},
            {"rope_theta": None},
        )
    ),
    ("text_config.partial_rotary_factor", 0.5),
    ("text_config.hidden_act", "gelu"),
    ("text_config.hidden_act", ["silu"]),
    ("text_config.attention_bias", True),
    ("text_config.mlp_bias", True),
    ("text_config.attention_dropout", 0.1),
    *(
        ("text_config.model_type", value)
        for value in ("gemma", "qwen2_moe", "qwen2_vl_text", "phi3", "", ["llama"], 5)
    ),
    *(
        ("vision_config.model_type", value)
        for value in ("siglip_vision_model", "clip", "pixtral", {})
    ),
    ("vision_config.hidden_act", "relu"),
    ("vision_config.num_channels", 4),
    ("vision_config.image_size", [28, 28]),
    *(
        ("model_type", value)
        for value in (
            "llava_next",
            "llava_onevision",
            "vipllava",
            "qwen2_vl",
            "llama",
            None,
            "",
            [],
        )
    ),
    *(
        ("vision_feature_layer", value)
        for value in ([-2, -5], "-2", -2.0, True, None, 4, -5, 10**9)
    ),
    *(("vision_feature_select_strategy", value) for value in ("cls", ["default"], 0)),
    *(("image_token_index", value) for value in (384, -1, "320", 320.0, None, True)),
    *(("mm_patch_merge_type", value) for value in ("spatial", "spatial_unpad", ["flat"], True)),
    *(("image_aspect_ratio", value) for value in ("anyres", "anyres_max_9", ["pad"], 1)),
    ("projector_hidden_act", "relu"),
    ("multimodal_projector_bias", "false"),
    ("multimodal_projector_bias", 1),
    ("tie_word_embeddings", "yes"),
    ("text_config.tie_word_embeddings", 0),
    *(("dtype", value) for value in ("float64", "int8", "half", 16, ["float16"])),
    ("torch_dtype", "float8_e4m3fn"),
    ("quantization_config", {"quant_method": "awq", "bits": 4}),
    ("text_config.quantization_config", {"load_in_4bit": True}),
    ("vision_config.quantization_config", {"load_in_4bit": True}),
    ("auto_map", {"AutoConfig": "modeling.Evil"}),
    *(
        (key, value)
        for key in ("text_config", "vision_config")
        for value in ([], "llama", 0, False)
    ),
]
BASE = changed(
    changed(hf_config("mistral"), "text_config.rope_theta", 1e4), "text_config.eos_token_id", 2
)


def assert_refused(data: dict, key: str) -> None:
    with pytest.raises(UserError) as e:
        LlavaConfig.from_hf(data, "x/config.json")
    message = str(e.value)
    assert message.startswith("x/config.json: ") and key in message and "; " in message
    assert len(message) < 500 and message.isprintable()


@pytest.mark.parametrize("key, value", BAD, ids=lambda x: repr(x)[:30])
def test_refused_by_name(key, value):
    LlavaConfig.from_hf(BASE)  # the control
    assert_refused(changed(BASE, key, value), key)


def test_heads_divide_the_width_of_a_llama_whatever_head_dim_says():
    """transformers refuses it too; its Mistral does not."""
    data = changed(BASE, "text_config.hidden_size", 60)
    data["text_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    LlavaConfig.from_hf(data)
    assert_refused(
        changed(data, "text_config.model_type", "llama"), "text_config.num_attention_heads is 8"
    )


@pytest.mark.parametrize(
    "key, value",
    [
        ("mm_projector_type", "linear"),
        ("mm_projector_type", None),
        ("mm_projector_type", "mlp3x_gelu"),
        ("mm_vision_tower", None),
        ("mm_vision_tower", 5),
        ("mm_vision_tower", "google/siglip-so400m-patch14-384"),
        ("mm_use_im_start_end", True),
        ("mm_use_im_patch_token", True),
        ("mm_vision_select_feature", "cls"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("image_aspect_ratio", "anyres"),
        ("model_type", "llava_mpt"),
        ("mm_vision_select_layer", "-2"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("hidden_size", "32"),
        ("torch_dtype", "int8"),
        ("quantization_config", {"load_in_4bit": True}),
    ],
)
def test_original_refused_by_name(key, value):
    LlavaConfig.from_hf(ORIGINAL)
    assert_refused(changed(ORIGINAL, key, value), key)


def test_a_hostile_value_does_not_reach_the_message_raw():
    nested = "x"
    for _ in range(900):
        nested = [nested]
    for value in (
        "\x1b]0;owned\x07\x1b[2J",
        "x" * 10**6,
        {"\x1b[31m": 1},
        list(range(10**5)),
        nested,
    ):
        assert_refused(changed(BASE, "model_type", value), "model_type")
        assert_refused(changed(BASE, "text_config.hidden_size", value), "text_config.hidden_size")


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no such file"),
        (b"", "line 1 column 1"),
        (b"[]", "a JSON list"),
        (b"null", "a JSON NoneType"),
        (b'{"a": 1,}', "line 1 column"),
        (b'{"a"\n\n: }', "line 3 column 3"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        (b'{"a": "\xc3\x28"}', "not UTF-8"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"a":' * 100_000, "not readable as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
    ],
)
def test_json_files(content, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # the control, with a byte order mark
    assert read_json(path) == {"a": 1}
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as e:
        read_json(path)
    assert str(path) in str(e.value) and says in str(e.value) and "\n" not in str(e.value)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    with pytest.raises(UserError, match="not a regular file"):
        read_json(tmp_path)


# ---- keys that no published class has


def test_the_table_of_keys_is_that_of_the_published_classes():
    transformers = pytest.importorskip(
        "transformers", reason="its config classes are the table's source"
    )
    classes = [
        getattr(transformers, f"{name}Config")
        for name in ("PreTrained", "Llava", "CLIP", "CLIPVision", "Llama", "Mistral", "Qwen2")
    ]
    for c in classes:
        assert not (unknown := set(c().to_dict()) - KNOWN), (c, unknown)
    assert set(ORIGINAL_KEYS.split()) >= {k for k in ORIGINAL if k.startswith("mm_")}
    for kind in ("llama", "mistral", "qwen2"):
        assert unknown_keys(their_config(kind)) == {}


def their_config(kind: str) -> dict:
    transformers = pytest.importorskip("transformers", reason="writes the config that is read here")
    return transformers.LlavaConfig(**hf_config(kind)).to_dict()


PUBLISHED = [  # whole, as they stand on the hub
    {
        "_name_or_path": "llava-v1.5-7b",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_length": 4096,
        "max_position_embeddings": 4096,
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": 32000,
    },
    {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    },
]


@pytest.mark.parametrize("data", PUBLISHED, ids=["liuhaotian", "llava-hf"])
def test_a_published_config_has_no_unknown_key(data):
    LlavaConfig.from_hf(data)
    assert unknown_keys(data) == {}
    forked = {
        **data,
        "grouping": "avgpool1d",
        "stride": 2,
        "off": False,
        "none": None,
        "text_config": {**data.get("text_config", {}), "skip_layers": [3]},
    }
    assert unknown_keys(forked) == {
        "grouping": "avgpool1d",
        "stride": 2,
        "text_config.skip_layers": [3],
    }


@pytest.mark.parametrize(
    "tower, good",
    [
        ("google/siglip-so400m-patch14-384", False),
        ("/data/models/InternViT-300M-448px/", False),
        ("OpenGVLab/intern_vit_6b", False),
        ("BAAI/EVA-CLIP-8B", False),
        ("QuanSun/EVA02_CLIP_L_336_psz14", False),
        ("eva", False),
        ("facebook/dinov2-large", False),
        ("laion/CLIP-convnext_large_d_320", False),
        ("apple/mobileclip_l_1024", False),
        ("sam-vit-h", False),
        (" ", False),
        ("openai/clip-vit-large-patch14-336", True),
        ("/home/eva/siglip/clip-vit-large-patch14-336", True),
        ("evaluation/clip", True),
        ("facebook/metaclip-l14-400m", True),
        ("laion/CLIP-ViT-L-14-laion2B", True),
        ("x/sample-clip", True),
    ],
)
def test_towers_that_are_no_clip_are_refused_by_name(tower, good):
    data = {**ORIGINAL, "mm_vision_tower": tower}
    if good:
        assert LlavaConfig.from_hf(data).vision_source == tower
    else:
        assert_refused(data, "mm_vision_tower")


def test_a_converted_config_that_kept_the_originals_keys_is_llava_hf():
    kept = {k: v for k, v in ORIGINAL.items() if k.startswith("mm_")}
    kept |= {"mm_patch_merge_type": "flat", "image_aspect_ratio": "pad"}
    assert LlavaConfig.from_hf({**BASE, **kept}) == LlavaConfig.from_hf(BASE)
    flat = LlavaConfig.from_hf({**ORIGINAL, "model_type": "llava"})
    assert flat.vision_source == ORIGINAL["mm_vision_tower"]
