"""doctor: what the notes got wrong is found, the published scripts are in order, no flag lost."""

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import MISSING, fields

import pytest
from conftest import load_script, their_model

from llava_min.checks.doctor import files, rules
from llava_min.checks.doctor.facts import DIALECTS, SILENT, Setting
from llava_min.checks.doctor.files import read_input
from llava_min.checks.doctor.lora import fits
from llava_min.checks.doctor.rules import compare, examine
from llava_min.checks.doctor.shell import read_commands
from llava_min.checks.doctor.translate import Translation
from llava_min.checks.settings import check_settings
from llava_min.errors import UserError
from llava_min.tools import doctor
from llava_min.util.cli import parse

train = load_script("train")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CLIP = "openai/clip-vit-large-patch14-336"
# What LLaVA-1.5's scripts have in common, and what each sets (scripts/v1_5 of haotian-liu/LLaVA).
COMMON = f"""--vision_tower {CLIP} --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
    --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True --num_train_epochs 1
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy "no"
    --save_strategy "steps" --save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True --model_max_length 2048
    --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb --output_dir ./checkpoints/out"""
VICUNA = "--model_name_or_path lmsys/vicuna-7b-v1.5"
LLAVA = "--model_name_or_path liuhaotian/llava-v1.5-7b"
MIX = """--version v1 --data_path ./playground/data/llava_v1_5_mix665k.json
    --image_folder ./playground/data --image_aspect_ratio pad --group_by_modality_length True
    --per_device_train_batch_size 16 --save_steps 50000"""
STAGE_1 = "--pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin"
LORA = (
    "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4"
)
OFFICIAL = {
    "pretrain-7b": f"""--deepspeed ./scripts/zero2.json {VICUNA} --version plain
        --tune_mm_mlp_adapter True
        --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
        --image_folder ./playground/data/LLaVA-Pretrain/images
        --per_device_train_batch_size 32 --save_steps 24000 --learning_rate 1e-3""",
    "finetune-7b": f"""--deepspeed ./scripts/zero3.json {VICUNA} {MIX} {STAGE_1}
        --learning_rate 2e-5""",
    "lora-7b": f"{LORA} --deepspeed ./scripts/zero3.json {VICUNA} {MIX} {STAGE_1}",
    "task-7b": f"--deepspeed ./scripts/zero3.json {LLAVA} {MIX} --learning_rate 2e-5",
    "task-lora-7b": f"{LORA} --deepspeed ./scripts/zero3.json {LLAVA} {MIX}",
}


def script(flags: str, launcher: str = "deepspeed --num_gpus 8", before: str = "") -> str:
    """A launch script, a flag on each line."""
    lines = [
        f"{launcher} llava/train/train_mem.py",
        *(f"--{flag.strip()}" for flag in flags.split("--")[1:]),
    ]
    return (
        "#!/bin/bash\n" + before + " \\\n    ".join(" ".join(line.split()) for line in lines) + "\n"
    )


def write(folder, name: str, content) -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    return str(path)


def found(given: str, *severities: str) -> set[str]:
    """The rules that speak of an input, of those severities or of all."""
    return {
        f.rule
        for run in read_input(given)
        for f in examine(run)
        if not severities or f.severity in severities
    }


def one(given: str, rule: str):
    return next(f for run in read_input(given) for f in examine(run) if f.rule == rule)


def settings_of(t: Translation):
    """A translation as train.py itself reads it."""
    argv = shlex.split(" ".join(" ".join(flag) for flag in t.flags))
    config = parse(train.TrainConfig, argv, "A test.", recipes=train.RECIPES)
    check_settings(config, argv)
    return config


# ---- what is published


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_scripts_are_in_order_and_are_our_recipes(name, tmp_path):
    path = write(tmp_path, "run.sh", script(COMMON + " " + OFFICIAL[name]))
    assert found(path) == {"nobody-looks"} and not found(path, "error", "warning")
    (run,) = read_input(path)
    assert run.rows == (256 if name.startswith("pretrain") else 128) and run.gpus == 8
    t = Translation(run)
    assert t.launcher() == "torchrun --nproc_per_node=8 train.py"
    ours, recipe = (
        settings_of(t),
        parse(train.TrainConfig, ["--recipe", name], "A test.", recipes=train.RECIPES),
    )
    elsewhere = {"recipe", "model", "out", "resume", "save_every", "data", "image_folder", "log"}
    for f in fields(train.TrainConfig):
        if f.name not in elsewhere and not (f.name.startswith("lora_") and recipe.train != "lora"):
            assert getattr(ours, f.name) == getattr(recipe, f.name), f.name
    assert ours.data.endswith(recipe.data) and ours.model == (
        "vicuna-7b-v1.5-llava" if t.first else "liuhaotian/llava-v1.5-7b"
    )
    translated = {
        "lora_enable": "--train",
        "tune_mm_mlp_adapter": "--train",
        "bf16": "--precision",
        "output_dir": "--out",
    }
    left = {text.split()[0].removeprefix("--") for text, _ in t.left_out}
    same = {
        "model_name_or_path",
        "data_path",
        "image_folder",
        "version",
        "image_aspect_ratio",
        "lora_r",
        "lora_alpha",
        "mm_projector_lr",
        "learning_rate",
        "weight_decay",
        "warmup_ratio",
        "lr_scheduler_type",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "model_max_length",
        "gradient_checkpointing",
        "group_by_modality_length",
        "dataloader_num_workers",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "report_to",
    }
    put = same | translated.keys()
    assert left.isdisjoint(put)
    assert set(run.settings) == left | put & set(run.settings)


@pytest.mark.parametrize("name", sorted(p.stem for p in files.RECIPES.glob("*.toml")))
def test_our_recipes_have_no_error(name):
    assert not found(name, "error")
    told = {
        "vsft-dora": {"rate-too-low"},
        "qwen-clip": {"projector-rate"},
    }  # as their sources have it
    assert found(name, "warning") == told.get(name, set())


# ---- the notes


