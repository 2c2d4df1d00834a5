"""trainable.py: what each word trains, the published counts, and the check of the first backward."""

import pytest
import torch
from conftest import hf_config, our_model, pixels, rows, their_model

from llava_min.config import LlavaConfig
from llava_min.errors import UserError
from llava_min.load import on_meta, random_model
from llava_min.lora import LoRAConfig
from llava_min.training.targets import add_lora
from llava_min.training.trainable import check_gradients, parameter_table, set_trainable
from llava_min.util.sizes import SIZES

V, P, L, H = "vision_tower", "multi_modal_projector", "language_model", "lm_head"
ALL = ("all-linear",)


def tiny(kind: str = "llama"):
    return random_model(LlavaConfig.from_hf(hf_config(kind)))


def trained(model) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def under(model, *parts: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith(parts)}


# the tower has three blocks and LLaVA reads the second
NEVER = (f"{V}.layers.2.", f"{V}.post_layernorm.")
CASES = [  # train, switches, what learns
    ("full", {}, (V, P, L, H)),
    ("freeze_vision", {}, (P, L, H)),
    ("projector", {}, (P,)),
    ("last:1", {}, (f"{L}.layers.1.", H)),
    ("last:2", {}, (f"{L}.layers.", H)),
    ("full", dict(train_vision=False), (P, L, H)),
    ("full", dict(train_projector=False), (V, L, H)),
    ("freeze_vision", dict(train_vision=True, train_projector=False), (V, L, H)),
    ("projector", dict(train_vision=True), (V, P)),
    ("last:1", dict(train_projector=True), (f"{L}.layers.1.", H, P)),
    ("projector", dict(train_projector=True, train_vision=False), (P,)),
]


@pytest.mark.parametrize("train, switches, parts", CASES, ids=str)
def test_select(train, switches, parts):
    model = tiny().requires_grad_(True)  # what was set before does not matter
    set_trainable(model, train, **switches)
    assert trained(model) == under(model, *parts) - under(model, *NEVER)


@pytest.mark.parametrize(
    "switches, parts",
    [({}, (P,)), (dict(train_projector=False), ()), (dict(train_vision=True), (P, V))],
    ids=str,
)
def test_select_lora(switches, parts):
    model = tiny()
    add_lora(model, LoRAConfig(2, 4, dora=True))
    set_trainable(model, "lora", **switches)
    lora = {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert len(lora) == 2 * 7 * 3
    assert trained(model) == lora | (under(model, *parts) - under(model, *NEVER))


def test_a_tied_head_is_the_embedding():
    model = tiny("qwen2")
    set_trainable(model, "last:1")
    assert model.lm_head.weight.requires_grad and f"{L}.embed_tokens.weight" in trained(model)
    set_trainable(model, "projector")
    assert trained(model) == under(model, P) and not model.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    "train, switches, says",
    [
        ("last:0", {}, "last:1 to last:2"),
        ("last:99", {}, "last:1 to last:2"),
        ("last:", {}, "last:1"),
        ("last:-1", {}, "last:1"),
        ("last:1.5", {}, "last:1"),
        ("lorra", {}, "lora, full"),
        ("", {}, "lora, full"),
        ("\x1b[2J", {}, r"\x1b[2J"),
        ("projector", dict(train_projector=False), "nothing is left"),
        ("lora", {}, "no LoRA layer is left"),
    ],
)
def test_mistakes(train, switches, says):
    with pytest.raises(UserError) as e:
        set_trainable(tiny(), train, **switches)
    assert (
        says in str(e.value) and str(e.value).startswith("train: ") and str(e.value).isprintable()
    )


def test_a_part_learns_whole_or_by_lora():
    model = tiny()
    add_lora(
        model,
        LoRAConfig(2, targets=(r"(vision_tower|multi_modal_projector)\..*(q_proj|linear_1)",)),
    )
    for train, switches in (
        ("lora", {}),
        ("lora", dict(train_projector=False, train_vision=True)),
        ("full", {}),
    ):
        with pytest.raises(UserError, match="is trained whole and has LoRA layers"):
            set_trainable(model, train, **switches)
    set_trainable(model, "lora", train_projector=False)
    assert {n for n in trained(model) if ".lora_" not in n} == set()


def test_lora_layers_learn_by_lora_alone():
    model = tiny()
    add_lora(model, LoRAConfig(2))
    set_trainable(model, "projector")
    assert trained(model) == under(model, P)


def test_lora_where_the_tower_is_never_run_stays_as_it_is():
    model = tiny()
    add_lora(model, LoRAConfig(2, targets=(r"vision_tower\..*\.q_proj",)))
    set_trainable(model, "lora", train_projector=False)
    assert {n.split(".lora_")[0] for n in trained(model)} == {
        f"{V}.layers.{i}.self_attn.q_proj" for i in (0, 1)
    }
    assert f"{2 * 2 * 32:,} of LoRA's parameters are" in parameter_table(model)


