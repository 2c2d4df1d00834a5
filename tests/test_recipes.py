"""The recipes: each fits train.py's settings, plans without weights, and trains what its source
published.
"""

import re
import tomllib
from pathlib import Path

import pytest
from conftest import load_script

from llava_min.config import LlavaConfig, TextConfig
from llava_min.load import load, on_meta
from llava_min.lora import LoRAConfig
from llava_min.training.targets import add_lora
from llava_min.training.trainable import set_trainable
from llava_min.util.cli import parse
from llava_min.util.files import write_json
from llava_min.util.sizes import SIZES

train = load_script("train")
QWEN = LlavaConfig(  # Qwen1.5-4B-Chat
    text=TextConfig(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=40,
        num_attention_heads=20,
        num_key_value_heads=20,
        head_dim=128,
        model_type="qwen2",
    ),
    image_token_id=151646,
)
DECODER = {"7b": 6_738_939_904, "13b": 13_016_519_680}  # with embedding and head
PROJECTOR = {"7b": 20_979_712, "13b": 31_467_520}
LORA_128 = {"7b": 319_815_680, "13b": 500_695_040}
# name: (GPUs it is made for, rows of a step there, what is trained by part, what else the source
# sets)
LLAVA = dict(
    schedule="cosine",
    warmup_ratio=0.03,
    weight_decay=0.0,
    epochs=1,
    max_length=2048,
    precision="bf16",
    gradient_checkpointing=True,
    workers=4,
    betas=(0.9, 0.999),
    max_grad_norm=1.0,
)
STAGE_2 = dict(**LLAVA, template="vicuna_v1", image_aspect_ratio="pad", group_by_length=True)
BY_LORA = dict(
    **STAGE_2,
    lr=2e-4,
    projector_lr=2e-5,
    lora_r=128,
    lora_alpha=256,
    lora_dropout=0.05,
    train="lora",
)
PUBLISHED = {
    "ocr-lora": (
        4,
        16,
        {"language_model": 119_930_880, "multi_modal_projector": PROJECTOR["7b"]},
        dict(
            lr=2e-4,
            projector_lr=2e-5,
            lora_alpha=256,
            epochs=1,
            batch_size=1,
            eval_batch_size=4,
            log_every=1,
            precision="fp16",
            save_every="epoch",
            keep=1,
            max_length=2048,
            workers=4,
            group_by_length=True,
            template="vicuna_v1",
        ),
    ),
    # magnitudes: one per output row
    "vsft-dora": (
        1,
        4,
        {"language_model": 39_976_960 + 1_359_872},
        dict(
            lr=6e-6,
            lora_alpha=16,
            lora_dropout=0.05,
            dora=True,
            neftune_alpha=5,
            warmup_steps=100,
            max_steps=10000,
            eval_every=100,
            save_every="100",
            save_only_model=True,
            best_metric="loss",
            precision="fp16",
        ),
    ),
    "qwen-clip": (
        4,
        192,
        {"language_model": 26_214_400, "multi_modal_projector": 9_180_160},
        dict(
            lr=4e-4,
            lora_r=32,
            lora_alpha=8,
            lora_dropout=0.05,
            epochs=5,
            batch_size=6,
            grad_accum=8,
            eval_batch_size=12,
            save_every="500",
            keep=3,
            log_every=50,
            precision="bf16",
            schedule="linear",
            template="chatml",
        ),
    ),
    "two-24gb": (
        2,
        128,
        {"language_model": LORA_128["7b"], "multi_modal_projector": PROJECTOR["7b"]},
        BY_LORA,
    ),
}
for s in DECODER:
    projector = {"multi_modal_projector": PROJECTOR[s]}
    full = {**projector, "language_model": DECODER[s]}
    lora = {**projector, "language_model": LORA_128[s]}
    PUBLISHED |= {
        f"pretrain-{s}": (
            8,
            256,
            projector,
            dict(**LLAVA, lr=1e-3, template="plain", image_aspect_ratio="crop"),
        ),
        f"finetune-{s}": (8, 128, full, dict(**STAGE_2, lr=2e-5)),
        f"lora-{s}": (8, 128, lora, BY_LORA),
        f"task-{s}": (8, 128, full, dict(**STAGE_2, lr=2e-5)),
        f"task-lora-{s}": (8, 128, lora, BY_LORA),
    }


def read(name: str, *flags: str):
    return parse(train.TrainConfig, ["--recipe", name, *flags], "A test.", recipes=train.RECIPES)


def trained(config: LlavaConfig, args) -> dict[str, int]:
    """Trained parameters by part, the head with the language model."""
    model = on_meta(config)
    if args.train == "lora":
        add_lora(
            model,
            LoRAConfig(args.lora_r, args.lora_alpha, targets=args.lora_targets, dora=args.dora),
        )
    set_trainable(
        model, args.train, train_projector=args.train_projector, train_vision=args.train_vision
    )
    counts: dict[str, int] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            part = name.partition(".")[0].replace("lm_head", "language_model")
            counts[part] = counts.get(part, 0) + p.numel()
    return counts


def test_every_recipe_is_here():
    assert {p.stem for p in train.RECIPES.glob("*.toml")} == {"toy", "tiny", *PUBLISHED}