def test_note_b_the_demo_adapter(tmp_path):
    """Its count of 17,301,504 has 1,179,648 in the tower, and gate_proj is forgotten."""
    path = write(
        tmp_path,
        "lora.json",
        {
            "model_id": "llava-hf/llava-1.5-7b-hf",
            "LoraConfig": {
                "r": 8,
                "lora_alpha": 256,
                "target_modules": [*ATTENTION, "up_proj", "down_proj"],
                "bias": "none",
                "task_type": "CAUSAL_LM",
            },
        },
    )
    assert found(path) == {"lora-in-tower", "gate-forgotten", "alpha-large", "projector-frozen"}
    f = one(path, "lora-in-tower")
    assert f.severity == "error" and "1,179,648 parameters" in f.what and "LLaVA#1647" in f.why
    assert f.at.where == "lora.json:6"
    assert "q_proj, k_proj, v_proj:" in f.what and "out_proj" not in f.what
    assert "scaled by 32" in one(path, "alpha-large").what


def test_note_b_the_script(tmp_path):
    flags = (
        COMMON.replace("--bf16 True", "--fp16 True").replace(
            '--save_strategy "steps"', '--save_strategy "epoch"'
        )
        + f"""
        --lora_enable True --lora_r 48 --lora_alpha 256 --mm_projector_lr 2e-5
        --deepspeed ./scripts/zero3.json {VICUNA} --version v1 --data_path d.json --image_folder i
        --image_aspect_ratio pad --group_by_modality_length True
        --per_device_train_batch_size 1 --learning_rate 2e-4"""
    )
    path = write(
        tmp_path,
        "b.sh",
        script(
            flags.replace("steps 1 --eval", "steps 4 --eval"),
            "deepspeed --include localhost:0,1,2,3",
        ),
    )
    assert found(path, "error") == {"projector-random"}
    assert found(path, "warning") == {"fp16-range", "projector-in-no-checkpoint", "batch"}
    said = "1 rows x 4 accumulated x 4 GPUs = 16 rows a step; published: 128"
    assert said == one(path, "batch").what
    k = settings_of(Translation(read_input(path)[0]))
    assert (k.precision, k.save_every, k.grad_accum, k.lora_r, k.lora_dropout) == (
        "fp16",
        "epoch",
        4,
        48,
        0.05,
    )


NOTE_C = {
    "model": "llava-hf/llava-1.5-7b-hf",
    "BitsAndBytesConfig": {
        "load_in_4bit": False,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "float16",
    },
    "LoraConfig": {
        "r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "use_dora": True,
        "target_modules": LINEARS,
    },
    "SFTConfig": {
        "learning_rate": 6e-6,
        "warmup_steps": 100,
        "max_steps": 10000,
        "eval_strategy": "steps",
        "eval_steps": 100,
        "save_steps": 100,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "fp16": True,
        "load_best_model_at_end": True,
        "save_only_model": True,
        "neftune_noise_alpha": 5,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    },
}


def test_note_c(tmp_path):
    path = write(tmp_path, "c.json", NOTE_C)
    assert found(path, "error") == {"lora-in-tower", "bits-ignored", "no-stop-token"}
    assert found(path, "warning") == {"rate-too-low", "fp16-range", "loss-on-questions"}
    bits = one(path, "bits-ignored")
    assert "load_in_4bit = false, with BitsAndBytesConfig.bnb_4bit_compute_dtype" in bits.what
    assert bits.at.where == "c.json:4"
    right = {
        **NOTE_C,
        "chat_template": "{{ message }}{{ eos_token }}",
        "BitsAndBytesConfig": NOTE_C["BitsAndBytesConfig"] | {"load_in_4bit": True},
        "LoraConfig": NOTE_C["LoraConfig"] | {"target_modules": ".*language_model.*_proj"},
    }
    assert not found(write(tmp_path, "right.json", right), "error")


def test_note_d(tmp_path):
    path = write(
        tmp_path,
        "d.json",
        {
            "train_type": "use_lora",
            "model_name_or_path": "my-model/model-01",
            "bf16": True,
            "learning_rate": 4e-4,
            "r": 32,
            "lora_dropout": 0.05,
            "target_modules": ATTENTION,
            "modules_to_save": ["multi_modal_projector"],
        },
    )
    assert found(path) == {"lora-in-tower", "alpha-unset"}
    said = "r = 32, and lora_alpha is not set (PEFT's default: 8): scaled by 0.25"
    assert said == one(path, "alpha-unset").what


# ---- every rule: an input of which it speaks, and one of which it does not

