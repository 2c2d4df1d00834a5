"""Which of train.py's settings go together: what contradicts itself or would be ignored is refused
before anything is read.

A setting that only a recipe makes may lie idle: who overrides the rest of the recipe cannot take it
out.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_min.checks.regex import is_quick, is_regex
from llava_min.errors import UserError, escape_controls
from llava_min.util.files import read_json

# What a resumed run may change, and a finished one may be asked for again with: how the same
# numbers are computed and shown.
HOW = set(
    """batch_size auto_batch_size grad_accum gradient_checkpointing compile cpu_offload workers
    deterministic device timeout save_every keep log_every log""".split()
)
# What else a resumed run may change: where things lie, and its evaluation. The rest must stay.
FREE = HOW | set(
    """recipe model data toy_train toy_val image_folder eval_data out resume max_skips
    save_only_model eval_every eval_batch_size early_stopping max_new_tokens num_beams samples
    dry_run""".split()
)


def names_of(argv: Sequence[str]) -> set[str]:
    return {a.partition("=")[0].lstrip("-").replace("-", "_") for a in argv if a.startswith("--")}


def check_begun(folder: Path, k: Any) -> None:
    """A run that goes on in `folder` is not to draw toy data into it, or to look for it, unless it
    has done so before.
    """
    toy = lambda data: str(data).startswith("toy:")
    if k.resume != "never" and (folder / "config.json").exists():
        was = read_json(folder / "config.json").get("data")
        if toy(was) != toy(k.data):
            raise UserError(
                f"--resume {escape_controls(k.resume)}: {folder} was started with --data "
                f"{escape_controls(was)[:200]} and not "
                f"{escape_controls(k.data)[:200]}; give the same command again, or "
                "another --out"
            )


def check_finished(folder: Path, k: Any, argv: Sequence[str], ranks: int) -> None:
    """A run that has come to its end in `folder` is what was typed, or UserError: nothing of it
    would be done.
    """
    was, typed = read_json(folder / "config.json"), names_of(argv)
    rows, then = (
        k.batch_size * k.grad_accum * ranks,
        was["batch_size"] * was["grad_accum"] * was["ranks"],
    )
    if rows != then and typed & {"batch_size", "grad_accum"}:
        raise UserError(
            f"--resume {escape_controls(k.resume)}: {folder} is finished, with {then} rows a step "
            f"and not {rows}; give "
            "another --out"
        )
    for name in sorted((typed & was.keys()) - {"out", "resume"} - HOW):
        now = json.loads(json.dumps(getattr(k, name)))  # a tuple is a list in the file
        if now != was[name]:
            raise UserError(
                f"--resume {escape_controls(k.resume)}: {folder} is finished, with "
                f"--{name.replace('_', '-')} "
                f"{escape_controls(was[name])[:200]} and not "
                f"{escape_controls(now)[:200]}; give another --out"
            )


def check_settings(k: Any, argv: Sequence[str]) -> None:
    """`k`: train.py's knobs; `argv`: what of them was typed. Raises UserError."""
    from llava_min.toy.draw import TASKS  # and Pillow, which --help need not wait for

    toy, saved = (k.data or "").startswith("toy:"), k.save_every != "0"
    tasks = [f"toy:{task}" for task in TASKS]
    faults = {
        "--data: not given; give a LLaVA JSON file, or --recipe toy": k.data is None
        and not k.dry_run,
        f"--data {escape_controls(k.data)}: no such toy task; there are {', '.join(tasks)}": toy
        and k.data not in tasks,
        f"--betas: {k.betas} is not two numbers below 1; give for example 0.9,0.999": len(k.betas)
        != 2
        or max(k.betas) >= 1,
        f"--save-every: {escape_controls(k.save_every)} is not a number of steps, minutes like 30m, or epoch; give one": not re.fullmatch(
            r"\d{1,9}|[1-9]\d{0,6}m|epoch", k.save_every
        ),
        f"--lora-targets: {escape_controls(','.join(k.lora_targets))[:200]} is not names or a "
        "regex with at most two repetitions, none of a group; "
        "write the layers out, with | between them": k.train == "lora"
        and not all(is_regex(t) and is_quick(t, 2, 1 << 17) for t in k.lora_targets),
        "--lora-dropout: 1 leaves LoRA nothing to learn from; give less": k.lora_dropout == 1,
        "--group-by-length: with --packing there is no padding to save; choose one of them": k.group_by_length
        and k.packing,
        "--best-metric: keeps a checkpoint, and --save-every 0 allows none; give another": k.best_metric
        and not saved,
    }
    # a regex may name its layers
    in_tower = k.train == "lora" and any(re.search(r"[.*|]", t) for t in k.lora_targets)
    needs = {  # what gives the settings of a line a meaning, and whether it is there
        "--train lora": (
            k.train == "lora",
            "lora_r lora_alpha lora_dropout lora_targets dora rslora",
        ),
        "--data toy:TASK": (toy, "toy_train toy_val"),
        "--data FILE (a toy draws its own)": (not toy, "image_folder eval_data"),
        "--eval-data": (
            toy or k.eval_data,
            "best_metric early_stopping eval_every eval_batch_size eval_metrics num_beams "
            "max_new_tokens samples",
        ),
        "--eval-every": (k.eval_every, "best_metric"),
        "--best-metric": (k.best_metric, "early_stopping"),
        "--train-projector": (
            k.train_projector or k.train_projector is None and not k.train.startswith("last"),
            "projector_lr",
        ),
        "--train-vision": (
            k.train_vision or k.train_vision is None and k.train == "full" or in_tower,
            "vision_lr",
        ),
        "--save-every other than 0": (saved, "keep save_only_model"),
    }
    # a recipe's, too: they decide with which weights a run ends
    typed = names_of(argv) | {"best_metric", "early_stopping"}
    for need, (there, names) in needs.items():
        for name in names.split() if not there else ():
            line = f"--{name.replace('_', '-')}: has no effect without {need}; give that, or leave it out"
            faults[line] = name in typed and getattr(k, name)
    for line, true in faults.items():
        if true:
            raise UserError(line)
