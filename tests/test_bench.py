"""bench: both halves on a tiny size, and `python -m llava_min` that leads to them."""

import argparse
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_min import __main__ as verbs
from llava_min.config import LlavaConfig, TextConfig, VisionConfig
from llava_min.errors import UserError
from llava_min.export import stream
from llava_min.load import load_model, on_meta
from llava_min.tools import bench, bench_train
from llava_min.tools.speed import answering, setup, worker
from llava_min.util.sizes import SIZES

TEST = LlavaConfig(
    vision=VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
    ),
    text=TextConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    ),
    image_token_id=300,
)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The size `test`; temporary folders go to tmp_path/tmp."""
    monkeypatch.setitem(SIZES, "test", TEST)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run(tmp_path: Path, *flags: str) -> dict:
    bench.main(["test", "--device", "cpu", "--json", str(tmp_path / "out.json"), *flags])
    [result] = json.loads((tmp_path / "out.json").read_text())
    assert not any((tmp_path / "tmp").glob("llava_min-bench-*"))  # the random weights are gone
    return result


def test_alone(tiny, capsys):
    r = run(tiny, "--rounds", "1", "--no-peer", "--new-tokens", "3", "--beams", "1")
    assert "transformers" not in r and "ratio" not in r and "beams_s" not in r["ours"]
    assert r["prompt_tokens"] == 4 + 30
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32  # q and o, k and v (grouped), the MLP
    assert r["bandwidth"]["bytes_per_token"] == 2 * (2 * layer + 320 * 32)
    assert r["bandwidth"]["share_of_matvec"] > 0 and r["bandwidth"]["share_of_read"] > 0
    assert all(
        r["ours"][key] > 0
        for key in (
            "import_s",
            "load_s",
            "start_to_first_token_s",
            "first_token_s",
            "decode_tokens_s",
            "peak_greedy_mib",
        )
    )
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80 and any(line.startswith("decode ") for line in table)


def test_beside_transformers(tiny, capsys):
    pytest.importorskip("transformers", reason="measures transformers beside us")
    r = run(tiny, "--rounds", "1", "--dtype", "fp32", "--new-tokens", "4", "--beams", "2")
    assert r["same_ids"] == {"greedy": 4, "beam": 4}  # the same work
    a, b = r["ours"], r["transformers"]
    assert a.keys() == b.keys() == r["ratio"].keys()
    assert r["ratio"]["decode_tokens_s"] == pytest.approx(
        a["decode_tokens_s"] / b["decode_tokens_s"]
    )
    assert r["ratio"]["first_token_s"] == pytest.approx(b["first_token_s"] / a["first_token_s"])
    assert r["ratio"]["peak_beams_mib"] == pytest.approx(a["peak_beams_mib"] / b["peak_beams_mib"])
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80 and "the first 4 of 4" in table[-1]


def test_figures():
    ours = object.__new__(worker.Worker)
    ours.records = {
        "start": [{"import": 1.0, "load": 2.0, "peak": 300 << 20}],
        "warm": [{"first": 4.0, "peak": 900 << 20}],
        "greedy": [{"first": f, "rate": 10 * f, "peak": 200 << 20} for f in (3.0, 1.0, 2.0)],
        "beam": [{"seconds": 5.0, "peak": 400 << 20}],
    }
    assert bench.figures(ours) == {
        "import_s": 1,
        "load_s": 2,
        "start_to_first_token_s": 7,
        "first_token_s": 2,
        "decode_tokens_s": 20,
        "beams_s": 5,
        "peak_greedy_mib": 300,
        "peak_beams_mib": 400,
    }
    assert answering.latency([10.0, 12.0, 13.0], 5) == {"first": 2, "rate": 4}


def train(tmp_path: Path, *flags: str) -> dict:
    return run(tmp_path, "--train", "--rounds", "2", "--text", "40", "--answer", "30", *flags)


def test_training_alone(tiny, capsys):
    r = train(tiny, "--no-peer")
    assert "transformers" not in r and "ratio" not in r and len(r["ours"]["losses"]) == 3
    # no word is likelier than another
    assert r["ours"]["losses"][0] == pytest.approx(math.log(320), rel=0.02)
    assert r["ours"]["losses"][2] < r["ours"]["losses"][0]  # it learns the row by heart
    assert all(
        r["ours"][key] > 0
        for key in ("import_s", "load_s", "start_to_first_step_s", "step_s", "peak_mib")
    )
    assert r["ours"]["tokens_s"] == pytest.approx(2 * 44 / r["ours"]["step_s"])
    assert r["flop"]["share_of_products"] > 0 and "utilisation" not in r["flop"]
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80 and any(line.startswith("step ") for line in table)


@pytest.mark.parametrize("flags", [[], ["--checkpointing"]])
def test_training_beside_transformers_and_peft(tiny, capsys, flags):
    pytest.importorskip("transformers", reason="measures transformers + peft beside us")
    pytest.importorskip("peft", reason="measures transformers + peft beside us")
    r = train(tiny, "--dtype", "fp32", *flags)
    assert r["loss_difference"] < 1e-5  # the same weights, rows, adapters and optimizer
    a, b = r["ours"], r["transformers"]
    assert a.keys() == b.keys() and b["losses"][2] < b["losses"][0]
    assert r["ratio"]["step_s"] == pytest.approx(a["step_s"] / b["step_s"])
    assert r["ratio"]["tokens_s"] == pytest.approx(a["tokens_s"] / b["tokens_s"])
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80 and "losses are as the peer's" in table[-1]


def test_losses_that_differ_are_named():
    r = {
        "size": "test",
        "dtype": "bf16",
        "lora_r": 16,
        "checkpointing": False,
        "compile": False,
        "batch_size": 1,
        "text": 9,
        "row_tokens": 13,
        "answer": 3,
        "rounds": 1,
        "versions": {},
        "loss_difference": 0.011,
        "machine": {"gpu": "a GPU"},
        "ours": {"losses": [2.0, 1.0]},
        "flop": {
            "step_tflop": 4.0,
            "tflop_s": 400.0,
            "products_tflop_s": 800.0,
            "share_of_products": 0.5,
            "peak_tflop_s": 989,
            "utilisation": 400 / 989,
        },
    }
    table = bench_train.table(r)
    assert (
        "losses are NOT as the peer's" in table[-1]
        and "   40% of the GPU's published 989 TFLOP/s" in table
    )


def test_flop_of_a_step():
    flop, seven = bench_train.flop, SIZES["7b"]
    assert flop(SIZES["300m"], 2, 96, 64, 16) == pytest.approx(2.0e12, rel=0.02)
    linear, tower, row = 6_476_005_376, 23 * 12 * 1024**2, 576 + 128  # weights of decoder and tower
    alone = 4 * linear * row + 2 * tower * 577  # forward, and in the decoder backward to the inputs
    assert 1.02 * alone < flop(seven, 1, 128, 1, 1) < 1.05 * alone  # attention, projector, patches
    # LoRA's weights have gradients of their own, a supervised token has logits
    assert flop(seven, 3, 128, 64, 32) - flop(seven, 3, 128, 64, 16) == 6 * 39_976_960 * 3 * row
    assert flop(seven, 3, 128, 65, 16) - flop(seven, 3, 128, 64, 16) == 4 * 131_334_144 * 3


def test_peak_memory_forgets():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs to reset a process's peak")
    cpu = torch.device("cpu")
    worker.peak_memory(cpu)
    torch.ones(128 << 20)  # 512 MiB that come and go
    during, after = worker.peak_memory(cpu), worker.peak_memory(cpu)
    assert during > after + (400 << 20)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["2b"], "neither a size nor a folder"),
        (["30m"], "did you mean 300m"),
        (["--rounds", "0"], "--rounds"),
        (["--new-tokens", "1"], "--new-tokens"),
        (["--new-tokens", "4000"], "context of 300m is 4096"),
        (["--dtype", "int4"], "--dtype"),
        (["--device", "abacus"], "abacus"),
        (["--json", __file__], "never overwritten"),
        (["--json", "nowhere/a.json"], "--json: nowhere: no such folder"),
        (["--compiled"], "did you mean --compile"),
        (["--train", "--new-tokens", "4"], "--new-tokens"),
        (["--train", "--text", "4", "--answer", "5"], "--answer: 5 of 4"),
        (["--train", "--text", "4000"], "context of 300m is 4096"),
        (["--train", "--dtype", "fp16"], "--dtype"),
        (["--train", "--checkpoint"], "did you mean --checkpointing"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(UserError, match=message):
        bench.main(flags)


def test_peer_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install transformers"):
        bench.main(["--peer"])
    with pytest.raises(UserError, match="pip install transformers peft"):
        bench.main(["--train", "--peer"])


def test_too_large(tiny, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="TMPDIR"):
        bench.main(["test", "--device", "cpu", "--new-tokens", "4"])
    assert not any((tiny / "tmp").glob("llava_min-bench-*"))
    with pytest.raises(UserError, match="--no-peer"):
        setup.need_memory(1 << 50, "cpu", True)


def test_terminated(tiny, monkeypatch):
    def measure(workers, machine, knobs):
        assert any((tiny / "tmp").glob("llava_min-bench-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(bench, "measure", measure)
    for page in (bench, setup):
        monkeypatch.setattr(
            page, "Worker", lambda program, spec: argparse.Namespace(close=lambda: None)
        )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as e:
        bench.main(["test", "--device", "cpu", "--new-tokens", "4"])
    assert e.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert not any((tiny / "tmp").glob("llava_min-bench-*"))


def test_verbs(capsys):
    assert verbs.main(["--help"]) == 0
    out = capsys.readouterr().out
    pages = Path(verbs.__file__).parent / "tools"
    assert "bench" in verbs.verbs() and all(
        (pages / f"{verb}.py").exists() for verb in verbs.verbs()
    )
    assert all(f"  {verb} " in out for verb in verbs.verbs())
    assert verbs.main([]) == 2 and "usage" in capsys.readouterr().err
    with pytest.raises(UserError, match="did you mean bench"):
        verbs.main(["bnech"])


@pytest.mark.parametrize(
    "command",
    [["--help"], ["bench", "--help"], ["bench", "--train", "--help"], ["finish", "--help"]],
)
def test_help_is_quick(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llava_min", *command],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "usage: python -m llava_min" in done.stdout
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())


def test_random_weights_do_not_depend_on_which_thread_is_first(tmp_path, monkeypatch):
    """A file is large, a machine has few or many threads: the weights of a size stay its own."""
    model = on_meta(TEST)
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    whole.mkdir()
    setup.write_random(model, TEST, whole, torch.bfloat16)
    monkeypatch.setattr(stream, "SHARD_BYTES", 20_000)
    backwards = lambda make, items: reversed([(item, make(item)) for item in reversed(items)])
    monkeypatch.setattr(stream, "ahead", backwards)
    shards.mkdir()
    setup.write_random(model, TEST, shards, torch.bfloat16)
    assert len(list(shards.glob("*.safetensors"))) > 2
    a, b = (
        load_model(x, torch.bfloat16, torch.device("cpu")).state_dict() for x in (whole, shards)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (a["language_model.norm.weight"] == 1).all()
    assert not any(a[name].any() for name in a if name.endswith("fc1.bias"))
    up, down = (a[f"language_model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert 0.018 < up.float().std() < 0.022 and not torch.equal(up, down)
