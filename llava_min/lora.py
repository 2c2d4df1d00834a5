"""LoRA: a frozen linear layer plus a trained update of low rank, y = W x + s B A x.

            x (in)
     ┌────────┴─────────┐ dropout
  ┌──┴───────────┐  ┌───┴────────┐
  │              │  │ A (r, in)  │  random at the start
  │ W (out, in)  │  └──┐      ┌──┘
  │ frozen       │  ┌──┘      └──┐
  │              │  │ B (out, r) │  zero at the start: the update is nothing
  └──┬───────────┘  └───┬────────┘
     └───────(+)────────┘ · s
            y (out)

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) has s = alpha / r; rsLoRA (Kalajdzievski
2023, https://arxiv.org/abs/2312.03732) alpha / sqrt(r). DoRA (Liu et al. 2024,
https://arxiv.org/abs/2402.09353) also learns the length of each row of W + s B A.

Layers, quantized ones too, are wrapped from outside, so no model file knows of LoRA. Which ones is
chosen by training/targets.py or by an adapter's files (adapter.py).
"""

import hashlib
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_min.checks.adapter import check_no_adapter
from llava_min.config import LINEARS
from llava_min.names import path_in
from llava_min.parallel.dtensor import is_sharded, local_rows, local_shard

CHUNK = 1 << 16  # elements of a weight in one piece of `row_norms` on CPU


@dataclass(frozen=True)
class LoRAConfig:
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS  # leaf names, "all-linear" or one regex: training/targets.py
    dora: bool = False
    rslora: bool = False
    # PEFT's exceptions: a regex on the end of a layer's path in transformers -> its rank, its alpha
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def rank_and_scaling(self, path: str) -> tuple[int, float]:
        """r and s of the layer at our `path`; the first pattern that matches wins."""
        r = next((r for regex, r in self.rank_pattern.items() if matches(path, regex)), self.r)
        alphas = (a for regex, a in self.alpha_pattern.items() if matches(path, regex))
        return r, next(alphas, self.alpha) / (r**0.5 if self.rslora else r)


