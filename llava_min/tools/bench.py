"""`python -m llava_min bench SIZE`: how fast it loads, reads a picture and answers, beside transformers.

The weights are random, of a named size (llava_min/config.py), in a temporary folder that both programs load;
or SIZE is the folder of a llava-hf checkpoint, and they are its own. Each program is a process of its own, so
its peak memory is its own; the two work in turn, never at once, so that whatever else the machine does falls
on both. The work is the same: one picture and 30 text tokens read, then a fixed number of new tokens, greedy
and with beams, no end token allowed before.

A new token costs one reading of the weights, so decoding is also set against the memory bandwidth, measured
in the same rounds over the model's own weights: as matrix-vector products, and as plain reads (on a GPU,
copies).
"""

import contextlib
import difflib
import importlib.util
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from llava_min.cli import Count, UserError, note, parse, printable, warn
from llava_min.config import SIZES, LlavaConfig
from llava_min.files import check_free, read_json, write_json

TEXT = 30  # tokens of the prompt beside the picture's
SWEEPS = 5  # over all weights, for a bandwidth
SHARD = 1 << 30  # bytes of random weights that stand in memory at one time
GIB, MIB = 1 << 30, 1 << 20
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class Knobs:
    sizes: list[str] = field(default_factory=lambda: ["300m"])  # 300m, 1b, 7b …, or a folder (300m)
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the weights
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    rounds: Count = 3  # every figure is the median of so many
    new_tokens: Annotated[int, 2, 1 << 31] = 32  # new tokens per answer
    beams: Count = 4  # of beam search; 1 leaves it out
    compile: bool = False  # compile our greedy step; transformers stays as it comes
    peer: bool | None = None  # measure transformers too (where it is installed)
    json: str | None = None  # write the figures to this file too


# A program, in its own process


