"""A LLaVA launch script as a `train.py` command: every flag is translated, or listed with a reason.

What the script leaves to LLaVA's defaults is written out where train.py's differ.
"""

import re
import shlex
from typing import Any

from llava_min.checks.doctor.facts import Run
from llava_min.util.cli import break_command

TEMPLATES = {"v1": "vicuna_v1", "vicuna_v1": "vicuna_v1", "v0": "vicuna_v1", "plain": "plain"}
ASPECTS = {"pad": "pad", "square": "crop"}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
# What is part of the checkpoint here: the flag, and LLaVA-1.5's value, the only one that is built.
IN_MODEL = {
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}
REASONS = {
    "pretrain_mm_mlp_adapter": "goes into the folder of --model",
    "deepspeed": "FSDP2 shards over the processes that torchrun starts",
    "tf32": "left as torch has it; autocast leaves no large product in fp32",
    "lazy_preprocess": "images are always read when they are needed",
    "is_multimodal": "the records say which of them have images",
    "evaluation_strategy": "LLaVA has no held-out data; here: --eval-data, --eval-every",
    "eval_strategy": "LLaVA has no held-out data; here: --eval-data, --eval-every",
    "per_device_eval_batch_size": "goes with --eval-data: --eval-batch-size",
    "quant_type": "has no effect without --bits 4",
    "double_quant": "has no effect without --bits 4",
    "lora_bias": "biases stay frozen",
    "cache_dir": "the hub's own: HF_HOME",
    "remove_unused_columns": "no column is ever dropped",
    "local_rank": "torchrun's own",
    "dataloader_drop_last": "no row is dropped",
    "ddp_find_unused_parameters": "every trained tensor gets a gradient, or the run stops",
}
NO_LORA = "has no effect without --lora_enable True"


def is_open(value: Any) -> bool:
    """Whether a shell variable is in it that the script does not set."""
    return isinstance(value, str) and "$" in value


