"""Rules on rates, steps and precision: what the published runs use, what a number type can hold."""

from llava_min.checks.doctor.facts import Finding, Findings, Run

RATES = {"projector": 1e-3, "full": 2e-5, "lora": 2e-4}  # of LLaVA-1.5, scripts/v1_5
LIKE_LLAVA = ("pretrain", "finetune", "lora", "task", "two-24gb")  # recipes with LLaVA's batch


def is_tiny(run: Run) -> bool:
    """The bundled model, or one made like it: nothing is published for it."""
    return run.kind == "train.py" and run.text("model").startswith("tiny")


def rate_too_high(run: Run) -> Findings:
    """LLaVA-1.5 is tuned in full at 2e-5 (scripts/v1_5/finetune.sh). At a rate for LoRA a whole
    model forgets what it knew (LLaVA#1301: divide the rate by 10)."""
    lr = run.number("lr")
    if run.trains == "full" and lr and lr >= 1e-4 and not is_tiny(run):
        yield Finding(
            "error", run["lr"], f"{run['lr'].text}, and the language model is trained whole", "2e-5"
        )


def rate_too_low(run: Run) -> Findings:
    """LLaVA-1.5 takes 2e-4 for LoRA (scripts/v1_5/finetune_lora.sh) and 1e-3 for the projector
    alone (pretrain.sh): what begins at zero hardly moves at a rate for full tuning."""
    lr, kind = run.number("lr"), run.trains
    if (
        lr
        and kind in ("lora", "projector")
        and lr <= {"lora": 5e-5, "projector": 2e-4}[kind]
        and not is_tiny(run)
    ):
        what = "by LoRA" if kind == "lora" else "the projector alone"
        yield Finding(
            "warning", run["lr"], f"{run['lr'].text}, and the run trains {what}", f"{RATES[kind]:g}"
        )


def projector_rate(run: Run) -> Findings:
    """Beside LoRA the projector is trained whole; LLaVA-1.5 gives it a rate of its own, 2e-5
    (scripts/v1_5/finetune_lora.sh)."""
    frozen = run.value("train_projector") is False or run.value("freeze_projector") is True
    lr, own = run.number("lr"), run["projector_lr"]
    if (
        own
        and own.value is None
        and run.trains == "lora"
        and not frozen
        and lr
        and lr >= 1e-4
        and not is_tiny(run)
    ):
        flag = "--projector-lr" if run.kind == "train.py" else "--mm_projector_lr"
        yield Finding(
            "warning", own, f"{own.text}: it learns at the {lr:g} of LoRA", f"{flag} 2e-5"
        )


def batch(run: Run) -> Findings:
    """The published rates belong to 128 rows a step, in stage 1 to 256 (LLaVA's README): smaller
    steps are noisier at the same rate, larger ones are fewer."""
    like = run.kind == "llava" or run.text("recipe").rpartition("/")[2].startswith(LIKE_LLAVA)
    published = 256 if run.trains == "projector" else 128
    if not like or run.kind == "hf" or run.rows in (None, published) or not run.trains:
        return
    rows, accumulated = run["batch_size"], run["grad_accum"]
    each = run.gpus * int(rows.value)
    flag = "--grad-accum" if run.kind == "train.py" else "--gradient_accumulation_steps"
    far = max(run.rows / published, published / run.rows) >= 4
    yield Finding(
        "warning" if far else "note",
        rows,
        f"{rows.value} rows x {accumulated.value} accumulated x {run.gpus} GPUs = "
        f"{run.rows} rows a step; published: {published}",
        f"{flag} {published // each}"
        if published % each == 0
        else f"rows x accumulated x GPUs = {published}",
    )


def warmup_longer_than_run(run: Run) -> Findings:
    """The run ends within its warmup: the rate never reaches its peak, and never falls. LLaVA
    warms up for 3 % of the steps."""
    warmup, most = run.number("warmup_steps") or 0, run.number("max_steps") or 0
    if 1 <= most <= warmup:
        yield Finding(
            "error",
            run["warmup_steps"],
            f"{run['warmup_steps'].text}, and {run['max_steps'].text}",
            f"at most {max(1, most * 3 // 100):.0f} steps",
        )
    fact = "warmup_steps" if 0 < warmup < 1 else "warmup_ratio"  # transformers 5: a share, too
    share = run.number(fact) or 0
    if share > 0.5 and warmup < 1:
        yield Finding(
            "error" if share >= 1 else "warning",
            run[fact],
            f"{run[fact].text}: {share:.0%} of the steps",
            "0.03",
        )


