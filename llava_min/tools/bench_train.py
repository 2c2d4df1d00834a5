"""The training half of `bench`: a LoRA training step of ours beside one of transformers + peft.

The same weights, rows, adapter values and optimizer in both: forward, backward, clipping and AdamW,
LoRA on every linear layer of the language model and nothing else trained (the projector and the
tower are frozen). The peer is as Trainer runs it with bf16=True: the base in bf16, fp32 adapters
(peft's default), autocast, AdamW fused, labels in the forward, no cache. Equal work has equal
losses, so those of all steps are compared.

A step costs floating-point operations, so it is also set against the matrix products of the same
machine, measured in the same rounds over the model's own weights, and on a GPU against its
published peak (Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311: what is
computed again for checkpointing does not count).
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_min.checks.ranges import PositiveInt
from llava_min.config import LlavaConfig
from llava_min.errors import UserError, info
from llava_min.tools.worker import (
    DTYPES,
    Rows,
    Worker,
    as_users_have_it,
    config_of,
    lines,
    now,
    place,
    prepare,
    prompt,
    quiet,
    ratios,
    read_size,
    running,
    surroundings,
)
from llava_min.util.cli import parse
from llava_min.util.files import write_json

LR, MAX_NORM = 1e-4, 1.0
CLOSE = {"bf16": 1e-2, "fp32": 1e-4}  # losses of the two differ by less, relatively
# TFLOP/s, dense bf16, as published
PEAK = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100": 312}


@dataclass
class Knobs:
    sizes: list[str] = field(default_factory=lambda: ["300m"])  # 300m, 1b, 7b …, or a folder (300m)
    dtype: Literal["bf16", "fp32"] = (
        "bf16"  # of frozen weights and of the computation; what is trained is fp32
    )
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    rounds: PositiveInt = 3  # every figure is the median of so many steps
    batch_size: PositiveInt = 2  # rows of a step, a picture in each
    text: PositiveInt = 96  # tokens of a row beside the picture's
    answer: PositiveInt = 64  # of them supervised, the last ones
    lora_r: PositiveInt = 16  # rank
    checkpointing: bool = False  # activation checkpointing, in both
    compile: bool = False  # compile our blocks; transformers stays as it comes
    peer: bool | None = None  # measure transformers + peft too (where they are installed)
    json: str | None = None  # write the figures to this file too


# A program, in its own process


class Program:
    """What is the same on both sides: the rows, the first values of the adapter, the step."""

    def ready(self, model: Any, config: LlavaConfig, spec: dict) -> None:
        import torch

        self.model, self.autocast = model.train(), spec["dtype"] == "bfloat16"
        self.trained = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if ".lora_A." in name:  # in the order of the layers, the same on both sides; B is zero
                p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0, fused=True)
        ids, pixels = (x.to(self.device) for x in prompt(config, spec["rows"], spec["text"]))
        labels = ids.clone()
        labels[:, : -spec["answer"]] = -100
        self.batch = {"input_ids": ids, "labels": labels, "pixel_values": pixels}

    def step(self) -> dict:
        import torch

        start = now(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"seconds": now(self.device) - start, "loss": float(loss.detach())}


class Ours(Program):
    """This package, through the rooms that train.py goes through."""

    def __init__(self, spec: dict):
        start = time.perf_counter()
        import torch

        from llava_min.fast.cpu_linear import upcast_linears
        from llava_min.load import load_model
        from llava_min.lora import LoRAConfig, add_lora
        from llava_min.training.trainable import set_trainable
        from llava_min.training.wrap import compile_blocks, enable_gradient_checkpointing

        self.imported = time.perf_counter() - start
        self.version, self.device = torch.__version__, torch.device(spec["device"])
        start = time.perf_counter()
        model = load_model(Path(spec["folder"]), getattr(torch, spec["dtype"]), self.device)
        add_lora(model, LoRAConfig(spec["lora_r"], 2.0 * spec["lora_r"]))
        set_trainable(model, "lora", train_projector=False)
        upcast_linears(model)
        if spec["checkpointing"]:
            enable_gradient_checkpointing(model, dropout=False)
        if spec["compile"]:
            compile_blocks(model)
        self.ready(model, model.config, spec)
        self.loaded = now(self.device) - start

    def loss(self) -> Any:
        return self.model.loss(**self.batch) / (self.batch["labels"][:, 1:] != -100).sum()

    def products(self) -> dict:
        """TFLOP/s of bare matrix products of the step's tokens with the decoder's weights."""
        import torch
        import torch.nn.functional as F

        layers = [
            m
            for m in self.model.language_model.modules()
            if hasattr(m, "in_features") and hasattr(m, "weight")
        ]
        weights = [m.weight for m in layers if not m.weight.requires_grad]
        tokens = self.batch["input_ids"].numel()
        rows = {
            w.shape[1]: torch.randn(tokens, w.shape[1], device=self.device).to(w.dtype)
            for w in weights
        }
        with torch.inference_mode():
            start = now(self.device)
            for w in weights:
                F.linear(rows[w.shape[1]], w)
            return {
                "tflop_s": 2
                * tokens
                * sum(w.numel() for w in weights)
                / (now(self.device) - start)
                / 1e12
            }


class Transformers(Program):
    """transformers + peft as Trainer runs them."""

    def __init__(self, spec: dict):
        as_users_have_it()
        start = time.perf_counter()
        import peft
        import torch
        import transformers
        from transformers import LlavaForConditionalGeneration

        self.imported = time.perf_counter() - start
        from llava_min.config import LINEARS

        quiet()
        self.version = f"{transformers.__version__} + peft {peft.__version__}"
        self.device = torch.device(spec["device"])
        start = time.perf_counter()
        model = LlavaForConditionalGeneration.from_pretrained(spec["folder"], dtype=spec["dtype"])
        targets = rf".*language_model\..*\.({'|'.join(LINEARS)})"
        lora = peft.LoraConfig(
            r=spec["lora_r"], lora_alpha=2 * spec["lora_r"], target_modules=targets
        )
        model = peft.get_peft_model(model.to(self.device), lora)
        if spec["checkpointing"]:
            enable = (
                getattr(model, "activation_checkpointing_enable", None)
                or model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        self.ready(model, config_of(spec["folder"]), spec)
        self.batch["attention_mask"] = self.batch["input_ids"].new_ones(
            self.batch["input_ids"].shape
        )
        self.loaded = now(self.device) - start

    def loss(self) -> Any:
        return self.model(**self.batch, use_cache=False).loss


# The bench


def main(argv: list[str]) -> None:
    about = "Measure a LoRA training step on random weights, beside transformers + peft where they are installed."
    knobs = parse(Knobs, argv, about, positional="sizes")
    if knobs.answer > knobs.text:
        raise UserError(
            f"--answer: {knobs.answer} of {knobs.text} text tokens cannot be supervised; give fewer"
        )
    configs = {size: read_size(size, knobs.text, "--text") for size in knobs.sizes}
    device, peer = prepare(knobs, ("transformers", "peft"))
    results = [bench(size, config, knobs, device, peer) for size, config in configs.items()]
    if knobs.json:
        write_json(Path(knobs.json), results)


def bench(size: str, config: LlavaConfig, knobs: Knobs, device: str, peer: bool) -> dict:
    """Measure one size, print its table, return its figures."""
    spec = {
        "dtype": DTYPES[knobs.dtype],
        "device": device,
        "rows": knobs.batch_size,
        "text": knobs.text,
        "answer": knobs.answer,
        "lora_r": knobs.lora_r,
        "checkpointing": knobs.checkpointing,
        "compile": knobs.compile,
    }
    with running(size, config, (Ours, Transformers)[: 1 + peer], spec) as workers:
        measure(workers, knobs)
    result = summarize(size, config, knobs, device, workers)
    print("\n".join(table(result)), flush=True)
    return result


def measure(workers: list[Worker], knobs: Knobs) -> None:
    for worker in workers:
        worker.do("step", record="warm")
    for i in range(knobs.rounds):
        info(f"step {i + 1} of {knobs.rounds}")
        workers[0].do("products")
        for worker in workers:
            worker.do("step")


# What comes out


ROWS: Rows = [
    ("import_s", "import", "s", 1, "less"),
    ("load_s", "load", "s", 1, "less"),
    ("start_to_first_step_s", "start to first step done", "s", 1, "less"),
    ("step_s", "step", "s", 2, "share"),
    ("tokens_s", "tokens, pictures' too", "tokens/s", 0, "more"),
    ("peak_mib", "peak memory", "MiB", 0, "share"),
]


def flop(config: LlavaConfig, rows: int, text: int, answer: int, rank: int) -> float:
    """Floating-point operations that a step needs.

    2 per weight and token forward, and where a gradient passes 2 more backward: the tower has none,
    and a frozen weight has none of its own. Attention: a product of queries and keys, one of
    weights and values, half of each where it is causal, and twice that backward.
    """
    v, t = config.vision, config.text
    tokens, patches = config.tokens_per_image + text, v.num_patches + 1
    tower = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    pictures = 3 * v.num_patches * v.patch_size**2 * v.hidden_size
    pictures += config.vision_layers_used * patches * (tower + 2 * patches * v.hidden_size)
    projector = config.tokens_per_image * (v.hidden_size + t.hidden_size) * t.hidden_size
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    shapes = [
        (t.hidden_size, q),
        *[(t.hidden_size, kv)] * 2,
        (q, t.hidden_size),
        *[(t.hidden_size, t.intermediate_size)] * 3,
    ]
    frozen, lora = sum(i * o for i, o in shapes), rank * sum(i + o for i, o in shapes)
    decoder = t.num_hidden_layers * tokens * (2 * frozen + 3 * lora + 3 * tokens * q)
    head = 2 * answer * t.hidden_size * t.vocab_size
    return 2.0 * rows * (pictures + projector + decoder + head)


def figures(worker: Worker, tokens: int) -> dict:
    out, step = worker.start(), worker.median("step", "seconds")
    return out | {
        "start_to_first_step_s": out["import_s"] + out["load_s"] + worker.median("warm", "seconds"),
        "step_s": step,
        "tokens_s": tokens / step,
        "peak_mib": max(map(worker.peak, ("warm", "step"))),
        "losses": [r["loss"] for kind in ("warm", "step") for r in worker.records[kind]],
    }


def summarize(
    size: str, config: LlavaConfig, knobs: Knobs, device: str, workers: list[Worker]
) -> dict:
    tokens = config.tokens_per_image + knobs.text
    result = {
        "size": size,
        "dtype": knobs.dtype,
        "checkpointing": knobs.checkpointing,
        "compile": knobs.compile,
        "lora_r": knobs.lora_r,
        "batch_size": knobs.batch_size,
        "row_tokens": tokens,
        "text": knobs.text,
        "answer": knobs.answer,
        "rounds": knobs.rounds,
        **surroundings(device, workers),
    }
    result |= {w.name: figures(w, knobs.batch_size * tokens) for w in workers}
    needed = flop(config, knobs.batch_size, knobs.text, knobs.answer, knobs.lora_r) / 1e12
    reached, products = needed / result["ours"]["step_s"], workers[0].median("products", "tflop_s")
    result["flop"] = {
        "step_tflop": needed,
        "tflop_s": reached,
        "products_tflop_s": products,
        "share_of_products": reached / products,
    }
    gpu = result["machine"]["gpu"] or ""
    if peak := next(
        (peak for name, peak in PEAK.items() if gpu.startswith(name) and knobs.dtype == "bf16"),
        None,
    ):
        result["flop"] |= {"peak_tflop_s": peak, "utilisation": reached / peak}
    if len(workers) == 2:
        a, b = (result[w.name] for w in workers)
        result["ratio"] = ratios(ROWS, a, b)
        result["loss_difference"] = max(
            abs(x - y) / abs(y) for x, y in zip(a["losses"], b["losses"])
        )
    return result


def table(r: dict) -> list[str]:
    """The figures of one size, in lines of at most 80 columns."""
    f, (where, releases) = r["flop"], place(r)
    how = f"LoRA rank {r['lora_r']}{', checkpointing' * r['checkpointing']}{', ours compiled' * r['compile']}"
    out = [
        f"{r['size']} {r['dtype']}, {how}, on {where}",
        releases,
        f"{r['batch_size']} rows of 1 picture + {r['text']} tokens ({r['row_tokens']} in all), "
        f"{r['answer']} supervised; medians of {r['rounds']}",
        "",
        *lines(ROWS, r),
        "",
        f"a step needs {f['step_tflop']:.2f} TFLOP: {f['tflop_s']:.2f} TFLOP/s, which is",
        f"{f['share_of_products']:6.0%} of matrix products over its weights "
        f"({f['products_tflop_s']:.2f} TFLOP/s)",
    ]
    if "utilisation" in f:
        out.append(f"{f['utilisation']:6.0%} of the GPU's published {f['peak_tflop_s']} TFLOP/s")
    first, *_, last = r["ours"]["losses"]
    out.append(f"loss of the first step {first:.4f}, of the last {last:.4f}")
    if "loss_difference" in r:
        same = "as" if r["loss_difference"] < CLOSE[r["dtype"]] else "NOT as"
        out.append(
            f"losses are {same} the peer's: at most {r['loss_difference']:.1e} apart, relatively"
        )
    return out
