"""The ranks of a job: how they find each other, exchange values, and end together.

torchrun or SLURM starts them. Plain `python` is one process without a group, where nothing here
costs anything.
"""

import json
import os
import re
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from llava_min.errors import UserError, escape_controls, info

# torchrun's variables, and SLURM's for the same.
RANKS = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
# a SLURM job takes one of these by its id, so that two jobs on one machine do not collide
PORTS = 20000, 30000


@dataclass(frozen=True)
class World:
    """This process among all ranks. `with start(...) as world:` ends the whole job, with a message
    of one line, when any rank fails.
    """

    rank: int
    size: int
    local_rank: int  # on this machine
    device: torch.device

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is None:
            try:
                return leave(self)
            except RuntimeError as e:
                error = e
        if self.size > 1:
            abort(self, error)


def read_ranks() -> tuple[int, int, int]:
    """(rank, size, local rank) from torchrun's variables or else SLURM's; (0, 1, 0) without.

    SLURM's are copied to torchrun's. Raises UserError for variables that are incomplete, no
    numbers, or contradict each other.
    """
    env = os.environ
    if (
        not {"RANK", "WORLD_SIZE"} & env.keys()
        and "SLURM_PROCID" in env
        and env.get("SLURM_NTASKS", "1") != "1"
    ):
        env.update({ours: env[slurms] for ours, slurms in RANKS.items() if slurms in env})
        low, high = PORTS
        job = re.sub(r"\D", "", env.get("SLURM_JOB_ID", "")) or "0"
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_JOB_NODELIST", "")))
        env.setdefault("MASTER_PORT", str(low + int(job) % (high - low)))
    if (
        not {"RANK", "WORLD_SIZE"} & env.keys()
        or env.get("WORLD_SIZE") == "1"
        and env.get("RANK", "0") == "0"
    ):
        return 0, 1, 0
    if absent := [name for name in (*RANKS, "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
        given = "RANK" if "RANK" in env else "WORLD_SIZE"
        raise UserError(
            f"{given} is set and {', '.join(absent)} not, so the other processes cannot be found; "
            f"start with torchrun or srun, or unset {given} to run as one process"
        )
    size = env_int("WORLD_SIZE", 1, 1 << 20)
    env_int("MASTER_PORT", 1, 65535)
    return env_int("RANK", 0, size - 1), size, env_int("LOCAL_RANK", 0, size - 1)


def env_int(name: str, low: int, high: int) -> int:
    text = os.environ[name]
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UserError(
            f"{name}: {escape_controls(text)[:40]!r} is not a whole number from {low} to {high}; "
            "start with torchrun or srun, which set it"
        )
    return int(text)


def first_host(nodes: str) -> str:
    """The first of SLURM's list of machines: gpu[007-009,12],cpu1 -> gpu007."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def pick_device(device: str | torch.device) -> torch.device:
    """The device to run on; auto is the GPU if there is one. Raises UserError if it is absent."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(
            f"{device!r} is not a device; give auto, cpu, cuda or cuda:N", "device"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"{device} is not a device that this code runs on; give auto, cpu, cuda or cuda:N",
            "device",
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "cuda was asked for and torch finds no CUDA GPU on this machine; give cpu", "device"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"{device} was asked for and there are {count} GPUs; give cuda:0", "device")
    return device


def start(device: str | torch.device = "auto", timeout: float = 600.0) -> World:
    """Join the other ranks, if there are any.

    timeout: seconds a rank may keep the others waiting. Raises UserError for launch variables that
    cannot be right, and when the ranks do not find each other.
    """
    rank, size, local_rank = read_ranks()
    device = pick_device(device)
    if size == 1:
        return World(0, 1, 0, device)
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(
                f"{device} was asked for by each of {size} ranks; give cuda, and each takes its "
                "own",
                "device",
            )
        if local_rank >= (count := torch.cuda.device_count()):
            raise UserError(
                f"LOCAL_RANK: {local_rank}, and this machine has {count} GPUs; "
                "start at most one process per GPU (torchrun --nproc_per_node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend(device), timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {rank} of {size} did not meet the others at {escape_controls(where)[:200]} "
            f"({first_line(e)}); "
            "are all started, is the address right and its port free?"
        ) from None
    if device.type == "cpu":
        use_all_cores(rank)
    return World(rank, size, local_rank, device)


def backend(device: torch.device) -> str:
    # counts and offloaded parameters are on the CPU
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def use_all_cores(rank: int) -> None:
    """Undo torchrun's OMP_NUM_THREADS=1, its default, which leaves most cores idle."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        threads = len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])
        if threads > 1:
            torch.set_num_threads(threads)
            if rank == 0:
                info(f"{threads} threads a rank instead of torchrun's OMP_NUM_THREADS=1")


def leave(world: World) -> None:
    """Leave the group once all ranks are here; RuntimeError if one is not."""
    if dist.is_initialized():
        any_rank(world, False)
        dist.destroy_process_group()


def abort(world: World, error: BaseException) -> NoReturn:
    """End this process at once, the cause in one line.

    Nothing is shut down in order: that would wait for ranks that no longer answer. torchrun ends
    its report with the line of the rank that failed first.
    """
    reason, code = exit_reason(error)
    if reason is not None:
        line = f"error: rank {world.rank}: {reason}"
        info(line)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            extra = {"py_callstack": escape_controls(line), "timestamp": str(int(time.time()))}
            with open(path, "w", encoding="utf-8") as f:
                json.dump({"message": {"message": escape_controls(line), "extraInfo": extra}}, f)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_reason(error: BaseException) -> tuple[str | None, int]:
    """(message, exit code) for what ended a rank; None without a message."""
    if isinstance(error, SystemExit):
        if isinstance(error.code, int | None):
            return None, error.code or 0
        return error.code, 1
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 130
    if isinstance(error, UserError):
        return str(error), 2
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    if isinstance(error, dist.DistError) or is_gloo:
        time.sleep(1)  # so that the message of the rank that failed comes first
        # without gloo's file and line
        what = re.sub(r"^\[\S*\] ", "", first_line(error)).partition(". ")[0]
        return f"another rank ended or does not answer ({what}); its own message says why", 1
    traceback.print_exception(error)
    return f"{type(error).__name__}: {first_line(error)}", 1


def first_line(error: BaseException) -> str:
    return escape_controls(str(error).strip().partition("\n")[0])[:300]


# ---- collectives; in one process they return its own values


def all_reduce_sum(world: World, *numbers: float | Tensor) -> list[float]:
    """Each number summed over the ranks, in fp64."""
    sums = torch.tensor([float(n) for n in numbers], dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def any_rank(world: World, flag: bool) -> bool:
    """Whether `flag` is true on any rank."""
    return all_reduce_sum(world, flag)[0] > 0


def all_gather(world: World, value: Any) -> list[Any]:
    """The JSON-like value of every rank, in rank order, on every rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def assert_same_on_ranks(world: World, name: str, value: Any) -> None:
    """Raises UserError on all ranks unless they have the same `value`.

    For dicts it names the first key that differs.
    """
    first, *others = all_gather(world, value)
    for rank, other in enumerate(others, 1):
        if other != first:
            if isinstance(first, dict) and isinstance(other, dict):
                key = next(key for key in first | other if first.get(key) != other.get(key))
                name, first, other = f"{name}, {key}", first.get(key), other.get(key)
            show = lambda x: escape_controls(x)[:100]
            raise UserError(
                f"{name}: {show(first)} on rank 0 and {show(other)} on rank {rank}; "
                "start every rank with the same command, code and files"
            )
