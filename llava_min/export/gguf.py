"""A model as llama.cpp's two files: the language model, and the tower with the projector (mmproj).

Types f32, f16, bf16, q8_0, q4_0 and their like are written by the `gguf` package, tensor by tensor;
the K-types are made by llama.cpp's own quantizer out of an f16 file. Both files are read back and
compared with the source, tensor for tensor.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from llava_min.errors import UserError, escape_controls, label
from llava_min.export import mmproj
from llava_min.export.gguf_names import (
    ARCHITECTURES,
    LEGACY_KEY,
    ORIGINAL_KEY,
    TEMPLATE_KEY,
    import_gguf,
    interleave,
    settings,
    to_gguf,
    turned_heads,
)
from llava_min.export.gguf_tokenizer import entries
from llava_min.export.read_gguf import TextModel, open_gguf
from llava_min.export.stream import ahead
from llava_min.export.tensors import Merge, Tensors

PLAIN = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
# llama.cpp's numbers of what it quantizes to (llama.h, LLAMA_FTYPE)
FTYPE = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
K_TYPES = {
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
}
# of a tensor's norm, by which its numbers in a file may differ from the source's
ERROR = {"f32": 0.0, "f16": 2e-3, "bf16": 5e-3, "q8_0": 0.02, "q6_k": 0.05}
COARSE = 0.5  # the rest, down to 2 bits
Row = tuple[str, torch.Size, str, Callable[[], Tensor]]  # its name there, shape, type, how to read


def write_gguf(model: Tensors, folder: Path, type: str) -> str:
    """Write both files to `folder` and read them back; returns what to tell of it."""
    if type not in (*PLAIN, *K_TYPES):
        known = ", ".join((*PLAIN, *K_TYPES))
        raise UserError(f"{escape_controls(type)[:50]!r} is not one of {known}; choose one", "type")
    quantize = quantizer() if type in K_TYPES else None
    import_gguf()
    first = "f16" if quantize else type
    path = folder / f"model-{first}.gguf"
    write_text(model, path, first)
    if quantize:
        whole, path = path, folder / f"model-{type}.gguf"
        quantize(whole, path, K_TYPES[type])
        whole.unlink()
    worst = check_text(model, path)
    # the tower is small, and llama.cpp's quantizer has no say in it
    tower = folder / f"mmproj-model-{'f32' if type == 'f32' else 'f16'}.gguf"
    mmproj.write(model, tower, f32=type == "f32")
    if isinstance(model.read, Merge):
        model.read.check_changed()
    return f"{path.name} and {tower.name}, read back; the tensors differ by {worst:.2g} at most"


# ---- the language model


def pick_type(name: str, shape: torch.Size, type: str) -> str:
    """Norms and biases stay f32; rows that are no whole number of blocks become f16."""
    if len(shape) == 1:
        return "f32"
    if type.startswith("q") and shape[-1] % 32:
        return "f16"
    # llama.cpp spends more on the head, and on an embedding that is the head
    return (
        "q8_0" if type.startswith("q") and name in ("output.weight", "token_embd.weight") else type
    )


def text_rows(model: Tensors, type: str) -> Iterable[Row]:
    for name in model.names:
        if name.startswith(("language_model.", "lm_head.")):
            theirs, shape = to_gguf(name), model.shape(name)
            yield (
                theirs,
                shape,
                pick_type(theirs, shape, type),
                lambda name=name: ordered(model, name),
            )


def ordered(model: Tensors, name: str) -> Tensor:
    """The tensor in fp32, its rows in GGUF's order."""
    x = model.read(name, torch.float32)
    heads = turned_heads(name, model.model.config.text)
    return interleave(x, heads) if heads else x


