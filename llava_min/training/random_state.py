"""The random streams of one process (Python's, numpy's, torch's): saved, restored, seeded anew."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def get_rng_state(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of every stream: Python's and numpy's as JSON, torch's as tensors."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    numbers = {"python": [version, list(words), gauss], "numpy": [kind, keys.tolist(), *rest]}
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return numbers, tensors


def set_rng_state(
    numbers: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> None:
    """Restore what `get_rng_state` gave; a run on CPU has no stream of a GPU to restore."""
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(numbers["numpy"]))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed every stream with a number that depends on the arguments alone."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7])
    random.seed(number)
    np.random.seed(number % (1 << 32))
    torch.manual_seed(number)
