"""`python -m llava_min bench SIZE`: how fast it loads, reads a picture, answers and trains, beside
transformers.

The weights are random, of a named size (llava_min/config.py), in a temporary folder that both
programs load; or SIZE is the folder of a llava-hf checkpoint, and they are its own. Each program is
a process of its own, so its peak memory is its own; the two work in turn, never at once, so that
whatever else the machine does falls on both. The work is the same: one picture and 30 text tokens
read, then a fixed number of new tokens, greedy and with beams, no end token allowed before. What
both kinds of bench share is worker.py; `bench --train`, a training step, is bench_train.py.

A new token costs one reading of the weights, so decoding is also set against the memory bandwidth,
measured in the same rounds over the model's own weights: as matrix-vector products, and as plain
reads (on a GPU, copies).
"""

import contextlib
import itertools
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from llava_min.checks.ranges import PositiveInt
from llava_min.config import LlavaConfig
from llava_min.errors import info
from llava_min.tools.worker import (
    DTYPES,
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

TEXT = 30  # tokens of the prompt beside the picture's
SAMPLE = 1 << 30  # bytes of weights that the bandwidth is measured over
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
SWEEPS = 5  # over all weights, for a bandwidth


@dataclass
class Knobs:
    sizes: list[str] = field(default_factory=lambda: ["300m"])  # 300m, 1b, 7b …, or a folder (300m)
    train: bool = False  # a LoRA training step instead, with knobs of its own: bench --train --help
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the weights
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    rounds: PositiveInt = 3  # every figure is the median of so many
    new_tokens: Annotated[int, 2, 1 << 31] = 32  # new tokens per answer
    beams: PositiveInt = 4  # of beam search; 1 leaves it out
    compile: bool = False  # compile our greedy step; transformers stays as it comes
    peer: bool | None = None  # measure transformers too (where it is installed)
    json: str | None = None  # write the figures to this file too


# A program, in its own process


class Ours:
    """This package, through the calls that `load` and `generate` are made of."""

    def __init__(self, spec: dict):
        start = time.perf_counter()
        import torch

        from llava_min.decoding import decode
        from llava_min.fast.cpu_linear import prepack_linears
        from llava_min.generate import generate
        from llava_min.load import load_model
        from llava_min.options import Options

        self.imported = time.perf_counter() - start
        self.spec, self.version, self.device = spec, torch.__version__, torch.device(spec["device"])
        self.options, self.decode, self.generate = Options, decode, generate
        start = time.perf_counter()
        self.model = load_model(Path(spec["folder"]), getattr(torch, spec["dtype"]), self.device)
        prepack_linears(self.model)
        self.loaded = now(self.device) - start
        ids, pixels = prompt(self.model.config, 1, TEXT)
        self.batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels,
        }

    def greedy(self, n: int) -> dict:
        times, ids = [now(self.device)], []
        options = self.options(max_new_tokens=n, min_new_tokens=n)
        for column in self.decode(self.model, self.batch, options, compile=self.spec["compile"]):
            ids.append(column)
            if len(ids) in (1, n):
                times.append(now(self.device))
        return {**latency(times, n), "ids": [int(i) for i in ids]}

    def beam(self, n: int) -> dict:
        start, beams = now(self.device), self.spec["beams"]
        ids = self.generate(
            self.model, self.batch, num_beams=beams, max_new_tokens=n, min_new_tokens=n
        )[0]
        return {"seconds": now(self.device) - start, "ids": ids}


class Machine:
    """What reading weights costs at best: plain ones, of the decoder's shapes. Apart from the
    others and their memory.
    """

    def __init__(self, spec: dict):
        start = time.perf_counter()
        import torch

        self.imported, self.version, self.device = (
            time.perf_counter() - start,
            torch.__version__,
            torch.device(spec["device"]),
        )
        start, dtype = time.perf_counter(), getattr(torch, spec["dtype"])
        sizes = shapes(spec["config"])
        before = itertools.accumulate(
            (dtype.itemsize * math.prod(size) for size in sizes), initial=0
        )
        self.weights = [
            torch.randn(size, device=self.device, dtype=dtype)
            for size, n in zip(sizes, before)
            if n < SAMPLE
        ]
        self.loaded = now(self.device) - start

    def bandwidth(self) -> dict:
        """GB/s of matrix-vector products over the weights, and of reading them."""
        import torch
        import torch.nn.functional as F

        widest = max(w.numel() for w in self.weights)
        rows = {
            w.shape[1]: torch.randn(1, w.shape[1], dtype=w.dtype, device=self.device)
            for w in self.weights
        }

        def rate(read: Any) -> float:
            times = []
            for _ in range(SWEEPS):
                start = now(self.device)
                for w in self.weights:
                    read(w)
                times.append(now(self.device) - start)
            return sum(w.nbytes for w in self.weights) / statistics.median(times) / 1e9

        with torch.inference_mode():
            matvec = rate(lambda w: F.linear(rows[w.shape[1]], w))
            if self.device.type == "cpu":
                read = rate(lambda w: w.view(-1).view(torch.int64).sum())
            else:
                target = torch.empty(widest, dtype=self.weights[0].dtype, device=self.device)
                read = 2 * rate(lambda w: target[: w.numel()].copy_(w.view(-1)))  # read and written
        return {"matvec": matvec, "read": read}


def shapes(config: LlavaConfig) -> list[tuple[int, int]]:
    """Of the matrices that a new token is multiplied with."""
    from llava_min.load import on_meta

    model = on_meta(config)
    layers = [m for m in model.language_model.modules() if hasattr(m, "in_features")]
    return [tuple(m.weight.shape) for m in (*layers, model.lm_head)]


