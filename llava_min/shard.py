"""Who holds which rows of a model, and what another page needs to know of a split tensor.

The model is split by FSDP2 (Zhao et al. 2023, https://arxiv.org/abs/2304.11277; `torch.distributed.fsdp.fully_shard`): each
rank keeps a part of every parameter's rows and gathers a decoder block when it is its turn. The caller's loss is a sum
divided by the whole step's count of tokens, so gradients are added up over the ranks, never averaged.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llava_min.cli import UserError
from llava_min.dist import World, backend, total
from llava_min.fast.cpu_linear import unpacked
from llava_min.signals import Interrupted


def shard(model: nn.Module, world: World, *, compute: torch.dtype, full: bool, cpu_offload: bool = False) -> None:
    """Split `model`, on meta or not, over the ranks; `requires_grad` and all layers must be as they will be.

    The units are the decoder blocks and the rest. A frozen tower stays whole on every rank, which need then not run
    it together; a trained one is split by block. Parameters are gathered as they are stored; with `full`, where all
    are trained and stored in fp32, in `compute`, and their gradients are reduced in fp32.
    `cpu_offload` keeps the parts and their optimizer in CPU memory; it works in one process, too.
    """
    if world.size == 1 and not cpu_offload:
        return
    from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy,
                                        fully_shard, register_fsdp_forward_method)

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(f"several processes need torch 2.9 or later, and this is {torch.__version__}; "
                        "pip install -U torch")
    if not dist.is_initialized():
        dist.init_process_group(backend(world.device), store=dist.HashStore(), rank=0, world_size=1)
    kind = world.device.type
    options = dict(
        mesh=dist.device_mesh.init_device_mesh(kind, (world.size,)),
        offload_policy=CPUOffloadPolicy(pin_memory=kind == "cuda") if cpu_offload else OffloadPolicy(),
        mp_policy=MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
        if full and compute != torch.float32 else MixedPrecisionPolicy())
    for block in model.language_model.layers:
        fully_shard(block, **options)
    tower, replicated = model.vision_tower, set()
    if any(p.requires_grad for p in tower.parameters()):
        for block in tower.layers:
            fully_shard(block, reshard_after_forward=False, **options)
    else:
        replicated = set(tower.parameters())
    fully_shard(model, ignored_params=replicated, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")


@contextmanager
def uneven(model: nn.Module, world: World, asked: Callable[[], int] = lambda: 0) -> Iterator[Callable[[], None]]:
    """Within, ranks may run the model different numbers of times, as they do to generate answers.

    All ranks gather a block together. So each says when it runs the decoder, and one that is done runs two tokens of
    its own for as long as others go on. The rest of the model is gathered once, for the whole time. An autocast that
    the model needs is to be around this, too.

    When `asked` is true on any rank, all leave by Interrupted, having run the decoder as often: before its next run, or
    where what this gives is called, which has to follow each call of `loss`, as no one may leave from within FSDP's forward.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield lambda: None
        return
    leave = False

    def check() -> None:
        if leave:
            raise Interrupted

    def others_go_on(here: bool) -> bool:
        nonlocal leave
        check()
        busy, stop = total(world, here, bool(asked()))
        leave = stop > 0
        return busy > 0

    ids = torch.zeros(1, 2, dtype=torch.long, device=world.device)
    step = lambda: model.loss(ids, ids)
    with torch.no_grad():
        step()  # for FSDP takes the module that runs first for the whole model
        rest = [m for m in (model, *model.vision_tower.layers) if isinstance(m, FSDPModule)]
        for module in rest:
            module.unshard()
        announce = model.language_model.register_forward_pre_hook(lambda *_: others_go_on(True) and None)
        try:
            try:
                yield check
            finally:
                announce.remove()
            others = True
            while others:
                others = others_go_on(False)
                step()  # the last one by all: in the next backward pass FSDP gathers in the order it has seen
            check()
        finally:
            for module in rest:
                module.reshard()


def split(p: Tensor) -> bool:
    """Whether `p` is a DTensor; the class is not imported, because that takes as long as all else."""
    return hasattr(p, "device_mesh")


def local(p: Tensor) -> Tensor:
    """What this rank keeps of `p`, to be read or written: all of it, or its rows of a DTensor."""
    p = p.detach()
    return p.to_local() if split(p) else p


def own_rows(p: Tensor) -> tuple[int, int]:
    """First and end of the rows of `p` that this rank keeps: all, or its part of a DTensor."""
    if not split(p):
        return 0, len(p)
    part = -(-len(p) // p.device_mesh.size())
    first = min(part * p.device_mesh.get_local_rank(), len(p))
    return first, min(first + part, len(p))


def full_state(model: nn.Module, names: set[str] | None = None) -> dict[str, Tensor]:
    """The whole parameters of `model`, or those of `names`, on the CPU of rank 0; elsewhere nothing.

    One after the other, so that no device holds more than one whole. What is not split is the parameter itself.
    """
    state = {}
    for name, p in model.named_parameters():
        if names is None or name in names:
            whole = p.detach()
            if split(p):
                whole = whole.to(p.device_mesh.device_type).full_tensor()
            if not dist.is_initialized() or dist.get_rank() == 0:
                state[name] = unpacked(whole).cpu()
    return state
