"""The stages of `parity`, each a function from both sides to a `Stage`.

Each stage gets the reference's input, so that a difference is its own and not one that came down
from an earlier stage: our tower gets transformers' pixels, our projector its features.

Shapes: N images, S pixels a side, P patches, a token each, T tokens, C width, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llava_min.config import IGNORE
from llava_min.data.chat import IMAGE_TOKEN
from llava_min.data.processor import Processor
from llava_min.errors import UserError, shorten
from llava_min.generate import generate
from llava_min.llava import Llava
from llava_min.lora import LoRAConfig, lora_layers
from llava_min.training.targets import add_lora

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Stage:
    """`difference`: the largest there is, relative to the reference's largest value; for what is
    counted, such as ids, how many differ."""

    name: str
    difference: float
    tolerance: float
    compared: str  # what, and how much of it
    first: str = ""  # the first difference, for the reader

    @property
    def same(self) -> bool:
        return self.difference <= self.tolerance  # NaN is not


@dataclass
class Sides:
    """Ours and transformers', loaded from one folder."""

    model: Llava
    processor: Processor
    theirs: nn.Module
    their_processor: Any


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; infinity for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    scale = b.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((a.double() - b.double()).abs().max() / scale)


def measured(name: str, ours: Tensor, theirs: Tensor, tolerance: float, compared: str) -> Stage:
    first = ""
    if ours.shape != theirs.shape:
        first = f"shape {tuple(ours.shape)}, transformers {tuple(theirs.shape)}"
    return Stage(name, relative(ours, theirs), tolerance, compared, first)


def counted(name: str, rows: Sequence[tuple[str, list[int], list[int]]], what: str) -> Stage:
    """Rows of whole numbers that must be equal; each is (what it is of, ours, theirs)."""
    bad = [(of, a, b) for of, a, b in rows if a != b]
    first = ""
    if bad:
        of, a, b = bad[0]
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        near = slice(max(at - 2, 0), at + 4)
        first = f"{of} at {at}: {a[near]}, transformers {b[near]}"
    return Stage(name, len(bad), 0, what, first)


# ---- what goes in


def pixels(sides: Sides, images: Sequence[Image.Image]) -> Stage:
    ours = sides.processor._pixels(list(images))
    theirs = sides.their_processor.image_processor(list(images), return_tensors="pt")
    return measured("pixels", ours, theirs["pixel_values"], 0, f"{len(images)} images, bit for bit")


def ids(sides: Sides, prompts: Sequence[str], image: Image.Image) -> Stage:
    """`processor(prompt)` of both, special strings being read as transformers does."""
    rows = []
    for prompt in prompts:
        images = [image] * prompt.count(IMAGE_TOKEN) or None
        ours = sides.processor(prompt, images, parse_special=True)["input_ids"][0].tolist()
        theirs = sides.their_processor(text=prompt, images=images, return_tensors="pt")
        rows.append((shorten(repr(prompt)), ours, theirs["input_ids"][0].tolist()))
    return counted("ids", rows, f"{len(rows)} prompts")


def labels(sides: Sides, questions: Sequence[str], image: Image.Image, answer: str) -> Stage:
    """Supervised is what follows the generation prompt, and nothing of the prompt."""
    rows = []
    for question in questions:
        asked = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        ]
        row = sides.processor.training([*asked, {"role": "assistant", "content": answer}], [image])
        n = len(sides.processor.chat(asked, [image])["input_ids"][0])
        wanted = [IGNORE] * n + row["input_ids"][n:]
        rows.append((shorten(repr(question)), row["labels"], wanted))
    return counted("labels", rows, f"{len(rows)} conversations")


# ---- the model


def part(model: nn.Module, name: str) -> nn.Module:
    """A module by the end of its path, which moved between versions of transformers."""
    return next(m for path, m in model.named_modules() if path.split(".")[-1] == name)


