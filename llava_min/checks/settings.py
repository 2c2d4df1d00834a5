"""Which of train.py's settings fit together: contradictions, and settings that would be ignored.

An unused setting is an error only if it was typed: a recipe may contain settings that an override
makes irrelevant.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_min.checks.regex import is_quick, is_regex
from llava_min.errors import UserError, label, shorten
from llava_min.util.files import read_json

# How the same numbers are computed and shown: a resumed run may change these settings, and a
# finished run may be repeated with other values of them.
EXECUTION = set(
    """batch_size auto_batch_size grad_accum gradient_checkpointing compile cpu_offload workers
    deterministic device timeout save_every keep log_every log""".split()
)
# What else a resumed run may change: where things lie, and its evaluation. All others are part of
# the run's identity.
MAY_CHANGE = EXECUTION | set(
    """recipe model data toy_train toy_val image_folder eval_data out resume max_skips
    save_only_model eval_every eval_batch_size early_stopping max_new_tokens num_beams samples
    dry_run""".split()
)


class Rule(NamedTuple):
    """A setting that is wrong by itself or beside another: {value} is its value, {lr} a label."""

    field: str
    is_broken: Callable[[Any], bool]
    message: str


class Need(NamedTuple):
    """Settings that have no effect unless `is_met`; `what` names what they need."""

    fields: str
    is_met: Callable[[Any], bool]
    what: str


def is_toy(data: object) -> bool:
    return str(data).startswith("toy:")


def is_unknown_task(config: Any) -> bool:
    return is_toy(config.data) and config.data not in toy_tasks()


def toy_tasks() -> list[str]:
    from llava_min.toy.draw import TASKS  # and Pillow, which --help need not wait for

    return [f"toy:{task}" for task in TASKS]


def bad_betas(config: Any) -> bool:
    return len(config.betas) != 2 or max(config.betas) >= 1


def bad_targets(config: Any) -> bool:
    """A LoRA target that is no regex, or one that may take for ever."""
    is_safe = lambda target: is_regex(target) and is_quick(target, 2, 1 << 17)
    return config.train == "lora" and not all(map(is_safe, config.lora_targets))


def bad_interval(config: Any) -> bool:
    return not re.fullmatch(r"\d{1,9}|[1-9]\d{0,6}m|epoch", config.save_every)


def saves(config: Any) -> bool:
    return config.save_every != "0"


def trains_projector(config: Any) -> bool:
    if config.train_projector is None:
        return not config.train.startswith("last")
    return config.train_projector


def may_train_vision(config: Any) -> bool:
    """The whole tower is trained, or LoRA's targets are a regex, which may match its layers."""
    if config.train == "lora" and any(re.search(r"[.*|]", t) for t in config.lora_targets):
        return True
    return config.train == "full" if config.train_vision is None else config.train_vision


RULES = (
    Rule(
        "data",
        lambda c: c.data is None and not c.dry_run,
        "not given; give a LLaVA JSON file, or {recipe} toy",
    ),
    Rule("data", is_unknown_task, "{value}: no such toy task; there are {tasks}"),
    Rule("betas", bad_betas, "{value} is not two numbers below 1; give for example 0.9,0.999"),
    Rule(
        "save_every",
        bad_interval,
        "{value} is not a number of steps, minutes like 30m, or epoch; give one",
    ),
    Rule(
        "lora_targets",
        bad_targets,
        "{value} is not names or a regex with at most two repetitions, none of a group; write the "
        "layers out, with | between them",
    ),
    Rule(
        "lora_dropout",
        lambda c: c.lora_dropout == 1,
        "1 leaves LoRA nothing to learn from; give less",
    ),
    Rule(
        "group_by_length",
        lambda c: c.group_by_length and c.packing,
        "with {packing} there is no padding to save; choose one of them",
    ),
    Rule(
        "best_metric",
        lambda c: c.best_metric and not saves(c),
        "keeps a checkpoint, and {save_every} 0 allows none; give another",
    ),
)

