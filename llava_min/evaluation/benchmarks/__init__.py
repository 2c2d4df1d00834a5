"""Benchmarks by name: a settings file says how to read the files that a benchmark publishes, what
to ask and how to score it. To add a benchmark, add a file; docs/evaluation.md lists its keys.
"""

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from llava_min.checks.formats import check_path, check_text, kind
from llava_min.data.formats import Record
from llava_min.data.json_file import parse
from llava_min.data.records import ImageFiles, raw_records, sources
from llava_min.errors import UserError, escape_controls, guess, label, preview, shorten, warn
from llava_min.util.files import check_file

FOLDER = Path(__file__).parent
FIELD = re.compile(r"\{(\w+)(?::(\w*))?\}")


@dataclass(frozen=True)
class Benchmark:
    """`id`, `image` and `prompt` are templates: `{field}` is a field of a published record, a list
    with commas between its items; `{field:012}` is a number with leading zeros,
    `{field:capitalize}` a text that begins with a capital.
    """

    title: str
    # name; records: the key of its list of records; join: the field it shares with the first file
    files: list[dict]
    id: str
    image: str
    prompt: str
    # the field with the right answers: a text, a list of texts, or of objects with a text `answer`
    answers: str
    metrics: list[str]
    template: str
    image_aspect_ratio: str
    max_new_tokens: int


