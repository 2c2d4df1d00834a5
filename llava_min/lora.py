"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = W x + (alpha / r) B A x, with W frozen.

Swapped in from outside: a layer that is to learn is replaced by one that wraps it; no model file hears of it.
Adapters are read and written as PEFT folders, the projector in them when it was trained.
"""

import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_min.cli import UserError, printable
from llava_min.files import read_json, write_json
from llava_min.weights import FLOATS, READ, is_finite, open_file, save_tensors, translate

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a decoder block
PEFT = "base_model.model."
# Our prefix -> the module path in transformers of today, which PEFT's keys repeat.
PATHS = [("vision_tower.layers.", "model.vision_tower.encoder.layers."), ("lm_head.", "lm_head."),
         ("", "model.")]


@dataclass(frozen=True)
class LoRAConfig:
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS  # leaf names within the language model


class LoRALinear(nn.Module):
    """A linear-like `base` (in_features, out_features) plus a low-rank update that starts at zero."""

    def __init__(self, base: nn.Module, config: LoRAConfig):
        super().__init__()
        self.base, self.dropout, self.scaling = base, config.dropout, config.alpha / config.r
        device = next(base.parameters()).device
        self.lora_A = nn.Linear(base.in_features, config.r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(config.r, base.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(x, self.dropout, self.training)
        kind, dtype = x.device.type, self.lora_A.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        update = self.lora_B(self.lora_A(h.to(dtype)))
        return self.base(x) + (self.scaling * update).to(x.dtype)


def targets_of(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Full paths of the layers that `config` names, within the language model only."""
    paths = [name for name, m in model.language_model.named_modules(prefix="language_model")
             if name.rsplit(".", 1)[-1] in config.targets and hasattr(m, "in_features")]
    found = {p.rsplit(".", 1)[-1] for p in paths}
    if absent := [t for t in config.targets if t not in found]:
        raise UserError(f"lora targets: {absent[0]!r} names no linear layer of the language model; "
                        f"there are {', '.join(LINEARS)}")
    return paths


def add_lora(model: nn.Module, config: LoRAConfig, paths: list[str] | None = None) -> None:
    """Put a LoRALinear in the place of each layer of `paths`, by default those that `config` names."""
    for path in targets_of(model, config) if paths is None else paths:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoRALinear(model.get_submodule(path), config))


def adapter_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(PEFT's key, tensor) of everything an adapter of `model` holds: LoRA, and what else is trainable."""
    for name, p in model.named_parameters():
        if ".lora_" in name or p.requires_grad:
            path = next(theirs + name[len(ours):] for ours, theirs in PATHS if name.startswith(ours))
            yield PEFT + path, p.detach().float()


def save_adapter(model: nn.Module, config: LoRAConfig, folder: Path, base: str) -> None:
    """Write a PEFT folder: LoRA tensors and every other trainable one (`modules_to_save`), in fp32."""
    state = {name: p.contiguous().cpu() for name, p in adapter_state(model)}
    saved = ["multi_modal_projector"] if any("multi_modal_projector" in name for name in state) else None
    save_tensors(state, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.r,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "target_modules": rf".*language_model\..*\.({'|'.join(config.targets)})", "modules_to_save": saved,
        "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True})


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Apply the PEFT adapter of `folder` to `model`, unmerged; UserError for a tensor without a home."""
    apply_adapter(model, *read_adapter(model, folder))


def read_config(path: Path) -> LoRAConfig:
    """`adapter_config.json`; what would change the result and is not implemented is refused by name."""
    data = read_json(path)
    for key, *plain in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False), ("use_rslora", False),
                        ("fan_in_fan_out", False), ("rank_pattern", {}), ("alpha_pattern", {}),
                        ("layer_replication",),
                        # the others change the base
                        ("init_lora_weights", True, False, "gaussian", "orthogonal", "eva")):
        if data.get(key) is not None and data[key] not in plain:
            raise UserError(f"{path}: {key} is {reprlib.repr(data[key])}, which is not implemented; "
                            "give an adapter without it")
    r, alpha = data.get("r"), data.get("lora_alpha", 8)
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not 0 < abs(alpha) < 1e6:
        raise UserError(f"{path}: r is {reprlib.repr(r)} and lora_alpha {reprlib.repr(alpha)}, expected a "
                        "whole number from 1 and a number other than 0; the file is damaged")
    return LoRAConfig(r, alpha)


def read_adapter(model: nn.Module, folder: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The adapter of `folder`, our name -> tensor, checked against `model`, which may still be on meta."""
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise UserError(f"{folder}: the model has an adapter already; load the base anew")
    config = read_config(folder / "adapter_config.json")
    files = [p for end in ("safetensors", "bin") if (p := folder / f"adapter_model.{end}").exists()][:1]
    if not files:
        raise UserError(f"{folder}: no adapter_model.safetensors; give the folder of a PEFT adapter")
    if (projector := folder / "non_lora_trainables.bin").exists():  # where the original LLaVA keeps it
        files.append(projector)
    want = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, m in model.named_modules():
        if hasattr(m, "in_features"):
            want[f"{name}.lora_A.weight"] = (config.r, m.in_features)
            want[f"{name}.lora_B.weight"] = (m.out_features, config.r)
    tensors: dict[str, Tensor] = {}
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
    halves = {f"{path}.lora_{x}.weight" for path in lora_paths(tensors) for x in "AB"}
    if half := sorted(halves - tensors.keys()):
        raise UserError(f"{files[0]}: {half[0]} is missing and its other half is there; the file is damaged")
    if not halves:
        raise UserError(f"{files[0]}: no LoRA tensor; give the folder of a PEFT adapter")
    saved = read_json(folder / "adapter_config.json").get("modules_to_save") or []
    for module in saved if isinstance(saved, list) else [saved]:
        if not any(str(module) in name.split(".") for name in tensors.keys() - halves):
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
