"""What GGUF calls a decoder's tensors and settings, both ways, and its order of q's and k's rows.

As llama.cpp's converter writes them (convert_hf_to_gguf.py, LlamaModel and Qwen2Model). For the
architecture `llama` the rotary turns neighbouring rows of q and k together, where in the Hugging
Face files it turns the two halves of a head: the rows change places. `qwen2` keeps them.
"""

import re
from types import ModuleType

from torch import Tensor

from llava_min.config import TextConfig
from llava_min.errors import UserError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}  # by our model_type
# what llama.cpp has no key for, so that a file that we wrote is read as the model that it was
TEMPLATE_KEY = "llava_min.template"  # its name in data/chat.py
ORIGINAL_KEY = "llava_min.chunks"  # the processor's `original`
LEGACY_KEY = "llava_min.tokenizer_legacy"  # tokenizer_config.json's `legacy`
ASPECT_KEY = "llava_min.image_aspect_ratio"
WHOLE = {  # ours -> theirs
    "language_model.embed_tokens.weight": "token_embd.weight",
    "language_model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OURS = re.compile(r"language_model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_THEIRS = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF files are read and written by the package gguf, which is not installed; "
            "pip install 'llava_min[gguf]'"
        ) from None
    return gguf


def to_gguf(name: str) -> str:
    """Our name of a decoder's tensor -> GGUF's."""
    if name in WHOLE:
        return WHOLE[name]
    layer, part, leaf = _OURS.fullmatch(name).groups()
    return f"blk.{layer}.{IN_BLOCK[part]}.{leaf}"


def from_gguf(name: str) -> str | None:
    """GGUF's name -> ours; None for a tensor that no decoder here has."""
    if whole := next((ours for ours, theirs in WHOLE.items() if theirs == name), None):
        return whole
    if not (m := _THEIRS.fullmatch(name)):
        return None
    part = next((ours for ours, theirs in IN_BLOCK.items() if theirs == m[2]), None)
    return part and f"language_model.layers.{m[1]}.{part}.{m[3]}"


def turned_heads(name: str, config: TextConfig) -> int:
    """How many heads of the tensor `name` have their rows in GGUF's order; 0: it has none."""
    if ARCHITECTURES[config.model_type] != "llama":
        return 0
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0


def interleave(x: Tensor, heads: int) -> Tensor:
    """Rows (H * D, …) of halves (2, D / 2) in each head -> rows of pairs (D / 2, 2)."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def split_halves(x: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def settings(config: TextConfig) -> dict[str, int | float]:
    """Metadata of the decoder, without its architecture's prefix."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
