"""Rules on what the model reads and learns from: templates, labels, lengths, images."""

from llava_min.checks.doctor.facts import DIALECTS, Finding, Findings, Run

PATCHES = 576  # tokens of an image: (336 / 14) squared
LANGUAGE_MODELS = ("vicuna", "llama-2", "llama2", "meta-llama", "mistral", "qwen")


def takes_images(run: Run) -> bool:
    """Whether the input says so: by the model's name, or by how its images are prepared."""
    return run.is_llava or run["pad"] is not None


def no_stop_token(run: Run) -> Findings:
    """The llava-hf chat template has no </s>, so a stop is never learnt: the tuned model repeats,
    or writes the next question itself (LLaVA#682, LlamaFactory#2884, LlamaFactory#5145; TRL warns
    that it "may not learn to stop")."""
    own = run["template_text"]
    ends = own and isinstance(own.value, str) and ("</s>" in own.value or "eos_token" in own.value)
    if run.kind == "hf" and run.trl and run.is_llava and not ends and not run["template_path"]:
        at = own or run["model"]
        yield Finding(
            "error",
            at,
            f"{at.text}, trained by SFTTrainer: answers do not end in </s>",
            "a chat_template with {{ eos_token }} after answers; train.py appends </s>",
        )


def plain_template(run: Run) -> Findings:
    """plain is the template of stage 1: it drops the question, and its answers end in a newline
    and not in </s> (preprocess_plain in llava/train/train.py)."""
    template = run.written("template")
    if template and template.value == "plain" and run.trains in ("lora", "full"):
        flag = "--version v1" if run.kind == "llava" else "--template vicuna_v1"
        yield Finding(
            "error", template, f"{template.text}, in a run that tunes the language model", flag
        )


def loss_on_questions(run: Run) -> Findings:
    """On conversations SFTTrainer then learns system and user text as well as answers; LLaVA
    learns answers alone (trl#1880, trl#3751, VLM-R1#123)."""
    answers, completions = run["answers_only"], run["completions_only"]
    if run.kind == "hf" and run.trl and not answers.value and not completions.value:
        yield Finding(
            "warning",
            answers,
            f"{answers.text}, and {completions.text}",
            "prompt-completion data with completion_only_loss = true, or labels of -100",
        )


def refused_by_trl(run: Run) -> Findings:
    """SFTTrainer refuses it for vision-language models (assistant_only_loss: trl#3751; packing:
    trl#4339, trl#6545)."""
    for fact in ("answers_only", "packing", "padding_free"):
        at = run.written(fact)
        if run.kind == "hf" and run.trl and at and at.value is True and takes_images(run):
            yield Finding(
                "error",
                at,
                f"{at.text}, with a model that takes images",
                "false; train.py masks questions, and has --packing",
            )


def columns_dropped(run: Run) -> Findings:
    """The Trainer drops every column that forward() does not name, messages and images among them,
    before the collator sees a row."""
    at = run["remove_unused"]
    custom = run.kind == "llava" or run.kind == "hf" and run.value("skip_prepare") is True
    if custom and at.value is True:
        yield Finding(
            "error", at, f"{at.text}, with a collator of its own", "remove_unused_columns = false"
        )


def image_longer_than_row(run: Run) -> Findings:
    """An image takes 576 tokens. A row cut within them stops the run, "Image features and image
    tokens do not match", and one cut behind them has lost its answer (transformers#36002,
    unsloth#3783)."""
    length = run.number("max_length")
    ours = run.kind == "train.py" and any(
        s in run.text("model").lower() for s in ("llava", "7b", "13b")
    )
    if length is None or not (
        ours or run.kind == "llava" or run.kind == "hf" and takes_images(run)
    ):
        return
    at, room = run["max_length"], max(0, int(length) - PATCHES)
    if room < 448 or run.kind == "hf" and room <= 448:  # 448: what SFTConfig's default leaves
        yield Finding(
            "error" if room == 0 else "warning" if room < 128 else "note",
            at,
            f"{at.text}: {room} tokens beside the image",
            "2048, as LLaVA-1.5",
        )


def modalities_mixed(run: Run) -> Findings:
    """Rows with and without images then share a step: they are padded, and under ZeRO-3 a rank
    with images waits for one without (LLaVA#699, LLaVA#1746, LLaVA#1395). The published runs sort
    them."""
    at = run["by_length"]
    if run.kind == "llava" and run.trains in ("lora", "full") and at.value is False:
        zero3 = "zero3" in str(run.value("deepspeed")).lower()
        yield Finding(
            "warning" if zero3 else "note",
            at,
            at.text,
            "--group_by_modality_length True, if some rows have no image",
        )


def connector(run: Run) -> Findings:
    """LLaVA-1.5's projector has two layers and reads the last but one of the tower's, without
    tokens around the image (scripts/v1_5). Another setting does not fit its weights, or reads what
    they were not trained on."""
    published = {
        "layer": -2,
        "projector_type": "mlp2x_gelu",
        "patch_token": False,
        "start_end": False,
    }
    for fact, value in published.items():
        at = run[fact]
        if (
            run.kind == "llava"
            and run.written("tower")
            and at.value != value
            and "$" not in str(at.value)
        ):
            name = DIALECTS["llava"][fact].names[0]
            yield Finding("warning", at, at.text, f"--{name} {value}")


def images_cropped(run: Run) -> Findings:
    """LLaVA-1.5 was tuned on images padded to a square. Cropped ones lose what is outside the
    middle square, and outputs differ (LLaVA#678, LLaVA#1738, transformers#33175)."""
    if run.aspect is None or run.aspect[0] != "crop" or run.trains == "projector":
        return
    at = run.aspect[1]
    if run.kind == "llava":
        yield Finding("warning", at, f"{at.text}, in stage 2", "--image_aspect_ratio pad")
    elif run.kind == "hf" and run.is_llava and not run.adapter:
        yield Finding("warning", at, at.text, "do_pad = true, in training and in serving")


def padded_on_the_right(run: Run) -> Findings:
    """A decoder that is padded on the right goes on behind the padding: batched answers differ
    from single ones, or are empty (transformers#32268, LLaVA#709)."""
    side = run.written("padding_side")
    if side and side.value == "right" and run.what in ("a model folder", "a processor's settings"):
        yield Finding(
            "warning",
            side,
            f"{side.text}, in a folder to generate with",
            'padding_side = "left", to generate',
        )


def projector_random(run: Run) -> Findings:
    """A language model has no projector, and stage 2 does not make one from random numbers:
    LLaVA's scripts load stage 1's (scripts/v1_5/finetune_lora.sh)."""
    name = run.text("model").lower()
    bare = "llava" not in name and any(model in name for model in LANGUAGE_MODELS)
    if (
        run.kind == "llava"
        and run.trains in ("lora", "full")
        and run.written("tower")
        and bare
        and not run.value("projector")
    ):
        yield Finding(
            "error",
            run["model"],
            f"{run['model'].text}, and {run['projector'].text}",
            "--pretrain_mm_mlp_adapter .../mm_projector.bin, or start from a LLaVA",
        )


RULES = (
    no_stop_token,
    plain_template,
    loss_on_questions,
    refused_by_trl,
    columns_dropped,
    image_longer_than_row,
    modalities_mixed,
    connector,
    images_cropped,
    padded_on_the_right,
    projector_random,
)
