"""Adapters as PEFT folders, in and out: the LoRA tensors, and every other module that is trained
with them.

Follows PEFT 0.21, whose keys repeat the module paths of today's transformers. What an adapter's
config asks and is not implemented is refused by name; a tensor without a home is an error.
"""

import re
import reprlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from llava_min.checks.adapter_kinds import check_implemented, find_adapter
from llava_min.checks.regex import is_quick, is_regex
from llava_min.config import LINEARS
from llava_min.errors import UserError, escape_controls, shorten, warn
from llava_min.layouts import FLOATS, open_file
from llava_min.lora import LoRAConfig, add_lora, is_named, lora_layers
from llava_min.names import path_in, to_layout, to_ours
from llava_min.util.files import read_json, write_json
from llava_min.weights import is_finite, save_tensors

PEFT = "base_model.model."
# Keys of adapter_config.json that change the result and are not implemented, and the values that
# change nothing.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    # the others change the base
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(
        (
            "layer_replication",
            "lora_bias",
            "target_parameters",
            "trainable_token_indices",
            "alora_invocation_tokens",
            "use_qalora",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
            "velora_config",
        ),
        (False,),
    ),
}
# What an adapter was made with -> the layout whose paths its keys repeat: transformers 5, from 4.52
# on, before, and the original LLaVA.
PEFT_LAYOUTS = ("hf_5_memory", "hf_4_52", "hf", "original_lora")


def today(path: str) -> str:
    """Our path of a module or tensor as PEFT's keys have it with transformers 5."""
    return path_in(path, "hf_5_memory")


def adapter_names(model: nn.Module) -> list[str]:
    """Our names of the tensors that an adapter of `model` holds: LoRA, and what else is trained."""
    return [name for name, p in model.named_parameters() if ".lora_" in name or p.requires_grad]


def target_pattern(model: nn.Module) -> str:
    """A regex that fits exactly the adapted layers among transformers' paths: by leaf names, or
    else a list.
    """
    adapted = [today(path) for path in lora_layers(model)]
    linear = [
        today(name.removesuffix(".base"))
        for name, m in model.named_modules()
        if hasattr(m, "in_features")
    ]
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in adapted)
    pattern = rf".*language_model\..*\.({'|'.join(leaves)})"
    exact = [path for path in linear if re.fullmatch(pattern, path)] == adapted
    return pattern if exact else "|".join(map(re.escape, adapted))


def whole_modules(model: nn.Module, names: set[str]) -> list[str]:
    """The largest modules all of whose parameters are among `names` and none LoRA: the ends of
    PEFT's paths.
    """
    whole: list[str] = []
    for path, m in model.named_modules():  # the outer before the inner
        if path.startswith(tuple(whole)):
            continue
        inside = {f"{path}.{name}" for name, _ in m.named_parameters()}
        if inside and inside <= names and not any(".lora_" in name for name in inside):
            whole.append(path + ".")
    return [today(path).removeprefix("model.").rstrip(".") for path in whole]


def save_adapter(
    model: nn.Module,
    config: LoRAConfig,
    folder: Path,
    base: str,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a PEFT folder: LoRA tensors and every other trained one (`modules_to_save`), in fp32.

    state: whole tensors of at least `adapter_names(model)`, when the model's own are shards.
    """
    names = adapter_names(model)
    state = dict(model.named_parameters()) if state is None else state
    save_tensors(
        {PEFT + today(name): state[name].detach().float().cpu().contiguous() for name in names},
        folder / "adapter_model.safetensors",
    )
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": config.r,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "bias": "none",
            "target_modules": target_pattern(model),
            "modules_to_save": whole_modules(model, set(names)) or None,
            "use_dora": config.dora,
            "use_rslora": config.rslora,
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": config.alpha_pattern,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
        },
    )


def is_rank(x: object) -> bool:
    return type(x) is int and x >= 1


def is_alpha(x: object) -> bool:
    return type(x) in (int, float) and 0 < abs(x) < 1e6


def read_pattern(path: Path, key: str, data: object, good: Callable[[object], bool]) -> dict:
    """PEFT's rank_pattern or alpha_pattern; only simple regexes are taken."""
    if not isinstance(data, dict) or not all(map(good, data.values())):
        raise UserError(
            f"{path}: {key} is {reprlib.repr(data)}, expected names of layers, each with its "
            "number; "
            "the file is damaged"
        )
    for name in data:
        if not is_regex(name) or not is_quick(name, 2):
            raise UserError(
                f"{path}: {key} has {escape_controls(name)[:200]!r}, expected the path of a layer "
                "or a regex "
                "with at most two repetitions; write the layers out"
            )
    return data


def lora_config(path: Path, data: dict) -> LoRAConfig:
    """`data`, the adapter_config.json of `path`; what would change the result and is not
    implemented is refused by name.
    """
    for key, plain in PLAIN.items():
        if data.get(key) not in (None, [], {}, *plain):
            raise UserError(
                f"{path}: {key} is {reprlib.repr(data[key])}, which is not implemented; "
                "give an adapter without it"
            )
    for key in ("use_dora", "use_rslora"):
        if data.get(key) not in (None, True, False):
            raise UserError(
                f"{path}: {key} is {reprlib.repr(data[key])}, expected true or false; "
                "the file is damaged"
            )
    r, alpha = data.get("r"), data.get("lora_alpha", 8)
    if not is_rank(r) or not is_alpha(alpha):
        raise UserError(
            f"{path}: r is {reprlib.repr(r)} and lora_alpha {reprlib.repr(alpha)}, expected a "
            "whole number from 1 and a number other than 0; the file is damaged"
        )
    patterns = [
        read_pattern(path, key, data.get(key) or {}, good)
        for key, good in (("rank_pattern", is_rank), ("alpha_pattern", is_alpha))
    ]
    return LoRAConfig(
        r, alpha, 0.0, LINEARS, bool(data.get("use_dora")), bool(data.get("use_rslora")), *patterns
    )


def is_target(name: str, data: dict) -> bool:
    """Whether peft, by an `adapter_config.json`, adapts the layer of that name
    (`check_target_module_exists` there).
    """
    targets, layers = data["target_modules"], data.get("layers_to_transform")
    if targets == "all-linear":
        return not name.endswith("lm_head")

    def fits(keys: str | list[str]) -> bool:
        return (
            bool(re.fullmatch(keys, name))
            if isinstance(keys, str)
            else any(f".{name}".endswith(f".{key}") for key in keys)
        )

    if fits(data.get("exclude_modules") or []) or not fits(targets):
        return False
    if any(f".{module}." in f".{name}." for module in listed(data.get("modules_to_save"))):
        return False
    if isinstance(targets, str) or layers in (None, []):
        return True
    found = (
        re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name)
        for pattern in listed(data.get("layers_pattern")) or [r"[^.]*"]
    )
    return next((int(m[1]) in listed(layers) for m in found if m), False)


