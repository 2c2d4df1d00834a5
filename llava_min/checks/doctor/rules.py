"""The table of rules. A rule takes a run and yields findings; its name is what a report can quote.

A rule speaks of what is written, or of a default that the tool documents, which it then names.
"""

from collections.abc import Sequence
from dataclasses import replace

from llava_min.checks.doctor import data, lora, numbers, ours, saving
from llava_min.checks.doctor.facts import Finding, Findings, Run

RULES = [rule for page in (ours, lora, numbers, data, saving) for rule in page.RULES]
SEVERITIES = ("error", "warning", "note")


def images_differ(runs: Sequence[Run]) -> Findings:
    """A model that is tuned on padded images and served cropped ones, or the reverse, answers
    differently, most of all for wide and tall images (transformers#33175, LLaVA#1738)."""
    said = [run.aspect for run in runs if run.aspect and run.trains != "projector"]
    for aspect, setting in said[1:]:
        if aspect != said[0][0]:
            first = said[0][1]
            yield Finding(
                "error",
                setting,
                f"{setting.text} ({aspect}), and {first.text} at {first.where} ({said[0][0]})",
                "the same in training and in serving",
            )


def named(findings: Findings, rule) -> list[Finding]:
    """The findings of a rule with its name, and with its docstring for the reason."""
    why = " ".join((rule.__doc__ or "").split())
    return [replace(f, rule=rule.__name__.replace("_", "-"), why=why) for f in findings]


def gravest_first(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def examine(run: Run) -> list[Finding]:
    """What the rules find in one run."""
    return gravest_first([f for rule in RULES for f in named(rule(run), rule)])


def compare(runs: Sequence[Run]) -> list[Finding]:
    """What does not go together in inputs that are given together."""
    return named(images_differ(runs), images_differ)
