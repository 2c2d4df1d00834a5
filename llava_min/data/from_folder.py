"""A checkpoint's folder -> its `Processor`: tokenizer, image settings, chat template.

load.py calls `read_processor` before it reads any weight. Two files that disagree are an error that
names both.
"""

from dataclasses import replace
from pathlib import Path

from llava_min.checks.from_folder import (
    check_aspect,
    check_image_size,
    check_jinja,
    check_named_jinja,
    check_processor_config,
    check_tokenizer,
)
from llava_min.config import LlavaConfig
from llava_min.data.adapter_tokens import add_tokens
from llava_min.data.chat import IMAGE_TOKEN, ORIGINAL_KEY, TEMPLATE_KEY, get_template
from llava_min.data.image import ASPECTS, CLIP_MEAN, CLIP_STD, ImageConfig
from llava_min.data.processor import Processor
from llava_min.data.recognise import find_template
from llava_min.data.tokenizer import Tokenizer
from llava_min.errors import info
from llava_min.util.files import check_file, read_json, read_optional


def read_image_config(
    folder: Path, config: LlavaConfig, clip_folder: Path | None, aspect: str | None
) -> ImageConfig:
    """How images are prepared. The aspect is the caller's, else what the checkpoint records, else
    "pad".
    """
    check_aspect(aspect, ASPECTS)
    if config.vision_source:  # the original layout: the tower has a folder of its own
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
    check_image_size(images.size, config, path)
    if aspect is None and images.aspect is None:
        info(
            f"{folder}: does not record image_aspect_ratio; taking pad, how LLaVA-1.5 was tuned "
            "(crop is what transformers does)"
        )
    return replace(images, aspect=ASPECTS[aspect or images.aspect or "pad"])


def read_jinja(folder: Path) -> tuple[Path, str | None]:
    """(the file with a folder's chat template, its text or None if the folder has none)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        check_file(path)
        return path, path.read_text(encoding="utf-8", errors="replace")
    names = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
    for path in (folder / name for name in names):
        found = read_optional(path).get("chat_template")
        if isinstance(found, list):  # several by name, as transformers 4 wrote them
            check_named_jinja(found, path)
            found = next(x["template"] for x in found if x["name"] == "default")
        check_jinja(found, path)
        if found:
            return path, found
    return path, None


def read_template(folder: Path, tokenizer: Tokenizer, adapter: Path | None = None) -> str:
    """The template that the checkpoint records, or that its jinja text is.

    The jinja text of an adapter comes first if it differs from the checkpoint's.
    """
    config, (path, text) = read_json(folder / "config.json"), read_jinja(folder)
    if adapter is not None:
        beside, own = read_jinja(adapter)
        if own and own.split() not in ([], (text or "").split()):
            return find_template(config, {}, own, tokenizer, beside)
    recorded = read_optional(folder / "processor_config.json")
    return find_template(config, recorded, text, tokenizer, path)


def read_settings(folder: Path) -> tuple[str | None, str | None]:
    """The aspect and the template that an adapter's folder records (`Processor.save_settings`),
    None for what it does not.
    """
    path = folder / "preprocessor_config.json"
    aspect = ImageConfig.from_hf(read_json(path), str(path)).aspect if path.exists() else None
    name = read_optional(folder / "processor_config.json").get(TEMPLATE_KEY)
    if name is not None:
        get_template(name)  # raises if there is none of that name
    return aspect, name


def read_processor(
    folder: Path,
    config: LlavaConfig,
    clip_folder: Path | None,
    aspect: str | None,
    template: str | None,
    adapter: Path | None = None,
) -> Processor:
    """The processor of a checkpoint, with the tokens and the template of its adapter.

    clip_folder: the tower's, in the original layout.
    aspect, template: the caller's; None for what the folder says.
    """
    tokenizer = Tokenizer.load(folder)
    if adapter is not None:
        # the original's embedding has no row for <image>
        rows = config.image_token_id if config.vision_source else config.text.vocab_size
        add_tokens(tokenizer, adapter, rows)
    check_tokenizer(tokenizer.token_id(IMAGE_TOKEN), len(tokenizer), config, folder)

    path = folder / "processor_config.json"
    recorded = read_optional(path)
    check_processor_config(recorded, config, path, ORIGINAL_KEY)
    return Processor(
        tokenizer,
        read_image_config(folder, config, clip_folder, aspect),
        read_template(folder, tokenizer, adapter) if template is None else template,
        config.image_token_id,
        config.tokens_per_image,
        config.text.eos_token_ids,
        original=recorded.get(ORIGINAL_KEY, config.vision_source is not None),
    )
