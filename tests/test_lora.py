"""lora.py: an adapter starts as nothing, is saved as PEFT saves, and is read however PEFT and LLaVA wrote it."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import our_model, pixels, rows, their_model, write_folder
from safetensors.torch import load_file, save_file

import llava_min
from llava_min.cli import UserError
from llava_min.load import save
from llava_min.lora import (LINEARS, PEFT, LoRAConfig, LoRALinear, add_lora, adapter_state, load_adapter,
                            save_adapter)

KINDS = ["mistral", "qwen2"]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    out = model(input_ids=rows(1, 0, 2), pixel_values=pixels(3))
    return getattr(out, "logits", out)


def taught(kind: str = "mistral", config: LoRAConfig = LoRAConfig(4, 10), projector: bool = True):
    """A model with an adapter that says something, as after training."""
    model = our_model(their_model(kind))
    torch.manual_seed(0)
    add_lora(model, config)
    for name, p in model.named_parameters():
        if ".lora_" in name or projector and "projector" in name:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
            p.requires_grad_()
    return model.eval()


def saved(folder: Path, model, config: LoRAConfig = LoRAConfig(4, 10)) -> Path:
    folder.mkdir()
    save_adapter(model, config, folder, "base")
    return folder


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_nothing(kind):
    model = our_model(their_model(kind))
    before = logits(model)
    add_lora(model, LoRAConfig(4, 10))
    assert torch.equal(logits(model), before)
    layers = [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 2 * len(LINEARS) and all(n.startswith("language_model.layers.") for n in layers)
    assert {n for n, p in model.named_parameters()
            if p.requires_grad} == {f"{n}.lora_{x}.weight" for n in layers for x in "AB"}


def test_the_update_is_that_of_the_paper():
    base = torch.nn.Linear(5, 7).requires_grad_(False)
    layer = LoRALinear(base, LoRAConfig(3, 12))
    layer.lora_B.weight.data.normal_()
    x = torch.randn(2, 5)
    expected = x @ (base.weight + 12 / 3 * layer.lora_B.weight @ layer.lora_A.weight).T + base.bias
    assert (layer(x) - expected).abs().max() <= 1e-5
    a = layer.lora_A.weight  # kaiming_uniform(a=√5)
    assert a.abs().max() <= 5**-0.5 and a.std() > 0.1


def test_dropout_is_on_the_update_alone_and_in_training_alone():
    layer = LoRALinear(torch.nn.Linear(64, 7), LoRAConfig(3, 12, dropout=0.5))
    x = torch.randn(2, 64)
    assert torch.equal(layer.train()(x), layer.base(x))  # B is zero: base is whole
    layer.lora_B.weight.data.normal_()
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_base_has_a_full_adapter(dtype):
    model = taught().to(dtype)
    for m in model.modules():
        if isinstance(m, LoRALinear):
            m.lora_A.float(), m.lora_B.float()
    near = logits(model)
    assert near.dtype == dtype and (near.float() - logits(taught())).norm() < 0.1 * near.float().norm()
    with torch.autocast("cpu", dtype):
        assert logits(model).dtype == dtype


def test_targets():
    model = our_model(their_model())
    add_lora(model, LoRAConfig(2, 4, targets=("q_proj", "down_proj")))
    leaves = [n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert sorted(leaves) == ["down_proj"] * 2 + ["q_proj"] * 2
    with pytest.raises(UserError, match="'fc1' names no linear layer of the language model"):
        add_lora(our_model(their_model()), LoRAConfig(targets=("q_proj", "fc1")))


@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_is_loaded(kind, projector, tmp_path):
    model = taught(kind, projector=projector)
    saved(tmp_path / "a", model)
    again = our_model(their_model(kind))
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model)) and far(logits(again),
                                                             logits(our_model(their_model(kind))))
    assert not any(p.requires_grad for p in again.parameters())
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {x.dtype for x in state.values()} == {torch.float32} and len(state) == 28 + 4 * projector
    assert state.keys() == {n for n, _ in adapter_state(model)}
    assert PEFT + "model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in state


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_save(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="the oracle of this test; pip install -e '.[test]'")
    model = taught(kind)
    saved(tmp_path / "a", model)
    theirs = peft.PeftModel.from_pretrained(their_model(kind), tmp_path / "a").eval()
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-4
    adapted = [n for n, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert len(adapted) == 14 and not any("vision" in n for n in adapted)


LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def by_peft(folder: Path, kind: str = "mistral", **change):
    """transformers' model with an adapter that peft made, saved to `folder`."""
    peft = pytest.importorskip("peft",
                               reason="writes the adapter that is read here; pip install -e '.[test]'")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": LANGUAGE,
                                "modules_to_save": ["multi_modal_projector"],
                                "task_type": "CAUSAL_LM"} | change)
    model = peft.get_peft_model(their_model(kind), config).eval()
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("change", [{}, {"modules_to_save": None}, {"target_modules": ["q_proj", "v_proj"]},
                                    {"target_modules": ["lm_head", "linear_1"], "modules_to_save": None},
                                    {"lora_alpha": 3, "r": 7, "lora_dropout": 0.2},
                                    {"init_lora_weights": "gaussian"}], ids=str)
