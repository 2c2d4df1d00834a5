"""Train a LLaVA: settings, data, model, optimizer, then the loop.

python train.py                                   # the toy: LoRA on drawn images, in three minutes
python train.py --model llava-hf/llava-1.5-7b-hf --data my.json --image-folder images --train lora
torchrun --nproc_per_node=8 train.py --recipe lora-7b --data mix665k.json --image-folder images

The loss is a sum over the supervised tokens of a whole step, divided by their number, so neither
micro-batches nor ranks change a step. training/run.py saves, evaluates and hears signals.
"""

import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from llava_min.checks import settings
from llava_min.checks.ranges import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from llava_min.config import LINEARS
from llava_min.errors import Interrupted, info
from llava_min.training.signals import Signals
from llava_min.util.cli import PathArg, flags, parse
from llava_min.util.script import run as run_script

RECIPES = Path(__file__).parent / "llava_min" / "recipes"


@dataclass
class TrainConfig:
    # the comment after a field is its --help text
    recipe: PathArg | None = None  # settings by name, or a .toml; toy without --data
    # what is trained, on what
    model: PathArg = "tiny"  # a folder, a hub id, or tiny; for --dry-run also a size like 7b
    data: PathArg | None = None  # LLaVA JSON or messages, comma-separated; toy:TASK draws its own
    toy_train: PositiveInt = 3000  # images that toy:TASK draws to train on
    toy_val: PositiveInt = 200  # and to evaluate with
    image_folder: PathArg | None = None  # where the images lie; the data file's folder by default
    eval_data: PathArg | None = None  # held-out records of the same kind; toy:TASK has its own
    skip_bad: bool = False  # leave out bad records, list them in skipped.txt, stop at 1 % of them
    out: PathArg | None = None  # the run folder; runs/RECIPE-N by default
    resume: PathArg = "never"  # auto: from the newest checkpoint of --out; or a checkpoint's folder
    train: str = "lora"  # lora, full, freeze_vision, projector, or last:N blocks and the head
    train_projector: bool | None = None  # train the projector, whatever --train says
    train_vision: bool | None = None  # train the vision tower, whatever --train says
    lora_r: PositiveInt = 16  # rank
    lora_alpha: Annotated[float, 1e-30, 999999.0] = 32.0  # the update is scaled by alpha / r
    lora_dropout: Fraction = 0.0  # on the input of A
    lora_targets: tuple[str, ...] = LINEARS  # leaf names in the decoder, all-linear, or a regex
    dora: bool = False  # weight-decomposed LoRA
    quantize: str | None = None  # QLoRA: the decoder to int8, int4, hqq8 … hqq1, nf4, fp4 or w8a8
    rslora: bool = False  # scale by alpha / sqrt(r)
    # the step
    lr: PositiveFloat = 2e-4  # peak learning rate
    projector_lr: PositiveFloat | None = None  # the projector's own; --lr by default
    vision_lr: PositiveFloat | None = None  # the vision tower's own; --lr by default
    optimizer: str = "adamw"  # or MODULE:CLASS, called with the parameter groups
    weight_decay: NonNegativeFloat = 0.0  # not on norms and biases
    betas: tuple[Fraction, ...] = (0.9, 0.999)  # of AdamW
    warmup_ratio: Fraction = 0.03  # share of the steps with a rising rate
    warmup_steps: NonNegativeInt = 0  # the same in steps; wins over the ratio
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warmup
    max_grad_norm: NonNegativeFloat = 1.0  # gradients are clipped to this norm; 0 for no clipping
    epochs: PositiveFloat = 1.0  # passes over the data
    max_steps: NonNegativeInt = 0  # stop after this many optimizer steps, whatever --epochs says
    batch_size: PositiveInt = 8  # rows in a micro-batch of one rank
    grad_accum: PositiveInt = 1  # micro-batches in an optimizer step
    auto_batch_size: bool = False  # the largest micro-batch that fits, with the same step
    max_length: PositiveInt | None = None  # tokens in a row; 2048 or the model's context by default
    too_long: Literal["error", "shorten"] = "error"  # longer records: stop, or drop last turns
    group_by_length: bool = False  # rows of similar length share a micro-batch, as in LLaVA
    packing: bool = False  # several records in a row of --max-length, each seeing itself alone
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the compute; what is trained is fp32
    gradient_checkpointing: bool = False  # save a block's input only, recompute in the backward
    neftune_alpha: NonNegativeFloat = 0.0  # uniform noise on the embeddings; 5 is usual
    compile: bool = False  # torch.compile the blocks
    cpu_offload: bool = False  # weights and optimizer in CPU memory, a block at a time on the GPU
    max_skips: PositiveInt = 10  # stop after this many steps with NaN in loss or gradient
    # the run
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # the checkpoint's by default
    template: str | None = None  # chat template; the checkpoint's by default
    exif: bool = False  # turn images as their orientation tag says
    workers: NonNegativeInt = 0  # processes that load images
    seed: Seed = 0  # of weights, order and dropout
    deterministic: bool = False  # only operations that give the same bits every time
    device: str = "auto"  # cpu, cuda, cuda:N
    timeout: Annotated[float, 1.0, 1e6] = 600.0  # seconds a rank may keep the others waiting
    save_every: str = "30m"  # steps (500), minutes (30m) or epoch between checkpoints; 0 for none
    save_only_model: bool = False  # small checkpoints of the weights alone; no run can resume them
    keep: PositiveInt = 2  # newest checkpoints to keep, beside the best
    log_every: NonNegativeInt = 10  # steps between progress lines
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()  # copies of the metrics
    eval_every: NonNegativeInt = 0  # steps between evaluations; 0 for before and after alone
    eval_batch_size: PositiveInt = 16  # rows generated at a time
    eval_metrics: tuple[str, ...] = ("exact_match",)  # of the answers, beside the loss
    best_metric: str | None = None  # loss or a metric: keep the best checkpoint and end with it
    early_stopping: NonNegativeInt = 0  # stop after this many evaluations without gain; 0 for never
    num_beams: PositiveInt = 1  # in the evaluation; 1 is greedy
    max_new_tokens: PositiveInt = 128  # tokens of an answer in the evaluation
    samples: NonNegativeInt = 5  # answers shown before and after
    dry_run: bool = False  # show what would be done, without weights, and stop


