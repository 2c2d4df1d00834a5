"""What is refused as an adapter: other folders and kinds, settings that are not implemented, and
tensors that do not fit the model.

adapter.py calls these while it reads; load.py calls `find_adapter` before it reads anything else.
Whether the tensors are those that the config names is checked by adapter_targets.py.
"""

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava_min.checks.config_keys import ADAPTER, warn_unknown_keys
from llava_min.checks.regex import is_quick, is_regex
from llava_min.errors import UserError, escape_controls, shorten
from llava_min.names import path_in, to_layout
from llava_min.util.files import check_file, read_json

DAMAGED = "the file is damaged"
# The layouts whose names PEFT's keys can have: transformers 5, from 4.52 on, before, and the
# original LLaVA.
PEFT_LAYOUTS = ("hf_5_memory", "hf_4_52", "hf", "original_lora")
PEFT_PREFIX = "base_model.model."
NOT_GIVEN = (None, [], {})
# Keys of adapter_config.json that change the result and are not implemented -> the values that
# change nothing.
NEUTRAL = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    # any other changes the base
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "layer_replication": (False,),
    "lora_bias": (False,),
    "target_parameters": (False,),
    "trainable_token_indices": (False,),
    "alora_invocation_tokens": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "arrow_config": (False,),
    "kasa_config": (False,),
    "monteclora_config": (False,),
    "velora_config": (False,),
}


@dataclass
class StoredAdapter:
    """The content of an adapter's folder, as far as it is read."""

    folder: Path
    data: dict[str, Any]  # adapter_config.json
    files: list[Path]  # the LoRA tensors, then the original LLaVA's projector if there is one
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by our names
    keys: dict[str, str] = field(default_factory=dict)  # our name -> the file's, less PEFT_PREFIX

    def layouts(self) -> Collection[str]:
        """Those of PEFT_LAYOUTS that have all of the adapter's names."""
        fits = lambda layout: all(
            to_layout(name, layout) in (None, key) for name, key in self.keys.items()
        )
        return [layout for layout in PEFT_LAYOUTS if fits(layout)] or PEFT_LAYOUTS

    def name(self, ours: str) -> str:
        """Our name of a tensor or layer in the layout of the adapter's files."""
        return path_in(ours, self.layouts()[0]) or path_in(ours, PEFT_LAYOUTS[0])

    def made_for(self) -> str:
        base = self.data.get("base_model_name_or_path")
        return f", made for {shorten(base, 200)}" if isinstance(base, str) else ""


# ---- the folder


def check_no_adapter(lora_layers: Collection[str], where: str = "") -> None:
    if lora_layers:
        raise UserError(f"{where}the model has an adapter already; load the base again")


def find_adapter(folder: Path) -> None:
    """`folder` holds a PEFT adapter; UserError says what it holds instead, and what to give."""
    inside, path = folder / "adapter", folder / "adapter_config.json"
    if path.exists() and not (folder / ".lock").exists():  # a run of train.py has a lock
        mlx_keys = read_json(path).keys() & {"fine_tune_type", "lora_parameters"}
        if mlx_keys or (folder / "adapters.safetensors").exists():
            raise mlx_error(folder)
        return
    if (inside / "adapter_config.json").exists():
        fix = f"give {inside}"
    elif (folder / "model" / "config.json").exists():
        fix = f"give {folder / 'model'}, a whole model, as model and no adapter"
    elif (folder / "config.json").exists() and "model_type" in read_json(folder / "config.json"):
        fix = "it is a whole model: give it as model and no adapter"
    elif (folder / "state.json").exists():  # of a run that trains no adapter
        fix = f"`python -m llava_min finish {folder} OUT` makes its model; give that as model"
    else:
        check_file(path)
        return
    raise UserError(
        f"{folder}: holds no adapter_config.json, expected the folder of a PEFT adapter; {fix}"
    )


def mlx_error(folder: Path) -> UserError:
    return UserError(
        f"{folder}: an adapter of MLX (mlx-lm, mlx-vlm), expected one of PEFT; convert it: lora_A "
        "and lora_B are lora_a and lora_b transposed, lora_alpha is scale times rank"
    )


def check_files(folder: Path, files: list[Path], projector: Path) -> None:
    """There are LoRA tensors, and beside an adapter of the original LLaVA its projector."""
    if not files:
        raise UserError(
            f"{folder}: no adapter_model.safetensors; give the folder of a PEFT adapter"
        )
    config = folder / "config.json"  # only the original LLaVA writes one
    if not projector.exists() and config.exists() and "mm_projector_type" in read_json(config):
        raise UserError(
            f"{folder}: an adapter of the original LLaVA without {projector.name}, which holds the "
            "projector it was trained with; put the file beside it"
        )


# ---- adapter_config.json


def as_list(value: object) -> list:
    return [] if value in (None, "") else value if isinstance(value, list) else [value]


