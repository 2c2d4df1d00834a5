"""`python -m llava_min finish`: what a run would have written at its end, from any checkpoint."""

import functools
import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from test_faults import ranks
from test_resume import damage
from training import argv, lines, make_home, run, train

from llava_min.data.dataset import Dataset, collate
from llava_min.data.records import read_records
from llava_min.errors import UserError
from llava_min.load import TINY, load, open_checkpoint, random_model, save
from llava_min.tools import finish
from llava_min.training import checkpoint

SHAPE = ("--batch-size", "6", "--max-steps", "3", "--save-every", "2", "--keep", "9")
LORA = ("--train", "lora", "--lora-r", "2")
MODES = {
    "lora": LORA,
    "dora": (*LORA, "--dora"),
    "without projector": (*LORA, "--no-train-projector"),
    "full": ("--train", "full"),
    "freeze_vision": ("--train", "freeze_vision"),
    "projector": ("--train", "projector"),
    "last": ("--train", "last:1"),
    "projector, tower": ("--train", "projector", "--train-vision"),
    "as asked": ("--train", "projector", "--image-aspect-ratio", "crop", "--template", "vicuna_v1"),
    "bf16": ("--train", "freeze_vision", "--precision", "bf16"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("finish"))


def begin(home, out, mode: str, *more: str, switches: tuple[str, ...] = ()):
    """A run of three steps with checkpoints at 2 and 3."""
    alone = {"--dora", "--no-train-projector", "--train-vision"}
    given = (m for m in MODES[mode] if m not in alone)
    run(home, out, *SHAPE, *given, *more, switches=(*switches, *(alone & set(MODES[mode]))))


def files(folder) -> dict[str, bytes]:
    assert folder.is_dir()
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def result(out):
    return out / ("adapter" if (out / "adapter").exists() else "model")


@pytest.mark.parametrize("switches", [(), ("--save-only-model",)], ids=["all", "only the model"])
@pytest.mark.parametrize("mode", MODES)
def test_the_last_checkpoint_gives_what_the_run_wrote(home, tmp_path, capsys, mode, switches):
    begin(home, tmp_path / "run", mode, switches=switches)
    capsys.readouterr()
    finish.main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert files(tmp_path / "out") == files(result(tmp_path / "run"))
    last, kind = tmp_path / "run" / "checkpoints" / "step-000003", result(tmp_path / "run").name
    said = f"saved {tmp_path / 'out'}: the {kind} of step 3, from {last}\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_head_and_another_place_of_the_base(home, tmp_path, tied):
    ready = open_checkpoint(str(home / "model"))
    config = replace(ready.model.config, tie_word_embeddings=tied)
    save(random_model(config), ready.processor, tmp_path / "base")
    begin(home, tmp_path / "run", "last", "--model", tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    said = "the base model of .*step-000003: .*base: no such folder.*--model"
    with pytest.raises(UserError, match=said):
        finish.main([str(tmp_path / "run"), str(tmp_path / "out")])
    finish.main([str(tmp_path / "run"), str(tmp_path / "out"), "--model", str(tmp_path / "moved")])
    assert files(tmp_path / "out") == files(tmp_path / "run" / "model")


@pytest.mark.parametrize("mode", ["full", "dora"])
def test_two_ranks_and_the_best(home, tmp_path, mode):
    """The run ends with its best checkpoint, so `best` gives the same files."""
    rate = {"full": "2", "dora": "50"}[mode]  # so high that the last step is not the best
    shape = [
        "--max-steps",
        "5",
        "--save-every",
        "9",
        "--lr",
        rate,
        "--schedule",
        "constant",
        "--eval-data",
        home / "data" / "val.json",
        "--eval-every",
        "1",
        "--max-new-tokens",
        "2",
        "--best-metric",
        "loss",
        "--batch-size",
        "3",
    ]
    command = lambda out: [*argv(home, out, *shape), *MODES[mode], "--save-only-model"]
    out = tmp_path / "run"
    codes = ranks(2, lambda rank: train.main(command(out)), tmp_path)
    assert codes == [0, 0], (tmp_path / "log-0").read_text()
    best, last = (out / "best").resolve(), (out / "last").resolve()
    assert best != last and len(list(last.glob("rank-*"))) == 2
    for name in ("best", "last"):
        finish.main([str(out / name), str(tmp_path / name)])
    assert files(tmp_path / "best") == files(result(out)) != files(tmp_path / "last")


def test_weights_are_kept_once(home, tmp_path):
    """Of a LoRA run the adapter alone, of another the trained tensors alone."""
    names = lambda path: set(safe_open(path, "pt").keys())
    found = {}
    for mode in ("lora", "projector"):
        begin(home, tmp_path / mode, mode, switches=("--save-only-model",))
        last = tmp_path / mode / "last"
        found[mode] = (sorted(p.name for p in last.iterdir()), names(last / "rank-0.safetensors"))
    small = ["manifest.json", "rank-0.safetensors", "state.json"]
    projector = {
        f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    }
    assert found == {"lora": (["adapter", *small], set()), "projector": (small, projector)}


def test_a_model_is_held_once_and_as_it_will_be_stored(home, tmp_path, monkeypatch):
    begin(home, tmp_path / "run", "bf16")
    held, read = [], []
    loading = sys.modules["llava_min.load"]  # `llava_min.load` is the function
    original, fill = loading.write_model, loading.load_weights

    def write(model, *more):
        held.extend(p.dtype for p in model.parameters())
        original(model, *more)

    def load_weights(model, entries, *more):
        read.extend(entries)
        fill(model, entries, *more)

    monkeypatch.setattr(loading, "write_model", write)
    monkeypatch.setattr(loading, "load_weights", load_weights)
    finish.main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert set(held) == {torch.bfloat16}
    assert read and all(name.startswith("vision_tower.") for name in read)  # what was frozen


def printed(out, step: int) -> float:
    return next(x["eval_loss"] for x in lines(out) if x["step"] == step and "eval_loss" in x)


def held_out_batch(home, processor) -> dict[str, torch.Tensor]:
    dataset = Dataset(read_records(home / "data" / "val.json"), processor)
    return collate([dataset[i] for i in range(6)])


@pytest.mark.parametrize("mode", ["full", "projector", "lora", "dora"])
def test_an_early_checkpoint_has_the_scores_of_its_step(home, tmp_path, mode):
    """Here and in transformers and peft."""
    begin(
        home,
        tmp_path / "run",
        mode,
        "--eval-data",
        home / "data" / "val.json",
        "--eval-every",
        "2",
        "--max-new-tokens",
        "1",
    )
    out, base = tmp_path / "out", str(home / "model")
    finish.main([str(tmp_path / "run" / "checkpoints" / "step-000002"), str(out)])
    assert files(out) != files(result(tmp_path / "run"))
    adapter = (out / "adapter_config.json").exists()
    source, given = (base, str(out)) if adapter else (str(out), None)
    model, processor = load(source, dtype="fp32", device="cpu", adapter=given)
    batch = held_out_batch(home, processor)
    supervised = (batch["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        loss = model.loss(batch["input_ids"], batch["labels"], batch["pixel_values"]) / supervised
    assert float(loss) == pytest.approx(printed(tmp_path / "run", 2), rel=1e-5)

    oracle = lambda name: pytest.importorskip(name, reason="an oracle; pip install -e '.[test]'")
    kind = oracle("transformers").LlavaForConditionalGeneration
    theirs = kind.from_pretrained(source, dtype=torch.float32)
    if adapter:
        peft = oracle("peft")
        theirs = peft.PeftModel.from_pretrained(theirs, str(out))
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
        logits = theirs.eval()(**inputs).logits[:, :-1].flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    assert float(nll) == pytest.approx(printed(tmp_path / "run", 2), rel=1e-4)


@pytest.fixture(scope="module")
def done(home, tmp_path_factory):
    """A finished run of projector alone."""
    out = tmp_path_factory.mktemp("done") / "run"
    begin(home, out, "projector")
    return out


def refused(capsys, source, out, *more) -> str:
    before = files(out.parent)
    capsys.readouterr()
    with pytest.raises(UserError) as e:
        finish.main([str(source), str(out), *more])
    assert files(out.parent) == before and not list(out.parent.glob("*.tmp-*"))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_damaged_checkpoint_is_named(done, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(done, copy, symlinks=True)
    damage(copy / "last" / "rank-0.safetensors")
    older = copy / "checkpoints" / "step-000002"
    said = refused(capsys, copy / "last", tmp_path / "out")
    assert "step-000003/rank-0.safetensors: is not what was written" in said
    finish.main([str(copy), str(tmp_path / "older")])  # falls back to the older one
    said = capsys.readouterr().err
    assert "step-000003/rank-0.safetensors" in said and "warning: " in said
    assert "the model of step 2" in said
    (older / "manifest.json").unlink()
    assert "step-000002/manifest.json" in refused(capsys, older, tmp_path / "out")
    assert "no whole checkpoint among 2" in refused(capsys, copy, tmp_path / "out")


def test_what_is_no_run_and_where_something_is(home, done, tmp_path, capsys):
    out = tmp_path / "out"
    for source in (home / "model", tmp_path / "absent", done / "config.json", done / "model"):
        assert "not a run of train.py and not a checkpoint" in refused(capsys, source, out)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    assert "a run without a checkpoint" in refused(capsys, tmp_path / "new", out)
    for inside in ("checkpoints/mine", "checkpoints/step-000002/mine", "last/mine"):
        inside = done / inside
        assert "among the checkpoints of a run" in refused(capsys, done, inside)
    for given in ([], [str(done)], [str(done), str(out), "more"]):
        with pytest.raises(UserError, match="give two"):
            finish.main(given)
    out.mkdir()
    (out / "mine").touch()
    assert "exists already and is never overwritten" in refused(capsys, done, out)


def test_another_base_is_refused(home, done, tmp_path, capsys):
    assert "base model (was " in refused(capsys, done, tmp_path / "out", "--model", str(TINY))
    changed = tmp_path / "changed"
    shutil.copytree(home / "model", changed)
    finish.main([str(done), str(tmp_path / "same"), "--model", str(changed)])
    model, processor = load(str(changed), dtype="fp32", device="cpu")
    model.lm_head.weight[0, 0] += 1
    shutil.rmtree(changed)
    save(model, processor, changed)
    said = refused(capsys, done, tmp_path / "out", "--model", str(changed))
    assert f"{changed}: is not the base model that" in said and "base model (was " in said
    assert "text_config" not in said


def test_an_adapter_takes_no_base(home, tmp_path, capsys):
    shutil.copytree(home / "model", tmp_path / "base")
    begin(home, tmp_path / "run", "lora", "--model", tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    given = ("--model", str(home / "model"))
    assert "--model: has no effect" in refused(capsys, tmp_path / "run", tmp_path / "out", *given)
    finish.main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert files(tmp_path / "out") == files(tmp_path / "run" / "adapter")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(run={}), "not the state of a run"),
        (dict(run=[]), "not the state of a run"),
        (dict(precision="fp8"), "precision: 'fp8' is not one of"),
        (dict(train=["x"]), "train: .* is not text"),
        (dict(train="last:9"), "train: 'last:9' is not one of"),
        (dict(train="full"), "trainable tensors are not those"),
        (dict(model=None), "does not say where its base model is"),
    ],
    ids=str,
)
def test_a_state_of_another_kind(done, tmp_path, capsys, change, said):
    """With a manifest that agrees: made by others, or by a version that kept less."""
    copy = tmp_path / "step-000003"
    shutil.copytree(done / "last", copy)
    state = json.loads((copy / "state.json").read_bytes())
    for key, value in change.items():
        inner = {"run": [], "model": ["run"]}.get(key, ["run", "identity"])
        functools.reduce(dict.get, inner, state)[key] = value
    listed = json.loads((copy / "manifest.json").read_bytes())
    data = checkpoint.as_json(state)
    (copy / "state.json").write_bytes(data)
    listed["state.json"] = {"bytes": len(data), "sha256": checkpoint.sha256(copy / "state.json")}
    (copy / "manifest.json").write_bytes(checkpoint.as_json(listed))
    assert re.search(said, refused(capsys, copy, tmp_path / "out"))


def test_a_full_disk_leaves_nothing(done, tmp_path, capsys, monkeypatch):
    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llava_min.data.processor.Processor.save", full)
    assert "No space left on device" in refused(capsys, done, tmp_path / "out")


def test_a_checkpoint_given_as_a_model_names_finish(home, done, tmp_path):
    begin(home, tmp_path / "lora", "lora")
    for folder in (done / "last", tmp_path / "lora" / "checkpoints" / "step-000002"):
        with pytest.raises(UserError) as e:
            load(str(folder), device="cpu")
        assert str(e.value).startswith(
            f"{folder}: a checkpoint of a run, expected a model; "
            f"`python -m llava_min finish {folder} OUT`"
        )
    with pytest.raises(UserError, match="llava_min finish .* OUT` makes its model"):
        load("tiny", device="cpu", adapter=str(done / "last"))
    shutil.rmtree(tmp_path / "lora" / "adapter")
    said = f"a run that has not ended, and `python -m llava_min finish {tmp_path / 'lora'} OUT`"
    with pytest.raises(UserError, match=said):
        run(home, tmp_path / "other", "--model", tmp_path / "lora")
