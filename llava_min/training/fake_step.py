"""A training step on tensors that have shapes and no values: every allocation is counted.

So checkpointing, LoRA, DoRA, quantized bases, autocast's copies of the weights and whatever else
changes a step are in the count without a formula of their own. memory.py makes a rank's memory of
it.

Shapes: B batch (rows), T tokens, N images, S pixels a side, C width.
"""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_min import lora
from llava_min.checks.load import check_quantize
from llava_min.config import LINEARS, LlavaConfig
from llava_min.export.quantized import quantize_linears
from llava_min.fast import attention as fast_attention
from llava_min.fast.cpu_linear import upcast_linears
from llava_min.fast.int_matmul import swap
from llava_min.llava import LOGIT_ROWS, Llava
from llava_min.load import BLOCKS, on_meta
from llava_min.quant.codebook import VALUES, codebook_pairs
from llava_min.quant.linear import QuantLinear
from llava_min.quant.methods import METHODS
from llava_min.training.targets import add_lora
from llava_min.training.trainable import set_trainable
from llava_min.training.wrap import enable_gradient_checkpointing
from llava_min.weights import DTYPES

# on several ranks these are stored in fp32 and gathered in the precision of the computation
GATHERED = ("full", "freeze_vision")


@dataclass(frozen=True)
class Step:
    """A micro-batch, and how it is trained on; named as the settings of train.py."""

    train: str = "lora"
    precision: torch.dtype = torch.bfloat16
    batch_size: int = 1
    max_length: int = 2048
    images: int = 1  # in a row
    gradient_checkpointing: bool = False
    lora_r: int = 16
    lora_targets: tuple[str, ...] = LINEARS
    lora_dropout: float = 0.0
    dora: bool = False
    quantize: str | None = None
    train_projector: bool | None = None
    train_vision: bool | None = None
    grad_accum: int = 1


def step_of(settings: Any, images: int) -> Step:
    """Of train.py's settings, or of others with the same names."""
    given = {f.name: getattr(settings, f.name) for f in fields(Step) if hasattr(settings, f.name)}
    return Step(**given | {"precision": DTYPES[settings.precision], "images": images})


# ---- the model


def planned_model(config: LlavaConfig, quantize: str | None = None) -> Llava:
    """The model on meta, its decoder quantized by `quantize`, or as the checkpoint is."""
    model = on_meta(config)
    if quantize:
        check_quantize(quantize, METHODS, config.quantization is not None)
        quantize_linears(model, BLOCKS, quantize)
    elif config.quantization:
        for path, layer in [*model.named_modules()]:
            if path.startswith(BLOCKS) and type(layer) is nn.Linear:
                stored = config.quantization.layer(layer.in_features, layer.out_features)
                stored.bias = layer.bias
                swap(model, path, stored)
    return model


def trained_model(config: LlavaConfig, step: Step) -> Llava:
    """The model on meta, its LoRA in place and what is trained marked."""
    model = planned_model(config, step.quantize)
    if step.train == "lora":
        scaling = (1.0, step.lora_dropout)
        add_lora(model, lora.LoRAConfig(step.lora_r, *scaling, step.lora_targets, step.dora))
    set_trainable(model, step.train, step.train_projector, step.train_vision)
    return model


def stored_dtypes(model: nn.Module, precision: torch.dtype) -> dict[nn.Parameter, torch.dtype]:
    """Of each parameter the dtype that it is stored in: its own in a quantized layer, fp32 if it
    is trained, else `precision`."""
    found = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            own = isinstance(module, QuantLinear) and name != "bias"
            found[p] = p.dtype if own else torch.float32 if p.requires_grad else precision
    return found


def without_values(model: nn.Module, dtypes: dict[nn.Parameter, torch.dtype]) -> None:
    """The parameters become tensors on the CPU of a fake mode, in these dtypes."""
    made = {
        p: nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
        for p, dtype in dtypes.items()
    }
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else made[p]


