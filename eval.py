"""Evaluate a LLaVA by what it writes: answers for a file of questions, then metrics on the answers.

    python eval.py --model tiny --data toy/val.json
    torchrun --nproc-per-node 4 eval.py --model runs/7b/model --benchmark textvqa-ocr --out results/textvqa \\
        --data TextVQA_0.5.1_val.json,TextVQA_Rosetta_OCR_v0.2_val.json --image-folder train_images
    python eval.py --model tiny --data toy/val.json --compare runs/toy-1/adapter

`--out` holds settings.json, predictions.jsonl, metrics.json and report.html; a run that was
interrupted goes on there when it is started again. docs/evaluation.md has the metrics and the
benchmarks.
"""

import fcntl
import hashlib
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from llava_min.checks.ranges import PositiveInt, Seed
from llava_min.errors import UserError, escape_controls, info, shorten
from llava_min.util.cli import PathArg, flags, parse
from llava_min.util.script import run

# What the answers depend on. A folder holds answers of one such set of settings.
SAME = (
    "weights",
    "model_files",
    "data_sha256",
    "template",
    "image_aspect_ratio",
    "exif",
    "dtype",
    "num_beams",
    "max_new_tokens",
    "logprob",
)
# The small files of a checkpoint that its answers depend on, as far as it has them; an adapter has
# the last.
FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
)
CHECKED = 8  # answers that are asked again one at a time where arithmetic depends on the batch


@dataclass
class Knobs:
    model: PathArg = "tiny"  # a folder, a hub id, or tiny
    adapter: PathArg | None = None  # a PEFT folder, applied unmerged
    data: PathArg | None = (
        None  # records with the right answers, as train.py reads them; with --benchmark, its files
    )
    image_folder: PathArg | None = (
        None  # where the pictures lie; the data file's own folder if not given
    )
    benchmark: PathArg | None = (
        None  # vqav2, textvqa, textvqa-ocr, pope, or a settings file: how data is read and asked
    )
    metrics: tuple[str, ...] | None = (
        None  # names, with commas between, or module:function; exact_match if not given
    )
    batch_size: PositiveInt = 8  # rows generated at a time; the answers do not depend on it
    num_beams: PositiveInt = 1  # 1 is greedy
    max_new_tokens: PositiveInt | None = None  # tokens of an answer; 128 if not given
    by: str | None = (
        # a field of the records (kind, in the toy questions): scores for each of its values too
        None
    )
    out: PathArg | None = (
        None  # folder for predictions, scores and the report; none is written if not given
    )
    compare: PathArg | None = None  # another model, or an adapter of this one, on the same records
    logprob: bool = False  # each answer's mean log probability too; one more pass over the data
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the weights
    device: str = "auto"  # cpu, cuda, cuda:N
    image_aspect_ratio: Literal["pad", "crop"] | None = (
        None  # what the checkpoint records if not given
    )
    template: str | None = None  # chat template; the checkpoint's if not given
    exif: bool = False  # turn pictures as their orientation tag says
    seed: Seed = 0  # of the intervals' resampling

    def __post_init__(self):
        if self.data is None:
            raise UserError("--data: not given; give a file of records with answers")
        if self.logprob and self.out is None:
            raise UserError(
                "--logprob: is written into predictions.jsonl alone; give --out DIR, or leave it "
                "out"
            )


