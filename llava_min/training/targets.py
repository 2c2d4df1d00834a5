"""Which layers get LoRA: by leaf names within the language model, or by a regex in all of it."""

import re

from torch import nn

from llava_min.checks.adapter import check_no_adapter
from llava_min.checks.lora_targets import check_leaf_names, check_matched, check_one_regex
from llava_min.lora import LoRAConfig, linear_layers, lora_layers, wrap_linears


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """LoRA on the layers that `config.targets` names, see `lora_targets` and `wrap_linears`."""
    check_no_adapter(lora_layers(model))
    wrap_linears(model, config, lora_targets(model, config.targets))


def lora_targets(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Our paths of the linear layers that `targets` names.

    "all-linear"    all of the decoder's blocks
    leaf names      those of the language model that are called so, such as q_proj
    one regex       all of the model whose whole path it matches

    Raises UserError for a name or a regex that matches nothing, and for a tied head.
    """
    linear = list(linear_layers(model))
    decoder = [path for path in linear if path.startswith("language_model.")]
    if targets == ("all-linear",):
        return decoder
    if all(re.fullmatch(r"\w+", name) for name in targets):
        leaves = {path: path.rpartition(".")[2] for path in decoder}
        check_leaf_names(targets, set(leaves.values()))
        return [path for path, leaf in leaves.items() if leaf in targets]
    regex = check_one_regex(targets)
    paths = [path for path in linear if re.fullmatch(regex, path)]
    check_matched(regex, paths, model.config.tie_word_embeddings, examples=(decoder[0], linear[0]))
    return paths
