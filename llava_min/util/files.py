"""Files in and out, one careful way each: JSON that errors by name, folders that are there whole or
not.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_min.errors import UserError, escape_controls, shorten

LFS = b"version https://git-lfs"


def check_file(path: Path) -> None:
    """`path` is a readable regular file and not a git-lfs pointer, or UserError."""
    try:
        if not path.is_file():
            what = "not a regular file" if path.exists() else "no such file"
            raise UserError(f"{shorten(path, 400)}: {what}; check the path")
        with open(path, "rb") as f:
            head = f.read(len(LFS))
    except OSError as e:
        raise UserError(
            f"{shorten(path, 400)}: cannot be read ({e.strerror}); check the path and its "
            "permissions"
        ) from None
    if head == LFS:
        raise UserError(
            f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` in its folder"
        )


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError naming the file, line and column."""
    check_file(path)
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}: byte {e.start} is not UTF-8; download it again, or save it as UTF-8"
        ) from None
    except json.JSONDecodeError as e:
        raise UserError(
            f"{path}: line {e.lineno} column {e.colno}: {e.msg}; the file must be JSON"
        ) from None
    except (ValueError, RecursionError) as e:  # not text, a number of 5000 digits, 1000 brackets
        raise UserError(
            f"{path}: not readable as JSON ({type(e).__name__}); download it again"
        ) from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: a JSON {type(data).__name__}, expected an object; is it the right file?"
        )
    return data


def replace(path: Path, text: str, errors: str = "strict") -> None:
    """`path` is the old file or the new one, never half of it: written aside, synced, renamed.
    OSError when it cannot be.
    """
    aside = path.with_name(f".tmp-{path.name}")
    try:
        aside.write_text(text, encoding="utf-8", errors=errors)
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    replace(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def check_free(target: Path, overwrite: bool | None = None) -> None:
    """`target` may be written: absent, an empty folder, or with `overwrite` a model's folder.

    `overwrite` is None where nothing can be overwritten, and the message does not offer it.
    """
    if target.is_dir() and not any(target.iterdir()):
        return
    if overwrite and target.is_dir() and not target.is_symlink():
        if (target / "config.json").is_file() or any(target.glob("*.gguf")):
            return
        raise UserError(f"{target}: not a folder with a model; only one is overwritten, remove it")
    if target.exists() or target.is_symlink():
        never, mend = " and is never overwritten", "or remove it"
        if overwrite is not None:
            never, mend = "", "or --overwrite"
        raise UserError(f"{target}: exists already{never}; give another path {mend}")


@contextmanager
def new_folder(target: Path, durable: bool = True, overwrite: bool | None = None) -> Iterator[Path]:
    """A folder to fill that is named `target` only when the block ends well: written aside, synced,
    renamed.

    Not `durable`: the system syncs when it likes, as is enough for thousands of small files that
    are soon remade. `overwrite`: the folder of a model may be there, and gives way at the end. Raises
    UserError when `target` exists, or the disk is full or not writable; then nothing is left behind.
    """
    aside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    try:
        check_free(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside
        for path in (*aside.rglob("*"), aside) if durable else ():
            sync(path)
        if target.is_dir():
            os.rename(target, old)
        os.rename(aside, target)
        sync(target.parent)
        if old.exists():
            shutil.rmtree(old)
    except OSError as e:
        raise UserError(
            f"{target}: cannot be written ({e.strerror or escape_controls(e)}); "
            "free space or give another path"
        ) from None
    finally:
        if aside.exists():
            shutil.rmtree(aside)
        if old.exists() and not target.exists():
            os.rename(old, target)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