def main(argv: list[str]) -> None:
    if not any(a.split("=")[0] in ("--recipe", "--data") for a in argv):
        argv = ["--recipe", "toy", *argv]
    config = parse(TrainConfig, argv, "Fine-tune a LLaVA.", recipes=RECIPES)
    with flags(config), Signals() as signals:
        settings.check_settings(config, argv)
        from llava_min.parallel.ranks import start  # torch, which --help need not wait for

        with start(config.device, config.timeout) as world:
            try:
                train_in_folder(config, argv, world, signals)
            except Interrupted:
                info("stopped before the first step; there is nothing to save")
                sys.exit(signals.code)


def train_in_folder(config: TrainConfig, argv: list[str], world, signals: Signals) -> None:
    """Check what the command line alone cannot tell, and train in the folder of the run."""
    from llava_min.evaluation.predict import check_metrics
    from llava_min.parallel.ranks import all_gather, assert_same_on_ranks
    from llava_min.training.dry_run import dry_run
    from llava_min.training.log import check_packages
    from llava_min.training.run_folder import choose_folder, open_run_folder

    assert_same_on_ranks(world, "the settings", asdict(config))
    check_metrics(config.eval_metrics, config.best_metric)
    check_packages(config.log)
    if config.dry_run:
        dry_run(config, world, typed="data" in settings.typed_settings(argv))
        return
    settings.check_device(config, world.device)

    # rank 0 looks at the disk for all
    found, name = None, Path(config.recipe or "run").stem
    if world.rank == 0:
        found = choose_folder(config.out, config.resume, Path("runs"), name)
    folder, checkpoint = all_gather(world, found)[0]
    out, resumed = Path(folder), Path(checkpoint) if checkpoint else None
    if config.resume != "never" and ((out / "adapter").exists() or (out / "model").exists()):
        settings.check_finished(out, config, argv, world.size)
        if world.rank == 0:
            info(f"{out}: already finished")
        return
    settings.check_same_kind_of_data(out, config)
    with open_run_folder(out, world):
        train(config, world, signals, out, resumed)


def read_data(config: TrainConfig, processor, out: Path, world):
    """The records to train on and the held-out ones; toy:TASK draws both into the run folder."""
    from llava_min.data.dataset import Dataset
    from llava_min.data.records import SkippedRecords, read_records
    from llava_min.parallel.ranks import assert_same_on_ranks
    from llava_min.toy import draw as toy
    from llava_min.training.state import TrainData

    source, eval_data, images = config.data, config.eval_data, config.image_folder
    if settings.is_toy(source):
        folder, task = out / "data", source.removeprefix("toy:")
        if world.rank == 0 and not folder.exists():
            toy.write(folder, task, config.toy_train, config.toy_val, config.seed)
        assert_same_on_ranks(world, "the toy data", True)  # the other ranks wait for the files
        source, eval_data, images = str(folder / "train.json"), folder / "val.json", None
    listed = out / "skipped.txt" if world.rank == 0 else None
    skips = SkippedRecords(listed) if config.skip_bad else None
    records = read_records(source, images, skips)
    held_out = read_records(eval_data, images) if eval_data else []
    options = {"max_length": config.max_length, "exif": config.exif, "too_long": config.too_long}
    dataset, validation = (Dataset(r, processor, **options) for r in (records, held_out))
    return TrainData(source, records, dataset, held_out, validation, skips)


