"""bench: the whole path at a tiny size, and `python -m llava_min` that leads to it."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_min import __main__ as verbs
from llava_min.cli import UserError
from llava_min.config import SIZES, LlavaConfig, TextConfig, VisionConfig
from llava_min.tools import bench

TEST = LlavaConfig(
    vision=VisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                        image_size=28),
    text=TextConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64),
    image_token_id=300)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The size `test`; temporary folders go to tmp_path/tmp."""
    monkeypatch.setitem(SIZES, "test", TEST)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run(tmp_path: Path, *flags: str) -> dict:
    bench.main(["test", "--device", "cpu", "--rounds", "1", "--json", str(tmp_path / "out.json"), *flags])
    [result] = json.loads((tmp_path / "out.json").read_text())
    assert not any((tmp_path / "tmp").glob("llava_min-bench-*"))  # the random weights are gone
    return result


def test_alone(tiny, capsys):
    r = run(tiny, "--no-peer", "--new-tokens", "3", "--beams", "1")
    assert "transformers" not in r and "ratio" not in r and "beams_s" not in r["ours"]
    assert r["prompt_tokens"] == 4 + 30
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32  # q and o, k and v (grouped), the MLP
    assert r["bandwidth"]["bytes_per_token"] == 2 * (2 * layer + 320 * 32)
    assert r["bandwidth"]["share_of_matvec"] > 0 and r["bandwidth"]["share_of_read"] > 0
    assert all(r["ours"][key] > 0 for key in ("import_s", "load_s", "start_to_first_token_s", "first_token_s",
                                              "decode_tokens_s", "peak_greedy_mib"))
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80 and any(line.startswith("decode ") for line in table)


def test_beside_transformers(tiny, capsys):
    pytest.importorskip("transformers", reason="measures transformers beside us")
    r = run(tiny, "--dtype", "fp32", "--new-tokens", "4", "--beams", "2")
    assert r["same_ids"] == {"greedy": 4, "beam": 4}  # the same work
    a, b = r["ours"], r["transformers"]
    assert a.keys() == b.keys() == r["ratio"].keys()
    assert r["ratio"]["decode_tokens_s"] == pytest.approx(a["decode_tokens_s"] / b["decode_tokens_s"])
    assert r["ratio"]["first_token_s"] == pytest.approx(b["first_token_s"] / a["first_token_s"])
    assert r["ratio"]["peak_beams_mib"] == pytest.approx(a["peak_beams_mib"] / b["peak_beams_mib"])
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80 and "the first 4 of 4" in table[-1]


def test_figures():
    worker = object.__new__(bench.Worker)
    worker.records = {
        "start": [{"import": 1.0, "load": 2.0, "peak": 300 << 20}],
        "warm": [{"first": 4.0, "peak": 900 << 20}],
        "greedy": [{"first": f, "rate": 10 * f, "peak": 200 << 20} for f in (3.0, 1.0, 2.0)],
        "beam": [{"seconds": 5.0, "peak": 400 << 20}]}
    assert worker.figures() == {
        "import_s": 1, "load_s": 2, "start_to_first_token_s": 7, "first_token_s": 2, "decode_tokens_s": 20,
        "beams_s": 5, "peak_greedy_mib": 300, "peak_beams_mib": 400}
    assert bench.latency([10.0, 12.0, 13.0], 5) == {"first": 2, "rate": 4}


def test_peak_memory_forgets():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs to reset a process's peak")
    cpu = torch.device("cpu")
    bench.peak_memory(cpu)
    torch.ones(16 << 20)  # 64 MiB that come and go
    during, after = bench.peak_memory(cpu), bench.peak_memory(cpu)
    assert during > after + (48 << 20)


@pytest.mark.parametrize("flags, message", [
    (["2b"], "neither a size nor a folder"),
    (["30m"], "did you mean 300m"),
    (["--rounds", "0"], "--rounds"),
    (["--new-tokens", "1"], "--new-tokens"),
    (["--new-tokens", "4000"], "context of 300m is 4096"),
    (["--dtype", "int4"], "--dtype"),
    (["--device", "abacus"], "abacus"),
    (["--json", __file__], "never overwritten"),
    (["--compiled"], "did you mean --compile"),
])
def test_mistakes(flags, message):
    with pytest.raises(UserError, match=message):
        bench.main(flags)


def test_peer_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install transformers"):
        bench.main(["--peer"])


def test_too_large(tiny, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="TMPDIR"):
        bench.main(["test", "--device", "cpu", "--new-tokens", "4"])
    assert not any((tiny / "tmp").glob("llava_min-bench-*"))
    with pytest.raises(UserError, match="--no-peer"):
        bench.need_memory(1 << 50, "cpu", True)


def test_terminated(tiny, monkeypatch):
    def measure(workers, knobs):
        assert any((tiny / "tmp").glob("llava_min-bench-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "Worker", lambda program, spec: argparse.Namespace(close=lambda: None))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as e:
        bench.main(["test", "--device", "cpu", "--new-tokens", "4"])
    assert e.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert not any((tiny / "tmp").glob("llava_min-bench-*"))


def test_verbs(capsys):
    assert verbs.main(["--help"]) == 0
    out = capsys.readouterr().out
    pages = Path(verbs.__file__).parent / "tools"
    assert "bench" in verbs.verbs() and all((pages / f"{verb}.py").exists() for verb in verbs.verbs())
    assert all(f"  {verb} " in out for verb in verbs.verbs())
    assert verbs.main([]) == 2 and "usage" in capsys.readouterr().err
    with pytest.raises(UserError, match="did you mean bench"):
        verbs.main(["bnech"])


@pytest.mark.parametrize("command", [["--help"], ["bench", "--help"]])
def test_help_is_quick(command):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "llava_min", *command],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "usage: python -m llava_min" in done.stdout
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
