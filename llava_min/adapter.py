"""Adapters as PEFT folders, in and out: the LoRA tensors, and every other module that is trained with them.

Follows PEFT 0.21, whose keys repeat the module paths of today's transformers. What an adapter's config asks and is not
implemented is refused by name; a tensor without a home is an error.
"""

import re
import reprlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from llava_min.cli import UserError, printable, warn
from llava_min.files import read_json, write_json
from llava_min.layouts import FLOATS, READ, open_file, translate
from llava_min.lora import LINEARS, LoRAConfig, add_lora, is_named, lora_layers, to_transformers
from llava_min.weights import is_finite, save_tensors

PEFT = "base_model.model."
# Keys of adapter_config.json that change the result and are not implemented, and the values that change nothing.
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False,),
         "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others change the base
         **dict.fromkeys(("layer_replication", "lora_bias", "target_parameters", "trainable_token_indices",
                          "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
                          "monteclora_config", "velora_config"), (False,))}


def adapter_names(model: nn.Module) -> list[str]:
    """Our names of the tensors that an adapter of `model` holds: LoRA, and what else is trained."""
    return [name for name, p in model.named_parameters() if ".lora_" in name or p.requires_grad]


def target_pattern(model: nn.Module) -> str:
    """A regex that fits exactly the adapted layers among transformers' paths: by leaf names, or else a list."""
    adapted = [to_transformers(path) for path in lora_layers(model)]
    linear = [to_transformers(name.removesuffix(".base")) for name, m in model.named_modules()
              if hasattr(m, "in_features")]
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in adapted)
    pattern = rf".*language_model\..*\.({'|'.join(leaves)})"
    exact = [path for path in linear if re.fullmatch(pattern, path)] == adapted
    return pattern if exact else "|".join(map(re.escape, adapted))


def whole_modules(model: nn.Module, names: set[str]) -> list[str]:
    """The largest modules all of whose parameters are among `names` and none LoRA: the ends of PEFT's paths."""
    whole: list[str] = []
    for path, m in model.named_modules():  # the outer before the inner
        if path.startswith(tuple(whole)):
            continue
        inside = {f"{path}.{name}" for name, _ in m.named_parameters()}
        if inside and inside <= names and not any(".lora_" in name for name in inside):
            whole.append(path + ".")
    return [to_transformers(path).removeprefix("model.").rstrip(".") for path in whole]


def save_adapter(model: nn.Module, config: LoRAConfig, folder: Path, base: str,
                 state: dict[str, Tensor] | None = None) -> None:
    """Write a PEFT folder: LoRA tensors and every other trained one (`modules_to_save`), in fp32.

    state: whole tensors of at least `adapter_names(model)`, when the model's own are shards.
    """
    names = adapter_names(model)
    state = dict(model.named_parameters()) if state is None else state
    save_tensors({PEFT + to_transformers(name): state[name].detach().float().cpu().contiguous() for name in names},
                 folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.r,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "target_modules": target_pattern(model), "modules_to_save": whole_modules(model, set(names)) or None,
        "use_dora": config.dora, "use_rslora": config.rslora, "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern, "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True})


def is_rank(x: object) -> bool:
    return type(x) is int and x >= 1


def is_alpha(x: object) -> bool:
    return type(x) in (int, float) and 0 < abs(x) < 1e6


def read_pattern(path: Path, key: str, data: object, good: Callable[[object], bool]) -> dict:
    """PEFT's rank_pattern or alpha_pattern. A stranger's regex could run for ever: only simple ones are taken."""
    if not isinstance(data, dict) or not all(map(good, data.values())):
        raise UserError(f"{path}: {key} is {reprlib.repr(data)}, expected names of layers, each with its number; "
                        "the file is damaged")
    for name in data:
        try:
            re.compile(name)
            simple = len(name) <= 200 and len(re.findall(r"[*+?{]", name)) <= 2 and not re.search(r"\)[*+?{]", name)
        except (re.error, RecursionError, OverflowError):
            simple = False
        if not simple:
            raise UserError(f"{path}: {key} has {printable(name)[:200]!r}, expected the path of a layer or a regex "
                            "with at most two repetitions; write the layers out")
    return data


