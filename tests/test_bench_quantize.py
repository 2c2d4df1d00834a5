"""bench --quantize: every figure against another way to get it, the table, and what is refused."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Literal

import pytest
import torch
from test_bench import TEST

from llava_min import generate, load
from llava_min.data.dataset import Dataset, evaluation_batch
from llava_min.data.records import read_records
from llava_min.errors import UserError
from llava_min.quant.methods import METHODS
from llava_min.tools import bench, bench_quantize, quantize
from llava_min.tools.speed import quantized_table, setup, source
from llava_min.tools.speed.quantized import LlamaCpp
from llava_min.tools.speed.worker import MIB, Ended, Worker
from llava_min.toy import draw
from llava_min.util.sizes import SIZES

QUICK = ["--device", "cpu", "--rounds", "1", "--new-tokens", "3"]


@pytest.fixture(autouse=True)
def quiet_temporary(monkeypatch, tmp_path):
    """Temporary folders go to tmp_path/tmp, and a program has one thread."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "toy"
    draw.write(str(folder), "questions", 1, 9, 0)
    return folder / "val.json"


def run(tmp_path: Path, *flags: str) -> dict:
    bench.main([*flags, *QUICK, "--json", str(tmp_path / "out.json")])
    [result] = json.loads((tmp_path / "out.json").read_text())
    assert not any((tmp_path / "tmp").iterdir())
    return result


