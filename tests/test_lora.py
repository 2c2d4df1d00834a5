"""lora.py: an adapter starts as nothing, is saved as PEFT saves, and is read however PEFT and LLaVA
wrote it.
"""

import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from conftest import hf_config, our_model, pixels, rows, their_model, write_folder
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import llava_min
from llava_min.adapter import adapter_names, apply_adapter, peft_name, read_adapter, save_adapter
from llava_min.checks.adapter import PEFT_PREFIX
from llava_min.checks.adapter_targets import is_target
from llava_min.checks.config_keys import ADAPTER, unknown_keys
from llava_min.config import LINEARS, LlavaConfig
from llava_min.errors import UserError
from llava_min.fast.cpu_linear import prepack_linears
from llava_min.load import on_meta, save
from llava_min.lora import DoRALinear, LoRAConfig, LoRALinear, init_lora
from llava_min.training.targets import add_lora
from llava_min.training.trainable import check_gradients, set_trainable

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


def load_adapter(model, folder: Path) -> None:
    apply_adapter(model, *read_adapter(model, folder))


def test_what_an_adapter_config_leaves_out_is_as_peft_has_it(tmp_path):
    folder = saved(tmp_path / "a", taught())
    data = json.loads((folder / "adapter_config.json").read_text())
    del data["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(data))
    assert read_adapter(our_model(their_model("mistral")), folder)[0].alpha == 8
    every = {"target_modules": "all-linear"}
    assert (
        is_target("model.layers.0.self_attn.q_proj", every)
        and not is_target("lm_head", every)
        and not is_target("model.lm_head", every)
    )


def test_a_key_of_adapter_config_that_peft_does_not_have_is_named_once(tmp_path, capsys):
    peft = pytest.importorskip("peft", reason="its LoraConfig; pip install -e '.[test]'")
    folder, base = saved(tmp_path / "a", taught()), our_model(their_model("mistral"))
    path = folder / "adapter_config.json"
    ours = json.loads(path.read_text())
    theirs = peft.LoraConfig(**{key: ours[key] for key in ("r", "lora_alpha", "target_modules")})
    plain = {key: list(x) if isinstance(x, set) else x for key, x in theirs.to_dict().items()}
    assert plain.keys() >= ours.keys() and unknown_keys(dict.fromkeys(plain, 1), ADAPTER) == {}
    for data, said in (
        (ours, ""),
        (ours | plain, ""),
        (ours | {"new_config": None, "use_new": False, "new_pattern": {}}, ""),
        (ours | {"use_new": True, "new_pattern": {"q_proj": 2}}, "warning: "),
        (ours | {"use_new": True, "new_pattern": {"q_proj": 2}}, ""),  # said already
    ):
        path.write_text(json.dumps(data))
        read_adapter(base, folder)
        err = capsys.readouterr().err
        assert bool(err) == bool(said), err
        if said:
            assert err.startswith(
                f"warning: {path}: use_new = True, new_pattern = {{'q_proj': 2}}: no published "
                "LoraConfig of PEFT has such a key, and it is not obeyed;"
            )


def test_embeddings_of_an_adapter_over_a_tied_head_are_refused(tmp_path):
    for kind, tied in (("qwen2", True), ("llama", False)):
        model = taught(kind)
        model.language_model.embed_tokens.requires_grad_()
        folder = saved(tmp_path / kind, model)
        base = our_model(their_model(kind))
        if tied:
            with pytest.raises(UserError, match="ties its head to them"):
                read_adapter(base, folder)
        else:
            assert "language_model.embed_tokens.weight" in read_adapter(base, folder)[1]


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max() > 0.05


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_nothing(kind, dora):
    model = our_model(their_model(kind))
    before = logits(model)
    add_lora(model, LoRAConfig(4, 10, dora=dora))
    # DoRA's factor is 1 but for rounding
    assert (logits(model) - before).abs().max() <= 1e-5 * dora
    layers = [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 2 * len(LINEARS) and all(
        n.startswith("language_model.layers.") for n in layers
    )
    ends = ["A.weight", "B.weight", *(["magnitude_vector"] if dora else [])]
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learns == {f"{n}.lora_{x}" for n in layers for x in ends}


def made(base, *args, dora: bool = False, **kwargs) -> LoRALinear:
    layer = (DoRALinear if dora else LoRALinear)(base, *args, **kwargs)
    layer.init_weights(torch.Generator().manual_seed(0))
    return layer


def test_the_update_is_that_of_the_paper():
    base = torch.nn.Linear(5, 7).requires_grad_(False)
    layer = made(base, 3, 12 / 3)
    layer.lora_B.weight.data.normal_()
    x = torch.randn(2, 5)
    expected = x @ (base.weight + 12 / 3 * layer.lora_B.weight @ layer.lora_A.weight).T + base.bias
    assert (layer(x) - expected).abs().max() <= 1e-5
    a = layer.lora_A.weight  # kaiming_uniform(a=√5)
    assert a.abs().max() <= 5**-0.5 and a.std() > 0.1


def test_dropout_is_on_the_update_alone_and_in_training_alone():
    layer = made(torch.nn.Linear(64, 7), 3, 4.0, dropout=0.5)
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
    assert (
        near.dtype == dtype and (near.float() - logits(taught())).norm() < 0.1 * near.float().norm()
    )
    with torch.autocast("cpu", dtype):
        assert logits(model).dtype == dtype


def adapted(model) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def blocks(*ends: str) -> set[str]:
    return {f"language_model.layers.{i}.{end}" for i in (0, 1) for end in ends}


LEAVES = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


@pytest.mark.parametrize(
    "targets, paths",
    [
        (("q_proj", "down_proj"), blocks("self_attn.q_proj", "mlp.down_proj")),
        (("all-linear",), blocks(*LEAVES)),
        (LINEARS, blocks(*LEAVES)),
        (
            (r"(vision_tower|language_model)\..*\.q_proj",),
            blocks("self_attn.q_proj")
            | {f"vision_tower.layers.{i}.self_attn.q_proj" for i in range(3)},
        ),
        (("language_model.layers.1.mlp.up_proj",), {"language_model.layers.1.mlp.up_proj"}),
        ((".*linear_1|lm_head",), {"multi_modal_projector.linear_1", "lm_head"}),
    ],
    ids=lambda x: str(sorted(x) if isinstance(x, set) else x),  # a set has no order
)
def test_targets(targets, paths):
    model = our_model(their_model())
    add_lora(model, LoRAConfig(2, 4, targets=targets))
    assert adapted(model) == paths


@pytest.mark.parametrize(
    "kind, targets, says",
    [
        ("llama", ("q_proj", "fc1"), "'fc1' names no linear layer of the language model"),
        ("llama", ("lm_head",), "'lm_head' names no"),
        ("llama", ("embed_tokens",), "'embed_tokens' names no"),
        ("llama", (r".*\.q_pro",), "matches no linear layer in full"),
        ("llama", ("",), "matches no linear layer"),
        ("llama", (".*norm.*",), "matches no linear layer"),
        ("llama", ("(q_proj",), "is not a regex"),
        ("llama", ("q_proj", r".*\.o_proj"), "neither names alone nor one regex"),
        ("llama", ("all-linear", "q_proj"), "neither names alone"),
        ("qwen2", ("lm_head|.*q_proj",), "tied to the embedding"),
    ],
    ids=str,
)
def test_targets_that_fit_nothing(kind, targets, says):
    model = our_model(their_model(kind))
    with pytest.raises(UserError) as e:
        add_lora(model, LoRAConfig(targets=targets))
    assert says in str(e.value) and "lora_targets" in str(e.value) and not adapted(model)


def test_the_start_depends_on_seed_and_path_alone():
    def start(seed: int, targets: tuple[str, ...]) -> dict:
        model = our_model(their_model())
        add_lora(model, LoRAConfig(4, targets=targets, dora=True))
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.data.fill_(9.0)
        torch.rand(3)
        init_lora(model, seed)
        return {n: p for n, p in model.named_parameters() if ".lora_" in n}

    a, again, other = start(0, LINEARS), start(0, ("v_proj", "q_proj")), start(1, LINEARS)
    assert again and all(torch.equal(x, a[n]) for n, x in again.items())
    drawn = [
        x for start in (a, other) for n, x in start.items() if "lora_A" in n and x.shape == (4, 32)
    ]
    assert all(x.abs().max() <= 32**-0.5 and x.std() > 0.08 for x in drawn)
    assert all(far(x, y) for i, x in enumerate(drawn) for y in drawn[:i])


def test_made_on_meta_it_starts_as_on_the_spot():
    theirs, config = their_model("mistral"), LoRAConfig(4, dora=True)
    there = our_model(theirs)
    add_lora(there, config)
    init_lora(there, 5)
    model = on_meta(there.config)
    add_lora(model, config)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            p.data.copy_(there.get_parameter(name))
    init_lora(model, 5)
    assert all(torch.equal(p, there.get_parameter(n)) for n, p in model.named_parameters())


def shards(rank: int, base: Path, out: Path) -> None:
    """One of two ranks: the model of `base` under FSDP2, made on meta; rank 0 writes LoRA's
    tensors, gathered.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.group", rank=rank, world_size=2)
    there = torch.load(base, weights_only=True)
    model = on_meta(LlavaConfig.from_hf(hf_config()))
    add_lora(model, LoRAConfig(3, dora=True, rank_pattern={"q_proj": 1}))
    for block in (*model.language_model.layers, model):
        fully_shard(block)
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            p.data.to_local().copy_(there[name.replace(".base.", ".")].chunk(2)[rank])
    init_lora(model, 5)
    whole = {n: p.data.full_tensor() for n, p in model.named_parameters() if ".lora_" in n}
    if rank == 0:
        save_file({n: x.contiguous() for n, x in whole.items()}, out)
    dist.destroy_process_group()


def test_shards_start_as_the_whole(tmp_path):
    """Each of two processes has its rows: of an A of rank 3 two and one, of rank 1 one and none."""
    model = our_model(their_model())
    torch.save(dict(model.named_parameters()), tmp_path / "base.pt")
    torch.multiprocessing.spawn(shards, (tmp_path / "base.pt", tmp_path / "lora"), nprocs=2)
    add_lora(model, LoRAConfig(3, dora=True, rank_pattern={"q_proj": 1}))
    init_lora(model, 5)
    gathered = load_file(tmp_path / "lora")
    assert len(gathered) == 42 and all(
        torch.equal(x, model.get_parameter(n)) for n, x in gathered.items()
    )


@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_is_loaded(kind, projector, tmp_path):
    model = taught(kind, projector=projector)
    saved(tmp_path / "a", model)
    again = our_model(their_model(kind))
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model)) and far(
        logits(again), logits(our_model(their_model(kind)))
    )
    assert not any(p.requires_grad for p in again.parameters())
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {x.dtype for x in state.values()} == {torch.float32} and len(state) == 28 + 4 * projector
    assert state.keys() == {PEFT_PREFIX + peft_name(n) for n in adapter_names(model)}
    assert PEFT_PREFIX + "model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in state


def peft_of(folder: Path, kind: str = "mistral"):
    """transformers' model with the adapter of `folder`, every tensor of which has to find its
    place.
    """
    peft = pytest.importorskip("peft", reason="the oracle of this test; pip install -e '.[test]'")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected|adapter keys).*")
        model = peft.PeftModel.from_pretrained(their_model(kind), folder).eval()
    names = {n for n, _ in model.named_parameters() if ".lora_" in n or ".modules_to_save." in n}
    assert len(names) == len(load_file(folder / "adapter_model.safetensors"))
    return model


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(4, 10),
        LoRAConfig(4, 10, dora=True),
        LoRAConfig(4, 10, rslora=True),
        LoRAConfig(4, 10, targets=("all-linear",)),
        LoRAConfig(4, 10, targets=("q_proj", "up_proj")),
        LoRAConfig(4, 10, targets=(r"(vision_tower|language_model)\..*\.q_proj",)),
        LoRAConfig(
            4,
            10,
            targets=(
                r"language_model\.layers\.1\..*_proj|lm_head|vision_tower.layers.0.mlp.fc[12]",
            ),
            dora=True,
        ),
    ],
    ids=lambda c: f"{c.dora} {c.rslora} {c.targets}",
)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_save(kind, config, tmp_path):
    if kind == "qwen2" and "lm_head" in config.targets[0]:
        pytest.skip("a tied head is not adapted")
    model = taught(kind, config)
    theirs = peft_of(saved(tmp_path / "a", model, config), kind)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-4
    assert far(logits(model), logits(our_model(their_model(kind))))
    there = {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }
    assert there == {peft_name(n) for n in adapted(model)}


@pytest.mark.parametrize(
    "parts, modules",
    [
        (("multi_modal_projector", "lm_head"), ["multi_modal_projector", "lm_head"]),
        ((), None),
        (("multi_modal_projector.linear_2",), ["multi_modal_projector.linear_2"]),
        (
            ("vision_tower.layers.1.", "vision_tower.embeddings"),
            ["vision_tower.embeddings", "vision_tower.encoder.layers.1"],
        ),
        (("vision_tower",), ["vision_tower"]),
    ],
    ids=str,
)
def test_what_is_trained_beside_lora_is_saved(parts, modules, tmp_path):
    model = taught(projector=False)
    for name, p in model.named_parameters():
        if parts and name.startswith(parts):
            p.requires_grad_().data.mul_(1.3)
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        if p.requires_grad:
            p.data.zero_()  # as if these were shards: what is given counts
    (tmp_path / "a").mkdir()
    save_adapter(model, LoRAConfig(4, 10), tmp_path / "a", "base", state)
    assert (
        json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"]
        == modules
    )
    for n, p in model.named_parameters():
        p.data.copy_(state[n])
    again = our_model(their_model("mistral"))
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert (logits(peft_of(tmp_path / "a")) - logits(model)).abs().max() <= 1e-4


LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def by_peft(folder: Path, kind: str = "mistral", /, **change):
    """transformers' model with an adapter that peft made, saved to `folder`."""
    peft = pytest.importorskip(
        "peft", reason="writes the adapter that is read here; pip install -e '.[test]'"
    )
    config = peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 10,
            "target_modules": LANGUAGE,
            "modules_to_save": ["multi_modal_projector"],
            "task_type": "CAUSAL_LM",
        }
        | change
    )
    model = peft.get_peft_model(their_model(kind), config).eval()
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    model.save_pretrained(folder)
    return model


