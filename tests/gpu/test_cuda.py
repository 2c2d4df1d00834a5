"""What only a GPU shows: the CPU's numbers on it, the compiled step, low precision, its memory,
NCCL.

    pytest tests/gpu        # on a machine with CUDA; elsewhere every test here is skipped

A test of two ranks wants two GPUs.
"""

import copy
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training import argv, final, lines, make_home, run, train

import llava_min
from llava_min.fast.int_matmul import Int4Linear, portable, speed_up
from llava_min.load import load_model, on_meta
from llava_min.quant.methods import METHODS, quantized
from llava_min.tools.speed.setup import write_random
from llava_min.toy import draw as toy
from llava_min.training.batch_size import try_step
from llava_min.util.sizes import SIZES

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a GPU with CUDA: pytest tests/gpu on a machine with one",
)
GPU = "cuda"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def asked():
    """The bundled model in fp32 on the CPU and on the GPU, and four questions of unlike length."""
    (cpu, processor), (gpu, _) = (
        llava_min.load("tiny", dtype="fp32", device=d) for d in ("cpu", GPU)
    )
    pictures = [picture for _, picture in toy.generate("questions", 4, split="val")]
    texts = (
        "What is in the picture?",
        "How many shapes are there?",
        "What colour is the shape at the top left?",
        "Why?",
    )
    batch = processor.chat(
        [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": t}]}]
            for t in texts
        ],
        images=[[p] for p in pictures],
    )
    return cpu, gpu, batch


def on_gpu(batch: dict) -> dict:
    return {name: x.to(GPU) for name, x in batch.items()}


def test_logits_are_the_cpus(asked):
    cpu, gpu, batch = asked
    with torch.inference_mode():
        want, got = cpu(**batch), gpu(**on_gpu(batch)).cpu()
    real = batch["attention_mask"].bool()
    assert (got - want)[real].abs().max() <= 1e-4 * want[real].abs().max()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 4}, {"num_beams": 2, "length_penalty": 0.5}, {"repetition_penalty": 1.3}],
)
def test_answers_are_the_cpus(asked, options):
    cpu, gpu, batch = asked
    want = llava_min.generate(cpu, batch, max_new_tokens=24, **options)
    assert want == llava_min.generate(gpu, batch, max_new_tokens=24, **options) and any(want)


def test_the_compiled_step_answers_alike(asked):
    _, gpu, batch = asked
    want = llava_min.generate(gpu, batch, max_new_tokens=40)
    for _ in range(2):  # captured, then replayed into another cache
        assert llava_min.generate(gpu, batch, max_new_tokens=40, compile=True) == want


def test_sampling_is_seeded(asked):
    _, gpu, batch = asked
    draws = [
        llava_min.generate(
            gpu, batch, max_new_tokens=24, temperature=1.5, num_return_sequences=3, seed=s
        )
        for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 3e-2), ("fp16", 4e-3)])
def test_half_precision_is_near(asked, dtype, tolerance):
    cpu, _, batch = asked
    model, _ = llava_min.load("tiny", dtype=dtype, device=GPU)
    with torch.inference_mode():
        want, got = cpu(**batch), model(**on_gpu(batch)).float().cpu()
    real = batch["attention_mask"].bool()
    assert (got - want)[real].norm() <= tolerance * want[real].norm()


def test_loading_holds_the_model_once(tmp_path):
    write_random(on_meta(SIZES["300m"]), SIZES["300m"], tmp_path, torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(tmp_path, torch.bfloat16, torch.device(GPU))
    size = sum(p.nbytes for p in model.parameters())
    assert torch.cuda.max_memory_allocated() - before <= 1.10 * size


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_is_the_cpus(home, tmp_path, mode):
    log = [
        run(home, tmp_path / out, "--device", device, "--train", mode, "--max-steps", "6")
        for out, device in (("a", "cpu"), ("b", GPU))
    ]
    losses = [[x["loss"] for x in lines if "loss" in x] for lines in log]
    assert len(losses[1]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "switches", [(), ("--gradient-checkpointing",), ("--compile",), ("--cpu-offload",)]
)
def test_it_learns_in_half_precision(home, tmp_path, precision, switches):
    log = run(
        home,
        tmp_path / "run",
        "--device",
        GPU,
        "--precision",
        precision,
        "--max-steps",
        "9",
        "--epochs",
        "9",
        switches=switches,
    )
    losses = [x["loss"] for x in log if "loss" in x]
    assert len(losses) == 9 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_resumed_is_uninterrupted(home, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    flags = ("--device", GPU, "--max-steps", "6", "--save-every", "3", "--lora-dropout", "0.1")
    run(home, whole, *flags, switches=("--deterministic",))
    start = next((whole / "checkpoints").glob("step-*3"))
    run(home, part, *flags, "--resume", str(start), switches=("--deterministic",))
    losses = [{x["step"]: x["loss"] for x in lines(out) if "loss" in x} for out in (whole, part)]
    assert (
        losses[1] and losses[1].items() <= losses[0].items() and final(whole)[0] == final(part)[0]
    )


def test_running_out_of_memory_is_noticed_and_leaves_nothing():
    model, _ = llava_min.load("tiny", dtype="fp32", device=GPU)
    model.requires_grad_(True)
    before = torch.cuda.memory_allocated()
    assert not try_step(lambda: torch.empty(1 << 44, device=GPU).sum(), model)
    assert torch.cuda.memory_allocated() == before
    assert try_step(lambda: sum(p.square().sum() for p in model.parameters()), model)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", ["lora", "full", "freeze_vision"])
def test_two_ranks_are_one(home, tmp_path, mode):
    one = run(
        home,
        tmp_path / "one",
        "--device",
        GPU,
        "--train",
        mode,
        "--batch-size",
        "8",
        "--max-steps",
        "3",
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = argv(
        home,
        tmp_path / "two",
        "--device",
        "auto",
        "--train",
        mode,
        "--batch-size",
        "4",
        "--max-steps",
        "3",
    )
    script = Path(train.__file__)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={port}",
            str(script),
            *flags,
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    two = [
        json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [[x["loss"] for x in log if "loss" in x] for log in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 600])
def test_quantized_products_are_the_plain_ones(method, rows):
    """Few rows and many, gradients too; the kernel's order gives back what was stored."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 208, device=GPU, dtype=torch.bfloat16).requires_grad_(False)
    plain = quantized(linear, method)
    model = nn.Sequential(copy.deepcopy(plain))
    speed_up(model, torch.bfloat16)
    has_kernel = torch.version.cuda and torch.cuda.get_device_capability() >= (8, 0)
    four = method in ("int4", "awq4", "hqq4") and bool(has_kernel)
    assert isinstance(model[0], Int4Linear) == four
    x = torch.randn(1, rows, 256, device=GPU, dtype=torch.bfloat16)
    weights, out = torch.randn(1, rows, 208, device=GPU, dtype=torch.bfloat16), []
    for layer in (model, plain):
        z = x.clone().requires_grad_()
        y = layer(z)
        y.backward(weights)
        out.append((y.detach().float(), z.grad.float()))
    for ours, theirs in zip(*out):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
    portable(model)
    want = plain.state_dict()
    assert model[0].state_dict().keys() == want.keys()
    assert all(torch.equal(x, want[name]) for name, x in model[0].state_dict().items())