def numbers(model) -> dict[str, list[str]]:
    """The table's rows: part -> parameters, trained, share."""
    return {
        line[:30].strip(): line[30:].split()
        for line in parameter_table(model).splitlines()[1:]
        if line.endswith("%")
    }


def seven_b(config: LoRAConfig, **switches):
    model = on_meta(SIZES["7b"])
    add_lora(model, config)
    set_trainable(model, "lora", **switches)
    return numbers(model)


@pytest.mark.parametrize(
    "r, count", [(16, 39_976_960), (48, 119_930_880), (64, 159_907_840), (128, 319_815_680)]
)
def test_published_counts(r, count):
    rows = seven_b(LoRAConfig(r, targets=ALL))
    assert rows["LoRA in language_model"] == [f"{count:,}", f"{count:,}", "100.00%"]
    assert rows[P] == ["20,979,712", "20,979,712", "100.00%"] and rows[V] == [
        "303,507,456",
        "0",
        "0.00%",
    ]
    assert (
        int(rows[L][0].replace(",", "")) + int(rows[H][0].replace(",", "")) == 6_738_939_904
        and rows[H][1] == "0"
    )
    assert rows["all"][:2] == [f"{7_063_427_072 + count:,}", f"{count + 20_979_712:,}"]


def test_published_counts_with_the_tower():
    """r 8 on six leaf names, which as PEFT matches them are the tower's too, in its last block as
    well.
    """
    names = "q_proj|k_proj|v_proj|o_proj|up_proj|down_proj"
    rows = seven_b(LoRAConfig(8, 256, targets=tuple(names.split("|"))), train_projector=False)
    assert rows["all"] == ["7,079,548,928", "16,121,856", "0.23%"]
    pattern = rf"(vision_tower|language_model)\..*\.({names})"
    rows = seven_b(LoRAConfig(8, 256, targets=(pattern,)), train_projector=False)
    assert rows["LoRA"][0] == "17,301,504" and rows["LoRA in vision_tower"][0] == "1,179,648"
    assert rows["all"][0] == "7,080,728,576"
    assert rows["LoRA"][1] == f"{17_301_504 - 1_179_648 // 24:,}"  # the last block is never run


def backward(model, *pictures: int) -> None:
    ids = rows(*pictures)
    model.loss(
        ids, ids.masked_fill(ids > 300, -100), pixels(sum(pictures)) if sum(pictures) else None
    ).backward()


def lora_model():
    model = our_model(their_model())
    add_lora(
        model,
        LoRAConfig(2, dora=True, targets=(r"(vision_tower|language_model)\..*\.(q_proj|o_proj)",)),
    )
    set_trainable(model, "lora")
    return model


@pytest.mark.parametrize("train", ["lora", "full", "freeze_vision", "projector", "last:1"])
def test_gradients_are_where_they_belong(train):
    model = lora_model() if train == "lora" else our_model(their_model())
    set_trainable(model, train)
    backward(model, 1, 0)
    check_gradients(model)


def change(model, name: str, value) -> None:
    model.get_parameter(name).grad = value


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda m: change(m, f"{P}.linear_1.weight", None), f"{P}.linear_1.weight has no gradient"),
        (
            lambda m: m.multi_modal_projector.linear_1.bias.grad.fill_(float("nan")),
            f"{P}.linear_1.bias has NaN or inf",
        ),
        (
            lambda m: m.multi_modal_projector.linear_1.bias.grad[:1].fill_(torch.inf),
            f"{P}.linear_1.bias has NaN or inf",
        ),
        (
            lambda m: change(m, "lm_head.weight", torch.ones_like(m.lm_head.weight)),
            "lm_head.weight has a gradient though",
        ),
        (lambda m: m.zero_grad(), "and 18 more has no gradient"),
    ],
)
def test_gradients_that_do_not_belong(spoil, says):
    model = lora_model()
    backward(model, 1, 0)
    spoil(model)
    with pytest.raises(UserError) as e:
        check_gradients(model)
    assert says in str(e.value) and len(str(e.value)) < 1000


def test_a_batch_without_pictures_gives_the_tower_a_gradient_of_zeros():
    model = lora_model().train()
    backward(model, 0, 0)
    check_gradients(model)
    assert not model.multi_modal_projector.linear_1.weight.grad.any()


def test_a_tower_cut_off_is_found():
    """What LLaVA's `@torch.no_grad()` tower did to those who meant to train it."""
    model = our_model(their_model())
    set_trainable(model, "full")
    model.vision_tower.forward = torch.no_grad()(model.vision_tower.forward)
    backward(model, 1, 0)
    with pytest.raises(UserError, match=f"{V}.embeddings.class_embedding.* has no gradient"):
        check_gradients(model)
