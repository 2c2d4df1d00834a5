"""LLaVA-1.5: patch features of a vision tower, projected by a two-layer MLP, replace the <image>
tokens of a language model's input.

Follows Liu et al. 2023 (https://arxiv.org/abs/2310.03744). To compare:
https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/model/llava_arch.py

The processor has already expanded each image into one placeholder token per patch, so the merge is
one scatter.

Shapes: B batch, T tokens, N images in the batch, S pixels a side, P patches, a token each, C width,
V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_min.cache import causal_mask
from llava_min.checks.inputs import check_image_tokens, check_inputs, check_length
from llava_min.clip import VisionTower
from llava_min.config import IGNORE, LlavaConfig
from llava_min.llama import Llama

LOGIT_ROWS = 1024  # supervised positions whose logits exist at one time


# By model_type, what builds a vision tower from (VisionConfig, number of blocks to run). It takes
# pixels (N, 3, S, S) and returns features (N, P, C), or (N, 1 + P, C) with the class token first
# where its config says `has_class_token`. It must have the attribute `dtype` and the method
# `unused_modules()`, the names of parts that never run.
TOWERS = {"clip_vision_model": VisionTower}


class Projector(nn.Module):
    """Patch features to the width of word embeddings: linear, GELU (erf), linear."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        width = config.text.hidden_size
        self.linear_1 = nn.Linear(config.vision.hidden_size, width, bias=config.projector_bias)
        self.linear_2 = nn.Linear(width, width, bias=config.projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


def packed_positions(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that hold several records: segments (B, T) numbers the record of each token.

    Returns positions (B, T) that restart with each record, and the mask (B, 1, T, T) bool under
    which no record sees another.
    """
    t = segments.shape[1]
    index = torch.arange(t, device=segments.device)
    is_first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    positions = index - torch.where(is_first, index, 0).cummax(-1)[0]
    same_record = segments[:, :, None] == segments[:, None, :]
    return positions, (same_record & (index[:, None] >= index))[:, None]


class Llava(nn.Module):
    """Vision tower, projector, language model and head; without the first two, texts alone."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        if config.vision is not None:
            tower = TOWERS[config.vision.model_type]
            self.vision_tower = tower(config.vision, config.vision_layers_used)
            self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Tie the head to the embedding where the config says so; again once weights are loaded."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.norm.weight.device

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, S, S) -> the embeddings of their image tokens (N, P, C)."""
        config, tower = self.config, self.vision_tower
        features = tower(pixel_values.to(self.device, tower.dtype))
        if config.vision.has_class_token and config.vision_feature_select_strategy == "default":
            features = features[:, 1:]  # those of the patches alone
        return self.multi_modal_projector(features)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Ids (B, T), and the images of all rows in reading order (N, 3, S, S) -> (B, T, C)."""
        x = self.language_model.embed_tokens(input_ids)
        is_image = input_ids == self.config.image_token_id  # (B, T)
        if pixel_values is None and self.training:
            # run the tower on an empty batch, so that every trained parameter gets a gradient
            side = self.config.vision.image_size
            pixel_values = x.new_zeros(0, 3, side, side)
        images = None if pixel_values is None else len(pixel_values)
        check_image_tokens(self.config, int(is_image.sum()), images)
        if pixel_values is None:
            return x
        # images come in reading order, and masked_scatter fills in row-major order: they match
        return x.masked_scatter(is_image[..., None], self.encode_images(pixel_values).to(x.dtype))

    def hidden_states(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """What the head reads (B, T, C); arguments as in `forward` and `loss`."""
        check_length(self.config, input_ids.shape[1])
        x = self.embed(input_ids, pixel_values)
        if segments is not None:
            positions, mask = packed_positions(segments)
        elif attention_mask is None or attention_mask.all():
            positions, mask = torch.arange(x.shape[1], device=x.device).expand(len(x), -1), None
        else:
            valid = attention_mask.bool()
            positions, mask = (valid.cumsum(-1) - 1).clamp(min=0), causal_mask(valid)
        return self.language_model(x, positions, mask)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, T), images (N, 3, S, S), attention_mask (B, T) with 0 at padding -> logits (B, T,
        V).

        Positions count from each row's first real token, so padding on either side changes nothing.
        Raises UserError for inputs whose shapes, dtypes or ids do not fit this model.
        """
        check_inputs(self.config, input_ids, pixel_values, attention_mask)
        return self.lm_head(self.hidden_states(input_ids, pixel_values, attention_mask))

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Summed cross-entropy of the supervised tokens; the caller divides by their number in
        the whole optimizer step, over all micro-batches and ranks.

        labels (B, T) hold IGNORE where nothing is supervised. Rows are padded on the right, where
        causal attention alone keeps real tokens from the padding. segments (B, T): see
        `packed_positions`.
        """
        x = self.hidden_states(input_ids, pixel_values, segments=segments)[:, :-1]
        targets = labels[:, 1:]  # each position predicts the next token
        supervised = targets != IGNORE
        x, targets = x[supervised], targets[supervised]  # (supervised, C), (supervised,)
        # logits for supervised positions only, and LOGIT_ROWS at a time; one empty chunk when there
        # are none
        chunks = zip(x.split(LOGIT_ROWS), targets.split(LOGIT_ROWS))
        return sum(checkpoint(self._chunk_loss, h, y, use_reentrant=False) for h, y in chunks)

    def _chunk_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum")
