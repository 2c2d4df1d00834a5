"""QLoRA sharded: on two ranks a quantized layer's tensors are split by FSDP2 like any weight, and
its product and gradient are those of one rank, whatever the storage; so are a run's losses, its
checkpoints and its adapter.
"""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_dist import free_port, succeed
from torch import nn
from training import argv, lines, make_home, train

from llava_min.parallel.dtensor import local_rows, local_shard
from llava_min.quant.methods import METHODS, quantized
from llava_min.tensors import list_tensors, save_tensors
from llava_min.tools.finish import main as finish
from llava_min.tools.quantize import main as quantize
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


# ---- train.py


METHODS_OF_RUNS = ("nf4", "int4")


def settings(home: Path, method: str, out: str, *more: str) -> list[str]:
    """A run of six steps of eight rows, which saves after the third."""
    steps = ["--max-steps", "6", "--save-every", "3", "--batch-size", "4", *more]
    if method == "int4":  # in groups that fit the model
        steps += ["--model", str(home / "int4")]
    else:
        steps += ["--quantize", method, "--dora"]
    return argv(home, home / f"{method}-{out}", *steps)


def two_ranks(home: str, *ports: int) -> None:
    def run(*args: str) -> None:
        # one of its own: a rank that is ahead would meet the store of the other's last run
        os.environ["MASTER_PORT"] = str(next(port))
        train.main(settings(Path(home), *args))

    port = iter(ports)
    for method in METHODS_OF_RUNS:
        run(method, "two")
        checkpoint = Path(home, f"{method}-two", "checkpoints", "step-000003")
        run(method, "resumed", "--resume", str(checkpoint))


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "grad_norm" in line]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_on_two_ranks(tmp_path):
    """It is the run of one process; resumed it is what it was, and its checkpoints finish."""
    home = make_home(tmp_path)
    int4 = ["--method", "int4", "--group-size", "8", "--dtype", "fp32"]
    quantize([str(home / "model"), str(home / "int4"), *int4])
    succeed(two_ranks, str(home), *(free_port() for _ in range(2 * len(METHODS_OF_RUNS))))
    for method in METHODS_OF_RUNS:
        train.main(settings(home, method, "one", "--grad-accum", "2"))
        one, two, resumed = (home / f"{method}-{x}" for x in ("one", "two", "resumed"))
        assert losses(two) == pytest.approx(losses(one), rel=1e-4) and len(losses(two)) == 6
        assert losses(two)[-1] < 0.9 * losses(two)[0]
        assert losses(resumed) == losses(two)[3:]
        a, b, c = (adapter_of(folder / "adapter") for folder in (two, resumed, one))
        assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()
        assert all((a[name] - c[name]).abs().max() < 1e-3 for name in a) and a.keys() == c.keys()
        finish([str(two / "checkpoints" / "step-000006"), str(home / f"{method}-finished")])
        done = adapter_of(home / f"{method}-finished")
        assert all(torch.equal(a[name], done[name]) for name in a) and a.keys() == done.keys()