class Ours:
    """This package, through the calls that `load` and `generate` are made of."""

    def __init__(self, spec: dict):
        start = time.perf_counter()
        import torch

        from llava_min.generate import Options, columns, generate
        from llava_min.llava import Llava
        from llava_min.load import collect_entries, read_config
        from llava_min.weights import check_entries, load_weights
        self.imported = time.perf_counter() - start
        self.spec, self.version, self.device = spec, torch.__version__, torch.device(spec["device"])
        self.options, self.columns, self.generate = Options, columns, generate
        start = time.perf_counter()
        config, clip = read_config(Path(spec["folder"]))
        entries = collect_entries(Path(spec["folder"]), config, clip)
        with torch.device("meta"):
            self.model = Llava(config)
        if config.tie_word_embeddings:
            entries.pop("lm_head.weight", None)
        check_entries(entries, self.model)
        load_weights(self.model, entries, getattr(torch, spec["dtype"]), self.device)
        self.model.tie_weights()
        self.model.eval()
        self.loaded = now(self.device) - start
        ids, pixels = prompt(config)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def greedy(self, n: int) -> dict:
        times, ids = [now(self.device)], []
        options = self.options(max_new_tokens=n, min_new_tokens=n)
        for column in self.columns(self.model, self.batch, options, compile=self.spec["compile"]):
            ids.append(column)
            if len(ids) in (1, n):
                times.append(now(self.device))
        return {**latency(times, n), "ids": [int(i) for i in ids]}

    def beam(self, n: int) -> dict:
        start, beams = now(self.device), self.spec["beams"]
        ids = self.generate(self.model, self.batch, num_beams=beams, max_new_tokens=n, min_new_tokens=n)[0]
        return {"seconds": now(self.device) - start, "ids": ids}

    def bandwidth(self) -> dict:
        """The bytes that one token reads, and GB/s over just these."""
        import torch
        import torch.nn.functional as F

        linear = [m for m in self.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
        weights = [m.weight for m in [*linear, self.model.lm_head]]
        size, widest = sum(w.nbytes for w in weights), max(w.numel() for w in weights)
        rows = {w.shape[1]: torch.randn(1, w.shape[1], dtype=w.dtype, device=self.device) for w in weights}

        def rate(read: Any) -> float:
            times = []
            for _ in range(SWEEPS):
                start = now(self.device)
                for w in weights:
                    read(w)
                times.append(now(self.device) - start)
            return size / statistics.median(times) / 1e9

        with torch.inference_mode():
            matvec = rate(lambda w: F.linear(rows[w.shape[1]], w))
            if self.device.type == "cpu":
                read = rate(lambda w: w.view(-1).view(torch.int64).sum())
            else:
                target = torch.empty(widest, dtype=weights[0].dtype, device=self.device)
                read = 2 * rate(lambda w: target[: w.numel()].copy_(w.view(-1)))  # read and written
        return {"bytes": size, "matvec": matvec, "read": read}


class Transformers:
    """Hugging Face transformers as it comes: its default attention, its default `generate`."""

    def __init__(self, spec: dict):
        os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # what our package may set is not what its users have
        os.environ["HF_HUB_OFFLINE"] = "1"
        start = time.perf_counter()
        import torch
        import transformers
        from transformers import LlavaForConditionalGeneration

        self.imported = time.perf_counter() - start
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.spec, self.version, self.device = spec, transformers.__version__, torch.device(spec["device"])
        start = time.perf_counter()
        self.model = LlavaForConditionalGeneration.from_pretrained(spec["folder"], dtype=spec["dtype"])
        self.model.to(self.device).eval()
        self.loaded = now(self.device) - start
        path = Path(spec["folder"], "config.json")
        ids, pixels = prompt(LlavaConfig.from_hf(read_json(path), str(path)))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        self.batch = {name: x.to(self.device) for name, x in batch.items()}

    def run(self, n: int, **options: Any) -> list[int]:
        ids = self.model.generate(**self.batch, do_sample=False, max_new_tokens=n, min_new_tokens=n,
                                  pad_token_id=0, **options)
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


def now(device: Any) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        import torch
        torch.cuda.synchronize(device)
    return time.perf_counter()


def latency(times: list[float], n: int) -> dict:
    """Times of the start, the first and the n-th token -> seconds to the first, tokens/s from there on."""
    return {"first": times[1] - times[0], "rate": (n - 1) / (times[2] - times[1])}


def prompt(config: LlavaConfig) -> tuple[Any, Any]:
    """Ids (1, P + TEXT) with a picture among them, pixels (1, 3, S, S)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    words = torch.randint(config.text.vocab_size, (TEXT,), generator=generator)
    words[words == config.image_token_id] = 0
    picture = torch.full((config.tokens_per_image,), config.image_token_id)
    pixels = torch.randn(1, 3, config.vision.image_size, config.vision.image_size, generator=generator)
    return torch.cat([words[:5], picture, words[5:]])[None], pixels


def peak_memory(device: Any) -> int:
    """Peak bytes since the last call: of the process, or on a GPU of the tensors there."""
    if device.type == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status = Path("/proc/self/status")
    if not status.exists():
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, and since the start
    peak = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    with contextlib.suppress(OSError):  # where this may not be written, the peak is since the start
        Path("/proc/self/clear_refs").write_text("5")
    return int(peak) * 1024


def serve(pipe: Any, program: type, spec: dict) -> None:
    """Load, then do the jobs (name, arguments) that come through `pipe`; each is answered by a dict."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    try:
        worker = program(spec)
        pipe.send({"import": worker.imported, "load": worker.loaded, "version": worker.version,
                   "peak": peak_memory(worker.device)})
        while True:
            job, arguments = pipe.recv()
            peak_memory(worker.device)  # forgets what was before
            pipe.send({**getattr(worker, job)(*arguments), "peak": peak_memory(worker.device)})
    except EOFError:  # the parent is gone
        pass
    except UserError as e:
        pipe.send({"mistake": str(e)})
    except Exception:
        pipe.send({"fault": traceback.format_exc()})


class Worker:
    """The parent's end of a program; `records` keeps what each kind of job answered."""

    def __init__(self, program: type, spec: dict):
        context = multiprocessing.get_context("spawn")  # a fork would begin with its parent's memory
        self.pipe, other = context.Pipe()
        self.name, self.records = program.__name__.lower(), {}
        self.process = context.Process(target=serve, args=(other, program, spec), daemon=True)
        self.process.start()
        other.close()
        self.records["start"] = [self.receive()]

    def receive(self) -> dict:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise UserError(f"{self.name}: its process ended with code {self.process.exitcode}, most likely "
                            "for want of memory; take a smaller size or --no-peer") from None
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "fault" in answer:
            raise RuntimeError(f"{self.name} failed:\n{answer['fault']}")
        return answer

    def do(self, job: str, *arguments: int, record: str | None = None) -> None:
        self.pipe.send((job, arguments))
        self.records.setdefault(record or job, []).append(self.receive())

    def median(self, job: str, key: str) -> float:
        return statistics.median(r[key] for r in self.records[job])

    def peak(self, job: str) -> float:
        """MiB at the most, while loading or doing this kind of job."""
        return max(r["peak"] for kind in ("start", job) for r in self.records[kind]) / MIB

    def figures(self) -> dict:
        start = self.records["start"][0]
        out = {"import_s": start["import"], "load_s": start["load"],
               "start_to_first_token_s": start["import"] + start["load"] + self.median("warm", "first"),
               "first_token_s": self.median("greedy", "first"),
               "decode_tokens_s": self.median("greedy", "rate")}
        if "beam" in self.records:
            out |= {"beams_s": self.median("beam", "seconds"), "peak_beams_mib": self.peak("beam")}
        return out | {"peak_greedy_mib": self.peak("greedy")}

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


# The bench


def main(argv: list[str]) -> None:
    about = "Measure speed and memory on random weights, beside transformers where it is installed."
    knobs = parse(Knobs, argv, about, positional="sizes")
    installed = importlib.util.find_spec("transformers") is not None
    if knobs.peer and not installed:
        raise UserError("--peer: transformers is not installed; pip install transformers, or leave it out")
    peer = installed if knobs.peer is None else knobs.peer
    if knobs.json:
        check_free(Path(knobs.json))
    configs = {size: read_size(size, knobs.new_tokens) for size in knobs.sizes}
    from llava_min.load import pick_device

    device = str(pick_device(knobs.device))
    if device == "cpu" and (load := os.getloadavg()[0]) > 0.5:
        warn(f"other programs keep the machine busy (load {load:.1f}); absolute figures will be too low")
    results = [bench(size, config, knobs, device, peer) for size, config in configs.items()]
    if knobs.json:
        write_json(Path(knobs.json), results)


def read_size(size: str, new_tokens: int) -> LlavaConfig:
    """The config of a named size or of a folder, in whose context the work fits, or UserError."""
    if size in SIZES:
        config = SIZES[size]
    elif Path(size).is_dir():
        path = Path(size, "config.json")
        config = LlavaConfig.from_hf(read_json(path), str(path))
        if config.vision_source:
            raise UserError(f"{size}: a checkpoint in the original layout, which transformers does not load; "
                            "give one in the llava-hf layout")
    else:
        near = difflib.get_close_matches(size, SIZES, n=1)
        mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(SIZES)}"
        raise UserError(f"{printable(size)}: neither a size nor a folder; {mend}")
    tokens, most = config.tokens_per_image + TEXT + new_tokens, config.text.max_position_embeddings
    if tokens > most:
        raise UserError(f"--new-tokens: {new_tokens} with the prompt are {tokens} tokens and the context of "
                        f"{size} is {most}; ask for fewer")
    return config