def matches(path: str, regex: str) -> bool:
    """Whether `regex` fits our `path` as transformers names it, today or before 4.52; as in PEFT
    the whole path, or all of it after some dot."""
    names = (path_in(path, "hf_5_memory"), path_in(path, "hf"))
    starts = lambda name: [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
    return any(re.compile(regex).fullmatch(name, i) for name in names for i in starts(name))


def full_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (out, in) of a layer; one that stores it otherwise (quantized, prepacked) has a
    method `full_weight`."""
    weight = layer.full_weight() if hasattr(layer, "full_weight") else layer.weight
    return weight if dtype is None else weight.to(dtype)


def row_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Lengths (out,) of the rows of `weight` (out, in), computed in `dtype`."""
    # in pieces on CPU, where vector_norm makes a copy of its input in `dtype`
    rows = max(1, CHUNK // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    return torch.cat([torch.linalg.vector_norm(w, dim=1, dtype=dtype) for w in weight.split(rows)])


class Matrix(nn.Module):
    """A parameter called as PEFT's, lora_A.weight; without values."""

    def __init__(self, rows: int, columns: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=torch.float32))


class LoRALinear(nn.Module):
    """`base` plus a low-rank update in fp32; `init_weights` gives the update its first values.

    base: any linear layer with in_features and out_features, frozen by the caller. Source:
    https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/layer.py
    """

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, dropout
        device = [*base.parameters(), *base.buffers()][0].device
        self.lora_A = Matrix(r, base.in_features, device)
        self.lora_B = Matrix(base.out_features, r, device)

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + s B A x; x (..., in) -> y (..., out)."""
        shape, x = x.shape, x.flatten(0, -2)  # (rows, in)
        y = self.base(x)  # W x
        y = self.add_update(y, self.dropped(x))  # + s B A x
        return y.unflatten(0, shape[:-1])

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """y (rows, out) += s B A x, with x (rows, in)."""
        ax, b = F.linear(x, self.lora_A.weight), self.lora_B.weight  # (rows, r), (out, r)
        # addmm_ adds into the base's output in place: one pass less over the wide tensor
        return y.addmm_(ax.to(y.dtype), b.to(y.dtype).T, alpha=self.scaling)

    def dropped(self, x: Tensor) -> Tensor:
        """The update's input: x with dropout, in the dtype that A x is computed in."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.lora_A.weight.dtype
        return F.dropout(x.to(dtype), self.dropout, self.training)

    def init_weights(self, generator: torch.Generator) -> None:
        """A as kaiming_uniform(a=sqrt 5) draws it, B zero: the update is nothing."""
        a, bound = self.lora_A.weight, self.lora_A.weight.shape[1] ** -0.5
        # every rank draws all of A and keeps its own rows
        whole = torch.empty(a.shape).uniform_(-bound, bound, generator=generator)
        local_shard(a).copy_(whole[slice(*local_rows(a))])
        local_shard(self.lora_B.weight).zero_()


class DoRALinear(LoRALinear):
    """y = m (W + s B A) x / norm, with the length of each row as norm, a constant in the backward
    pass (section 4.3), and a learned m (out,). As in PEFT, dropout is on the added terms only, with
    d = dropout(x): y = W x + s B A d + (m / norm - 1) (W + s B A) d."""

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0):
        super().__init__(base, r, scaling, dropout)
        m = torch.empty_like(self.lora_B.weight[:, 0])
        self.lora_magnitude_vector = nn.Parameter(m.detach())  # PEFT's name of m

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        shape, x = x.shape, x.flatten(0, -2)  # (rows, in)
        dropped = self.dropped(x)
        y = self.add_update(self.base(x), dropped)  # W x + s B A d
        # factor - 1, because bf16 rounds a factor near 1 to 1
        excess = (self.lora_magnitude_vector / self.norms() - 1).to(y.dtype)
        turned = y  # (W + s B A) d
        if self.dropout and self.training:
            turned = self.add_update(self.base(dropped.to(x.dtype)), dropped)
        bias = getattr(self.base, "bias", None)
        y = torch.addcmul(y, excess, turned if bias is None else turned - bias.to(y.dtype))
        return y.unflatten(0, shape[:-1])

    @torch.no_grad()
    def norms(self) -> Tensor:
        """||W + s B A|| (out,), of each row, from ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2: no other
        matrix of W's size is made."""
        a, b, base = self.lora_A.weight, self.lora_B.weight * self.scaling, self.base
        pieces = base.weight_pieces() if hasattr(base, "weight_pieces") else [full_weight(base)]
        with torch.autocast(a.device.type, enabled=False):
            parts = ((F.linear(w, a.to(w.dtype)), row_norms(w, a.dtype)) for w in pieces)
            wa, norms = map(torch.cat, zip(*parts))  # W A^T (out, r), ||W|| (out,)
            squares = norms.square() + ((2 * wa.to(a.dtype) + b @ (a @ a.T)) * b).sum(1)
        # rounding can make the square of a short row negative
        return squares.clamp_(min=torch.finfo(a.dtype).tiny).sqrt_()

    def init_weights(self, generator: torch.Generator) -> None:
        """m is the length of the rows of W, which has its values: the layer starts as its base."""
        super().init_weights(generator)
        w, m = full_weight(self.base), self.lora_magnitude_vector
        norms = row_norms(local_shard(w), m.dtype)
        local_shard(m).copy_(norms if is_sharded(w) else norms[slice(*local_rows(m))])


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> every linear-like layer; one that LoRA wraps is at `<path>.base`."""
    return {path: m for path, m in model.named_modules() if hasattr(m, "in_features")}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def wrap_linears(model: nn.Module, config: LoRAConfig, paths: list[str]) -> None:
    """Replace the layers at `paths` by LoRA layers around them; on the meta device they are without
    values until `init_lora`. Raises UserError for a model that has an adapter already."""
    check_no_adapter(lora_layers(model))
    kind = DoRALinear if config.dora else LoRALinear
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        layer = kind(model.get_submodule(path), *config.rank_and_scaling(path), config.dropout)
        setattr(model.get_submodule(parent), leaf, layer)
    if not next(model.parameters()).is_meta:
        init_lora(model, torch.initial_seed())


def init_lora(model: nn.Module, seed: int) -> None:
    """First values of every LoRA layer, once the base has its weights. They depend on `seed` and
    the layer's path alone: neither on which other layers have LoRA, nor on the number of ranks."""
    for path, layer in lora_layers(model).items():
        digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
        layer.init_weights(torch.Generator().manual_seed(int.from_bytes(digest[:7])))
