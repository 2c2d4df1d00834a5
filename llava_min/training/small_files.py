"""A checkpoint without its weights: its config and its processor, for what answers before a
download.
"""

from pathlib import Path

from llava_min.checks.load import check_llava
from llava_min.config import LlavaConfig
from llava_min.data.from_folder import read_processor
from llava_min.data.processor import Processor
from llava_min.errors import UserError, escape_controls, info, shorten
from llava_min.export.load_gguf import gguf_config
from llava_min.hub import HUB_ID, SMALL_FILES, find_folder
from llava_min.load import TINY, open_checkpoint, read_config
from llava_min.util.sizes import SIZES


def small_files(source: str) -> Path:
    """The folder of a checkpoint; of a hub id only what is not weights is downloaded."""
    if source == "tiny":
        return TINY
    if Path(source).expanduser().exists() or not HUB_ID.fullmatch(source):
        return find_folder(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=SMALL_FILES))
    except Exception as e:  # the hub's client raises its own errors, and its HTTP library's
        raise UserError(
            f"{escape_controls(source)}: not a folder here, and the hub did not give it "
            f"({shorten(e, 200)}); check the name and the network",
            "model",
        ) from None


def config_of(source: str) -> LlavaConfig:
    """The shapes of a model: a folder, llama.cpp's files, a size by name (7b), tiny, or a hub id,
    whose small files are downloaded. Raises UserError.
    """
    if source in SIZES and not Path(source).is_dir():
        return SIZES[source]
    return gguf_config(source) or read_config(small_files(source))[0]


def named_config(name: str) -> LlavaConfig:
    """`config_of` what is here; of what is not, the shapes of the size that its name contains, and
    nothing is downloaded. Raises UserError when it contains none.
    """
    if name == "tiny" or name in SIZES or Path(name).exists():
        return config_of(name)
    sizes = ["tiny", *sorted(SIZES, key=len, reverse=True)]
    size = next((s for s in sizes if s in name.lower()), None)
    if size is None:
        raise UserError(
            f"{shorten(name, 400)}: no such folder, and its name tells no size; give a folder with "
            f"a config.json, or one of {', '.join(SIZES)}",
            "model",
        )
    info(f"{name}: not here; planned by the shapes of size {size}, which its name contains")
    return SIZES.get(size) or config_of(size)


def processor_of(
    source: str, image_aspect_ratio: str | None = None, template: str | None = None
) -> Processor:
    if config := gguf_config(source):
        check_llava(config, source)
        given = dict(image_aspect_ratio=image_aspect_ratio, template=template)
        return open_checkpoint(source, **given).processor
    folder = small_files(source)
    return read_processor(folder, *read_config(folder), image_aspect_ratio, template)