def called(name: str, layouts: list[str]) -> str:
    """Our name of a tensor or layer as the adapter's own keys have it, without PEFT's prefix."""
    return path_in(name, layouts[0]) or today(name)


def listed(value: object) -> list:
    return [] if value in (None, "") else value if isinstance(value, list) else [value]


def check_layers(
    path: Path, data: dict, layers: list[str], adapted: list[str], layouts: list[str]
) -> None:
    """`adapted` are those, and all those, of `layers` that target_modules names, called as in one
    of `layouts`.
    """
    quick = True
    for key in ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"):
        value, kind = data.get(key), int if key == "layers_to_transform" else str
        good = all(type(x) is kind for x in listed(value)) and (value or key != "target_modules")
        regexes = listed(value) if good and (key == "layers_pattern" or type(value) is str) else []
        if not good or not all(map(is_regex, regexes)):
            raise UserError(
                f"{path}: {key} is {reprlib.repr(value)}, expected "
                f"{'numbers of layers' if kind is int else 'names or a regex'}; the "
                "file is damaged"
            )
        quick = quick and all(is_quick(x, 5, 1 << 17) for x in regexes)
    if not quick:
        warn(
            f"{path}: has a regex of too many repetitions; whether all layers that it names are "
            "there is not checked"
        )
        return

    def aims(layer: str, layout: str) -> bool:
        name = path_in(layer, layout)
        return name is not None and is_target(name, data)

    if missing := [
        x for x in layers if x not in adapted and all(aims(x, layout) for layout in layouts)
    ]:
        raise UserError(
            f"{path.parent}: {len(missing)} layers that target_modules names have no LoRA tensors, "
            "the first is "
            f"{called(missing[0], layouts)}; the adapter is damaged"
        )
    if extra := [x for x in adapted if not any(aims(x, layout) for layout in PEFT_LAYOUTS)]:
        raise UserError(
            f"{path.parent}: there are LoRA tensors of {called(extra[0], layouts)}, "
            f"which target_modules "
            f"{reprlib.repr(data['target_modules'])} does not name; the adapter is "
            "damaged"
        )


def check_whole(
    file: Path, data: dict, names: list[str], tensors: dict[str, Tensor], layouts: list[str]
) -> None:
    """Of each module that modules_to_save names, by the end of its path as for peft, every
    parameter is there.
    """
    for module in listed(data.get("modules_to_save")):
        inside = [
            name
            for name in names
            if isinstance(module, str)
            and module
            and any(f"{module}." in (to_layout(name, layout) or "") for layout in layouts)
        ]
        if not any(name in tensors for name in inside):
            raise UserError(
                f"{file}: no tensor of {escape_controls(module)[:200]}, which modules_to_save "
                "names; "
                "the file is damaged"
            )
        if missing := [name for name in inside if name not in tensors]:
            raise UserError(
                f"{file}: {called(missing[0], layouts)} is missing, of "
                f"{escape_controls(module)[:200]}, which "
                "modules_to_save names; the file is damaged"
            )


