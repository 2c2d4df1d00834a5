"""QLoRA sharded: on two ranks a quantized layer's tensors are split by FSDP2 like any weight, and
its product and gradient are those of one rank, whatever the storage.
"""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from llava_min.parallel.dtensor import local_rows, local_shard
from llava_min.quant.methods import METHODS, quantized
from llava_min.tensors import list_tensors, save_tensors
from llava_min.weights import load_weights

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not in this torch")


class Adapted(nn.Module):
    """A quantized layer with a low-rank update that learns."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Parameter(torch.randn(4, 128)), nn.Parameter(torch.randn(66, 4))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class Model(nn.Sequential):
    def tie_weights(self) -> None:
        pass


def loaded_on_meta(method: str, layer: nn.Linear, file: Path) -> nn.Module:
    """The layer, quantized and sharded while it is on meta, then filled from a file."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        empty = nn.Linear(128, 66, dtype=torch.bfloat16).requires_grad_(False)
        model = Model(Adapted(quantized(empty, method)))
    fully_shard(model[0])
    fully_shard(model)
    save_tensors({f"0.{name}": x for name, x in layer.state_dict().items()}, file)
    entries = {info.name: info for info in list_tensors(file)}
    load_weights(model, entries, torch.bfloat16, torch.device("cpu"))
    return model


def check(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for method in METHODS:
        torch.manual_seed(0)
        layer = nn.Linear(128, 66, dtype=torch.bfloat16).requires_grad_(False)
        one = Adapted(quantized(layer, method))
        model = nn.Sequential(copy.deepcopy(one))
        fully_shard(model[0])
        fully_shard(model)
        assert model[0].base.weight_packed.to_local().numel() < one.base.weight_packed.numel()
        x = torch.randn(3, 128)
        outputs, grads = [], []
        for f in (model, one):
            z = x.clone().requires_grad_()
            y = f(z)
            y.square().sum().backward()
            outputs.append(y.detach())
            grads.append(z.grad)
        assert torch.equal(*outputs) and torch.equal(*grads), method

        filled = loaded_on_meta(method, layer, Path(folder, f"{method}-{rank}.safetensors"))
        for name, p in filled[0].base.named_parameters():
            first, end = local_rows(p)
            whole = one.base.get_parameter(name)
            assert end - first <= (len(whole) + 1) // 2
            assert torch.equal(local_shard(p), whole[first:end]), (method, name)
    dist.destroy_process_group()
    Path(folder, f"done-{rank}").touch()


def test_two_ranks_are_one(tmp_path):
    mp.start_processes(check, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert sorted(p.name for p in tmp_path.glob("done-*")) == ["done-0", "done-1"]
