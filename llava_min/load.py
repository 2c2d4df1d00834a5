"""From a folder or hub id to a ready model and its processor, and back.

config.json -> modules on meta -> weights -> adapter. `open_checkpoint` reads and checks all small
files, so every mistake in them is found before the weights are read; `Checkpoint.load` does the
rest. Training and sharding change the model on meta in between, then call
`Checkpoint.load_weights`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llava_min.adapter import apply_adapter, read_adapter
from llava_min.checks import load as checks
from llava_min.checks.config_keys import warn_unknown_keys
from llava_min.checks.weights import check_entries
from llava_min.config import LlavaConfig, VisionConfig, read_eos
from llava_min.data.from_folder import read_processor, read_settings
from llava_min.data.processor import Processor
from llava_min.export.quantized import (
    Parts,
    own_parameters,
    quantize_linears,
    take_parts,
    written_config,
    written_state,
)
from llava_min.export.stream import save_weights
from llava_min.fast.cpu_linear import prepack_linears
from llava_min.fast.int_matmul import speed_up
from llava_min.hub import CLIP_336, find_folder, find_tower
from llava_min.llava import Llava
from llava_min.parallel.ranks import pick_device
from llava_min.quant.methods import METHODS
from llava_min.tensors import TensorInfo, collect_entries, stored_rows
from llava_min.util.files import new_folder, read_json, read_optional, write_json
from llava_min.weights import NAMES, load_weights, pick_dtype, read_dtype

TINY = Path(__file__).parent / "tiny"
BLOCKS = "language_model.layers."  # what is quantized unless more is asked for


# ---- the model without its weights


class WithoutInit(TorchFunctionMode):
    """Layers get no initial values: drawing them on meta imports sympy, a second and 70 MB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **kwargs or {})


def on_meta(config: LlavaConfig) -> Llava:
    """The model with shapes and without memory; nothing in it is trained."""
    with torch.device("meta"), WithoutInit():
        return Llava(config).requires_grad_(False)


