"""The tensors of a checkpoint: their names, and how each rank reads the rows it holds."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llava_min.errors import UserError
from llava_min.parallel.dtensor import is_sharded, local_rows, local_shard
from llava_min.training.durable import DTYPES_BY_NAME

# A tensor is stored under the name of its parameter; the optimizer's state of that parameter under
# "exp_avg of NAME", and the random streams of a rank under "rng torch" and "rng cuda".
OF, RNG = " of ", "rng "


def slot_name(slot: str, parameter: str) -> str:
    """The stored name of one value the optimizer keeps for a parameter, such as `exp_avg`."""
    return f"{slot}{OF}{parameter}"


def split_slot_name(name: str) -> tuple[str, str]:
    """(slot, parameter) of a `slot_name`."""
    slot, _, parameter = name.partition(OF)
    return slot, parameter


def trained_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trainable tensors and the optimizer's state of them by stored name, as (tensors, scalars)."""
    tensors, scalars = {}, {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        tensors[name] = p.detach()
        for slot, value in (optimizer.state.get(p, {}) if optimizer else {}).items():
            if not isinstance(value, Tensor):
                scalars[slot_name(slot, name)] = value
                continue
            if is_sharded(p) and value.dim() and not is_sharded(value):
                raise UserError(
                    f"its {slot} is not sharded over the ranks as the parameters are; run on one "
                    "process",
                    "optimizer",
                )
            tensors[slot_name(slot, name)] = value
    return tensors, scalars


class StoredTensors:
    """The tensors of all rank files; each rank reads only the rows it holds."""

    def __init__(self, folder: Path, state: dict[str, Any]):
        paths = [folder / f"rank-{k}.safetensors" for k in range(state["ranks"])]
        self.files = [safe_open(path, framework="pt") for path in paths]
        self.rows = state["rows"]

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Fill this rank's rows of `tensor` from the files that have them."""
        mine = local_shard(tensor)
        if not tensor.dim():
            mine.copy_(self.files[0].get_tensor(name))
            return
        first, end = local_rows(tensor)
        for file, rows in zip(self.files, self.rows):
            low, high = rows.get(name, (0, 0))
            a, b = max(low, first), min(high, end)
            if a < b:
                mine[a - first : b - first].copy_(file.get_slice(name)[a - low : b - low])

    def dtype(self, name: str) -> torch.dtype:
        file = next(file for file in self.files if name in file.keys())
        return DTYPES_BY_NAME[file.get_slice(name).get_dtype()]

    def rng_streams(self, rank: int) -> dict[str, Tensor]:
        file = self.files[rank]
        names = [name for name in file.keys() if name.startswith(RNG)]
        return {name.removeprefix(RNG): file.get_tensor(name) for name in names}
