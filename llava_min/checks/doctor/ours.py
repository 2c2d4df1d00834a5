"""Rules on what stops at once: names, types and values of train.py's settings, of adapters, and of
the numbers in anybody's.

What is possible is said by train.py's own dataclass and by its checks, so nothing is listed twice.
"""

import typing
from collections.abc import Iterator
from typing import Any

from llava_min.checks import config
from llava_min.checks.doctor.facts import DIALECTS, Finding, Findings, Run, Setting
from llava_min.checks.ranges import MAX_FLOAT, check_number, not_none, range_of
from llava_min.checks.settings import check_settings
from llava_min.errors import UserError, shorten
from llava_min.util.cli import convert, flag_of, flags, guess
from llava_min.util.train_script import train_settings


def is_read(run: Run) -> bool:
    """A recipe or a command; the settings of a run have been through train.py."""
    return run.kind == "train.py" and run.what != "the settings of a run"


def kinds() -> dict[str, Any]:
    return typing.get_type_hints(train_settings(), include_extras=True)


def names(run: Run) -> Iterator[tuple[str, Setting, Any]]:
    """(name, setting, its annotation, None for a name that train.py does not have)."""
    known = kinds()
    for name, at in run.settings.items() if is_read(run) else ():
        kind, spelled = known.get(name), at.text.partition(" ")[0]
        is_switch = not_none(kind) is bool
        if at.given is not None and "$" not in name:
            wanted = {flag_of(name)} | ({flag_of(f"no_{name}")} if is_switch else set())
            kind = kind if spelled in wanted else None
        if "$" not in name:
            yield name, at, kind


def unknown_setting(run: Run) -> Findings:
    """train.py stops at a name that it does not have."""
    for name, at, kind in names(run):
        if kind is None:
            shown = flag_of if at.given is not None else str
            known = {shown(n) for n in kinds()}
            near = shown(same_elsewhere(name) or name)
            fix = f"did you mean {near}?" if near in known else guess(shown(name), known, "")
            yield Finding(
                "error",
                at,
                f"{at.text}: train.py has no such setting",
                fix or "leave it out; python train.py --help lists what there is",
            )


def same_elsewhere(name: str) -> str | None:
    """train.py's name of what LLaVA or transformers call `name`."""
    facts = {f for dialect in ("llava", "hf") for f, k in DIALECTS[dialect].items() if name in k[0]}
    ours = [DIALECTS["train.py"][fact].names[0] for fact in facts & DIALECTS["train.py"].keys()]
    return ours[0] if ours else None


def read(at: Setting, name: str, kind: Any) -> Any:
    """The value as train.py reads it, or UserError."""
    flag = flag_of(name)
    if at.given is None:
        return convert(flag, kind, at.value)
    if not_none(kind) is bool:
        if at.given:
            raise UserError(f"{flag}: a switch takes no value; leave {at.given[0]} out")
        return at.value
    if len(at.given) != 1:
        came = f"{len(at.given)} values came" if at.given else "its value is missing"
        raise UserError(f"{flag}: {came}; give one")
    return convert(flag, kind, at.given[0])


def is_open(at: Setting) -> bool:
    """Whether a shell variable is in it that nothing sets."""
    return at.given is not None and any("$" in word for word in at.given)


def bad_value(run: Run) -> Findings:
    """train.py stops: a setting has a type and a range."""
    for name, at, kind in names(run):
        if kind is None or is_open(at):
            continue
        try:
            read(at, name, kind)
        except UserError as e:
            what, _, fix = str(e).removeprefix(f"{flag_of(name)}: ").rpartition("; ")
            default = getattr(train_settings(), name, None)
            if fix == "give one" and not_none(kind) is not bool and default is not None:
                shown = flag_of(name) + " " if at.given is not None else f"{name} = "
                fix = f"give one, such as {shown}{default}"
            yield Finding("error", at, f"{at.text}: {what}", fix)


