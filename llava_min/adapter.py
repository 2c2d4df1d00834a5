"""LoRA adapters as PEFT folders, read and written.

An adapter holds the LoRA tensors and every other module that was trained with them (PEFT's
modules_to_save), in fp32. Follows PEFT 0.21, whose keys repeat the module paths of transformers;
names.py translates them. Everything that is refused is refused by checks/adapter.py, before the
model is changed.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from llava_min.checks.adapter import (
    PEFT_PREFIX,
    StoredAdapter,
    check_config,
    check_files,
    check_key,
    check_no_adapter,
    check_tensor,
    find_adapter,
)
from llava_min.checks.adapter_targets import check_complete, warn_of_mismatch
from llava_min.lora import LoRAConfig, linear_layers, lora_layers, matches, wrap_linears
from llava_min.names import path_in, to_ours
from llava_min.tensors import FLOATS, open_file, save_tensors
from llava_min.util.files import read_json, write_json
from llava_min.weights import is_finite


def read_adapter(
    model: nn.Module, folder: Path, source: str | Path | None = None
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The adapter of `folder`, our name -> tensor, checked against `model`, which may be on meta.

    source: where the model came from; a warning if the adapter was made for another. Raises
    UserError for an adapter that does not fit the model or is not implemented.
    """
    check_no_adapter(lora_layers(model), f"{folder}: ")
    find_adapter(folder)
    data = read_json(folder / "adapter_config.json")
    check_config(folder / "adapter_config.json", data)
    config = read_config(data)
    adapter = StoredAdapter(folder, data, adapter_files(folder))
    shapes, modules = expected_shapes(model, config), dict(model.named_modules())

    # for each tensor: our name, the right shape, keep
    for file in adapter.files:
        for key, tensor in stored_tensors(file):
            theirs = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
            name = to_ours(theirs)
            check_key(adapter, file, key, name or theirs, name in shapes, modules)
            is_valid = str(tensor.dtype) in FLOATS and is_finite(tensor)
            check_tensor(adapter, file, key, tensor, shapes[name], is_valid)
            adapter.tensors[name], adapter.keys[name] = tensor, theirs

    paths, parameters = lora_paths(adapter.tensors), [n for n, _ in model.named_parameters()]
    check_complete(adapter, paths, list(linear_layers(model)), parameters)
    regexes = [*config.rank_pattern, *config.alpha_pattern]
    unused = [x for x in regexes if not any(matches(path, x) for path in paths)]
    warn_of_mismatch(adapter, unused, source)
    return config, adapter.tensors


def adapter_files(folder: Path) -> list[Path]:
    """The file of the LoRA tensors, and the one where the original LLaVA keeps its projector."""
    files = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    lora, projector = [p for p in files if p.exists()][:1], folder / "non_lora_trainables.bin"
    check_files(folder, lora, projector)
    return [*lora, projector] if projector.exists() else lora


def stored_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    opened = open_file(file)
    for key in opened.keys():
        yield key, opened[key] if file.suffix == ".bin" else opened.get_tensor(key)


def read_config(data: dict) -> LoRAConfig:
    """The LoRAConfig of an adapter_config.json; what it leaves out is as PEFT has it."""
    return LoRAConfig(
        r=data["r"],
        alpha=data.get("lora_alpha", 8),
        dora=bool(data.get("use_dora")),
        rslora=bool(data.get("use_rslora")),
        rank_pattern=data.get("rank_pattern") or {},
        alpha_pattern=data.get("alpha_pattern") or {},
    )


def expected_shapes(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every tensor that an adapter may hold: LoRA's, and the model's own."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for path, layer in linear_layers(model).items():
        r, _ = config.rank_and_scaling(path)
        shapes[f"{path}.lora_A.weight"] = (r, layer.in_features)
        shapes[f"{path}.lora_B.weight"] = (layer.out_features, r)
        if config.dora:
            shapes[f"{path}.lora_magnitude_vector"] = (layer.out_features,)
    return shapes


def lora_paths(tensors: dict[str, Tensor]) -> list[str]:
    """Our paths of the layers whose LoRA tensors are among `tensors`."""
    return sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})


def apply_adapter(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor]) -> None:
    """Put what `read_adapter` returns into `model`, whose weights are there; nothing is trained."""
    lora = {name: x for name, x in tensors.items() if ".lora_" in name}
    # whole modules first, while layers still have their own names
    for name in tensors.keys() - lora.keys():
        model.get_parameter(name).data.copy_(tensors[name])
    wrap_linears(model, config, lora_paths(lora))
    for name, x in lora.items():
        model.get_parameter(name).data.copy_(x)
    model.requires_grad_(False)


def save_adapter(
    model: nn.Module,
    config: LoRAConfig,
    folder: Path,
    base: str,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a PEFT folder: the LoRA tensors and every other trained one, in fp32.

    base: what the adapter was made for, a hub id or path. state: whole tensors of at least
    `adapter_names(model)`, where the model's own are shards.
    """
    names = adapter_names(model)
    state = dict(model.named_parameters()) if state is None else state
    tensors = {name: state[name].detach().float().cpu().contiguous() for name in names}
    save_tensors(
        {PEFT_PREFIX + peft_name(name): x for name, x in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    data = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "target_modules": target_modules(model),
        "modules_to_save": modules_to_save(model, set(names)) or None,
        "use_dora": config.dora,
        "use_rslora": config.rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", data)


def peft_name(name: str) -> str:
    """Our name of a module or tensor as PEFT's keys have it with transformers 5."""
    return path_in(name, "hf_5_memory")


def adapter_names(model: nn.Module) -> list[str]:
    """Our names of the tensors of an adapter of `model`: LoRA's, and whatever else is trained."""
    return [name for name, p in model.named_parameters() if ".lora_" in name or p.requires_grad]


def target_modules(model: nn.Module) -> str:
    """A regex on transformers' paths that matches exactly the layers that have LoRA."""
    adapted = [peft_name(path) for path in lora_layers(model)]
    linear = [peft_name(path.removesuffix(".base")) for path in linear_layers(model)]
    # short if they are all layers of the decoder with these leaf names, else a list of paths
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in adapted)
    regex = rf".*language_model\..*\.({'|'.join(leaves)})"
    is_exact = [path for path in linear if re.fullmatch(regex, path)] == adapted
    return regex if is_exact else "|".join(map(re.escape, adapted))


def modules_to_save(model: nn.Module, names: set[str]) -> list[str]:
    """Paths, from their ends as PEFT matches them, of the largest modules without LoRA that have
    all their parameters among `names`.
    """
    whole: list[str] = []
    for path, module in model.named_modules():  # the outer before the inner
        if path.startswith(tuple(whole)):
            continue
        inside = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if inside and inside <= names and not any(".lora_" in name for name in inside):
            whole.append(path + ".")
    return [peft_name(path).removeprefix("model.").rstrip(".") for path in whole]
