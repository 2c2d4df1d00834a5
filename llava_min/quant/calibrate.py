"""AWQ over a decoder, block by block; in 16 bit there is half a block at a time.

    for each block
        for each half, attention, then MLP
            read its weights
            run the rows through it           what its layers read is summed, awq.py's `Inputs`
            search s of the first layers      folded into the norm before them
            search s of the last layer        folded into the layer before it, v or up
            search clips, quantize

A row is the hidden states of a record. The next half gets those of the weights before rounding, as
in llm-awq: with those of the rounded ones SmolLM2's perplexity rose by 5.0, so by 4.6. The blocks
are Llama's by their names; their weights are the caller's to read.

Shapes: T tokens of a row, C width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_min.quant.awq import Inputs, clip, fold, search_clips, search_scales
from llava_min.quant.group import GroupLinear
from llava_min.quant.methods import empty_layer, quantized

UNCLIPPED = ("q_proj", "k_proj")  # as llm-awq: their product decides, not what either gives


@dataclass(frozen=True)
class Half:
    """x + module(norm(x)). `first` read what the norm gives; `before`, one of them, gives `last`
    its input, channel by channel where their widths agree."""

    norm: str
    module: str
    first: tuple[str, ...]
    before: str
    last: str


ATTENTION = Half("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj"), "v_proj", "o_proj")
MLP = Half("post_attention_layernorm", "mlp", ("gate_proj", "up_proj"), "up_proj", "down_proj")


def calibrate(
    blocks: Sequence[nn.Module],
    rows: list[Tensor],
    read: Callable[[nn.Module], None],
    context: Callable[[Tensor], tuple],
    dtype: torch.dtype,
    group_size: int | None = None,
) -> Iterator[int]:
    """Quantize `blocks`, which are on meta, by AWQ; yields the number of each that is done.

    rows: hidden states (1, T, C) fp32 before the first block, without padding; each is replaced by
    that after the last. read: gives a module of a block its weights, in fp32 and where the rows
    are. context: what attention takes beside such a row. dtype: of what is not quantized. Raises
    UserError for too few rows, NaN, and a group size that does not divide a width.
    """
    for number, block in enumerate(blocks, 1):
        for half in (ATTENTION, MLP):
            norm, module = getattr(block, half.norm), getattr(block, half.module)
            read(norm)
            read(module)
            extra = context if half is ATTENTION else lambda x: ()
            forward = lambda x: x + module(norm(x), *extra(x))
            calibrate_half(half, norm, module, rows, forward, group_size)
            for p in (*norm.parameters(), *module.parameters()):
                p.data = p.data.to(dtype) if p.dtype == torch.float32 else p.data
        yield number


@torch.no_grad()
def calibrate_half(
    half: Half,
    norm: nn.Module,
    module: nn.Module,
    rows: list[Tensor],
    forward: Callable[[Tensor], Tensor],
    group_size: int | None,
) -> None:
    first, last = (Inputs.of(getattr(module, name)) for name in (half.before, half.last))
    with first.watching(getattr(module, half.before)), last.watching(getattr(module, half.last)):
        for i, x in enumerate(rows):
            rows[i] = forward(x)
    scale(half, norm, module, first, last, group_size)
    for name in (*half.first, half.last):
        layer, inputs = getattr(module, name), last if name == half.last else first
        if name not in UNCLIPPED:
            clips = search_clips(layer.weight, inputs, place_for(layer, group_size))
            layer.weight.copy_(clip(layer.weight, clips))
        setattr(module, name, quantized(layer, "awq4", group_size))


def scale(
    half: Half,
    norm: nn.Module,
    module: nn.Module,
    first: Inputs,
    last: Inputs,
    group_size: int | None,
) -> None:
    """Search and fold the scales of both groups of layers; the half computes what it did."""
    readers = [getattr(module, name) for name in half.first]
    before, end = getattr(module, half.before), getattr(module, half.last)
    steps = [(norm, readers, first)]
    if before.out_features == end.in_features:  # else several heads share one of v's
        steps.append((before, [end], last))
    for source, layers, inputs in steps:
        rounded = place_for(layers[0], group_size).rounded
        s = search_scales([layer.weight for layer in layers], inputs, rounded)
        fold(source, layers, s)
        inputs.divide(s)


def place_for(layer: nn.Linear, group_size: int | None) -> GroupLinear:
    """A layer of awq4 without values, whose `rounded` says how a weight would be read again."""
    size = layer.in_features, layer.out_features
    return empty_layer("awq4", *size, group_size=group_size, device="meta")