def bench(size: str, config: LlavaConfig, knobs: Knobs, device: str, peer: bool) -> dict:
    """Measure one size, print its table, return its figures."""
    import torch

    from llava_min.llava import Llava

    with torch.device("meta"):
        model = Llava(config)
    dtype = getattr(torch, DTYPES[knobs.dtype])
    total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    need_memory(total, device, peer)
    with contextlib.ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # gigabytes stay behind otherwise
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = Path(size)
        if size in SIZES:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava_min-bench-")))
            if (free := shutil.disk_usage(folder).free) < total + 64 * MIB:
                raise UserError(f"{folder.parent}: {size} takes {total / GIB:.1f} GiB there and "
                                f"{free / GIB:.1f} are free; make room, or set TMPDIR to a larger disk")
            note(f"{size}: writing {total / GIB:.1f} GiB of random weights to {folder}")
            write_random(model, config, folder, dtype)
        spec = {"folder": str(folder), "dtype": DTYPES[knobs.dtype], "device": device, "beams": knobs.beams,
                "compile": knobs.compile}
        workers = []
        for program in (Ours, Transformers)[: 1 + peer]:
            note(f"{size}: loading, {program.__name__.lower()}")
            workers.append(Worker(program, spec))
            stack.callback(workers[-1].close)
        measure(workers, knobs)
    result = summarize(size, config, knobs, device, workers)
    print("\n".join(table(result)), flush=True)
    return result


