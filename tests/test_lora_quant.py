"""LoRA and DoRA over a quantized base: the layer of the dequantized weight plus the update,
gradients included, and nothing of the weight's size is kept.
"""

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llava_min.lora import (
    DoRALinear,
    LoRAConfig,
    LoRALinear,
    full_weight,
    init_lora,
    row_norms,
    wrap_linears,
)
from llava_min.quant.codebook import CodebookLinear
from llava_min.quant.group import GroupLinear
from llava_min.quant.int8 import Int8Linear
from llava_min.quant.linear import QuantLinear
from llava_min.quant.methods import quantize_layers

IN, OUT, R, SCALING = 256, 96, 4, 2.5
BASES = {
    "int4": lambda **k: GroupLinear(IN, OUT, True, bits=4, group_size=64, **k),
    "nf4": lambda **k: CodebookLinear(IN, OUT, True, kind="nf4", **k),
    "int8": lambda **k: Int8Linear(IN, OUT, True, **k),
}
KINDS = [LoRALinear, DoRALinear]


def quantized_base(name: str) -> QuantLinear:
    g = torch.Generator().manual_seed(0)
    base = BASES[name]()
    base.load(torch.randn(OUT, IN, generator=g) * 0.05)
    base.bias.data.normal_(generator=g)
    return base


def trained_layer(kind: type[LoRALinear], base: nn.Module, dropout: float = 0.0) -> LoRALinear:
    """A layer whose update is not zero, and whose magnitudes are not the norms."""
    g = torch.Generator().manual_seed(1)
    layer = kind(base, R, SCALING, dropout)
    layer.init_weights(g)
    layer.lora_B.weight.data.normal_(std=0.1, generator=g)
    if kind is DoRALinear:
        layer.lora_magnitude_vector.data.mul_(1.3)
    return layer


def trained_parameters(layer: LoRALinear) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if name.startswith("lora_")]


def by_definition(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """The paper's formulas, on the whole dequantized weight."""
    w = layer.base.dequantize() + SCALING * layer.lora_B.weight @ layer.lora_A.weight
    if isinstance(layer, DoRALinear):
        w = (layer.lora_magnitude_vector / w.norm(dim=1).detach()).unsqueeze(1) * w
    return F.linear(x, w, layer.base.bias)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_output_and_gradients_are_those_of_the_dequantized_weight(name, kind):
    layer = trained_layer(kind, quantized_base(name))
    parameters, results = trained_parameters(layer), []
    for f in (layer, lambda x: by_definition(layer, x)):
        x = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = f(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    assert len(results[0]) == (5 if kind is DoRALinear else 4)
    assert all(relative(a, b) <= 1e-4 for a, b in zip(*results))
    assert relative(results[0][0], layer.base(x)) > 0.1  # the update is not small


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_it_starts_as_its_base(name, kind):
    base = quantized_base(name)
    layer = kind(base, R, SCALING)
    layer.init_weights(torch.Generator().manual_seed(0))
    x = torch.randn(7, IN)
    assert relative(layer(x), base(x)) <= 1e-6
    if kind is DoRALinear:
        norms = base.dequantize().norm(dim=1)
        assert relative(layer.lora_magnitude_vector.detach(), norms) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_in_autocast_and_with_dropout(name, kind):
    """bf16 is near fp32, and the mean over dropout's draws is the output without dropout."""
    torch.manual_seed(0)
    layer = trained_layer(kind, quantized_base(name), dropout=0.5)
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(3))
    plain = layer.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and relative(y.float(), plain) <= 0.03
        assert layer.train()(x).dtype == torch.bfloat16
    draws = torch.stack([layer(x) for _ in range(300)]).mean(0)
    assert relative(draws, plain) <= 0.05 and relative(layer(x), plain) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_no_weight_is_kept_for_backward(name, kind):
    """Neither autograd nor the layer holds numbers of the weight's size after the forward."""
    layer = trained_layer(kind, quantized_base(name))
    is_wide = lambda t: t.is_floating_point() and t.numel() >= IN * OUT
    saved: list[torch.Size] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.shape)
        assert not is_wide(t)
        return t

    before = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    x = torch.randn(8, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    gc.collect()
    new = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in before]
    assert saved and y.requires_grad and not [t.shape for t in new if is_wide(t)]