def main(argv: list[str]) -> int | None:
    knobs = parse(Knobs, argv, "Answer a file of questions and score the answers.")

    from llava_min.data.records import count_records, read_records
    from llava_min.evaluation.benchmarks import benchmark_records, read_benchmark
    from llava_min.evaluation.metrics import find
    from llava_min.evaluation.metrics.blind import told
    from llava_min.evaluation.predict import difference, references
    from llava_min.parallel.ranks import start

    if knobs.benchmark:  # what it sets, flags may set otherwise
        benchmark = read_benchmark(knobs.benchmark)
        for name in ("metrics", "template", "image_aspect_ratio", "max_new_tokens"):
            if getattr(knobs, name) is None:
                setattr(knobs, name, getattr(benchmark, name))
    knobs.metrics = tuple(knobs.metrics or ("exact_match",))
    knobs.max_new_tokens = knobs.max_new_tokens or 128
    find(knobs.metrics)
    with flags(knobs), start(knobs.device) as world, ExitStack() as held:
        if knobs.benchmark:
            records = benchmark_records(benchmark, knobs.data, knobs.image_folder)
        else:
            records = read_records(knobs.data, knobs.image_folder)
        if not any([references(record) for record in records]):
            raise UserError(
                f"--data: none of its {len(records)} records has a right answer to compare with; "
                "give one that has"
            )
        if knobs.by and not any(knobs.by in record.extra for record in records):
            raise UserError(
                f"--by {escape_controls(knobs.by)}: no record has such a field; give one that "
                "stands beside the "
                "conversation"
            )
        out = Path(knobs.out) if knobs.out else None
        there = [name for name in ("compare", "compare.json") if out and os.path.exists(out / name)]
        if there and not knobs.compare and os.path.exists(out / "settings.json"):
            raise UserError(
                f"--out {out}: holds a comparison ({', '.join(there)}), which would stand beside "
                "other scores; give "
                "--compare as before, or another --out, or remove it"
            )
        folders = (out, out / "compare") if out else (None, None)
        compared = [None, knobs.compare] if knobs.compare else [None]
        checkpoints = [check_side(knobs, records, compare) for compare in compared]
        if world.rank == 0:
            info(f"{knobs.data}: {count_records(records)}")
        sides = [
            # popped: the first model is freed before the second is loaded
            answers(knobs, records, world, folder, checkpoints.pop(0), compare, held)
            for folder, compare in zip(folders, compared)
        ]
        if world.rank:
            return None

        # ---- what they are worth
        for side in sides:
            weigh(side, knobs, records)
        base, tuned, change = None, sides[0], None
        if knobs.compare:
            base, tuned = sides
            # the side with an adapter is the tuned one
            if knobs.adapter and not tuned.settings["adapter"]:
                base, tuned = tuned, base
            change = difference(base.found, tuned.found, knobs.seed)
            for value, members in groups(knobs, records, tuned.found).items():
                found = difference(base.found, tuned.found, knobs.seed, members)
                change |= {f"{name} {value}": m for name, m in found.items()}

        # ---- the folder first: what is printed may find nobody who reads
        if out:
            with writing(out):
                for folder, side in zip(folders, sides):
                    finish(folder, side.rows, side.settings)
                put(out / "metrics.json", [sides[0].scores], indent=2)
                if change is not None:
                    put(out / "compare.json", [change], indent=2)
            write_report(out / "report.html", records, tuned, base, change)
        if base:
            print(escape_controls(sides[0].name))
        show(sides[0].scores)
        if base:
            show_change(change, base.name, tuned.name)
            before = told(sides[0].scores)
            for line in told(sides[1].scores):
                if line not in before:
                    show_remark(f"{sides[1].name}: {line}")
        for side in sides:
            for line in side.settings["remarks"]:
                info(f"{side.name}: {line}")
        if out:
            info(f"wrote {out}")
        failed = [
            name
            for name in find(knobs.metrics)
            if any(name not in side.found.parts for side in sides)
        ]
        if failed:
            again = " and start again with the same --out, which keeps the answers" if out else ""
            raise UserError(
                f"--metrics: {', '.join(failed)} failed, as the warnings above say; correct "
                f"it{again}"
            )
    return None


@dataclass
class Side:
    """A model's answers and what they are worth; with --compare there are two."""

    rows: list[dict]
    settings: dict
    found: Any = None  # evaluate.Measured
    scores: dict[str, dict] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.settings["adapter"] or self.settings["model"]


def weigh(side: Side, knobs: Knobs, records: list) -> None:
    """Scores of every row, of all rows together, and of those of each value of --by."""
    from llava_min.evaluation.predict import cut_answers, measure_all, table

    side.found = measure_all(side.rows, knobs.metrics)
    side.scores = table(side.found, knobs.seed)
    for value, members in groups(knobs, records, side.found).items():
        side.scores |= {
            f"{name} {value}": m for name, m in table(side.found, knobs.seed, members).items()
        }
    other = ", with another --out" if knobs.out else ""
    cut = [line + other for line in cut_answers(side.rows, knobs.max_new_tokens)]
    side.settings["remarks"] = remarks(side.rows) + cut


