"""The files of a folder that say how its model is spoken to → its `Processor`: tokenizer, pictures,
chat template.

Above processor.py, beside tokenizer_files.py; load.py calls it before any weight is read. What two
files say differently is an error that names both.
"""

from dataclasses import replace
from pathlib import Path

from llava_min.config import LlavaConfig
from llava_min.data.adapter_tokens import adopt
from llava_min.data.chat import CHUNKS, RECORD
from llava_min.data.chat import template as find_template
from llava_min.data.image import ASPECTS, ImageConfig
from llava_min.data.processor import MARK, Processor
from llava_min.data.recognise import choose
from llava_min.data.tokenizer import Tokenizer
from llava_min.errors import UserError, escape_controls, info, shorten
from llava_min.util.files import check_file, read_json, read_optional

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def read_image_config(
    folder: Path, config: LlavaConfig, clip_folder: Path | None, aspect: str | None
) -> ImageConfig:
    """How pictures are prepared. The aspect is the caller's, else what the checkpoint records, else
    "pad".
    """
    if aspect is not None and (not isinstance(aspect, str) or aspect not in ASPECTS):
        raise UserError(
            f"image_aspect_ratio: {escape_controls(aspect)!r} is not pad or crop; choose one"
        )
    if config.vision_source:
        path = (clip_folder or folder) / "preprocessor_config.json"
        images = ImageConfig(config.vision.image_size, CLIP_MEAN, CLIP_STD, None)
        if path.exists():
            images = ImageConfig.from_hf(read_json(path), str(path))
        recorded = read_json(folder / "config.json").get("image_aspect_ratio")
        images = replace(images, aspect=ASPECTS[recorded or "square"])
    else:
        # transformers 5 saves the settings inside processor_config.json, and reads that one first
        path = folder / "processor_config.json"
        data = read_optional(path).get("image_processor")
        if data is None:
            path = folder / "preprocessor_config.json"
            data = read_json(path)
        images = ImageConfig.from_hf(data, str(path))
    if images.size != config.vision.image_size:
        raise UserError(
            f"{path}: pictures are made {images.size} pixels wide but image_size in config.json "
            f"is {config.vision.image_size}; correct one of them"
        )
    if aspect is None and images.aspect is None:
        info(
            f"{folder}: does not record image_aspect_ratio; taking pad, how LLaVA-1.5 was tuned "
            "(crop is what transformers does)"
        )
    return replace(images, aspect=ASPECTS[aspect or images.aspect or "pad"])


def read_jinja(folder: Path) -> tuple[Path, str | None]:
    """The chat template of a folder as text, None where it has none, and the file that has it."""
    path = folder / "chat_template.jinja"
    if path.exists():
        check_file(path)
        return path, path.read_text(encoding="utf-8", errors="replace")
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        found = read_optional(path).get("chat_template")
        if isinstance(found, list):  # several by name, as transformers 4 wrote them
            named = {str(x.get("name")): x.get("template") for x in found if isinstance(x, dict)}
            found = named.get("default")
        if found:
            return path, found
    return path, None


def pick_template(folder: Path, tokenizer: Tokenizer, adapter: Path | None = None) -> str:
    """The template the checkpoint records, or else its jinja text is.

    An adapter's jinja text, if it has another than the checkpoint, goes first.
    """
    config, (path, text) = read_json(folder / "config.json"), read_jinja(folder)
    if adapter is not None:
        beside, own = read_jinja(adapter)
        if isinstance(own, str) and own.strip() and own.split() != str(text).split():
            return choose(config, {}, own, tokenizer, beside)
    return choose(config, read_optional(folder / "processor_config.json"), text, tokenizer, path)


def read_settings(folder: Path) -> tuple[str | None, str | None]:
    """The aspect and the template that an adapter's folder records (`Processor.save_settings`),
    None for what it does not.
    """
    path = folder / "preprocessor_config.json"
    aspect = ImageConfig.from_hf(read_json(path), str(path)).aspect if path.exists() else None
    name = read_optional(folder / "processor_config.json").get(RECORD)
    if name is not None:
        find_template(name)  # an error, if there is none of that name
    return aspect, name


def read_processor(
    folder: Path,
    config: LlavaConfig,
    clip_folder: Path | None,
    aspect: str | None,
    template: str | None,
    adapter: Path | None = None,
) -> Processor:
    """`clip_folder`: of the original layout's tower. `aspect`, `template`: the caller's, None for
    what the folder says. `adapter`: a folder whose tokens and template come on top.
    """
    tokenizer = Tokenizer.load(folder)
    if adapter is not None:
        stored = config.image_token_id if config.vision_source else config.text.vocab_size
        adopt(tokenizer, adapter, stored)
    if (known := tokenizer.token_id(MARK)) not in (None, config.image_token_id):
        raise UserError(
            f"{folder}: image_token_index is {config.image_token_id} in config.json but <image> "
            f"is {known} in the tokenizer; correct one of them"
        )
    if len(tokenizer) > config.text.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens but vocab_size is "
            f"{config.text.vocab_size}; the tokenizer belongs to another model"
        )
    recorded = read_optional(folder / "processor_config.json")
    size, patch = config.vision.image_size, config.vision.patch_size
    # the second makes as many patches, and is what we write
    for key, *good in (
        ("patch_size", patch, size // (size // patch)),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy),
    ):
        if recorded.get(key) not in (None, *good):
            raise UserError(
                f"{folder / 'processor_config.json'}: {key} is {shorten(recorded[key])} but "
                f"{good[0]} in config.json; "
                "correct one of them"
            )
    chunks = recorded.get(CHUNKS, config.vision_source is not None)
    if not isinstance(chunks, bool):
        raise UserError(
            f"{folder / 'processor_config.json'}: {CHUNKS} is {shorten(chunks)}, expected true or "
            "false; correct it"
        )
    images = read_image_config(folder, config, clip_folder, aspect)
    template = pick_template(folder, tokenizer, adapter) if template is None else template
    return Processor(
        tokenizer,
        images,
        template,
        config.image_token_id,
        config.tokens_per_image,
        config.text.eos_token_ids,
        chunks,
    )