@pytest.mark.parametrize("name", BASES)
def test_lengths_of_rows_are_found_without_the_whole_weight(name, monkeypatch):
    """DoRA's, at every step: 64 of 96 rows are made, then the others."""
    layer = trained_layer(DoRALinear, quantized_base(name))
    right = layer.base.dequantize() + SCALING * layer.lora_B.weight @ layer.lora_A.weight
    monkeypatch.setattr("llava_min.quant.linear.PIECE", 64 * IN)
    rows, made = type(layer.base).rows, []
    count = lambda *given: made.append(rows(*given)) or made[-1]
    monkeypatch.setattr(type(layer.base), "rows", count)
    assert relative(layer.norms(), right.norm(dim=1)) <= 1e-6
    assert [len(w) for w in made] == [64, 32]


def check_shards(rank: int, folder: str) -> None:
    """One of two ranks: DoRA under FSDP2 starts with the magnitudes of the whole layer."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in BASES:
        model = nn.Sequential(quantized_base(name))
        wrap_linears(model, LoRAConfig(R, dora=True), ["0"])
        whole = copy.deepcopy(model)
        for module in (model[0], model):
            fully_shard(module)
        for m in (model, whole):
            init_lora(m, 5)
        for (n, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(p.data.full_tensor(), q), (name, n)
        assert torch.equal(model[0].lora_magnitude_vector.full_tensor(), row_norms_of(name))
    dist.destroy_process_group()


def row_norms_of(name: str) -> torch.Tensor:
    return row_norms(quantized_base(name).dequantize(), torch.float32)


def test_shards_start_as_the_whole(tmp_path):
    torch.multiprocessing.spawn(check_shards, (str(tmp_path),), nprocs=2)


class Buffered(nn.Module):
    """A linear-like layer whose weight is a buffer."""

    def __init__(self, device: str):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.register_buffer("packed", torch.zeros(OUT, IN, dtype=torch.int8, device=device))

    def full_weight(self) -> torch.Tensor:
        return self.packed.float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [*BASES.values(), Buffered], ids=[*BASES, "buffers"])
def test_the_update_is_where_the_base_stores_its_weight(base, kind):
    for device in ("meta", "cpu"):
        parameters = trained_parameters(kind(base(device=device), R, SCALING))
        assert {p.device.type for p in parameters} == {device}
        assert {p.dtype for p in parameters} == {torch.float32}


def test_full_weight_of_any_base():
    plain = nn.Linear(IN, OUT)
    assert full_weight(plain) is plain.weight
    for name in BASES:
        base = quantized_base(name)
        assert torch.equal(full_weight(base), base.dequantize())


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_quantized_first_gets_the_same_start(dora):
    """A depends on seed and path alone, whatever the base stores."""
    model = nn.Sequential(nn.Linear(IN, 128), nn.Linear(128, OUT)).requires_grad_(False)
    again = nn.Sequential(nn.Linear(IN, 128), nn.Linear(128, OUT)).requires_grad_(False)
    again.load_state_dict(model.state_dict())
    quantize_layers(again, ["0", "1"], "int4")
    for m in (model, again):
        wrap_linears(m, LoRAConfig(R, dora=dora, targets=()), ["0", "1"])
        init_lora(m, 5)
    assert isinstance(again[0].base, QuantLinear)
    assert all(torch.equal(a.lora_A.weight, b.lora_A.weight) for a, b in zip(model, again))
    x = torch.randn(4, IN)
    assert math.isfinite(relative(again(x), model(x))) and relative(again(x), model(x)) < 0.3