def groups(knobs: Knobs, records: list, found: Any) -> dict[str, list[int]]:
    """The scored rows of each value of --by."""
    out: dict[str, list[int]] = {}
    for i in found.rows.tolist() if knobs.by else ():
        out.setdefault(str(records[i].extra.get(knobs.by)), []).append(i)
    return dict(sorted(out.items()))


# ---- answers


def which(knobs: Knobs, compare: str | None) -> tuple[str, str | None]:
    """The model and the adapter of a side."""
    if not compare:
        return knobs.model, knobs.adapter
    return (
        (knobs.model, compare)
        if os.path.isfile(Path(compare, "adapter_config.json"))
        else (compare, None)
    )


def check_side(knobs: Knobs, records: list, compare: str | None) -> Any:
    """The Checkpoint of a side, its adapter and the room for answers checked: a side may answer for
    hours, so what is wrong with the other is found before.
    """
    from llava_min.adapter import read_adapter
    from llava_min.evaluation.predict import check_room
    from llava_min.load import open_checkpoint

    source, adapter = which(knobs, compare)
    checkpoint = open_checkpoint(
        source,
        adapter=adapter,
        image_aspect_ratio=knobs.image_aspect_ratio,
        template=knobs.template,
    )
    if adapter:
        read_adapter(checkpoint.model, Path(adapter))
    check_room(checkpoint.model, checkpoint.processor, records, knobs.max_new_tokens)
    return checkpoint


def answers(
    knobs: Knobs,
    records: list,
    world: Any,
    folder: Path | None,
    checkpoint: Any,
    compare: str | None,
    held: ExitStack,
) -> Side:
    """What --model answers, or the model or adapter it is compared with; `folder`, if there is one,
    is continued, and locked for as long as `held` is open.
    """
    import torch

    from llava_min.evaluation.predict import predict

    model_name, adapter = which(knobs, compare)
    options = dict(
        num_beams=knobs.num_beams,
        max_new_tokens=knobs.max_new_tokens,
        exif=knobs.exif,
        logprob=knobs.logprob,
    )
    settings = {
        "model": model_name,
        "adapter": adapter,
        "data": knobs.data,
        "image_folder": knobs.image_folder,
        "benchmark": knobs.benchmark,
        "decoding": f"beam search with {knobs.num_beams} beams"
        if knobs.num_beams > 1
        else "greedy",
        **options,
        "data_sha256": hashes(knobs.data),
        "model_files": small_files(model_name, adapter),
    }
    if folder and world.rank == 0:
        with writing(folder):
            check_same(folder, settings)
            if not folder.exists():
                held.callback(remove_empty, folder)
            folder.mkdir(parents=True, exist_ok=True)
    model, processor = checkpoint.load(knobs.dtype, world.device)
    settings |= {
        "weights": hash_weights(model),
        "template": processor.template_name,
        "prompt": exact_prompt(processor, records[0]),
        "image_aspect_ratio": processor.image_config.aspect,
        "image_size": processor.image_config.size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "batch_size": knobs.batch_size,
        "ranks": world.size,
        "metrics": list(knobs.metrics),
        "seed": knobs.seed,
        "versions": versions(),
    }
    done, file = {}, None
    if folder:
        file, done = open_answers(folder, settings, records, world, held)
        if done and world.rank == 0:
            info(f"{folder}: goes on after {len(done)} of {len(records)} answers")

    def save(rows: list[dict]) -> None:
        if file:
            with writing(folder):
                file.write(
                    "".join(
                        json.dumps(row, ensure_ascii=False) + "\n"
                        for row in rows
                        if "error" not in row
                    )
                )
                file.flush()

    name = f"{adapter or model_name}: " if knobs.compare else ""
    rows = predict(
        model,
        processor,
        records,
        knobs.batch_size,
        progress=lambda line: world.rank or info(name + line),
        world=world,
        done=done,
        save=save,
        **options,
    )
    if model.dtype == torch.float32:
        settings["checked"] = (
            "fp32: the answers do not depend on the batch size or the number of ranks"
        )
    elif knobs.batch_size * world.size > 1:  # in half precision a sum's order can change a token
        few = [i for i in range(len(records)) if "error" not in rows[i]][:CHECKED]
        alone = predict(model, processor, [records[i] for i in few], 1, **options)
        same = sum(a["prediction"] == rows[i]["prediction"] for i, a in zip(few, alone))
        settings["checked"] = (
            f"{settings['dtype']}: {same} of {len(few)} answers are the same one at a time"
        )
    return Side(rows, settings)