L = (
    "--vision_tower x --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 "  # LLaVA's
    "--mm_use_im_patch_token False "
)
TRL = {"model": "llava-hf/llava-1.5-7b-hf", "packing": False}
CASES = {
    "lora-in-tower": (
        {"r": 8, "target_modules": "all-linear"},
        {"r": 8, "target_modules": "all-linear", "exclude_modules": ".*vision_tower.*"},
    ),
    "gate-forgotten": (
        {"target_modules": ["up_proj", "down_proj"]},
        {"target_modules": ["q_proj"]},
    ),
    "impossible-number": ({"learning_rate": float("nan")}, {"learning_rate": 1e-4}),
    "rank-large": (
        {"r": 999_999, "target_modules": ["o_proj"]},
        {"r": 2048, "target_modules": ["o_proj"]},
    ),
    "alpha-unset": ({"r": 32, "target_modules": ["o_proj"]}, {"r": 32, "lora_alpha": 16}),
    "alpha-large": ({"r": 8, "lora_alpha": 256}, {"r": 128, "lora_alpha": 256}),
    "lora-switched-off": (L + "--lora_r 128", L + "--lora_r 128 --lora_enable True"),
    "lora-frozen": (L + "--lora_enable True --tune_mm_mlp_adapter True", L + "--lora_enable True"),
    "adapter-large": (
        {"r": 8, "modules_to_save": ["embed_tokens"]},
        {"r": 8, "modules_to_save": ["multi_modal_projector"]},
    ),
    "bits-ignored": (
        {"bnb_4bit_quant_type": "nf4"},
        {"bnb_4bit_quant_type": "nf4", "load_in_4bit": True},
    ),
    "quant-type-ignored": (L + "--quant_type nf4", L + "--quant_type nf4 --bits 4"),
    "quantized-in-full": (L + "--bits 4", L + "--bits 4 --lora_enable True"),
    "computed-in-fp32": (
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
    ),
    "fp4-not-nf4": ({"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "projector-quantized": (
        {"load_in_8bit": True},
        {"load_in_8bit": True, "llm_int8_skip_modules": ["multi_modal_projector"]},
    ),
    "rate-too-high": (L + "--learning_rate 2e-4", L + "--learning_rate 2e-5"),
    "rate-too-low": (L + "--lora_enable True", L + "--lora_enable True --learning_rate 2e-4"),
    "projector-rate": (
        L + "--lora_enable True --learning_rate 2e-4",
        L + "--lora_enable True --learning_rate 2e-4 --mm_projector_lr 2e-5",
    ),
    "batch": (L + "--per_device_train_batch_size 4", L + "--per_device_train_batch_size 16"),
    "warmup-longer-than-run": (
        {"warmup_steps": 100, "max_steps": 100},
        {"warmup_steps": 100, "max_steps": 101},
    ),
    "two-warmups": ({"warmup_steps": 100, "warmup_ratio": 0.03}, {"warmup_ratio": 0.03}),
    "two-precisions": ({"fp16": True, "bf16": True}, {"fp16": False, "bf16": True}),
    "fp16-weights": (
        {"r": 8, "torch_dtype": "float16", "fp16": True, "modules_to_save": ["lm_head"]},
        {"r": 8, "dtype": "float16", "fp16": True},
    ),
    "fp16-without-masters": (
        L + "--lora_enable True --fp16 True",
        L + "--lora_enable True --fp16 True --deepspeed zero2.json",
    ),
    "fp16-range": (L + "--fp16 True", L + "--bf16 True"),
    "all-fp32": (L, L + "--bf16 True"),
    "means-of-means": (
        L + "--gradient_accumulation_steps 2",
        L + "--gradient_accumulation_steps 1",
    ),
    "reentrant": (
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "r": 8},
        {"gradient_checkpointing": True, "r": 8},
    ),
    "no-stop-token": (TRL, {**TRL, "chat_template": "{{ m }}</s>"}),
    "plain-template": (L + "--version plain", L + "--version plain --tune_mm_mlp_adapter True"),
    "loss-on-questions": (TRL, {**TRL, "completion_only_loss": True}),
    "refused-by-trl": ({**TRL, "packing": True}, TRL),
    "columns-dropped": (
        {"dataset_kwargs": {"skip_prepare_dataset": True}},
        {"skip_prepare_dataset": True, "remove_unused_columns": False},
    ),
    "image-longer-than-row": ({**TRL, "max_length": 576}, {**TRL, "max_length": 2048}),
    "modalities-mixed": (L + "--deepspeed zero3.json", L + "--group_by_modality_length True"),
    "connector": ("--vision_tower x", L),
    "images-cropped": (L, L + "--image_aspect_ratio pad"),
    "padded-on-the-right": (
        {"image_processor_type": "C", "do_pad": True, "padding_side": "right"},
        {"image_processor_type": "C", "do_pad": True, "padding_side": "left"},
    ),
    "projector-random": (
        L + "--model_name_or_path lmsys/vicuna-7b-v1.5",
        L + "--model_name_or_path liuhaotian/llava-v1.5-7b",
    ),
    "projector-frozen": ({"target_modules": ["o_proj"]}, {"target_modules": "all-linear"}),
    "projector-in-no-checkpoint": (
        L + "--lora_enable True --save_steps 100",
        L + "--lora_enable True --save_steps 50000",
    ),
    "no-way-back": (
        {"save_only_model": True, "resume_from_checkpoint": True},
        {"save_only_model": False, "resume_from_checkpoint": True},
    ),
    "best-model": (
        {"load_best_model_at_end": True},
        {"load_best_model_at_end": True, "eval_strategy": "steps"},
    ),
    "nobody-looks": ({"num_train_epochs": 3}, {"num_train_epochs": 3, "eval_strategy": "epoch"}),
    "no-data-to-look-at": (L + "--evaluation_strategy steps", L + "--evaluation_strategy no"),
    "all-kept": (
        {"max_steps": 10000, "save_steps": 100},
        {"max_steps": 10000, "save_steps": 100, "save_total_limit": 2},
    ),
    "written-twice": (L + "--bf16 True --bf16 False", L + "--bf16 True"),
}


def given(folder, content, name: str) -> str:
    if isinstance(content, dict):
        return write(folder, f"{name}.json", content)
    return write(folder, f"{name}.sh", script(content))


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_speaks_of_what_is_wrong_and_of_nothing_else(rule, tmp_path):
    wrong, right = CASES[rule]
    assert rule in found(given(tmp_path, wrong, "wrong"))
    assert rule not in found(given(tmp_path, right, "right"))


def test_every_rule_has_a_case_and_a_reason():
    names = {rule.__name__.replace("_", "-") for rule in rules.RULES}
    below = {"projector-lost", "command-cut", "unknown-setting", "bad-value", "contradiction"}
    assert names - CASES.keys() == below | {"adapter-broken", "adapter-unread"}
    assert all(rule.__doc__ and rule.__doc__.strip().endswith((".", ").")) for rule in rules.RULES)


def test_silence_is_no_finding(tmp_path):
    """Of what an input does not say, and the tool documents no default for, no rule speaks."""
    assert found(write(tmp_path, "a.json", {"lora_dropout": 0.05})) == set()
    assert found(write(tmp_path, "b.json", {"learning_rate": 2e-4, "bf16": True})) == set()
    flags = """--learning_rate $LR --per_device_train_batch_size $1 --model_name_or_path $2
        --fp16 $3 --bf16 True --lora_enable $4 --image_aspect_ratio $5
        --group_by_modality_length $6 --model_max_length $7"""
    path = write(tmp_path, "c.sh", script(L + flags))
    assert found(path, "error", "warning") == set()
    t = Translation(read_input(path)[0])
    assert ("--lora_enable $4", "give --train: lora, freeze_vision or projector") in t.left_out
    assert not any(flag[0] == "--train" for flag in t.flags)
    flags = "--bnb_4bit_quant_type nf4 --load_in_4bit $1 --assistant_only_loss $2 --fp16 $3"
    path = write(tmp_path, "d.sh", f"trl sft --model_name_or_path x/llava {flags}")
    assert found(path, "error", "warning") == {"no-stop-token"}


