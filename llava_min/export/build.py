"""A LLaVA put together of a CLIP, a language model and a projector, as `Tensors` to be written.

Follows LLaVA's pretrain.sh, which starts from Vicuna, CLIP and nn.Linear's own random values, and
llava-hf's converter for what its layout adds: <image> and <pad> behind the vocabulary, rows up to a
multiple of 64, the new ones at the mean of the others.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from llava_min.checks.config import FLAG, check_fields, refuse
from llava_min.checks.weights import check_entries
from llava_min.config import LlavaConfig, TextConfig, VisionConfig, read_eos
from llava_min.data.chat import IMAGE_TOKEN, ORIGINAL_KEY, TEMPLATE_KEY
from llava_min.data.from_folder import read_template
from llava_min.data.image import CLIP_MEAN, CLIP_STD, ImageConfig
from llava_min.data.processor import Processor
from llava_min.data.recognise import find_template
from llava_min.data.tokenizer import Tokenizer
from llava_min.errors import UserError, label, shorten
from llava_min.export import gguf_names
from llava_min.export.handover import Handover
from llava_min.export.read_gguf import open_gguf, write_tokenizer
from llava_min.export.stored import Stored
from llava_min.export.stream import Read
from llava_min.export.tensors import PROJECTOR, Tensors, read_projector, written_dtype
from llava_min.hub import find_folder
from llava_min.llava import Llava
from llava_min.load import on_meta
from llava_min.tensors import CLIP_REST, TensorInfo, read_entries
from llava_min.util.files import read_json, read_optional

TEXT = ("language_model.", "lm_head.")
TOWER = "vision_tower."
RECORDED = {TEMPLATE_KEY: gguf_names.TEMPLATE_KEY, ORIGINAL_KEY: gguf_names.ORIGINAL_KEY}
TABLES = ("language_model.embed_tokens.weight", "lm_head.weight")


@dataclass
class Decoder:
    """A language model found sound, its weights not read yet."""

    config: TextConfig
    tied: bool
    tokenizer: Tokenizer
    template: str
    dtype: torch.dtype
    entries: dict[str, TensorInfo]
    original: bool = False  # tokenized as the original LLaVA does, see Processor


def build(
    vision: str, text: str, projector: str | None, *, template: str | None, aspect: str, seed: int
) -> Tensors:
    """The model of the folders, hub ids or files `vision`, `text` and `projector`.

    template: None for what the language model is asked with. Raises UserError for whatever is wrong
    with the files, by their names.
    """
    clip, images, tower = read_clip(vision)
    decoder = read_decoder(text)
    image, pad = add_tokens(decoder.tokenizer)
    rows = max(len(decoder.tokenizer), decoder.config.vocab_size)
    config = LlavaConfig(
        clip,
        replace(decoder.config, vocab_size=(rows + 63) // 64 * 64, pad_token_id=pad),
        image_token_id=image,
        tie_word_embeddings=decoder.tied,
    )
    model = on_meta(config)
    entries = tower | decoder.entries
    check(model, entries, decoder)
    whole = read_projector(Path(projector), model) if projector else random_projector(model, seed)
    processor = Processor(
        decoder.tokenizer,
        replace(images, aspect=aspect),
        decoder.template if template is None else template,
        image,
        config.tokens_per_image,
        config.text.eos_token_ids,
    )
    between = Handover()
    read, again = (joined(Stored(entries, model, x), whole) for x in (between.give, between.take))
    return Tensors(model, processor, read, again, between, decoder.dtype)


def joined(read: Read, projector: dict[str, Tensor]) -> Read:
    return lambda name, dtype: projector[name].to(dtype) if name in projector else read(name, dtype)


def check(model: Llava, entries: dict[str, TensorInfo], decoder: Decoder) -> None:
    """Every tensor of `model` but the projector's is in the files, and every tensor of the files is
    the model's.
    """
    elsewhere = {n for n, _ in model.named_parameters() if n.startswith(PROJECTOR)}
    check_entries(entries, model, dict.fromkeys(TABLES, decoder.config.vocab_size), elsewhere)


# ---- the parts


def read_clip(source: str) -> tuple[VisionConfig, ImageConfig, dict[str, TensorInfo]]:
    fix = "give the folder or hub id of a CLIP (a hub id needs the network)"
    folder = find_folder(source, named_by=f"{label('vision')}: ", fix=fix)
    path = folder / "config.json"
    config = VisionConfig.from_clip(read_json(path), str(path))
    images = ImageConfig(config.image_size, CLIP_MEAN, CLIP_STD, None)
    path = folder / "preprocessor_config.json"
    if path.exists():
        images = ImageConfig.from_hf(read_json(path), str(path))
        if images.size != config.image_size:
            raise UserError(
                f"{path}: images are made {images.size} pixels wide but image_size in config.json "
                f"is {config.image_size}; correct one of them"
            )
    return config, images, only(read_entries(folder, CLIP_REST), TOWER, folder, "a CLIP")


def only(
    entries: dict[str, TensorInfo], prefix: str | tuple[str, ...], folder: Path, what: str
) -> dict[str, TensorInfo]:
    if stray := next((e for name, e in entries.items() if not name.startswith(prefix)), None):
        raise UserError(f"{folder}: has {shorten(stray.name)}, expected {what} alone; give that")
    return entries


def read_decoder(source: str) -> Decoder:
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(f"{path} has {len(files)} .gguf files; give one of them", "text")
        path = files[0] if files else path
    if path.suffix == ".gguf":
        return read_gguf_decoder(path)
    fix = "give a language model's folder, .gguf file or hub id (which needs the network)"
    folder = find_folder(source, named_by=f"{label('text')}: ", fix=fix)
    path = folder / "config.json"
    data = read_json(path)
    if "model_type" not in data:
        refuse(str(path), "model_type", None, "that of a language model, such as 'llama'")
    check_fields(data, {"tie_word_embeddings": FLAG}, str(path))
    config = TextConfig.from_hf(data, str(path))
    generation = folder / "generation_config.json"
    eos = read_eos(read_optional(generation), config.vocab_size, str(generation))
    config = replace(config, eos_token_ids=eos or config.eos_token_ids)
    tokenizer = Tokenizer.load(folder)
    entries = only(read_entries(folder), TEXT, folder, "a language model")
    norm = entries.get("language_model.norm.weight")
    return Decoder(
        config,
        data.get("tie_word_embeddings", False),
        tokenizer,
        read_template(folder, tokenizer),
        written_dtype(norm) if norm else torch.float32,
        entries,
    )


def read_gguf_decoder(path: Path, template: str | None = None) -> Decoder:
    """template: the caller's; None for what the file's jinja text is."""
    found = open_gguf(path)
    with TemporaryDirectory() as folder:
        write_tokenizer(found, Path(folder))
        try:
            tokenizer = Tokenizer.load(folder)
        except UserError as e:  # which names a file that is gone in a moment
            raise UserError(str(e).replace(f"{folder}/", f"{path}: its ")) from None
    recorded = {ours: found.metadata.get(key) for ours, key in RECORDED.items()}
    jinja = found.metadata.get("tokenizer.chat_template")
    if template is None:
        template = find_template(found.config.to_hf(), recorded, jinja, tokenizer, path)
    kinds = {t.kind for t in found.tensors.values()}
    # what is dequantized is scales times small integers, and fits f16's digits better than bf16's
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}.get((kinds - {"F32"} or {"F32"}).pop())
    dtype = dtype or torch.float16
    original = recorded[ORIGINAL_KEY] is True
    return Decoder(found.config, found.tied, tokenizer, template, dtype, found.tensors, original)


def add_tokens(t: Tokenizer) -> tuple[int, int]:
    """The ids of <image> and of padding, added where the tokenizer has none.

    A pad token that is the end or the unknown token, too, is none: an end that is masked as padding
    is never learned.
    """
    image = t.add_special(IMAGE_TOKEN)
    if t.pad_id is None or t.pad_id in (t.eos_id, t.bos_id, t.unk_id):
        t.pad_id = t.add_special("<pad>")
    return image, t.pad_id


def random_projector(model: Llava, seed: int) -> dict[str, Tensor]:
    """Values as nn.Linear draws them, weights and biases uniform within fan_in ** -0.5."""
    g, made = torch.Generator().manual_seed(seed), {}
    for path, layer in model.multi_modal_projector.named_children():
        bound = layer.in_features**-0.5
        for leaf, p in layer.named_parameters():
            x = torch.empty(p.shape).uniform_(-bound, bound, generator=g)
            made[f"{PROJECTOR}{path}.{leaf}"] = x
    return made