@pytest.mark.parametrize("name", ["toy", "tiny"])
def test_ours_fit_the_settings(name):
    assert read(name).recipe == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name):
    gpus, rows, parts, settings = PUBLISHED[name]
    args = read(name)
    assert {key: getattr(args, key) for key in settings} == settings
    assert args.batch_size * args.grad_accum * gpus == rows
    assert (
        trained(QWEN if name == "qwen-clip" else SIZES["13b" if "13b" in name else "7b"], args)
        == parts
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_says_where_it_comes_from_and_what_it_departs_in(name):
    text = (train.RECIPES / f"{name}.toml").read_text()
    assert "# Source: " in text and ("# Departs" in text or name == "two-24gb")
    for key, value in tomllib.loads(text).items():
        assert isinstance(value, str | int | float | bool | list), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_dry_run_without_weights(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = []
    if name == "qwen-clip":
        (tmp_path / "qwen").mkdir()
        write_json(tmp_path / "qwen" / "config.json", QWEN.to_hf())
        flags = ["--model", "qwen"]
    train.main(["--recipe", name, "--dry-run", "--device", "cpu", *flags])
    shown = capsys.readouterr().out
    head = SIZES["13b" if "13b" in name else "7b"].text
    for part, count in PUBLISHED[name][2].items():
        if part == "language_model" and read(name).train == "freeze_vision":
            count -= head.vocab_size * head.hidden_size  # the table has a line for the head
        assert f"{count:,}" in shown
    assert not any(p.is_file() and p.name != "config.json" for p in tmp_path.rglob("*"))


def test_qwen_in_its_other_two_types():
    parts = trained(QWEN, read("qwen-clip", "--train", "freeze_vision"))
    full = trained(QWEN, read("qwen-clip", "--train", "full"))
    assert parts.keys() == {"language_model", "multi_modal_projector"}
    assert full == {**parts, "vision_tower": full["vision_tower"]} and full["vision_tower"] > 290e6


@pytest.mark.parametrize(
    "config, count",
    [  # of parameters that LoRA adds to the 7B
        (LoRAConfig(16), 39_976_960),
        (LoRAConfig(48), 119_930_880),
        (LoRAConfig(64), 159_907_840),
        (LoRAConfig(128), 319_815_680),
        (
            LoRAConfig(8, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
            16_121_856,
        ),
        # note B's demo, whose leaf names are the tower's too
        (
            LoRAConfig(8, targets=(r".*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)",)),
            17_301_504,
        ),
    ],
)
def test_counts_of_lora_on_the_7b(config, count):
    model = on_meta(SIZES["7b"])
    add_lora(model, config)
    assert sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name) == count


def test_the_memory_of_two_24gb_adds_up():
    model = on_meta(SIZES["7b"])
    add_lora(model, LoRAConfig(128))
    size = lambda m, lora: sum(
        p.numel() for name, p in m.named_parameters() if (".lora_" in name) == lora
    )
    block = model.language_model.layers[0]
    text = (train.RECIPES / "two-24gb.toml").read_text()
    for n in (
        size(model.language_model, False) + size(model.lm_head, False),
        size(model.vision_tower, False),
        size(model.language_model, True),
        size(model.multi_modal_projector, False),
        size(block, False),
        size(block, True),
        size(model.lm_head, False),
    ):
        assert f"{n:,}" in text
    found = re.findall(r"^#   .* (\d\.\d)\b(.*)", text, re.M)
    parts = [(float(gb), "x 4 rows" in rest) for gb, rest in found]
    four, one = map(
        float, re.search(r"Sum: ([\d.]+) with four .*, ([\d.]+) with one", text).groups()
    )
    # each is rounded
    assert len(parts) == 9 and sum(gb for gb, _ in parts) == pytest.approx(one, abs=0.3)
    assert sum(gb * (4 if each else 1) for gb, each in parts) == pytest.approx(four, abs=0.4)


DOCS = Path(__file__).parent.parent / "docs"


def test_the_docs_name_every_recipe():
    text = (DOCS / "recipes.md").read_text()
    for name in ("toy", "tiny", *PUBLISHED):
        assert f"`{name}`" in text or f"`{name.removesuffix('-13b')}-7b`, `-13b`" in text


def test_the_start_of_stage_1_as_the_docs_make_it(spm, tmp_path, monkeypatch):
    """The docs' own commands, with tiny stand-ins in the places of the hub ids."""
    from test_build import clip_folder, decoder_folder

    from llava_min.tools import build

    monkeypatch.chdir(tmp_path)
    clip_folder(tmp_path / "clip")
    decoder_folder(tmp_path / "llama", "llama", spm)
    decoder_folder(tmp_path / "qwen2", "qwen2", spm)
    stands = {"clip-vit-large-patch14-336": "clip", "vicuna-": "llama", "Qwen1.5-4B": "qwen2"}
    commands = re.findall(r"python -m llava_min build (.*)", (DOCS / "recipes.md").read_text())
    for command, name in zip(commands, ("pretrain-7b", "pretrain-13b", "qwen-clip"), strict=True):
        words = command.split()
        for i, word in enumerate(words):
            if "/" in word and i + 1 < len(words):  # a hub id; the last is the folder to write
                words[i] = next(small for large, small in stands.items() if large in word)
        build.main(words)
        recipe = tomllib.loads((train.RECIPES / f"{name}.toml").read_text())
        model, processor = load(tmp_path / recipe["model"], device="cpu", dtype="fp32")
        assert processor.image_config.aspect == recipe["image_aspect_ratio"] == "crop"
        assert model.config.image_token_id == processor.tokenizer.token_id("<image>")