def test_severity_follows_what_is_at_stake(tmp_path):
    for n, severity in ((576, "error"), (577, "warning"), (703, "warning"), (704, "note")):
        assert (
            one(
                write(tmp_path, "x.sh", script(L + f"--model_max_length {n}")),
                "image-longer-than-row",
            ).severity
            == severity
        )
    unset = one(write(tmp_path, "x.sh", script(L)), "image-longer-than-row")
    assert "model_max_length is not set (LLaVA's default: 512)" in unset.what
    meant = {"r": 8, "target_modules": r".*vision_tower.*(q_proj|v_proj)"}
    assert one(write(tmp_path, "m.json", meant), "lora-in-tower").severity == "note"


# ---- the same as the libraries


def test_targets_are_pefts():
    peft = pytest.importorskip("peft", reason="the oracle of this test; pip install -e '.[test]'")
    base = their_model()
    linear = {n for n, m in base.named_modules() if hasattr(m, "in_features") and n != "lm_head"}
    for targets, excluded in (
        (LINEARS, None),
        (ATTENTION, None),
        ("all-linear", None),
        (".*language_model.*_proj", None),
        (["fc1", "linear_1"], None),
        (r".*\.(q|v)_proj", ["v_proj"]),
        (["layers.0.self_attn.q_proj"], None),
        (["c1", "o_proj"], None),
        (["encoder.layers.0.mlp.fc2", "o_proj"], None),
        (LINEARS, r".*vision_tower.*"),
    ):
        config = peft.LoraConfig(r=2, target_modules=targets, exclude_modules=excluded)
        theirs = peft.get_peft_model(their_model(), config)
        adapted = {
            n.removeprefix("base_model.model.")
            for n, m in theirs.named_modules()
            if hasattr(m, "lora_A") and hasattr(m, "base_layer")
        }
        assert {n for n in linear if fits(targets, n) and not fits(excluded, n)} == adapted, targets


def test_defaults_are_the_tools_own():
    ours = {f.name: f.default for f in fields(train.TrainConfig)}
    for fact, (names, default) in DIALECTS["train.py"].items():
        assert default in (ours[names[0]], SILENT), fact
    transformers = pytest.importorskip(
        "transformers", reason="the oracle of this test; pip install -e '.[test]'"
    )
    peft = pytest.importorskip("peft", reason="the oracle of this test; pip install -e '.[test]'")
    theirs = {
        f.name: f.default
        for c in (transformers.TrainingArguments, peft.LoraConfig)
        for f in fields(c)
        if f.default is not MISSING
    }
    theirs |= vars(transformers.BitsAndBytesConfig())
    theirs["bnb_4bit_compute_dtype"] = str(theirs["bnb_4bit_compute_dtype"]).removeprefix("torch.")
    compared = {
        fact: theirs[names[0]]
        for fact, (names, default) in DIALECTS["hf"].items()
        if names[0] in theirs and default is not SILENT
    }
    assert compared == {fact: DIALECTS["hf"][fact].default for fact in compared}
    assert len(compared) >= 20


# ---- the shell


def test_a_script_is_read_as_the_shell_reads_it(tmp_path):
    text = """#!/bin/bash
# MODEL=commented/out
export MODEL="lmsys/vicuna 7b"   # with a blank
SIZE=7b; NAME=llava-$SIZE
MORE=(
  --seed 3   # an array; it's fine
  --bf16 True
)
cat <<EOF > note.txt
it's --learning_rate 9
EOF
echo "python llava/train/train.py --learning_rate 8"
if [ -z "$1" ]; then exit 1; fi
CUDA_VISIBLE_DEVICES=0,1 deepspeed llava/train/train_mem.py --model_name_or_path "$MODEL" \\
    --output_dir='./out put' --version ${VERSION:-v1} --data_path "a # b.json" \\
    --image_folder "two
lines" --learning_rate 2e-5 --mm_vision_select_layer -2 "${MORE[@]}" \\
    --run_name '$MODEL' 2>&1 | tee log.txt && echo done
"""
    (run,) = read_commands(text, "x.sh")
    assert {name: s.value for name, s in run.settings.items()} == {
        "model_name_or_path": "lmsys/vicuna 7b",
        "output_dir": "./out put",
        "version": "v1",
        "data_path": "a # b.json",
        "image_folder": "two\nlines",
        "learning_rate": 2e-5,
        "mm_vision_select_layer": -2,
        "seed": 3,
        "bf16": True,
        "run_name": "$MODEL",
    }
    assert run.gpus == 2 and run.settings["model_name_or_path"].where == "x.sh:14"
    assert run.settings["version"].where == "x.sh:15"
    (crlf,) = read_commands(text.replace("\n", "\r\n").replace("two\r", "two"), "x.sh")
    assert crlf.settings["version"].value == "v1"


@pytest.mark.parametrize("middle", ["    # --weight_decay 0. \\\n", "    --weight_decay 0. \\ \n"])
def test_a_command_that_is_cut(middle, tmp_path):
    text = (
        f"deepspeed llava/train/train.py --vision_tower x \\\n{middle}"
        "    --learning_rate 2e-5 \\\n    --bf16 True\n\npython other.py --x 1\n"
    )
    f = one(write(tmp_path, "x.sh", text), "command-cut")
    assert f.severity == "error" and f.at.where == "x.sh:3"
    assert "before --learning_rate, --bf16" in f.what
    reached = {name: s.value for name, s in read_input(str(tmp_path / "x.sh"))[0].settings.items()}
    assert reached == {"vision_tower": "x"} | ({} if "#" in middle else {"weight_decay": 0})
    whole = text.replace(middle, "")
    assert "command-cut" not in found(write(tmp_path, "y.sh", whole))


def test_several_commands_are_several_runs(tmp_path):
    text = "".join(script(COMMON + " " + OFFICIAL[n]) for n in ("pretrain-7b", "finetune-7b"))
    assert [run.trains for run in read_input(write(tmp_path, "x.sh", text))] == [
        "projector",
        "full",
    ]


