"""A decode step as one CUDA graph: one launch per token instead of hundreds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Step = Callable[[nn.Module, Tensor, "KVCache"], Tensor]  # noqa: F821  (model, ids (R,), cache) -> logits


def handles(device: torch.device) -> bool:
    return device.type == "cuda"


def capture(step: Step, model: nn.Module, cache, rows: int) -> Step:
    """`step` recorded for `rows` rows and this cache, which must have static shapes."""
    ids = torch.zeros(rows, dtype=torch.long, device=model.device)
    counters = cache.positions, cache.next_slot
    before = [x.clone() for x in counters]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    cache.advance(1)  # what is recorded is a step, not a prefill
    with torch.cuda.stream(stream):  # once for real: compiles, and sets up what a capture must not
        step(model, ids, cache)
        for x, old in zip(counters, before):
            x.copy_(old)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(model, ids, cache)
    cache.length -= 1  # what `advance` counted

    def replay(model: nn.Module, new: Tensor, cache) -> Tensor:
        ids.copy_(new)
        graph.replay()
        return logits

    return replay
