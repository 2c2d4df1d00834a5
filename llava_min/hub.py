"""Where a checkpoint is: its folder, a path or a repository of the hub, and the weight files in it.

https://huggingface.co/docs/huggingface_hub/guides/download
"""

import re
from pathlib import Path

from llava_min.checks.load import check_tower_folder
from llava_min.checks.weights import check_shards
from llava_min.errors import UserError, escape_controls, shorten, warn_once
from llava_min.util.files import read_json

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SMALL_FILES = ["*.json", "*.jinja", "*.model"]
CLIP_336 = "openai/clip-vit-large-patch14-336"  # LLaVA-1.5's; VisionConfig has its shapes
GIVE = "give a checkpoint's folder, a hub id such as llava-hf/llava-1.5-7b-hf, or tiny"


def find_folder(
    source: str, revision: str | None = None, named_by: str = "", fix: str | None = None
) -> Path:
    """The folder of `source`: a path or a hub id, of which `revision` is downloaded.

    Where a file names the source, `named_by` begins the message with the file and its key, and
    `fix` says what to do. Raises UserError for a source that is neither, or cannot be downloaded.
    """
    if not source:
        raise UserError("is empty; give a checkpoint's folder, a hub id, or tiny", "source")
    where = f"{named_by}{shorten(source, 400)}"
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise UserError(f"{where}: a file, expected a checkpoint's folder; give that")
    except (OSError, RuntimeError) as e:  # the name is too long; there is no such ~user
        why = escape_controls(e)[:200]
        raise UserError(f"{where}: cannot be looked up ({why}); check the path") from None
    if not HUB_ID.fullmatch(source):
        raise UserError(f"{where}: no such folder; {fix or GIVE}")
    return _download(source, revision, where, fix)


def find_tower(folder: Path, tower: str) -> Path:
    """The CLIP folder that an original checkpoint names as its `mm_vision_tower`.

    Raises UserError that says two ways to provide it.
    """
    beside = folder if "/" not in tower else folder.parent
    beside = (beside / Path(tower).name).absolute()
    published = re.search(r"clip-vit-(base|large)-patch(14-336|14|16|32)(?!\d)", tower.lower())
    hub_id = f"openai/{published[0]}" if published else f"its hub id, such as {CLIP_336}"
    other = f"write {hub_id} there" if hub_id != tower else "check the network"
    named_by = f"{folder / 'config.json'}: mm_vision_tower: "
    fix = f"put the folder of that CLIP at {shorten(beside, 400)}, or {other}"
    found = find_folder(tower, named_by=named_by, fix=fix)
    check_tower_folder(found, f"{named_by}{shorten(tower, 400)}", fix)
    return found


def _download(hub_id: str, revision: str | None, where: str, fix: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*SMALL_FILES, "*.safetensors"]
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
        # `.bin` only where there is nothing else, or both would be downloaded
        if not any(folder.glob("*.safetensors")):
            snapshot_download(hub_id, revision=revision, allow_patterns=["pytorch_model*.bin"])
    except Exception as e:  # huggingface_hub's own, its HTTP library's and the system's
        why = escape_controls(e)[:200]
        fix = fix or "check the name and the network, or download it and give the folder"
        raise UserError(
            f"{where}: not a folder here, and the hub did not give it ({why}); {fix}"
        ) from None
    return folder


def find_files(folder: Path) -> tuple[list[Path], Path | None, dict[str, str]]:
    """The weight files of a folder, safetensors before `.bin`; of shards, also the index and its
    map of tensor names to file names. Raises UserError.
    """
    for stem, end in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{end}.index.json", folder / f"{stem}.{end}"
        if single.exists():
            if index.exists():
                warn_once(
                    f"{single}: is read, and the shards of {index.name} beside it are not; "
                    "remove what is not wanted"
                )
            return [single], None, {}
        if index.exists():
            shards = read_json(index).get("weight_map")
            check_shards(shards, index)
            return [folder / name for name in sorted(set(shards.values()))], index, shards
    raise UserError(
        f"{folder}: no model.safetensors, pytorch_model.bin or index of shards; "
        "give the folder of a checkpoint"
    )