def read_config(path: Path) -> LoRAConfig:
    """`adapter_config.json`; what would change the result and is not implemented is refused by name."""
    data = read_json(path)
    for key, plain in PLAIN.items():
        if data.get(key) not in (None, [], {}, *plain):
            raise UserError(f"{path}: {key} is {reprlib.repr(data[key])}, which is not implemented; "
                            "give an adapter without it")
    for key in ("use_dora", "use_rslora"):
        if data.get(key) not in (None, True, False):
            raise UserError(f"{path}: {key} is {reprlib.repr(data[key])}, expected true or false; "
                            "the file is damaged")
    r, alpha = data.get("r"), data.get("lora_alpha", 8)
    if not is_rank(r) or not is_alpha(alpha):
        raise UserError(f"{path}: r is {reprlib.repr(r)} and lora_alpha {reprlib.repr(alpha)}, expected a "
                        "whole number from 1 and a number other than 0; the file is damaged")
    patterns = [read_pattern(path, key, data.get(key) or {}, good)
                for key, good in (("rank_pattern", is_rank), ("alpha_pattern", is_alpha))]
    return LoRAConfig(r, alpha, 0.0, LINEARS, bool(data.get("use_dora")), bool(data.get("use_rslora")), *patterns)


def read_adapter(model: nn.Module, folder: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The adapter of `folder`, our name -> tensor, checked against `model`, which may still be on meta."""
    if lora_layers(model):
        raise UserError(f"{folder}: the model has an adapter already; load the base anew")
    config = read_config(folder / "adapter_config.json")
    files = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
    files = [p for p in files if p.exists()][:1]
    if not files:
        raise UserError(f"{folder}: no adapter_model.safetensors; give the folder of a PEFT adapter")
    if (projector := folder / "non_lora_trainables.bin").exists():  # the original LLaVA's
        files.append(projector)
    elif (folder / "config.json").exists() and "mm_projector_type" in read_json(folder / "config.json"):
        raise UserError(f"{folder}: an adapter of the original LLaVA without non_lora_trainables.bin, which holds "
                        "the projector it was trained with; put the file beside it")
    want = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, m in model.named_modules():
        if hasattr(m, "in_features"):
            r, _ = config.of(name)
            want[f"{name}.lora_A.weight"] = (r, m.in_features)
            want[f"{name}.lora_B.weight"] = (m.out_features, r)
            if config.dora:
                want[f"{name}.lora_magnitude_vector"] = (m.out_features,)
    tensors: dict[str, Tensor] = {}
    whole: list[str] = []
    for file in files:
        handle = open_file(file)
        for key in handle.keys():
            tensor = handle[key] if file.suffix == ".bin" else handle.get_tensor(key)
            name = translate(key.removeprefix(PEFT).replace(".base_layer.", "."), READ)
            where = f"{file}: {printable(key)[:200]}"
            if name not in want:
                raise UserError(f"{where} has no home in this model; the adapter belongs to another base")
            if name in tensors:
                raise UserError(f"{where} stands twice; the file is damaged")
            if tensor.shape != want[name]:
                raise UserError(f"{where} is {list(tensor.shape)}, expected {list(want[name])}; "
                                "the adapter has another rank or base")
            if str(tensor.dtype) not in FLOATS or not is_finite(tensor):
                raise UserError(f"{where} holds {tensor.dtype}, NaN or infinity; the file is damaged")
            tensors[name] = tensor
            if ".lora_" not in name:
                whole.append(f".{key}.{to_transformers(name)}")  # as the file calls it, and as today's transformers
    paths = lora_paths(tensors)
    ends = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if config.dora else []))
    if missing := sorted({f"{path}.{end}" for path in paths for end in ends} - tensors.keys()):
        raise UserError(f"{files[0]}: {missing[0]} is missing and its other half is there; the file is damaged")
    if not paths:
        raise UserError(f"{files[0]}: no LoRA tensor; give the folder of a PEFT adapter")
    for key in [*config.rank_pattern, *config.alpha_pattern]:
        if not any(is_named(path, key) for path in paths):
            warn(f"{folder}: the pattern {printable(key)} names no layer of the adapter")
    saved = read_json(folder / "adapter_config.json").get("modules_to_save") or []
    for module in saved if isinstance(saved, list) else [saved]:
        if not any(f".{module}." in name for name in whole):
            raise UserError(f"{files[0]}: no tensor of {printable(module)[:200]}, which modules_to_save names; "
                            "the file is damaged")
    return config, tensors


def lora_paths(tensors: dict[str, Tensor]) -> list[str]:
    return sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})


def apply_adapter(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor]) -> None:
    pairs = {name: x for name, x in tensors.items() if ".lora_" in name}
    for name in tensors.keys() - pairs.keys():  # whole tensors first, while layers have their own names
        model.get_parameter(name).data.copy_(tensors[name])
    add_lora(model, config, lora_paths(pairs))
    for name, x in pairs.items():
        model.get_parameter(name).data.copy_(x)
    model.requires_grad_(False)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Apply the PEFT adapter of `folder` to `model`, unmerged; UserError for a tensor without a home."""
    apply_adapter(model, *read_adapter(model, folder))