def read_benchmark(name: str) -> Benchmark:
    """A benchmark of this folder, or a .toml file. UserError says what is wrong with the file."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        names = sorted(p.stem for p in FOLDER.glob("*.toml"))
        fix = guess(name, names, f"there are {', '.join(names)}")
        raise UserError(f"{shorten(name)}: no such benchmark or .toml file; {fix}", "benchmark")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as e:
        raise UserError(f"{path}: {escape_controls(e)}; correct the file") from None
    keys = {f.name: f.type for f in fields(Benchmark)}
    for key, value in data.items():
        if key not in keys:
            fix = guess(key, keys, f"there are {', '.join(keys)}")
            raise UserError(f"{path}: {escape_controls(key)} is not a setting; {fix}")
        expected = getattr(keys[key], "__origin__", keys[key])
        fits = type(value) is expected
        if fits and expected is list:
            fits = all(type(x) is keys[key].__args__[0] for x in value)
        if not fits:
            raise UserError(f"{path}: {key} is {shorten(value)}, expected {keys[key]}; correct it")
    if absent := [key for key in keys if not data.get(key)]:
        raise UserError(f"{path}: {absent[0]} is missing; give it")
    for i, file in enumerate(data["files"]):
        for key in ("name", "join")[: 1 + (i > 0)]:
            if not isinstance(file.get(key), str):
                raise UserError(
                    f"{path}: files {i}: {key} is {shorten(file.get(key))}, expected text; give it"
                )
    for key in ("id", "image", "prompt"):
        for m in FIELD.finditer(data[key]):
            if m[2] is not None and not re.fullmatch(r"capitalize|0\d+", m[2]):
                raise UserError(
                    f"{path}: {key}: {escape_controls(m[0])} is not known; write {{{m[1]}}}, "
                    f"{{{m[1]}:012}} or {{{m[1]}:capitalize}}"
                )
    return Benchmark(**data)


def benchmark_records(benchmark: Benchmark, data: str, image_folder: str | None) -> list[Record]:
    """The records of published files; `data` names those of `benchmark.files`, in their order, with
    commas between.

    Raises UserError if a file cannot be read or is a different one, or if records are bad: all are
    counted and the first ones named.
    """
    paths, weights = zip(*sources(data))
    names = ",".join(f["name"] for f in benchmark.files)
    takes = f"{benchmark.title} takes {label('data')} {names}"
    if len(paths) > len(benchmark.files):
        raise UserError(f"{len(paths)} files; {takes}", "data")
    if any(weight != 1 for weight in weights):
        raise UserError(f"{shorten(data, 400)}: a benchmark has no weights; omit @WEIGHT", "data")
    first, *others = (read(path, layout, takes) for path, layout in zip(paths, benchmark.files))
    joins = [
        (layout["join"], path, by_field(other, layout["join"], path, takes), set())
        for layout, path, other in zip(benchmark.files[1:], paths[1:], others)
    ]
    root = Path(image_folder or paths[0].parent).absolute()
    if not root.is_dir():
        raise UserError(
            f"{shorten(root, 400)}: no such folder; give {label('image_folder')}, the folder of "
            "the images"
        )
    files, records, bad = ImageFiles(root), [], []
    for n, raw in enumerate(first):
        try:
            for field, path, other, seen in joins:
                key = key_of(raw, field)
                if key not in other:
                    raise UserError(f"{path.name} has none of its {field} {shorten(key)}")
                seen.add(key)
                raw = other[key] | raw
            record = from_published(raw, benchmark, root)
            if not files.has(record.images[0]):
                raise UserError(f"no image {shorten(record.images[0], 200)}")
            records.append(record)
        except UserError as e:
            bad.append(f"record {n}: {e}")
    if bad:
        raise UserError(
            f"{shorten(data, 400)}: {len(bad)} of {len(first)} records are bad: {preview(bad)}; "
            f"{takes}, and {label('image_folder')} with the images"
        )
    for field, path, other, seen in joins:
        if alone := [key for key in other if key not in seen]:
            warn(
                f"{path.name}: {len(alone)} of {len(other)} records belong to no question and are "
                f"left out, for example {field} {shorten(alone[0])}"
            )
    return records


def key_of(raw: dict, field: str) -> str | int:
    """What joins a record to one of another file. Raises Bad."""
    key = value(raw, field)
    if not isinstance(key, (str, int)):
        raise UserError(f"{field}: {kind(key)}, expected text or a number")
    return key


def by_field(records: list[dict], field: str, path: Path, takes: str) -> dict[str | int, dict]:
    found: dict[str | int, dict] = {}
    for n, record in enumerate(records):
        try:
            if (key := key_of(record, field)) in found:
                raise UserError(f"another record has the same {field} {shorten(key)}")
            found[key] = record
        except UserError as e:
            raise UserError(f"{path}: record {n}: {e}; is it the right file? {takes}") from None
    return found


def read(path: Path, layout: dict, takes: str) -> list[dict]:
    """The records of one file: the list under a key of an object, a list, or one per line."""
    if key := layout.get("records"):
        check_file(path)
        try:
            found = parse(path.read_bytes().decode("utf-8-sig"), path)
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(
                f"{path}: cannot be read ({escape_controls(e)}); download it again"
            ) from None
        found = found.get(key) if isinstance(found, dict) else None
    else:
        found = [record for _, record in raw_records(path)]
    is_list = isinstance(found, list) and all(isinstance(record, dict) for record in found)
    if not is_list or not found:
        what = f"has no list of records under {key!r}" if key else "holds no records"
        raise UserError(f"{path}: {what}; is it the right file? {takes}")
    return found


def from_published(raw: dict, benchmark: Benchmark, root: Path) -> Record:
    """A published record as ours, with all right answers as `references`. Raises Bad."""
    prompt, right = fill(benchmark.prompt, raw), value(raw, benchmark.answers)
    check_text(prompt, "prompt")
    right = right if isinstance(right, list) else [right]
    right = [r.get("answer") if isinstance(r, dict) else r for r in right]
    for r in right:
        if not isinstance(r, str):
            raise UserError(f"{benchmark.answers}: {kind(r)}, expected texts")
        check_text(r, benchmark.answers)
    if not right:
        raise UserError(f"{benchmark.answers}: is empty, expected the right answers")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": right[0]},
    ]
    image = fill(benchmark.image, raw)
    check_path(image, root, "image")
    images = [root / image]
    return Record(fill(benchmark.id, raw), messages, images, root, raw | {"references": right})


def value(raw: dict, field: str) -> object:
    if field not in raw:
        raise UserError(f"has no field {field}")
    return raw[field]


def fill(template: str, raw: dict) -> str:
    """`template` with the fields of a record. Raises Bad for a field that is missing or does not
    fit.
    """

    def one(m: re.Match) -> str:
        x, how = value(raw, m[1]), m[2]
        if how and type(x) is not (str if how == "capitalize" else int):
            expected = "text" if how == "capitalize" else "a whole number"
            raise UserError(f"{m[1]}: {shorten(x)}, expected {expected}")
        items = x if isinstance(x, list) else [x]
        if not all(type(i) in (str, int) for i in items):
            raise UserError(f"{m[1]}: {shorten(x)}, expected text or numbers")
        text = ", ".join(map(str, items))
        return text.capitalize() if how == "capitalize" else text.zfill(int(how or 0))

    return FIELD.sub(one, template)
