"""Where a ready model is built: config -> modules on meta -> weights -> adapter, and its processor.

Everything that can be wrong with a checkpoint's small files is found before its weights are read.
Training stops in between: `prepare`, change the model on meta (LoRA, what is trained, who holds
what), then `fill`.
"""

import os
import re
import reprlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llava_min.adapter import apply_adapter, read_adapter
from llava_min.checks.adapter_kinds import find_adapter
from llava_min.checks.config_keys import unknown_keys
from llava_min.config import Fields, LlavaConfig, VisionConfig, read_eos
from llava_min.data.from_folder import read_processor, read_settings
from llava_min.data.processor import Processor
from llava_min.errors import UserError, escape_controls, shorten, warn_once
from llava_min.fast.cpu_linear import prepack_linears
from llava_min.layouts import CLIP_REST, Entry, check_entries, find_folder, read_entries
from llava_min.llava import Llava
from llava_min.parallel.ranks import pick_device
from llava_min.util.files import new_folder, read_json, read_optional, write_json
from llava_min.weights import DTYPES, NAMES, load_weights, save_weights

TINY = Path(__file__).parent / "tiny"
# LLaVA-1.5's tower, whose shapes are VisionConfig's defaults
CLIP_336 = "openai/clip-vit-large-patch14-336"
# parameters: up to here `dtype="auto"` is fp32 on CPU, where exactness costs little
SMALL = 500_000_000


# ---- the model without its weights


class WithoutInit(TorchFunctionMode):
    """Layers are made without initial values: on meta, drawing these imports sympy, a second and 70
    MB.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (
            None
            if getattr(func, "__module__", None) == "torch.nn.init"
            else func(*args, **kwargs or {})
        )


def on_meta(config: LlavaConfig) -> Llava:
    """The model without memory, to be filled."""
    with torch.device("meta"), WithoutInit():
        return Llava(config).requires_grad_(False)


def fresh(config: LlavaConfig, seed: int = 0) -> Llava:
    """A model of random weights in fp32: matrices normal with deviation fan_in ** -0.5, zero
    biases, unit norms.
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
                nn.init.normal_(
                    p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.02, generator=generator
                )
    model.tie_weights()
    return model.eval()


# ---- what a folder says


def read_config(folder: Path) -> tuple[LlavaConfig, Path | None]:
    """The config, and for the original layout its tower's folder, None where the tower's shapes are
    known.
    """
    path = folder / "config.json"
    if not path.exists() or (folder / ".lock").exists():  # which a run of train.py has
        adapter = next(
            (p for p in (folder, folder / "adapter") if (p / "adapter_config.json").exists()), None
        )
        what = "holds no config.json of a model, expected the folder of a checkpoint"
        finish = f"`python -m llava_min finish {folder} OUT` makes its adapter or model"
        if (folder / "state.json").exists():
            what, mend = "a checkpoint of a run, expected a model", finish
        elif adapter:
            mend = f"give the base model, and {adapter} as adapter"
        elif (folder / "model").is_dir():
            mend = f"give {folder / 'model'}"
        elif (folder / "checkpoints").is_dir():
            mend = f"it is a run that has not ended, and {finish}"
        else:
            mend = "give one, a hub id, or tiny"
        raise UserError(f"{folder}: {what}; {mend}")
    data = read_json(path)
    config = LlavaConfig.from_hf(data, str(path))
    # chat models name their end-of-turn token only there
    generation = folder / "generation_config.json"
    if stops := read_eos(
        Fields(read_optional(generation), str(generation)), config.text.vocab_size
    ):
        config = replace(config, text=replace(config.text, eos_token_ids=stops))
    config, clip = (config, None) if config.vision_source is None else read_tower(folder, config)
    if unknown := unknown_keys(data):
        some = [
            f"{shorten(key)} = {shorten(reprlib.repr(value))}" for key, value in unknown.items()
        ]
        shown = ", ".join(some[:8]) + (f" and {len(some) - 8} more" if len(some) > 8 else "")
        warn_once(
            f"{path}: {shown}: no published config of LLaVA, CLIP or the decoder has such a "
            "key, and it is not obeyed; if a fork wrote it to change the model, load it with "
            "that fork's code"
        )
    return config, clip


