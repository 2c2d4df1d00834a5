"""One model over several ranks: each keeps some rows of every parameter and gathers a block to run
it.

FSDP2 (Zhao et al. 2023, https://arxiv.org/abs/2304.11277; `torch.distributed.fsdp.fully_shard`).
The loss is a sum divided by the token count of the whole step, so gradients are added up over the
ranks, never averaged.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llava_min.errors import Interrupted, UserError
from llava_min.fast.cpu_linear import unpacked
from llava_min.parallel.dtensor import gather, is_sharded
from llava_min.parallel.ranks import World, all_reduce_sum, backend


def shard(
    model: nn.Module,
    world: World,
    *,
    compute: torch.dtype,
    full: bool,
    cpu_offload: bool = False,
) -> None:
    """Shard `model`, on meta or not, over the ranks; `requires_grad` and all layers must be final.

    Each decoder block is a unit, and the rest is one. A frozen tower stays whole on every rank, so
    ranks need not run it together; a trained one is sharded by block. Parameters are gathered as
    they are stored; with `full`, where all are trained and stored in fp32, they are gathered in
    `compute` and their gradients are reduced in fp32. `cpu_offload` keeps shards and optimizer in
    CPU memory, in one process too.
    """
    if world.size == 1 and not cpu_offload:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(
            f"several processes need torch 2.9 or later, and this is {torch.__version__}; "
            "pip install -U torch"
        )
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group(backend(world.device), store=store, rank=0, world_size=1)
    options = fsdp_options(world, compute if full else torch.float32, cpu_offload)

    # decoder blocks, tower blocks if they are trained, then all that is left
    for block in model.language_model.layers:
        fully_shard(block, **options)
    tower, replicated = model.vision_tower, set()
    if any(p.requires_grad for p in tower.parameters()):
        for block in tower.layers:
            fully_shard(block, reshard_after_forward=False, **options)
    else:
        replicated = set(tower.parameters())
    fully_shard(model, ignored_params=replicated, reshard_after_forward=False, **options)

    # gradients are summed, not averaged
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")


def fsdp_options(world: World, gather_dtype: torch.dtype, cpu_offload: bool) -> dict:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

    kind = world.device.type
    precision = MixedPrecisionPolicy()
    if gather_dtype != torch.float32:
        precision = MixedPrecisionPolicy(gather_dtype, torch.float32, cast_forward_inputs=False)
    return {
        "mesh": dist.device_mesh.init_device_mesh(kind, (world.size,)),
        "offload_policy": CPUOffloadPolicy(pin_memory=kind == "cuda")
        if cpu_offload
        else OffloadPolicy(),
        "mp_policy": precision,
    }


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def uneven_forwards(
    model: nn.Module, world: World, asked: Callable[[], int] = lambda: 0
) -> Iterator[Callable[[], None]]:
    """Within, ranks may run the model different numbers of times, as generating answers does.

    FSDP's all-gathers are collective. So each rank announces every run of the decoder, and a rank
    that is done runs dummy forwards of two tokens until the others are done. What is not in a
    decoder block is gathered once, for the whole time. An autocast that the model needs must
    enclose this.

    When `asked` is true on any rank, all leave by Interrupted after the same number of runs: before
    the next run, or where the yielded function is called, which must follow each call of `loss`, as
    no rank may leave from within FSDP's forward.
    """
    modules = fsdp_modules(model)
    if not modules:
        yield lambda: None
        return
    leave = False

    def check() -> None:
        if leave:
            raise Interrupted

    def any_running(here: bool) -> bool:
        nonlocal leave
        check()
        running, stop = all_reduce_sum(world, here, bool(asked()))
        leave = stop > 0
        return running > 0

    ids = torch.zeros(1, 2, dtype=torch.long, device=world.device)
    dummy_forward = lambda: model.loss(ids, ids)
    announce = lambda module, inputs: any_running(True) and None
    blocks = set(model.language_model.layers)
    with torch.no_grad():
        dummy_forward()  # FSDP takes the module that is called first for its root
        rest = [module for module in modules if module not in blocks]
        for module in rest:
            module.unshard()
        hook = model.language_model.register_forward_pre_hook(announce)
        try:
            try:
                yield check
            finally:
                hook.remove()
            running = True
            while running:
                running = any_running(False)
                # the last one is run by all: the next backward gathers in the order of this forward
                dummy_forward()
            check()
        finally:
            for module in rest:
                module.reshard()


def full_state(
    model: nn.Module, names: set[str] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Whole parameters of `model`, or those of `names`, on the CPU of rank 0; {} on other ranks.

    One at a time, so that no device holds more than one whole. What is whole on the CPU is the
    parameter itself; what is copied there becomes `dtype`, None being its own.
    """
    state = {}
    for name, p in model.named_parameters():
        if names is None or name in names:
            whole = gather(p)
            if not dist.is_initialized() or dist.get_rank() == 0:
                is_copied = is_sharded(p) or whole.device.type != "cpu"
                state[name] = unpacked(whole).to("cpu", dtype if is_copied else None)
    return state
