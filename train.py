"""Train a LLaVA: the whole story, downwards.

    python train.py                                        # the toy: LoRA on drawn pictures, on CPU, in three minutes
    python train.py --model llava-hf/llava-1.5-7b-hf --data my.json --image-folder images --train lora
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from llava_min.cli import Count, Fraction, NonNegative, Positive, Seed, UserError, Whole, parse, printable, run

RECIPES = Path(__file__).parent / "llava_min" / "recipes"


@dataclass
class Knobs:
    recipe: str | None = None  # settings by name, or a .toml file; `toy` when there is no --data
    # what is trained, on what
    model: str = "tiny"  # a folder, a hub id, or tiny
    data: str | None = None  # LLaVA JSON or JSONL; toy:TASK draws the toy data (questions, captions) into the run folder
    toy_train: Count = 3000  # pictures that toy:TASK draws to train on
    toy_val: Count = 200  # and to evaluate with
    image_folder: str | None = None  # where the pictures lie; the data file's own folder if not given
    eval_data: str | None = None  # held-out records of the same kind; toy:TASK has its own
    out: str | None = None  # the run folder; runs/RECIPE-N if not given
    train: Literal["lora", "full"] = "lora"  # LoRA and projector, or everything
    train_projector: bool = True  # the projector learns beside LoRA
    lora_r: Count = 16  # rank
    lora_alpha: Positive = 32.0  # the update is scaled by alpha / r
    lora_dropout: Fraction = 0.0  # on the input of A
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # leaf names in the language model
    # the step
    lr: Positive = 2e-4  # peak learning rate
    projector_lr: Positive | None = None  # the projector's own; lr if not given
    weight_decay: NonNegative = 0.0  # not on norms and biases
    betas: tuple[Fraction, ...] = (0.9, 0.999)  # of AdamW
    warmup_ratio: Fraction = 0.03  # share of the steps with a rising rate
    warmup_steps: Whole = 0  # the same in steps; wins over the ratio
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warmup
    max_grad_norm: NonNegative = 1.0  # gradients are scaled down to this norm; 0 for none
    epochs: Positive = 1.0  # passes over the data
    max_steps: Whole = 0  # stop after so many optimizer steps; 0 for epochs alone
    batch_size: Count = 8  # rows in a micro-batch
    grad_accum: Count = 1  # micro-batches in an optimizer step
    max_length: Count = 2048  # tokens in a row; a longer record is an error
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the computation; what is trained is always fp32
    # the surroundings
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # what the checkpoint records if not given
    template: str | None = None  # chat template; the checkpoint's if not given
    exif: bool = False  # turn pictures as their orientation tag says
    workers: Whole = 0  # processes that load pictures
    seed: Seed = 0  # of weights, order and dropout
    device: str = "auto"  # cpu, cuda, cuda:N
    log_every: Whole = 10  # steps between progress lines
    eval_every: Whole = 0  # steps between evaluations; 0 for before and after alone
    eval_batch_size: Count = 16  # rows generated at a time
    max_new_tokens: Count = 128  # tokens of an answer in the evaluation
    samples: Whole = 5  # answers shown before and after

    def __post_init__(self):
        if self.data is None:
            raise UserError("--data: not given; give a LLaVA JSON file, or --recipe toy")
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise UserError(f"--betas: {self.betas} is not two numbers below 1; give for example 0.9,0.999")


def main(argv: list[str]) -> int | None:
    if not any(a.split("=")[0] in ("--recipe", "--data") for a in argv):
        argv = ["--recipe", "toy", *argv]
    knobs = parse(Knobs, argv, "Fine-tune a LLaVA.", recipes=RECIPES)

    import torch

    from llava_min.data import toy
    from llava_min.data.dataset import Dataset, batches, collate, read_records
    from llava_min.evaluate import predict, score
    from llava_min.files import check_free, new_folder, write_json
    from llava_min.llava import IGNORE
    from llava_min.load import load, pick_device, write_model
    from llava_min.log import Log
    from llava_min.lora import LoRAConfig, add_lora, save_adapter
    from llava_min.optim import parameter_groups, rate_factor
    from llava_min.weights import DTYPES

    # ---- the run folder and the data: whatever is wrong with them is found before weights are read
    out = Path(knobs.out) if knobs.out else next_run(Path("runs"), Path(knobs.recipe or "run").stem)
    check_free(out)
    data, eval_data, images = knobs.data, knobs.eval_data, knobs.image_folder
    if data.startswith("toy:"):
        if (task := data.removeprefix("toy:")) not in toy.TASKS:
            raise UserError(f"--data {printable(data)}: no such toy task; there are {', '.join('toy:' + t for t in toy.TASKS)}")
        out.mkdir(parents=True, exist_ok=True)
        toy.write(out / "data", task, knobs.toy_train, knobs.toy_val, knobs.seed)
        data, eval_data, images = out / "data" / "train.json", out / "data" / "val.json", None
    records = read_records(data, images)
    held_out = read_records(eval_data, images) if eval_data else []

    # ---- the model: what is frozen in the compute dtype, what is trained in fp32
    torch.manual_seed(knobs.seed)
    device, compute = pick_device(knobs.device), DTYPES[knobs.precision]
    model, processor = load(knobs.model, dtype=torch.float32 if knobs.train == "full" else compute, device=device,
                            image_aspect_ratio=knobs.image_aspect_ratio, template=knobs.template)
    lora = LoRAConfig(knobs.lora_r, knobs.lora_alpha, knobs.lora_dropout, knobs.lora_targets) if knobs.train == "lora" else None
    if lora:
        add_lora(model, lora)
    for name, p in model.named_parameters():
        if knobs.train == "full" or ".lora_" in name or knobs.train_projector and name.startswith("multi_modal_projector."):
            p.data = p.data.float()
            p.requires_grad_()
    trainable = [p for p in model.parameters() if p.requires_grad]
    print_table(model)

    # ---- the data in order, the optimizer and its schedule
    dataset = Dataset(records, processor, max_length=knobs.max_length, exif=knobs.exif)
    plan = batches(len(dataset), knobs.batch_size, knobs.grad_accum, knobs.epochs, knobs.max_steps, knobs.seed)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=[rows for step in plan for rows in step], collate_fn=collate,
                                         num_workers=knobs.workers, pin_memory=device.type == "cuda")
    warmup = knobs.warmup_steps or round(knobs.warmup_ratio * len(plan))
    groups = parameter_groups(model, knobs.lr, knobs.weight_decay, knobs.projector_lr)
    optimizer = torch.optim.AdamW(groups, betas=knobs.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=knobs.precision == "fp16")
    autocast = lambda: torch.autocast(device.type, compute, enabled=compute != torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", asdict(knobs))
    log = Log(out, len(plan))
    log.say(f"{len(records)} records, {len(plan)} steps of {knobs.batch_size * knobs.grad_accum} rows, into {out}")

    def evaluate(step: int) -> list[dict]:
        """Answer the held-out records and log the metrics."""
        with autocast():
            rows = predict(model, processor, held_out, knobs.eval_batch_size, knobs.exif, max_new_tokens=knobs.max_new_tokens)
        for name, m in score(rows, ["exact_match"]).items():
            log.write(step=step, **{f"eval_{name}": m["score"]})
            log.say(f"step {step}: {name} {m['score']:.3f} ({m['low']:.3f} to {m['high']:.3f}) on {m['n']} held-out records")
        return rows

    # ---- the loop
    before = evaluate(0) if held_out else []
    model.train()
    micro_batches, tokens, rows, since = iter(loader), 0, 0, time.perf_counter()
    for step, micros in enumerate(plan, 1):
        micros = [{k: v.to(device, non_blocking=True) for k, v in next(micro_batches).items()} for _ in micros]
        supervised = sum((b["labels"][:, 1:] != IGNORE).sum() for b in micros)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate_factor(step - 1, len(plan), warmup, knobs.schedule)

        loss = 0.0
        for b in micros:  # a token counts the same, whatever micro-batch it is in
            with autocast():
                part = model.loss(b["input_ids"], b["labels"], b.get("pixel_values")) / supervised
            scaler.scale(part).backward()
            loss += part.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable, knobs.max_grad_norm or float("inf"))
        if knobs.precision != "fp16" and not torch.isfinite(norm):
            raise UserError(f"step {step}: the gradient is not finite, no weight was changed; lower --lr or try --precision fp32")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        tokens, rows = tokens + sum(b["input_ids"].numel() for b in micros), rows + sum(len(b["input_ids"]) for b in micros)
        if knobs.log_every and (step % knobs.log_every == 0 or step == len(plan)):
            seconds, since = time.perf_counter() - since, time.perf_counter()
            log.step(step, loss=float(loss), lr=optimizer.param_groups[0]["lr"], grad_norm=float(norm),
                     tokens_per_s=tokens / seconds, rows_per_s=rows / seconds)
            tokens = rows = 0
        if held_out and knobs.eval_every and step % knobs.eval_every == 0 and step < len(plan):
            evaluate(step)

    # ---- what came of it
    result = out / ("adapter" if lora else "model")
    with new_folder(result) as folder:
        if lora:
            save_adapter(model, lora, folder, knobs.model)
        else:
            write_model(model, processor, folder, compute)
    after = evaluate(len(plan)) if held_out else []
    for old, new in list(zip(before, after))[: knobs.samples]:
        print(f"\n{new['id']}: {new['prompt']}")
        for label, text in (("before", old["prediction"]), ("after", new["prediction"]), ("expected", new["references"][0])):
            print(f"  {label:<9} {printable(text)}")
    log.say(f"saved {result}")


def next_run(parent: Path, name: str) -> Path:
    """parent/name-N with the next free N."""
    taken = [int(p.name.rpartition("-")[2]) for p in parent.glob(f"{name}-*") if p.name.rpartition("-")[2].isdigit()]
    return parent / f"{name}-{max(taken, default=0) + 1}"


def print_table(model) -> None:
    """Parameters of each part, and how many of them are trained."""
    print(f"{'part':<24}{'parameters':>16}{'trained':>14}", file=sys.stderr)
    for name, part in (*model.named_children(), ("all", model)):
        n = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        print(f"{name:<24}{n:>16,}{trained:>14,}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