def contradiction(run: Run) -> Findings:
    """train.py stops at settings that exclude each other, and at a flag that would be ignored."""
    found = list(names(run))
    if not found or any(kind is None or is_open(at) for _, at, kind in found):
        return
    typed = [name for name, at, _ in found if at.given is not None]
    try:
        values = {name: read(at, name, kind) for name, at, kind in found}
    except UserError:  # bad_value's
        return
    if "data" in typed:  # the companions of a recipe's data do not fit another file
        values = {
            name: value
            for name, value in values.items()
            if name in typed or name not in ("image_folder", "eval_data")
        }
    config = train_settings()(**values)
    config.dry_run = config.dry_run or not typed  # a recipe may leave the data open
    try:
        with flags(config):
            check_settings(config, [flag_of(name) for name in typed])
    except UserError as e:
        at = run.settings.get(e.field or "", found[0][1])
        what, _, fix = str(e).rpartition("; ")
        yield Finding("error", at, what, fix)


SHARED = (
    "lr",
    "r",
    "alpha",
    "batch_size",
    "grad_accum",
    "max_length",
)  # of train.py's range in all tools
SHAPES = {
    name: rule
    for table in (config.VISION, config.TEXT, config.LLAVA, config.ORIGINAL)
    for name, rule in table.items()
    if isinstance(rule, config.Range) and rule.kind is not bool
}


def expected_number(run: Run, name: str, value: Any) -> str:
    """What the setting `name` may be, if `value` is a number that it cannot be; else ""."""
    fact = next((f for f in SHARED if name in DIALECTS[run.kind][f].names), None)
    if fact and isinstance(value, str):  # a flag's
        try:
            value = float(value)
        except ValueError:
            return ""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return ""
    if fact:
        kind = not_none(kinds()[DIALECTS["train.py"][fact].names[0]])
        try:
            check_number(value, kind, name)
        except UserError:
            base, allowed = range_of(kind)
            return allowed.expected(base, value)
        return ""
    rule = SHAPES.get(name) or config.Range(float, -MAX_FLOAT, MAX_FLOAT)
    if (rule.kind is float or isinstance(value, int)) and rule.low <= value <= rule.high:
        return ""
    noun = "a number" if rule.kind is float else "an integer"
    return f"{noun} from {rule.low:.13g} to {rule.high:.13g}"


def impossible_number(run: Run) -> Findings:
    """It cannot be meant: a program stops at it, or computes NaN."""
    from_peft = ("r", "lora_alpha") if run.adapter == "peft" else ()  # adapter_broken's
    for name, at in run.entries or run.settings.items() if not is_read(run) else ():
        for value in at.value if isinstance(at.value, list) else [at.value]:
            if name not in from_peft and (expected := expected_number(run, name, value)):
                yield Finding("error", at, at.text, expected)
                break


def adapter_broken(run: Run) -> Findings:
    """No program loads it: peft needs r and target_modules, of these types (peft.LoraConfig)."""
    if run.adapter != "peft":
        return
    from llava_min.checks.adapter import RULES, is_possible  # and torch

    for name, (_, expected) in RULES.items():
        at = run.settings.get(name)
        if at is None and name in ("r", "target_modules"):
            missing = Setting(None, run.source, f"{name} is missing")
            yield Finding("error", missing, missing.text, f"{name} = {expected}")
        elif at is not None and not is_possible(name, at.value):
            yield Finding("error", at, at.text, f"{name} = {expected}")


def adapter_unread(run: Run) -> Findings:
    """PEFT has more kinds of adapters than llava_min loads: merge such a one into its base with
    peft first."""
    if run.adapter != "peft":
        return
    from llava_min.checks.adapter import NEUTRAL, NOT_GIVEN

    for name, neutral in NEUTRAL.items():
        at = run.settings.get(name)
        if at is not None and at.value not in (*NOT_GIVEN, *neutral):
            values = ", ".join(str(value) for value in neutral[:2])
            yield Finding("warning", at, shorten(at.text, 200), f"{name} = {values}")


RULES = (
    unknown_setting,
    bad_value,
    contradiction,
    impossible_number,
    adapter_broken,
    adapter_unread,
)
