"""train.py: what is trained, that it learns, what it writes; and the one-line errors before any weight is read."""

import json
from pathlib import Path

import pytest
from conftest import load_script
import torch

from llava_min.cli import UserError
from llava_min.data import toy
from llava_min.data.dataset import Dataset, collate, read_records
from llava_min.load import load

train = load_script("train")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "data"
    toy.write(folder, "captions", train=24, val=6)
    return folder


def run(data: Path, out: Path, *argv: str, batch_size: int = 4, precision: str = "fp32") -> list[dict]:
    train.main(["--data", str(data / "train.json"), "--out", str(out), "--device", "cpu", "--precision", precision,
                "--log-every", "1", "--batch-size", str(batch_size), "--lr", "1e-3", *argv])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensors(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_it_learns_and_what_it_writes_loads(data, tmp_path, mode, capsys):
    lines = run(data, tmp_path / "run", "--train", mode, "--epochs", "4", "--eval-data", str(data / "val.json"))
    losses = [x["loss"] for x in lines if "loss" in x]
    assert len(losses) == 24 and losses[-1] < 0.7 * losses[0]
    assert [x["step"] for x in lines if "eval_exact_match" in x] == [0, 24]
    printed = capsys.readouterr()
    assert printed.out.count("before") == 5 and printed.out.count("expected") == 5
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"] == mode
    base = tensors(load("tiny", dtype="fp32")[0])
    if mode == "lora":
        model, _ = load("tiny", dtype="fp32", adapter=str(tmp_path / "run" / "adapter"))
        changed = {n for n, p in tensors(model).items() if n in base and not torch.equal(p, base[n])}
        assert changed == {n for n in base if n.startswith("multi_modal_projector.")}
        assert sum(".lora_" in n for n in tensors(model)) == 2 * 7 * 4
    else:
        model, _ = load(str(tmp_path / "run" / "model"), dtype="fp32")
        same = {n for n, p in tensors(model).items() if torch.equal(p, base[n])}
        assert all("layers.4." in n or "post_layernorm" in n for n in same)  # the parts of the tower that are never run


def test_a_step_is_the_same_in_one_micro_batch_or_four(data, tmp_path):
    first = run(data, tmp_path / "a", "--max-steps", "3", "--max-grad-norm", "0", "--grad-accum", "4", batch_size=2)
    second = run(data, tmp_path / "b", "--max-steps", "3", "--max-grad-norm", "0", batch_size=8)
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_loss_is_on_answers_and_their_end_alone(data):
    model, processor = load("tiny", dtype="fp32")
    records = read_records(data / "train.json")
    batch = collate([Dataset(records, processor)[i] for i in range(4)])
    for ids, labels, record in zip(batch["input_ids"], batch["labels"], records):
        learned = ids[labels != -100]
        assert processor.tokenizer.decode(learned.tolist()).strip() == record.messages[-1]["content"]
        assert learned[-1] == processor.tokenizer.eos_id


def test_bf16_keeps_what_is_trained_in_fp32(data, tmp_path):
    run(data, tmp_path / "run", "--max-steps", "2", "--workers", "1", precision="bf16")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32} and any(t.abs().sum() > 0 for n, t in saved.items() if "lora_B" in n)


@pytest.mark.parametrize("argv, named", [
    (["--data", "absent.json"], "absent.json"), (["--data", "toy:poems"], "toy:poems"), (["--recipe", "nothing"], "nothing"),
    (["--model", "no/such/folder"], "no/such/folder"), (["--betas", "0.9"], "--betas"), (["--lora-targets", "c_proj"], "c_proj"),
    (["--max-length", "70"], "--max-length"), (["--device", "cuda:9"], "cuda"), (["--template", "poem"], "poem"),
])
def test_mistakes_are_one_line_and_leave_nothing(data, tmp_path, argv, named):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=named) as e:
        train.main(["--data", str(data / "train.json"), *argv, "--out", str(tmp_path / "run")] if argv[0] != "--data" else [*argv, "--out", str(tmp_path / "run")])
    assert "\n" not in str(e.value) and sorted(tmp_path.rglob("*")) == before


def test_an_existing_run_is_not_written_over(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        run(data, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_runs_are_numbered(tmp_path):
    for n in (1, 2, 10):
        (tmp_path / f"toy-{n}").mkdir()
    (tmp_path / "toy-x").mkdir()
    assert train.next_run(tmp_path, "toy") == tmp_path / "toy-11" and train.next_run(tmp_path, "other") == tmp_path / "other-1"
