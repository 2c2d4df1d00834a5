"""The loss on records that are not trained on; its exponential is the perplexity."""

from collections.abc import Callable

import torch
from torch import Tensor

from llava_min.data.dataset import Dataset
from llava_min.data.loader import loader
from llava_min.llava import Llava
from llava_min.parallel.fsdp import uneven_forwards
from llava_min.parallel.ranks import World, all_reduce_sum
from llava_min.training.batch_size import count_supervised


@torch.no_grad()
def mean_loss(
    model: Llava,
    dataset: Dataset,
    loss_of: Callable[[dict], Tensor],
    batch_size: int,
    world: World,
    stop_requested: Callable[[], int] = lambda: 0,
) -> float:
    """Cross entropy per supervised token of the whole `dataset`, in nats; the ranks share the work.

    loss_of: a batch -> its summed loss. stop_requested: where it is true on any rank of a sharded
    model, all raise Interrupted.
    """
    nll, num_tokens = 0.0, 0
    own = [(i,) for i in range(world.rank, len(dataset), world.size)]  # rows of one record each
    batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
    with uneven_forwards(model, world, stop_requested) as check:
        for batch, _ in loader(dataset, batches):
            nll += float(loss_of(batch))
            num_tokens += count_supervised(batch)
            check()
    nll, num_tokens = all_reduce_sum(world, nll, num_tokens)
    return nll / num_tokens
