"""Train a LLaVA: the whole story, downwards.

python train.py                                        # the toy: LoRA on drawn pictures, on CPU, in three minutes
python train.py --model llava-hf/llava-1.5-7b-hf --data my.json --image-folder images --train lora
torchrun --nproc_per_node=8 train.py --recipe lora-7b --data mix665k.json --image-folder images --resume auto
"""

import math
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

from llava_min.checks.ranges import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from llava_min.checks.settings import check_begun, check_finished, check_settings, names_of
from llava_min.config import LINEARS
from llava_min.errors import Interrupted, UserError, info, shorten
from llava_min.training.signals import Signals
from llava_min.util.cli import PathArg, flags, parse
from llava_min.util.script import run

RECIPES = Path(__file__).parent / "llava_min" / "recipes"


@dataclass
class Knobs:
    recipe: PathArg | None = (
        None  # settings by name, or a .toml file; `toy` when there is no --data
    )
    # what is trained, on what
    model: PathArg = "tiny"  # a folder, a hub id, or tiny; for --dry-run also a size: 300m, 1b, 7b, 13b, mistral-7b
    data: PathArg | None = (
        # LLaVA JSON or messages, with commas between several; toy:TASK (questions, captions) draws
        # it
        None
    )
    toy_train: PositiveInt = 3000  # pictures that toy:TASK draws to train on
    toy_val: PositiveInt = 200  # and to evaluate with
    image_folder: PathArg | None = (
        None  # where the pictures lie; the data file's own folder if not given
    )
    eval_data: PathArg | None = None  # held-out records of the same kind; toy:TASK has its own
    skip_bad: bool = (
        False  # leave bad records out, list them in skipped.txt, and stop at 1 % of them
    )
    out: PathArg | None = None  # the run folder; runs/RECIPE-N if not given
    resume: PathArg = "never"  # auto: go on from the newest whole checkpoint of the run folder; or the folder of a checkpoint
    train: str = "lora"  # lora, full (the tower too), freeze_vision, projector, or last:N decoder blocks and the head
    train_projector: bool | None = None  # the projector learns, whatever --train says
    train_vision: bool | None = None  # the tower learns, whatever --train says
    lora_r: PositiveInt = 16  # rank
    lora_alpha: Annotated[float, 1e-30, 999999.0] = 32.0  # the update is scaled by alpha / r
    lora_dropout: Fraction = 0.0  # on the input of A
    lora_targets: tuple[str, ...] = (
        LINEARS  # leaf names in the language model, all-linear, or a regex on whole paths
    )
    dora: bool = False  # weight-decomposed LoRA
    rslora: bool = False  # scale by alpha / sqrt(r)
    # the step
    lr: PositiveFloat = 2e-4  # peak learning rate
    projector_lr: PositiveFloat | None = None  # the projector's own; lr if not given
    vision_lr: PositiveFloat | None = None  # the tower's own; lr if not given
    optimizer: str = "adamw"  # or MODULE:CLASS, called with the parameter groups
    weight_decay: NonNegativeFloat = 0.0  # not on norms and biases
    betas: tuple[Fraction, ...] = (0.9, 0.999)  # of AdamW
    warmup_ratio: Fraction = 0.03  # share of the steps with a rising rate
    warmup_steps: NonNegativeInt = 0  # the same in steps; wins over the ratio
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warmup
    max_grad_norm: NonNegativeFloat = 1.0  # gradients are scaled down to this norm; 0 for none
    epochs: PositiveFloat = 1.0  # passes over the data
    max_steps: NonNegativeInt = (
        0  # stop after so many optimizer steps, however many passes they are; 0 for epochs alone
    )
    batch_size: PositiveInt = 8  # rows in a micro-batch of one rank
    grad_accum: PositiveInt = 1  # micro-batches in an optimizer step
    auto_batch_size: bool = (
        False  # the largest micro-batch that fits, with the accumulation that keeps the step
    )
    max_length: PositiveInt | None = (
        None  # tokens in a row; 2048 if not given, or the model's context if that is less
    )
    too_long: Literal["error", "shorten"] = (
        "error"  # a longer record stops the run, or loses its last turns
    )
    group_by_length: bool = (
        False  # rows of like length in a micro-batch, with pictures or without in a step
    )
    packing: bool = False  # several records in a row of max_length tokens, each seeing itself alone
    precision: Literal["bf16", "fp16", "fp32"] = (
        "bf16"  # of the computation; what is trained is always fp32
    )
    gradient_checkpointing: bool = False  # compute blocks twice and keep little of them
    neftune_alpha: NonNegativeFloat = 0.0  # uniform noise on the embedded words; 5 is usual
    compile: bool = False  # torch.compile the blocks
    cpu_offload: bool = False  # weights and optimizer in CPU memory, a block at a time on the GPU
    max_skips: PositiveInt = (
        10  # steps with a loss or gradient that is not finite, until the run stops
    )
    # the surroundings
    image_aspect_ratio: Literal["pad", "crop"] | None = (
        None  # what the checkpoint records if not given
    )
    template: str | None = None  # chat template; the checkpoint's if not given
    exif: bool = False  # turn pictures as their orientation tag says
    workers: NonNegativeInt = 0  # processes that load pictures
    seed: Seed = 0  # of weights, order and dropout
    deterministic: bool = False  # only operations that give the same bits every time
    device: str = "auto"  # cpu, cuda, cuda:N
    timeout: Annotated[float, 1.0, 1e6] = (
        600.0  # seconds a rank waits for the others before the job ends
    )
    save_every: str = "30m"  # steps (500), minutes (30m) or epoch between checkpoints; 0 for none
    save_only_model: bool = (
        False  # checkpoints of the trained weights alone: small, and no run can go on from them
    )
    keep: PositiveInt = 2  # newest checkpoints that are kept, beside the best
    log_every: NonNegativeInt = 10  # steps between progress lines
    log: tuple[
        Literal["tensorboard", "wandb"], ...
    ] = ()  # copies of the metrics: tensorboard, wandb
    eval_every: NonNegativeInt = 0  # steps between evaluations; 0 for before and after alone
    eval_batch_size: PositiveInt = 16  # rows generated at a time
    eval_metrics: tuple[str, ...] = ("exact_match",)  # of the answers; the loss is always there
    best_metric: str | None = (
        # keep the checkpoint that is best by it, and end with that: loss, or one of the metrics
        None
    )
    early_stopping: NonNegativeInt = (
        0  # evaluations without gain in best_metric until the run ends; 0 for none
    )
    num_beams: PositiveInt = 1  # in the evaluation; 1 is greedy
    max_new_tokens: PositiveInt = 128  # tokens of an answer in the evaluation
    samples: NonNegativeInt = 5  # answers shown before and after
    dry_run: bool = False  # show what would be done, without weights, and stop