@pytest.mark.parametrize(
    "launcher, gpus, nodes",
    [
        ("deepspeed", None, 1),
        ("deepspeed --num_gpus=4", 4, 1),
        ("deepspeed --num_gpus 8 --num_nodes 2", 16, 2),
        ("deepspeed --include localhost:0,1,2", 3, 1),
        ("deepspeed --include localhost", None, 1),
        ("deepspeed --include a:0,1@b:0,1,2", 5, 2),
        ("CUDA_VISIBLE_DEVICES=0,1 deepspeed", 2, 1),
        ("torchrun --nproc_per_node 8 --nnodes=2", 16, 2),
        ("torchrun --nproc-per-node=gpu", None, 1),
        ("torchrun", 1, 1),
        ("python -m torch.distributed.run --nproc_per_node=2", 2, 1),
        ("accelerate launch --num_processes 4", 4, 1),
        ("accelerate launch", None, 1),
        ("python", 1, 1),
        ("CUDA_VISIBLE_DEVICES=0,1 python3 -u", None, 1),
        ("srun python", None, 1),
        ("torchrun --nproc_per_node=$GPUS", None, 1),
    ],
)
def test_gpus_of_a_launcher(launcher, gpus, nodes):
    (run,) = read_commands(f"{launcher} llava/train/train_mem.py --vision_tower x", "x.sh")
    assert (run.gpus, run.nodes) == (gpus, nodes)


def test_our_command(tmp_path):
    command = (
        "torchrun --nproc_per_node=4 train.py --recipe lora-7b --no-train-projector "
        "--lr 1e-5 --lora-r 8"
    )
    (run,) = read_input(command)
    assert (
        run.kind == "train.py"
        and run.rows == 64
        and (run.value("lr"), run.value("r"), run.value("alpha")) == (1e-5, 8, 256)
    )
    assert found(command) == {"alpha-large", "rate-too-low", "batch", "nobody-looks"}
    assert found("python train.py") == set()  # the toy
    wanted = "python train.py --recipe task-lora-7b --save-only-model --resume auto"
    assert found(wanted, "error") == {"no-way-back"}
    assert "--grad-accum 8" == one("python train.py --recipe task-lora-7b", "batch").fix
    job = "#!/bin/bash\n#SBATCH --nodes=2\nsrun python train.py --recipe lora-7b --lr 1e-5\n"
    path = write(tmp_path, "job.sh", job)
    assert one(path, "rate-too-low").at.where == "job.sh:3"
    config = {
        "model": "liuhaotian/llava-v1.5-7b",
        "train": "full",
        "lr": 2e-4,
        "batch_size": 4,
        "data": "x.json",
        "ranks": 2,
    }
    assert found(write(tmp_path, "config.json", config), "error") == {"rate-too-high"}
    (tmp_path / "checkpoints").mkdir()  # a run's folder is as its config.json
    assert found(tmp_path, "error") == {"rate-too-high"}
    shared = {
        "train": "lora",
        "data": "toy:captions",
        "lora_r": 8,
        "lora_alpha": 16,
        "packing": True,
        "max_steps": 5,
        "warmup_steps": 9,
        "gradient_checkpointing": True,
    }
    path = write(tmp_path, "mine.json", shared)  # names that the libraries have too
    assert read_input(path)[0].kind == "train.py" and found(path) == {"warmup-longer-than-run"}
    with pytest.raises(UserError, match="no such recipe"):
        read_input("python train.py --recipe lorra")


@pytest.mark.parametrize(
    "command, rule, what, fix",
    [
        ("--lora-rank 8", "unknown-setting", "--lora-rank 8: train.py has no", "--lora-r?"),
        ("--lora_r 8", "unknown-setting", "--lora_r 8: train.py has no", "--lora-r?"),
        ("--learning-rate 1e-4", "unknown-setting", "--learning-rate", "did you mean --lr?"),
        ("--no-lr", "unknown-setting", "--no-lr", "did you mean --lr?"),
        ("-lr 3", "unknown-setting", "-lr: train.py", "did you mean --lr?"),
        ("--xyzzy", "unknown-setting", "--xyzzy: train.py", "--help lists"),
        ("--lr abc", "bad-value", "--lr abc: 'abc' is not a number", "such as --lr 0.0002"),
        ("--lr", "bad-value", "--lr: its value is missing", "give one"),
        ("--lr 1 2", "bad-value", "2 values came", "give one"),
        ("--lr -1", "bad-value", "expected a number of at least", "correct it"),
        ("--batch-size 1.5", "bad-value", "'1.5' is not a whole number", "--batch-size 8"),
        ("--batch-size 0", "bad-value", "integer of at least 1", "correct it"),
        ("--schedule cos", "bad-value", "not one of cosine, linear, constant", "choose one"),
        ("--dora yes", "bad-value", "a switch takes no value", "leave yes out"),
        ("--betas 0.9,x", "bad-value", "'x' is not a number", "give one"),
        ("--train full --lora-r 8", "contradiction", "no effect without --train lora", "leave"),
        ("--betas 0.9", "contradiction", "two numbers below 1", "0.9,0.999"),
        ("--save-every soon", "contradiction", "minutes like 30m", "give one"),
        ("--lr 1e-4 --lr 2e-4", "written-twice", "--lr 1e-4, and --lr 2e-4", "keep one"),
    ],
)
def test_what_train_py_would_not_take_is_found(command, rule, what, fix, tmp_path):
    line = f"python train.py --data x.json {command}"
    f = one(line, rule)
    assert f.severity == "error" and what in f.what and fix in f.fix
    with pytest.raises(UserError):  # and train.py does not
        argv = shlex.split(line)[2:]
        check_settings(parse(train.TrainConfig, argv, "A test.", recipes=train.RECIPES), argv)
    right = "python train.py --data x.json --lora-r 8 --no-dora --lr $LR --betas 0.9,0.95 --out 7"
    mine = {"unknown-setting", "bad-value", "contradiction", "written-twice"}
    assert not found(right) & mine


