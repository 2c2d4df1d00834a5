"""`python -m llava_min bench SIZE`: how fast it loads, reads a picture and answers, beside transformers.

The weights are random, of a named size (llava_min/config.py), in a temporary folder that both programs load. Each
program is a process of its own, so its peak memory is its own; the two work in turn, never at once, so that whatever
else the machine does falls on both. The work is the same: one picture and 30 text tokens read, then a fixed number of
new tokens, greedy and with beams, no end token allowed before.

Reading a model's weights is what one new token costs, so decoding is also set against the machine's memory bandwidth,
measured in the same rounds: as matrix-vector products over the model's own weights, and as plain reads of them
(on a GPU, device copies).
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
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from llava_min.cli import Count, UserError, note, parse, printable
from llava_min.config import SIZES, LlavaConfig
from llava_min.files import check_free, read_json, write_json

TEXT = 30  # tokens of the prompt beside the picture's
SWEEPS = 5  # over all weights, for a bandwidth
SHARD = 1 << 30  # bytes of random weights that stand in memory at one time
MIB = 1 << 20
NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class Knobs:
    sizes: list[str] = field(default_factory=lambda: ["300m"])  # 300m (the default), 1b, 7b, 13b, mistral-7b, or a llava-hf folder; several run in turn
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the weights
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    rounds: Count = 3  # every figure is the median of so many
    new_tokens: Annotated[int, 2, 1 << 31] = 32  # new tokens per answer
    beams: Count = 4  # of beam search; 1 leaves it out
    compile: bool = False  # compile our greedy step; transformers stays as it comes
    peer: bool | None = None  # measure transformers too; by default where it is installed
    json: str | None = None  # write the figures to this file too


# One program's process


class Ours:
    """This package, through the calls that `generate` is made of."""

    def __init__(self, spec: dict):
        start = time.perf_counter()
        import torch

        from llava_min.generate import Options, columns, generate
        from llava_min.llava import Llava
        from llava_min.load import collect_entries, read_config
        from llava_min.weights import check_entries, load_weights
        self.imported = time.perf_counter() - start
        self.spec, self.version = spec, torch.__version__
        self.options, self.columns, self.generate = Options, columns, generate
        self.device = torch.device(spec["device"])
        start = time.perf_counter()
        folder = Path(spec["folder"])
        config, clip = read_config(folder)
        entries = collect_entries(folder, config, clip)
        with torch.device("meta"):
            self.model = Llava(config)
        if config.tie_word_embeddings:
            entries.pop("lm_head.weight", None)
        check_entries(entries, self.model)
        load_weights(self.model, entries, getattr(torch, spec["dtype"]), self.device)
        self.model.tie_weights()
        self.model.eval()
        self.loaded = synchronized(self.device) - start
        ids, pixels = prompt(config)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def greedy(self, n: int) -> dict:
        stamps = [synchronized(self.device)]
        o = self.options(max_new_tokens=n, min_new_tokens=n)
        ids = []
        for column in self.columns(self.model, self.batch, o, compile=self.spec["compile"]):
            ids.append(column)
            if len(ids) in (1, n):
                stamps.append(synchronized(self.device))
        return {**latency(stamps, n), "ids": [int(i) for i in ids]}

    def beam(self, n: int) -> dict:
        start = synchronized(self.device)
        ids = self.generate(self.model, self.batch, num_beams=self.spec["beams"], max_new_tokens=n, min_new_tokens=n)[0]
        return {"seconds": synchronized(self.device) - start, "ids": ids}

    def bandwidth(self) -> dict:
        """Bytes that one token reads, and GB/s over just these: as F.linear of one row, and read (copied on a GPU)."""
        import torch
        import torch.nn.functional as F
        weights = [m.weight for m in self.model.language_model.modules() if isinstance(m, torch.nn.Linear)] + [self.model.lm_head.weight]
        size = sum(w.nbytes for w in weights)
        rows = {w.shape[1]: torch.randn(1, w.shape[1], dtype=w.dtype, device=self.device) for w in weights}
        target = torch.empty_like(max(weights, key=lambda w: w.nbytes)) if self.device.type == "cuda" else None

        def rate(read: Any, factor: int = 1) -> float:
            times = []
            for _ in range(SWEEPS):
                start = synchronized(self.device)
                for w in weights:
                    read(w)
                times.append(synchronized(self.device) - start)
            return factor * size / statistics.median(times) / 1e9

        with torch.inference_mode():
            matvec = rate(lambda w: F.linear(rows[w.shape[1]], w))
            if target is None:
                return {"bytes": size, "matvec": matvec, "read": rate(lambda w: w.view(-1).view(torch.int64).sum())}
            return {"bytes": size, "matvec": matvec, "read": rate(lambda w: target.view(-1)[: w.numel()].copy_(w.view(-1)), 2)}


class Transformers:
    """Hugging Face transformers as it comes: default attention, default `generate`."""

    def __init__(self, spec: dict):
        os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # ours to set, not what its users have
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
        self.loaded = synchronized(self.device) - start
        ids, pixels = prompt(LlavaConfig.from_hf(read_json(Path(spec["folder"], "config.json"))))
        self.batch = {k: v.to(self.device) for k, v in
                      {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}.items()}

    def run(self, n: int, **options) -> list[int]:
        ids = self.model.generate(**self.batch, do_sample=False, max_new_tokens=n, min_new_tokens=n, pad_token_id=0, **options)
        return ids[0, self.batch["input_ids"].shape[1] :].tolist()

    def greedy(self, n: int) -> dict:
        stamps, seen = [synchronized(self.device)], 0

        class Streamer:
            def put(_, ids):
                nonlocal seen
                if seen in (1, n):  # the prompt itself is the first that comes
                    stamps.append(synchronized(self.device))
                seen += 1

            def end(_):
                pass

        ids = self.run(n, streamer=Streamer())
        return {**latency(stamps, n), "ids": ids}

    def beam(self, n: int) -> dict:
        start = synchronized(self.device)
        ids = self.run(n, num_beams=self.spec["beams"])
        return {"seconds": synchronized(self.device) - start, "ids": ids}


def synchronized(device: Any) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        import torch
        torch.cuda.synchronize(device)
    return time.perf_counter()


def latency(stamps: list[float], n: int) -> dict:
    """Start, first and last token's times -> seconds to the first token, tokens/s from there on."""
    return {"first": stamps[1] - stamps[0], "rate": (n - 1) / (stamps[-1] - stamps[1])}


