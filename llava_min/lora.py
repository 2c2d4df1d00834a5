"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = W x + s B A x with W frozen, s =
alpha / r; rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732): s = alpha / sqrt(r); and
DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): the rows of W + s B A are turned to a
learned length.

Swapped in from outside: a layer that is to learn is replaced by one that wraps it; no model file
hears of it. Adapters as files are adapter.py's.
"""

import hashlib
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_min.config import LINEARS
from llava_min.errors import UserError, escape_controls
from llava_min.fast.cpu_linear import unpacked
from llava_min.names import path_in
from llava_min.parallel.dtensor import is_sharded, local_rows, local_shard
from llava_min.weights import PIECE


def is_named(path: str, key: str) -> bool:
    """Whether `key` of a pattern names the layer at our `path`, called as in today's transformers
    or before.

    As in PEFT the regex fits the whole name, or all of it after some dot.
    """
    names = (path_in(path, "hf_5_memory"), path_in(path, "hf"))
    starts = lambda name: [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
    return any(re.compile(key).fullmatch(name, i) for name in names for i in starts(name))


@dataclass(frozen=True)
class LoRAConfig:
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS  # see `targets_of`
    dora: bool = False
    rslora: bool = False
    # PEFT's exceptions: a regex on the end of a layer's path in transformers -> its rank, its alpha
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def of(self, path: str) -> tuple[int, float]:
        """Rank and scaling of the layer at our `path`."""
        r = next((r for key, r in self.rank_pattern.items() if is_named(path, key)), self.r)
        alpha = next(
            (a for key, a in self.alpha_pattern.items() if is_named(path, key)), self.alpha
        )
        return r, alpha / (r**0.5 if self.rslora else r)


def row_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Lengths (out,) of the rows of `weight` (out, in), in `dtype`; on CPU by pieces, which it
    copies.
    """
    rows = max(1, PIECE // 8 // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    return torch.cat(
        [torch.linalg.vector_norm(piece, dim=1, dtype=dtype) for piece in weight.split(rows)]
    )


def cut(whole: Tensor, p: Tensor) -> Tensor:
    """Of `whole`, made in full on every rank, the rows that `local(p)` has."""
    first, end = local_rows(p)
    return whole[first:end]


class Matrix(nn.Module):
    """A parameter named `weight`, so that PEFT's lora_A.weight is ours; it has no values yet."""

    def __init__(self, rows: int, columns: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=torch.float32))