@dataclass
class At:
    """Where a run stands; every checkpoint keeps it."""

    step: int = 0  # optimizer steps done
    evaluated: int = -1  # the step of the last evaluation
    best: float | None = None  # of --best-metric, the larger the better
    best_step: int = -1
    waited: int = 0  # evaluations since then
    skipped: int = 0  # steps with a loss or gradient that is not finite
    lost: int = 0  # of them, those since the last good step


def main(argv: list[str]) -> int | None:
    if not any(a.split("=")[0] in ("--recipe", "--data") for a in argv):
        argv = ["--recipe", "toy", *argv]
    knobs = parse(Knobs, argv, "Fine-tune a LLaVA.", recipes=RECIPES)
    check_settings(knobs, argv)
    with flags(knobs), Signals() as signals:
        from llava_min.evaluation.predict import check_metrics
        from llava_min.parallel.ranks import all_gather, assert_same_on_ranks, start
        from llava_min.training import run_folder
        from llava_min.training.dry_run import dry_run
        from llava_min.training.log import check_packages

        with start(knobs.device, knobs.timeout) as world:
            try:
                assert_same_on_ranks(world, "the settings", asdict(knobs))
                check_metrics(knobs.eval_metrics, knobs.best_metric)
                check_packages(knobs.log)
                if knobs.dry_run:
                    return dry_run(knobs, world, typed="data" in names_of(argv))
                if knobs.cpu_offload and world.device.type == "cpu":
                    raise UserError(
                        "--cpu-offload: the weights are in the CPU's memory anyway; leave it out, "
                        "or give --device cuda"
                    )
                name = Path(knobs.recipe or "run").stem
                found = (
                    run_folder.place(knobs.out, knobs.resume, Path("runs"), name)
                    if world.rank == 0
                    else None
                )
                out, resumed = all_gather(world, found)[0]
                if knobs.resume != "never" and (
                    Path(out, "adapter").exists() or Path(out, "model").exists()
                ):
                    check_finished(Path(out), knobs, argv, world.size)
                    return info(f"{out}: already finished") if world.rank == 0 else None
                check_begun(Path(out), knobs)
                with run_folder.run_folder(Path(out), world):
                    return train(
                        knobs, world, signals, Path(out), Path(resumed) if resumed else None
                    )
            except Interrupted:
                info("stopped before the first step; there is nothing to save")
                sys.exit(signals.code)