def random_model(config: LlavaConfig, seed: int = 0) -> Llava:
    """A model with random weights in fp32: matrices are normal with standard deviation
    fan_in ** -0.5, biases zero, norms one.
    """
    model = on_meta(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(p)
            elif p.dim() == 1 and name == "weight":
                nn.init.ones_(p)
            else:
                std = p[0].numel() ** -0.5 if p.dim() > 1 else 0.02
                nn.init.normal_(p, std=std, generator=generator)
    model.tie_weights()
    return model.eval()


# ---- the files of a folder


def read_config(folder: Path) -> tuple[LlavaConfig, Path | None]:
    """The config; for the original layout also its tower's folder, None where the tower's shapes
    are known without it. Raises UserError.
    """
    checks.check_model_folder(folder)
    path, generation = folder / "config.json", folder / "generation_config.json"
    data, clip_folder = read_json(path), None
    config = LlavaConfig.from_hf(data, str(path))
    # chat models name their end-of-turn token only in generation_config.json
    if eos := read_eos(read_optional(generation), config.text.vocab_size, str(generation)):
        config = replace(config, text=replace(config.text, eos_token_ids=eos))
    if config.vision_source is not None:  # the original layout only says where its CLIP is
        config, clip_folder = read_tower(folder, config)
    warn_unknown_keys(data, path)
    return config, clip_folder


def read_tower(folder: Path, config: LlavaConfig) -> tuple[LlavaConfig, Path | None]:
    """The config with its tower's shapes, which its CLIP's config.json gives, and CLIP's folder."""
    path, source = folder / "config.json", Path(config.vision_source)
    near = (folder / source, source, folder.parent / source.name)
    try:
        clip = next((p for p in near if (p / "config.json").is_file()), None)
    except OSError:  # the name is too long, which find_tower says
        clip = None
    if clip is None and config.vision_source == CLIP_336:
        return config.with_vision(VisionConfig(), str(path)), None
    clip_path = (clip or find_tower(folder, config.vision_source)) / "config.json"
    where = f"{clip_path} (the mm_vision_tower of {path})"
    vision = VisionConfig.from_clip(read_json(clip_path), where)
    return config.with_vision(vision, str(path)), clip_path.parent


def plan_model(
    folder: Path, config: LlavaConfig, clip_folder: Path | None
) -> tuple[Llava, dict[str, TensorInfo], Parts]:
    """The model on meta, and where its tensors are, those of quantized layers apart; every tensor
    is accounted for.
    """
    entries, model = collect_entries(folder, config, clip_folder), on_meta(config)
    parts = take_parts(entries, model, config.quantization, folder)
    check_entries(entries, model, stored_rows(config), own_parameters(model))
    return model, entries, parts


# ---- in


@dataclass
class Checkpoint:
    """A checkpoint whose small files are read and checked, and whose weights are not read yet."""

    model: Llava  # on meta, nothing trained; may be changed before its weights are loaded
    processor: Processor
    entries: dict[str, TensorInfo]  # by our names
    parts: Parts  # of quantized layers that the files have
    source: str
    adapter: Path | None = None

    @property
    def config(self) -> LlavaConfig:
        return self.model.config

    def quantize(self, method: str, group_size: int | None = None, *include: str) -> None:
        """From here on the linear layers of the decoder's blocks and of the parts `include` are
        quantized ones, which choose their numbers as they read their weights. Raises UserError."""
        checks.check_quantize(method, METHODS, self.config.quantization is not None)
        checks.check_include(include, self.config.tie_word_embeddings)
        checks.warn_quantized_twice(self.source, self.entries.values())
        stored = quantize_linears(self.model, (BLOCKS, *include), method, group_size)
        self.model.config = replace(self.config, quantization=stored)

    def load(
        self,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        quantize: str | None = None,
    ) -> tuple[Llava, Processor]:
        """The ready model, its adapter applied, and its processor; see `load`. Call it once."""
        device = pick_device(device)
        if quantize is not None:
            self.quantize(quantize)
        dtype = pick_dtype(dtype, self.model, device)
        if self.adapter is not None:  # read first: its files are smaller, and checked by shape
            lora = read_adapter(self.model, self.adapter, self.source)
        self.load_weights(dtype, device)
        if self.adapter is not None:
            apply_adapter(self.model, *lora)
        speed_up(self.model, dtype)
        prepack_linears(self.model)
        self.model.processor = self.processor
        return self.model.eval(), self.processor

    def load_weights(
        self, dtype: torch.dtype, device: torch.device, *, offload: bool = False
    ) -> None:
        """Read the weights into the model as it is now: trained ones in fp32, the rest in `dtype`.

        A sharded model gets this rank's rows, on the CPU with `offload`. Parameters that the
        checkpoint does not have, such as LoRA's, are NaN until they are initialised.
        """
        load_weights(self.model, self.entries, dtype, device, offload)
        self.parts.fill(self.model, device, offload)


def open_checkpoint(
    source: str,
    *,
    adapter: str | None = None,
    image_aspect_ratio: str | None = None,
    template: str | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """Read and check all of a checkpoint but its weights; arguments and errors as in `load`."""
    checks.check_source(source)
    if adapter is not None:
        checks.check_adapter(adapter)
        adapter = Path(adapter)
        # the model is asked as the adapter was trained
        aspect, name = read_settings(adapter)
        image_aspect_ratio = aspect if image_aspect_ratio is None else image_aspect_ratio
        template = name if template is None else template
    from llava_min.export.load_gguf import find_gguf, open_files  # they build on this page

    if file := find_gguf(str(source)):
        return Checkpoint(*open_files(file, adapter, image_aspect_ratio, template), source, adapter)
    folder = TINY if str(source) == "tiny" else find_folder(str(source), revision)
    config, clip_folder = read_config(folder)
    processor = read_processor(folder, config, clip_folder, image_aspect_ratio, template, adapter)
    model, entries, parts = plan_model(folder, config, clip_folder)
    return Checkpoint(model, processor, entries, parts, source, adapter)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Llava:
    """The model of a folder without its processor, for callers that make its inputs themselves."""
    model, entries, parts = plan_model(folder, *read_config(folder))
    load_weights(model, entries, dtype, device)
    parts.fill(model, device)
    return model.eval()


def load(
    source: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantize: str | None = None,
    adapter: str | None = None,
    image_aspect_ratio: str | None = None,
    template: str | None = None,
    revision: str | None = None,
) -> tuple[Llava, Processor]:
    """A ready model and its processor.

    source: a folder in llava-hf's layout or the original LLaVA-1.5's, a hub id, llama.cpp's .gguf
    or its folder, or "tiny", the bundled one. dtype: "auto", "fp32", "bf16", "fp16" or a
    torch.dtype (also float64, to compare); auto is what the checkpoint stores, but on CPU fp32 for
    small models and bf16 for large ones. device: "auto" takes the GPU where there is one. quantize:
    "int8", "int4", "hqq4", "nf4" … (quant/methods.py), how the decoder's blocks are kept; None for
    what the checkpoint is, quantized or not. adapter: a PEFT folder, applied unmerged.
    image_aspect_ratio ("pad", "crop") and template (a name in data/chat.py): None for what the
    adapter records, or else the checkpoint. revision: of a hub id. The processor is also the
    model's `processor`, which `stream` decodes with. Raises UserError, in one line, for whatever is
    wrong with the files.
    """
    settings = dict(image_aspect_ratio=image_aspect_ratio, template=template, revision=revision)
    return open_checkpoint(source, adapter=adapter, **settings).load(dtype, device, quantize)


# ---- out


def write_model(
    model: Llava,
    processor: Processor,
    folder: Path,
    dtype: torch.dtype,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write all files of a llava-hf folder. `state`: the whole tensors of a sharded model."""
    state = dict(model.named_parameters()) if state is None else state
    checks.check_written(model.config, state.keys(), folder)
    stored, config = model.config.quantization, replace(model.config, dtype=NAMES[dtype])
    if stored is None:
        save_weights(state, folder, dtype)
    else:
        save_weights(written_state(model, stored, dtype), folder)
    write_settings(config, processor, folder, dtype, written_config(model, config))


def write_settings(
    config: LlavaConfig, processor: Processor, folder: Path, dtype: torch.dtype, extra: dict = {}
) -> None:
    """All files of a llava-hf folder but its weights, stored as `dtype`; `extra`: config.json's."""
    config = replace(config, dtype=NAMES[dtype], vision_source=None)
    write_json(folder / "config.json", config.to_hf() | extra)
    ids = {
        "bos_token_id": config.text.bos_token_id,
        "eos_token_id": list(config.text.eos_token_ids),
        "pad_token_id": config.text.pad_token_id,
    }
    write_json(folder / "generation_config.json", ids)
    processor.save(folder)


def save(
    model: Llava, processor: Processor, target: str | Path, dtype: str | torch.dtype | None = None
) -> None:
    """Write `model` and its processor as a llava-hf folder; `target` must not exist."""
    dtype = read_dtype(model.dtype if dtype is None else dtype, "fp32, bf16, fp16")
    with new_folder(Path(target)) as folder:
        write_model(model, processor, folder, dtype)
