"""Tensors that may be shards: what this process keeps of a DTensor, or all of a plain tensor.

The DTensor class is not imported: that takes as long as all else.
"""

from torch import Tensor


def is_sharded(p: Tensor) -> bool:
    """Whether `p` is a DTensor, of which this process keeps some rows."""
    return hasattr(p, "device_mesh")


def local_shard(p: Tensor) -> Tensor:
    """What this rank keeps of `p`, to be read or written: all of it, or its rows of a DTensor."""
    p = p.detach()
    return p.to_local() if is_sharded(p) else p


def gather(p: Tensor) -> Tensor:
    """All of `p`, on the mesh's device if it is a shard; every rank calls this at the same time."""
    p = p.detach()
    return p.to(p.device_mesh.device_type).full_tensor() if is_sharded(p) else p


def local_rows(p: Tensor) -> tuple[int, int]:
    """First and end of the rows of `p` that this rank keeps, as FSDP2 divides them."""
    if not is_sharded(p):
        return 0, len(p)
    per_rank = -(-len(p) // p.device_mesh.size())
    first = min(per_rank * p.device_mesh.get_local_rank(), len(p))
    return first, min(first + per_rank, len(p))
