"""The keys that published classes write into config.json and adapter_config.json; any other gets a
warning.

A fork records what it does to the model under a key of its own: `"grouping": "avgpool1d"` pools the
visual tokens, and without it the checkpoint is another model. Sources: transformers 4.31 to 5.23
(PretrainedConfig, LlavaConfig, CLIPConfig, CLIPVisionConfig, LlamaConfig, MistralConfig,
Qwen2Config), and LLaVA's train.py and llava_arch.py; PEFT 0.2 to 0.21 (PeftConfig, LoraConfig).
Whether the value of a known key is implemented is decided in checks/config.py and
checks/adapter.py.
"""

import reprlib
from collections.abc import Set
from pathlib import Path
from typing import Any

from llava_min.errors import preview, shorten, warn_once

# PretrainedConfig: names, versions, the labels of a classifier, how the weights were stored.
BASE = """
    _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation_internal _flash_attn_2_enabled _name_or_path add_cross_attention
    architectures attn_implementation auto_map chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id dtype finetuning_task
    gradient_checkpointing id2label is_decoder is_encoder_decoder label2id model_type num_labels
    output_attentions output_hidden_states prefix problem_type pruned_heads quantization_config
    return_dict sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class torch_dtype torchscript transformers_version
    use_bfloat16 use_return_dict xla_device
"""
# Generation settings, which transformers wrote here before there was a generation_config.json.
GENERATION = """
    bad_words_ids begin_suppress_tokens bos_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    pad_token_id remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p use_cache
"""
# LlamaConfig, MistralConfig, Qwen2Config.
TEXT = """
    attention_bias attention_dropout head_dim hidden_act hidden_size initializer_range
    intermediate_size layer_types max_position_embeddings max_sequence_length max_window_layers
    mlp_bias num_attention_heads num_hidden_layers num_key_value_heads partial_rotary_factor
    pretraining_tp rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    use_sliding_window vocab_size
"""
# CLIPVisionConfig, and CLIPConfig around it.
VISION = """
    attention_dropout dropout hidden_act hidden_size image_size initializer_factor
    initializer_range intermediate_size layer_norm_eps logit_scale_init_value
    num_attention_heads num_channels num_hidden_layers patch_size projection_dim text_config
    text_config_dict vision_config vision_config_dict
"""
# LlavaConfig of transformers.
LLAVA_HF = """
    ignore_index image_seq_length image_token_id image_token_index multimodal_projector_bias
    projector_hidden_act text_config vision_config vision_feature_layer
    vision_feature_select_strategy
"""
# The original LLaVA, 1.0 to 1.6: what its training writes into the config.
ORIGINAL = """
    freeze_mm_mlp_adapter freeze_mm_vision_resampler image_aspect_ratio image_crop_resolution
    image_grid_pinpoints image_split_resolution mm_hidden_size mm_patch_merge_type
    mm_projector_lr mm_projector_type mm_use_im_patch_token mm_use_im_start_end
    mm_vision_select_feature mm_vision_select_layer mm_vision_tower mm_vision_tower_lr
    pretrain_mm_mlp_adapter tokenizer_model_max_length tokenizer_padding_side
    tune_mm_mlp_adapter tune_mm_vision_resampler unfreeze_mm_vision_tower use_mm_proj
    vision_tower
"""
KNOWN = frozenset(" ".join((BASE, GENERATION, TEXT, VISION, LLAVA_HF, ORIGINAL)).split())
# PEFT's PeftConfig and LoraConfig.
ADAPTER = frozenset(
    """
    alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias
    corda_config enable_lora ensure_weight_tying eva_config exclude_modules fan_in_fan_out
    inference_mode init_lora_weights kasa_config layer_replication layers_pattern
    layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
    megatron_config megatron_core merge_weights modules_to_save monteclora_config peft_type
    peft_version qalora_group_size r rank_pattern revision runtime_config target_modules
    target_parameters task_type trainable_token_indices use_bdlora use_dora use_qalora
    use_rslora velora_config
    """.split()
)


def unknown_keys(data: dict[str, Any], known: Set[str] = KNOWN) -> dict[str, Any]:
    """Key -> value of what a file sets and no class has; keys of an inner config are dotted.

    Null, false and what is empty count as left out: a fork writes them where it does not use its
    own option.
    """
    inner = ("vision_config", "text_config")
    parts = {"": data} | {f"{key}.": data[key] for key in inner if isinstance(data.get(key), dict)}
    return {
        prefix + key: value
        for prefix, part in parts.items()
        for key, value in part.items()
        if key not in known and value is not False and value not in (None, "", [], {})
    }


def warn_unknown_keys(
    data: dict[str, Any],
    path: Path,
    known: Set[str] = KNOWN,
    classes: str = "config of LLaVA, CLIP or the decoder",
) -> None:
    """A warning, once, for the keys of the file `path` that no published class has."""
    keys = unknown_keys(data, known)
    if not keys:
        return
    shown = [f"{shorten(key)} = {shorten(reprlib.repr(value))}" for key, value in keys.items()]
    warn_once(
        f"{path}: {preview(shown, ', ', 8)}: no published {classes} has such a key, and it is "
        "not obeyed; if a fork wrote it to change the model, load it with that fork's code"
    )
