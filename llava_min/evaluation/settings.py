"""settings.json of an evaluation: everything its answers and scores depend on, and what made them.

`settings_of_files` is known before the weights are read, `settings_of_model` after. `args` is the
EvalConfig of eval.py.
"""

import hashlib
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava_min.data.chat import render
from llava_min.data.formats import Record
from llava_min.data.processor import Processor
from llava_min.data.records import sources
from llava_min.export.gguf_file import read_header
from llava_min.export.load_gguf import find_gguf, mmprojs
from llava_min.export.quantized import own_parameters
from llava_min.fast.cpu_linear import unpacked
from llava_min.fast.int_matmul import quant_layers
from llava_min.hub import find_folder
from llava_min.llava import Llava
from llava_min.load import TINY, read_config

# The small files of a checkpoint that its answers depend on, where it has them; an adapter has the
# last.
SMALL_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json",
)  # fmt: skip
PACKAGES = (
    "llava_min", "torch", "pillow", "numpy", "sacrebleu", "rouge-score", "bert-score",
    "transformers",
)  # fmt: skip


def settings_of_files(args: Any, source: str, adapter: str | None, options: dict) -> dict:
    """What is asked, of which model, and how; `options` are those of `predict`."""
    beams = f"beam search with {args.num_beams} beams"
    return {
        "model": source,
        "adapter": adapter,
        "data": args.data,
        "image_folder": args.image_folder,
        "benchmark": args.benchmark,
        "decoding": beams if args.num_beams > 1 else "greedy",
        **options,
        "data_sha256": hash_data(args.data),
        "model_files": hash_small_files(source, adapter),
    }


def settings_of_model(
    args: Any, model: Llava, processor: Processor, first: Record, num_ranks: int
) -> dict:
    """What the loaded model adds; `prompt` is the one of the first record."""
    images = processor.image_config
    return {
        "weights": hash_weights(model),
        "template": processor.template_name,
        "prompt": exact_prompt(processor, first),
        "image_aspect_ratio": images and images.aspect,
        "image_size": images and images.size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": stored.method if (stored := model.config.quantization) else None,
        "device": str(model.device),
        "batch_size": args.batch_size,
        "ranks": num_ranks,
        "metrics": list(args.metrics),
        "seed": args.seed,
        "versions": versions(),
    }


def exact_prompt(processor: Processor, record: Record) -> str:
    """What the model reads for a record, with each image as <image>."""
    tokens = {"image": "<image>", "bos": "<s>", "eos": "</s>"}
    pieces = render(processor.template_name, record.messages[:-1], answer=False)
    return "".join(tokens.get(p.token, p.token) if p.text is None else p.text for p in pieces)


def hash_data(data: str) -> list[str]:
    """Name and shortened sha256 of each data file, and its weight unless that is 1."""
    out = []
    for path, weight in sources(data):
        with open(path, "rb") as f:
            times = f" @{float(weight):g}" if weight != 1 else ""
            out.append(f"{path.name} {hashlib.file_digest(f, 'sha256').hexdigest()[:16]}{times}")
    return out


def hash_weights(model: nn.Module) -> str:
    """Shortened sha256 of the first numbers of every tensor: any training changes them all."""
    digest, quantized = hashlib.sha256(), own_parameters(model)

    def add(name: str, x: Tensor) -> None:
        digest.update(name.encode() + x.flatten()[:64].float().cpu().numpy().tobytes())

    for name, p in model.named_parameters():
        if name not in quantized:
            add(name, unpacked(p.detach()))
    # how a quantized weight is kept in memory depends on the CPU; what it stands for does not
    for path, layer in quant_layers(model):
        add(path, next(layer.weight_pieces()))
    return digest.hexdigest()[:16]


def hash_small_files(source: str, adapter: str | None) -> str:
    """Shortened sha256 of all SMALL_FILES in the folders of a model, its tower and its adapter."""
    digest, places = hashlib.sha256(), [adapter]
    if file := find_gguf(source):  # their headers have it all
        for path in (file, *mmprojs(file)):
            digest.update(repr(read_header(path)[0]).encode())
    else:
        folder = TINY if source == "tiny" else find_folder(source)
        places = [folder, read_config(folder)[1], adapter]
    for place in filter(None, places):
        for path in (Path(place) / name for name in SMALL_FILES):
            if path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.name} {content} ".encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of Python and the PACKAGES that are installed: what made the answers and scores."""
    out = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            out[name] = version(name)
    return out
