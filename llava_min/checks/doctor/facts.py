"""One vocabulary for the settings of four tools, so that a rule is written once.

A run holds what was written, under the tool's own names. A rule asks by fact, `run["lr"]`, and gets
the setting that was written, or the tool's documented default marked as such, or None: where both
are silent, no rule may speak.

Defaults: LLaVA's `train.py` (with transformers 4.37 below it), TrainingArguments of transformers 5,
SFTConfig of TRL 1, LoraConfig of PEFT 0.21, BitsAndBytesConfig, and our own `train.py`. Tests
compare those that can be installed.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

MAX_NUMBER = 1e15  # no setting is larger
SILENT = object()  # no documented default, or one that depends on what an input does not say


class Key(NamedTuple):
    """The names of a fact in one tool, the first the current one, and the default there."""

    names: tuple[str, ...]
    default: Any = SILENT


def key(names: str, default: Any = SILENT) -> Key:
    return Key(tuple(names.split()), default)


TRAINER = {  # TrainingArguments, of which LLaVA's arguments and SFTConfig are subclasses
    "batch_size": key("per_device_train_batch_size", 8),
    "grad_accum": key("gradient_accumulation_steps", 1),
    "max_steps": key("max_steps", -1),
    "warmup_steps": key("warmup_steps", 0),
    "warmup_ratio": key("warmup_ratio", 0),
    "fp16": key("fp16", False),
    "bf16": key("bf16"),
    "checkpointing": key("gradient_checkpointing"),
    "reentrant": key("use_reentrant"),
    "remove_unused": key("remove_unused_columns", True),
    "deepspeed": key("deepspeed"),
    "eval": key("eval_strategy evaluation_strategy", "no"),
    "eval_steps": key("eval_steps"),
    "save": key("save_strategy", "steps"),
    "save_steps": key("save_steps", 500),
    "keep": key("save_total_limit", None),
    "save_only_model": key("save_only_model", False),
    "resume": key("resume_from_checkpoint", None),
    "best": key("load_best_model_at_end", False),
}
DIALECTS: dict[str, dict[str, Key]] = {
    "llava": TRAINER
    | {
        "model": key("model_name_or_path"),
        "lr": key("learning_rate", 5e-5),
        "bf16": key("bf16", False),
        "eval": key("evaluation_strategy eval_strategy", "no"),
        "checkpointing": key("gradient_checkpointing", False),
        "remove_unused": key("remove_unused_columns", False),
        "projector_only": key("tune_mm_mlp_adapter", False),
        "freeze_projector": key("freeze_mm_mlp_adapter", False),
        "lora": key("lora_enable", False),
        "r": key("lora_r", 64),
        "alpha": key("lora_alpha", 16),
        "projector_lr": key("mm_projector_lr", None),
        "bits": key("bits", 16),
        "tower": key("vision_tower", None),
        "projector": key("pretrain_mm_mlp_adapter", None),
        "projector_type": key("mm_projector_type", "linear"),
        "layer": key("mm_vision_select_layer", -1),
        "patch_token": key("mm_use_im_patch_token", True),
        "start_end": key("mm_use_im_start_end", False),
        "template": key("version", "v0"),
        "aspect": key("image_aspect_ratio", "square"),
        "max_length": key("model_max_length", 512),
        "by_length": key("group_by_modality_length", False),
    },
    "hf": TRAINER
    | {
        "model": key("base_model_name_or_path model_name_or_path model_id model_name model"),
        "lr": key("learning_rate"),
        "lora": key("use_peft"),
        "r": key("r lora_r", 8),
        "alpha": key("lora_alpha", 8),
        "targets": key("target_modules lora_target_modules"),
        "excluded": key("exclude_modules", None),
        "saved_modules": key("modules_to_save lora_modules_to_save", None),
        "cast": key("autocast_adapter_dtype", True),
        "dtype": key("torch_dtype dtype"),
        "4bit": key("load_in_4bit", False),
        "8bit": key("load_in_8bit", False),
        "4bit_dtype": key("bnb_4bit_compute_dtype", "float32"),
        "4bit_type": key("bnb_4bit_quant_type", "fp4"),
        "skipped_modules": key("llm_int8_skip_modules", None),
        "max_length": key("max_length max_seq_length"),
        "packing": key("packing eval_packing", False),
        "padding_free": key("padding_free", False),
        "answers_only": key("assistant_only_loss", False),
        "completions_only": key("completion_only_loss", None),
        "skip_prepare": key("skip_prepare_dataset", False),
        "template_text": key("chat_template"),
        "template_path": key("chat_template_path"),
        "padding_side": key("padding_side tokenizer_padding_side"),
        "pad": key("do_pad"),
        "aspect": key("image_aspect_ratio"),
    },
    "train.py": {
        "model": key("model", "tiny"),
        "trains": key("train", "lora"),
        "recipe": key("recipe", None),
        "train_projector": key("train_projector", None),
        "lr": key("lr", 2e-4),
        "projector_lr": key("projector_lr", None),
        "r": key("lora_r", 16),
        "alpha": key("lora_alpha", 32.0),
        "targets": key("lora_targets"),
        "batch_size": key("batch_size", 8),
        "grad_accum": key("grad_accum", 1),
        "max_steps": key("max_steps", 0),
        "warmup_steps": key("warmup_steps", 0),
        "warmup_ratio": key("warmup_ratio", 0.03),
        "template": key("template", None),
        "aspect": key("image_aspect_ratio", None),
        "max_length": key("max_length", None),
        "eval_data": key("eval_data", None),
        "data": key("data", None),
        "save_only_model": key("save_only_model", False),
        "resume": key("resume", "never"),
        "checkpointing": key("gradient_checkpointing", False),
        "auto_batch": key("auto_batch_size", False),
    },
}
PARTS = {  # of "hf": who documents the default
    "PEFT's": "r alpha targets excluded saved_modules cast",
    "BitsAndBytesConfig's": "4bit 8bit 4bit_dtype 4bit_type skipped_modules",
    "SFTConfig's": "packing padding_free answers_only completions_only skip_prepare",
}
SFT = {"lr": 2e-5, "max_length": 1024, "checkpointing": True}  # SFTConfig's own defaults
# What only TRL's SFTConfig or its command line has, and so tells that SFTTrainer runs.
TRL = set(
    """assistant_only_loss completion_only_loss dataset_text_field dataset_kwargs
    skip_prepare_dataset packing eval_packing packing_strategy padding_free dataset_num_proc
    chat_template_path""".split()
)

# train.py's settings, by which a recipe and a command of ours are known.
OURS = {name for entry in DIALECTS["train.py"].values() for name in entry.names} | {
    "image_folder",
    "lora_dropout",
    "packing",
    "epochs",
    "precision",
}


@dataclass(frozen=True)
class Setting:
    """A value and its place; `text` is how it was written, or that it was not."""

    value: Any
    where: str
    text: str
    written: bool = True
    given: tuple[str, ...] | None = None  # the words after a flag; None for what is no flag


@dataclass
class Run:
    """One run, model folder or adapter, as an input describes it."""

    source: str  # what the input is called
    kind: Literal["llava", "hf", "train.py"]
    what: str  # the kind in words
    settings: dict[str, Setting] = field(default_factory=dict)  # by the tool's own names
    gpus: int | None = None  # processes that train, on all nodes; None where the input does not say
    nodes: int = 1
    trl: bool = False  # SFTTrainer runs
    adapter: Literal["", "peft", "llava"] = ""  # an adapter folder, and who wrote it
    tensors: list[str] | None = None  # of an adapter, where they can be read
    files: tuple[str, ...] = ()  # in the folder
    stray: list[Setting] = field(default_factory=list)  # flags that a cut command does not reach
    repeated: list[tuple[Setting, Setting]] = field(default_factory=list)  # two values for one name
    # of its files: every name with its value, also those that count for nothing in `settings`
    entries: list[tuple[str, Setting]] = field(default_factory=list)

    def __getitem__(self, fact: str) -> Setting | None:
        names, default = DIALECTS[self.kind].get(fact, Key(()))
        for name in names:
            if name in self.settings:
                return self.settings[name]
        owner = {"llava": "LLaVA's", "train.py": "train.py's"}.get(self.kind) or next(
            (owner for owner, facts in PARTS.items() if fact in facts.split()), "TrainingArguments'"
        )
        if default is SILENT and self.trl and fact in SFT:
            owner, default = "SFTConfig's", SFT[fact]
        if default is SILENT:
            return None
        return Setting(
            default, self.source, f"{names[0]} is not set ({owner} default: {default})", False
        )

    def value(self, fact: str) -> Any:
        setting = self[fact]
        return None if setting is None else setting.value

    def written(self, fact: str) -> Setting | None:
        setting = self[fact]
        return setting if setting and setting.written else None

    def number(self, fact: str) -> float | None:
        """None also for text, as a shell variable that nothing sets."""
        value = self.value(fact)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if number and -MAX_NUMBER < value < MAX_NUMBER else None  # nor NaN

    def text(self, fact: str) -> str:
        value = self.value(fact)
        return value if isinstance(value, str) else ""

    @property
    def trains(self) -> str | None:
        """lora, projector or full; None where the input does not say."""
        if self.kind == "llava":
            alone, lora = self.value("projector_only"), self.value("lora")
            if isinstance(alone, str) or isinstance(lora, str):  # a variable that nothing sets
                return None
            return "projector" if alone else "lora" if lora else "full"
        if self.kind == "hf":
            lora = self.value("lora")
            named = self.adapter or lora or self.written("r") or self["targets"]
            return "lora" if named and lora is not False else None
        kind = self.text("trains")
        return {
            "lora": "lora",
            "projector": "projector",
            "full": "full",
            "freeze_vision": "full",
        }.get(kind)

    @property
    def is_llava(self) -> bool:
        """Whether the model is called a LLaVA."""
        return "llava" in self.text("model").lower()

    @property
    def aspect(self) -> tuple[str, Setting] | None:
        """(pad or crop, the setting that says so)."""
        said = self["aspect"]
        if said and said.value in ("pad", "crop", "square"):
            return "pad" if said.value == "pad" else "crop", said
        pad = self["pad"]
        return (
            ("pad" if pad.value else "crop", pad) if pad and isinstance(pad.value, bool) else None
        )

    @property
    def rows(self) -> int | None:
        """Rows of an optimizer step."""
        parts = [self.gpus, self.number("batch_size"), self.number("grad_accum")]
        whole = all(isinstance(part, int) and part >= 1 for part in parts)
        return math.prod(parts) if whole and not self.value("auto_batch") else None


@dataclass(frozen=True)
class Finding:
    """What was found, and what to change; the rule's name, and why it matters, are added by
    rules.py."""

    severity: Literal["error", "warning", "note"]
    at: Setting
    what: str
    fix: str
    rule: str = ""
    why: str = ""


Findings = Iterator[Finding]


def as_list(value: object) -> list[str]:
    """The names of a setting that may be one name, a list, or nothing."""
    return [
        item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)
    ]


def plain(text: str) -> Any:
    """A flag's text as the value that it means."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d{1,18}\.?\d{0,18}|\.\d{1,18})(e[+-]?\d{1,3})?", text, re.IGNORECASE):
        return float(text)
    return text