def answered(model, processor, records) -> tuple[float, list[str]]:
    """Perplexity and answers, record by record and straight from the logits."""
    nll, count, texts = 0.0, 0, []
    for item in Dataset(records, processor):
        ids, labels = (torch.tensor([item[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logprobs = model(ids, item["pixel_values"]).log_softmax(-1)
        for t in range(1, ids.shape[1]):
            if labels[0, t] != -100:
                nll -= float(logprobs[0, t - 1, ids[0, t]])
                count += 1
    for record in records:
        batch = evaluation_batch([record], processor)[0]
        [ids] = generate(model, batch, max_new_tokens=8, eos_token_id=processor.stop_ids)
        texts.append(processor.decode(ids).strip())
    return math.exp(nll / count), texts


def test_figures_of_the_tiny_model(tmp_path, toy, capsys):
    flags = ["--quantize", "hqq1", "--group-size", "16", "--no-peer", "--max-new-tokens", "8"]
    r = run(tmp_path, "tiny", *flags, "--data", str(toy))
    plain, row = r["variants"]
    assert (plain["name"], row["name"], r["records"]) == ("fp32", "hqq1", 9)

    # the size is that of the verb's own file
    quantize.main(["tiny", str(tmp_path / "q"), "--method", "hqq1", "--group-size", "16"])
    [file] = (tmp_path / "q").glob("*.safetensors")
    stored = os.path.getsize(Path(bench.__file__).parents[1] / "tiny" / "model.safetensors")
    assert (plain["disk_bytes"], row["disk_bytes"]) == (stored, file.stat().st_size)

    # perplexity and answers, by another way
    records, truth = read_records(toy), []
    for path, figures in (("tiny", plain), (tmp_path / "q", row)):
        model, processor = load(path, dtype="fp32", device="cpu")
        perplexity, texts = answered(model, processor, records)
        assert figures["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        right = [a == record.messages[-1]["content"] for a, record in zip(texts, records)]
        assert figures["exact_match"] == pytest.approx(sum(right) / 9)
        assert figures["answer"] == texts[0] and "answers" not in figures
        truth.append(texts)
    same = sum(a == b for a, b in zip(*truth)) / 9
    assert row["agreement"] == pytest.approx(same) and same < 1 and "agreement" not in plain
    assert row["perplexity"] > 2 * plain["perplexity"]  # one bit is too few

    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 80
    assert [line.split()[0] for line in out if line.startswith(("fp32", "hqq1"))] == (
        ["fp32", "hqq1"] * 3  # speeds, quality, answers
    )


def test_a_size_with_random_weights_beside_llama_cpp(tmp_path, monkeypatch, capsys):
    pytest.importorskip("llama_cpp", reason="measures llama.cpp beside us")
    pytest.importorskip("gguf", reason="writes llama.cpp's file")
    text = TEST.text.__class__(**vars(TEST.text) | {"vocab_size": 3104, "hidden_size": 64})
    monkeypatch.setitem(SIZES, "test", TEST.__class__(**vars(TEST) | {"text": text}))
    r = run(tmp_path, "test", "--quantize=int8", "--peer", "--dtype", "bf16")
    assert [row["name"] for row in r["variants"]] == ["bf16", "int8", "Q4_0"]
    plain, int8, peer = r["variants"]
    assert r["prompt_tokens"] == 4 + 30 and "llama-cpp-python" in r["versions"]
    speeds = ("load_s", "peak_mib", "prefill_tokens_s", "decode_tokens_s")
    assert all(row[key] > 0 for row in r["variants"] for key in speeds)
    assert int8["disk_bytes"] < plain["disk_bytes"] and peer["disk_bytes"] < plain["disk_bytes"]
    assert all(row["quantize_s"] > 0 and row["quantize_peak_mib"] > 0 for row in (int8, peer))
    assert "perplexity" not in plain and "answer" not in plain
    assert "Q4_0 is llama.cpp's" in capsys.readouterr().out


# ---- the figures out of what the programs report


class Fake:
    """A Worker whose program reports what `records` says."""

    def __init__(self, records: dict):
        self.records, self.waiting = {}, records
        self.take("start")

    def take(self, job: str) -> None:
        self.records.setdefault(job, []).append(self.waiting[job].pop(0))

    def do(self, job, *arguments, record=None):
        self.take(record or job)

    median, peak = Worker.median, Worker.peak


def test_speeds_are_medians_and_the_peak_is_before_the_questions(monkeypatch):
    records = {
        "start": [{"import": 1.0, "load": 2.5, "peak": 500 * MIB, "version": "1"}],
        "image": [{"first": 9.0, "rate": 1.0, "peak": 700 * MIB}],
        "warm": [{"first": 9.0, "rate": 1.0, "peak": 600 * MIB}],
        "text": [{"first": f, "rate": 10 * f, "peak": MIB} for f in (4.0, 1.0, 2.0)],
        "quality": [
            {"perplexity": 3.0, "exact_match": None, "answers": ["a", None], "peak": 900 * MIB}
        ],
        "ask": [{"answer": "b", "peak": 900 * MIB}],
    }

    @contextlib.contextmanager
    def running(name, program, spec):
        yield Fake(records)

    monkeypatch.setattr(bench_quantize, "running", running)
    args = bench_quantize.Args(data="x", prompt="y", rounds=3)
    assert bench_quantize.answering("int4", bench_quantize.Answering, {"ids": [7] * 34}, args) == {
        "peak_mib": 700,
        "load_s": 2.5,
        "prefill_tokens_s": 17,
        "decode_tokens_s": 20,
        "perplexity": 3,
        "exact_match": None,
        "answers": ["a", None],
        "answer": "b",
    }


def test_ratios_and_agreement():
    plain = {"disk_bytes": 8, "peak_mib": 10, "prefill_tokens_s": 4, "decode_tokens_s": 2}
    plain |= {"perplexity": 2.0, "answers": ["a", "b", "c", None, "e"]}
    row = {"disk_bytes": 2, "peak_mib": 5, "prefill_tokens_s": 2, "decode_tokens_s": 6}
    row |= {"quantize_peak_mib": 20, "perplexity": 3.0, "answers": ["a", "x", "c", "d", None]}
    bench_quantize.compare(row, plain)
    assert row["ratio"] == {
        "disk_bytes": 0.25,
        "peak_mib": 0.5,
        "quantize_peak_mib": 2,
        "prefill_tokens_s": 0.5,
        "decode_tokens_s": 3,
        "perplexity": 1.5,
    }
    assert row["agreement"] == pytest.approx(2 / 3)  # of those that both could answer
    bench_quantize.compare(plain, plain)
    assert set(plain["ratio"].values()) == {1} and "agreement" not in plain


def test_lines_are_narrow():
    row = {"name": "hqq4", "disk_bytes": 24_999 * MIB, "peak_mib": 25_999.0, "quantize_s": 9999.0}
    row |= {"quantize_peak_mib": 25_000, "prefill_tokens_s": 12_345.6, "decode_tokens_s": 1234.5}
    row["ratio"] = {key: 12.345 for key in row} | {"perplexity": 1.5}
    row |= {"perplexity": 123456.7, "agreement": 0.5, "exact_match": None, "answer": "x\n\x1b" * 99}
    r = {"variants": [row], "records": 7, "data": "d" * 99, "question": "why " * 50}
    r |= {"versions": {"llama-cpp-python": "1"}}
    assert len(quantized_table.speed_line(row)) <= 80
    lines = quantized_table.quality_table(r) + quantized_table.answers(r)
    assert max(map(len, lines)) <= 80 and "\x1b" not in "".join(lines)
    assert "0.500" in "".join(lines) and not quantized_table.notes(r)
    r["variants"] = [row | {"name": name} for name in ("awq4", "Q4_0")]
    said = quantized_table.notes(r | {"calibration_data": r["data"]})
    assert len(said) == 2 and "judged by" in said[0]
    assert quantized_table.notes(r | {"calibration_data": "other"}) == said[1:]


def test_rows_so_far_are_shown_when_a_later_one_fails(tmp_path, monkeypatch, capsys):
    def measured(*given):
        row = {"name": "fp32", "disk_bytes": MIB, "peak_mib": 7.0}
        yield row | {"prefill_tokens_s": 1, "decode_tokens_s": 1, "answer": "red"}
        raise UserError("int4: no more")

    monkeypatch.setattr(bench_quantize, "measured", measured)
    with pytest.raises(UserError, match="no more"):
        bench.main(["tiny", "--quantize", "nf4", "--no-peer", "--prompt", "why?", *QUICK])
    out = capsys.readouterr().out
    assert "fp32       1.0 1.00" in out and "fp32  red" in out


@pytest.mark.parametrize("crashes", [False, True])
def test_llama_cpp_in_two_parts_where_it_crashes(monkeypatch, tmp_path, crashes):
    def answering(name, program, spec, args):
        if spec["kernels"] and not spec["singly"] and crashes:
            raise Ended("code -11")
        speed = {(True, False): 5, (False, False): 3, (True, True): 4}
        now = speed[spec["kernels"], spec["singly"]]
        return {"peak_mib": now, "prefill_tokens_s": 10 * now, "decode_tokens_s": now}

    @contextlib.contextmanager
    def running(name, program, spec):
        Path(spec["file"]).write_bytes(b"1234")
        yield Fake({"start": [{"load": 2.0, "peak": 3 * MIB}]})

    monkeypatch.setattr(bench_quantize, "answering", answering)
    monkeypatch.setattr(bench_quantize, "running", running)
    row = bench_quantize.measured_peer("x", {}, bench_quantize.Args(), tmp_path / "f.gguf")
    written = {"name": "Q4_0", "disk_bytes": 4, "quantize_s": 2, "quantize_peak_mib": 3}
    figures = {"peak_mib": 5, "prefill_tokens_s": 50, "decode_tokens_s": 5}
    parts = {"peak_mib": 4, "prefill_tokens_s": 30, "decode_tokens_s": 4, "crashed": True}
    assert row == written | (parts if crashes else figures)


@pytest.mark.parametrize("singly", [False, True])
def test_llama_cpp_decodes_the_same_work_again(singly):
    """A round begins behind the prompt, whatever the last one wrote."""

    class Model:
        n_tokens = 0
        read: list = []

        def reset(self):
            self.n_tokens = 0

        def eval(self, ids):
            self.read += [(self.n_tokens, tuple(ids))]
            self.n_tokens += len(ids)

        def generate(self, ids, reset, temp):
            assert not reset and temp == 0
            while True:
                self.eval(list(ids))
                ids = [9]
                yield 9

    llama = object.__new__(LlamaCpp)
    llama.ids, llama.singly, llama.model = [5, 6, 7], singly, Model()
    llama.device = torch.device("cpu")
    assert llama.text(3)["ids"] == llama.text(3)["ids"] == [9, 9, 9]
    new = [(3, (9,)), (4, (9,))]
    one = [(2, (7,)), *new] if singly else [(0, (5, 6, 7)), *new]
    assert llama.model.read == [(0, (5,)), (1, (6,))] * singly + one * 2


# ---- what is refused, before anything is read or written


def nothing_runs(monkeypatch):
    monkeypatch.setattr(setup, "write_random", None)
    monkeypatch.setattr(bench_quantize, "Worker", None)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["tiny", "--quantize", "int5"], "--quantize: int5 is no method; did you mean int"),
        (["tiny", "--quantize", "all,nf4"], "all is no method; there are int8"),
        (["tiny", "--quantize", "hqq4"], "hqq4: --group-size: 64 does not divide the width 160"),
        (["tiny", "--quantize", "awq4", "--group-size=16"], "awq4: "),
        (["30m", "--quantize", "all"], "neither a size nor a checkpoint; did you mean 300m"),
        (["no/such/folder", "--quantize", "nf4"], "no/such/folder: no such folder"),
        (["tiny", "300m", "--quantize", "nf4"], "SIZE: 2 were given"),
        (["tiny", "--quantize", "nf4", "--data", "none.json"], "none.json: no such file"),
        (["300m", "--quantize", "nf4", "--calibration-data", "none.json"], "none.json: no such"),
        (["tiny", "--quantize", "nf4", "--image-folder", "x"], "--image-folder: belongs to data"),
        (["tiny", "--quantize", "nf4", "--image", "x.png"], "--image: no question came"),
        (["tiny", "--quantize", "nf4", "--image", "x.png", "--prompt", "y"], "x.png: no such file"),
        (["tiny", "--quantize", "nf4", "--prompt", " "], "--prompt: is empty"),
        (["tiny", "--quantize", "nf4", "--prompt", "a " * 2000], "--max-new-tokens: 64 and"),
        (["300m", "--quantize", "nf4", "--prompt", "why?"], "--prompt: random weights know no"),
        (["tiny", "--quantize", "nf4", "--new-tokens", "4000"], "context of tiny is 1024"),
        (["tiny", "--quantize", "nf4", "--new-tokens", "1"], "--new-tokens"),
        (["tiny", "--quantize", "nf4", "--json", __file__], "never overwritten"),
        (["tiny", "--quantize", "nf4", "--json", "nowhere/a"], "--json: nowhere: no such folder"),
        (["tiny", "--quantize", "nf4", "--group-size", "16"], "--group-size: nf4 has no groups"),
        (["tiny", "--quantize", "nf4", "--beams", "2"], "--beams: no such option"),
        (["--train", "--quantize", "nf4"], "--quantize: no such option"),
    ],
)
def test_mistakes(monkeypatch, flags, message):
    nothing_runs(monkeypatch)
    with pytest.raises(UserError, match=message):
        bench.main([*flags, "--no-peer"])


def test_records_that_no_named_method_reads(monkeypatch, toy):
    nothing_runs(monkeypatch)
    with pytest.raises(UserError, match="--calibration-data: nf4, int8 is chosen without data"):
        bench.main(["tiny", "--quantize", "nf4,int8", "--calibration-data", str(toy), *QUICK])


def test_records_that_are_too_long(monkeypatch, tmp_path):
    nothing_runs(monkeypatch)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "ring " * 1500}]
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"id": "long-1", "conversations": turns}]))
    with pytest.raises(UserError, match="--data: 1 of 1 records .* context of 1024: long-1"):
        bench.main(["tiny", "--quantize", "nf4", "--no-peer", "--data", str(path)])
    turns[1]["value"] = "ring"
    path.write_text(json.dumps([{"id": "long-1", "conversations": turns}]))
    with pytest.raises(
        UserError, match="--max-new-tokens: 1020 and the .* tokens of record long-1"
    ):
        flags = ["--data", str(path), "--max-new-tokens", "1020"]
        bench.main(["tiny", "--quantize", "nf4", "--no-peer", *flags])