def two_warmups(run: Run) -> Findings:
    """The steps win, and the ratio is not used."""
    ratio = run.written("warmup_ratio")
    if (run.number("warmup_steps") or 0) >= 1 and ratio and ratio.value and run.kind != "train.py":
        yield Finding("note", ratio, f"{ratio.text}, with {run['warmup_steps'].text}", "give one")


def two_precisions(run: Run) -> Findings:
    """transformers stops: at most one of them can be true."""
    if run.value("fp16") is True and run.value("bf16") is True:
        yield Finding(
            "error", run["fp16"], f"{run['fp16'].text}, and {run['bf16'].text}", "bf16 alone"
        )


def fp16_weights(run: Run) -> Findings:
    """Small updates round to nothing in fp16, and the gradient scaler stops: "Attempting to
    unscale FP16 gradients". PEFT makes LoRA's tensors fp32, but copies modules_to_save as they are
    (peft#341, transformers#23165)."""
    dtype, saved = run["dtype"], run.written("saved_modules")
    half = dtype and str(dtype.value).removeprefix("torch.") in ("float16", "half", "fp16")
    if run.kind != "hf" or not half or run.value("fp16") is not True:
        return
    if run.trains == "lora":
        whole = saved if saved and saved.value else None if run.value("cast") else run["cast"]
        learns = whole.text if whole else ""
    else:
        learns = "the whole model" if run.value("lora") is False else ""
    if learns:
        yield Finding(
            "error",
            dtype,
            f"{dtype.text}, and what learns is fp16 too: {learns}",
            'dtype = "bfloat16" and bf16 = true',
        )


def fp16_without_masters(run: Run) -> Findings:
    """LLaVA casts the whole model to fp16 before it adds LoRA, and only DeepSpeed keeps fp32
    copies of what learns (LLaVA#463: the projector is inf at step 1)."""
    if (
        run.kind == "llava"
        and run.value("fp16") is True
        and run.trains == "lora"
        and not run.written("deepspeed")
    ):
        yield Finding(
            "error", run["fp16"], f"{run['fp16'].text}, without --deepspeed", "--bf16 True"
        )


def fp16_range(run: Run) -> Findings:
    """fp16 ends at 65,504, and LLaVA's projector goes beyond: inf, NaN, or loss 0 (LLaVA#463,
    LLaVA#1684, transformers#27212)."""
    at = run["fp16"]
    if at and at.value is True and run.value("bf16") is not True:
        yield Finding("warning", at, at.text, "bf16, which GPUs have from Ampere on")


def all_fp32(run: Run) -> Findings:
    """28 GB of weights for a 7B, and products at a fraction of the speed; the published runs are
    bf16."""
    if run.kind == "llava" and run.value("fp16") is False and run.value("bf16") is False:
        yield Finding(
            "warning", run["bf16"], f"{run['bf16'].text}, and {run['fp16'].text}", "--bf16 True"
        )


def means_of_means(run: Run) -> Findings:
    """LLaVA (transformers 4.37) averages the means of micro-batches: a short answer in a small one
    counts more (transformers#37766). train.py divides once, by the tokens of the step."""
    if run.kind == "llava" and (run.number("grad_accum") or 0) > 1:
        yield Finding(
            "note",
            run["grad_accum"],
            run["grad_accum"].text,
            "a larger --per_device_train_batch_size, where it fits",
        )


def reentrant(run: Run) -> Findings:
    """A reentrant checkpoint of a block with frozen inputs has no gradient: "None of the inputs
    have requires_grad=True" (LLaVA#1475, TinyLLaVA#144, unsloth#5039)."""
    at = run.written("reentrant")
    if at and at.value is True and run.value("checkpointing") is not False and run.trains != "full":
        yield Finding("warning", at, at.text, "use_reentrant = false")


RULES = (
    rate_too_high,
    rate_too_low,
    projector_rate,
    batch,
    warmup_longer_than_run,
    two_warmups,
    two_precisions,
    fp16_weights,
    fp16_without_masters,
    fp16_range,
    all_fp32,
    means_of_means,
    reentrant,
)
