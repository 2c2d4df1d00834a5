"""dist.py and shard.py: two ranks are one process in loss, gradients, weights and answers; a rank
that fails ends the job.

Each job below runs in processes of its own, started as torchrun or SLURM would, and asserts by
itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, hf_config, pixels, rows, write_processor

from llava_min import weights
from llava_min.config import LlavaConfig
from llava_min.errors import UserError
from llava_min.export.stream import save_weights
from llava_min.generate import generate
from llava_min.llava import IGNORE
from llava_min.load import open_checkpoint, random_model
from llava_min.lora import LoRAConfig, init_lora
from llava_min.parallel.dtensor import local_rows, local_shard
from llava_min.parallel.fsdp import full_state, shard, uneven_forwards
from llava_min.parallel.ranks import (
    World,
    all_gather,
    all_reduce_sum,
    any_rank,
    assert_same_on_ranks,
    first_host,
    read_ranks,
    start,
    use_all_cores,
)
from llava_min.training.targets import add_lora
from llava_min.training.trainable import set_trainable


@pytest.fixture(autouse=True)
def restored():
    """SLURM's variables become torchrun's in this process: none is left to the tests that follow."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(job, *args, slurm: bool = False) -> list[subprocess.Popen]:
    """`job`, a function of a test's file, in two processes."""
    port, module = free_port(), job.__module__
    code = f"import {module}; {module}.{job.__name__}(*{args!r})"
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    env["MASTER_PORT"] = str(port)
    names = (
        ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_NODELIST")
        if slurm
        else ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    )
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env | dict(zip(names, (str(rank), str(rank), "2", "localhost"))),
        )
        for rank in range(2)
    ]


def succeed(job, *args, **options) -> None:
    for process in launch(job, *args, **options):
        out = process.communicate(timeout=100)[0]
        assert process.returncode == 0, out


# ---- one process = two


def batch(pictures: tuple[int, ...], seed: int, dtype: torch.dtype) -> dict:
    ids = rows(*pictures, seed=seed)
    labels = ids.masked_fill(ids == IMAGE, IGNORE)
    labels[:, :6] = IGNORE
    seen = {"pixel_values": pixels(sum(pictures), seed).to(dtype)} if any(pictures) else {}
    return {"input_ids": ids, "labels": labels, **seen}


def build(kind: str, train: str, dtype: torch.dtype):
    model = random_model(LlavaConfig.from_hf(hf_config(kind)), seed=1)
    if train == "lora":
        add_lora(model, LoRAConfig(4, 8.0))
        init_lora(model, 0)
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    set_trainable(model.to(dtype), train)
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm()) if b.norm() else float(a.norm())