def test_a_recipe_with_what_train_py_does_not_have(tmp_path):
    text = """model = "tiny"
data = "toy:captions"
train = "lora"
lora_rank = 8
lr = "fast"
batch_size = 0
"""
    path = write(tmp_path, "mine.toml", text)
    found_at = {f.rule: (f.at.where, f.fix) for f in examine(read_input(path)[0])}
    assert found_at["unknown-setting"] == ("mine.toml:4", "did you mean lora_r?")
    assert found_at["bad-value"][0] in ("mine.toml:5", "mine.toml:6")
    with pytest.raises(UserError, match="lora_rank is not a setting"):
        parse(train.TrainConfig, ["--recipe", path], "A test.", recipes=train.RECIPES)
    command = f"python train.py --recipe {path} --lr 1e-4"
    assert one(command, "bad-value").at.where == "mine.toml:6"
    with pytest.raises(UserError, match="did you mean lora-7b"):
        read_input("python train.py --recipe lora-7")


@pytest.mark.parametrize(
    "config, what",
    [
        ({"r": "x"}, ['r = "x"', "target_modules is missing"]),
        ({}, ["r is missing", "target_modules is missing"]),
        ({"r": 0, "target_modules": ["q_proj"]}, ["r = 0"]),
        ({"r": 8, "target_modules": "(("}, ['target_modules = "(("']),
        ({"r": 8, "target_modules": ["q"], "lora_alpha": None}, ["lora_alpha = null"]),
        ({"r": 8, "target_modules": ["q"], "rank_pattern": {"q": "x"}}, ["rank_pattern"]),
        ({"r": 8, "target_modules": ["q"], "use_dora": "\x1b[31m"}, ["use_dora"]),
    ],
)
def test_a_broken_adapter_config(config, what, tmp_path, capsys):
    path = write(tmp_path / "a", "adapter_config.json", config)
    said = [f for f in examine(read_input(path)[0]) if f.rule == "adapter-broken"]
    assert all(f.severity == "error" for f in said) and len(said) == len(what)
    assert all(text in f.what for f, text in zip(said, what))
    assert doctor.main(["--strict", path]) == 1 and "\x1b" not in capsys.readouterr().out
    whole = write(tmp_path / "b", "adapter_config.json", {"r": 8, "target_modules": ["q_proj"]})
    assert "adapter-broken" not in found(whole)


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("text_config.hidden_size", -5, "an integer from 1 to 1048576"),
        ("text_config.hidden_size", 64.5, "an integer from 1 to 1048576"),
        ("vision_config.hidden_size", 1e99, "an integer from 1 to 1048576"),
        ("text_config.rope_theta", float("nan"), "a number from 1 to 1000000000000"),
        ("vision_config.layer_norm_eps", float("inf"), "a number from 0 to 1"),
        ("image_token_index", -1, "an integer from 0 to 1048576"),
        ("anything", float("-inf"), "a number from -1e+30 to 1e+30"),
        ("anything", [1, 10**400], "a number from -1e+30 to 1e+30"),
    ],
)
def test_a_number_that_no_model_has_is_found(name, value, expected, tmp_path):
    """In a model's folder, in its config.json alone, and beside an adapter."""
    tiny = files.RECIPES.parent / "tiny"
    right = json.loads((tiny / "config.json").read_text())
    right["text_config"]["tokens"] = int(1e30)  # transformers' word for no limit
    path = write(tmp_path / "model", "config.json", right)
    adapter(tmp_path / "adapter", [TEXT])
    write(tmp_path / "adapter", "config.json", right)
    for given in (tiny, path, tmp_path / "model", tmp_path / "adapter"):
        assert not found(str(given), "error")
    *part, leaf = name.split(".")
    wrong = json.loads(json.dumps(right))
    (wrong[part[0]] if part else wrong)[leaf] = value
    write(tmp_path / "model", "config.json", wrong)
    write(tmp_path / "adapter", "config.json", wrong)
    for given in (path, tmp_path / "model", tmp_path / "adapter"):
        (run,) = read_input(str(given))
        (f,) = [f for f in examine(run) if f.severity == "error"]
        assert (f.rule, f.fix) == ("impossible-number", expected) and f.what.startswith(name + " =")


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": -1e-4},
        {"per_device_train_batch_size": 0},
        {"gradient_accumulation_steps": 1.5},
        {"max_length": 1e99},
        {"bf16": True, "max_grad_norm": float("inf")},
        "--learning_rate nan",
        "--lora_r 0",
        "--model_max_length 99999999999999999999",
    ],
)
def test_a_number_that_no_run_has_is_found(settings, tmp_path):
    if isinstance(settings, str):
        settings = L + "--lora_enable True " + settings
    assert "impossible-number" in found(given(tmp_path, settings, "x"), "error")
    if isinstance(settings, dict):  # as a finished run of train.py has them
        mine = {"train": "lora", "data": "x.json", "ranks": 1, "lora_dropout": float("nan")}
        assert "impossible-number" in found(write(tmp_path, "config.json", mine), "error")


def test_a_rank_beyond_the_layers(tmp_path):
    line = "python train.py --data x.json --lora-r "
    assert one(line + "999999", "rank-large").severity == "error"
    assert one(line + "3000", "rank-large").severity == "warning"
    assert one(line + "3000", "rank-large").fix == "--lora-r 128"
    assert "rank-large" not in found(line + "2048")
    recipe = 'model = "tiny"\ndata = "toy:captions"\ntrain = "lora"\nlora_r = 9999\n'
    assert one(write(tmp_path, "mine.toml", recipe), "rank-large").fix == "lora_r = 128"


def test_an_adapter_that_peft_reads_and_we_do_not(tmp_path, capsys):
    path = write(
        tmp_path / "a", "adapter_config.json", {"r": 8, "target_modules": ["q"], "bias": "all"}
    )
    assert one(path, "adapter-unread").what == 'bias = "all"'
    doctor.main([path])
    assert "read by no rule: bias" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, quantize",
    [
        ("--bits 4", "nf4"),
        ("--bits 4 --quant_type nf4 --double_quant True", "nf4"),
        ("--bits 4 --quant_type fp4", "fp4"),
        ("--bits 8", "int8"),
        ("--bits 16", None),
        ("", None),
    ],
)
def test_a_script_with_bits_is_quantized_here_too(flags, quantize):
    (run,) = read_commands(script(L + "--lora_enable True --data_path x.json " + flags), "x.sh")
    t = Translation(run)
    assert settings_of(t).quantize == quantize
    left = {text for text, _ in t.left_out}
    assert not [text for text in left if "quant" in text or "--bits 4" in text or "8" in text]