class Transformers:
    """Hugging Face transformers as it comes: its default attention, its default `generate`."""

    def __init__(self, spec: dict):
        as_users_have_it()
        start = time.perf_counter()
        import torch
        import transformers
        from transformers import LlavaForConditionalGeneration

        self.imported = time.perf_counter() - start
        quiet()
        self.spec, self.version, self.device = (
            spec,
            transformers.__version__,
            torch.device(spec["device"]),
        )
        start = time.perf_counter()
        self.model = LlavaForConditionalGeneration.from_pretrained(
            spec["folder"], dtype=spec["dtype"]
        )
        self.model.to(self.device).eval()
        self.loaded = now(self.device) - start
        ids, pixels = prompt(config_of(spec["folder"]), 1, TEXT)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        self.batch = {name: x.to(self.device) for name, x in batch.items()}

    def run(self, n: int, **options: Any) -> list[int]:
        ids = self.model.generate(
            **self.batch,
            do_sample=False,
            max_new_tokens=n,
            min_new_tokens=n,
            pad_token_id=0,
            **options,
        )
        return ids[0, self.batch["input_ids"].shape[1] :].tolist()

    def greedy(self, n: int) -> dict:
        clock = Clock(self.device, n)
        return {"ids": self.run(n, streamer=clock), **latency(clock.times, n)}

    def beam(self, n: int) -> dict:
        start = now(self.device)
        ids = self.run(n, num_beams=self.spec["beams"])
        return {"seconds": now(self.device) - start, "ids": ids}


class Clock:
    """A streamer that notes when it began, and when the first and the n-th new token came."""

    def __init__(self, device: Any, n: int):
        self.device, self.n, self.seen, self.times = device, n, 0, [now(device)]

    def put(self, ids: Any) -> None:
        if self.seen in (1, self.n):  # the prompt comes first
            self.times.append(now(self.device))
        self.seen += 1

    def end(self) -> None:
        """Called by transformers."""


def latency(times: list[float], n: int) -> dict:
    """Times of the start, the first and the n-th token -> seconds to the first, tokens/s from there
    on.
    """
    return {"first": times[1] - times[0], "rate": (n - 1) / (times[2] - times[1])}


# The bench


def main(argv: list[str]) -> None:
    if "--train" in argv:
        from llava_min.tools import bench_train

        return bench_train.main([a for a in argv if a != "--train"])
    about = "Measure speed and memory on random weights, beside transformers where it is installed."
    knobs = parse(Knobs, argv, about, positional="sizes")
    configs = {
        size: read_size(size, TEXT + knobs.new_tokens, "--new-tokens") for size in knobs.sizes
    }
    device, peer = prepare(knobs, ("transformers",))
    results = [bench(size, config, knobs, device, peer) for size, config in configs.items()]
    if knobs.json:
        write_json(Path(knobs.json), results)


def bench(size: str, config: LlavaConfig, knobs: Knobs, device: str, peer: bool) -> dict:
    """Measure one size, print its table, return its figures."""
    spec = {
        "dtype": DTYPES[knobs.dtype],
        "device": device,
        "beams": knobs.beams,
        "compile": knobs.compile,
    }
    with (
        running(size, config, (Ours, Transformers)[: 1 + peer], spec) as workers,
        contextlib.closing(Worker(Machine, {**spec, "config": config})) as machine,
    ):
        measure(workers, machine, knobs)
    result = summarize(size, config, knobs, device, workers, machine)
    print("\n".join(table(result)), flush=True)
    return result


def measure(workers: list[Worker], machine: Worker, knobs: Knobs) -> None:
    """First the greedy rounds, then those with beams, so that neither's peak is counted as the
    other's.
    """
    for worker in workers:
        worker.do("greedy", 2, record="warm")
    for i in range(knobs.rounds):
        info(f"greedy, round {i + 1} of {knobs.rounds}")
        machine.do("bandwidth")
        for worker in workers:
            worker.do("greedy", knobs.new_tokens)
    for i in range(knobs.rounds if knobs.beams > 1 else 0):
        info(f"{knobs.beams} beams, round {i + 1} of {knobs.rounds}")
        for worker in workers:
            worker.do("beam", knobs.new_tokens)


# What comes out


ROWS = [  # of a table, see worker.py
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
    knobs: Knobs,
    device: str,
    workers: list[Worker],
    machine: Worker,
) -> dict:
    ours = workers[0]
    result = {
        "size": size,
        "dtype": knobs.dtype,
        "compile": knobs.compile,
        "prompt_tokens": config.tokens_per_image + TEXT,
        "new_tokens": knobs.new_tokens,
        "beams": knobs.beams,
        "rounds": knobs.rounds,
        **surroundings(device, workers),
    }
    result |= {w.name: figures(w) for w in workers}
    matvec, read = (machine.median("bandwidth", key) for key in ("matvec", "read"))
    size = sum(map(math.prod, shapes(config))) * WIDTHS[knobs.dtype]
    reached = size * result["ours"]["decode_tokens_s"] / 1e9
    result["bandwidth"] = {
        "bytes_per_token": size,
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
            result["same_ids"][job] = next((i for i, (x, y) in pairs if x != y), knobs.new_tokens)
    return result


def table(r: dict) -> list[str]:
    """The figures of one size, in lines of at most 80 columns."""
    b, (where, releases) = r["bandwidth"], place(r)
    out = [
        f"{r['size']} {r['dtype']}{', our greedy step compiled' * r['compile']}, on {where}",
        releases,
        f"1 picture + {TEXT} tokens ({r['prompt_tokens']} in all); medians of {r['rounds']}",
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
        rest = (
            ""
            if same == r["new_tokens"]
            else f", then other ones{' (rounding)' * (r['dtype'] != 'fp32')}"
        )
        out.append(f"{job} ids: the first {same} of {r['new_tokens']} are transformers'{rest}")
    return out
