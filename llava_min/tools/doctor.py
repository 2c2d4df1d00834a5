"""`python -m llava_min doctor INPUT`: what in a training run, script or adapter is not as it seems.

An input is recognised by what it is: a recipe (a name or a .toml), a `train.py` command in quotes,
a launch script of LLaVA or of transformers, a JSON or TOML file with keywords of TrainingArguments,
SFTConfig, LoraConfig and BitsAndBytesConfig, an adapter folder, or a model folder for how it
prepares images. Nothing is executed, and nothing is loaded. The exit code is 0 whatever is found,
because findings are the answer; with --strict it is 1 if one of them is an error.
"""

import textwrap
from dataclasses import dataclass, field

from llava_min.checks.doctor.facts import DIALECTS, TRL, Finding, Run
from llava_min.checks.doctor.files import read_input
from llava_min.checks.doctor.rules import SEVERITIES, compare, examine
from llava_min.checks.doctor.translate import Translation, unresolved
from llava_min.errors import UserError, escape_controls, shorten
from llava_min.util.cli import parse

WIDTH = 80


@dataclass
class Config:
    inputs: list[str] = field(default_factory=list)  # recipe, "train.py …", script, file, folder
    strict: bool = False  # exit code 1 if there is an error


def say(text: str, first: str = "", indent: str = "") -> None:
    """`text` in lines of at most WIDTH, free of what could drive a terminal."""
    for line in textwrap.wrap(
        escape_controls(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
    ) or [first]:
        print(line)


def say_finding(f: Finding) -> None:
    say(f"{f.severity}: {f.rule} ({f.at.where})")
    for head, text in (("found", shorten(f.what, 400)), ("why", f.why), ("change", f.fix)):
        say(text, f"  {head:8}", " " * 10)
    print()


def summary(run: Run) -> str:
    """What the run does, as far as the input says."""
    parts = []
    if run.trains and not run.adapter:
        parts.append(
            {"lora": "LoRA", "projector": "the projector alone", "full": "full tuning"}[run.trains]
        )
    rows, accumulated = run.written("batch_size"), run["grad_accum"]
    if rows and run.kind != "hf" or run.rows:
        gpus = f"{run.gpus} GPUs = {run.rows} rows a step" if run.rows else "GPUs (not said)"
        parts.append(f"{run.value('batch_size')} rows x {accumulated.value} accumulated x {gpus}")
    return "; ".join(parts)


def unread(run: Run, findings: list[Finding]) -> list[str]:
    """Settings with a value that no rule reads."""
    spoken_of = [f.at for f in findings]
    known = {name for key in DIALECTS[run.kind].values() for name in key.names} | TRL
    return [
        name
        for name, setting in run.settings.items()
        if name not in known
        and setting not in spoken_of
        and not name.startswith("bnb_4bit_")
        and setting.value not in (None, False, [], "")
    ]


def say_translation(run: Run) -> None:
    """The same run with train.py, and what of the script is not in it."""
    t = Translation(run)
    print("The same run here:\n")
    for line in t.lines(WIDTH - 4):
        print("  " + escape_controls(line))
    print()
    for text in t.first:
        say(text + ".", "  before: ", " " * 10)
    if run.rows is None:
        say(
            f"the script does not say how many GPUs; {t.guess()} make the published rows a step.",
            "  note:   ",
            " " * 10,
        )
    if t.left_out:
        print(("\n" if t.first or run.rows is None else "") + "Not in it:\n")
    for written, reason in t.left_out:
        say(f"{shorten(written, 200)}: {reason}", "  ", "      ")
    print()


def examine_inputs(inputs: list[str]) -> list[Finding]:
    """Print all that there is to say on `inputs`; the findings."""
    runs = [run for given in inputs for run in read_input(given)]
    found: list[Finding] = []
    for run in runs:
        say(f"{run.source}: {run.what}" + (f" ({text})" if (text := summary(run)) else ""))
        print()
        if names := unresolved(run):
            say("not set in it, so no rule reads it: " + ", ".join(names))
            print()
        findings = examine(run)
        for finding in findings:
            say_finding(finding)
        found += findings
        if run.kind == "llava":
            say_translation(run)
        elif run.kind == "hf" and (names := unread(run, findings)):
            say("read by no rule: " + ", ".join(map(shorten, names)))
            print()
    if together := compare(runs):
        print("The inputs together:\n")
        for finding in together:
            say_finding(finding)
    return found + together


def main(argv: list[str]) -> int:
    config = parse(
        Config, argv, "Say what in a training run may not be as it is meant.", positional="inputs"
    )
    if not config.inputs:
        raise UserError("INPUT: give a recipe, a script, a file of settings or an adapter folder")
    found = examine_inputs(config.inputs)
    counts = {severity: sum(f.severity == severity for f in found) for severity in SEVERITIES}
    print(", ".join(f"{n} {severity}{'' if n == 1 else 's'}" for severity, n in counts.items()))
    return 1 if config.strict and counts["error"] else 0
