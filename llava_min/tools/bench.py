"""`python -m llava_min bench SIZE`: how fast it loads, reads an image, answers and trains, beside
transformers.

The weights are random, of a named size (llava_min/config.py), in a temporary folder that both
programs load; or SIZE is the folder of a llava-hf checkpoint, and they are its own. Each program is
a process of its own, so its peak memory is its own; the two work in turn, never at once, so that
whatever else the machine does falls on both. The work is the same: one image and 30 text tokens
read, then a fixed number of new tokens, greedy and with beams, no end token allowed before. The
programs and what they share are in speed/; `bench --train`, a training step, is bench_train.py, and
`bench --quantize all`, a checkpoint in every quantized form, bench_quantize.py.

A new token costs one reading of the weights, so decoding is also set against the memory bandwidth,
measured in the same rounds over the model's own weights: as matrix-vector products, and as plain
reads (on a GPU, copies).
"""

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from llava_min.checks.ranges import PositiveInt
from llava_min.config import LlavaConfig
from llava_min.errors import info
from llava_min.tools.speed.answering import TEXT, Machine, Ours, Transformers, shapes
from llava_min.tools.speed.setup import DTYPES, prepare, read_size, running
from llava_min.tools.speed.table import Rows, lines, place, ratios, surroundings
from llava_min.tools.speed.worker import Worker
from llava_min.util.cli import parse
from llava_min.util.files import write_json

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass
class Args:
    sizes: list[str] = field(default_factory=lambda: ["300m"])  # 300m, 1b, 7b …, or a folder (300m)
    train: bool = False  # a LoRA training step instead, with flags of its own: bench --train --help
    quantize: str | None = None  # all, or int4,nf4 …: such a table, see bench --quantize all --help
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the weights
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    rounds: PositiveInt = 3  # every figure is the median over the rounds
    new_tokens: Annotated[int, 2, 1 << 31] = 32  # new tokens per answer
    beams: PositiveInt = 4  # of beam search; 1 leaves it out
    compile: bool = False  # compile our greedy step; transformers stays as it comes
    peer: bool | None = None  # measure transformers too (where it is installed)
    json: str | None = None  # write the figures to this file too


def main(argv: list[str]) -> None:
    if "--train" in argv:
        from llava_min.tools import bench_train

        return bench_train.main([a for a in argv if a != "--train"])
    if any(a.partition("=")[0] == "--quantize" for a in argv):
        from llava_min.tools import bench_quantize

        return bench_quantize.main(argv)
    about = "Measure speed and memory on random weights, beside transformers where it is installed."
    args = parse(Args, argv, about, positional="sizes")
    configs = {size: read_size(size, TEXT + args.new_tokens, "--new-tokens") for size in args.sizes}
    device, peer = prepare(args, ("transformers",))
    results = [bench(size, config, args, device, peer) for size, config in configs.items()]
    if args.json:
        write_json(Path(args.json), results)


def bench(size: str, config: LlavaConfig, args: Args, device: str, peer: bool) -> dict:
    """Measure one size, print its table, return its figures."""
    spec = {"dtype": DTYPES[args.dtype], "device": device}
    spec |= {"beams": args.beams, "compile": args.compile}
    with (
        running(size, config, (Ours, Transformers)[: 1 + peer], spec) as workers,
        contextlib.closing(Worker(Machine, {**spec, "config": config})) as machine,
    ):
        measure(workers, machine, args)
    result = summarize(size, config, args, device, workers, machine)
    print("\n".join(table(result)), flush=True)
    return result


def measure(workers: list[Worker], machine: Worker, args: Args) -> None:
    """Greedy rounds before those with beams: neither's peak memory is counted as the other's."""
    for worker in workers:
        worker.do("greedy", 2, record="warm")
    for i in range(args.rounds):
        info(f"greedy, round {i + 1} of {args.rounds}")
        machine.do("bandwidth")
        for worker in workers:
            worker.do("greedy", args.new_tokens)
    for i in range(args.rounds if args.beams > 1 else 0):
        info(f"{args.beams} beams, round {i + 1} of {args.rounds}")
        for worker in workers:
            worker.do("beam", args.new_tokens)


