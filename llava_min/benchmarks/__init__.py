"""Benchmarks by name: a settings file says how the files that a benchmark publishes are read, what is asked and how it is
scored. One more benchmark is one more file; docs/evaluation.md lists its keys.
"""

import difflib
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from llava_min.cli import UserError, printable
from llava_min.data.records import (Bad, Files, Record, check_text, in_folder, kind, parse, raw_records, short, sources,
                                    told)
from llava_min.files import check_file

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """`id`, `image` and `prompt` are forms: `{field}` is a field of a published record, `{field:012}` a number with
    leading zeros, a list stands with commas between its items."""

    title: str
    files: list[dict]  # name; records: the key its records stand under; join: the field it shares with the first file
    id: str
    image: str
    prompt: str
    answers: str  # the field with the right answers: a text, a list of texts, or of objects with a text `answer`
    metrics: list[str]
    template: str
    image_aspect_ratio: str
    max_new_tokens: int


def read_benchmark(name: str) -> Benchmark:
    """A benchmark of this folder, or of a .toml file. Raises UserError for a file that is not one."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        names = sorted(p.stem for p in FOLDER.glob("*.toml"))
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError(f"--benchmark {printable(name)}: no such benchmark or .toml file; "
                        + (f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"))
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as e:
        raise UserError(f"{path}: {printable(e)}; correct the file") from None
    keys = {f.name: f.type for f in fields(Benchmark)}
    for key, value in data.items():
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            raise UserError(f"{path}: {printable(key)} is not a setting; "
                            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(keys)}"))
        expected = getattr(keys[key], "__origin__", keys[key])
        if type(value) is not expected or expected is list and not all(type(x) is keys[key].__args__[0] for x in value):
            raise UserError(f"{path}: {key} is {short(value)}, expected {keys[key]}; correct it")
    if absent := [key for key in keys if not data.get(key)]:
        raise UserError(f"{path}: {absent[0]} is missing; give it")
    for i, file in enumerate(data["files"]):
        for key in ("name", "join")[: 1 + (i > 0)]:
            if not isinstance(file.get(key), str):
                raise UserError(f"{path}: files {i}: {key} is {short(file.get(key))}, expected text; give it")
    return Benchmark(**data)


def benchmark_records(benchmark: Benchmark, data: str, image_folder: str | None) -> list[Record]:
    """The records of published files: `data` names those of `benchmark.files`, in their order, with commas between.

    Raises UserError: a file cannot be read or is another, or records are bad; all are counted and the first named.
    """
    paths = [path for path, _ in sources(data)]
    takes = f"{benchmark.title} takes --data {','.join(f['name'] for f in benchmark.files)}"
    if len(paths) > len(benchmark.files):
        raise UserError(f"--data: {len(paths)} files; {takes}")
    first, *others = (read(path, layout, takes) for path, layout in zip(paths, benchmark.files))
    joins = [(layout["join"], path, {record.get(layout["join"]): record for record in other})
             for layout, path, other in zip(benchmark.files[1:], paths[1:], others)]
    root = Path(image_folder or paths[0].parent).absolute()
    files, records, bad = Files(root), [], []
    for n, raw in enumerate(first):
        try:
            for field, path, other in joins:
                if raw.get(field) not in other:
                    raise Bad(f"{path.name} has none of its {field} {short(raw.get(field))}")
                raw = other[raw[field]] | raw
            record = from_published(raw, benchmark, root)
            if not files.have(record.images[0]):
                raise Bad(f"no picture {short(record.images[0], 200)}")
            records.append(record)
        except Bad as e:
            bad.append(f"record {n}: {e}")
    if bad:
        raise UserError(f"{short(data, 400)}: {len(bad)} of {len(first)} records are bad: {told(bad)}; {takes}, and "
                        "--image-folder where the pictures lie")
    return records


def read(path: Path, layout: dict, takes: str) -> list[dict]:
    """The records of one file: under a key of an object, a list, or one a line."""
    if key := layout.get("records"):
        check_file(path)
        try:
            found = parse(path.read_bytes().decode("utf-8-sig"), path)
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: cannot be read ({printable(e)}); download it again") from None
        found = found.get(key) if isinstance(found, dict) else None
    else:
        found = [record for _, record in raw_records(path)]
    if not isinstance(found, list) or not found or not all(isinstance(record, dict) for record in found):
        what = f"has no list of records under {key!r}" if key else "holds no records"
        raise UserError(f"{path}: {what}; is it the right file? {takes}")
    return found


def from_published(raw: dict, benchmark: Benchmark, root: Path) -> Record:
    """Raises Bad."""
    prompt, right = fill(benchmark.prompt, raw), value(raw, benchmark.answers)
    check_text(prompt, "prompt")
    right = right if isinstance(right, list) else [right]
    right = [r.get("answer") if isinstance(r, dict) else r for r in right]
    for r in right:
        if not isinstance(r, str):
            raise Bad(f"{benchmark.answers}: {kind(r)}, expected texts")
        check_text(r, benchmark.answers)
    if not right:
        raise Bad(f"{benchmark.answers}: is empty, expected the right answers")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
                {"role": "assistant", "content": right[0]}]
    image = in_folder(fill(benchmark.image, raw), root, "image")
    return Record(fill(benchmark.id, raw), messages, [image], root, raw | {"references": right})


def value(raw: dict, field: str) -> object:
    if field not in raw:
        raise Bad(f"has no field {field}")
    return raw[field]


def fill(form: str, raw: dict) -> str:
    def one(m: re.Match) -> str:
        x = value(raw, m[1])
        items = x if isinstance(x, list) else [x]
        if not all(isinstance(i, (str, int)) for i in items) or m[2] and not isinstance(x, int):
            raise Bad(f"{m[1]}: {short(x)}, expected {'a whole number' if m[2] else 'text or numbers'}")
        return ", ".join(map(str, items)).zfill(int(m[2] or 0))

    return re.sub(r"\{(\w+)(?::0(\d+))?\}", one, form)