def read_tower(folder: Path, config: LlavaConfig) -> tuple[LlavaConfig, Path | None]:
    """`read_config` of an original checkpoint, whose config.json only says where its CLIP is."""
    path, source = folder / "config.json", Path(config.vision_source)
    near = (source, folder / source, folder.parent / source.name)
    clip = next((p for p in near if (p / "config.json").is_file()), None)
    if clip is None and config.vision_source != CLIP_336:
        clip = find_tower(folder, config)
    if clip is None:
        return config.with_vision(VisionConfig(), str(path)), None
    f = Fields(read_json(clip / "config.json"), str(clip / "config.json"))
    f.only("model_type", "clip", "clip_vision_model")
    vision = VisionConfig.from_hf(
        f.inner("vision_config") if f.data.get("model_type") == "clip" else f
    )
    return config.with_vision(vision, str(path)), clip


def find_tower(folder: Path, config: LlavaConfig) -> Path:
    """The folder of an original checkpoint's CLIP; where there is none, both mends are told."""
    tower = config.vision_source
    beside = (folder.parent / Path(tower).name).absolute()
    published = re.search(r"clip-vit-(base|large)-patch(14-336|14|16|32)(?!\d)", tower.lower())
    hub = f"openai/{published[0]}" if published else f"its hub id, such as {CLIP_336}"
    mend = f"write {hub} there" if hub != tower else "check the network"
    return find_folder(
        tower,
        key=f"{folder / 'config.json'}: mm_vision_tower: ",
        mend=f"put the folder of that CLIP at {shorten(beside, 400)}, or {mend}",
    )


def collect_entries(
    folder: Path, config: LlavaConfig, clip_folder: Path | None
) -> dict[str, Entry]:
    entries = read_entries(folder)
    if config.vision_source and not any(name.startswith("vision_tower.") for name in entries):
        entries |= read_entries(clip_folder or find_tower(folder, config), CLIP_REST)
    return entries


def stored_rows(config: LlavaConfig) -> dict[str, int]:
    """The original's vocabulary lacks the rows that LlavaConfig adds for <image> and <pad>."""
    tables = (
        ("language_model.embed_tokens.weight", "lm_head.weight") if config.vision_source else ()
    )
    return dict.fromkeys(tables, config.image_token_id)


def plan_model(
    folder: Path, config: LlavaConfig, clip_folder: Path | None
) -> tuple[Llava, dict[str, Entry]]:
    """The model on meta, and where each of its tensors stands in the files; all are accounted for."""
    entries, model = collect_entries(folder, config, clip_folder), on_meta(config)
    check_entries(entries, model, stored_rows(config))
    return model, entries


# ---- in


@dataclass
class Prepared:
    """A checkpoint found sound, its weights not read yet."""

    model: Llava  # on meta, nothing trained; may be changed before it is filled
    processor: Processor
    entries: dict[str, Entry]

    def fill(self, dtype: torch.dtype, device: torch.device, *, offload: bool = False) -> None:
        """Read the weights: what is trained in fp32, the rest in `dtype`, of a split model this
        rank's rows.

        Parameters that the checkpoint does not have, such as LoRA's, are NaN until they are
        initialised. `offload` puts what is split on the CPU.
        """
        load_weights(self.model, self.entries, dtype, device, offload)