def load_weights(config: TrainConfig, checkpoint, world, dtype) -> None:
    """Frozen weights in the compute dtype, trained ones in fp32; LoRA and wrappers on top."""
    from llava_min.fast.cpu_linear import upcast_linears
    from llava_min.lora import init_lora
    from llava_min.parallel.fsdp import shard
    from llava_min.training.wrap import wrap_model

    model, is_full = checkpoint.model, config.train in ("full", "freeze_vision")
    shard(model, world, compute=dtype, full=is_full, cpu_offload=config.cpu_offload)
    checkpoint.load_weights(dtype, world.device, offload=config.cpu_offload)
    init_lora(model, config.seed)
    upcast_linears(model)
    wrap_model(model, config)
    model.train()


def build_run(config: TrainConfig, world, signals: Signals, out: Path, resumed: Path | None):
    """Data, model and optimizer of one rank, at the first step or where `resumed` left them."""
    from llava_min.data.loader import loader
    from llava_min.evaluation.predict import check_room
    from llava_min.load import open_checkpoint
    from llava_min.parallel.ranks import assert_same_on_ranks
    from llava_min.training.batch_size import find_batch_size, make_plan, row_length
    from llava_min.training.identity import run_identity
    from llava_min.training.optim import LossScale, config_groups, make_optimizer, warmup_steps
    from llava_min.training.result import Result
    from llava_min.training.run import Run
    from llava_min.training.trainable import parameter_table, setup_lora
    from llava_min.weights import DTYPES

    # the model on meta: mistakes in it and in the data show before any weight is read
    c, dtype, rows = config, DTYPES[config.precision], config.batch_size * config.grad_accum
    image_mode = {"image_aspect_ratio": c.image_aspect_ratio}
    checkpoint = open_checkpoint(c.model, template=c.template, **image_mode)
    model, processor = checkpoint.model, checkpoint.processor
    if c.quantize is not None:
        checkpoint.quantize(c.quantize)
    lora = setup_lora(model, config, world.device)
    config.max_length = row_length(config.max_length, model.config.text.context)
    if world.rank == 0:
        print(parameter_table(model), file=sys.stderr)

    # the data, and which records make which step
    data = read_data(config, processor, out, world)
    check_room(model, processor, data.held_out, config.max_new_tokens)
    lengths = data.train.lengths(exact=config.packing)
    plan = make_plan(config, lengths, world.size)
    warmup_steps(config, len(plan))  # an error, if the run is too short for it
    # most mistakes in images show in the first micro-batch
    next(loader(data.train, plan[0][world.rank][:1], packing=c.packing, skip=c.skip_bad))
    size = (rows * world.size, len(plan))
    identity = run_identity(checkpoint, data.source, data.records, config, *size)
    assert_same_on_ranks(world, "code, data or model", identity)

    # the weights, then the optimizer
    load_weights(config, checkpoint, world, dtype)
    if config.auto_batch_size:
        # the step keeps its rows: a smaller micro-batch means more of them
        config.batch_size = find_batch_size(config, world, data.train, lengths, model, dtype)
        config.grad_accum = rows // config.batch_size
        plan = make_plan(config, lengths, world.size)
    optimizer = make_optimizer(config.optimizer, config_groups(model, config), config.betas)
    scaler, result = LossScale(config.precision == "fp16"), Result(model, processor, lora, c, dtype)
    state = (data, plan, result, optimizer, scaler, identity)
    return Run(config, world, signals, out, *state, resumed)


def train(config: TrainConfig, world, signals: Signals, out: Path, resumed: Path | None) -> None:
    """One rank's part of a run into `out`; it continues from the checkpoint `resumed`, if any."""
    import torch

    from llava_min.parallel.ranks import all_reduce_sum
    from llava_min.training.optim import clip_gradients, lr_factor, warmup_steps

    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    run = build_run(config, world, signals, out, resumed)
    optimizer, scaler, num_steps = run.optimizer, run.scaler, len(run.plan)
    warmup = warmup_steps(config, num_steps)
    trainable = [p for p in run.model.parameters() if p.requires_grad]

    with run.saved_when_stopped():
        run.evaluate_if_due()  # before the first step
        while not run.finished():
            batches, num_tokens = run.next_batches()  # saves, stops or raises first if it has to

            # schedule: each parameter group has a peak rate of its own
            factor = lr_factor(run.state.step, num_steps, warmup, config.schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

            # forward and backward; a token counts the same in every micro-batch and on every rank
            loss = torch.zeros((), device=world.device)
            for batch in batches:
                micro_loss = run.compute_loss(batch) / num_tokens
                (micro_loss * scaler.scale).backward()
                loss += micro_loss.detach()

            # clip; the norm and the loss are those of all ranks
            grad_norm = float(clip_gradients(trainable, scaler.scale, config.max_grad_norm))
            loss = all_reduce_sum(world, loss)[0]

            # update, unless a number is not finite
            finite = math.isfinite(loss + grad_norm)
            if finite:
                run.check_gradients()  # at the first update
                optimizer.step()
            else:
                run.count_skip(loss)
            scaler.update(finite)
            optimizer.zero_grad(set_to_none=True)  # frees the gradients before the next forward
            run.step_done(finite, loss, config.lr * factor, grad_norm, batches)  # logs, evaluates
    run.write_result()


if __name__ == "__main__":
    run_script(main)
