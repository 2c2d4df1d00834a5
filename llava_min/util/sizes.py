"""The shapes of named sizes, for `bench` and `train.py --dry-run`; 7b and 13b are LLaVA-1.5's."""

from llava_min.config import LlavaConfig, TextConfig


def _size(width: int, layers: int, heads: int, mlp: int, image_id=32000, **other) -> LlavaConfig:
    text = dict(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=mlp, num_key_value_heads=heads, head_dim=width // heads,
    )  # fmt: skip
    return LlavaConfig(text=TextConfig(**{**text, **other}), image_token_id=image_id)


_MISTRAL_7B = dict(
    model_type="mistral", num_key_value_heads=8, rope_theta=1e6, max_position_embeddings=32768
)
_QWEN_4B = dict(
    model_type="qwen2", vocab_size=151936, rope_theta=5e6, max_position_embeddings=32768,
    rms_norm_eps=1e-6, bos_token_id=None, eos_token_ids=(151643,),
)  # fmt: skip
SIZES = {
    "300m": _size(1024, 16, 16, 2816),
    "1b": _size(2048, 22, 32, 5632),
    "7b": _size(4096, 32, 32, 11008),
    "13b": _size(5120, 40, 40, 13824),
    "mistral-7b": _size(4096, 32, 32, 14336, **_MISTRAL_7B),
    "qwen1.5-4b": _size(2560, 40, 20, 6912, 151646, **_QWEN_4B),
}