def prepare(
    source: str,
    *,
    adapter: str | None = None,
    image_aspect_ratio: str | None = None,
    template: str | None = None,
    revision: str | None = None,
) -> Prepared:
    """All of `load` before the weights, the adapter's own too; arguments and errors are the same."""
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(
            f"source: {type(source).__name__}, expected a checkpoint's folder, a hub id, or tiny"
        )
    if adapter is not None:
        if not isinstance(adapter, (str, os.PathLike)) or not str(adapter):
            raise UserError(f"adapter: {adapter!r:.100}, expected the folder of a PEFT adapter")
        find_adapter(Path(adapter))
        aspect, name = read_settings(Path(adapter))
        image_aspect_ratio = aspect if image_aspect_ratio is None else image_aspect_ratio
        template = name if template is None else template
    folder = TINY if str(source) == "tiny" else find_folder(str(source), revision)
    config, clip_folder = read_config(folder)
    processor = read_processor(
        folder,
        config,
        clip_folder,
        image_aspect_ratio,
        template,
        None if adapter is None else Path(adapter),
    )
    model, entries = plan_model(folder, config, clip_folder)
    return Prepared(model, processor, entries)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Llava:
    """The model of a folder without its processor, for those who make its inputs themselves."""
    model, entries = plan_model(folder, *read_config(folder))
    load_weights(model, entries, dtype, device)
    return model.eval()


def read_dtype(
    dtype: str | torch.dtype, known: str, good: Collection[torch.dtype] = NAMES
) -> torch.dtype:
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in good:
        raise UserError(
            f"dtype: {escape_controls(dtype)[:100]!r} is not one of {known}; choose one"
        )
    return dtype


def pick_dtype(dtype: str | torch.dtype, model: Llava, device: torch.device) -> torch.dtype:
    if not isinstance(dtype, str) or dtype != "auto":
        return read_dtype(dtype, "auto, fp32, bf16, fp16 or torch.float64", {*NAMES, torch.float64})
    if device.type == "cpu":
        return (
            torch.float32 if sum(p.numel() for p in model.parameters()) <= SMALL else torch.bfloat16
        )
    return DTYPES[model.config.dtype or "float16"]


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

    source: a folder in the layout of llava-hf or of the original LLaVA-1.5, a hub id, or "tiny",
    the bundled one. dtype: "auto", "fp32", "bf16", "fp16" or a torch.dtype (float64, too, to
    compare); auto is what the checkpoint stores, but on CPU fp32 for small models and bf16 for
    large ones. device: "auto" takes the GPU where there is one. quantize: None; no other is built
    yet. adapter: a PEFT folder, applied unmerged. image_aspect_ratio ("pad", "crop") and template
    (a name of data/chat.py): None for what the adapter records, or else the checkpoint. revision:
    of a hub id. The processor is also the model's `processor`, which `stream` writes with. Raises
    UserError, in one line, for whatever is wrong with the files.
    """
    if quantize is not None:
        raise UserError(
            f"quantize: {escape_controls(quantize)[:100]!r} is not built yet; leave it out"
        )
    ready = prepare(
        source,
        adapter=adapter,
        image_aspect_ratio=image_aspect_ratio,
        template=template,
        revision=revision,
    )
    model, device = ready.model, pick_device(device)
    dtype = pick_dtype(dtype, model, device)
    if adapter is not None:
        lora = read_adapter(model, Path(adapter), source)
    ready.fill(dtype, device)
    if adapter is not None:
        apply_adapter(model, *lora)
    prepack_linears(model)
    model.processor = ready.processor
    return model.eval(), ready.processor


# ---- out


def write_model(
    model: Llava,
    processor: Processor,
    folder: Path,
    dtype: torch.dtype,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """`state`: the whole tensors, where `model` holds only a part of them."""
    state = dict(model.named_parameters()) if state is None else state
    if any(".lora_" in name for name in state):
        raise UserError(
            f"{folder}: the model has an adapter that is not merged; "
            "save the adapter, or load the base without it"
        )
    save_weights(state, folder, dtype)
    config = replace(model.config, dtype=NAMES[dtype], vision_source=None)
    write_json(folder / "config.json", config.to_hf())
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
    """Write `model` and all that goes with it as a llava-hf folder; `target` must not exist."""
    dtype = read_dtype(model.dtype if dtype is None else dtype, "fp32, bf16, fp16")
    with new_folder(Path(target)) as folder:
        write_model(model, processor, folder, dtype)
