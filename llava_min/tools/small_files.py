"""A checkpoint without its weights: its config and its processor, for verbs that answer before a
download.
"""

from pathlib import Path

from llava_min.checks.load import check_llava
from llava_min.config import LlavaConfig
from llava_min.data.from_folder import read_processor
from llava_min.data.processor import Processor
from llava_min.errors import UserError, escape_controls, shorten
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
    """The shapes of a model: of a size by name (7b), or what the config.json of `source` says."""
    if source in SIZES:
        return SIZES[source]
    return gguf_config(source) or read_config(small_files(source))[0]


def processor_of(
    source: str, image_aspect_ratio: str | None = None, template: str | None = None
) -> Processor:
    if config := gguf_config(source):
        check_llava(config, source)
        given = dict(image_aspect_ratio=image_aspect_ratio, template=template)
        return open_checkpoint(source, **given).processor
    folder = small_files(source)
    return read_processor(folder, *read_config(folder), image_aspect_ratio, template)