@contextmanager
def captured(module: nn.Module):
    """Input and output of a module when it runs within."""
    seen: dict[str, Tensor] = {}

    def keep(_, inputs: tuple, out: Tensor) -> None:
        seen["in"], seen["out"] = inputs[0].detach(), out.detach()

    hook = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def asked(theirs: nn.Module, batch: dict) -> Tensor:
    """transformers' logits; UserError where it cannot run what it has read."""
    try:
        return theirs(**batch).logits
    except Exception as e:  # whatever a version raises
        raise UserError(
            f"transformers reads this folder and does not run it ({type(e).__name__}: "
            f"{shorten(e, 300)}); bitsandbytes wants widths of whole blocks of 64"
        ) from None


@torch.no_grad()
def forward(sides: Sides, batch: dict, tolerance: float) -> list[Stage]:
    """tower, projector and logits of one batch, which transformers' processor made."""
    ours, theirs, out = sides.model, sides.theirs, []
    batch = dict(batch, pixel_values=batch["pixel_values"].to(ours.dtype))
    with captured(part(theirs, "multi_modal_projector")) as there:
        their_logits = asked(theirs, batch)
    with captured(ours.multi_modal_projector) as here:
        ours.encode_images(batch["pixel_values"])
    n = len(batch["pixel_values"])
    out.append(measured("tower", here["in"], there["in"], tolerance, f"features of {n} images"))
    projected = ours.multi_modal_projector(there["in"])
    out.append(measured("projector", projected, there["out"], tolerance, "of the same features"))
    if not out[0].same and out[0].first:  # it would not even fit into the row
        return out
    mask = batch["attention_mask"].bool()  # what padding rows say is nobody's business
    logits = ours(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    # transformers computes norms and angles in fp32, whatever the dtype
    near = max(tolerance, 2e-5)
    out.append(measured("logits", logits[mask], their_logits[mask], near, f"{mask.sum()} tokens"))
    return out


@torch.no_grad()
def loss(sides: Sides, row: dict, tolerance: float) -> Stage:
    ours = sides.model.loss(**row) / (row["labels"][:, 1:] != IGNORE).sum()
    theirs = sides.theirs(**row).loss
    return measured(
        "loss", ours.view(1), theirs.view(1), max(tolerance, 2e-5), "of one training row"
    )


@torch.no_grad()
def greedy(sides: Sides, batch: dict, n: int) -> Stage:
    batch = dict(batch, pixel_values=batch["pixel_values"].to(sides.model.dtype))
    ours = generate(sides.model, batch, max_new_tokens=n, min_new_tokens=n)
    there = sides.theirs.generate(
        **batch,
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        num_beams=1,
        eos_token_id=sides.processor.stop_ids,
    )
    start = batch["input_ids"].shape[1]
    rows = [(f"answer {i}", a, b) for i, (a, b) in enumerate(zip(ours, there[:, start:].tolist()))]
    return counted("greedy", rows, f"{n} tokens of {len(rows)} answer")


def gradients(sides: Sides, row: dict, tolerance: float) -> Stage:
    """Of LoRA on every linear layer of the decoder, the same A and B on both sides."""
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.0
    )
    theirs = peft.get_peft_model(sides.theirs, config).train()
    add_lora(sides.model, LoRAConfig(4, 8.0, 0.0, ("all-linear",), False, False))
    layers, generator = lora_layers(sides.model), torch.Generator().manual_seed(0)
    pairs = []
    for name, p in theirs.named_parameters():
        if ".lora_" not in name:
            continue
        letter = name.partition(".lora_")[2][0]  # A or B
        ours = getattr(layers[path_of(name)], f"lora_{letter}").weight
        with torch.no_grad():
            values = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            p.copy_(values * p.shape[1] ** -0.5)
            ours.copy_(p)
        pairs.append((name, ours.requires_grad_(), p))
    count = (row["labels"][:, 1:] != IGNORE).sum()
    (sides.model.train().loss(**row) / count).backward()
    theirs(**row).loss.backward()
    worst, first = 0.0, ""
    for name, a, b in pairs:
        difference = float((a.grad.double() - b.grad.double()).norm() / b.grad.double().norm())
        if not difference <= worst:  # NaN counts
            worst, first = difference, name
    return Stage("gradients", worst, max(tolerance, 1e-4), f"{len(pairs)} LoRA matrices", first)


def path_of(name: str) -> str:
    """peft's name of a LoRA matrix -> our path of its layer."""
    return "language_model." + name.partition("language_model.")[2].partition(".lora_")[0]
