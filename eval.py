"""Evaluate a LLaVA by what it writes: answers to a file of questions, then metrics on the answers.

    python eval.py --model tiny --data toy/val.json
    torchrun --nproc-per-node 4 eval.py --model runs/7b/model --out results/textvqa \\
        --benchmark textvqa-ocr --image-folder train_images \\
        --data TextVQA_0.5.1_val.json,TextVQA_Rosetta_OCR_v0.2_val.json
    python eval.py --model tiny --data toy/val.json --compare runs/toy-1/adapter

`--out` gets settings.json, predictions.jsonl, metrics.json and report.html. An interrupted run is
continued when it is started again with the same `--out`. docs/evaluation.md describes the metrics
and the benchmarks.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_min.checks.evaluation import check_all_scored, check_no_comparison, check_questions
from llava_min.checks.ranges import PositiveInt, Seed
from llava_min.errors import UserError, info, label
from llava_min.util.cli import PathArg, flags, parse
from llava_min.util.script import run

NUM_CHECKED = 8  # answers asked again one at a time where arithmetic depends on the batch


@dataclass
class EvalConfig:
    model: PathArg = "tiny"  # a folder, a hub id, or tiny
    adapter: PathArg | None = None  # a PEFT folder, applied unmerged
    data: PathArg | None = None  # records with answers, as train.py reads; or a benchmark's files
    image_folder: PathArg | None = None  # where the images are; default: the data file's folder
    benchmark: PathArg | None = None  # vqav2, textvqa, textvqa-ocr, pope, or a settings file
    metrics: tuple[str, ...] | None = None  # names or module:function, with commas; exact_match
    batch_size: PositiveInt = 8  # rows generated at a time; the answers do not depend on it
    num_beams: PositiveInt = 1  # 1 is greedy
    max_new_tokens: PositiveInt | None = None  # tokens of an answer; 128 if not given
    by: str | None = None  # a field of the records: scores for each of its values, too
    out: PathArg | None = None  # folder for predictions, scores and the report; default: none
    compare: PathArg | None = None  # another model, or an adapter of this one, on the same records
    logprob: bool = False  # each answer's mean log probability, too; one more pass over the data
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the weights
    quantize: str | None = None  # the decoder to int8, int4, hqq8 … hqq1, nf4, fp4 or w8a8
    device: str = "auto"  # cpu, cuda, cuda:N
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # default: what the checkpoint says
    template: str | None = None  # chat template; default: the checkpoint's
    exif: bool = False  # turn images as their orientation tag says
    seed: Seed = 0  # of the intervals' resampling

    def __post_init__(self):
        if self.data is None:
            raise UserError("--data: not given; give a file of records with answers")
        if self.logprob and self.out is None:
            raise UserError("--logprob: is written into predictions.jsonl only; give --out, too")


@dataclass
class Answers:
    """The answers of one model and what they are worth; with --compare there are two."""

    rows: list[dict]
    settings: dict
    measured: Any = None  # score.Measured
    scores: dict[str, dict] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.settings["adapter"] or self.settings["model"]


def main(argv: list[str]) -> int | None:
    args = parse(EvalConfig, argv, "Answer a file of questions and score the answers.")

    from llava_min.data.records import count_records
    from llava_min.evaluation.metrics import find
    from llava_min.evaluation.show import show_all
    from llava_min.parallel.ranks import start

    with flags(args), ExitStack() as stack:  # closes the ranks' group and the locked files
        # ---- what is asked; everything that can be wrong is found before weights are read
        benchmark = apply_benchmark(args)
        find(args.metrics)
        world = stack.enter_context(start(args.device))
        records = read_questions(args, benchmark)
        out = Path(args.out) if args.out else None
        check_no_comparison(out, args.compare)
        models = [(args.model, args.adapter)]
        if args.compare:
            models.append(compared_model(args))
        checkpoints = [check_model(args, records, *model) for model in models]
        if world.rank == 0:
            info(f"{args.data}: {count_records(records)}")

        # ---- the answers
        folders = (out, out / "compare") if out else (None, None)
        sides = [
            # popped: the first model is freed before the second is loaded
            answer(args, records, world, folder, *model, checkpoints.pop(0), stack)
            for folder, model in zip(folders, models)
        ]
        if world.rank:
            return None

        # ---- their scores
        for side in sides:
            score(side, args, records)
        base, tuned, change = None, sides[0], None
        if args.compare:
            base, tuned = sides
            if args.adapter and not tuned.settings["adapter"]:
                base, tuned = tuned, base  # the side with the adapter is the tuned one
            change = compare(base, tuned, args, records)

        # ---- the files, then the tables: printing fails if nobody reads the pipe
        if out:
            write_files(out, folders, sides, change)
            write_report(out / "report.html", records, tuned, base, change)
        show_all(sides, base, tuned, change)
        if out:
            info(f"wrote {out}")
        check_all_scored(find(args.metrics), [side.measured.statistics for side in sides], out)
    return None


# ---- what is asked


def apply_benchmark(args: EvalConfig) -> Any:
    """Fill in what the flags leave open, from the benchmark and then from the defaults."""
    from llava_min.evaluation.benchmarks import read_benchmark

    benchmark = read_benchmark(args.benchmark) if args.benchmark else None
    for name in ("metrics", "template", "image_aspect_ratio", "max_new_tokens"):
        if benchmark and getattr(args, name) is None:
            setattr(args, name, getattr(benchmark, name))
    args.metrics = tuple(args.metrics or ("exact_match",))
    args.max_new_tokens = args.max_new_tokens or 128
    return benchmark


def read_questions(args: EvalConfig, benchmark: Any) -> list:
    """The records to answer; UserError unless some have a right answer, and a value of --by."""
    from llava_min.data.records import read_records
    from llava_min.evaluation.benchmarks import benchmark_records
    from llava_min.evaluation.predict import references

    if benchmark:
        records = benchmark_records(benchmark, args.data, args.image_folder)
    else:
        records = read_records(args.data, args.image_folder)
    right_answers = [references(record) for record in records]
    check_questions(right_answers, [record.extra for record in records], args.by)
    return records


def compared_model(args: EvalConfig) -> tuple[str, str | None]:
    """Model and adapter that --compare names."""
    if os.path.isfile(Path(args.compare, "adapter_config.json")):
        return args.model, args.compare
    return args.compare, None


def check_model(args: EvalConfig, records: list, source: str, adapter: str | None) -> Any:
    """The Checkpoint of a model, its adapter and the room for answers checked: the first model may
    answer for hours, so what is wrong with the second is found before.
    """
    from llava_min.adapter import read_adapter
    from llava_min.evaluation.predict import check_room
    from llava_min.load import open_checkpoint

    given = {"image_aspect_ratio": args.image_aspect_ratio, "template": args.template}
    with flags(args, source="model" if source == args.model else "compare"):
        checkpoint = open_checkpoint(source, adapter=adapter, **given)
    if adapter:
        read_adapter(checkpoint.model, Path(adapter))
    if args.quantize is not None:
        checkpoint.quantize(args.quantize)
    check_room(checkpoint.model, checkpoint.processor, records, args.max_new_tokens)
    return checkpoint


# ---- the answers


def answer(
    args: EvalConfig,
    records: list,
    world: Any,
    folder: Path | None,
    source: str,
    adapter: str | None,
    checkpoint: Any,
    stack: ExitStack,
) -> Answers:
    """The answers of one model, continuing those in `folder`, which stays locked until `stack`
    closes.
    """
    from llava_min.evaluation.answers import append_rows, make_folder, open_answers
    from llava_min.evaluation.predict import predict
    from llava_min.evaluation.settings import settings_of_files, settings_of_model

    options = {
        name: getattr(args, name) for name in ("num_beams", "max_new_tokens", "exif", "logprob")
    }
    settings = settings_of_files(args, source, adapter, options)
    if folder and world.rank == 0:
        make_folder(folder, settings, stack)
    model, processor = checkpoint.load(args.dtype, world.device)
    settings |= settings_of_model(args, model, processor, records[0], world.size)

    # what an earlier run answered is kept; new rows are appended as they come
    done, save = {}, lambda rows: None
    if folder:
        file, done = open_answers(folder, settings, records, world, stack)
        save = lambda rows: append_rows(file, folder, rows)
        if done and world.rank == 0:
            info(f"{folder}: continues after {len(done)} of {len(records)} answers")
    name = f"{adapter or source}: " if args.compare else ""
    progress = lambda line: world.rank or info(name + line)
    ask = lambda records, batch_size, **more: predict(
        model, processor, records, batch_size, **options, **more
    )
    rows = ask(records, args.batch_size, progress=progress, world=world, done=done, save=save)

    # in half precision the order of a sum, and so the batch, can change a token: say how often
    if settings["dtype"] == "float32":
        said = "fp32: the answers do not depend on the batch size or the number of ranks"
        settings["checked"] = said
    elif args.batch_size * world.size > 1:
        few = [i for i, row in enumerate(rows) if "error" not in row][:NUM_CHECKED]
        alone = ask([records[i] for i in few], 1)
        same = sum(row["prediction"] == rows[i]["prediction"] for i, row in zip(few, alone))
        said = f"{settings['dtype']}: {same} of {len(few)} answers are the same one at a time"
        settings["checked"] = said
    return Answers(rows, settings)


# ---- their scores


def score(side: Answers, args: EvalConfig, records: list) -> None:
    """Score every row; then all rows together, and the rows of each value of --by."""
    from llava_min.evaluation.score import cut_answers, measure_all, remarks, table

    side.measured = measure_all(side.rows, args.metrics)
    side.scores = each_group(args, records, lambda *rows: table(side.measured, args.seed, *rows))
    other = f", with another {label('out')}" if args.out else ""
    cut = [line + other for line in cut_answers(side.rows, args.max_new_tokens)]
    side.settings["remarks"] = remarks(side.rows) + cut


def compare(base: Answers, tuned: Answers, args: EvalConfig, records: list) -> dict[str, dict]:
    """The change of every score from base to tuned, and within each value of --by."""
    from llava_min.evaluation.score import difference

    change = lambda *rows: difference(base.measured, tuned.measured, args.seed, *rows)
    return each_group(args, records, change)


def each_group(args: EvalConfig, records: list, compute: Callable) -> dict[str, dict]:
    """compute() as it is, and compute(indices) of each value of --by under `metric value`."""
    out = compute()
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records if args.by else ()):
        groups.setdefault(str(record.extra.get(args.by)), []).append(i)
    for value, indices in sorted(groups.items()):
        out |= {f"{name} {value}": m for name, m in compute(indices).items()}
    return out


# ---- the files


def write_files(out: Path, folders: tuple, sides: list[Answers], change: dict | None) -> None:
    """metrics.json has the scores of --model, compare.json the change of all scores."""
    from llava_min.evaluation.answers import write_answers, write_json_lines, writing

    with writing(out):
        for folder, side in zip(folders, sides):
            write_answers(folder, side.rows, side.settings)
        write_json_lines(out / "metrics.json", [sides[0].scores], indent=2)
        if change is not None:
            write_json_lines(out / "compare.json", [change], indent=2)


def write_report(
    path: Path, records: list, tuned: Answers, base: Answers | None, change: dict | None
) -> None:
    from llava_min.report import rows_to_show, write_eval_report

    rows = rows_to_show(records, tuned.rows, base.rows if base else None)
    compared = base and {"name": base.name, "table": base.scores, "difference": change}
    write_eval_report(path, rows, tuned.scores, tuned.settings, compared)


if __name__ == "__main__":
    run(main)
