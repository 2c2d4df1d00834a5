"""A file of records, and a mixture of files: how many records may be bad, and the warnings about
what good ones say in vain.

data/records.py collects all bad records of a file before it calls `check_bad`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_min.errors import UserError, preview, shorten, warn

MAX_DIGITS = 20  # of a weight


def check_image_folder(root: Path, given: bool) -> None:
    if given and not root.is_dir():
        raise UserError(
            f"{shorten(root, 400)}: no such folder; give the folder of the images", "image_folder"
        )


def check_found(images: Iterable, found: Iterable[bool]) -> None:
    if missing := [path for path, is_there in zip(images, found) if not is_there]:
        raise UserError(f"no image {shorten(missing[0], 200)}")


def none_found(found: int, paths: Sequence[Path], root: Path) -> str:
    """What to say where no image at all is there: the folder is wrong and not the records."""
    if found or not paths:
        return ""
    return (
        f"0 of {len(paths)} images found under {shorten(root, 400)} (the first: "
        f"{shorten(paths[0], 200)}); check the image folder"
    )


def check_some_found(path: Path, found: int, paths: Sequence[Path], root: Path) -> None:
    if text := none_found(found, paths, root):
        raise UserError(f"{path}: {text}")


def check_not_empty(path: Path, records: int, container: dict | None) -> None:
    """`container`: the one object that is the whole file, if it is no record but holds some."""
    if not records:
        raise UserError(f"{path}: holds no records; give a file with at least one conversation")
    if container is not None:
        keys = shorten(", ".join(container) or "none", 200)
        raise UserError(
            f"{path}: is one JSON object (its keys: {keys}), expected records, but "
            "conversations is missing; put the records into a list [ … ] with nothing around it"
        )


def check_bad(path: Path, bad: list[str], records: int, skipped: bool) -> None:
    """Bad records end the run, unless they are `skipped`, with a warning."""
    many = f"{path}: {len(bad)} of {records} records are bad"
    if bad and not skipped:
        raise UserError(f"{many}: {preview(bad)}; fix or remove them")
    if bad:
        warn(f"{many} and left out: {preview(bad)}")


def check_share(bad: Iterable[str], records: int, most: float) -> None:
    """At most the share `most` of all records is bad."""
    bad = list(bad)
    if len(bad) > most * records:
        raise UserError(
            f"{len(bad)} of {records} records are bad, more than the {most:.2%} that may be "
            f"skipped: {preview(bad)}; fix or remove them"
        )


def report_ignored(
    path: Path, alike: tuple | None, answers: Counter, fields: Counter, marks: Counter
) -> None:
    """Warn of what good records say and the model does not see."""
    if alike:
        warn(
            f"{path}: the images {' and '.join(shorten(p, 200) for p in alike)} differ in upper "
            "and lower case alone; some disks do not keep them apart"
        )
    if answers:
        warn(
            f"{path}: {answers.total()} records begin with an answer, which is left out, as LLaVA "
            "does"
        )
    if fields:
        warn(
            f"{path}: fields that are not used: {times(fields)}; nothing of them reaches the "
            "model: rename, fix or remove them"
        )
    if marks:
        warn(f"{path}: marks within a question, or beside its image, are text: {times(marks)}")


def times(names: Counter) -> str:
    return preview((f"{shorten(name)} ({n} times)" for name, n in names.most_common()), ", ")


# ---- a mixture of files


def check_mixture(data: str, records: int, repeated: Iterable[str]) -> None:
    if not records:
        raise UserError(f"{shorten(data, 200)}: no record is left; raise the weight")
    if repeated := list(repeated):
        warn(
            f"{shorten(data, 400)}: {len(repeated)} ids are on more than one record, for example "
            f"{shorten(repeated[0])}"
        )


def check_weighted(data: str, path: Path, weight: float, records: float, most: int) -> None:
    if records > most:
        raise UserError(
            f"{shorten(data, 200)}: {path.name} {weight:g} times is more than {most} records; "
            "lower the weight"
        )


def check_weight(data: str, name: str, weight: str) -> None:
    """`weight`: the digits after @, "" if there are none."""
    if len(weight) > MAX_DIGITS:
        raise UserError(
            f"{shorten(data, 200)}: a weight of {len(weight)} digits; write at most {MAX_DIGITS}"
        )
    is_zero = weight != "" and float(weight) == 0
    if not name or is_zero:
        raise UserError(
            f"{shorten(data, 200)}: {'a weight of 0' if name else 'a name is empty'}; expected "
            "files with commas between, each with @WEIGHT after it or not"
        )


def check_matched(found: list, path: Path) -> None:
    if not found:
        raise UserError(f"{shorten(path, 400)}: no such files; check the path")