class LoRALinear(nn.Module):
    """A linear-like `base` (in_features, out_features) plus a low-rank update; `init` gives the
    update its values.
    """

    def __init__(
        self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0, dora: bool = False
    ):
        super().__init__()
        self.base, self.dropout, self.scaling = base, dropout, scaling
        device = next(base.parameters()).device
        self.lora_A, self.lora_B = (
            Matrix(r, base.in_features, device),
            Matrix(base.out_features, r, device),
        )
        magnitude = torch.empty(base.out_features, device=device, dtype=torch.float32)
        self.register_parameter("lora_magnitude_vector", nn.Parameter(magnitude) if dora else None)

    def init(self, generator: torch.Generator) -> None:
        """A uniform as kaiming_uniform(a=sqrt 5) draws it, B zero: the update is nothing. W has its
        values.
        """
        a, m = self.lora_A.weight, self.lora_magnitude_vector
        bound = a.shape[1] ** -0.5
        local_shard(a).copy_(
            cut(torch.empty(a.shape).uniform_(-bound, bound, generator=generator), a)
        )
        local_shard(self.lora_B.weight).zero_()
        if m is not None:
            w = unpacked(self.base.weight)
            norms = row_norms(local_shard(w), m.dtype)
            local_shard(m).copy_(norms if is_sharded(w) else cut(norms, m))

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        a, b, shape = self.lora_A.weight, self.lora_B.weight, x.shape
        kind = x.device.type
        x = x.flatten(0, -2)  # (rows, in)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        h = F.linear(dropped, a)  # (rows, r)
        # added by the product itself, into what the base has made: one pass over the wide tensor
        # less
        adapted = lambda y: y.addmm_(h.to(y.dtype), b.to(y.dtype).T, alpha=self.scaling)
        y = adapted(self.base(x))
        if self.lora_magnitude_vector is not None:
            # the factor less 1, for bf16 would round a factor near 1 to it; as in peft, what the
            # base gives by itself
            # has no dropout, and what is added to it has
            excess = (self.lora_magnitude_vector / self.norms() - 1).to(y.dtype)
            turned = (
                adapted(self.base(dropped.to(x.dtype))) if self.dropout and self.training else y
            )
            bias = getattr(self.base, "bias", None)
            y = torch.addcmul(y, excess, turned if bias is None else turned - bias)
        return y.unflatten(0, shape[:-1])

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Lengths (out,) of the rows of W + s B A as ||W||^2 + 2 s <W, BA> + s^2 ||BA||^2: nothing
        has W's size.
        """
        w, a, b = unpacked(self.base.weight), self.lora_A.weight, self.lora_B.weight * self.scaling
        with torch.autocast(w.device.type, enabled=False):
            cross = F.linear(w, a.to(w.dtype)).to(a.dtype)  # W A^T (out, r)
            squares = row_norms(w, a.dtype).square() + ((2 * cross + b @ (a @ a.T)) * b).sum(1)
        return squares.clamp_(min=torch.finfo(a.dtype).tiny).sqrt_()


def targets_of(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Full paths of the layers that `config` names: by leaf names, or "all-linear" for all of the
    decoder's blocks, within the language model only; or by one regex that is matched in full on our
    module paths.

    Raises UserError for a name or a regex that fits nothing.
    """
    linear = [name for name, m in model.named_modules() if hasattr(m, "in_features")]
    language = [name for name in linear if name.startswith("language_model.")]
    leaf = lambda name: name.rpartition(".")[2]
    if config.targets == ("all-linear",):
        return language
    if all(re.fullmatch(r"\w+", t) for t in config.targets):
        if absent := [t for t in config.targets if t not in map(leaf, language)]:
            raise UserError(
                f"lora_targets: {absent[0]!r} names no linear layer of the language model; "
                f"there are {', '.join(LINEARS)}, all-linear, or one regex on whole "
                "module paths"
            )
        return [name for name in language if leaf(name) in config.targets]
    if len(config.targets) > 1:
        raise UserError(
            f"lora_targets: {escape_controls(', '.join(config.targets))[:400]} is not names alone "
            "and not one "
            "regex; put | between the parts of a regex, and no comma"
        )
    try:
        paths = [name for name in linear if re.fullmatch(config.targets[0], name)]
    except re.error as e:
        raise UserError(
            f"lora_targets: {escape_controls(config.targets[0])!r} is not a regex ({e}); correct it"
        ) from None
    if "lm_head" in paths and model.lm_head.weight is model.language_model.embed_tokens.weight:
        raise UserError(
            "lora_targets: lm_head is tied to the embedding in this model and cannot be adapted by "
            "itself; leave it out"
        )
    if not paths:
        raise UserError(
            f"lora_targets: {escape_controls(config.targets[0])!r} fits no linear layer in full; "
            "the path of "
            f"one is {language[0]} or {linear[0]}"
        )
    return paths


def add_lora(model: nn.Module, config: LoRAConfig, paths: list[str] | None = None) -> None:
    """Put a LoRALinear in the place of each layer of `paths`, by default those that `config` names.

    On meta the layers are made without values, for `init_lora` to give once the base is there.
    Raises UserError for a model that has an adapter already.
    """
    if lora_layers(model):
        raise UserError("the model has an adapter already; load the base anew")
    for path in targets_of(model, config) if paths is None else paths:
        parent, _, leaf = path.rpartition(".")
        layer = LoRALinear(model.get_submodule(path), *config.of(path), config.dropout, config.dora)
        setattr(model.get_submodule(parent), leaf, layer)
    if not next(model.parameters()).is_meta:
        init_lora(model, torch.initial_seed())


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def init_lora(model: nn.Module, seed: int) -> None:
    """Start values of every LoRA layer, the base's weights being there; the same on any number of
    ranks.

    Each A is drawn whole from a generator of its own, made of `seed` and the layer's path; a rank
    keeps its rows.
    """
    for path, layer in lora_layers(model).items():
        digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
        layer.init(torch.Generator().manual_seed(int.from_bytes(digest[:7])))