def train(knobs: Knobs, world, signals: Signals, out: Path, resumed: Path | None) -> None:
    """One process of a run into the folder `out`, which goes on from the checkpoint `resumed` if
    there is one.
    """
    import torch

    from llava_min.adapter import adapter_names, save_adapter
    from llava_min.data.dataset import Dataset
    from llava_min.data.loader import loader
    from llava_min.data.records import SkippedRecords, count_records, read_records
    from llava_min.data.sampler import plan as make_plan
    from llava_min.data.sampler import records_of
    from llava_min.evaluation.predict import check_room, on_held_out
    from llava_min.fast.cpu_linear import upcast_linears
    from llava_min.load import open_checkpoint, write_model
    from llava_min.lora import init_lora
    from llava_min.parallel.fsdp import full_state, shard
    from llava_min.parallel.ranks import all_gather, all_reduce_sum, any_rank, assert_same_on_ranks
    from llava_min.report import write_run_report
    from llava_min.toy import draw as toy
    from llava_min.training import run_folder
    from llava_min.training.batch_size import (
        count_supervised,
        largest_batch,
        out_of_memory,
        row_length,
        try_step,
    )
    from llava_min.training.log import Log, peak_memory, show_samples
    from llava_min.training.optim import (
        LossScale,
        clip_gradients,
        lr_factor,
        make_optimizer,
        parameter_groups,
    )
    from llava_min.training.trainable import check_gradients, parameter_table, setup_lora
    from llava_min.training.wrap import add_neftune, compile_blocks, enable_gradient_checkpointing
    from llava_min.util.files import new_folder, write_json
    from llava_min.weights import DTYPES

    device, compute, alone = world.device, DTYPES[knobs.precision], world.size == 1
    if knobs.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    # ---- the model, without its weights: what is wrong with it or with the data is found before
    # they are read
    ready = open_checkpoint(
        knobs.model, image_aspect_ratio=knobs.image_aspect_ratio, template=knobs.template
    )
    model, processor = ready.model, ready.processor
    lora = setup_lora(model, knobs, device)
    knobs.max_length = row_length(knobs.max_length, model.config.text.context)
    if world.rank == 0:
        print(parameter_table(model), file=sys.stderr)

    # ---- the data
    data, eval_data, images = knobs.data, knobs.eval_data, knobs.image_folder
    if data.startswith("toy:"):
        if world.rank == 0 and not (out / "data").exists():
            toy.write(
                out / "data", data.removeprefix("toy:"), knobs.toy_train, knobs.toy_val, knobs.seed
            )
        assert_same_on_ranks(world, "the toy data", True)
        data, eval_data, images = str(out / "data" / "train.json"), out / "data" / "val.json", None
    skips = (
        SkippedRecords(out / "skipped.txt" if world.rank == 0 else None) if knobs.skip_bad else None
    )
    records = read_records(data, images, skips)
    held_out = read_records(eval_data, images) if eval_data else []

    # ---- the order of the data, and the rate at each step
    options = {"max_length": knobs.max_length, "exif": knobs.exif, "too_long": knobs.too_long}
    dataset, validation = (
        Dataset(records, processor, **options),
        Dataset(held_out, processor, **options),
    )
    check_room(model, processor, held_out, knobs.max_new_tokens)
    lengths, rows, batch_size = (
        dataset.lengths(exact=knobs.packing),
        knobs.batch_size * knobs.grad_accum,
        knobs.batch_size,
    )
    deal = lambda batch_size: make_plan(
        lengths,
        batch_size,
        rows // batch_size,
        world.size,
        knobs.epochs,
        knobs.max_steps,
        knobs.seed,
        group_by_length=knobs.group_by_length,
        packing=knobs.max_length if knobs.packing else 0,
    )
    plan = deal(batch_size)
    warmup = knobs.warmup_steps or round(knobs.warmup_ratio * len(plan))
    if warmup > len(plan):
        raise UserError(
            f"--warmup-steps {warmup}: the run has only {len(plan)} steps; lower it, or raise "
            "--epochs"
        )

    # where most mistakes with pictures show
    next(loader(dataset, plan[0][world.rank][:1], packing=knobs.packing, skip=knobs.skip_bad))
    identity = run_folder.identity_of(ready, data, records, knobs, rows * world.size, len(plan))
    assert_same_on_ranks(world, "code, data or model", identity)

    # ---- the weights, what is frozen in the compute dtype and what is trained in fp32, and what is
    # put on them
    shard(
        model,
        world,
        compute=compute,
        full=knobs.train in ("full", "freeze_vision"),
        cpu_offload=knobs.cpu_offload,
    )
    ready.load_weights(compute, device, offload=knobs.cpu_offload)
    init_lora(model, knobs.seed)
    upcast_linears(model)
    if knobs.compile:
        compile_blocks(model)
    if knobs.gradient_checkpointing:
        enable_gradient_checkpointing(model, dropout=knobs.lora_dropout > 0)
    if knobs.neftune_alpha:
        add_neftune(model, knobs.neftune_alpha)
    trainable = [p for p in model.train().parameters() if p.requires_grad]
    autocast = lambda: torch.autocast(device.type, compute, enabled=compute != torch.float32)

    def loss_of(batch: dict) -> torch.Tensor:
        """Summed over the supervised tokens of a batch."""
        with autocast():
            return model.loss(**{k: v.to(device, non_blocking=True) for k, v in batch.items()})

    if knobs.auto_batch_size:
        longest = [(i,) for i in sorted(range(len(lengths)), key=lambda i: -abs(lengths[i]))]
        fits = lambda n: try_step(lambda: loss_of(next(loader(dataset, [longest[:n]]))[0]), model)
        batch_size = largest_batch(rows, lambda n: not any_rank(world, not fits(n)))
        plan = deal(batch_size)
    groups = parameter_groups(
        model, knobs.lr, knobs.weight_decay, knobs.projector_lr, knobs.vision_lr
    )
    optimizer, scale = (
        make_optimizer(knobs.optimizer, groups, knobs.betas),
        LossScale(knobs.precision == "fp16"),
    )

    # ---- where the run stands: at its beginning, or where the checkpoint left it
    at = At()
    run_folder.reseed(knobs.seed, 0, world.rank)
    if resumed:
        before = run_folder.resume(resumed, identity, model, optimizer, world, knobs.seed)
        at = At(**before["at"])
        vars(scale).update(before["scale"])
        if resumed.parent != (out / "checkpoints").resolve():
            # the best so far stays in the other run's folder
            at.best, at.best_step, at.waited, at.evaluated = None, -1, 0, -1
    epochs = {
        k
        for k, seen in enumerate(accumulate(len(records_of(step)) for step in plan), 1)
        if seen % len(dataset) == 0
    }
    saver = run_folder.Saver(
        out, world, knobs.save_every, knobs.keep, epochs, at.step if resumed else -1, at.best_step
    )
    if world.rank == 0 and knobs.save_every != "0":
        run_folder.check_space(out, model, knobs.save_only_model)
    settings = asdict(knobs) | {
        "out": str(out),
        "batch_size": batch_size,
        "grad_accum": rows // batch_size,
        "ranks": world.size,
        "image_aspect_ratio": processor.image_config.aspect,
        "template": processor.template_name,
    }
    if world.rank == 0:
        write_json(out / "config.json", settings)
    log = Log(
        out if world.rank == 0 else None, len(plan), at.step if resumed else -1, knobs.log, settings
    )
    log.say(
        f"data {identity['training data'][:12]}, model {identity['base model'][:12]}: "
        f"{count_records(dataset.records)}, {len(plan)} steps "
        f"of {rows * world.size} rows, into {out}"
        + (f", going on from step {at.step}" if resumed else "")
    )

    def export(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """What others read: a PEFT adapter, or a whole model."""
        if knobs.train == "lora":
            save_adapter(model, lora, folder, knobs.model, weights)
            processor.save_settings(folder)
        else:
            write_model(model, processor, folder, compute, weights)

    result, names = (
        ("adapter", set(adapter_names(model))) if knobs.train == "lora" else ("model", None)
    )

    def save() -> None:
        # then an adapter is all that the checkpoint has
        lora_run, only = knobs.train == "lora", knobs.save_only_model
        weights = full_state(model, names) if lora_run else {}
        saver.save(
            at.step,
            at.best_step,
            None if lora_run and only else model,
            None if only else optimizer,
            {"identity": identity, "at": asdict(at), "scale": vars(scale), "model": knobs.model},
            {result: lambda folder: export(folder, weights)} if lora_run else {},
        )

    def evaluate() -> None:
        """Loss, answers and metrics on the held-out records; with --best-metric, a checkpoint if
        they are the best so far.
        """
        with signals.interruptible(alone and not knobs.cpu_offload), autocast():
            scores, rows, said = on_held_out(
                model,
                validation,
                held_out,
                loss_of,
                world,
                knobs.eval_metrics,
                knobs.eval_batch_size,
                lambda: signals.requested,
                num_beams=knobs.num_beams,
                max_new_tokens=knobs.max_new_tokens,
            )
        log.write(
            step=at.step,
            **{f"eval_{name}": value for name, value in scores.items()},
            eval_cut_answers=sum(row.get("stopped") == "limit" for row in rows),
            **({"remarks": said} if said else {}),
        )
        told = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        log.say(f"step {at.step}: {told} on {len(rows)} held-out records")
        for line in said:
            log.say(f"step {at.step}: {line}")
        log.samples(at.step, rows[: knobs.samples], held_out)
        if world.rank == 0:
            write_run_report(out)
        at.evaluated = at.step
        if knobs.best_metric:
            if knobs.best_metric not in scores:
                raise UserError(
                    f"--best-metric: {knobs.best_metric} is not among {', '.join(scores)}, which "
                    "the evaluation gave; give one"
                )
            value = -scores["loss"] if knobs.best_metric == "loss" else scores[knobs.best_metric]
            if at.best is None or value > at.best:
                at.best, at.best_step, at.waited = value, at.step, 0
                save()
            else:
                at.waited += 1

    def failed() -> bool:
        """The run ends with steps that changed no weight, and has no best checkpoint to end with."""
        return at.lost > 0 and at.step == len(plan) and not knobs.best_metric

    def evaluation_due() -> bool:
        step, every = at.step, knobs.eval_every
        return (
            bool(held_out)
            and not failed()
            and at.evaluated < step
            and (step in (0, len(plan)) or every > 0 and step % every == 0)
        )

    # ---- the loop
    todo = loader(
        dataset,
        [micro for step in plan[at.step :] for micro in step[world.rank]],
        knobs.workers,
        packing=knobs.packing,
        skip=True,
        pin_memory=device.type == "cuda",
    )
    named = lambda step: ", ".join(shorten(dataset.records[i].id) for i in records_of(step)[:8])
    tokens, pictures, busy, first = 0, 0, 0.0, True
    signals.raises_now = False  # from here on there is something to lose
    try:
        if evaluation_due():
            evaluate()
        while at.step < len(plan) and not (
            knobs.early_stopping and at.waited >= knobs.early_stopping
        ):
            step, begun = plan[at.step], time.perf_counter()
            with signals.interruptible(alone):
                micros, faults = zip(*(next(todo) for _ in step[world.rank]))
            bad, due = sum(faults, []), world.rank == 0 and saver.due(at.step)
            supervised, stop, due, n_bad = all_reduce_sum(
                world, sum(map(count_supervised, micros)), signals.requested, due, len(bad)
            )
            if due or n_bad and not skips and at.step > 0 and saver.lacks(at.step):
                save()
            if stop:
                raise Interrupted
            if n_bad:
                bad = sum(all_gather(world, bad), [])
                if not skips:
                    raise UserError(bad[0])
                skips.add(bad)
                skips.write()
            if not supervised:
                raise UserError(
                    f"step {at.step + 1}: no token to learn from in records {named(step)}; mend or "
                    "remove them"
                )
            factor = lr_factor(at.step, len(plan), warmup, knobs.schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            loss = torch.zeros((), device=device)
            for batch in micros:  # a token counts the same, whatever micro-batch it is in
                part = loss_of(batch) / supervised
                (part * scale.scale).backward()
                loss += part.detach()
            norm = clip_gradients(trainable, scale.scale, knobs.max_grad_norm)
            loss, norm = all_reduce_sum(world, loss)[0], float(norm)
            if finite := math.isfinite(loss + norm):
                if first:
                    check_gradients(model)
                    first = False
                optimizer.step()
                at.lost = 0
            elif not scale.searching or not math.isfinite(loss):
                at.skipped += 1
                at.lost += 1
            scale.update(finite)
            optimizer.zero_grad(set_to_none=True)
            at.step += 1
            if not finite:
                log.write(step=at.step, skipped=[dataset.records[i].id for i in records_of(step)])
                log.say(
                    f"warning: step {at.step}: loss {loss:.3g} and gradient norm {norm:.3g}; no "
                    "weight was changed; records "
                    f"{named(step)}"
                )
            if at.skipped >= knobs.max_skips:
                raise UserError(
                    f"step {at.step}: {at.skipped} steps had a loss or gradient that is not "
                    "finite, the last with "
                    f"records {named(step)}; lower --lr, mend them, or try --precision "
                    f"{'bf16' if scale.enabled else 'fp32'}"
                    + (f"; the last checkpoint is {out / 'last'}" if saver.saved >= 0 else "")
                )

            busy += time.perf_counter() - begun
            tokens += sum(batch["input_ids"].numel() for batch in micros)
            pictures += sum(len(batch.get("pixel_values", ())) for batch in micros)
            if knobs.log_every and (at.step % knobs.log_every == 0 or at.step == len(plan)):
                tokens, pictures = all_reduce_sum(world, tokens, pictures)
                log.step(
                    at.step,
                    loss=loss,
                    lr=knobs.lr * factor,
                    grad_norm=norm,
                    tokens_per_s=tokens / busy,
                    pictures_per_s=pictures / busy,
                    peak_gb=peak_memory(device),
                )
                tokens, pictures, busy = 0, 0, 0.0
            if evaluation_due():
                evaluate()
        if saver.lacks(at.step):
            save()
    except Interrupted:
        if saver.saved != at.step:
            save()
        log.say(
            f"saved step {at.step}, "
            + (
                "from which no run can go on (--save-only-model)"
                if knobs.save_only_model
                else f"resume with the same command and --resume auto --out {out}"
            )
            + f"; python -m llava_min finish {out} DIR makes its {result}"
        )
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.exit(signals.code)
    except torch.OutOfMemoryError:
        raise out_of_memory(at.step + 1, batch_size, rows) from None

    # ---- what came of it
    if failed():
        raise UserError(
            f"step {at.step}: the last {at.lost} steps had a loss or gradient that is not finite, "
            f"so no {result} is written; "
            "begin anew with a lower --lr, or mend the records that metrics.jsonl names"
            + (f"; the last checkpoint is {out / 'last'}" if saver.saved >= 0 else "")
        )
    best = out / "best" if knobs.best_metric and at.best_step != at.step else None
    if best:
        log.say(f"{knobs.best_metric} was best at step {at.best_step}: ending with that")
        state = run_folder.verify(best)
        if result == "model":
            run_folder.restore(best, state, model, None, world)
    weights = full_state(model, names, compute if result == "model" else None)
    if world.rank == 0:
        with new_folder(out / result) as folder:
            if best and result == "adapter":
                shutil.copytree(best / result, folder, dirs_exist_ok=True)
            else:
                export(folder, weights)
        show_samples(out, at.best_step if knobs.best_metric else at.step)
        write_run_report(out)
    log.say(f"saved {out / result}")


if __name__ == "__main__":
    run(main)