def test_bits_that_have_no_equivalent_are_listed():
    left = lambda flags: dict(Translation(read_commands(script(L + flags), "x.sh")[0]).left_out)
    lora = "--lora_enable True "
    assert "only adapters learn" in left("--bits 4")["--bits 4"]
    assert "no equivalent" in left(lora + "--bits 2")["--bits 2"]
    assert "nf4 for 4" in left(lora + "--bits $1")["--bits $1"]
    assert "without --bits 4" in left(lora + "--quant_type nf4")["--quant_type nf4"]
    some = left(lora + "--bits 4 --double_quant False")
    assert "always" in some["--double_quant False"]


def test_trl_by_flags(tmp_path):
    text = """python vsft.py --model_name_or_path=llava-hf/llava-1.5-7b-hf --learning_rate=1.4e-5 \\
    --torch_dtype=float16 --fp16=True --use_peft=True --lora_r=64 --lora_alpha=16 \\
    --lora_target_modules=all-linear --remove_unused_columns=False --output_dir out"""
    path = write(tmp_path, "vsft.sh", text)
    assert found(path, "error") == {"lora-in-tower", "no-stop-token"} and "rate-too-low" in found(
        path
    )
    full = write(tmp_path, "full.sh", text.replace("--use_peft=True", "--use_peft=False"))
    assert "fp16-weights" in found(full, "error")


def test_what_has_no_equivalent_is_listed():
    flags = """--vision_tower openai/clip-vit-large-patch14 --version llava_llama_2
        --image_aspect_ratio anyres --optim adafactor --lora_r 8 --bits 4
        --lr_scheduler_type polynomial --save_strategy best --warmup_steps 10 --warmup_ratio 0.03
        --run_name mine --freeze_mm_mlp_adapter True --mm_projector_lr 1e-5 --report_to comet_ml
        --model_name_or_path $1 "$@" """
    (run,) = read_commands(script(flags), "x.sh")
    t = Translation(run)
    left = {text.split()[0] for text, _ in t.left_out}
    assert left == {
        "--vision_tower",
        "--version",
        "--image_aspect_ratio",
        "--optim",
        "--lora_r",
        "--bits",
        "--lr_scheduler_type",
        "--save_strategy",
        "--warmup_ratio",
        "--run_name",
        "--mm_projector_lr",
        "--report_to",
        "$@",
    }
    assert (
        ("--model", '"$1"') in t.flags
        and ("--no-train-projector",) in t.flags
        and ("--warmup-steps", "10") in t.flags
    )
    (nodes,) = read_commands(script(L, "deepspeed --num_gpus 8 --num_nodes 2"), "x.sh")
    assert Translation(nodes).launcher().startswith("torchrun --nnodes=2 --nproc_per_node=8 ")
    (run,) = read_commands(script(L + "--data_path x.json"), "x.sh")
    bare = vars(settings_of(Translation(run)))
    assert (
        bare
        | dict(
            lr=5e-5,
            epochs=3,
            max_length=512,
            schedule="linear",
            warmup_ratio=0,
            image_aspect_ratio="crop",
            precision="fp32",
            log_every=500,
            save_every="500",
        )
        == bare
    )  # LLaVA's defaults, where they are not ours


# ---- folders


def adapter(folder, names: list[str], **config):
    """An adapter folder of PEFT's, with tensors of those names."""
    from safetensors.torch import save_file
    from torch import zeros

    folder.mkdir(parents=True)
    save_file(
        {f"base_model.model.{name}": zeros(2, 2) for name in names},
        folder / "adapter_model.safetensors",
    )
    write(
        folder,
        "adapter_config.json",
        {
            "peft_type": "LORA",
            "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": LINEARS,
            "modules_to_save": None,
            "inference_mode": True,
        }
        | config,
    )
    return folder


TEXT = "model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
VISION = "model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"


