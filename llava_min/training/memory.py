"""The memory of a training step, before there is anything to train, by part.

What activations take is counted by running the step on tensors without values (fake_step.py); a
deep model from two shallow ones: between two blocks, what is kept and what is not yet gone grows by
the same bytes for every further block.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from llava_min.config import LlavaConfig
from llava_min.llava import Llava
from llava_min.training.fake_step import (
    GATHERED,
    Step,
    run_without_values,
    stored_dtypes,
    trained_model,
)

SHALLOW = (2, 3)  # decoder blocks of the models that are run


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


def gib(n: float) -> str:
    return f"{n / 2**30:.2f}"


def table(memory: Memory, **beside: int) -> Iterator[str]:
    """A line for each part, those of `beside` among them, and their sum."""
    parts = vars(memory) | beside
    for name, size in parts.items():
        if size:
            yield f"  {name.replace('_', ' '):26}{gib(size):>9} GiB"
    yield f"  {'in all':26}{gib(sum(parts.values())):>9} GiB"


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
    if blocks <= SHALLOW[1] or step.train.startswith("last"):  # whose blocks are not alike
        return max(run_without_values(config, step, device, sharded).values())
    runs = [run_without_values(shallow(config, n), step, device, sharded) for n in SHALLOW]
    return extrapolate(runs, blocks)


def step_memory(config: LlavaConfig, step: Step, *, ranks: int = 1, device: str = "cuda") -> Memory:
    """What one rank needs for `step`, with AdamW's two fp32 moments."""
    fixed, sharded = fixed_memory(config, step, ranks=ranks), ranks > 1
    peak = peak_above_weights(config, step, device, sharded)
    gradients = fixed.gradients if sharded else min(fixed.gradients, peak)
    # on one rank the peak has the gradients in it
    return replace(fixed, gradients=gradients, activations=peak - (0 if sharded else gradients))


def fixed_memory(config: LlavaConfig, step: Step, *, ranks: int = 1) -> Memory:
    """The same without activations, which nothing has to be run for."""
    model = trained_model(config, step)
    dtypes = stored_dtypes(model, step.precision)
    stored = sum(p.numel() * dtype.itemsize for p, dtype in dtypes.items())
    trained = sum(p.numel() for p in dtypes if p.requires_grad)
    if ranks == 1:
        return Memory(stored, 4 * trained, 8 * trained, 0)
    whole, block, root = gathered_bytes(model, step)
    return Memory(
        weights=whole + (stored - whole) // ranks,
        gradients=4 * trained // ranks,
        optimizer=8 * trained // ranks,
        activations=0,
        gathered=root + 2 * block,  # the next block is fetched while one is computed
    )


def gathered_bytes(model: Llava, step: Step) -> tuple[int, int, int]:
    """(bytes of what is never split, of a block when it is gathered, of the rest when it is); see
    parallel/fsdp.py."""
    dtypes = stored_dtypes(model, step.precision)
    if step.train in GATHERED:
        dtypes = dict.fromkeys(dtypes, step.precision)

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * dtypes[p].itemsize for p in {*parameters})

    tower = list(model.vision_tower.parameters())
    trained_tower = any(p.requires_grad for p in tower)
    rest = [
        *model.multi_modal_projector.parameters(),
        *model.language_model.embed_tokens.parameters(),
        *model.language_model.norm.parameters(),
        *model.lm_head.parameters(),
        *(tower if trained_tower else ()),  # its blocks stay gathered after the forward
    ]
    block = size(model.language_model.layers[-1].parameters())
    return 0 if trained_tower else size(tower), block, size(rest)
