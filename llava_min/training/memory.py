"""The memory of a training step, before there is anything to train: the step itself is run on
tensors that have shapes and no values, and every allocation is counted.

So checkpointing, LoRA, DoRA, autocast's copies of the weights and whatever else changes a step are
in it without a formula of their own. A deep model is counted from two shallow ones: between two
blocks, what is kept and what is not yet gone grows by the same bytes for every further block.

Shapes: B batch (rows), T tokens, N images, S pixels a side, C width.
"""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_min.config import LINEARS, LlavaConfig
from llava_min.fast import attention as fast_attention
from llava_min.fast.cpu_linear import upcast_linears
from llava_min.llava import LOGIT_ROWS, Llava
from llava_min.load import on_meta
from llava_min.lora import LoRAConfig
from llava_min.training.targets import add_lora
from llava_min.training.trainable import set_trainable
from llava_min.training.wrap import enable_gradient_checkpointing

SHALLOW = (2, 3)  # decoder blocks of the models that are run
# on several ranks these are stored in fp32 and gathered in the precision of the computation
GATHERED = ("full", "freeze_vision")


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


# ---- what is run


@dataclass(frozen=True)
class Step:
    """A micro-batch, and how it is trained on; names as train.py's flags."""

    train: str = "lora"
    precision: torch.dtype = torch.bfloat16
    batch_size: int = 1
    max_length: int = 2048
    images: int = 1  # in a row
    gradient_checkpointing: bool = False
    lora_r: int = 16
    lora_targets: tuple[str, ...] = LINEARS
    dora: bool = False
    grad_accum: int = 1


def trained_model(config: LlavaConfig, step: Step) -> Llava:
    """The model on meta, its LoRA in place and what is trained marked."""
    model = on_meta(config)
    if step.train == "lora":
        lora = LoRAConfig(step.lora_r, 1.0, 0.0, step.lora_targets, step.dora, False)
        add_lora(model, lora)
    set_trainable(model, step.train)
    return model


def without_values(model: nn.Module, precision: torch.dtype, trained: torch.dtype) -> None:
    """Parameters on the CPU of a fake mode, in `trained` where they are trained, else in
    `precision`."""
    made = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in made:
                dtype = trained if p.requires_grad else precision
                made[p] = nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
            module._parameters[name] = None if p is None else made[p]


@contextmanager
def attention_of(device: str) -> Iterator[None]:
    """Within, attention is computed as on `device`, though the tensors are said to be the CPU's."""
    handles = fast_attention.handles
    if device != "cpu":
        fast_attention.handles = lambda q: not len(q)
    try:
        yield
    finally:
        fast_attention.handles = handles


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
    memory, gathers = Allocations(), sharded and step.train in GATHERED
    with FakeTensorMode(), attention_of(device):
        without_values(model, step.precision, step.precision if gathers else torch.float32)
        if device == "cpu":
            upcast_linears(model)
        if step.gradient_checkpointing:
            enable_gradient_checkpointing(model, dropout=False)
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


# ---- what it comes to


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `activations` is what the peak has beside the rest; it is less than all
    that is saved where gradients come as activations go."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int = 0  # by FSDP: blocks that are whole for a time

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def shallow(config: LlavaConfig, blocks: int) -> LlavaConfig:
    return replace(config, text=replace(config.text, num_hidden_layers=blocks))


def extrapolate(peaks: list[dict[str, int]], blocks: int) -> int:
    """The peak at `blocks` blocks, from the stretches of the two shallow models."""
    low, high = (
        {"last block" if name == f"block {n - 1}" else name: x for name, x in p.items()}
        for p, n in zip(peaks, SHALLOW)
    )
    far = (blocks - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
    return max(round(low[name] + (high[name] - low[name]) * far) for name in low)


@functools.cache
def peak_above_weights(config: LlavaConfig, step: Step, device: str, sharded: bool) -> int:
    blocks = config.text.num_hidden_layers
    if blocks <= SHALLOW[1]:
        return max(run_without_values(config, step, device, sharded).values())
    runs = [run_without_values(shallow(config, n), step, device, sharded) for n in SHALLOW]
    return extrapolate(runs, blocks)


def parameter_bytes(model: Llava, precision: torch.dtype) -> tuple[int, int]:
    """(bytes of all parameters as they are stored, number of the trained ones)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rest = sum(p.numel() for p in model.parameters()) - trained
    return 4 * trained + precision.itemsize * rest, trained


def step_memory(config: LlavaConfig, step: Step, *, ranks: int = 1, device: str = "cuda") -> Memory:
    """What one rank needs for `step`, with AdamW's two fp32 moments."""
    model = trained_model(config, step)
    stored, trained = parameter_bytes(model, step.precision)
    sharded = ranks > 1
    peak = peak_above_weights(config, step, device, sharded)
    if not sharded:
        gradients = min(4 * trained, peak)
        return Memory(stored, gradients, 8 * trained, peak - gradients)
    whole, block, root = gathered_bytes(model, step)
    split = stored - whole
    return Memory(
        weights=whole + split // ranks,
        gradients=4 * trained // ranks,
        optimizer=8 * trained // ranks,
        activations=peak,
        gathered=root + 2 * block,  # the next block is fetched while one is computed
    )


def gathered_bytes(model: Llava, step: Step) -> tuple[int, int, int]:
    """(bytes of what is never split, of a block when it is gathered, of the rest when it is); see
    parallel/fsdp.py."""
    full = step.train in GATHERED

    def size(parameters) -> int:
        wide = lambda p: 4 if p.requires_grad and not full else step.precision.itemsize
        return sum(p.numel() * wide(p) for p in parameters)

    tower = list(model.vision_tower.parameters())
    trained_tower = any(p.requires_grad for p in tower)
    block = size(model.language_model.layers[0].parameters())
    rest = [
        *model.multi_modal_projector.parameters(),
        *model.language_model.embed_tokens.parameters(),
        *model.language_model.norm.parameters(),
        *model.lm_head.parameters(),
        *(tower if trained_tower else ()),  # its blocks stay gathered after the forward
    ]
    return 0 if trained_tower else size(tower), block, size({*rest})