def test_adapter_folders(tmp_path):
    tower = adapter(tmp_path / "tower", [TEXT, VISION])
    said = "1 LoRA pairs are in the vision tower, first base_model.model.model.vision_tower"
    assert said in one(str(tower), "lora-in-tower").what
    assert found(str(tower)) == found(str(tower / "adapter_config.json"))
    assert "lora-in-tower" not in found(str(adapter(tmp_path / "text", [TEXT])))
    named = {"r": 2, "target_modules": LINEARS, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    assert "lora-in-tower" not in found(write(tmp_path, "vicuna.json", named))  # no tower yet
    lost = adapter(tmp_path / "lost", [TEXT], modules_to_save=["multi_modal_projector"])
    assert found(str(lost), "error") == {"projector-lost"}
    whole = adapter(
        tmp_path / "whole",
        [TEXT, "model.multi_modal_projector.linear_1.weight"],
        modules_to_save=["multi_modal_projector"],
    )
    assert found(str(whole)) == set()
    theirs = adapter(
        tmp_path / "theirs",
        ["model.layers.0.self_attn.q_proj.lora_A.weight"],
        base_model_name_or_path="lmsys/vicuna-7b-v1.5",
    )
    write(theirs, "config.json", {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"})
    assert found(str(theirs)) == {"projector-lost"}
    write(theirs, "non_lora_trainables.bin", "x")
    assert found(str(theirs)) == set()


def test_pad_in_training_and_crop_in_serving(tmp_path):
    tuned = write(tmp_path, "run.sh", script(COMMON + " " + OFFICIAL["lora-7b"]))
    served = tmp_path / "served"
    write(
        served,
        "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor", "do_pad": False},
    )
    runs = lambda *inputs: [run for given in inputs for run in read_input(str(given))]
    (f,) = compare(runs(tuned, served))
    assert f.severity == "error"
    assert "do_pad = false (crop), and --image_aspect_ratio pad at run.sh:" in f.what
    assert f.at.where == "served/preprocessor_config.json:3"
    assert not compare(runs(tuned)) and not compare(runs(served))
    write(
        served,
        "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor", "do_pad": True},
    )
    assert not compare(runs(tuned, served))
    stage_1 = write(tmp_path, "pretrain.sh", script(COMMON + " " + OFFICIAL["pretrain-7b"]))
    assert not compare(runs(stage_1, tuned, served))  # crops, as published
    assert [
        f.rule for f in compare(runs("lora-7b", write(tmp_path, "p.json", {"do_pad": False})))
    ] == ["images-differ"]


# ---- the page


def test_the_page_fits_a_terminal_and_cannot_drive_it(tmp_path, capsys):
    long = "/data/" + "x" * 300
    c = write(
        tmp_path,
        "c.json",
        {**NOTE_C, "run\x1b[31mname": "a", "chat_template": "\x1b]0;title\x07\u202e"},
    )
    flags = f"{COMMON} {OFFICIAL['lora-7b']} --cache_dir {long} --run_name 'a\x1b[31m' --seed 1"
    flags = flags.replace("mm_projector.bin", "mm\x1b[31m.bin")
    b = write(tmp_path, "b\x1b[2J.sh", script(flags))
    assert doctor.main([c, b]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= doctor.WIDTH and all(
        line.isprintable() for line in out.splitlines()
    )
    assert "c.json: settings of transformers, PEFT or TRL (LoRA)" in out
    assert "b\\x1b[2J.sh: a LLaVA launch script (LoRA; 16 rows" in out
    assert "  torchrun --nproc_per_node=8 train.py --model" in out and "read by no rule:" in out
    assert "run\\x1b[31mname" in out
    assert re.search(r"^3 errors, 3 warnings, \d+ notes$", out, re.MULTILINE) and out.endswith(
        "notes\n"
    )
    finding = (
        r"error: bits-ignored \(c\.json:4\)\n  found   .*\n(.*\n)*  why     .*\n(.*\n)*"
        r"  change  load_in_4bit = true"
    )
    assert re.search(finding, out)
    assert doctor.main(["--strict", c]) == 1 and doctor.main(["--strict", "toy"]) == 0


def test_the_command_can_be_pasted(tmp_path, capsys):
    doctor.main([write(tmp_path, "x.sh", script(COMMON + " " + OFFICIAL["lora-7b"] + " --seed 7"))])
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if "torchrun" in line)
    end = next(i for i in range(begin, len(lines)) if not lines[i].endswith("\\"))
    argv = shlex.split(" ".join(line.removesuffix("\\") for line in lines[begin : end + 1]))
    config = parse(train.TrainConfig, argv[3:], "A test.", recipes=train.RECIPES)
    assert (config.lora_r, config.seed, config.log) == (128, 7, ("wandb",))


def test_it_imports_no_torch_and_is_quick(tmp_path):
    path = write(tmp_path, "c.json", NOTE_C)
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llava_min", "doctor", path, "lora-7b"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "bits-ignored" in done.stdout
    assert time.perf_counter() - begun < 5  # 0.2 s on an idle core
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "PIL", "transformers"}


def bomb() -> str:
    return "A=aaaaaaaaaa\n" + "A=$A$A$A$A$A$A$A$A\n" * 40 + script(L + "--run_name $A")


BAD = {
    "binary.sh": (b"\x7fELF\x00\x01\xff", "UTF-8"),
    "null.json": (b'{"a": "\x00"}', "binary"),
    "big.sh": (b"#" * (10 << 20), "10,485,760 bytes"),
    "quote.sh": (
        b"python llava/train/train.py \\\n --bf16 'True\n",
        "line 2: a quotation mark \\('\\) is never closed",
    ),
    "empty.sh": (b"", "no training command"),
    "other.sh": (b"ls -l\npython eval.py --model x\n", "no training command"),
    "list.json": (b"[1]", "expected an object"),
    "cut.json": (b'{"r": 8,', "line 1 column"),
    "cut.toml": (b"r = [1\n", "cut.toml"),
    "other.json": (b'{"name": 1}', "no key of a recipe"),
    "deep.json": (b'{"a":' * 900 + b"1" + b"}" * 900, "tables within tables|not readable"),
    "lfs.json": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "bomb.sh": (bomb().encode(), "a variable of"),
    "a/adapter_config.json": (b"{", "line 1 column"),
    "none.json": (None, "no such file"),
    "empty": (None, "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_are_one_line(name, tmp_path):
    content, said = BAD[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    begun = time.process_time()
    with pytest.raises(UserError, match=said) as e:
        read_input(str(path))
    assert "\n" not in str(e.value) and time.process_time() - begun < 5


def test_bad_folders_and_commands(tmp_path):
    with pytest.raises(UserError, match="no adapter_config.json"):
        read_input(str(tmp_path))
    broken = adapter(tmp_path / "broken", [TEXT])
    (broken / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="adapter_model.safetensors: damaged"):
        read_input(str(broken))
    for command in ("python train.py 'x", "x" * 5000, "\0", "python other.py --x 1"):
        with pytest.raises(UserError) as e:
            read_input(command)
        assert "\n" not in str(e.value) and len(str(e.value)) < 600
    with pytest.raises(UserError, match="INPUT: give a recipe"):
        doctor.main([])
    done = subprocess.run(
        [sys.executable, "-m", "llava_min", "doctor", str(tmp_path / "no\x1b.sh")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert "\x1b" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1,
        10**400,
        1e308,
        float("nan"),
        "",
        "x",
        [],
        ["x", 1],
        {},
        "(" * 50,
        r"(a+)+$",
    ],
)
def test_values_of_any_kind_stop_no_rule(value, tmp_path):
    """What is no number, no name and no switch is passed over, in each setting that a rule
    reads."""
    for kind in ("hf", "train.py"):
        names = {key.names[0] for key in DIALECTS[kind].values()} - {"recipe"}
        for name in names:
            base = (
                {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "load_in_4bit": True}
                if kind == "hf"
                else {
                    "train": "lora",
                    "data": "x",
                    "lr": 1e-3,
                    "batch_size": 2,
                    "grad_accum": 1,
                    "ranks": 2,
                }
            )
            path = write(tmp_path, "x.json", {**base, name: value})
            for run in read_input(path):
                examine(run)
                doctor.summary(run)
    for name in {key.names[0] for key in DIALECTS["llava"].values()} | {
        "lr_scheduler_type",
        "report_to",
        "optim",
    }:
        for run in read_commands(script(L + "--lora_enable True --learning_rate 2e-4"), "x.sh"):
            run.settings[name] = Setting(value, "x.sh:1", f"--{name}")
            examine(run)
            Translation(run).lines(76)