def need_memory(total: int, device: str, peer: bool) -> None:
    """Refuse what the machine's memory cannot hold, before the system ends some process for it."""
    meminfo = Path("/proc/meminfo")
    if device != "cpu" or not meminfo.exists():
        return
    free = meminfo.read_text().partition("MemAvailable:")[2].split()[0]
    need, free = total * (1 + peer) / GIB, int(free) * 1024 / GIB
    if need > free:
        raise UserError(f"the weights take {need:.1f} GiB of memory{' in two programs' * peer} and {free:.1f} "
                        f"are free; take a smaller size{' or --no-peer' * peer}")


def write_random(model: Any, config: LlavaConfig, folder: Path, dtype: Any) -> None:
    """A llava-hf folder for `model` on meta, a shard at a time: normal matrices, zero biases, unit norms."""
    import torch

    from llava_min.weights import WRITE, save_tensors, translate

    generator = torch.Generator().manual_seed(0)
    files, shard, left = {}, {}, len(list(model.parameters()))
    for name, p in model.named_parameters():
        new = torch.empty(p.shape, dtype=dtype)
        if p.dim() == 1 and name.endswith((".bias", ".weight")):
            new.fill_(name.endswith(".weight"))
        else:
            new.normal_(std=0.02, generator=generator)
        shard[translate(name, WRITE)] = new
        left -= 1
        if not left or sum(x.nbytes for x in shard.values()) > SHARD:
            file = f"model-{len(set(files.values())) + 1:05}.safetensors"
            save_tensors(shard, folder / file)
            files |= dict.fromkeys(shard, file)
            shard = {}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    write_json(folder / "config.json", replace(config, dtype=str(dtype).removeprefix("torch.")).to_hf())


def measure(workers: list[Worker], knobs: Knobs) -> None:
    """First the greedy rounds, then those with beams, so that neither's peak is counted as the other's."""
    for worker in workers:
        worker.do("greedy", 2, record="warm")
    for i in range(knobs.rounds):
        note(f"greedy, round {i + 1} of {knobs.rounds}")
        workers[0].do("bandwidth")
        for worker in workers:
            worker.do("greedy", knobs.new_tokens)
    for i in range(knobs.rounds if knobs.beams > 1 else 0):
        note(f"{knobs.beams} beams, round {i + 1} of {knobs.rounds}")
        for worker in workers:
            worker.do("beam", knobs.new_tokens)


# What comes out


ROWS = [  # key, label, unit, decimals, the better way; of memory the ratio says how much of theirs ours is
    ("import_s", "import", "s", 1, "less"),
    ("load_s", "load", "s", 1, "less"),  # transformers maps the file and reads it with the first token
    ("start_to_first_token_s", "start to first token", "s", 1, "less"),
    ("first_token_s", "first token, when warm", "s", 2, "less"),
    ("decode_tokens_s", "decode", "tokens/s", 1, "more"),
    ("beams_s", "{beams} beams x {new_tokens} tokens", "s", 2, "less"),
    ("peak_greedy_mib", "peak memory, greedy", "MiB", 0, "share"),
    ("peak_beams_mib", "peak memory, {beams} beams", "MiB", 0, "share"),
]


