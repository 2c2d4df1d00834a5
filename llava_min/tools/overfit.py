"""`python -m llava_min overfit DATA`: a few records learned by heart, or the stage at fault.

A pipeline that is sound learns a handful of records until it gives them back word for word. One
that does not is broken, and where it stops says where: before training, in the labels or in the
prompt; in training, in the gradients or in the learning; after it, in the generation. The exit code
is 0 when all answers come back, else 1.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llava_min.checks.ranges import PositiveFloat, PositiveInt
from llava_min.config import IGNORE, LINEARS
from llava_min.errors import UserError, escape_controls, info, label, shorten
from llava_min.util.cli import PathArg, flags, parse

SURE = 0.5  # probability above which a token is the likeliest of all
STUCK = 0.5  # of the first loss: what has not even come so far has learned nothing


@dataclass
class Config:
    data: list[str] = field(default_factory=list)  # a file of records, as train.py --data takes it
    n: PositiveInt = 8  # how many of its first records; also -n
    image_folder: PathArg | None = None  # where the images lie; the data file's own if not given
    model: PathArg = "tiny"  # a folder, a hub id, or tiny
    train: str = "lora"  # as train.py --train
    lora_r: PositiveInt = 32  # rank
    lora_targets: tuple[str, ...] = LINEARS  # leaf names in the language model
    lr: PositiveFloat | None = None  # constant after ten steps; 1e-3 for LoRA, else 2e-4
    steps: PositiveInt = 300  # at most
    max_length: PositiveInt = 2048  # tokens in a row
    precision: Literal["fp32", "bf16"] = "fp32"  # of the computation
    template: str | None = None  # chat template; the checkpoint's if not given
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # what the checkpoint records
    device: str = "auto"  # cpu, cuda, cuda:N


class Fault(Exception):
    """What is wrong, and at which stage."""

    def __init__(self, stage: str, text: str):
        super().__init__(text)
        self.stage = stage


def main(argv: list[str]) -> int:
    argv = ["--n" if a == "-n" else a for a in argv]
    config = parse(Config, argv, "Learn a few records by heart.", positional="data")
    if len(config.data) != 1:
        raise UserError("DATA: give one file of records")
    with flags(config):
        try:
            run(config)
        except Fault as fault:
            print(f"{fault.stage}: {escape_controls(fault)}")
            return 1
    return 0


def run(config: Config) -> None:
    """All stages; raises Fault at the first that fails."""
    import torch

    from llava_min.checks.load import check_llava
    from llava_min.data.dataset import Dataset, collate
    from llava_min.data.records import read_records
    from llava_min.load import open_checkpoint
    from llava_min.lora import LoRAConfig, init_lora
    from llava_min.parallel.ranks import pick_device
    from llava_min.training.targets import add_lora
    from llava_min.training.trainable import set_trainable
    from llava_min.weights import DTYPES

    torch.manual_seed(0)
    device = pick_device(config.device)
    records = read_records(config.data[0], config.image_folder)[: config.n]
    ready = open_checkpoint(
        config.model, template=config.template, image_aspect_ratio=config.image_aspect_ratio
    )
    check_llava(ready.config, config.model)
    processor = ready.processor
    check_data(records)
    dataset = Dataset(records, processor, max_length=config.max_length)
    items = [dataset[i] for i in range(len(dataset))]
    check_labels(records, items, processor)
    check_prompts(records, items, processor)
    said(f"data, labels and prompts of {len(records)} records are sound")

    if config.train == "lora":
        r = min(config.lora_r, ready.model.config.text.hidden_size)
        add_lora(ready.model, LoRAConfig(r, 2.0 * r, 0.0, config.lora_targets, False, False))
    set_trainable(ready.model, config.train)
    ready.load_weights(DTYPES[config.precision], device)
    init_lora(ready.model, 0)
    batch = {key: x.to(device) for key, x in collate(items).items()}
    learn(ready.model, batch, records, processor, config)
    check_answers(ready.model, records, processor, config)


def said(text: str) -> None:
    print(escape_controls(text), flush=True)


# ---- before training


def check_data(records: Sequence) -> None:
    """Two answers to one question about one image cannot both be learned."""
    from llava_min.data.chat import text_of

    answers: dict[tuple, tuple[str, str]] = {}
    for r in records:
        before: tuple = tuple(map(str, r.images))
        for message in r.messages:
            text = text_of(message)
            if message["role"] == "assistant":
                id, known = answers.setdefault(before, (r.id, text))
                if known != text:
                    raise Fault(
                        "data",
                        f"records {shorten(id)} and {shorten(r.id)} ask the same of the same "
                        f"images, and answer {shorten(known)!r} and {shorten(text)!r}",
                    )
            before += (text,)


def check_labels(records: Sequence, items: Sequence[dict], processor) -> None:
    """Each label is its own token, and together they spell the answers and end them."""
    from llava_min.data.chat import text_of

    squeezed = lambda text: "".join(text.split())
    for r, item in zip(records, items, strict=True):
        pairs = enumerate(zip(item["input_ids"], item["labels"], strict=True))
        if at := next(((i, a, b) for i, (a, b) in pairs if b not in (IGNORE, a)), None):
            raise Fault(
                "labels",
                f"record {shorten(r.id)}: the label at {at[0]} is {at[2]}, and the token there is "
                f"{at[1]}; labels are not shifted, the loss does that",
            )
        learned = [x for x in item["labels"] if x != IGNORE]
        answers = [m for m in r.messages if m["role"] == "assistant" and m.get("loss") is not False]
        wanted = "".join(map(text_of, answers))
        if (text := processor.decode(learned)) is None or squeezed(text) != squeezed(wanted):
            raise Fault(
                "labels",
                f"record {shorten(r.id)}: supervised is {shorten(text, 200)!r}, and the answers "
                f"are {shorten(wanted, 200)!r}",
            )
        if learned[-1] not in processor.stop_ids:
            raise Fault(
                "labels",
                f"record {shorten(r.id)}: no supervised token ends the answer, so the model would "
                "never learn to stop",
            )


def check_prompts(records: Sequence, items: Sequence[dict], processor) -> None:
    """What answering feeds is how training's row begins, token for token."""
    from llava_min.data.dataset import evaluation_batch

    for r, item in zip(records, items, strict=True):
        prompt = evaluation_batch([r], processor)[0]["input_ids"][0].tolist()
        if item["input_ids"][: len(prompt)] != prompt:
            raise Fault(
                "prompt",
                f"record {shorten(r.id)}: answering feeds other tokens than training did: "
                f"{prompt[-6:]} ends the prompt, and training has "
                f"{item['input_ids'][: len(prompt)][-6:]} there",
            )


