"""Files: JSON read with errors that name the place; files and folders written atomically."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_min.errors import UserError, aside_ending, escape_controls, label, shorten
from llava_min.util.script import tidy_when_terminated

LFS = b"version https://git-lfs"
# what --overwrite may delete: the files that we write, and those of a download from the hub
MODEL_ENDINGS = {".safetensors", ".gguf", ".bin", ".json", ".jinja", ".model"}
MODEL_FILES = {"merges.txt", "vocab.txt", "README.md", "LICENSE", "LICENSE.txt", ".gitattributes"}
MODEL_FOLDERS = {"clip", ".cache"}  # the tower of the original layout; the hub's own notes


def check_file(path: Path) -> None:
    """`path` is a readable regular file and not a git-lfs pointer, or UserError."""
    name = shorten(path, 400)
    try:
        if not path.is_file():
            what = "not a regular file" if path.exists() else "no such file"
            raise UserError(f"{name}: {what}; check the path")
        with open(path, "rb") as f:
            head = f.read(len(LFS))
    except OSError as e:
        fix = "check the path and its permissions"
        raise UserError(f"{name}: cannot be read ({e.strerror}); {fix}") from None
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
        what = f"byte {e.start} is not UTF-8; download it again, or save it as UTF-8"
    except json.JSONDecodeError as e:
        what = f"line {e.lineno} column {e.colno}: {e.msg}; the file must be JSON"
    except (ValueError, RecursionError) as e:  # a number of 5000 digits, 1000 brackets
        what = f"not readable as JSON ({type(e).__name__}); download it again"
    else:
        if isinstance(data, dict):
            return data
        what = f"a JSON {type(data).__name__}, expected an object; is it the right file?"
    raise UserError(f"{path}: {what}")


def read_optional(path: Path) -> dict:
    """The JSON object in `path`, {} where there is no such file."""
    return read_json(path) if os.path.lexists(path) else {}


def replace(path: Path, text: str, errors: str = "strict") -> None:
    """Write `text` to `path` atomically: aside, synced, renamed. Raises OSError."""
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
    if target.exists() or target.is_symlink():
        if overwrite:
            holds_model = (target / "config.json").is_file() or any(target.glob("*.gguf"))
            if holds_model and target.is_dir() and not target.is_symlink():
                return check_only_model(target)
            link = "a link, " if target.is_symlink() else ""
            raise UserError(
                f"{target}: {link}not a folder with a model; only one is overwritten, remove it"
            )
        never, fix = " and is never overwritten", "or remove it"
        if overwrite is not None:
            never, fix = "", f"or {label('overwrite')}"
        raise UserError(f"{target}: exists already{never}; give another path {fix}")


def check_only_model(folder: Path) -> None:
    """`folder` holds nothing but files of models, or UserError: it is about to be deleted."""
    kept = [path for path in folder.iterdir() if path.name not in MODEL_FOLDERS]
    if (folder / "clip").is_dir():
        kept += (folder / "clip").iterdir()
    for path in sorted(kept):
        known = path.name in MODEL_FILES or path.suffix in MODEL_ENDINGS
        if path.is_dir() or not known:
            name = shorten(path.relative_to(folder), 400)
            raise UserError(
                f"{folder}: holds {name}, which is no file of a model; only a model is overwritten,"
                " move it away"
            )


def check_new_folder(target: Path, overwrite: bool | None = None) -> None:
    """`target` may be written, and a new folder be renamed to it, or UserError."""
    check_free(target, overwrite)
    if target.is_symlink():
        raise UserError(f"{target}: a link, which is not replaced; give the folder it leads to")
    if target.is_dir() and os.path.samefile(target, "."):
        raise UserError(
            f"{target}: the folder you are in, which a new one would replace; give a new folder's "
            "path"
        )


def check_apart(target: Path, *sources: str | None) -> None:
    """`target`, a folder to write, is none of the folders that are read, nor in one, nor around
    one. What is not on disk, as a hub id, is passed over.
    """
    real = lambda path: Path(os.path.realpath(path))  # resolve() fails for a link to itself
    out = real(target)
    for source in (real(s) for s in sources if s and Path(s).exists()):
        if out == source:
            what = "is to be read"
        elif source in out.parents:
            what = f"lies in {source}, which is to be read"
        elif out in source.parents and target.exists():
            what = f"holds {source}, which is to be read"
        else:
            continue
        raise UserError(f"{target}: {what}; give another folder to write")


@contextmanager
def writing(
    target: Path, fix: str = "free space or give another path", field: str | None = None
) -> Iterator[None]:
    """Within, an OSError becomes a UserError: `target` cannot be written, and the fix."""
    try:
        yield
    except OSError as e:
        why = e.strerror or escape_controls(e)
        raise UserError(f"{target}: cannot be written ({why}); {fix}", field) from None


@contextmanager
def new_folder(target: Path, durable: bool = True, overwrite: bool | None = None) -> Iterator[Path]:
    """A folder to fill that becomes `target` only when the block succeeds: written aside, synced,
    renamed. Errors and warnings within call it `target`.

    durable: False leaves syncing to the system, enough for thousands of small files that are
    quickly made again. overwrite: the folder of a model may be there, and gives way at the end.
    Raises UserError when `target` exists, or the disk is full or not writable; then nothing is left
    behind, nor is it when SIGTERM or SIGHUP ends the process.
    """
    with tidy_when_terminated(), writing(target):
        check_new_folder(target, overwrite)
        aside = target.with_name(target.name + aside_ending())
        old = target.with_name(f"{target.name}.old-{os.getpid()}")
        try:
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
