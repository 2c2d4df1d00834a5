"""The quantized part of `bench`: one checkpoint in every form that `quantize` writes, side by side.

The first row is the checkpoint as it is; each other one is written to a temporary folder by the
verb that does so for a user, measured, and removed. One after the other, and each step in a process
of its own, so its peak memory is its own; that of writing shows whether the 16-bit model was ever
there as a whole. Reading and decoding are of text alone, the same ids for all: it is the decoder
that is quantized, and llama.cpp can do the same work. An image is read before that, so that peak
memory counts the tower. llama.cpp's row is Q4_0 as `export` writes it, with as many threads.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from llava_min.checks.ranges import PositiveInt
from llava_min.errors import UserError, info
from llava_min.tools.speed.answering import TEXT
from llava_min.tools.speed.quantized import Answering, LlamaCpp, Writing, WritingGguf
from llava_min.tools.speed.quantized_table import (
    PEER,
    answers,
    heading,
    notes,
    quality_table,
    speed_line,
)
from llava_min.tools.speed.setup import (
    DTYPES,
    MIB,
    check_context,
    need_memory,
    prepare,
    scratch,
)
from llava_min.tools.speed.source import (
    Source,
    check_questions,
    group_size,
    open_source,
    pick_methods,
    write_source,
)
from llava_min.tools.speed.table import machine
from llava_min.tools.speed.worker import Ended, Worker, prompt
from llava_min.util.cli import PathArg, flag_of, flags, parse
from llava_min.util.files import write_json
from llava_min.util.script import tidy_when_terminated

FLAGS = {full: flag for flag, full in DTYPES.items()}  # bfloat16 -> bf16


@dataclass
class Args:
    sizes: list[str] = field(default_factory=list)  # 1b, 7b …, a folder, a hub id or tiny (300m)
    quantize: tuple[str, ...] = ("all",)  # all, or methods with commas between: int4,nf4,hqq2
    group_size: PositiveInt | None = None  # weights that share a scale: int4 128, hqq 64
    data: PathArg | None = None  # records: perplexity, answers beside those of the first row
    calibration_data: PathArg | None = None  # records that awq4 is calibrated on; default: --data
    image_folder: PathArg | None = None  # where the images are; default: the data file's folder
    image: PathArg | None = None  # of the one question that all answer
    prompt: str | None = None  # that question; default: the first record's
    max_new_tokens: PositiveInt = 64  # of an answer
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of what is not quantized
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    rounds: PositiveInt = 3  # every speed is the median over the rounds
    new_tokens: Annotated[int, 2, 1 << 31] = 32  # new tokens of a round
    compile: bool = False  # compile our greedy step
    peer: bool | None = None  # measure llama.cpp's Q4_0 too (where it is installed; CPU)
    json: str | None = None  # write the figures to this file too

    def __post_init__(self):
        if len(self.sizes) > 1:
            raise UserError(f"SIZE: {len(self.sizes)} were given; give one")
        self.sizes = self.sizes or ["300m"]
        self.calibration_data = self.calibration_data or self.data
        if self.image_folder is not None and self.calibration_data is None:
            raise UserError("belongs to data; give that, or leave it out", "image_folder")
        if self.image is not None and self.prompt is None:
            raise UserError("no question came with it; give it as prompt", "image")


def main(argv: list[str]) -> None:
    about = "Measure a checkpoint and every quantized form of it: size, memory, speed, answers."
    args = parse(Args, argv, about, positional="sizes")
    with flags(args), tidy_when_terminated():
        device, peer = prepare(args, ("llama_cpp", "gguf"), "'llava_min[gguf]'")
        if args.peer and device != "cpu":
            raise UserError("llama.cpp is measured on the CPU; leave it out", "peer")
        if args.peer is None and not peer:
            info(f"{PEER}: left out: llama-cpp-python and gguf are not installed")
        result = bench(args, device, peer and device == "cpu")
    if args.json:
        write_json(Path(args.json), [result])


def bench(args: Args, device: str, peer: bool) -> dict:
    """Measure one checkpoint, print its tables, return its figures."""
    import torch

    from llava_min.weights import NAMES, pick_dtype

    source = open_source(args)
    config = source.model.config
    check_context(source.name, config, TEXT + args.new_tokens, "--new-tokens")
    asked = check_questions(args, source)
    methods = pick_methods(args, source.model)
    dtype = NAMES[pick_dtype(args.dtype, source.model, torch.device(device))]
    need_memory(source.num_bytes, device, False)
    ids = prompt(config, 1, config.tokens_per_image + TEXT)[0]
    ids = ids[ids != config.image_token_id].tolist()
    spec = {"device": device, "dtype": dtype, "ids": ids, "context": len(ids) + args.new_tokens}
    spec |= {name: getattr(args, name) for name in SHARED}
    result = {
        "size": source.name,
        "dtype": FLAGS[dtype],
        "device": device,
        "machine": machine(device),
        "versions": {name: version(name) for name in ("torch", *["llama-cpp-python"] * peer)},
        "prompt_tokens": len(ids),
        "rounds": args.rounds,
        **{name: getattr(args, name) for name in ("new_tokens", *SHARED)},
        **asked,
        "variants": [],
    }
    print("\n".join(heading(result)), flush=True)
    # the random weights, and one quantized checkpoint, which is no larger
    with scratch(source.num_bytes * (1 + source.random), source.name) as room:
        try:
            for row in measured(source, methods, peer, spec, args, room):
                compare(row, (result["variants"] or [row])[0])
                result["variants"].append(row)
                print(speed_line(row), flush=True)
        finally:  # minutes of work are shown, also where a later row fails
            for line in notes(result) + quality_table(result) + answers(result):
                print(line, flush=True)
    for row in result["variants"]:
        row.pop("answers", None)
    return result


SHARED = (
    "compile",
    "data",
    "calibration_data",
    "image_folder",
    "image",
    "prompt",
    "max_new_tokens",
)


# ---- the measurement


def measured(
    source: Source, methods: list[str], peer: bool, spec: dict, args: Args, room: Path
) -> Iterator[dict]:
    """The figures of the checkpoint as it is, then of each other form of it, one after another."""
    from llava_min.quant.methods import CALIBRATED

    folder = source.name
    if source.random:
        info(
            f"{source.name}: writing {source.num_bytes / MIB:,.0f} MiB of random weights to {room}"
        )
        folder = str(room / "plain")
        write_source(source, room / "plain")
    yield {
        "name": FLAGS[spec["dtype"]],
        "disk_bytes": source.num_bytes,
        **answering(FLAGS[spec["dtype"]], Answering, spec | {"folder": folder}, args),
    }
    stored = FLAGS[str(source.stored).removeprefix("torch.")]
    for method in methods:
        given = {"method": method, "dtype": stored, "device": spec["device"]}
        given["group_size"] = group_size(method, args)
        if method in CALIBRATED:
            given |= {"data": args.calibration_data, "image_folder": args.image_folder}
        row, out = written(method, folder, given, spec, room)
        yield row | answering(method, Answering, spec | {"folder": str(out)}, args)
        shutil.rmtree(out)
    if peer:
        yield measured_peer(folder, spec, args, room / "model-q4_0.gguf")


def measured_peer(source: str, spec: dict, args: Args, file: Path) -> dict:
    """The figures of llama.cpp's Q4_0.

    On a CPU with AMX it can crash as it reads more than one token
    (https://github.com/ggml-org/llama.cpp/issues/20824); prefill and decode are then measured
    apart.
    """
    info(f"{PEER}: writing llama.cpp's file")
    spec = spec | {"folder": source, "file": str(file), "threads": machine("cpu")["threads"]}
    with running(PEER, WritingGguf, spec) as worker:
        row = wrote(PEER, worker, [file])
    ways = {"kernels": True, "singly": False}
    try:
        return row | answering(PEER, LlamaCpp, spec | ways, args)
    except Ended:
        info(f"{PEER}: llama.cpp crashed, as it can with AMX: prefill without its kernels for it,")
        info(f"{'':{len(PEER)}}  and decode after the prompt was read token by token")
    plain = answering(PEER, LlamaCpp, spec | {"kernels": False, "singly": False}, args)
    best = answering(PEER, LlamaCpp, spec | {"kernels": True, "singly": True}, args)
    return row | best | {"prefill_tokens_s": plain["prefill_tokens_s"], "crashed": True}


def written(method: str, source: str, given: dict, spec: dict, room: Path) -> tuple[dict, Path]:
    """Have the verb write the checkpoint quantized: its figures, and the folder."""
    out = room / method
    argv = [source, str(out)]
    for name, value in given.items():
        if value is not None:
            argv += [flag_of(name), str(value)]
    info(f"{method}: quantizing")
    with running(method, Writing, spec | {"argv": argv}) as worker:
        return wrote(method, worker, out.glob("*.safetensors")), out


def wrote(name: str, worker: Worker, files: Iterable[Path]) -> dict:
    """The figures of what a program wrote."""
    [done] = worker.records["start"]
    return {
        "name": name,
        "disk_bytes": sum(path.stat().st_size for path in files),
        "quantize_s": done["load"],
        "quantize_peak_mib": done["peak"] / MIB,
    }


def answering(name: str, program: type, spec: dict, args: Args) -> dict:
    """How fast a checkpoint is read and answers, what memory that takes, and what it answers."""
    info(f"{name}: answering")
    with running(name, program, spec) as worker:
        ours = program is Answering
        if ours:
            worker.do("image")
        worker.do("text", 2, record="warm")
        for _ in range(args.rounds):
            worker.do("text", args.new_tokens)
        out = {
            "peak_mib": max(map(worker.peak, worker.records)),
            "load_s": worker.records["start"][0]["load"],
            "prefill_tokens_s": len(spec["ids"]) / worker.median("text", "first"),
            "decode_tokens_s": worker.median("text", "rate"),
        }
        if ours and args.data is not None:
            worker.do("quality")
            [found] = worker.records["quality"]
            out |= {key: found[key] for key in ("perplexity", "exact_match", "answers")}
            out["answer"] = found["answers"][0]
        if ours and args.prompt is not None:
            worker.do("ask")
            out["answer"] = worker.records["ask"][0]["answer"]
    return out


@contextmanager
def running(name: str, program: type, spec: dict) -> Iterator[Worker]:
    """A Worker that ends with the block; its UserError says of which form of the checkpoint."""
    try:
        with closing(Worker(program, spec)) as worker:
            yield worker
    except UserError as e:
        raise type(e)(f"{name}: {e}") from None


def compare(row: dict, plain: dict) -> None:
    """Set a row beside the first: its ratios, and the share of answers that are the same."""
    keys = {"disk_bytes": "disk_bytes", "peak_mib": "peak_mib", "quantize_peak_mib": "peak_mib"}
    keys |= {key: key for key in ("prefill_tokens_s", "decode_tokens_s", "perplexity")}
    row["ratio"] = {key: row[key] / plain[base] for key, base in keys.items() if key in row}
    if "answers" in row and row is not plain:
        pairs = [(a, b) for a, b in zip(row["answers"], plain["answers"]) if None not in (a, b)]
        row["agreement"] = sum(a == b for a, b in pairs) / max(len(pairs), 1)
