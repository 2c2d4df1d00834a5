"""What decides the numbers a run computes: data, base model and settings, as one dict of hashes.

Every rank must have the same identity, and a resumed run the one it was started with. Where files
lie, how the work is split and how often it is logged are no part of it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_min.checks.settings import MAY_CHANGE
from llava_min.data.formats import Record
from llava_min.data.records import hash_images, hash_records, sources
from llava_min.errors import UserError, escape_controls, label, shorten, warn
from llava_min.load import Checkpoint

MAX_HASHED = 1 << 30  # bytes of a file that is hashed whole
BLOCK_SIZE, NUM_BLOCKS = 1 << 16, 64  # what is hashed of a larger file
IMAGES = "contents of pictures"  # the key that checkpoints have


def run_identity(
    ready: Checkpoint, data: str, records: Sequence[Record], config: Any, rows: int, steps: int
) -> dict[str, Any]:
    """The identity of a run: the same on all ranks, and the same when it is resumed.

    ready: the checkpoint it starts from. data: files with weights, which gave `records`. rows: of
    one step, over all ranks. The keys are stored in checkpoints, so they never change.
    """
    files = sources(data)
    return {
        "training data": hash_files(path for path, _ in files),
        "weights of the data": [str(weight) for _, weight in files],
        "records": len(records),
        "ids and names of pictures": hash_records(records),
        IMAGES: hash_images(records),
        **base_identity(ready),
        "rows of a step": rows,
        "steps": steps,
        **{name: value for name, value in vars(config).items() if name not in MAY_CHANGE},
    }


def base_identity(ready: Checkpoint) -> dict[str, Any]:
    """The part of an identity that the base model decides, wherever its folder lies."""
    config, image = ready.model.config, ready.processor.image_config
    weights = {entry.path for entry in ready.entries.values()}
    weights |= {info.path for layer in ready.parts.layers.values() for info in layer.values()}
    folder = ready.entries["language_model.norm.weight"].path.parent
    patterns = ("token*", "added_tokens.json", "special_tokens_map.json")
    tokenizer = {path for pattern in patterns for path in folder.glob(pattern)}
    parts = {
        "config": config,
        "text_config": config.text,
        "vision_config": config.vision,
        "image_processor": image,
    }
    # `text` and `vision` are parts themselves, and `vision_source` is a place
    left_out = ("text", "vision", "vision_source", "quantization")
    return {
        "base model": hash_files(sorted(weights)),
        "tokenizer": hash_files(sorted(tokenizer)),
        "chat template": ready.processor.template_name,
        "quantization": config.quantization and str(config.quantization),
        **{
            f"{part}.{name}": value
            for part, values in parts.items()
            for name, value in vars(values).items()
            if name not in left_out
        },
    }


def hash_files(paths: Iterable[Path]) -> str:
    """sha256 over files in their order.

    Of a file larger than MAX_HASHED only its size and evenly spaced blocks are hashed: all of it
    would take minutes.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= MAX_HASHED:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for k in range(NUM_BLOCKS):
                file.seek(k * (size - BLOCK_SIZE) // (NUM_BLOCKS - 1))
                digest.update(file.read(BLOCK_SIZE))
    return digest.hexdigest()


# ---- comparison


def as_stored(identity: dict[str, Any]) -> dict[str, Any]:
    """`identity` as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(identity))


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The names whose values differ between two stored identities, each with both values."""
    return {
        name: f"{escape_controls(name)} (was {brief(then.get(name))}, is {brief(now.get(name))})"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    }


def brief(value: Any) -> str:
    if re.fullmatch("[0-9a-f]{64}", str(value)):
        return value[:12]  # a hash
    return shorten(json.dumps(value))


def check_identity(checkpoint: Path, then: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises UserError if `checkpoint`, of identity `then`, cannot continue as `identity`.

    Other contents of images are a warning only: a damaged one may have been fixed.
    """
    changed = differences(then, as_stored(identity))
    if list(changed) == [IMAGES]:
        warn(
            f"{checkpoint}: some images have changed since the run was started; it continues with "
            "the new ones"
        )
    elif changed:
        raise UserError(
            f"{checkpoint}: the run was started with other settings: "
            f"{', '.join(list(changed.values())[:8])}; give the old ones, or start a new run in "
            f"another {label('out')}"
        )