PATTERNS = {
    "rank_pattern": {
        "q_proj": 6,
        r".*layers\.[1]\.mlp.up_proj": 2,
        "^model.language_model.layers.0.self_attn.o_proj": 3,
    },
    "alpha_pattern": {"o_proj": 5, "v_proj": -3.5},
}


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"use_rslora": True},
        PATTERNS,
        {**PATTERNS, "use_dora": True, "use_rslora": True},
        {"modules_to_save": ["multi_modal_projector", "lm_head"]},
        {"modules_to_save": ["model.vision_tower", "linear_2"], "use_dora": True},
        {},
        {"modules_to_save": None},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["lm_head", "linear_1"], "modules_to_save": None},
        {"lora_alpha": 3, "r": 7, "lora_dropout": 0.2},
        {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {
            "target_modules": ["q_proj", "linear_1"],
            "modules_to_save": ["lm_head"],
            "layers_to_transform": [0],
            "layers_pattern": "layers",
        },
        {"target_modules": ["q_proj", "fc1"], "exclude_modules": ["0.self_attn.q_proj"]},
        {
            "target_modules": "(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)",
            "exclude_modules": r".*\.1\..*",
            "modules_to_save": ["projector"],
        },
    ],
    ids=str,
)
def test_what_peft_saves_is_loaded(change, tmp_path):
    theirs = by_peft(tmp_path / "a", **change)
    ours = our_model(their_model("mistral"))
    before = logits(ours)
    load_adapter(ours, tmp_path / "a")
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-4 and far(logits(ours), before)
    config, tensors = read_adapter(our_model(their_model("mistral")), tmp_path / "a")
    for name, p in ours.named_parameters():  # and back: what was trained beside LoRA is saved again
        p.requires_grad_(name in tensors)
    assert (
        logits(peft_of(saved(tmp_path / "b", ours, config))) - logits(theirs)
    ).abs().max() <= 1e-4
    # peft's leaf names reach into the tower
    if change.get("target_modules") == ["q_proj", "v_proj"]:
        assert any(
            n.startswith("vision_tower") and isinstance(m, LoRALinear)
            for n, m in ours.named_modules()
        )


