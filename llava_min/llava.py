"""LLaVA-1.5: a vision tower whose patch features, through a two-layer projector, stand among the words.

Follows Liu et al. 2023 (https://arxiv.org/abs/2310.03744). The processor has already put one placeholder id per patch
where a picture goes, so merging is one scatter, guarded by a count.

Shapes: B batch, T tokens, N pictures in the batch, S pixels a side, P tokens per picture, C width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_min.cli import UserError
from llava_min.clip import VisionTower
from llava_min.config import IGNORE, LlavaConfig
from llava_min.llama import Llama, causal_mask

LOGIT_ROWS = 1024  # supervised positions whose logits exist at one time


def packed_rows(segments: Tensor) -> tuple[Tensor, Tensor]:
    """segments (B, T), a number for each record that lies in a row -> positions (B, T) that restart with each record,
    and the mask (B, 1, T, T) bool under which none sees another."""
    t = segments.shape[1]
    places = torch.arange(t, device=segments.device)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    positions = places - torch.where(begins, places, 0).cummax(-1)[0]
    mask = (segments[:, :, None] == segments[:, None, :]) & (places[:, None] >= places)
    return positions, mask[:, None]


class Projector(nn.Module):
    def __init__(self, config: LlavaConfig):
        super().__init__()
        width = config.text.hidden_size
        self.linear_1 = nn.Linear(config.vision.hidden_size, width, bias=config.projector_bias)
        self.linear_2 = nn.Linear(width, width, bias=config.projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Llava(nn.Module):
    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.vision_layers_used)
        self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Where the config says so, the head reads the embedding's own rows; called again once weights are in."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.norm.weight.device

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, S, S) -> what stands in the pictures' places (N, P, C)."""
        features = self.vision_tower(pixel_values.to(self.device, self.vision_tower.pre_layrnorm.weight.dtype))
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]  # without the class token
        return self.multi_modal_projector(features)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Ids (B, T), and the pictures of all rows in reading order (N, 3, S, S) -> embeddings (B, T, C).

        Raises UserError when the placeholders are not P for each picture.
        """
        x = self.language_model.embed_tokens(input_ids)
        places = input_ids == self.config.image_token_id
        if pixel_values is None and self.training:  # no picture is a batch of none: all that is trained has a gradient
            side = self.config.vision.image_size
            pixel_values = torch.zeros(0, 3, side, side, device=x.device)
        if pixel_values is None:
            if places.any():
                raise UserError("pixel_values: the prompt has image tokens and no pictures came; give the processor images=")
            return x
        want, found = len(pixel_values) * self.config.tokens_per_image, int(places.sum())
        if want != found:
            raise UserError(f"input_ids: {found} image tokens for {len(pixel_values)} pictures of {self.config.tokens_per_image} "
                            "each; let the processor make both")
        return x.masked_scatter(places[..., None], self.encode_images(pixel_values).to(x.dtype))

    def check(self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None) -> None:
        """Kinds, shapes and range of what a caller gives, or UserError."""
        told = lambda x: f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        if not (isinstance(input_ids, Tensor) and input_ids.dtype in (torch.int64, torch.int32) and input_ids.ndim == 2
                and input_ids.numel()):
            raise UserError(f"input_ids: {told(input_ids)}, expected an int64 tensor (rows, tokens), as the processor makes it")
        if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape):
            raise UserError(f"attention_mask: {told(attention_mask)} with input_ids {tuple(input_ids.shape)}, "
                            "expected (rows, tokens) for both; give what the processor made")
        size = self.config.vision.image_size
        if pixel_values is not None and not (isinstance(pixel_values, Tensor) and pixel_values.is_floating_point()
                                             and pixel_values.ndim == 4 and pixel_values.shape[1:] == (3, size, size)):
            raise UserError(f"pixel_values: {told(pixel_values)}, expected a float tensor (pictures, 3, {size}, {size}), "
                            "as the processor makes it")
        vocabulary = self.config.text.vocab_size
        low, high = input_ids.aminmax()
        if low < 0 or high >= vocabulary:
            raise UserError(f"input_ids: {int(low)} to {int(high)}, expected ids from 0 to {vocabulary - 1}; "
                            "the processor belongs to another model")

    def check_length(self, tokens: int) -> None:
        """A sequence of `tokens` fits the context and does not notice a sliding window, or UserError."""
        text = self.config.text
        if tokens > text.max_position_embeddings:
            raise UserError(f"the sequence is {tokens} tokens long and the model's context is {text.max_position_embeddings}; "
                            "shorten the prompt, use fewer pictures or lower max_new_tokens")
        if text.sliding_window is not None and tokens > text.sliding_window:
            raise UserError(f"the sequence is {tokens} tokens long, more than sliding_window {text.sliding_window}, "
                            "which is not implemented; shorten the prompt or lower max_new_tokens")

    def hidden(self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
               segments: Tensor | None = None) -> Tensor:
        """The hidden states (B, T, C) the head reads; arguments as in `forward` and `loss`."""
        self.check_length(input_ids.shape[1])
        x = self.embed(input_ids, pixel_values)
        if segments is not None:
            positions, mask = packed_rows(segments)
        elif attention_mask is None or attention_mask.all():
            positions, mask = torch.arange(x.shape[1], device=x.device).expand(len(x), -1), None
        else:
            real = attention_mask.bool()
            positions, mask = (real.cumsum(-1) - 1).clamp(min=0), causal_mask(real)
        return self.language_model(x, positions, mask)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Ids (B, T), pictures (N, 3, S, S), attention_mask (B, T) with 0 at padding -> logits (B, T, V).

        Positions count from each row's first real token, so padding on either side changes nothing.
        """
        self.check(input_ids, pixel_values, attention_mask)
        return self.lm_head(self.hidden(input_ids, pixel_values, attention_mask))

    def loss(self, input_ids: Tensor, labels: Tensor, pixel_values: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Summed cross-entropy of the supervised tokens; the caller divides by their number, over the whole step.

        labels (B, T) hold IGNORE where nothing is learned. Rows are padded on the right: causal attention alone keeps
        real tokens from the padding. segments (B, T) number the records of rows that hold several, see `packed_rows`.
        Logits are made for supervised positions only, LOGIT_ROWS at a time.
        """
        x = self.hidden(input_ids, pixel_values, segments=segments)[:, :-1]
        targets = labels[:, 1:]
        learned = targets != IGNORE
        x, targets = x[learned], targets[learned]  # (supervised, C), (supervised,)
        chunks = zip(x.split(LOGIT_ROWS), targets.split(LOGIT_ROWS))  # one of no rows when nothing is supervised
        return sum(checkpoint(self._chunk_loss, h, y, use_reentrant=False) for h, y in chunks)

    def _chunk_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(x)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