def summarize(size: str, config: LlavaConfig, knobs: Knobs, device: str, workers: list[Worker]) -> dict:
    ours = workers[0]
    versions = {"torch" if w is ours else w.name: w.records["start"][0]["version"] for w in workers}
    result = {"size": size, "dtype": knobs.dtype, "device": device, "compile": knobs.compile,
              "prompt_tokens": config.tokens_per_image + TEXT, "new_tokens": knobs.new_tokens,
              "beams": knobs.beams, "rounds": knobs.rounds, "machine": machine(device), "versions": versions}
    result |= {w.name: w.figures() for w in workers}
    size, matvec, read = (ours.median("bandwidth", key) for key in ("bytes", "matvec", "read"))
    reached = size * result["ours"]["decode_tokens_s"] / 1e9
    result["bandwidth"] = {
        "bytes_per_token": size, "decode_gb_s": reached, "matvec_gb_s": matvec, "read_gb_s": read,
        "share_of_matvec": reached / matvec, "share_of_read": reached / read}
    if len(workers) == 2:
        a, b = (result[w.name] for w in workers)
        result["ratio"] = {key: b[key] / a[key] if better == "less" else a[key] / b[key]
                           for key, _, _, _, better in ROWS if key in a}
        result["same_ids"] = {}
        for job in ("greedy", "beam") if "beam" in ours.records else ("greedy",):
            pairs = enumerate(zip(*(w.records[job][0]["ids"] for w in workers)))
            result["same_ids"][job] = next((i for i, (x, y) in pairs if x != y), knobs.new_tokens)
    return result


def machine(device: str) -> dict:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text().split() if cpuinfo.exists() else []
    isa = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in words), platform.machine())
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": isa,
            "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None}


def table(r: dict) -> list[str]:
    """The figures of one size, in lines of at most 80 columns."""
    m, b, names = r["machine"], r["bandwidth"], [name for name in ("ours", "transformers") if name in r]
    place = m["gpu"] or f"{m['cores']} CPU cores ({m['isa']}), {m['threads']} threads"
    lines = [f"{r['size']} {r['dtype']}{', our greedy step compiled' * r['compile']}, on {place}",
             ", ".join(f"{name} {version}" for name, version in r["versions"].items()),
             f"1 picture + {TEXT} tokens ({r['prompt_tokens']} in all); medians of {r['rounds']}", "",
             f"{'':36}" + "".join(f"{name:>14}" for name in names) + f"{'ratio':>12}" * ("ratio" in r)]
    for key, label, unit, decimals, better in ROWS:
        if key in r["ours"]:
            cells = "".join(f"{r[name][key]:14,.{decimals}f}" for name in names)
            ratio = f"{r['ratio'][key]:12.2f}{'' if better == 'share' else 'x'}" if "ratio" in r else ""
            lines.append(f"{label.format(**r):26}{unit:>10}{cells}{ratio}")
    gigabytes, plain = b["bytes_per_token"] / 1e9, "copies" if m["gpu"] else "reads"
    lines += ["", f"a token reads {gigabytes:.2f} GB of weights: {b['decode_gb_s']:.1f} GB/s, which is",
              f"{b['share_of_matvec']:6.0%} of matrix-vector products over them ({b['matvec_gb_s']:.1f} GB/s)",
              f"{b['share_of_read']:6.0%} of plain {plain} of them ({b['read_gb_s']:.1f} GB/s)"]
    for job, same in r.get("same_ids", {}).items():
        rest = "" if same == r["new_tokens"] else f", then other ones{' (rounding)' * (r['dtype'] != 'fp32')}"
        lines.append(f"{job} ids: the first {same} of {r['new_tokens']} are transformers'{rest}")
    return lines
