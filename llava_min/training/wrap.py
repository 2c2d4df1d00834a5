"""What is put on a model from outside while it trains: noise on embeddings, compiled blocks,
gradient checkpointing. No model file hears of any of it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def wrap_model(model: nn.Module, config: Any) -> None:
    """What train.py's `config` asks for, on a model whose weights are loaded."""
    if config.compile:
        compile_blocks(model)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model, dropout=config.lora_dropout > 0)
    if config.neftune_alpha:
        add_neftune(model, config.neftune_alpha)


def add_neftune(model: nn.Module, alpha: float) -> None:
    """Uniform noise of ±alpha / sqrt(L d) on the word embeddings in training, L the padded length.

    NEFTune, Jain et al. 2023 (https://arxiv.org/abs/2310.05914). Image features replace embeddings
    afterwards, so they get no noise.
    """

    def add_noise(module: nn.Module, inputs: tuple, x: Tensor) -> Tensor | None:
        if module.training:
            bound = alpha / (x.shape[1] * x.shape[2]) ** 0.5
            return x + torch.empty_like(x).uniform_(-bound, bound)

    model.language_model.embed_tokens.register_forward_hook(add_noise)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block; equal blocks share one program, so the first alone takes time."""
    for block in (*model.language_model.layers, *model.vision_tower.layers):
        block.forward = torch.compile(block.forward, dynamic=True)


def enable_gradient_checkpointing(model: nn.Module, dropout: bool) -> None:
    """Save only a block's input and recompute the rest in the backward (Chen et al. 2016).

    dropout: the blocks draw random numbers, which the second forward has to draw again.
    """
    for block in trained_blocks(model):
        recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout)
        block.forward = partial(recomputed, block.forward)


def trained_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder's blocks, and the tower's when it is trained."""
    yield from model.language_model.layers
    if any(p.requires_grad for p in model.vision_tower.parameters()):
        yield from model.vision_tower.layers