class Translation:
    """`flags` of train.py, `left_out` as (flag as written, reason), `first`: what to do before."""

    def __init__(self, run: Run):
        self.run, self.used = run, set()
        self.flags: list[tuple[str, ...]] = []
        self.left_out: list[tuple[str, str]] = []
        self.first: list[str] = []
        for part in (self.model, self.data, self.trained, self.step, self.row, self.surroundings):
            part()
        for name in run.settings:
            if name not in self.used:
                self.leave(name, REASONS.get(name, "no equivalent"))

    # ---- one flag

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return self.run.settings[name].value if name in self.run.settings else default

    def put(self, flag: str, value: Any = None) -> None:
        """`--flag value`; True is a switch, None nothing at all."""
        if value is True or value is False:
            self.flags.append((flag if value else flag.replace("--", "--no-", 1),))
        elif is_open(value):
            self.flags.append((flag, f'"{value}"'))
        elif value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            text = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
            self.flags.append((flag, shlex.quote(text)))

    def same(self, name: str, flag: str, default: Any = None) -> None:
        self.put(flag, self.get(name, default))

    def leave(self, name: str, reason: str) -> None:
        if name in self.run.settings:
            self.used.add(name)
            self.left_out.append((self.run.settings[name].text, reason))

    def one_of(self, name: str, flag: str, values: dict[str, str], default: str) -> None:
        value = self.get(name, default)
        if is_open(value) or isinstance(value, str) and value in values:
            self.put(flag, values.get(value, value))
        else:
            names = ", ".join(dict.fromkeys(values.values()))
            self.leave(name, f"no equivalent; there are {names}")

    # ---- the parts, in train.py's order

    def model(self) -> None:
        name = str(self.get("model_name_or_path", "facebook/opt-125m"))
        tower = self.run.written("tower")
        if tower and "llava" not in name.lower() and not is_open(name):
            folder = name.rstrip("/").rpartition("/")[2] + "-llava"
            projector = self.run.value("projector")
            whose = f"the projector of {projector}" if projector else "a random projector"
            self.first.append(
                f"{folder} is {name} with {tower.value} and {whose}: "
                '"The start of stage 1" in docs/recipes.md makes that folder'
            )
            name = folder
        self.put("--model", name)
        for flag, value in IN_MODEL.items():
            same = self.run.settings[flag].value == value if flag in self.run.settings else True
            self.leave(flag, "is in the checkpoint's config" if same else f"only {value} is built")

    def data(self) -> None:
        self.same("data_path", "--data")
        self.same("image_folder", "--image-folder")
        self.one_of("version", "--template", TEMPLATES, "v0")
        self.one_of("image_aspect_ratio", "--image-aspect-ratio", ASPECTS, "square")

    def trained(self) -> None:
        kind, tower = self.run.trains, self.get("unfreeze_mm_vision_tower") is True
        for name in ("lora_enable", "tune_mm_mlp_adapter"):
            if is_open(self.get(name)):
                self.leave(name, "give --train: lora, freeze_vision or projector")
        self.put("--train", "freeze_vision" if kind == "full" and not tower else kind)
        if tower and kind != "full":
            self.put("--train-vision", True)
        if frozen := self.get("freeze_mm_mlp_adapter") is True:
            self.put("--train-projector", False)
        for name, flag, default in (
            ("lora_r", "--lora-r", 64),
            ("lora_alpha", "--lora-alpha", 16),
            ("lora_dropout", "--lora-dropout", 0.05),
        ):
            if kind == "lora":
                self.same(name, flag, default)
            elif kind is None:
                self.same(name, flag)
            else:
                self.leave(name, NO_LORA)
        self.stored(kind)
        self.same("learning_rate", "--lr", 5e-5)
        if frozen:
            self.leave("mm_projector_lr", "the projector is frozen")
        else:
            self.same("mm_projector_lr", "--projector-lr")
        if tower:
            self.same("mm_vision_tower_lr", "--vision-lr")

    def stored(self, kind: str | None) -> None:
        """--bits 4 and 8 as --quantize, which is of the decoder's blocks; LLaVA's also are."""
        bits = self.get("bits", 16)
        if bits == 16:
            self.leave("bits", "16 bits are the default")
        elif is_open(bits):
            self.leave("bits", "give --quantize nf4 for 4, int8 for 8")
        elif kind == "full" or kind == "projector":
            self.leave("bits", "only adapters learn on a quantized model; " + NO_LORA)
        elif bits == 4:
            self.one_of("quant_type", "--quantize", {"nf4": "nf4", "fp4": "fp4"}, "nf4")
            if self.get("double_quant", True) is False:
                self.leave("double_quant", "--quantize nf4 and fp4 always have it")
        elif bits == 8:
            self.put("--quantize", "int8")
        else:
            self.leave("bits", "no equivalent; there are 16, 8 and 4")

    def step(self) -> None:
        self.same("weight_decay", "--weight-decay")
        betas = self.get("adam_beta1", 0.9), self.get("adam_beta2", 0.999)
        self.put("--betas", betas if betas != (0.9, 0.999) else None)
        self.same("max_grad_norm", "--max-grad-norm")
        steps = self.get("warmup_steps", 0)
        if steps:
            self.put("--warmup-steps", steps)
            self.leave("warmup_ratio", "the steps win")
        else:
            self.same("warmup_ratio", "--warmup-ratio", 0)
        self.one_of("lr_scheduler_type", "--schedule", SCHEDULES, "linear")
        self.same("num_train_epochs", "--epochs", 3)
        most = self.get("max_steps", -1)
        endless = isinstance(most, int) and most <= 0
        self.put("--max-steps", None if endless else most)
        self.same("per_device_train_batch_size", "--batch-size", 8)
        self.same("gradient_accumulation_steps", "--grad-accum")
        if self.get("optim", "adamw_torch") not in ("adamw_torch", "adamw_torch_fused"):
            self.leave("optim", "--optimizer MODULE:CLASS takes any other (docs/optimizers.md)")

    def row(self) -> None:
        self.same("model_max_length", "--max-length", 512)
        self.put("--too-long", "shorten")  # LLaVA cuts, in the middle of an answer or an image
        fp16, bf16 = self.get("fp16") is True, self.get("bf16") is True
        self.put("--precision", "fp16" if fp16 else "bf16" if bf16 else "fp32")
        for name, flag in (
            ("gradient_checkpointing", "--gradient-checkpointing"),
            ("group_by_modality_length", "--group-by-length"),
        ):
            self.put(flag, True if self.get(name) is True else None)
        self.same("neftune_noise_alpha", "--neftune-alpha")

    def surroundings(self) -> None:
        self.same("dataloader_num_workers", "--workers")
        self.same("seed", "--seed")
        save, steps = self.get("save_strategy", "steps"), self.get("save_steps", 500)
        if save == "steps" and isinstance(steps, float):
            self.leave("save_steps", "--save-every takes steps, minutes (30m) or epoch")
        elif save in ("steps", "epoch", "no") or is_open(save):
            self.put("--save-every", {"steps": steps, "no": 0}.get(save, save))
        else:
            self.leave("save_strategy", "no equivalent; --best-metric keeps the best")
        if save == "no":
            self.leave("save_total_limit", "there are no checkpoints")
        else:
            self.same("save_total_limit", "--keep")
        self.put("--save-only-model", True if self.get("save_only_model") is True else None)
        self.same("logging_steps", "--log-every", 500)
        report = self.get("report_to", "none")
        known = [
            r
            for r in (report if isinstance(report, list) else [report])
            if r in ("wandb", "tensorboard")
        ]
        self.put("--log", known or None)
        if not known and report not in ("none", None):
            self.leave("report_to", "there are tensorboard and wandb")
        self.same("output_dir", "--out")
        if "output_dir" in self.run.settings:  # LLaVA goes on from a checkpoint-* in it
            self.put("--resume", "auto")
        self.leave(
            "resume_from_checkpoint", "as LLaVA does: --resume auto goes on from what is in --out"
        )

    # ---- the command

    def launcher(self) -> str:
        run = self.run
        gpus = run.gpus or self.guess()
        if run.nodes > 1:
            return (
                f"torchrun --nnodes={run.nodes} --nproc_per_node={gpus // run.nodes} "
                "--rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py"
            )
        return f"torchrun --nproc_per_node={gpus} train.py" if gpus > 1 else "python train.py"

    def guess(self) -> int:
        """GPUs that make the published batch, where the script does not say how many there are."""
        each = (self.run.number("batch_size") or 0) * (self.run.number("grad_accum") or 0)
        published = 256 if self.run.trains == "projector" else 128
        return int(published // each) if each and published % each == 0 else 8

    def lines(self, width: int) -> list[str]:
        return break_command(self.launcher(), map(" ".join, self.flags), width)


def unresolved(run: Run) -> list[str]:
    """Variables that nothing in the script sets."""
    texts = [setting.text for setting in run.settings.values()]
    return sorted({v for text in texts for v in re.findall(r"\$\{?\w+\}?|\$[(@]", text)})
