"""Rules on what a run leaves behind, who looks at it, and whether its flags reach it."""

from llava_min.checks.doctor.facts import Finding, Findings, Run, as_list
from llava_min.checks.doctor.lora import fits

PROJECTOR = [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]


def has_projector(names: list[str] | None) -> bool:
    return any("projector" in name for name in names or ())


def projector_lost(run: Run) -> Findings:
    """The projector was trained with the adapter. Without its tensors the base's is used, and
    answers are garbled (lmms-finetune#53, LLaVA#729, LLaVA#1377, LLaVA-NeXT#253)."""
    saved = run.written("saved_modules")
    if run.adapter == "llava" and "non_lora_trainables.bin" not in run.files:
        at = run["model"] or run["r"]
        yield Finding(
            "error",
            at,
            "an adapter of LLaVA's without non_lora_trainables.bin",
            "put the file beside it, from the end of the same run",
        )
    if (
        run.adapter == "peft"
        and saved
        and has_projector(as_list(saved.value))
        and run.tensors is not None
        and not has_projector(run.tensors)
    ):
        yield Finding(
            "error",
            saved,
            f"{saved.text}, and no tensor of it in the weights",
            "save the adapter again with save_pretrained",
        )


def projector_frozen(run: Run) -> Findings:
    """LLaVA trains its projector beside LoRA, at 2e-5. Where it is not among modules_to_save it
    stays the base's."""
    saved, targets = run["saved_modules"], run["targets"]
    if (
        run.kind == "hf"
        and run.adapter != "llava"
        and targets
        and not has_projector(run.tensors)
        and not has_projector(as_list(saved.value))
        and not any(fits(targets.value, path) for path in PROJECTOR)
    ):
        yield Finding(
            "note",
            saved,
            saved.text,
            'modules_to_save = ["multi_modal_projector"], if it is to learn',
        )


def projector_in_no_checkpoint(run: Run) -> Findings:
    """LLaVA writes the projector (non_lora_trainables.bin) at the end of a run alone: its
    checkpoint-* folders lack it, and a resume with LoRA fails (lmms-finetune#53, LLaVA#1200)."""
    save, steps = run["save"], run.number("save_steps") or 0
    if (
        run.kind == "llava"
        and run.trains == "lora"
        and (save.value == "epoch" or save.value == "steps" and 1 <= steps < 5000)
    ):
        at = save if save.value == "epoch" else run["save_steps"]
        yield Finding(
            "warning", at, at.text, "let the run end; in train.py each checkpoint is whole"
        )


def no_way_back(run: Run) -> Findings:
    """Optimizer, schedule and random state are not saved, so no run goes on from a checkpoint
    (LLaVA#1200, LLaVA#1437)."""
    only, resume = run["save_only_model"], run["resume"]
    if only and only.value is True:
        wanted = resume.value not in (None, False, "never")
        yield Finding(
            "error" if wanted else "note",
            only,
            only.text + (f", and {resume.text}" if wanted else ""),
            "--no-save-only-model" if run.kind == "train.py" else "save_only_model = false",
        )


def best_model(run: Run) -> Findings:
    """transformers stops: for the best checkpoint there must be one at each evaluation."""
    best, save, look = run.written("best"), run["save"], run["eval"]
    if not best or best.value is not True:
        return
    steps, every = run.number("save_steps"), run.number("eval_steps")
    if save.value not in (look.value, "best"):
        yield Finding(
            "error", best, f"{best.text}, {save.text}, {look.text}", f"eval_strategy = {save.value}"
        )
    elif save.value == "steps" and steps and every and every >= 1 and steps % every:
        at = run["save_steps"]
        yield Finding(
            "error",
            at,
            f"{best.text}, {at.text}, {run['eval_steps'].text}",
            f"save_steps = {int(every)}",
        )


def nobody_looks(run: Run) -> Findings:
    """Nothing tells when it begins to learn by heart, or what it writes: there is no held-out data
    (LLaVA#1017, LLaVA#1536, LLaVA#1717)."""
    look, trains = (
        run["eval"],
        {"output_dir", "num_train_epochs", "max_steps"} & run.settings.keys(),
    )
    if run.kind == "train.py":
        if not run.value("eval_data") and not run.text("data").startswith("toy:"):
            yield Finding(
                "note", run["eval_data"], run["eval_data"].text, "--eval-data held_out.json"
            )
    elif look.value in ("no", False) and (run.kind == "llava" or trains):
        yield Finding(
            "note",
            look,
            look.text,
            "train.py --eval-data held_out.json"
            if run.kind == "llava"
            else 'eval_strategy = "steps", with an eval_dataset',
        )


def no_data_to_look_at(run: Run) -> Findings:
    """LLaVA's trainer is given no eval_dataset, so the Trainer stops at the first evaluation
    (LLaVA#1017)."""
    look = run.written("eval")
    if run.kind == "llava" and look and look.value in ("steps", "epoch"):
        yield Finding(
            "error", look, look.text, "--evaluation_strategy no; train.py has --eval-data"
        )


def all_kept(run: Run) -> Findings:
    """Every checkpoint stays on the disk; with the optimizer those of a full run are several times
    the model's size each."""
    keep, steps, most = run["keep"], run.number("save_steps"), run.number("max_steps")
    if (
        keep
        and keep.value is None
        and steps
        and most
        and steps >= 1
        and most / steps >= 10
        and run.value("save") == "steps"
    ):
        yield Finding(
            "note", keep, f"{keep.text}: {int(most / steps)} checkpoints", "save_total_limit = 2"
        )


def command_cut(run: Run) -> Findings:
    """A comment within a continued command ends it, as does a blank behind the backslash. What
    follows does not reach the program, which then takes its defaults."""
    if run.stray:
        names = [setting.text.split()[0] for setting in run.stray]
        yield Finding(
            "error",
            run.stray[0],
            "the command ends before "
            + ", ".join(names[:5])
            + (f" and {len(names) - 5} more" if len(names) > 5 else ""),
            "take comments out of the command; let each line end in its backslash",
        )


def written_twice(run: Run) -> Findings:
    """One of them counts: of flags the last, of a file of settings the first is read here. train.py
    stops at a flag that is given twice."""
    for lost, used in run.repeated:
        ours = run.kind == "train.py" and used.given is not None
        yield Finding(
            "error" if ours else "warning",
            lost,
            f"{lost.text}, and {used.text}" + ("" if ours else ", which counts"),
            "keep one",
        )


RULES = (
    projector_lost,
    projector_frozen,
    projector_in_no_checkpoint,
    no_way_back,
    best_model,
    nobody_looks,
    no_data_to_look_at,
    all_kept,
    command_cut,
    written_twice,
)
