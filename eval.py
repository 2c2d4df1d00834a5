"""Evaluate a LLaVA by what it writes: answers for a file of questions, then metrics on the answers.

    python eval.py --model tiny --data toy/val.json
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_min.cli import Count, Seed, UserError, note, parse, printable, run


@dataclass
class Knobs:
    model: str = "tiny"  # a folder, a hub id, or tiny
    adapter: str | None = None  # a PEFT folder, applied unmerged
    data: str | None = None  # LLaVA JSON or JSONL with the right answers
    image_folder: str | None = None  # where the pictures lie; the data file's own folder if not given
    metrics: tuple[str, ...] = ("exact_match",)  # names, with commas between
    batch_size: Count = 8  # rows generated at a time; the answers do not depend on it
    num_beams: Count = 1  # 1 is greedy
    max_new_tokens: Count = 128  # tokens of an answer
    by: str | None = None  # a field of the records (kind, in the toy questions): scores for each of its values too
    out: str | None = None  # folder for predictions.jsonl and metrics.json; none is written if not given
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the weights
    device: str = "auto"  # cpu, cuda, cuda:N
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # what the checkpoint records if not given
    template: str | None = None  # chat template; the checkpoint's if not given
    exif: bool = False  # turn pictures as their orientation tag says
    seed: Seed = 0  # of the intervals' resampling

    def __post_init__(self):
        if self.data is None:
            raise UserError("--data: not given; give a LLaVA JSON file with answers")


def main(argv: list[str]) -> int | None:
    knobs = parse(Knobs, argv, "Answer a file of questions and score the answers.")

    from llava_min.data.dataset import read_records
    from llava_min.evaluate import predict, score
    from llava_min.files import new_folder, write_json
    from llava_min.load import load
    from llava_min.metrics import METRICS

    if unknown := [name for name in knobs.metrics if name not in METRICS]:
        raise UserError(f"--metrics: {unknown[0]!r} is not one of {', '.join(METRICS)}; choose among them")
    records = read_records(knobs.data, knobs.image_folder)
    model, processor = load(knobs.model, dtype=knobs.dtype, device=knobs.device, adapter=knobs.adapter,
                            image_aspect_ratio=knobs.image_aspect_ratio, template=knobs.template)
    rows = predict(model, processor, records, knobs.batch_size, exif=knobs.exif, progress=note,
                   num_beams=knobs.num_beams, max_new_tokens=knobs.max_new_tokens)
    table = score(rows, knobs.metrics, knobs.seed)
    if knobs.by:
        groups: dict[str, list[dict]] = {}
        for record, row in zip(records, rows, strict=True):
            groups.setdefault(str(record.extra.get(knobs.by)), []).append(row)
        for value, members in sorted(groups.items()):
            table |= {f"{name} {value}": m for name, m in score(members, knobs.metrics, knobs.seed).items()}
    print(f"{'metric':<28}{'score':>8}{'95 % interval':>20}{'n':>8}")
    for name, m in table.items():
        interval = f"{m['low']:.3f} to {m['high']:.3f}"
        print(f"{printable(name):<28}{m['score']:>8.3f}{interval:>20}{m['n']:>8}")
    if knobs.out:
        with new_folder(Path(knobs.out)) as folder:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
            write_json(folder / "metrics.json", table)


if __name__ == "__main__":
    run(main)
