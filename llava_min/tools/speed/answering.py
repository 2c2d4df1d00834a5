"""The programs that answer: ours, transformers', and the machine's own memory bandwidth."""

import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Any

from llava_min.config import LlavaConfig
from llava_min.tools.speed.worker import as_users_have_it, config_of, now, prompt, quiet

TEXT = 30  # tokens of the prompt beside the image's
SAMPLE = 1 << 30  # bytes of weights that the bandwidth is measured over
SWEEPS = 5  # over all weights, for a bandwidth


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
        mask = torch.ones_like(ids)
        self.batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}

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
        exactly_n = {"max_new_tokens": n, "min_new_tokens": n}
        [ids] = self.generate(self.model, self.batch, num_beams=beams, **exactly_n)
        return {"seconds": now(self.device) - start, "ids": ids}


class Machine:
    """The best possible speed of reading weights of the decoder's shapes. A process of its own."""

    def __init__(self, spec: dict):
        start = time.perf_counter()
        import torch

        self.imported = time.perf_counter() - start
        self.version, self.device = torch.__version__, torch.device(spec["device"])
        start, dtype = time.perf_counter(), getattr(torch, spec["dtype"])
        sizes = shapes(spec["config"])
        nbytes = (dtype.itemsize * math.prod(size) for size in sizes)
        before = itertools.accumulate(nbytes, initial=0)
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
        self.spec, self.version = spec, transformers.__version__
        self.device = torch.device(spec["device"])
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
        options |= {"do_sample": False, "pad_token_id": 0}
        ids = self.model.generate(**self.batch, max_new_tokens=n, min_new_tokens=n, **options)
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
    """Times of the start, the first and the n-th token -> seconds to the first, tokens/s after."""
    return {"first": times[1] - times[0], "rate": (n - 1) / (times[2] - times[1])}