def test_quantized_already(monkeypatch, tmp_path):
    nothing_runs(monkeypatch)
    quantize.main(["tiny", str(tmp_path / "q")])
    with pytest.raises(UserError, match="is quantized already; give the 16-bit"):
        bench.main([str(tmp_path / "q"), "--quantize", "nf4", "--no-peer"])


def test_a_disk_that_is_too_small(monkeypatch):
    nothing_runs(monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="TMPDIR"):
        bench.main(["tiny", "--quantize", "nf4", "--no-peer"])


def test_all_leaves_out_what_cannot_be_made(capsys):
    args = bench_quantize.Args(sizes=["tiny"])
    model = source.open_source(args).model
    picked = source.pick_methods(args, model)
    assert picked == ["int8", "nf4", "fp4", "w8a8"]  # 160 is no multiple of 64
    left_out = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert sorted(left_out) == sorted(METHODS.keys() - set(picked))
    args.group_size = 16  # of those that have groups
    assert {"int4", "hqq1", "nf4"} <= set(source.pick_methods(args, model))


def test_calibration_is_given_the_records(monkeypatch, tmp_path):
    """A method that needs data is made by the verb with --data, where the verb has it."""
    args = bench_quantize.Args(sizes=["tiny"], group_size=16)
    at = source.open_source(args)
    monkeypatch.setattr(source, "Method", Literal["awq4"])
    assert "give calibration_data" in source.hindrance("awq4", args, at.model)
    args = bench_quantize.Args(sizes=["tiny"], group_size=16, data="d.json")
    assert source.pick_methods(args, at.model) == ["awq4"]  # nothing else is a name of the verb

    class Done(Exception):
        pass

    def running(name, program, spec):
        raise Done(spec["argv"])

    monkeypatch.setattr(bench_quantize, "answering", lambda *given: {})
    monkeypatch.setattr(bench_quantize, "running", running)
    rows = bench_quantize.measured(
        at, ["awq4"], False, {"dtype": "float32", "device": "cpu"}, args, tmp_path
    )
    next(rows)
    with pytest.raises(Done) as e:
        next(rows)
    assert e.value.args[0] == [
        *("tiny", str(tmp_path / "awq4"), "--method", "awq4", "--dtype", "bf16"),
        *("--device", "cpu", "--group-size", "16", "--data", "d.json"),
    ]