def read_adapter(
    model: nn.Module, folder: Path, source: str | Path | None = None
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The adapter of `folder`, our name -> tensor, checked against `model`, which may still be on
    meta.

    source: what the model is called; a warning where the adapter was made for another.
    """
    if lora_layers(model):
        raise UserError(f"{folder}: the model has an adapter already; load the base anew")
    find_adapter(folder)
    data = read_json(path := folder / "adapter_config.json")
    config = lora_config(path, data)
    base = data.get("base_model_name_or_path")
    made = f", made for {shorten(base, 200)}" if isinstance(base, str) else ""
    files = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
    files = [p for p in files if p.exists()][:1]
    if not files:
        raise UserError(
            f"{folder}: no adapter_model.safetensors; give the folder of a PEFT adapter"
        )
    if (projector := folder / "non_lora_trainables.bin").exists():  # the original LLaVA's
        files.append(projector)
    elif (folder / "config.json").exists() and "mm_projector_type" in read_json(
        folder / "config.json"
    ):
        raise UserError(
            f"{folder}: an adapter of the original LLaVA without non_lora_trainables.bin, which "
            "holds "
            "the projector it was trained with; put the file beside it"
        )
    want = {name: tuple(p.shape) for name, p in model.named_parameters()}
    plain, layers = list(want), []
    for name, m in model.named_modules():
        if hasattr(m, "in_features"):
            layers.append(name)
            r, _ = config.of(name)
            want[f"{name}.lora_A.weight"] = (r, m.in_features)
            want[f"{name}.lora_B.weight"] = (m.out_features, r)
            if config.dora:
                want[f"{name}.lora_magnitude_vector"] = (m.out_features,)
    tensors: dict[str, Tensor] = {}
    stored: dict[str, str] = {}  # our name -> the file's
    for file in files:
        handle = open_file(file)
        for key in handle.keys():
            tensor = handle[key] if file.suffix == ".bin" else handle.get_tensor(key)
            theirs = key.removeprefix(PEFT).replace(".base_layer.", ".")
            name = to_ours(theirs)
            where = f"{file}: {escape_controls(key)[:200]}"
            if name not in want:
                check_implemented(model, folder, where, name or theirs)
                raise UserError(
                    f"{where} has no home in this model; the adapter belongs to another base{made}"
                )
            if name in tensors:
                raise UserError(f"{where} stands twice; the file is damaged")
            if tensor.shape != want[name]:
                raise UserError(
                    f"{where} is {list(tensor.shape)}, expected {list(want[name])}; "
                    f"the adapter has another rank or base{made}"
                )
            if str(tensor.dtype) not in FLOATS or not is_finite(tensor):
                raise UserError(
                    f"{where} holds {tensor.dtype}, NaN or infinity; the file is damaged"
                )
            tensors[name], stored[name] = tensor, theirs
    if "language_model.embed_tokens.weight" in tensors and "lm_head.weight" not in want:
        raise UserError(
            f"{folder}: has embeddings of its own, and the base ties its head to them, which PEFT "
            "then does not; merge it "
            "into the base with peft"
        )
    paths = lora_paths(tensors)
    ends = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if config.dora else []))
    if missing := sorted({f"{path}.{end}" for path in paths for end in ends} - tensors.keys()):
        path, _, end = missing[0].partition(".lora_")
        half = next(theirs for name, theirs in stored.items() if name.startswith(f"{path}.lora_"))
        raise UserError(
            f"{files[0]}: {PEFT}{half.partition('.lora_')[0]}.lora_{end} is missing "
            f"and its other half is "
            "there; the file is damaged"
        )
    if not paths:
        raise UserError(f"{files[0]}: no LoRA tensor; give the folder of a PEFT adapter")
    for key in [*config.rank_pattern, *config.alpha_pattern]:
        if not any(is_named(path, key) for path in paths):
            warn(f"{folder}: the pattern {escape_controls(key)} names no layer of the adapter")
    layouts = [
        x
        for x in PEFT_LAYOUTS
        if all(to_layout(name, x) in (None, theirs) for name, theirs in stored.items())
    ] or PEFT_LAYOUTS
    check_whole(files[0], data, plain, tensors, layouts)
    if projector.exists() and (
        missing := [n for n in plain if n.startswith("multi_modal_projector.") and n not in tensors]
    ):
        raise UserError(
            f"{projector}: {called(missing[0], layouts)} is missing, and the original "
            f"LLaVA trains the whole projector; "
            "the file is damaged"
        )
    check_layers(path, data, layers, paths, layouts)
    if source is not None and isinstance(base, str) and Path(base).name != Path(source).name:
        warn(f"{folder}: was made for {base}, and is applied to {source}")
    return config, tensors


def lora_paths(tensors: dict[str, Tensor]) -> list[str]:
    return sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})


def apply_adapter(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor]) -> None:
    pairs = {name: x for name, x in tensors.items() if ".lora_" in name}
    # whole tensors first, while layers have their own names
    for name in tensors.keys() - pairs.keys():
        model.get_parameter(name).data.copy_(tensors[name])
    add_lora(model, config, lora_paths(pairs))
    for name, x in pairs.items():
        model.get_parameter(name).data.copy_(x)
    model.requires_grad_(False)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Apply the PEFT adapter of `folder` to `model`, unmerged; UserError for a tensor without a
    home.
    """
    apply_adapter(model, *read_adapter(model, folder))