def is_flag(x: object) -> bool:
    return x in (None, True, False)


def is_rank(x: object) -> bool:
    return type(x) is int and x >= 1


def is_alpha(x: object) -> bool:
    return type(x) in (int, float) and 0 < abs(x) < 1e6


def is_pattern_of(fits: Any) -> Any:
    return lambda x: not x or isinstance(x, dict) and all(map(fits, x.values()))


def is_names_or_regex(x: object) -> bool:
    return is_regex(x) if isinstance(x, str) else all(type(name) is str for name in as_list(x))


def is_regexes(x: object) -> bool:
    return all(type(regex) is str and is_regex(regex) for regex in as_list(x))


def is_numbers(x: object) -> bool:
    return all(type(number) is int for number in as_list(x))


RULES = {  # key -> whether a value is possible, and the possible ones in words
    "use_dora": (is_flag, "true or false"),
    "use_rslora": (is_flag, "true or false"),
    "r": (is_rank, "a whole number from 1"),
    "lora_alpha": (is_alpha, "a number other than 0"),
    "rank_pattern": (is_pattern_of(is_rank), "names of layers, each with its number"),
    "alpha_pattern": (is_pattern_of(is_alpha), "names of layers, each with its number"),
    "target_modules": (lambda x: x and is_names_or_regex(x), "names or a regex"),
    "exclude_modules": (is_names_or_regex, "names or a regex"),
    "layers_pattern": (is_regexes, "names or a regex"),
    "layers_to_transform": (is_numbers, "numbers of layers"),
}


def is_possible(key: str, value: object) -> bool:
    return bool(RULES[key][0](value))


def check_config(path: Path, data: dict[str, Any]) -> None:
    """`data`, the content of adapter_config.json, is valid, and everything that it asks for is
    implemented; a warning for a key that PEFT does not have.
    """
    for key, neutral in NEUTRAL.items():
        if data.get(key) not in (*NOT_GIVEN, *neutral):
            raise UserError(
                f"{path}: {key} is {reprlib.repr(data[key])}, which is not implemented; give an "
                "adapter without it"
            )
    for key, (_, expected) in RULES.items():
        optional = key not in ("r", "target_modules")
        if not (optional and key not in data or is_possible(key, data.get(key))):
            value = reprlib.repr(data.get(key))
            raise UserError(f"{path}: {key} is {value}, expected {expected}; {DAMAGED}")
    for key in ("rank_pattern", "alpha_pattern"):
        for regex in data.get(key) or ():
            if not is_regex(regex) or not is_quick(regex, 2):
                raise UserError(
                    f"{path}: {key} has {shorten(regex, 200)!r}, expected the path of a layer or a "
                    "regex with at most two repetitions; write the layers out"
                )
    warn_unknown_keys(data, path, ADAPTER, "LoraConfig of PEFT")


# ---- tensors


def check_key(
    adapter: StoredAdapter,
    file: Path,
    key: str,
    name: str,
    is_known: bool,
    modules: Mapping[str, nn.Module],
) -> None:
    """The tensor `key` of `file` has a place in the model, and is the first to have it.

    name: ours, or the file's if it has no translation. is_known: whether the model, with LoRA, has
    a tensor of that name. modules: the model's, by path.
    """
    where = f"{file}: {escape_controls(key)[:200]}"
    if is_known and name in adapter.tensors:
        raise UserError(f"{where} is there twice; {DAMAGED}")
    if is_known:
        return
    path, lora, end = name.partition(".lora_")
    if lora and end in ("a", "b"):
        raise mlx_error(adapter.folder)
    layer = modules.get(path) if lora else None
    if layer is not None and not hasattr(layer, "in_features"):
        raise UserError(
            f"{where} is LoRA on a layer of kind {type(layer).__name__}, expected linear layers, "
            "as nothing else is implemented; merge the adapter into its base with peft, and give "
            "that"
        )
    layer = modules.get(name.removesuffix(".weight"))
    if hasattr(layer, "in_features") and getattr(layer, "weight", None) is None:
        raise UserError(
            f"{where} is the whole weight of a layer that is quantized here, where only LoRA fits; "
            "give the 16-bit checkpoint, or merge the adapter into that"
        )
    made_for = adapter.made_for()
    raise UserError(
        f"{where} has no place in this model; the adapter belongs to another base{made_for}"
    )


def check_tensor(
    adapter: StoredAdapter,
    file: Path,
    key: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    is_valid: bool,
) -> None:
    """The tensor `key` of `file` has the `shape` that is expected, and valid numbers."""
    where = f"{file}: {escape_controls(key)[:200]}"
    if tensor.shape != shape:
        raise UserError(
            f"{where} is {list(tensor.shape)}, expected {list(shape)}; the adapter has another "
            f"rank or base{adapter.made_for()}"
        )
    if not is_valid:
        raise UserError(f"{where} holds {tensor.dtype}, NaN or infinity; {DAMAGED}")