def equalities() -> None:
    """Pictures on both ranks, on one, on none; two micro-batches a rank; then answers, and a step
    again.
    """
    with start("cpu", timeout=60) as world:
        assert all_gather(world, {"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]
        assert all_reduce_sum(world, world.rank, 0.5, torch.tensor(2)) == [1.0, 1.0, 4.0]
        assert any_rank(world, world.rank == 1) and not any_rank(world, False)
        assert_same_on_ranks(world, "the settings", {"seed": 3})
        for value, says in (
            (world.rank, "the settings: 0 on rank 0 and 1 on rank 1; "),
            ({"lr": 1, "seed": world.rank}, "the settings, seed: 0 on rank 0 and 1 on rank 1; "),
        ):
            try:
                assert_same_on_ranks(world, "the settings", value)
            except UserError as e:
                assert str(e).startswith(says), e
            else:
                raise AssertionError("nobody noticed")
        for kind, train, dtype, bound in (
            ("qwen2", "lora", torch.float32, 1e-6),
            ("head_dim", "lora", torch.float64, 1e-12),
            ("qwen2", "full", torch.float64, 1e-12),
            ("llama", "full", torch.float32, 1e-6),
            ("llama", "freeze_vision", torch.float64, 1e-12),
        ):
            plain, model = build(kind, train, dtype), build(kind, train, dtype)
            shard(model, world, compute=torch.float32, full=train != "lora")
            # ranks × micro-batches × rows, the pictures of each
            for step in (
                [[(1, 0), (2,)], [(1, 1), (0,)]],
                [[(0, 0), (0,)], [(1, 2), (1,)]],
                [[(0, 0), (0,)], [(0, 0), (0,)]],
            ):
                parts = [
                    [batch(p, 10 * r + i, dtype) for i, p in enumerate(micros)]
                    for r, micros in enumerate(step)
                ]
                tokens = sum(
                    int((b["labels"][:, 1:] != IGNORE).sum()) for micros in parts for b in micros
                )
                losses = [0.0, 0.0]
                for i, (one, mine) in enumerate(
                    ((plain, sum(parts, [])), (model, parts[world.rank]))
                ):
                    one.zero_grad()
                    for b in mine:
                        loss = one.loss(**b) / tokens
                        loss.backward()
                        losses[i] += float(loss)
                loss = all_reduce_sum(world, losses[1])[0]
                assert abs(loss - losses[0]) <= 1e-6 * losses[0], (loss, losses)
                want, got = gradients(plain), gradients(model)
                for name in want.keys() | got.keys():
                    if name in want:
                        assert same(got[name], want[name]) <= bound, (kind, train, step, name)
                    else:  # no pictures at all
                        assert not got[name].any() and "language" not in name, (
                            kind,
                            train,
                            step,
                            name,
                        )
            state = full_state(model)
            assert set(state) == (
                {n for n, _ in plain.named_parameters()} if world.rank == 0 else set()
            )
            assert all(torch.equal(state[n], p) for n, p in plain.named_parameters() if n in state)
            assert full_state(model, {"language_model.norm.weight"}).keys() == state.keys() & {
                "language_model.norm.weight"
            }

            prompts = [
                {
                    "input_ids": rows(1, seed=i),
                    "attention_mask": torch.ones(1, 20),
                    "pixel_values": pixels(1, i),
                }
                for i in range(1 + 2 * world.rank)
            ]
            n = 3 + 4 * world.rank
            answers = lambda m: [
                generate(m.eval(), b, max_new_tokens=n, min_new_tokens=n) for b in prompts
            ]
            if dtype == torch.float32:  # the KV cache is
                with uneven_forwards(model, world):
                    ours = answers(model)
                assert ours == answers(plain)
                model.train().zero_grad(), plain.train().zero_grad()
                (model.loss(**parts[world.rank][0]) / tokens).backward()
                sum(plain.loss(**micros[0]) / tokens for micros in parts).backward()
                want, got = gradients(plain), gradients(model)
                assert all(same(got[name], want[name]) <= bound for name in want)

        for train in ("lora", "full"):  # in bf16: stored so where frozen, or gathered so
            plain, model = (
                build("llama", train, torch.float32),
                build("llama", train, torch.float32),
            )
            for p in model.parameters():
                p.data = p.data if p.requires_grad else p.data.bfloat16()
            shard(model, world, compute=torch.bfloat16, full=train == "full")
            parts = [
                batch(pictures, r, torch.float32) for r, pictures in enumerate(((1, 0), (0, 0)))
            ]
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(**parts[world.rank])
            loss.backward()
            sum(plain.loss(**b) for b in parts).backward()
            want, got = gradients(plain), gradients(model)
            assert want.keys() == got.keys() and {g.dtype for g in got.values()} == {torch.float32}
            assert (
                same(*(torch.cat([g[name].flatten() for name in want]) for g in (got, want))) < 0.1
            )
            with torch.autocast("cpu", torch.bfloat16), uneven_forwards(model, world):
                assert len(generate(model.eval(), prompts[0], max_new_tokens=2 + world.rank)) == 1


def test_two_ranks_are_one():
    succeed(equalities)


# ---- weights are read by those who keep them


@pytest.fixture(scope="module")
def checkpoint(spm, tmp_path_factory) -> Path:
    """A folder in fp16 whose tensors do not all split evenly."""
    folder = tmp_path_factory.mktemp("dist") / "m"
    config = hf_config("qwen2")
    config["text_config"]["intermediate_size"] = 49
    folder.mkdir()
    write_processor(folder, spm)
    (folder / "config.json").write_text(json.dumps(config))
    save_weights(
        dict(random_model(LlavaConfig.from_hf(config)).named_parameters()), folder, torch.float16
    )
    return folder


def reading(folder: str) -> None:
    """Config -> meta -> LoRA -> trained -> split -> read: nobody has the whole model, together they
    have it all.

    Once more with an embedding that lacks its last rows, as in the original layout: they become the
    mean of the others.
    """
    fill, embedding = weights.Reader.fill, "language_model.embed_tokens.weight"
    with start("cpu", timeout=60) as world:
        for stored in (384, 300):
            models, kept, read = [], [0, 0], [0, 0]
            for i, one in enumerate((world, World(0, 1, 0, world.device))):

                def count(reader, out, entry, first=0):
                    read[i] += out.numel()
                    fill(reader, out, entry, first)

                weights.Reader.fill = count
                ready = open_checkpoint(folder, template="vicuna_v1", image_aspect_ratio="pad")
                ready.entries[embedding] = replace(ready.entries[embedding], shape=(stored, 32))
                add_lora(ready.model, LoRAConfig(4, 8.0, dora=True))
                set_trainable(ready.model, "lora")
                shard(ready.model, one, compute=torch.bfloat16, full=False)
                ready.load_weights(torch.bfloat16, world.device)
                assert all(
                    local_shard(p).isnan().all() == (".lora_" in name)
                    for name, p in ready.model.named_parameters()
                    if local_shard(p).numel()
                )
                init_lora(ready.model, 5)
                kept[i] = sum(local_shard(p).numel() for p in ready.model.parameters())
                models.append(ready.model)
            split, plain = models
            for name, p in split.named_parameters():
                q = plain.get_parameter(name)
                first, stop = local_rows(p)
                assert (
                    torch.equal(local_shard(p), q[first:stop])
                    and q.isfinite().all()
                    and p.requires_grad == q.requires_grad
                ), name
                learns = ".lora_" in name or name.startswith("multi_modal_projector.")
                assert p.dtype == q.dtype == (torch.float32 if learns else torch.bfloat16), name
            tail = plain.get_parameter(embedding)[stored:].float() - plain.get_parameter(embedding)[
                :stored
            ].float().mean(0)
            assert not len(tail) or tail.abs().max() < 1e-2
            if stored == 384:
                # frozen: whole on each
                tower = sum(p.numel() for p in plain.vision_tower.parameters())
                assert kept[0] - tower <= 0.51 * (kept[1] - tower) and read[0] - tower <= 0.51 * (
                    read[1] - tower
                ), (kept, read)
                assert read[1] == sum(
                    p.numel() for name, p in plain.named_parameters() if ".lora_" not in name
                )
        x = batch((1, 0), world.rank, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            a, b = (float(m.train().loss(**x).detach()) for m in models)
        assert abs(a - b) <= 1e-6 * b


def test_each_rank_reads_its_rows(checkpoint):
    """Started as SLURM does."""
    succeed(reading, str(checkpoint), slurm=True)


# ---- a rank that fails


def failing(how: str) -> None:
    with start("cpu", timeout=3) as world:
        for step in range(2000):
            if how == "late" and world.rank == 0 and step == 5:
                return
            if world.rank == 1 and step == 5:
                if how == "error":
                    raise UserError("record 7: no such picture; correct it")
                if how == "bug":
                    {}["x"]
                if how == "early":
                    return
                if how == "exit":
                    sys.exit(143)
                os.kill(os.getpid(), signal.SIGSTOP if how == "stuck" else signal.SIGKILL)
            all_reduce_sum(world, 1.0)
            time.sleep(0.001)
        raise AssertionError("the other rank was not missed")


def fork(log: Path, how: str, rank: int, port: int) -> int:
    """`failing` in a process of its own, its output in `log`."""
    if pid := os.fork():
        return pid
    try:
        sys.stderr = open(log, "w", buffering=1)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        failing(how)
        os._exit(0)
    finally:
        os._exit(99)


def test_a_failed_or_stuck_rank_ends_the_job_in_one_line(tmp_path):
    """The last line names the cause; nobody hangs, and no survivor says that it went well."""
    codes = {"error": 2, "bug": 1, "early": 0, "exit": 143, "killed": -9, "late": -9, "stuck": -9}
    pids = {}
    for how in codes:
        port = free_port()
        pids[how] = [fork(tmp_path / f"{how}-{rank}", how, rank, port) for rank in range(2)]
    for how, code in codes.items():
        survivor, culprit = pids[how]
        signal.alarm(30)
        ended = os.waitstatus_to_exitcode(os.waitpid(survivor, 0)[1])
        if how == "stuck":
            os.kill(culprit, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(culprit, 0)[1]) == code, how
        signal.alarm(0)
        ours, theirs = ((tmp_path / f"{how}-{rank}").read_text() for rank in range(2))
        assert ended == 1 and ours.count("\n") == 1, (how, ours)
        assert ours.startswith("error: rank 0: another rank ended or does not answer ("), (
            how,
            ours,
        )
        says = {
            "error": "error: rank 1: record 7: no such picture; correct it\n",
            "bug": "error: rank 1: KeyError: 'x'\n",
        }.get(how, "")
        assert theirs.endswith(says) and (
            theirs == says or how == "bug" and "Traceback" in theirs
        ), (how, theirs)


def test_torchrun_shows_the_cause_last(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "import test_dist; test_dist.failing('error')\n"
    )
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    run = subprocess.run(
        [sys.executable, *launcher, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-2:]
    assert last[0].endswith("error: rank 1: record 7: no such picture; correct it") and set(
        last[1]
    ) == {"="}, run.stderr


# ---- the launcher's variables

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-09,12]",
    "SLURM_JOB_ID": "1234567",
}


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name in TORCHRUN or name.startswith("SLURM_"):
            monkeypatch.delenv(name)

    def put(**names):
        for name in (*TORCHRUN, *SLURM):
            monkeypatch.delenv(name, raising=False)
        for name, value in names.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return put


def test_who_takes_part(environment):
    for names, ranks in (
        ({}, (0, 1, 0)),
        ({"MASTER_ADDR": "here"}, (0, 1, 0)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        # torchrun within SLURM
        (TORCHRUN, (1, 2, 1)),
        (SLURM, (3, 4, 1)),
        ({**SLURM, **TORCHRUN}, (1, 2, 1)),
        ({"SLURM_NTASKS": "4"}, (0, 1, 0)),  # salloc, without srun
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, (0, 1, 0)),
    ):
        environment(**names)
        assert read_ranks() == ranks, names
    environment(**SLURM)
    read_ranks()
    assert os.environ["MASTER_ADDR"] == "gpu07" and 20000 <= int(os.environ["MASTER_PORT"]) < 30000
    for nodes, first in (
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[007-009,12],cpu1", "gpu007"),
        ("n[3]", "n3"),
        ("r[1-2]n[4-5]", "r1n4"),
        ("node-a-1.site.org,node-a-2.site.org", "node-a-1.site.org"),
    ):
        assert first_host(nodes) == first, nodes


@pytest.mark.parametrize(
    "names, says",
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is set and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not",
        ),
        ({**TORCHRUN, "MASTER_ADDR": None}, "RANK is set and MASTER_ADDR not"),
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "RANK is set and MASTER_ADDR not"),
        ({**TORCHRUN, "RANK": "2"}, "RANK: '2' is not a whole number from 0 to 1"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK: '-1'"),
        ({**TORCHRUN, "RANK": "one"}, "RANK: 'one'"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE: '0'"),
        ({**TORCHRUN, "WORLD_SIZE": "2.0"}, "WORLD_SIZE: '2.0'"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK: '2'"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT: '99999'"),
        ({**TORCHRUN, "RANK": "\x1b[2J"}, r"RANK: '\\x1b[2J'"),
        ({**SLURM, "SLURM_PROCID": "4"}, "RANK: '4'"),
        ({**SLURM, "SLURM_JOB_NODELIST": None}, "RANK is set and MASTER_ADDR not"),
    ],
)
def test_variables_that_cannot_be_right(environment, names, says):
    environment(**names)
    with pytest.raises(UserError) as e:
        start("cpu", timeout=1)
    assert says in str(e.value) and "; " in str(e.value) and str(e.value).isprintable(), str(
        e.value
    )


def test_devices_of_ranks(environment, monkeypatch):
    environment(**TORCHRUN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        UserError,
        match="LOCAL_RANK: 1, and this machine has 1 GPUs; start at most one process per GPU",
    ):
        start("auto")
    with pytest.raises(UserError, match="cuda:0 was asked for by each of 2 ranks; give cuda"):
        start("cuda:0")
    environment()
    with pytest.raises(UserError, match="device: cuda:1 was asked for and there are 1 GPUs"):
        start("cuda:1")
    for other in ("xpu", "meta", "mps", "mps:0"):
        with pytest.raises(
            UserError,
            match=f"device: {other} is not a device that this code runs on; give auto, cpu, cuda",
        ):
            start(other)


def test_ranks_that_do_not_meet(environment):
    environment(**{**TORCHRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    with pytest.raises(
        UserError, match=r"rank 1 of 2 did not meet the others at 127\.0\.0\.1:\d+ \("
    ):
        start("cpu", timeout=1)


def test_what_ranks_do_not_agree_on_is_named(monkeypatch):
    world = World(0, 2, 0, torch.device("cpu"))
    monkeypatch.setattr(
        "llava_min.parallel.ranks.all_gather", lambda world, value: [value, value | {"lr": 2}]
    )
    with pytest.raises(
        UserError, match="the settings, lr: 1 on rank 0 and 2 on rank 1; start every rank"
    ):
        assert_same_on_ranks(world, "the settings", {"seed": 0, "lr": 1})


def test_idle_cores_are_used(monkeypatch, capsys):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, value in (
        ("TORCHELASTIC_RUN_ID", "x"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("OMP_NUM_THREADS", "1"),
    ):
        monkeypatch.setenv(name, value)
    use_all_cores(0), use_all_cores(1)
    assert (
        threads == [4, 4]
        and capsys.readouterr().err == "4 threads a rank instead of torchrun's OMP_NUM_THREADS=1\n"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    use_all_cores(0)
    assert len(threads) == 2


def test_one_process_is_not_wrapped(environment):
    environment()
    with start("cpu") as world:
        model = build("qwen2", "full", torch.float32)
        before = dict(model.named_parameters())
        shard(model, world, compute=torch.bfloat16, full=True)
        with uneven_forwards(model, world):
            assert (
                all_reduce_sum(world, 2, 0.5) == [2.0, 0.5]
                and all_gather(world, "x") == ["x"]
                and any_rank(world, True)
            )
        state = full_state(model)
        assert all(
            p is before[name] and torch.equal(state[name], p)
            for name, p in model.named_parameters()
        )
        # the parameters themselves; who writes them converts some at a time
        half = full_state(model, None, torch.bfloat16)
        assert all(half[name].data_ptr() == p.data_ptr() for name, p in before.items())
        with pytest.raises(ZeroDivisionError):  # a single process shows its own errors
            with world:
                1 / 0


def test_offload_works_in_one_process(environment):
    environment()
    plain, model = (build("llama", "full", torch.float32) for _ in range(2))
    with start("cpu") as world:
        shard(model, world, compute=torch.float32, full=True, cpu_offload=True)
        assert all(p.to_local().device.type == "cpu" for p in model.parameters())
        for one in (plain, model):
            one.loss(**batch((1, 0), 0, torch.float32)).backward()
        want, got = gradients(plain), gradients(model)
        assert all(same(got[name], want[name]) <= 1e-6 for name in want)
        # what is copied is copied as it will be stored
        half = full_state(model, None, torch.bfloat16)
        assert all(
            half[name].dtype == torch.bfloat16 and torch.equal(half[name], p.bfloat16())
            for name, p in plain.named_parameters()
        )
    assert not torch.distributed.is_initialized()