ROWS: Rows = [
    ("import_s", "import", "s", 1, "less"),
    # transformers maps the file and reads it with the first token
    ("load_s", "load", "s", 1, "less"),
    ("start_to_first_token_s", "start to first token", "s", 1, "less"),
    ("first_token_s", "first token, when warm", "s", 2, "less"),
    ("decode_tokens_s", "decode", "tokens/s", 1, "more"),
    ("beams_s", "{beams} beams x {new_tokens} tokens", "s", 2, "less"),
    ("peak_greedy_mib", "peak memory, greedy", "MiB", 0, "share"),
    ("peak_beams_mib", "peak memory, {beams} beams", "MiB", 0, "share"),
]


def figures(worker: Worker) -> dict:
    out = worker.start()
    out |= {
        "start_to_first_token_s": out["import_s"] + out["load_s"] + worker.median("warm", "first"),
        "first_token_s": worker.median("greedy", "first"),
        "decode_tokens_s": worker.median("greedy", "rate"),
    }
    if "beam" in worker.records:
        out |= {"beams_s": worker.median("beam", "seconds"), "peak_beams_mib": worker.peak("beam")}
    return out | {"peak_greedy_mib": worker.peak("greedy")}


def summarize(
    size: str,
    config: LlavaConfig,
    args: Args,
    device: str,
    workers: list[Worker],
    machine: Worker,
) -> dict:
    ours = workers[0]
    result = {
        "size": size,
        "dtype": args.dtype,
        "compile": args.compile,
        "prompt_tokens": config.tokens_per_image + TEXT,
        "new_tokens": args.new_tokens,
        "beams": args.beams,
        "rounds": args.rounds,
        **surroundings(device, workers),
    }
    result |= {w.name: figures(w) for w in workers}
    matvec, read = (machine.median("bandwidth", key) for key in ("matvec", "read"))
    num_bytes = sum(map(math.prod, shapes(config))) * BYTES[args.dtype]
    reached = num_bytes * result["ours"]["decode_tokens_s"] / 1e9
    result["bandwidth"] = {
        "bytes_per_token": num_bytes,
        "decode_gb_s": reached,
        "matvec_gb_s": matvec,
        "read_gb_s": read,
        "share_of_matvec": reached / matvec,
        "share_of_read": reached / read,
    }
    if len(workers) == 2:
        result["ratio"] = ratios(ROWS, *(result[w.name] for w in workers))
        result["same_ids"] = {}
        for job in ("greedy", "beam") if "beam" in ours.records else ("greedy",):
            pairs = enumerate(zip(*(w.records[job][0]["ids"] for w in workers)))
            result["same_ids"][job] = next((i for i, (x, y) in pairs if x != y), args.new_tokens)
    return result


def table(r: dict) -> list[str]:
    """The figures of one size, in lines of at most 80 columns."""
    b, (where, releases) = r["bandwidth"], place(r)
    out = [
        f"{r['size']} {r['dtype']}{', our greedy step compiled' * r['compile']}, on {where}",
        releases,
        f"1 image + {TEXT} tokens ({r['prompt_tokens']} in all); medians of {r['rounds']}",
        "",
        *lines(ROWS, r),
    ]
    gigabytes, plain = b["bytes_per_token"] / 1e9, "copies" if r["machine"]["gpu"] else "reads"
    out += [
        "",
        f"a token reads {gigabytes:.2f} GB of weights: {b['decode_gb_s']:.1f} GB/s, which is",
        f"{b['share_of_matvec']:6.0%} of matrix-vector products over them "
        f"({b['matvec_gb_s']:.1f} GB/s)",
        f"{b['share_of_read']:6.0%} of plain {plain} of them ({b['read_gb_s']:.1f} GB/s)",
    ]
    for job, same in r.get("same_ids", {}).items():
        rounding = " (rounding)" * (r["dtype"] != "fp32")
        rest = "" if same == r["new_tokens"] else f", then other ones{rounding}"
        out.append(f"{job} ids: the first {same} of {r['new_tokens']} are transformers'{rest}")
    return out