def hashes(data: str) -> list[str]:
    """Each file's name, and its sha256, shortened."""
    from llava_min.data.records import sources

    out = []
    for path, weight in sources(data):
        with open(path, "rb") as f:
            times = f" @{float(weight):g}" if weight != 1 else ""
            out.append(f"{path.name} {hashlib.file_digest(f, 'sha256').hexdigest()[:16]}{times}")
    return out


def hash_weights(model: Any) -> str:
    """sha256, shortened, from the first numbers of every tensor: another training changes them all."""
    from llava_min.fast.cpu_linear import unpacked

    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(
            name.encode() + unpacked(p.detach()).flatten()[:64].float().cpu().numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def small_files(source: str, adapter: str | None) -> str:
    """sha256, shortened, of what makes a model of the weights: FILES of its folder, its tower's and
    its adapter's.
    """
    from llava_min.hub import find_folder
    from llava_min.load import TINY, read_config

    folder = TINY if source == "tiny" else find_folder(source)
    digest = hashlib.sha256()
    for place in filter(None, (folder, read_config(folder)[1], adapter)):
        for path in (Path(place) / name for name in FILES):
            if path.is_file():
                digest.update(
                    f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode()
                )
    return digest.hexdigest()[:16]


def exact_prompt(processor: Any, record: Any) -> str:
    """What the model reads for the first record, each picture as <image>."""
    from llava_min.data.chat import render

    tokens = {"image": "<image>", "bos": "<s>", "eos": "</s>"}
    pieces = render(processor.template_name, record.messages[:-1], answer=False)
    return "".join(tokens.get(p.token, p.token) if p.text is None else p.text for p in pieces)


def versions() -> dict[str, str]:
    """Of what the answers and scores were made with, as far as it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": sys.version.split()[0]}
    for name in (
        "llava_min",
        "torch",
        "pillow",
        "numpy",
        "sacrebleu",
        "rouge-score",
        "bert-score",
        "transformers",
    ):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


# ---- the folder


def check_same(folder: Path, settings: dict) -> None:
    """`folder` is free, or holds answers that were made as `settings` say, as far as they say."""
    from llava_min.util.files import check_free, read_json

    if not (folder / "settings.json").is_file():
        return check_free(folder)
    before = read_json(folder / "settings.json")
    show = lambda x: escape_controls(json.dumps(x, ensure_ascii=False))[:100]
    differ = [
        f"{key} ({show(before.get(key))} there, {show(settings[key])} now)"
        for key in SAME
        if key in settings and before.get(key) != settings[key]
    ]
    if differ:
        raise UserError(
            f"--out {folder}: holds answers made with other settings: {', '.join(differ)}; give "
            "another --out, "
            "or the same settings"
        )


def open_answers(
    folder: Path, settings: dict, records: list, world: Any, held: ExitStack
) -> tuple[TextIO, dict[int, dict]]:
    """This rank's file of answers, to append to, and those that are there. Rank 0 locks its own,
    against another run in the same folder, before it writes anything there.
    """
    from llava_min.evaluation.predict import read_answers
    from llava_min.parallel.ranks import all_gather

    done = None
    if world.rank:
        done = all_gather(world, None)[0]  # the folder is ours
    name = "predictions.jsonl" if world.rank == 0 else f"predictions-{world.rank}.jsonl"
    with writing(folder):
        file = held.enter_context(open(folder / name, "a", encoding="utf-8"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"--out {folder}: another run writes there; wait for it, or give another --out"
        ) from None
    if world.rank == 0:
        begun = (folder / "settings.json").exists()
        if begun:
            check_same(folder, settings)
        try:
            done = read_answers(folder, records)
            with writing(folder):
                put(folder / "settings.json", [settings], indent=2)
        except UserError:
            if not begun:
                (folder / name).unlink()
            raise
        all_gather(world, done)
    return file, done


def remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something
        folder.rmdir()


def finish(folder: Path, rows: list[dict], settings: dict) -> None:
    """All answers with their scores, in the records' order, in the place of what was appended."""
    put(folder / "predictions.jsonl", rows)
    for path in folder.glob("predictions-*.jsonl"):
        path.unlink()
    put(folder / "settings.json", [settings], indent=2)


def put(path: Path, items: list[dict], indent: int | None = None) -> None:
    """A file of JSON that is there whole, or as it was before."""
    from llava_min.util.files import replace

    lines = (json.dumps(item, ensure_ascii=False, indent=indent) + "\n" for item in items)
    replace(path, "".join(lines), errors="backslashreplace")  # a path need not be UTF-8


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(
            f"--out {folder}: cannot be written ({e.strerror or escape_controls(e)}); "
            "free space or give another path"
        ) from None


def write_report(
    path: Path, records: list, tuned: Side, base: Side | None, change: dict | None
) -> None:
    from llava_min.report import write_eval_report

    rows = [
        row | {"images": record.images, "earlier": record.history()}
        for row, record in zip(tuned.rows, records, strict=True)
    ]
    if base:
        rows = [
            row
            | {
                "base_prediction": old["prediction"],
                "base_scores": old["scores"],
                "base_stopped": old.get("stopped"),
            }
            for row, old in zip(rows, base.rows, strict=True)
        ]
    compare = base and {"name": base.name, "table": base.scores, "difference": change}
    write_eval_report(path, rows, tuned.scores, tuned.settings, compare)


# ---- what is shown


def remarks(rows: list[dict]) -> list[str]:
    """What scores do not tell: records without pictures, references or an answer, counted and
    named.
    """
    from llava_min.errors import preview

    out = []
    for what, ids in (
        ("could not be read and are not scored", [r["id"] for r in rows if "error" in r]),
        ("have no reference and are not scored", [r["id"] for r in rows if not r["references"]]),
        (
            "have an empty prediction",
            [r["id"] for r in rows if not r["prediction"] and "error" not in r],
        ),
    ):
        if ids:
            out.append(
                f"{len(ids)} of {len(rows)} records {what}: {preview(map(shorten, ids), ', ')}"
            )
    out += [r["error"] for r in rows if "error" in r][:5]
    return out


def show(scores: dict[str, dict]) -> None:
    """The table, and under it what its metrics do not measure."""
    from llava_min.evaluation.metrics.blind import told

    print(f"{'metric':<28}{'score':>8}{'95 % interval':>20}{'n':>8}")
    for name, m in scores.items():
        interval = f"{m['low']:.3f} to {m['high']:.3f}"
        print(f"{escape_controls(name):<28.28}{m['score']:>8.3f}{interval:>20}{m['n']:>8}")
    for line in told(scores):
        show_remark(line)


def show_remark(line: str) -> None:
    print(textwrap.fill(escape_controls(line), 79, subsequent_indent="  ", break_on_hyphens=False))


def show_change(change: dict[str, dict], base: str, tuned: str) -> None:
    print(f"\nbase  {escape_controls(base)[-70:]}\ntuned {escape_controls(tuned)[-70:]}")
    print(f"{'metric':<26}{'base':>9}{'tuned':>9}{'change':>9}{'95 % interval':>22}")
    for name, m in change.items():
        interval = f"{m['low']:+.3f} to {m['high']:+.3f}"
        print(
            f"{escape_controls(name):<26.26}{m['base']:>9.3f}{m['tuned']:>9.3f}{m['score']:>+9.3f}{interval:>22}"
        )


if __name__ == "__main__":
    run(main)