def prompt(config: LlavaConfig) -> tuple[Any, Any]:
    """Ids (1, P + TEXT) with a picture among them, pixels (1, 3, S, S)."""
    import torch
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(config.text.vocab_size, (TEXT,), generator=generator)
    words[words == config.image_token_id] = 0
    picture = torch.full((config.tokens_per_image,), config.image_token_id)
    size = config.vision.image_size
    return torch.cat([words[:5], picture, words[5:]])[None], torch.randn(1, 3, size, size, generator=generator)


def serve(pipe: Any, program: type, spec: dict) -> None:
    """Load, then do the jobs that come through `pipe`, each answered by a dict; a failure is answered by its text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    try:
        worker = program(spec)
        pipe.send({"import": worker.imported, "load": worker.loaded, "version": worker.version, "peak": peak_memory(worker.device)})
        while True:
            job, arguments = pipe.recv()
            peak_memory(worker.device)
            pipe.send({**getattr(worker, job)(*arguments), "peak": peak_memory(worker.device)})
    except UserError as e:
        pipe.send({"mistake": str(e)})
    except EOFError:  # the parent is gone
        pass
    except Exception:
        pipe.send({"fault": traceback.format_exc()})


def peak_memory(device: Any) -> int:
    """Peak bytes since the last call: of the process, on a GPU of its tensors there."""
    if device.type == "cuda":
        import torch
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if not os.path.exists("/proc/self/status"):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes, and since the start
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    with contextlib.suppress(OSError):  # where this may not be written the peak is since the start
        Path("/proc/self/clear_refs").write_text("5")
    return int(peak) * 1024


# The bench


class Worker:
    """A program in a process of its own, ready to work; `records` keeps what each kind of job answered."""

    def __init__(self, program: type, spec: dict):
        context = multiprocessing.get_context("spawn")  # a fork would share its parent's memory, and its peak
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
            raise UserError(f"{self.name}: its process ended with code {self.process.exitcode}, most likely for want of memory; "
                            "take a smaller size or --no-peer") from None
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "fault" in answer:
            raise RuntimeError(f"{self.name} failed:\n{answer['fault']}")
        return answer

    def do(self, job: str, *arguments: int, record: str | None = None) -> None:
        self.pipe.send((job, arguments))
        self.records.setdefault(record or job, []).append(self.receive())

    def close(self) -> None:
        self.process.terminate()
        self.process.join()

    def median(self, job: str, key: str) -> float:
        return statistics.median(r[key] for r in self.records[job])

    def figures(self) -> dict:
        peak = lambda job: max(r["peak"] for kind in ("start", job) for r in self.records[kind]) / MIB
        out = {"import_s": self.median("start", "import"), "load_s": self.median("start", "load"),
               "first_token_s": self.median("greedy", "first"), "decode_tokens_s": self.median("greedy", "rate"),
               "peak_greedy_mib": peak("greedy")}
        if "beam" in self.records:
            out |= {"beams_s": self.median("beam", "seconds"), "peak_beams_mib": peak("beam")}
        return out


def main(argv: list[str]) -> None:
    knobs = parse(Knobs, argv, "Measure speed and memory on random weights, beside transformers where it is installed.", positional="sizes")
    peer = importlib.util.find_spec("transformers") is not None
    if knobs.peer and not peer:
        raise UserError("--peer: transformers is not installed; pip install transformers, or leave it out")
    if knobs.peer is not None:
        peer = knobs.peer
    if knobs.json:
        check_free(Path(knobs.json))
    configs = {size: read_size(size, knobs) for size in knobs.sizes}
    from llava_min.load import pick_device
    device = str(pick_device(knobs.device))
    results = [bench(size, config, knobs, device, peer) for size, config in configs.items()]
    if knobs.json:
        write_json(Path(knobs.json), results)


def read_size(size: str, knobs: Knobs) -> LlavaConfig:
    """The config of a named size or of a folder, checked for the length of the work."""
    if size in SIZES:
        config = SIZES[size]
    elif Path(size).is_dir():
        path = Path(size, "config.json")
        config = LlavaConfig.from_hf(read_json(path), str(path))
        if config.vision_source:
            raise UserError(f"{size}: the original layout, which transformers does not load; give a llava-hf folder or one of {', '.join(SIZES)}")
    else:
        near = difflib.get_close_matches(size, SIZES, n=1)
        raise UserError(f"{printable(size)}: neither a size nor a folder; " + (f"did you mean {near[0]}?" if near else f"the sizes are {', '.join(SIZES)}"))
    tokens, most = config.tokens_per_image + TEXT + knobs.new_tokens, config.text.max_position_embeddings
    if tokens > most:
        raise UserError(f"--new-tokens: {knobs.new_tokens} make {tokens} tokens with the prompt and the context of {printable(size)} is {most}; ask for fewer")
    return config


def bench(size: str, config: LlavaConfig, knobs: Knobs, device: str, peer: bool) -> dict:
    """Measure one size, print its table, return its figures."""
    import torch

    from llava_min.llava import Llava
    with torch.device("meta"):
        model = Llava(config)
    dtype = NAMES[knobs.dtype]
    total = sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize
    if device == "cpu":
        need_memory(size, total * (2 if peer else 1), peer)
    with contextlib.ExitStack() as stack:
        folder = Path(size)
        if size in SIZES:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava_min-bench-")))
            if (free := shutil.disk_usage(folder).free) < 1.02 * total:
                raise UserError(f"{folder.parent}: {size} takes {total / 2**30:.1f} GiB there and {free / 2**30:.1f} are free; "
                                "make room, or set TMPDIR to a larger disk")
            note(f"{size}: writing {total / 2**30:.1f} GiB of random weights to {folder}")
            write_random(model, config, folder, getattr(torch, dtype))
        spec = {"folder": str(folder), "dtype": dtype, "device": device, "beams": knobs.beams, "compile": knobs.compile}
        workers = []
        stack.callback(lambda: [w.close() for w in workers])
        for program in (Ours, Transformers)[: 1 + peer]:
            note(f"{size}: loading, {program.__name__.lower()}")
            workers.append(Worker(program, spec))
        measure(workers, knobs)
    result = summarize(size, config, knobs, device, workers)
    print("\n".join(table(result)), flush=True)
    return result


def measure(workers: list[Worker], knobs: Knobs) -> None:
    """All greedy rounds, then all rounds with beams, so that the peak of the first is not that of the second."""
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


def need_memory(size: str, total: int, peer: bool) -> None:
    """Refuse weights that the machine cannot hold, before the system ends some process for it."""
    if not os.path.exists("/proc/meminfo"):
        return
    free = next(int(line.split()[1]) * 1024 for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    if total > free:
        raise UserError(f"{printable(size)}: the weights take {total / 2**30:.1f} GiB of memory{' in two programs' if peer else ''} and "
                        f"{free / 2**30:.1f} are free; take a smaller size" + (" or --no-peer" if peer else ""))


def write_random(model: Any, config: LlavaConfig, folder: Path, dtype: Any) -> None:
    """A llava-hf folder of normal matrices, zero biases and unit norms for `model` on meta, made a shard at a time."""
    import torch

    from llava_min.weights import WRITE, save_tensors, translate
    generator = torch.Generator().manual_seed(0)
    shard, size, where, names = {}, 0, {}, [n for n, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        new = torch.empty(p.shape, dtype=dtype)
        if p.dim() == 1 and name.endswith((".bias", ".weight")):
            new.fill_(name.endswith(".weight"))
        else:
            new.normal_(std=0.02, generator=generator)
        shard[translate(name, WRITE)] = new
        size += new.nbytes
        if size > SHARD or name == names[-1]:
            file = f"model-{len(set(where.values())) + 1:05}.safetensors"
            save_tensors(shard, folder / file)
            where |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    write_json(folder / "config.json", replace(config, dtype=str(dtype).removeprefix("torch.")).to_hf())


# The table


ROWS = [  # key, label, unit, decimals, better: "less" or "more", or "share" for a ratio shown as it stands
    ("import_s", "import", "s", 1, "less"),
    ("load_s", "load", "s", 1, "less"),
    ("first_token_s", "first token", "s", 2, "less"),
    ("decode_tokens_s", "decode", "tokens/s", 1, "more"),
    ("beams_s", "{beams} beams x {new_tokens}", "s", 2, "less"),
    ("peak_greedy_mib", "peak memory, greedy", "MiB", 0, "share"),
    ("peak_beams_mib", "peak memory, {beams} beams", "MiB", 0, "share"),
]


def summarize(size: str, config: LlavaConfig, knobs: Knobs, device: str, workers: list[Worker]) -> dict:
    ours, band = workers[0], "bandwidth"
    matvec, read, nbytes = (ours.median(band, key) for key in ("matvec", "read", "bytes"))
    result = {"size": size, "dtype": knobs.dtype, "device": device, "machine": machine(device), "compile": knobs.compile,
              "prompt_tokens": config.tokens_per_image + TEXT, "new_tokens": knobs.new_tokens, "beams": knobs.beams, "rounds": knobs.rounds,
              "versions": {"torch" if w is ours else w.name: w.records["start"][0]["version"] for w in workers}}
    result |= {w.name: w.figures() for w in workers}
    achieved = nbytes * result["ours"]["decode_tokens_s"] / 1e9
    result[band] = {"bytes_per_token": nbytes, "matvec_gb_s": matvec, "read_gb_s": read, "decode_gb_s": achieved,
                    "share_of_matvec": achieved / matvec, "share_of_read": achieved / read}
    if len(workers) == 2:
        mine, theirs = (result[w.name] for w in workers)
        result["ratio"] = {key: mine[key] / theirs[key] if better != "less" else theirs[key] / mine[key]
                           for key, _, _, _, better in ROWS if key in mine}
        pairs = {job: [w.records[job][0]["ids"] for w in workers] for job in ("greedy", "beam") if job in ours.records}
        result["same_ids"] = {job: next((i for i, (a, b) in enumerate(zip(*ids)) if a != b), knobs.new_tokens) for job, ids in pairs.items()}
    return result


def machine(device: str) -> dict:
    import torch
    flags = ""
    if os.path.exists("/proc/cpuinfo"):
        flags = next((line for line in open("/proc/cpuinfo") if line.startswith("flags")), "")
    isa = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {f}" in flags), platform.machine())
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": isa,
            "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None}


def table(r: dict) -> list[str]:
    """The figures as lines of at most 80 columns."""
    m, names = r["machine"], [n for n in ("ours", "transformers") if n in r]
    lines = [f"{r['size']} {r['dtype']} on " + (m["gpu"] or f"{m['cores']} CPU cores ({m['isa']}, {m['threads']} threads)")
             + "".join(f", {name} {version}" for name, version in r["versions"].items()),
             f"1 picture + {TEXT} tokens ({r['prompt_tokens']} in all); median of {r['rounds']}"
             + (", our greedy step compiled" if r["compile"] else ""), "",
             f"{'':34}" + "".join(f"{n:>14}" for n in names) + ("         ratio" if "ratio" in r else "")]
    for key, label, unit, decimals, better in ROWS:
        if key in r["ours"]:
            line = f"{label.format(**r):24}{unit:>10}" + "".join(f"{r[n][key]:14,.{decimals}f}" for n in names)
            if "ratio" in r:
                line += f"{r['ratio'][key]:13.2f}" + ("x" if better != "share" else " ")
            lines.append(line.rstrip())
    b = r["bandwidth"]
    lines += ["", f"decode reads {b['bytes_per_token'] / 1e9:.2f} GB of weights a token: {b['decode_gb_s']:.1f} GB/s",
              f"  {b['share_of_matvec']:4.0%} of matrix-vector products over them, {b['matvec_gb_s']:.1f} GB/s",
              f"  {b['share_of_read']:4.0%} of plain " + ("device copies" if m["gpu"] else "reads") + f", {b['read_gb_s']:.1f} GB/s"]
    for job, same in r.get("same_ids", {}).items():
        lines.append(f"{job} ids: " + (f"all {same} as transformers'" if same == r["new_tokens"] else f"as transformers' for {same} of {r['new_tokens']}"
                     + (", then rounding parts them" if r["dtype"] != "fp32" else "")))
    return lines
