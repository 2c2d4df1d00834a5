"""What is given as an adapter and is not PEFT's LoRA on linear layers, each called by its name.

Called by adapter.py, and by load.py before anything else is read.
"""

from pathlib import Path

from torch import nn

from llava_min.errors import UserError
from llava_min.util.files import check_file, read_json


def find_adapter(folder: Path) -> None:
    """`folder` has a PEFT adapter, or UserError that says what it has instead and what to give."""
    inside, path = folder / "adapter", folder / "adapter_config.json"
    if path.exists() and not (folder / ".lock").exists():  # which a run of train.py has
        known = read_json(path).keys() & {"fine_tune_type", "lora_parameters"}
        if known or (folder / "adapters.safetensors").exists():
            raise mlx(folder)
        return
    if (inside / "adapter_config.json").exists():
        mend = f"give {inside}"
    elif (folder / "model" / "config.json").exists():
        mend = f"give {folder / 'model'}, a whole model, as model and no adapter"
    elif (folder / "config.json").exists() and "model_type" in read_json(folder / "config.json"):
        mend = "it is a whole model: give it as model and no adapter"
    else:
        check_file(path)
        return
    raise UserError(
        f"{folder}: holds no adapter_config.json, expected the folder of a PEFT adapter; {mend}"
    )


def mlx(folder: Path) -> UserError:
    return UserError(
        f"{folder}: an adapter of MLX (mlx-lm, mlx-vlm), expected one of PEFT; "
        f"convert it: lora_A and lora_B are "
        "lora_a and lora_b transposed, lora_alpha is scale times rank"
    )


def check_implemented(model: nn.Module, folder: Path, where: str, name: str) -> None:
    """`name`, a tensor without a home in `model`, is of no other kind of adapter, or UserError."""
    path, lora, end = name.partition(".lora_")
    if lora and end in ("a", "b"):
        raise mlx(folder)
    layer = dict(model.named_modules()).get(path) if lora else None
    if layer is not None and not hasattr(layer, "in_features"):
        kind = type(layer).__name__
        raise UserError(
            f"{where} is LoRA on a layer of kind {kind}, expected linear layers, as "
            f"nothing else is "
            "implemented; merge the adapter into its base with peft, and give that"
        )
