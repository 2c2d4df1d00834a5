"""The loss of a micro-batch, in the precision of the run."""

import torch
from torch import Tensor, nn


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; fp32 means no autocast."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def summed_loss(
    model: nn.Module, dtype: torch.dtype, device: torch.device, batch: dict[str, Tensor]
) -> Tensor:
    """Cross entropy summed over the supervised tokens of `batch`, a scalar.

    The caller divides by the tokens of the whole step, so that a token counts the same in every
    micro-batch and on every rank.
    """
    with autocast(device, dtype):
        return model.loss(**{k: v.to(device, non_blocking=True) for k, v in batch.items()})
