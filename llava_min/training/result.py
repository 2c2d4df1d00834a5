"""What a run makes, in files that others read: a PEFT adapter, or a whole model in HF layout."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_min.adapter import adapter_names, save_adapter
from llava_min.data.processor import Processor
from llava_min.llava import Llava
from llava_min.load import write_model
from llava_min.lora import LoRAConfig
from llava_min.parallel.fsdp import full_state
from llava_min.parallel.ranks import World
from llava_min.training.checkpoint import restore, verify
from llava_min.util.files import new_folder


@dataclass
class Result:
    """The model of a run and how it is stored. `kind` is also the name of its folder."""

    model: Llava
    processor: Processor
    lora: LoRAConfig
    config: Any  # train.py's TrainConfig
    dtype: torch.dtype  # of a whole model; an adapter is fp32

    @property
    def kind(self) -> str:
        return "adapter" if self.config.train == "lora" else "model"

    def gather(self) -> dict[str, Tensor]:
        """The whole tensors of the result, on rank 0. All ranks call this."""
        if self.kind == "adapter":
            return full_state(self.model, set(adapter_names(self.model)))
        return full_state(self.model, None, self.dtype)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Fill `folder` with the result; `weights` is what `gather` gave."""
        if self.kind == "adapter":
            save_adapter(self.model, self.lora, folder, self.config.model, weights)
            self.processor.save_settings(folder)
        else:
            write_model(self.model, self.processor, folder, self.dtype, weights)

    def write(self, out: Path, best: Path | None, world: World) -> None:
        """Write `out`/adapter or `out`/model: of the checkpoint `best`, or None for the end."""
        if best:
            state = verify(best)
            if self.kind == "model":
                restore(best, state, self.model, None, world)
        weights = self.gather()
        if world.rank:
            return
        with new_folder(out / self.kind) as folder:
            if best and self.kind == "adapter":
                shutil.copytree(best / self.kind, folder, dirs_exist_ok=True)
            else:
                self.export(folder, weights)