# ---- counting


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes, until nobody holds it.

    `live` now; `peaks` of each named stretch of time, see `begin`.
    """

    def __init__(self):
        super().__init__()
        self.live, self.sizes, self.peaks, self.name = 0, {}, {}, "start"

    def begin(self, name: str) -> None:
        self.name = name
        self.peaks[name] = max(self.live, self.peaks.get(name, 0))

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self.drop, key)
            self.peaks[self.name] = max(self.live, self.peaks.get(self.name, 0))

    def drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        return out


def fused_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """A GPU's: it keeps a mask of bytes, where the CPU's keeps factors in the dtype of x."""
    return torch.native_dropout(x, p, True)[0] if p and training else x


# what is computed otherwise on a GPU than on the CPU: module, name, what stands there on a GPU
ON_GPU = (
    (fast_attention, "handles", lambda q: not len(q)),
    (F, "dropout", fused_dropout),
    (lora, "CHUNK", 1 << 62),
)


@contextmanager
def fake_tensors(device: str) -> Iterator[None]:
    """Within, tensors have no values, and what is computed on them takes the memory that it takes
    on `device`, though they are said to be the CPU's."""
    for kind in VALUES:  # made before, because they stay in a cache
        codebook_pairs(kind, torch.device("cpu"))
    here = [(module, name, getattr(module, name)) for module, name, _ in ON_GPU]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        for place in ON_GPU if device != "cpu" else ():
            setattr(*place)
        with fake, warnings.catch_warnings(action="ignore"):  # of how fast it would be
            yield
    finally:
        for place in here:
            setattr(*place)


# ---- the step


def forward_and_backward(model: Llava, step: Step, memory: Allocations) -> None:
    """One micro-batch of full rows: forward, loss, the backward of each block, the rest."""
    config, b, t = model.config, step.batch_size, step.max_length
    images, side = b * step.images, config.vision.image_size
    on_image = step.images * config.tokens_per_image

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda grad: memory.begin(name))

        return hook

    hooks = [
        block.register_forward_hook(watch(f"block {i}"))
        for i, block in enumerate(model.language_model.layers)
    ]
    memory.begin("forward")
    enabled = step.precision != torch.float32
    with torch.autocast("cpu", step.precision, enabled=enabled):
        ids = torch.zeros(b, t, dtype=torch.long)
        labels = torch.zeros(b, t, dtype=torch.long)  # held by the batch until the step ends
        x = model.language_model.embed_tokens(ids)
        if images:
            pixels = torch.zeros(images, 3, side, side)
            is_image = torch.zeros(b, t, dtype=torch.bool)
            features = model.encode_images(pixels).to(x.dtype)
            x = x.masked_scatter(is_image[..., None], features)
            del features
        x = model.language_model(x, torch.zeros(b, t, dtype=torch.long))
        memory.begin("loss")
        learned = b * max(t - on_image, 1)  # at most every word
        x = x.flatten(0, 1)[torch.zeros(learned, dtype=torch.long)]
        loss = sum(
            torch.utils.checkpoint.checkpoint(
                model._chunk_loss, h, torch.zeros(len(h), dtype=torch.long), use_reentrant=False
            )
            for h in x.split(LOGIT_ROWS)
        )
        del x
    loss.backward()
    for hook in hooks:
        hook.remove()
    del labels


def run_without_values(
    config: LlavaConfig, step: Step, device: str, sharded: bool
) -> dict[str, int]:
    """The peak of each stretch above the weights. `sharded`: without gradients, which leave for the
    other ranks as soon as they are made."""
    model = trained_model(config, step).train()
    dtypes = stored_dtypes(model, step.precision)
    if sharded and step.train in GATHERED:
        dtypes = dict.fromkeys(dtypes, step.precision)
    memory = Allocations()
    with fake_tensors(device):
        without_values(model, dtypes)
        if device == "cpu":
            upcast_linears(model)
        if step.gradient_checkpointing:
            enable_gradient_checkpointing(model, dropout=step.lora_dropout > 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        if sharded:
            drop = lambda p: setattr(p, "grad", None)
            for p in trained:
                p.register_post_accumulate_grad_hook(drop)
        for p in {*model.parameters()}:
            memory.add(p)
        start = memory.live
        if step.grad_accum > 1 and not sharded:  # gradients of the micro-batches before
            for p in trained:
                p.grad = torch.empty_like(p)
                memory.add(p.grad)
        with memory:
            forward_and_backward(model, step, memory)
            memory.begin("end")
    return {name: peak - start for name, peak in memory.peaks.items() if name != "start"}
