"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = W x + s B A x with W frozen, s = alpha / r; rsLoRA
(Kalajdzievski 2023, https://arxiv.org/abs/2312.03732): s = alpha / sqrt(r); and DoRA (Liu et al. 2024,
https://arxiv.org/abs/2402.09353): the rows of W + s B A are turned to a learned length.

Swapped in from outside: a layer that is to learn is replaced by one that wraps it; no model file hears of it.
Adapters are read and written as PEFT folders, every other trained module in them.
"""

import hashlib
import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_min.cli import UserError, printable, warn
from llava_min.dist import local, own_rows, split
from llava_min.files import read_json, write_json
from llava_min.packed import dense
from llava_min.weights import FLOATS, PIECE, READ, WRITE, is_finite, open_file, save_tensors, translate

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a decoder block
PEFT = "base_model.model."
# Our prefix -> the module path in transformers of today, which PEFT's keys repeat.
PATHS = [("vision_tower.layers.", "model.vision_tower.encoder.layers."), ("lm_head", "lm_head"), ("", "model.")]
# Keys of adapter_config.json that change the result and are not implemented, and the values that change nothing.
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False,),
         "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others change the base
         **dict.fromkeys(("layer_replication", "lora_bias", "target_parameters", "trainable_token_indices",
                          "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
                          "monteclora_config", "velora_config"), (False,))}


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
        alpha = next((a for key, a in self.alpha_pattern.items() if is_named(path, key)), self.alpha)
        return r, alpha / (r**0.5 if self.rslora else r)


def is_named(path: str, key: str) -> bool:
    """Whether `key` of a pattern names the layer at our `path`, called as in today's transformers or before."""
    names = (to_transformers(path), translate(path + ".", WRITE).rstrip("."))
    starts = lambda name: [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
    return any(re.compile(key).fullmatch(name, i) for name in names for i in starts(name))


def to_transformers(name: str) -> str:
    return next(theirs + name[len(ours):] for ours, theirs in PATHS if name.startswith(ours))


def weight_of(layer: nn.Module) -> Tensor:
    """The matrix (out, in) of a linear-like layer; nothing else here reads it."""
    return dense(layer.weight)


def row_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Lengths (out,) of the rows of `weight` (out, in), in `dtype`; on CPU by pieces, which it copies."""
    rows = max(1, PIECE // 8 // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    return torch.cat([torch.linalg.vector_norm(piece, dim=1, dtype=dtype) for piece in weight.split(rows)])


def cut(whole: Tensor, p: Tensor) -> Tensor:
    """Of `whole`, made in full on every rank, the rows that `local(p)` has."""
    first, end = own_rows(p)
    return whole[first:end]


class Matrix(nn.Module):
    """A parameter `weight` without values."""

    def __init__(self, rows: int, columns: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=torch.float32))


class LoRALinear(nn.Module):
    """A linear-like `base` (in_features, out_features) plus a low-rank update; `init` gives the update its values."""

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0, dora: bool = False):
        super().__init__()
        self.base, self.dropout, self.scaling = base, dropout, scaling
        device = next(base.parameters()).device
        self.lora_A, self.lora_B = Matrix(r, base.in_features, device), Matrix(base.out_features, r, device)
        magnitude = torch.empty(base.out_features, device=device, dtype=torch.float32)
        self.register_parameter("lora_magnitude_vector", nn.Parameter(magnitude) if dora else None)

    def init(self, generator: torch.Generator) -> None:
        """A uniform as kaiming_uniform(a=sqrt 5) draws it, B zero: the update is nothing. W has its values."""
        a, m = self.lora_A.weight, self.lora_magnitude_vector
        bound = a.shape[1] ** -0.5
        local(a).copy_(cut(torch.empty(a.shape).uniform_(-bound, bound, generator=generator), a))
        local(self.lora_B.weight).zero_()
        if m is not None:
            w = weight_of(self.base)
            norms = row_norms(local(w), m.dtype)
            local(m).copy_(norms if split(w) else cut(norms, m))

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        a, b, kind, shape = self.lora_A.weight, self.lora_B.weight, x.device.type, x.shape
        x = x.flatten(0, -2)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        h = F.linear(dropped, a)  # (rows, r)
        # added by the product itself, into what the base has made: one pass over the wide tensor less
        adapted = lambda y: y.addmm_(h.to(y.dtype), b.to(y.dtype).T, alpha=self.scaling)
        y = adapted(self.base(x))
        if self.lora_magnitude_vector is not None:
            # the factor less 1, for bf16 would round a factor near 1 to it; as in peft, what the base gives by itself
            # has no dropout, and what is added to it has
            excess = (self.lora_magnitude_vector / self.norms() - 1).to(y.dtype)
            turned = adapted(self.base(dropped.to(x.dtype))) if self.dropout and self.training else y
            bias = getattr(self.base, "bias", None)
            y = torch.addcmul(y, excess, turned if bias is None else turned - bias)
        return y.unflatten(0, shape[:-1])

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Lengths (out,) of the rows of W + s B A as ||W||^2 + 2 s <W, BA> + s^2 ||BA||^2: nothing has W's size."""
        w, a, b = weight_of(self.base), self.lora_A.weight, self.lora_B.weight * self.scaling
        with torch.autocast(w.device.type, enabled=False):
            cross = F.linear(w, a.to(w.dtype)).to(a.dtype)  # W A^T (out, r)
            squares = row_norms(w, a.dtype).square() + ((2 * cross + b @ (a @ a.T)) * b).sum(1)
        return squares.clamp_(min=torch.finfo(a.dtype).tiny).sqrt_()


def targets_of(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Full paths of the layers that `config` names: by leaf names, or "all-linear" for all of the decoder's blocks,
    within the language model only; or by one regex that is matched in full on our module paths.

    Raises UserError for a name or a regex that fits nothing.
    """
    linear = [name for name, m in model.named_modules() if hasattr(m, "in_features")]
    language = [name for name in linear if name.startswith("language_model.")]
    leaf = lambda name: name.rpartition(".")[2]
    if config.targets == ("all-linear",):
        return language
    if all(re.fullmatch(r"\w+", t) for t in config.targets):
        if absent := [t for t in config.targets if t not in map(leaf, language)]:
            raise UserError(f"lora targets: {absent[0]!r} names no linear layer of the language model; "
                            f"there are {', '.join(LINEARS)}, all-linear, or one regex on whole module paths")
        return [name for name in language if leaf(name) in config.targets]
    if len(config.targets) > 1:
        raise UserError(f"lora targets: {printable(', '.join(config.targets))[:400]} is not names alone and not one "
                        "regex; put | between the parts of a regex, and no comma")
    try:
        paths = [name for name in linear if re.fullmatch(config.targets[0], name)]
    except re.error as e:
        raise UserError(f"lora targets: {printable(config.targets[0])!r} is not a regex ({e}); correct it") from None
    if "lm_head" in paths and model.lm_head.weight is model.language_model.embed_tokens.weight:
        raise UserError("lora targets: lm_head is tied to the embedding in this model and cannot be adapted by "
                        "itself; leave it out")
    if not paths:
        raise UserError(f"lora targets: {printable(config.targets[0])!r} fits no linear layer in full; the path of "
                        f"one is {language[0]} or {linear[0]}")
    return paths


def add_lora(model: nn.Module, config: LoRAConfig, paths: list[str] | None = None) -> None:
    """Put a LoRALinear in the place of each layer of `paths`, by default those that `config` names.

    On meta the layers are made without values, for `init_lora` to give once the base is there. Raises UserError for a
    model that has an adapter already.
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
    """Start values of every LoRA layer, the base's weights being there; the same on any number of ranks.

    Each A is drawn whole from a generator of its own, made of `seed` and the layer's path; a rank keeps its rows.
    """
    for path, layer in lora_layers(model).items():
        digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
        layer.init(torch.Generator().manual_seed(int.from_bytes(digest[:7])))


def adapter_names(model: nn.Module) -> list[str]:
    """Our names of the tensors that an adapter of `model` holds: LoRA, and what else is trained."""
    return [name for name, p in model.named_parameters() if ".lora_" in name or p.requires_grad]


def save_adapter(model: nn.Module, config: LoRAConfig, folder: Path, base: str,
                 state: dict[str, Tensor] | None = None) -> None:
    """Write a PEFT folder: LoRA tensors and every other trained one (`modules_to_save`), in fp32.

    state: whole tensors of at least `adapter_names(model)`, when the model's own are shards.
    """
    names = adapter_names(model)
    state = dict(model.named_parameters()) if state is None else state
    save_tensors({PEFT + to_transformers(name): state[name].detach().float().cpu().contiguous() for name in names},
                 folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.r,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "target_modules": target_pattern(model), "modules_to_save": whole_modules(model, set(names)) or None,
        "use_dora": config.dora, "use_rslora": config.rslora, "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern, "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True})


def target_pattern(model: nn.Module) -> str:
    """A regex that fits exactly the adapted layers among transformers' paths: by leaf names, or else a list."""
    adapted = [to_transformers(path) for path in lora_layers(model)]
    linear = [to_transformers(name.removesuffix(".base")) for name, m in model.named_modules()
              if hasattr(m, "in_features")]
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in adapted)
    pattern = rf".*language_model\..*\.({'|'.join(leaves)})"
    exact = [path for path in linear if re.fullmatch(pattern, path)] == adapted
    return pattern if exact else "|".join(map(re.escape, adapted))


def whole_modules(model: nn.Module, names: set[str]) -> list[str]:
    """The largest modules all of whose parameters are among `names` and none LoRA: the ends of PEFT's paths."""
    whole: list[str] = []
    for path, m in model.named_modules():  # the outer before the inner
        inside = {f"{path}.{name}" for name, _ in m.named_parameters() if not path.startswith(tuple(whole))}
        if inside and inside <= names and not any(".lora_" in name for name in inside):
            whole.append(path + ".")
    return [to_transformers(path).removeprefix("model.").rstrip(".") for path in whole]


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Apply the PEFT adapter of `folder` to `model`, unmerged; UserError for a tensor without a home."""
    apply_adapter(model, *read_adapter(model, folder))


def read_config(path: Path) -> LoRAConfig:
    """`adapter_config.json`; what would change the result and is not implemented is refused by name."""
    data = read_json(path)
    for key, plain in PLAIN.items():
        if data.get(key) not in (None, [], {}, *plain):
            raise UserError(f"{path}: {key} is {reprlib.repr(data[key])}, which is not implemented; "
                            "give an adapter without it")
    for key in ("use_dora", "use_rslora"):
        if data.get(key) not in (None, True, False):
            raise UserError(f"{path}: {key} is {reprlib.repr(data[key])}, expected true or false; "
                            "the file is damaged")
    r, alpha = data.get("r"), data.get("lora_alpha", 8)
    if not is_rank(r) or not is_alpha(alpha):
        raise UserError(f"{path}: r is {reprlib.repr(r)} and lora_alpha {reprlib.repr(alpha)}, expected a "
                        "whole number from 1 and a number other than 0; the file is damaged")
    patterns = [read_pattern(path, key, data.get(key) or {}, good)
                for key, good in (("rank_pattern", is_rank), ("alpha_pattern", is_alpha))]
    return LoRAConfig(r, alpha, 0.0, LINEARS, bool(data.get("use_dora")), bool(data.get("use_rslora")), *patterns)


def is_rank(x: object) -> bool:
    return type(x) is int and x >= 1


def is_alpha(x: object) -> bool:
    return type(x) in (int, float) and 0 < abs(x) < 1e6


def read_pattern(path: Path, key: str, data: object, good) -> dict:
    """PEFT's rank_pattern or alpha_pattern. A stranger's regex could run for ever: only simple ones are taken."""
    if not isinstance(data, dict) or not all(map(good, data.values())):
        raise UserError(f"{path}: {key} is {reprlib.repr(data)}, expected names of layers, each with its number; "
                        "the file is damaged")
    for name in data:
        try:
            re.compile(name)
            simple = len(name) <= 200 and len(re.findall(r"[*+?{]", name)) <= 2 and not re.search(r"\)[*+?{]", name)
        except (re.error, RecursionError, OverflowError):
            simple = False
        if not simple:
            raise UserError(f"{path}: {key} has {printable(name)[:200]!r}, expected the path of a layer or a regex "
                            "with at most two repetitions; write the layers out")
    return data


def read_adapter(model: nn.Module, folder: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The adapter of `folder`, our name -> tensor, checked against `model`, which may still be on meta."""
    if lora_layers(model):
        raise UserError(f"{folder}: the model has an adapter already; load the base anew")
    config = read_config(folder / "adapter_config.json")
    files = [p for end in ("safetensors", "bin") if (p := folder / f"adapter_model.{end}").exists()][:1]
    if not files:
        raise UserError(f"{folder}: no adapter_model.safetensors; give the folder of a PEFT adapter")
    if (projector := folder / "non_lora_trainables.bin").exists():  # the original LLaVA's
        files.append(projector)
    elif (folder / "config.json").exists() and "mm_projector_type" in read_json(folder / "config.json"):
        raise UserError(f"{folder}: an adapter of the original LLaVA without non_lora_trainables.bin, which holds "
                        "the projector it was trained with; put the file beside it")
    want = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, m in model.named_modules():
        if hasattr(m, "in_features"):
            r, _ = config.of(name)
            want[f"{name}.lora_A.weight"] = (r, m.in_features)
            want[f"{name}.lora_B.weight"] = (m.out_features, r)
            if config.dora:
                want[f"{name}.lora_magnitude_vector"] = (m.out_features,)
    tensors: dict[str, Tensor] = {}
    whole: list[str] = []
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
            if ".lora_" not in name:
                whole.append(f".{key}.{to_transformers(name)}")  # as the file calls it, and as today's transformers
    paths = lora_paths(tensors)
    ends = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if config.dora else []))
    if missing := sorted({f"{path}.{end}" for path in paths for end in ends} - tensors.keys()):
        raise UserError(f"{files[0]}: {missing[0]} is missing and its other half is there; the file is damaged")
    if not paths:
        raise UserError(f"{files[0]}: no LoRA tensor; give the folder of a PEFT adapter")
    for key in [*config.rank_pattern, *config.alpha_pattern]:
        if not any(is_named(path, key) for path in paths):
            warn(f"{folder}: the pattern {printable(key)} names no layer of the adapter")
    saved = read_json(folder / "adapter_config.json").get("modules_to_save") or []
    for module in saved if isinstance(saved, list) else [saved]:
        if not any(f".{module}." in name for name in whole):
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