def test_what_peft_saves_is_loaded(change, tmp_path):
    theirs = by_peft(tmp_path / "a", **change)
    ours = our_model(their_model("mistral"))
    before = logits(ours)
    load_adapter(ours, tmp_path / "a")
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-4 and far(logits(ours), before)
    if change.get("target_modules") == ["q_proj", "v_proj"]:  # peft's leaf names reach into the tower
        assert any(n.startswith("vision_tower") and isinstance(m, LoRALinear)
                   for n, m in ours.named_modules())


OLD = {"language_model.model.": "model.language_model.",
       "multi_modal_projector.": "model.multi_modal_projector."}  # before transformers 4.52
LLAVA = {"model.layers.": "model.language_model.layers.",
         "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
         "model.mm_projector.2.": "model.multi_modal_projector.linear_2."}


def renamed(state: dict, names: dict[str, str]) -> dict:
    out = {}
    for key, x in state.items():
        old, new = next((old, new) for new, old in names.items() if key.startswith(PEFT + old))
        out[PEFT + new + key.removeprefix(PEFT + old)] = x
    return out


@pytest.mark.parametrize("names", [OLD, LLAVA], ids=["transformers < 4.52", "LLaVA"])
@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_older_names(names, end, tmp_path):
    model = taught()
    folder = saved(tmp_path / "a", model)
    state = renamed(load_file(folder / "adapter_model.safetensors"), names)
    (folder / "adapter_model.safetensors").unlink()
    if names is LLAVA:  # it keeps the projector apart
        torch.save({k: x for k, x in state.items() if "mm_projector" in k},
                   folder / "non_lora_trainables.bin")
        state = {k: x for k, x in state.items() if "mm_projector" not in k}
    (save_file if end == "safetensors" else torch.save)(state, folder / f"adapter_model.{end}")
    again = our_model(their_model("mistral"))
    load_adapter(again, folder)
    assert torch.equal(logits(again), logits(model))


def test_load_applies_an_adapter_and_says_when_it_is_of_another_base(spm, tmp_path, capsys):
    model = taught()
    folder = saved(tmp_path / "a", model)
    for name, said in (("base", 0), ("other", 1)):
        write_folder(tmp_path / name, spm, their_model("mistral"))
        ours, _ = llava_min.load(tmp_path / name, adapter=str(folder), device="cpu")
        assert torch.equal(logits(ours), logits(model)) and not ours.training
        assert capsys.readouterr().err.count("was made for base") == said


Q = PEFT + "model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
P = PEFT + "model.multi_modal_projector.linear_1.weight"