def write_text(model: Tensors, path: Path, type: str) -> None:
    gguf, text = import_gguf(), model.model.config.text
    arch = ARCHITECTURES[text.model_type]
    writer = gguf.GGUFWriter(path, arch)
    metadata = {"general.type": "model", "general.name": "LLaVA", "general.file_type": FTYPE[type]}
    metadata |= {"general.quantization_version": gguf.GGML_QUANT_VERSION}
    metadata |= {f"{arch}.{key}": value for key, value in settings(text).items()}
    eos = next(iter(text.eos_token_ids), None)
    made = entries(model.processor, text.vocab_size, eos)
    metadata[TEMPLATE_KEY] = model.processor.template_name
    metadata[ORIGINAL_KEY] = model.processor.original
    metadata[LEGACY_KEY] = model.processor.tokenizer.legacy
    add_metadata(writer, metadata | {f"tokenizer.{key}": value for key, value in made.items()})
    write_rows(writer, text_rows(model, type))


def add_metadata(writer, metadata: dict[str, object]) -> None:
    """Each value in the type that llama.cpp asks for: all its whole numbers here are uint32."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def write_rows(writer, rows: Iterable[Row]) -> None:
    """The header, then each tensor when it is read."""
    gguf, rows = import_gguf(), list(rows)
    kind = lambda type: gguf.GGMLQuantizationType[type.upper()]
    for name, shape, type, _ in rows:
        block, size = gguf.GGML_QUANT_SIZES[kind(type)]
        bytes_in = shape.numel() // block * size
        # the shape is of the elements, as no dtype is given that counts bytes
        writer.add_tensor_info(name, tuple(shape), np.dtype(np.float32), bytes_in, kind(type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (_, shape, type, _), x in ahead(lambda row: row[3](), rows):
        assert x.shape == shape
        data = gguf.quantize(x.numpy(), kind(type))
        writer.write_tensor_data(np.ascontiguousarray(data))
    writer.close()


# ---- proved


def check_text(model: Tensors, path: Path) -> float:
    """The file's tensors against the source's: the largest difference, as a part of a norm.

    Raises UserError for metadata or a tensor that is not the source's.
    """
    found = open_gguf(path)
    text = model.model.config.text
    for key, value in settings(text).items():
        there = found.metadata.get(f"{ARCHITECTURES[text.model_type]}.{key}")
        if there is None or abs(there - value) > 1e-6 * abs(value):
            raise UserError(
                f"{path}: {key} reads back as {there}, expected {value}; write it again"
            )
    names = [n for n in model.names if n.startswith(("language_model.", "lm_head."))]
    if names_differ := found.tensors.keys() ^ set(names):
        raise UserError(f"{path}: {sorted(names_differ)[0]} is in one of file and source alone")
    pairs = ahead(lambda name: model.read(name, torch.float32), names)
    return max(compare(found, name, right) for name, right in pairs)


def compare(found: TextModel, name: str, right: Tensor) -> float:
    x = found.read(name, torch.float32)
    type = found.tensors[name].kind.lower()
    error = float(torch.linalg.vector_norm(x - right))
    error /= max(float(torch.linalg.vector_norm(right)), 1e-30)
    if not error <= ERROR.get(type, COARSE):
        raise UserError(
            f"{found.path}: {name} differs from the source's by {error:.2g} of its norm as {type}; "
            f"write it again, or in a wider {label('type')}"
        )
    return error


# ---- llama.cpp's own quantizer


def quantizer() -> Callable[[Path, Path, int], None]:
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError):
        raise UserError(
            "the K-types are made by llama.cpp's quantizer, in the package llama-cpp-python, which "
            "is not installed; pip install 'llava_min[gguf]', or choose q8_0 or q4_0",
            "type",
        ) from None
    return lambda source, target, ftype: run_quantizer(llama_cpp, source, target, ftype)


def run_quantizer(llama_cpp: ModuleType, source: Path, target: Path, ftype: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise UserError(f"{source}: llama.cpp's quantizer failed; choose q8_0 or q4_0", "type")


def export(model: Tensors, folder: Path, dtype: torch.dtype, type: str | None) -> str:
    return write_gguf(model, folder, type or "f16")
