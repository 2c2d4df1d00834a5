"""An adapter is complete: both halves of each pair, every layer that target_modules names and no
other, every module that modules_to_save names.

The rules for names are PEFT's (`check_target_module_exists` in
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/tuners_utils.py). Names in messages
are those of the adapter's own files.
"""

import re
import reprlib
from pathlib import Path
from typing import Any

from llava_min.checks.adapter import (
    DAMAGED,
    PEFT_LAYOUTS,
    PEFT_PREFIX,
    StoredAdapter,
    as_list,
)
from llava_min.checks.regex import is_quick
from llava_min.errors import UserError, escape_controls, shorten, warn
from llava_min.names import path_in, to_layout


def check_complete(
    adapter: StoredAdapter, adapted: list[str], linear: list[str], parameters: list[str]
) -> None:
    """adapted, linear: our paths of the layers that have LoRA tensors, and of all linear layers;
    parameters: our names of the model's parameters.
    """
    check_pairs(adapter, adapted)
    check_embeddings(adapter, parameters)
    check_modules_to_save(adapter, parameters)
    check_projector(adapter, parameters)
    check_targets(adapter, adapted, linear)


def check_pairs(adapter: StoredAdapter, adapted: list[str]) -> None:
    """Every layer has A and B, and with DoRA its magnitudes."""
    file, keys = adapter.files[0], adapter.keys
    if not adapted:
        raise UserError(f"{file}: no LoRA tensor; give the folder of a PEFT adapter")
    ends = ["A.weight", "B.weight"] + ["magnitude_vector"] * bool(adapter.data.get("use_dora"))
    needed = {f"{path}.lora_{end}" for path in adapted for end in ends}
    if missing := sorted(needed - keys.keys()):
        path, _, end = missing[0].partition(".lora_")
        other = next(key for name, key in keys.items() if name.startswith(f"{path}.lora_"))
        layer = other.partition(".lora_")[0]
        raise UserError(
            f"{file}: {PEFT_PREFIX}{layer}.lora_{end} is missing and its other half is there; "
            f"{DAMAGED}"
        )


def check_embeddings(adapter: StoredAdapter, parameters: list[str]) -> None:
    """PEFT's copy of the embeddings does not reach a head that is tied to them."""
    is_tied = "lm_head.weight" not in parameters
    if is_tied and "language_model.embed_tokens.weight" in adapter.tensors:
        raise UserError(
            f"{adapter.folder}: has embeddings of its own, and the base ties its head to them, "
            "which PEFT then does not; merge it into the base with peft"
        )


def check_modules_to_save(adapter: StoredAdapter, parameters: list[str]) -> None:
    """Every parameter of a module that modules_to_save names, by the end of its path, is there."""
    file, layouts = adapter.files[0], adapter.layouts()
    for module in as_list(adapter.data.get("modules_to_save")):
        is_name = isinstance(module, str) and module
        named = f"{shorten(module, 200)}, which modules_to_save names; {DAMAGED}"
        inside = [
            name
            for name in parameters
            if is_name and any(f"{module}." in (to_layout(name, x) or "") for x in layouts)
        ]
        missing = [name for name in inside if name not in adapter.tensors]
        if len(missing) == len(inside):
            raise UserError(f"{file}: no tensor of {named}")
        if missing:
            raise UserError(f"{file}: {adapter.name(missing[0])} is missing, of {named}")


def check_projector(adapter: StoredAdapter, parameters: list[str]) -> None:
    """The original LLaVA's file of the projector holds all of it."""
    projector = [name for name in parameters if name.startswith("multi_modal_projector.")]
    missing = [name for name in projector if name not in adapter.tensors]
    if missing and adapter.files[1:]:
        raise UserError(
            f"{adapter.files[1]}: {adapter.name(missing[0])} is missing, and the original LLaVA "
            f"trains the whole projector; {DAMAGED}"
        )


def check_targets(adapter: StoredAdapter, adapted: list[str], linear: list[str]) -> None:
    """The adapted layers are those, and all those, that target_modules names."""
    data, folder = adapter.data, adapter.folder
    regexes = [*as_list(data.get("layers_pattern"))]
    regexes += [x for x in (data["target_modules"], data.get("exclude_modules")) if type(x) is str]
    if not all(is_quick(regex, 5, 1 << 17) for regex in regexes):
        warn(
            f"{folder / 'adapter_config.json'}: has a regex of too many repetitions; whether all "
            "layers that it names are there is not checked"
        )
        return

    def named(path: str, layout: str) -> bool:
        name = path_in(path, layout)
        return name is not None and is_target(name, data)

    # where several layouts are possible, only what is missing in all of them is missing
    layouts, there = adapter.layouts(), set(adapted)
    absent = [path for path in linear if path not in there]
    if missing := [path for path in absent if all(named(path, x) for x in layouts)]:
        raise UserError(
            f"{folder}: {len(missing)} layers that target_modules names have no LoRA tensors, the "
            f"first is {adapter.name(missing[0])}; the adapter is damaged"
        )
    if extra := [path for path in adapted if not any(named(path, x) for x in PEFT_LAYOUTS)]:
        raise UserError(
            f"{folder}: there are LoRA tensors of {adapter.name(extra[0])}, which target_modules "
            f"{reprlib.repr(data['target_modules'])} does not name; the adapter is damaged"
        )


def warn_of_mismatch(adapter: StoredAdapter, unused: list[str], source: str | Path | None) -> None:
    """unused: keys of rank_pattern and alpha_pattern that no layer matches; source: the model's."""
    folder = adapter.folder
    for regex in unused:
        warn(f"{folder}: the pattern {escape_controls(regex)} names no layer of the adapter")
    base = adapter.data.get("base_model_name_or_path")
    if source is not None and isinstance(base, str) and Path(base).name != Path(source).name:
        warn(f"{folder}: was made for {base}, and is applied to {source}")


def is_target(path: str, data: dict[str, Any]) -> bool:
    """Whether PEFT adapts the linear layer at `path`, by the adapter_config.json `data`."""
    targets, layers = data["target_modules"], data.get("layers_to_transform")
    if targets == "all-linear":
        return not path.endswith("lm_head")
    if is_named(path, data.get("exclude_modules")) or not is_named(path, targets):
        return False
    if any(f".{module}." in f".{path}." for module in as_list(data.get("modules_to_save"))):
        return False
    if isinstance(targets, str) or layers in (None, []):
        return True
    # the number after the first pattern that fits is the layer's
    patterns = as_list(data.get("layers_pattern")) or [r"[^.]*"]
    found = (re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", path) for pattern in patterns)
    return next((int(m[1]) in as_list(layers) for m in found if m), False)


def is_named(path: str, names: str | list[str] | None) -> bool:
    """A string is a regex on the whole path; a list has the ends of paths."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, path))
    return any(f".{path}".endswith(f".{name}") for name in names or ())