# ---- training


def learn(model, batch: dict, records: Sequence, processor, config: Config) -> None:
    """Steps over one batch of all records until every supervised token is the likeliest."""
    import torch

    from llava_min.training.batch_size import count_supervised
    from llava_min.training.optim import clip_gradients, make_optimizer, parameter_groups
    from llava_min.training.trainable import check_gradients
    from llava_min.weights import DTYPES

    dtype, count = DTYPES[config.precision], count_supervised(batch)
    rate = config.lr or (1e-3 if config.train == "lora" else 2e-4)
    optimizer = make_optimizer("adamw", parameter_groups(model, rate, 0.0), (0.9, 0.999))
    trained = [p for p in model.train().parameters() if p.requires_grad]
    first, began = None, time.perf_counter()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10)
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            loss = model.loss(**batch) / count
        loss.backward()
        if not torch.isfinite(loss):
            raise Fault(
                "learning", f"the loss of step {step + 1} is {float(loss)}; lower {label('lr')}"
            )
        if first is None:
            first = float(loss.detach())
            checked(lambda: check_gradients(model))
            still = [p for p in trained if not bool(p.grad.any())]
            if len(still) == len(trained):
                raise Fault("gradients", "every gradient is 0: nothing that is trained is read")
        if float(loss.detach()) < -math.log(SURE) and least_probable(model, batch, dtype)[0] > SURE:
            break
        clip_gradients(trained, 1.0, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49:
            info(f"step {step + 1}: loss {float(loss.detach()):.4f}")
    else:
        last = float(loss.detach())
        what, mend = "has not fallen far enough", f"give more {label('steps')}"
        if last > STUCK * first:
            what, mend = "has hardly fallen", f"look at {label('lr')} and {label('train')}"
        p, row, id = least_probable(model, batch, dtype)
        raise Fault(
            "learning",
            f"the loss of a token {what}: {first:.3f} at first, {last:.3f} after {config.steps} "
            f"steps; least sure is {shorten(processor.tokenizer.token(id))} (p {p:.2f}) in record "
            f"{shorten(records[row].id)}; {mend}",
        )
    last, seconds = float(loss.detach()), time.perf_counter() - began
    said(
        f"learned in {step + 1} steps ({seconds:.0f} s): loss of a token {first:.3f} to {last:.4f}"
    )


def least_probable(model, batch: dict, dtype) -> tuple[float, int, int]:
    """(probability, row, id) of the supervised token that is least sure of all."""
    import torch

    targets = batch["labels"][:, 1:]
    learned = targets != IGNORE
    with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        x = model.hidden_states(batch["input_ids"], batch.get("pixel_values"))[:, :-1][learned]
        logits = model.lm_head(x).float()
    p, at = logits.softmax(-1).gather(1, targets[learned][:, None])[:, 0].min(0)
    return float(p), int(learned.nonzero()[at, 0]), int(targets[learned][at])


def checked(check: Callable[[], None]) -> None:
    try:
        check()
    except UserError as e:
        raise Fault("gradients", str(e)) from None


# ---- after it


def check_answers(model, records: Sequence, processor, config: Config) -> None:
    """Greedy decoding gives each record's last answer back."""
    import torch

    from llava_min.data.dataset import evaluation_batch
    from llava_min.generate import generate
    from llava_min.weights import DTYPES

    dtype, wrong = DTYPES[config.precision], []
    model.eval()
    for r in records:
        batch, _, references = evaluation_batch([r], processor)
        wanted = references[0][0]
        room = len(processor.tokenizer.encode(wanted)) + 16
        batch = {key: x.to(model.device) for key, x in batch.items()}
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            ids = generate(model, batch, max_new_tokens=room)[0]
        answer = processor.decode(ids)
        if answer.split() != wanted.split():
            wrong.append((r.id, answer, wanted))
    if wrong:
        id, answer, wanted = wrong[0]
        raise Fault(
            "generation",
            f"{len(wrong)} of {len(records)} answers do not come back though each of their tokens "
            f"is learned, such as record {shorten(id)}: {shorten(answer, 200)!r}, expected "
            f"{shorten(wanted, 200)!r}",
        )
    said(f"{len(records)} of {len(records)} answers come back word for word by greedy decoding")
