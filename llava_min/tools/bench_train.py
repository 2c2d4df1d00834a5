"""The training half of `bench`: a LoRA training step of ours beside one of transformers + peft.

The same weights, rows, adapter values and optimizer in both: forward, backward, clipping and AdamW,
LoRA on every linear layer of the language model and nothing else trained (the projector and the
tower are frozen). The peer is as Trainer runs it with bf16=True: the base in bf16, fp32 adapters
(peft's default), autocast, AdamW fused, labels in the forward, no cache. Equal work has equal
losses, so those of all steps are compared.

A step costs floating-point operations, so it is also set against the matrix products of the same
machine, measured in the same rounds over the model's own weights, and on a GPU against its
published peak (Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311: recomputation
for checkpointing does not count).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_min.checks.ranges import PositiveInt
from llava_min.config import LlavaConfig
from llava_min.errors import UserError, info
from llava_min.tools.speed.setup import DTYPES, prepare, read_size, running
from llava_min.tools.speed.table import Rows, lines, place, ratios, surroundings
from llava_min.tools.speed.training import Ours, Transformers
from llava_min.tools.speed.worker import Worker
from llava_min.util.cli import parse
from llava_min.util.files import write_json

CLOSE = {"bf16": 1e-2, "fp32": 1e-4}  # losses of the two differ by less, relatively
# TFLOP/s, dense bf16, as published
PEAK = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100": 312}


@dataclass
class Args:
    sizes: list[str] = field(default_factory=lambda: ["300m"])  # 300m, 1b, 7b …, or a folder (300m)
    dtype: Literal["bf16", "fp32"] = (
        "bf16"  # of frozen weights and of the computation; what is trained is fp32
    )
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    rounds: PositiveInt = 3  # every figure is the median over the rounds, a step each
    batch_size: PositiveInt = 2  # rows of a step, an image in each
    text: PositiveInt = 96  # tokens of a row beside the image's
    answer: PositiveInt = 64  # of them supervised, the last ones
    lora_r: PositiveInt = 16  # rank
    checkpointing: bool = False  # activation checkpointing, in both
    compile: bool = False  # compile our blocks; transformers stays as it comes
    peer: bool | None = None  # measure transformers + peft too (where they are installed)
    json: str | None = None  # write the figures to this file too


def main(argv: list[str]) -> None:
    about = (
        "Measure a LoRA training step on random weights, beside transformers + peft if installed."
    )
    args = parse(Args, argv, about, positional="sizes")
    if args.answer > args.text:
        raise UserError(
            f"--answer: {args.answer} of {args.text} text tokens cannot be supervised; give fewer"
        )
    configs = {size: read_size(size, args.text, "--text") for size in args.sizes}
    device, peer = prepare(args, ("transformers", "peft"))
    results = [bench(size, config, args, device, peer) for size, config in configs.items()]
    if args.json:
        write_json(Path(args.json), results)


def bench(size: str, config: LlavaConfig, args: Args, device: str, peer: bool) -> dict:
    """Measure one size, print its table, return its figures."""
    spec = {
        "dtype": DTYPES[args.dtype],
        "device": device,
        "rows": args.batch_size,
        "text": args.text,
        "answer": args.answer,
        "lora_r": args.lora_r,
        "checkpointing": args.checkpointing,
        "compile": args.compile,
    }
    with running(size, config, (Ours, Transformers)[: 1 + peer], spec) as workers:
        measure(workers, args)
    result = summarize(size, config, args, device, workers)
    print("\n".join(table(result)), flush=True)
    return result


def measure(workers: list[Worker], args: Args) -> None:
    for worker in workers:
        worker.do("step", record="warm")
    for i in range(args.rounds):
        info(f"step {i + 1} of {args.rounds}")
        workers[0].do("products")
        for worker in workers:
            worker.do("step")


ROWS: Rows = [
    ("import_s", "import", "s", 1, "less"),
    ("load_s", "load", "s", 1, "less"),
    ("start_to_first_step_s", "start to first step done", "s", 1, "less"),
    ("step_s", "step", "s", 2, "share"),
    ("tokens_s", "tokens, images' too", "tokens/s", 0, "more"),
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
    images = 3 * v.num_patches * v.patch_size**2 * v.hidden_size
    images += config.vision_layers_used * patches * (tower + 2 * patches * v.hidden_size)
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
    return 2.0 * rows * (images + projector + decoder + head)


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
    size: str, config: LlavaConfig, args: Args, device: str, workers: list[Worker]
) -> dict:
    tokens = config.tokens_per_image + args.text
    result = {
        "size": size,
        "dtype": args.dtype,
        "checkpointing": args.checkpointing,
        "compile": args.compile,
        "lora_r": args.lora_r,
        "batch_size": args.batch_size,
        "row_tokens": tokens,
        "text": args.text,
        "answer": args.answer,
        "rounds": args.rounds,
        **surroundings(device, workers),
    }
    result |= {w.name: figures(w, args.batch_size * tokens) for w in workers}
    needed = flop(config, args.batch_size, args.text, args.answer, args.lora_r) / 1e12
    reached, products = needed / result["ours"]["step_s"], workers[0].median("products", "tflop_s")
    result["flop"] = {
        "step_tflop": needed,
        "tflop_s": reached,
        "products_tflop_s": products,
        "share_of_products": reached / products,
    }
    gpu = result["machine"]["gpu"] or ""
    peaks = [peak for name, peak in PEAK.items() if gpu.startswith(name)]
    if peaks and args.dtype == "bf16":
        result["flop"] |= {"peak_tflop_s": peaks[0], "utilisation": reached / peaks[0]}
    if len(workers) == 2:
        a, b = (result[w.name] for w in workers)
        result["ratio"] = ratios(ROWS, a, b)
        losses = zip(a["losses"], b["losses"])
        result["loss_difference"] = max(abs(x - y) / abs(y) for x, y in losses)
    return result


def table(r: dict) -> list[str]:
    """The figures of one size, in lines of at most 80 columns."""
    f, (where, releases) = r["flop"], place(r)
    how = f"LoRA rank {r['lora_r']}{', checkpointing' * r['checkpointing']}"
    how += ", ours compiled" * r["compile"]
    out = [
        f"{r['size']} {r['dtype']}, {how}, on {where}",
        releases,
        f"{r['batch_size']} rows of 1 image + {r['text']} tokens ({r['row_tokens']} in all), "
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
