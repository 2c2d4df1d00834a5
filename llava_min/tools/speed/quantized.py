"""The programs of `bench --quantize`: one that writes a quantized checkpoint, one that answers with
it, and llama.cpp's.
"""

import math
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_min.tools.speed.answering import TEXT, Ours, latency
from llava_min.tools.speed.worker import now, prompt

BATCH = 8  # records answered at a time


class Writing:
    """`quantize` as a user calls it: reads a checkpoint and writes a quantized one."""

    def __init__(self, spec: dict):
        import torch

        import llava_min.load  # noqa: F401  (not to be counted)
        from llava_min.tools import quantize

        self.imported, self.version = 0.0, torch.__version__
        self.device = torch.device(spec["device"])
        start = time.perf_counter()
        quantize.main(spec["argv"])
        self.loaded = now(self.device) - start


class Answering(Ours):
    """This package with a checkpoint as it is stored: how fast it answers, and what."""

    def __init__(self, spec: dict):
        start = time.perf_counter()
        import torch

        from llava_min.decoding import decode
        from llava_min.load import open_checkpoint
        from llava_min.options import Options

        self.imported = time.perf_counter() - start
        self.spec, self.version, self.device = spec, torch.__version__, torch.device(spec["device"])
        self.options, self.decode = Options, decode
        start = time.perf_counter()
        checkpoint = open_checkpoint(spec["folder"])
        self.model, self.processor = checkpoint.load(spec["dtype"], self.device)
        self.loaded = now(self.device) - start
        ids, self.pixels = prompt(self.model.config, 1, TEXT)
        self.image_ids, self.text_ids = ids, torch.tensor([spec["ids"]])

    def batch_of(self, ids: Any) -> dict:
        return {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}

    def image(self) -> dict:
        """One image and a few words read, two new tokens: the tower's memory counts, too."""
        self.batch = self.batch_of(self.image_ids) | {"pixel_values": self.pixels}
        return self.greedy(2)

    def text(self, n: int) -> dict:
        """As many tokens of text read, n new ones: the work of the decoder alone."""
        self.batch = self.batch_of(self.text_ids)
        return self.greedy(n)

    def quality(self) -> dict:
        """Perplexity over the supervised tokens of the records, and the greedy answers to them."""
        import torch

        from llava_min.data.dataset import Dataset
        from llava_min.data.records import read_records
        from llava_min.evaluation.loss import mean_loss
        from llava_min.evaluation.predict import predict
        from llava_min.evaluation.score import score
        from llava_min.parallel.ranks import World
        from llava_min.training.loss import summed_loss

        records = read_records(self.spec["data"], self.spec["image_folder"])
        context = self.model.config.text.context
        dataset = Dataset(records, self.processor, max_length=context)
        world = World(0, 1, 0, self.device)
        loss_of = partial(summed_loss, self.model, torch.float32, self.device)  # no autocast
        loss = mean_loss(self.model, dataset, loss_of, BATCH, world)
        most = self.spec["max_new_tokens"]
        rows = predict(self.model, self.processor, records, BATCH, max_new_tokens=most)
        scored = any(row["references"] and "error" not in row for row in rows)
        return {
            "perplexity": math.exp(min(loss, 700.0)),  # beyond, a float has no room
            "answers": [None if "error" in row else row["prediction"] for row in rows],
            "exact_match": score(rows, ["exact_match"])["exact_match"]["score"] if scored else None,
        }

    def ask(self) -> dict:
        """The answer to the one question."""
        from llava_min.generate import generate

        options = {"max_new_tokens": self.spec["max_new_tokens"]}
        options["eos_token_id"] = self.processor.stop_ids
        options["suppress_tokens"] = self.processor.suppressed_ids(
            self.model.config.text.vocab_size
        )
        batch = question_batch(self.processor, *self.spec["question"])
        [ids] = generate(self.model, batch, **options)
        return {"answer": self.processor.decode(ids).strip()}


def question_batch(processor: Any, text: str, image: str | None) -> dict:
    """The model's inputs for one question, about an image if there is one."""
    from llava_min.checks.image_file import open_image

    content = [{"type": "text", "text": text.replace("<image>", "").strip()}]
    if image is None:
        return processor.chat([{"role": "user", "content": content}])
    content.insert(0, {"type": "image"})
    return processor.chat([{"role": "user", "content": content}], [open_image(image)])


class WritingGguf:
    """llama.cpp's file of the language model, in Q4_0, by our own export."""

    def __init__(self, spec: dict):
        from llava_min.export.gguf import write_text
        from llava_min.export.tensors import open_model

        self.imported, self.version, self.device = 0.0, "", SimpleNamespace(type="cpu")
        start = time.perf_counter()
        write_text(open_model(spec["folder"]), Path(spec["file"]), "q4_0")
        self.loaded = time.perf_counter() - start


class LlamaCpp:
    """llama.cpp as llama-cpp-python has it, with the language model of a GGUF file.

    kernels: False does without those that want the weights in an order of their own. singly: the
    prompt is read token by token, and once; then `first` is no measure of reading it.
    """

    def __init__(self, spec: dict):
        start = time.perf_counter()
        import llama_cpp
        from llama_cpp import llama_cpp as low

        self.imported = time.perf_counter() - start
        self.version, self.ids, self.singly = llama_cpp.__version__, spec["ids"], spec["singly"]
        self.device = SimpleNamespace(type="cpu")
        if not spec["kernels"]:  # which the class has no argument for
            params = low.llama_model_default_params()
            params.use_extra_bufts = False
            low.llama_model_default_params = lambda: params
        start, threads = time.perf_counter(), spec["threads"]
        self.model = llama_cpp.Llama(
            spec["file"],
            n_ctx=spec["context"],
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.loaded = time.perf_counter() - start

    def text(self, n: int) -> dict:
        rest = self.ids
        if self.singly:
            for id in self.ids[self.model.n_tokens : -1]:
                self.model.eval([id])
            self.model.n_tokens, rest = (
                len(self.ids) - 1,
                self.ids[-1:],
            )  # what follows is forgotten
        else:
            self.model.reset()  # or the prompt would be known from before
        times, ids = [now(self.device)], []
        for id in self.model.generate(rest, reset=False, temp=0.0):
            ids.append(id)
            if len(ids) in (1, n):
                times.append(now(self.device))
            if len(ids) == n:
                return {**latency(times, n), "ids": ids}