OLD = {
    "language_model.model.": "model.language_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}  # before transformers 4.52
LLAVA = {
    "model.layers.": "model.language_model.layers.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
}


def renamed(state: dict, names: dict[str, str]) -> dict:
    out = {}
    for key, x in state.items():
        old, new = next(
            (old, new) for new, old in names.items() if key.startswith(PEFT_PREFIX + old)
        )
        out[PEFT_PREFIX + new + key.removeprefix(PEFT_PREFIX + old)] = x
    return out


@pytest.mark.parametrize("names", [OLD, LLAVA], ids=["transformers < 4.52", "LLaVA"])
@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_older_names(names, end, tmp_path):
    model = taught()
    folder = saved(tmp_path / "a", model)
    state = renamed(load_file(folder / "adapter_model.safetensors"), names)
    (folder / "adapter_model.safetensors").unlink()
    # it keeps the projector apart, and has no tower yet when leaf names are looked up
    if names is LLAVA:
        config(modules_to_save=None, target_modules=list(LINEARS))(folder)
        torch.save(
            {k: x for k, x in state.items() if "mm_projector" in k},
            folder / "non_lora_trainables.bin",
        )
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


@pytest.mark.parametrize(
    "keep, says",
    [(0, "model.mm_projector.0.weight is missing"), (1, "projector.* is missing"), (4, None)],
)
@pytest.mark.parametrize("layers", ["all", "one"])
def test_half_an_adapter_of_the_original(keep, layers, says, tmp_path):
    folder = saved(tmp_path / "a", taught())
    config(modules_to_save=None, target_modules=list(LINEARS))(folder)
    state = renamed(load_file(folder / "adapter_model.safetensors"), LLAVA)
    whole = {k: x for k, x in state.items() if "mm_projector" in k}
    lora = {
        k: x
        for k, x in state.items()
        if k not in whole and (layers == "all" or "layers.0.self_attn.q_proj" in k)
    }
    save_file(lora, folder / "adapter_model.safetensors")
    torch.save(dict(list(whole.items())[:keep]), folder / "non_lora_trainables.bin")
    model = our_model(their_model("mistral"))
    if says is None and layers == "all":
        load_adapter(model, folder)
    else:
        with pytest.raises(UserError, match=says or "13 layers that target_modules names"):
            load_adapter(model, folder)


def test_a_regex_that_could_run_for_ever_is_not_run(tmp_path, capsys):
    folder = saved(tmp_path / "a", taught())
    for i, pattern in enumerate(("(a+)+b", ".*.*.*.*.*.*q_proj", "(?:q|k)*", "a?" * 40)):
        config(target_modules=pattern)(folder)
        load_adapter(our_model(their_model("mistral")), folder)
        assert capsys.readouterr().err.count("too many repetitions") == 1, pattern


Q = PEFT_PREFIX + "model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
P = PEFT_PREFIX + "model.multi_modal_projector.linear_1.weight"


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
    return lambda folder: (
        (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
    )


BAD = [
    (written("adapter_config.json", None), "adapter_config.json: no such file"),
    (written("adapter_config.json", b"[]"), "a JSON list"),
    (written("adapter_config.json", b"{"), "line 1"),
    (written("adapter_model.safetensors", None), "no adapter_model.safetensors"),
    (written("adapter_model.safetensors", b""), "damaged"),
    (
        written("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1"),
        "git lfs pull",
    ),
    (config(use_dora=True), "lora_magnitude_vector is missing"),
    (config(use_dora="yes"), "use_dora is 'yes'"),
    (config(use_rslora=1.5), "use_rslora is 1.5"),
    (config(lora_bias=True), "lora_bias is True"),
    *(
        (config(**{key: [1]}), f"{key} is [1], which is not implemented")
        for key in ("target_parameters", "trainable_token_indices", "use_qalora", "kasa_config")
    ),
    (config(bias="all"), "bias is 'all'"),
    (config(peft_type="IA3"), "peft_type is 'IA3'"),
    (config(fan_in_fan_out=True), "fan_in_fan_out"),
    (config(rank_pattern={"q_proj": 2}), "is [4, 32], expected [2, 32]"),
    *(
        (config(**{key: x}), f"{key} is")
        for key in ("rank_pattern", "alpha_pattern")
        for x in ([4], {"q_proj": 0}, {"q_proj": "4"}, {"q_proj": None}, {"q_proj": True})
    ),
    *(
        (config(alpha_pattern={key: 2}), "alpha_pattern has")
        for key in ("(a+)+b", "(a*a)*", "(", "a{1,2}.*.*", "q" * 201, "(?P<a>.)*")
    ),
    (config(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    (config(layer_replication=[[0, 2]]), "layer_replication"),
    *((config(r=r), "expected a whole number from 1") for r in (0, -1, None, "4", 4.0, True)),
    *((config(r=r), f"is [4, 48], expected [{r}, 48]") for r in (3, 5, 10**9)),
    *(
        (config(lora_alpha=a), "a number other than 0")
        for a in (0, 0.0, None, "10", float("nan"), float("inf"), True, [1])
    ),
    (
        written("config.json", b'{"mm_projector_type": "mlp2x_gelu"}'),
        "without non_lora_trainables.bin",
    ),
    (table(lambda s: s.pop(Q) is None), "lora_A.weight is missing and its other half is there"),
    (
        table(lambda s: s.pop(Q.replace("_A", "_B")) is None),
        "lora_B.weight is missing and its other half is there",
    ),
    (table(lambda s: {k: x for k, x in s.items() if "projector" in k}), "no LoRA tensor"),
    (table(lambda s: {"x": s[Q]}), "no place in this model"),
    (  # a name of ours is in no layout
        table(lambda s: {k.replace("model.language_model.", "language_model."): s[k] for k in s}),
        "language_model.layers.0.mlp.down_proj.lora_A.weight has no place in this model",
    ),
    (table(lambda s: {f"other.{k}": x for k, x in s.items()}), "no place in this model"),
    (
        table(lambda s: s.__setitem__(Q.replace("layers.0", "layers.9"), s[Q].clone())),
        "layers.9.self_attn.q_proj.lora_A.weight has no place in this model",
    ),
    (
        table(
            lambda s: s.__setitem__(
                Q.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(32)
            )
        ),
        "lora_magnitude_vector has no place",
    ),
    (table(lambda s: s.__setitem__("\x1b[2J\n", s[Q].clone())), r"\x1b[2J\n has no place"),
    (table(lambda s: s.__setitem__(Q.replace(PEFT_PREFIX, ""), s[Q].clone())), "is there twice"),
    (replaced(Q, lambda x: x[:2]), "is [2, 32], expected [4, 32]"),
    (replaced(Q, lambda x: x[:, :16]), "is [4, 16], expected [4, 32]"),
    (replaced(Q, lambda x: x[0]), "is [32]"),
    (replaced(P, lambda x: x[:1]), "is [1, 32], expected [32, 32]"),
    (replaced(Q, lambda x: x.int()), "holds torch.int32"),
    (replaced(Q, lambda x: x.to(torch.float8_e4m3fn)), "holds torch.float8_e4m3fn"),
    (
        table(lambda s: {k: x for k, x in s.items() if "projector" not in k}),
        "no tensor of multi_modal_projector",
    ),
    (table(lambda s: s.pop(P) is None), "linear_1.weight is missing, of multi_modal_projector"),
    (
        table(
            lambda s: {
                k: x for k, x in s.items() if "projector" in k or "layers.0.self_attn.q_proj" in k
            }
        ),
        "13 layers that target_modules names have no LoRA tensors",
    ),
    (config(target_modules=r".*language_model.*q_proj"), "which target_modules"),
    (config(target_modules=["nope"]), "target_modules ['nope'] does not name"),
    (config(target_modules=[*LINEARS]), "9 layers"),
    (config(exclude_modules=["up_proj"]), "up_proj, which target_modules"),
    (
        config(target_modules=list(LINEARS), layers_to_transform=[0], exclude_modules=".*vision.*"),
        "layers.1.",
    ),
    *((config(target_modules=x), "target_modules is") for x in (None, [], "", 5, [5])),
    (config(target_modules="(q_proj"), "target_modules is '(q_proj'"),
    (config(layers_pattern=["("]), "layers_pattern is"),
    (config(exclude_modules="("), "exclude_modules is"),
    (config(layers_to_transform=["1"]), "layers_to_transform is"),
    (config(modules_to_save=["multi_modal_projector", "lm_head"]), "no tensor of lm_head"),
    (config(modules_to_save=5), "no tensor of 5"),
    (config(modules_to_save={"a": 1}), "no tensor of {'a': 1}"),
    (config(modules_to_save=["\x1b[2J"]), "no tensor of \\x1b[2J"),
    (replaced(Q, lambda x: x * float("nan")), "NaN or infinity"),
    (replaced(P, lambda x: x / 0), "NaN or infinity"),
]


@pytest.mark.parametrize(
    "case, says", BAD, ids=[f"{i} {says}"[:40] for i, (_, says) in enumerate(BAD)]
)
def test_refused_and_the_model_is_as_before(case, says, tmp_path):
    folder = saved(tmp_path / "a", taught())
    load_adapter(our_model(their_model("mistral")), folder)  # the control
    case(folder)
    model = our_model(their_model("mistral"))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(UserError) as e:
        load_adapter(model, folder)
    message = str(e.value)
    assert (
        says in message
        and str(folder) in message
        and message.isprintable()
        and len(message) <= 2000
    )
    assert model.state_dict().keys() == before.keys() and all(
        torch.equal(p, before[n]) for n, p in model.state_dict().items()
    )


def test_a_model_with_an_adapter_is_not_saved_as_if_it_had_none(spm, tmp_path):
    model, processor = llava_min.load(
        write_folder(tmp_path / "base", spm, their_model("mistral")),
        adapter=str(saved(tmp_path / "a", taught())),
        device="cpu",
    )
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
    for again in (
        lambda: load_adapter(model, folder),
        lambda: add_lora(model, LoRAConfig(targets=(".*linear_1",))),
    ):
        with pytest.raises(UserError, match="has an adapter already"):
            again()


def ours_in_theirs(name: str) -> str:
    """Our name of a parameter of peft's model."""
    name = name.removeprefix(PEFT_PREFIX).removeprefix("model.")
    for theirs in ("encoder.", "modules_to_save.default.", ".default"):
        name = name.replace(theirs, "")
    return name.replace("magnitude_vector.weight", "magnitude_vector")


def both(way: str, tmp_path: Path):
    """(transformers' model, ours) with equal weights, ready to be trained."""
    if way == "full":
        theirs, ours = their_model(), our_model(their_model())
        theirs.requires_grad_(True)
        set_trainable(ours, "full")
    else:
        change = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}[way]
        theirs, ours = by_peft(tmp_path / "a", "llama", **change), our_model(their_model())
        load_adapter(ours, tmp_path / "a")
        set_trainable(ours, "lora")
    return theirs.train(), ours.train()


def losses(theirs, ours, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = rows(1, 0, 2, seed=seed)
    labels = ids.clone()
    labels[:, :14] = -100
    loss = ours.loss(ids, labels, pixels(3, seed)) / (labels[:, 1:] != -100).sum()
    return theirs(input_ids=ids, labels=labels, pixel_values=pixels(3, seed)).loss, loss


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


WAYS = ["lora", "dora", "rslora", "full"]


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_peft(way, tmp_path):
    theirs, ours = both(way, tmp_path)
    for loss in losses(theirs, ours):
        loss.backward()
    check_gradients(ours)
    want = {ours_in_theirs(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    got = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert (
        want.keys() == got.keys()
        and len(got) == {"lora": 32, "rslora": 32, "dora": 46, "full": 62}[way]
    )
    for name, g in got.items():
        # adds the same to every score of a query: what is there is rounding
        if name.endswith("k_proj.bias"):
            assert max(g.norm(), want[name].norm()) <= 1e-6
        else:
            assert apart(g, want[name]) <= 1e-4, name


@pytest.mark.parametrize("way", WAYS)
def test_ten_steps_are_those_of_peft(way, tmp_path):
    theirs, ours = both(way, tmp_path)
    sides = [
        {f(n): p for n, p in m.named_parameters() if p.requires_grad}
        for m, f in ((theirs, ours_in_theirs), (ours, lambda n: n))
    ]
    optimizers = [
        torch.optim.AdamW(side.values(), lr=1e-3, eps=1e-5, weight_decay=0.01) for side in sides
    ]
    start = {n: p.detach().clone() for n, p in sides[1].items()}
    for step in range(10):
        both_losses = losses(theirs, ours, seed=step)
        for loss, optimizer in zip(both_losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert abs(both_losses[0] - both_losses[1]) <= 1e-4 * both_losses[0]
    for name, p in sides[1].items():
        assert apart(p.detach(), sides[0][name].detach()) <= 1e-4, name
        assert apart(p.detach(), start[name]) >= 1e-3 or "k_proj.bias" in name, name


def test_the_length_of_a_row_that_vanishes_is_a_number():
    """Rounding makes the square of some a little less than nothing."""
    base = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
    base.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    layer = DoRALinear(base, 64, 1.0).requires_grad_(False)
    layer.lora_A.weight.copy_(base.weight)
    layer.lora_B.weight.copy_(-torch.eye(64))
    norms = layer.norms()
    assert norms.isfinite().all() and (norms > 0).all() and (norms < 0.1).all()


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_as_peft_has_it(dora):
    """Equal draws in both: for DoRA the base's own output comes without dropout, its correction
    with it.
    """
    peft = pytest.importorskip("peft", reason="the oracle of this test; pip install -e '.[test]'")
    base = torch.nn.Linear(16, 12)
    config = peft.LoraConfig(
        r=4, lora_alpha=10, lora_dropout=0.4, use_dora=dora, target_modules=["0"]
    )
    theirs = peft.get_peft_model(torch.nn.Sequential(base), config).train()
    ours = made(base, 4, 2.5, dropout=0.4, dora=dora).train()
    layer = theirs.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    for x, p in ours.named_parameters():  # base and magnitude are those of `base` in both
        if x.partition(".")[0] in ("lora_A", "lora_B"):
            p.data.copy_(getattr(layer, x.partition(".")[0])["default"].weight)
    x = torch.randn(3, 5, 16)
    outputs = []
    for m in (theirs, ours):
        torch.manual_seed(3)
        outputs.append(m(x))
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 and far(outputs[0], base(x))


@pytest.mark.parametrize("dora", [False, True])
def test_over_a_base_that_is_no_plain_linear(dora):
    base = torch.nn.Linear(64, 96).bfloat16().requires_grad_(False)
    prepack_linears(packed := torch.nn.Sequential(base))
    layers = [made(b, 4, 2.5, dora=dora) for b in (base, packed[0])]
    results = []
    for layer in layers:
        torch.manual_seed(0)
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
        x = torch.randn(3, 50, 64).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.sum().backward()
        results.append([y, x.grad, *(p.grad for n, p in layer.named_parameters() if "lora_" in n)])
    assert len(results[0]) == 4 + dora
    assert all(apart(a.detach().float(), b.detach().float()) < 0.01 for a, b in zip(*results))


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 1e-4)])
def test_norms_without_a_matrix_of_that_size(dtype, most):
    """Near the exact lengths, and no operation makes as many numbers as W has."""
    torch.manual_seed(0)
    layer = made(torch.nn.Linear(4096, 512).to(dtype).requires_grad_(False), 8, 4.0, dora=True)
    layer.lora_B.weight.data.normal_(std=0.02)
    w, a, b = (
        x.detach().double() for x in (layer.base.weight, layer.lora_A.weight, layer.lora_B.weight)
    )
    exact, most_made = (w + 4 * b @ a).norm(dim=1), 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most_made
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and not func.is_view:
                most_made = max(most_made, out.numel())
            return out

    with Sizes(), torch.autocast("cpu", torch.bfloat16):
        norms = layer.norms()
    assert norms.dtype == torch.float32 and apart(norms.double(), exact) <= most
    assert apart(w.norm(dim=1), exact) > 0.01
    assert most_made <= layer.base.weight.numel() // 2


@pytest.mark.parametrize(
    "targets, kind",
    [
        (["embed_tokens", "q_proj"], "Embedding"),
        (["patch_embedding", "q_proj"], "Conv2d"),
        (["position_embedding"], "Embedding"),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_what_is_not_linear_is_not_implemented(targets, kind, dora, tmp_path):
    by_peft(tmp_path / "a", "llama", target_modules=targets, use_dora=dora, modules_to_save=None)
    with pytest.raises(
        UserError,
        match=f"is LoRA on a layer of kind {kind}, expected linear "
        f"layers, as nothing else is implemented; merge",
    ):
        read_adapter(our_model(their_model("llama")), tmp_path / "a")


def test_an_adapter_of_mlx_is_called_that(tmp_path):
    state = {
        f"language_model.model.layers.0.self_attn.q_proj.lora_{x}": torch.ones(4, 4) for x in "ab"
    }
    lm = {
        "fine_tune_type": "lora",
        "num_layers": 8,
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
    }
    for name, data, file in (
        ("lm", lm, "adapters"),
        ("vlm", {"rank": 8, "alpha": 16, "dropout": 0.0}, "adapters"),
        ("renamed", {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}, "adapter_model"),
    ):
        (folder := tmp_path / name).mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(data))
        save_file(state, folder / f"{file}.safetensors")
        with pytest.raises(UserError) as told:
            read_adapter(our_model(their_model("llama")), folder)
        assert str(told.value).startswith(
            f"{folder}: an adapter of MLX (mlx-lm, mlx-vlm), expected one of PEFT; convert it"
        )


@pytest.mark.parametrize("names", [OLD, LLAVA], ids=["transformers < 4.52", "LLaVA"])
def test_a_missing_half_is_named_as_the_file_would(names, tmp_path):
    folder = saved(tmp_path / "a", taught())
    state = renamed(load_file(folder / "adapter_model.safetensors"), names)
    gone = next(key for key in state if key.endswith("1.mlp.up_proj.lora_A.weight"))
    save_file({k: x for k, x in state.items() if k != gone}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"{gone} is missing and its other half is there"):
        read_adapter(our_model(their_model("mistral")), folder)