def config(**keys):
    def case(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return case


def table(change):
    def case(folder):
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        save_file(change(state) or state, path)
    return case


def replaced(key: str, change):
    return table(lambda s: s.__setitem__(key, change(s[key]).contiguous()))


def written(name: str, data: bytes | None):
    return lambda folder: (folder / name).unlink() if data is None else (folder / name).write_bytes(data)


BAD = [
    (written("adapter_config.json", None), "adapter_config.json: no such file"),
    (written("adapter_config.json", b"[]"), "a JSON list"),
    (written("adapter_config.json", b"{"), "line 1"),
    (written("adapter_model.safetensors", None), "no adapter_model.safetensors"),
    (written("adapter_model.safetensors", b""), "damaged"),
    (written("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    (config(use_dora=True), "use_dora is True"), (config(use_rslora=True), "use_rslora"),
    (config(bias="all"), "bias is 'all'"),
    (config(peft_type="IA3"), "peft_type is 'IA3'"), (config(fan_in_fan_out=True), "fan_in_fan_out"),
    (config(rank_pattern={"q_proj": 2}), "rank_pattern"),
    (config(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
    (config(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    (config(layer_replication=[[0, 2]]), "layer_replication"),
    *((config(r=r), "expected a whole number from 1") for r in (0, -1, None, "4", 4.0, True)),
    *((config(r=r), f"is [4, 48], expected [{r}, 48]") for r in (3, 5, 10**9)),
    *((config(lora_alpha=a), "a number other than 0")
      for a in (0, 0.0, None, "10", float("nan"), float("inf"), True, [1])),
    (table(lambda s: s.pop(Q) is None), "lora_A.weight is missing and its other half is there"),
    (table(lambda s: s.pop(Q.replace("_A", "_B")) is None),
     "lora_B.weight is missing and its other half is there"),
    (table(lambda s: {k: x for k, x in s.items() if "projector" in k}), "no LoRA tensor"),
    (table(lambda s: {"x": s[Q]}), "no home in this model"),
    (table(lambda s: {f"other.{k}": x for k, x in s.items()}), "no home in this model"),
    (table(lambda s: s.__setitem__(Q.replace("layers.0", "layers.9"), s[Q].clone())),
     "layers.9.self_attn.q_proj.lora_A.weight has no home in this model"),
    (table(lambda s: s.__setitem__(Q.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(32))),
     "lora_magnitude_vector has no home"),
    (table(lambda s: s.__setitem__("\x1b[2J\n", s[Q].clone())), r"\x1b[2J\n has no home"),
    (table(lambda s: s.__setitem__(Q.replace(PEFT, ""), s[Q].clone())), "stands twice"),
    (replaced(Q, lambda x: x[:2]), "is [2, 32], expected [4, 32]"),
    (replaced(Q, lambda x: x[:, :16]), "is [4, 16], expected [4, 32]"),
    (replaced(Q, lambda x: x[0]), "is [32]"),
    (replaced(P, lambda x: x[:1]), "is [1, 32], expected [32, 32]"),
    (replaced(Q, lambda x: x.int()), "holds torch.int32"),
    (replaced(Q, lambda x: x.to(torch.float8_e4m3fn)), "holds torch.float8_e4m3fn"),
    (table(lambda s: {k: x for k, x in s.items() if "projector" not in k}),
     "no tensor of multi_modal_projector"),
    (config(modules_to_save=["multi_modal_projector", "lm_head"]), "no tensor of lm_head"),
    (config(modules_to_save=5), "no tensor of 5"), (config(modules_to_save={"a": 1}), "no tensor of {'a': 1}"),
    (config(modules_to_save=["\x1b[2J"]), "no tensor of \\x1b[2J"),
    (replaced(Q, lambda x: x * float("nan")), "NaN or infinity"),
    (replaced(P, lambda x: x / 0), "NaN or infinity"),
]


@pytest.mark.parametrize("case, says", BAD, ids=[f"{i} {says}"[:40] for i, (_, says) in enumerate(BAD)])
def test_refused_and_the_model_is_as_before(case, says, tmp_path):
    folder = saved(tmp_path / "a", taught())
    load_adapter(our_model(their_model("mistral")), folder)  # the control
    case(folder)
    model = our_model(their_model("mistral"))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(UserError) as e:
        load_adapter(model, folder)
    message = str(e.value)
    assert says in message and str(folder) in message and message.isprintable() and len(message) <= 2000
    assert model.state_dict().keys() == before.keys() and all(torch.equal(p, before[n])
                                                              for n, p in model.state_dict().items())


def test_a_model_with_an_adapter_is_not_saved_as_if_it_had_none(spm, tmp_path):
    model, processor = llava_min.load(write_folder(tmp_path / "base", spm, their_model("mistral")),
                                      adapter=str(saved(tmp_path / "a", taught())), device="cpu")
    with pytest.raises(UserError, match="not merged"):
        save(model, processor, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_flipped_bytes(tmp_path):
    """Any byte of the adapter's files: refused in one line, or loaded."""
    folder, rng, loaded = saved(tmp_path / "a", taught()), random.Random(0), 0
    names, theirs = sorted(p.name for p in folder.iterdir()), their_model("mistral")
    for _ in range(100):
        path = folder / rng.choice(names)
        good = path.read_bytes()
        at = rng.randrange(min(len(good), 4096))
        path.write_bytes(good[:at] + bytes([good[at] ^ rng.randrange(1, 256)]) + good[at + 1 :])
        try:
            load_adapter(our_model(theirs), folder)
            loaded += 1
        except UserError as e:
            assert str(e).isprintable() and len(str(e)) <= 2000
        path.write_bytes(good)
    assert 10 <= loaded <= 90  # both happen


def test_an_adapter_is_not_applied_twice(tmp_path):
    folder = saved(tmp_path / "a", taught())
    model = our_model(their_model("mistral"))
    load_adapter(model, folder)
    with pytest.raises(UserError, match="has an adapter already"):
        load_adapter(model, folder)
