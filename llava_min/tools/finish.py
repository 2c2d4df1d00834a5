"""`python -m llava_min finish RUN OUT`: the adapter or model of any checkpoint of a run.

OUT is byte for byte what train.py writes at the end of a run, here as of an earlier step. RUN may
also be a single checkpoint. A checkpoint of a LoRA run has its adapter, which is copied. A model is
the base with the trained tensors in it, in memory once and as it will be stored. One process does
it, however many ranks the run had.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from llava_min.errors import UserError, info, label, shorten
from llava_min.util.cli import PathArg, convert, flags, parse

SETTINGS = {  # of the run, what decides how its model is built and stored
    "train": str,
    "train_projector": bool | None,
    "train_vision": bool | None,
    "precision": Literal["bf16", "fp16", "fp32"],
    "image_aspect_ratio": Literal["pad", "crop"] | None,
    "template": str | None,
}


@dataclass
class FinishConfig:
    folders: list[str] = field(default_factory=list)  # a run (its newest) or a checkpoint; OUT
    model: PathArg | None = None  # where the base model is now; where the run had it by default


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that is meant, every bit of it verified."""
    from llava_min.training.checkpoint import verify
    from llava_min.training.run_folder import newest_checkpoint

    if (source / "checkpoints").is_dir():
        if (found := newest_checkpoint(source / "checkpoints")) is None:
            raise UserError(f"{source}: a run without a checkpoint; it has nothing to finish yet")
        return found.resolve()
    if not any((source / name).exists() for name in ("manifest.json", "state.json")):
        raise UserError(
            f"{shorten(source, 400)}: not a run of train.py and not a checkpoint of one; "
            "give the run's folder, its best or last, or one of its checkpoints/step-…"
        )
    folder = source.resolve()  # best and last are links
    verify(folder)
    return folder


def read_settings(folder: Path, run: Any) -> SimpleNamespace:
    """SETTINGS as the verified checkpoint `folder` has them."""
    identity = run.get("identity") if isinstance(run, dict) else None
    if not isinstance(identity, dict) or "train" not in identity:
        raise UserError(
            f"{folder / 'state.json'}: not the state of a run of train.py; give another checkpoint"
        )
    read = lambda key, kind: convert(f"{folder / 'state.json'}: {key}", kind, identity.get(key))
    return SimpleNamespace(**{key: read(key, kind) for key, kind in SETTINGS.items()})


def write_from_base(
    folder: Path, state: dict[str, Any], settings: SimpleNamespace, base: str | None, out: Path
) -> None:
    """The model of a run without LoRA: the trained tensors of `folder`, the rest of the base."""
    import torch

    from llava_min.load import open_checkpoint, write_model
    from llava_min.parallel.ranks import World
    from llava_min.training.checkpoint import restore
    from llava_min.training.identity import as_stored, base_identity, differences
    from llava_min.training.trainable import set_trainable
    from llava_min.util.files import new_folder
    from llava_min.weights import DTYPES

    base = base or state["run"].get("model")
    if not base:
        raise UserError(f"{folder}: does not say where its base model is; give it", "model")
    try:
        ready = open_checkpoint(
            base, image_aspect_ratio=settings.image_aspect_ratio, template=settings.template
        )
    except UserError as e:
        raise UserError(
            f"the base model of {folder}: {e}; {label('model')} says where it is now"
        ) from None
    now = as_stored(base_identity(ready))
    if changed := differences({name: state["run"]["identity"].get(name) for name in now}, now):
        shown = ", ".join(list(changed.values())[:4])
        raise UserError(
            f"{base}: is not the base model that {folder} was trained from: {shown}; "
            f"give that with {label('model')}"
        )

    model, device, dtype = ready.model, torch.device("cpu"), DTYPES[settings.precision]
    set_trainable(
        model,
        settings.train,
        train_projector=settings.train_projector,
        train_vision=settings.train_vision,
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    frozen = lambda name: not model.get_parameter(name).requires_grad
    ready.entries = {name: entry for name, entry in ready.entries.items() if frozen(name)}
    model.requires_grad_(False)  # so that all is read as it will be stored, and not in fp32
    ready.load_weights(dtype, device)
    for name in trained:
        model.get_parameter(name).requires_grad_(True)
    restore(folder, state, model, None, World(0, 1, 0, device))
    with new_folder(out) as aside:
        write_model(model, ready.processor, aside, dtype)


def main(argv: list[str]) -> None:
    what = "Write the adapter or model of a checkpoint, as the run would have at its end."
    config = parse(FinishConfig, argv, what, positional="folders")
    with flags(config):
        finish(config)


def finish(config: FinishConfig) -> None:
    if len(config.folders) != 2:
        raise UserError(
            "FOLDER: give two, a run or one of its checkpoints, and the folder to write"
        )

    import os
    import shutil

    from llava_min.util.files import check_new_folder, new_folder

    source, out = map(Path, config.folders)
    check_new_folder(out)
    folder = find_checkpoint(source)
    kept = folder.parent if folder.parent.name == "checkpoints" else folder
    if kept in Path(os.path.realpath(out)).parents:
        raise UserError(
            f"{out}: lies among the checkpoints of a run, where it would damage them; "
            "give another path"
        )
    state = json.loads((folder / "state.json").read_bytes())
    settings = read_settings(folder, state["run"])
    result = "adapter" if settings.train == "lora" else "model"
    if result == "model":
        write_from_base(folder, state, settings, config.model, out)
    elif config.model:
        raise UserError(
            "has no effect, an adapter is written without its base; leave it out", "model"
        )
    else:
        with new_folder(out) as aside:
            shutil.copytree(folder / "adapter", aside, dirs_exist_ok=True)
    info(f"saved {out}: the {result} of step {state['step']}, from {folder}")
