"""The folder of an evaluation, which an interrupted run continues: its lock, its files, and what
the answers in it depend on.

    settings.json            what made the answers; those of SAME never change in a folder
    predictions.jsonl        a row of predict.py per line: appended as answered, sorted at the end
    predictions-RANK.jsonl   the same of the other ranks, until the end

eval.py opens the folder with `open_answers`, which returns the rows that exist, appends new ones
with `append_rows`, and ends with `write_answers`.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from llava_min.data.formats import Record
from llava_min.errors import UserError, escape_controls, label, preview, shorten, warn
from llava_min.evaluation.predict import unanswered
from llava_min.parallel.ranks import World, all_gather
from llava_min.util.files import check_free, read_json, replace

# What the answers depend on. A folder holds answers of one such set of settings.
SAME = (
    "weights", "model_files", "data_sha256", "template", "image_aspect_ratio", "exif", "dtype",
    "num_beams", "max_new_tokens", "logprob",
)  # fmt: skip


# ---- the folder


def check_same_settings(folder: Path, settings: dict) -> None:
    """`folder` is free, or its answers were made with these `settings`, or UserError.

    Settings that are not known yet, because the weights have not been read, are passed over.
    """
    if not (folder / "settings.json").is_file():
        return check_free(folder)
    before = read_json(folder / "settings.json")
    show = lambda x: escape_controls(json.dumps(x, ensure_ascii=False))[:100]
    different = [
        f"{key} ({show(before.get(key))} there, {show(settings[key])} now)"
        for key in SAME
        if key in settings and before.get(key) != settings[key]
    ]
    if different:
        raise UserError(
            f"{folder} holds answers made with other settings: {', '.join(different)}; give "
            "another folder, or the same settings",
            "out",
        )


def make_folder(folder: Path, settings: dict, stack: ExitStack) -> None:
    """Create `folder`, or check that its answers can be continued. A new folder that is still empty
    when `stack` closes is removed.
    """
    with writing(folder):
        check_same_settings(folder, settings)
        if not folder.exists():
            stack.callback(remove_if_empty, folder)
        folder.mkdir(parents=True, exist_ok=True)


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def open_answers(
    folder: Path, settings: dict, records: Sequence[Record], world: World, stack: ExitStack
) -> tuple[TextIO, dict[int, dict]]:
    """This rank's file, open for appending until `stack` closes, and the rows that exist, by the
    index of their record.

    Rank 0 locks its file against other runs in this folder before it writes anything there. Raises
    UserError as `check_same_settings` and `read_answers` do, and where another run holds the lock.
    """
    done = None
    if world.rank:
        done = all_gather(world, None)[0]  # waits until rank 0 has the lock
    name = "predictions.jsonl" if world.rank == 0 else f"predictions-{world.rank}.jsonl"
    with writing(folder):
        file = stack.enter_context(open(folder / name, "a", encoding="utf-8"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"another run writes into {folder}; wait for it, or give another folder", "out"
        ) from None
    if world.rank == 0:
        continued = (folder / "settings.json").exists()
        if continued:
            check_same_settings(folder, settings)  # with the weights, which are known now
        try:
            done = read_answers(folder, records)
            with writing(folder):
                write_json_lines(folder / "settings.json", [settings], indent=2)
        except UserError:
            if not continued:
                (folder / name).unlink()
            raise
        all_gather(world, done)
    return file, done


def read_answers(folder: Path, records: Sequence[Record]) -> dict[int, dict]:
    """The rows in predictions*.jsonl of an interrupted run, by the index of their record.

    A last line that was cut short is removed from its file, and a row that exists twice counts
    once, with a warning. Raises UserError for any other line that is not a row, and for rows of
    other questions or images.
    """
    # records may share an id, so a row belongs to any record that looks the same
    waiting: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        waiting.setdefault(row_key(unanswered(record)), []).append(i)
    done, unknown, repeated, n = {}, [], 0, 0
    for path in sorted(folder.glob("predictions*.jsonl")):
        for row in read_rows(path):
            n += 1
            key = row_key(row)
            if "error" in row:  # asked again: its images may have been repaired
                continue
            if key not in waiting:
                unknown.append(row["id"])
            elif not waiting[key]:
                repeated += 1
            else:
                done[waiting[key].pop(0)] = row
    if unknown:
        raise UserError(
            f"{folder}: {len(unknown)} of its {n} answers are to questions that {label('data')} "
            f"does not hold, or about other images ({preview(map(shorten, unknown), ', ')}); give "
            f"another {label('out')}"
        )
    if repeated:
        warn(f"{folder}: {repeated} of its {n} answers are there twice and count once")
    return done


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of one file; a last line that was cut short is removed from it."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        warn(f"{path}: its last line was cut short; that record is answered again")
        os.truncate(path, end)
    for number, line in enumerate(data[:end].split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            row_key(row)
            row["prediction"].encode()  # an error unless it is text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{path}:{number}: is not an answer of this program; remove the line, "
                f"or give another {label('out')}"
            ) from None
        yield row


def row_key(row: dict) -> str:
    """What decides which record a row answers."""
    return json.dumps([row[name] for name in ("id", "prompt", "references", "record")])


# ---- writing


def append_rows(file: TextIO, folder: Path, rows: list[dict]) -> None:
    """Add new rows; those with an `error` are asked again when the run is continued."""
    with writing(folder):
        for row in rows:
            if "error" not in row:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()


def write_answers(folder: Path, rows: list[dict], settings: dict) -> None:
    """All rows with their scores, in the records' order, replace what was appended."""
    write_json_lines(folder / "predictions.jsonl", rows)
    for path in folder.glob("predictions-*.jsonl"):
        path.unlink()
    write_json_lines(folder / "settings.json", [settings], indent=2)


def write_json_lines(path: Path, items: list[dict], indent: int | None = None) -> None:
    """Write `items` one after another; `path` is the old file or the new one, never half of it."""
    lines = (json.dumps(item, ensure_ascii=False, indent=indent) + "\n" for item in items)
    replace(path, "".join(lines), errors="backslashreplace")  # a path need not be UTF-8


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within, an OSError is a UserError about the folder."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"{folder} cannot be written ({e.strerror or escape_controls(e)}); free space or give "
            "another path",
            "out",
        ) from None