NEEDS = (
    Need(
        "lora_r lora_alpha lora_dropout lora_targets dora rslora quantize",
        lambda c: c.train == "lora",
        "{train} lora",
    ),
    Need("toy_train toy_val", lambda c: is_toy(c.data), "{data} toy:TASK"),
    Need(
        "image_folder eval_data",
        lambda c: not is_toy(c.data),
        "{data} FILE (a toy draws its own)",
    ),
    Need(
        "best_metric early_stopping eval_every eval_batch_size eval_metrics num_beams "
        "max_new_tokens samples",
        lambda c: is_toy(c.data) or c.eval_data,
        "{eval_data}",
    ),
    Need("best_metric", lambda c: c.eval_every, "{eval_every}"),
    Need("early_stopping", lambda c: c.best_metric, "{best_metric}"),
    Need("projector_lr", trains_projector, "{train_projector}"),
    Need("vision_lr", may_train_vision, "{train_vision}"),
    Need("keep save_only_model", saves, "{save_every} other than 0"),
)


def check_settings(config: Any, argv: Sequence[str]) -> None:
    """Raises UserError for what RULES and NEEDS forbid.

    config: train.py's TrainConfig. argv: what of it was typed.
    """
    labels = {name: label(name) for name in vars(config)}
    for field, is_broken, message in RULES:
        if is_broken(config):
            value = getattr(config, field)
            shown = shorten(",".join(map(str, value)) if isinstance(value, tuple) else value, 200)
            tasks = ", ".join(toy_tasks())
            raise UserError(message.format(value=shown, tasks=tasks, **labels), field)
    # these two decide with which weights a run ends, so a recipe's count as typed
    typed = typed_settings(argv) | {"best_metric", "early_stopping"}
    for fields, is_met, what in NEEDS:
        if is_met(config):
            continue
        for field in fields.split():
            if field in typed and getattr(config, field):
                raise UserError(
                    f"has no effect without {what.format(**labels)}; give that, or leave it out",
                    field,
                )


def typed_settings(argv: Sequence[str]) -> set[str]:
    """The fields that a command line sets."""
    return {a.partition("=")[0].lstrip("-").replace("-", "_") for a in argv if a.startswith("--")}


def check_device(config: Any, device: Any) -> None:
    if config.cpu_offload and device.type == "cpu":
        raise UserError(
            "the weights are in the CPU's memory anyway; leave it out, or give "
            f"{label('device')} cuda",
            "cpu_offload",
        )


# ---- against the run in the folder


def check_same_kind_of_data(folder: Path, config: Any) -> None:
    """A resumed run in `folder` draws toy data only if it was started with toy data."""
    if config.resume == "never" or not (folder / "config.json").exists():
        return
    was = read_json(folder / "config.json").get("data")
    if is_toy(was) != is_toy(config.data):
        raise UserError(
            f"{folder} was started with {label('data')} {shorten(was, 200)} and not "
            f"{shorten(config.data, 200)}; give the same command again, or another {label('out')}",
            "resume",
        )


def check_finished(folder: Path, config: Any, argv: Sequence[str], ranks: int) -> None:
    """Raises UserError if the finished run in `folder` is not what was typed: nothing of that would
    be done.
    """
    was, typed = read_json(folder / "config.json"), typed_settings(argv)
    rows = config.batch_size * config.grad_accum * ranks
    rows_then = was["batch_size"] * was["grad_accum"] * was["ranks"]
    if rows != rows_then and typed & {"batch_size", "grad_accum"}:
        raise UserError(
            f"{folder} is finished, with {rows_then} rows a step and not {rows}; give another "
            f"{label('out')}",
            "resume",
        )
    for name in sorted((typed & was.keys()) - {"out", "resume"} - EXECUTION):
        now = json.loads(json.dumps(getattr(config, name)))  # a tuple is a list in the file
        if now != was[name]:
            raise UserError(
                f"{folder} is finished, with {label(name)} {shorten(was[name], 200)} and not "
                f"{shorten(now, 200)}; give another {label('out')}",
                "resume",
            )
