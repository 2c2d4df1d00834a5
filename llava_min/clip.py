"""CLIP's vision tower: images in, one feature per patch out.

Follows Radford et al. 2021 (https://arxiv.org/abs/2103.00020) and the names of OpenAI's
checkpoints, `pre_layrnorm` included. To compare:
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/clip/modeling_clip.py

LLaVA reads the features before the last block, so that block and `post_layernorm` are never run;
they are kept because the checkpoint has them and what is loaded must be saved again.

Shapes: N images, S pixels a side, P patches, C width, H heads, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_min.config import VisionConfig
from llava_min.ops import attention


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        c, p = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(c))
        self.patch_embedding = nn.Conv2d(3, c, kernel_size=p, stride=p, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, c)

    def forward(self, pixels: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, 1 + P, C)
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (N, P, C), row by row
        cls = self.class_embedding.to(patches.dtype).expand(len(pixels), 1, -1)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        c = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(c, c), nn.Linear(c, c)
        self.v_proj, self.out_proj = nn.Linear(c, c), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:  # (N, 1 + P, C) -> (N, 1 + P, C)
        heads = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        x = attention(q, k, v)  # (N, H, 1 + P, D); every patch sees every patch
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.quick = config.hidden_act == "quick_gelu"

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        # quick_gelu is OpenAI's approximation
        x = x * (1.702 * x).sigmoid_() if self.quick else F.gelu(x)
        return self.fc2(x)


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    """The tower up to the block whose output LLaVA reads."""

    def __init__(self, config: VisionConfig, layers_used: int):
        super().__init__()
        self.layers_used = layers_used
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.pre_layrnorm.weight.dtype

    def unused_modules(self) -> set[str]:
        """Names of the parts that are never run, and so never get a gradient."""
        unread = range(self.layers_used, len(self.layers))
        return {"post_layernorm", *(f"layers.{i}" for i in unread)}

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, S, S) -> features (N, 1 + P, C), the class token first."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for block in self.layers[: self.layers_used]:
            x = block(x)
        return x
