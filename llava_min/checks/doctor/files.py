"""What an input is, and how it becomes a run: recipes, scripts, files of settings, folders."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from llava_min.checks.doctor.facts import OURS, TRL, Run, Setting
from llava_min.checks.doctor.shell import HF, read_commands
from llava_min.errors import UserError, escape_controls, shorten
from llava_min.util.cli import read_recipe
from llava_min.util.files import check_file, read_json

MAX_BYTES = 1 << 20  # bytes of a file of settings; what is larger is something else
MAX_SCRIPT_BYTES = 1 << 16  # and of a launch script
DEEPEST = 20  # tables within tables
MAX_HEADER_BYTES = 1 << 24  # of a safetensors file
RECIPES = Path(__file__).parents[2] / "recipes"
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
GIVE = (
    "give a recipe, a train.py command, a launch script, a JSON or TOML file of settings, or "
    "an adapter folder"
)


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    check_file(path)
    if path.stat().st_size > most:
        size = path.stat().st_size
        raise UserError(f"{shorten(path, 400)}: {size:,} bytes, expected at most {most:,}; {GIVE}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{shorten(path, 400)}: byte {e.start} is not UTF-8; {GIVE}") from None
    if "\0" in text:
        raise UserError(f"{shorten(path, 400)}: a binary file; {GIVE}")
    return text


# ---- settings


def flatten(data: dict[str, Any], source: str, run: Run, lines: list[str], path: str = "") -> None:
    """The leaves of nested tables as settings by their last name; the first of a name counts."""
    if path.count(".") > DEEPEST:
        raise UserError(f"{source}: tables within tables, {DEEPEST} deep and more; {GIVE}")
    for name, value in data.items():
        dotted = f"{path}.{name}" if path else name
        if isinstance(value, dict) and name not in ("rank_pattern", "alpha_pattern"):
            run.trl = run.trl or "sft" in name.lower() or name in TRL
            flatten(value, source, run, lines, dotted)
            continue
        quoted = json.dumps(value, ensure_ascii=False, default=str)
        written = re.compile(rf"[\s{{,'\"]*{re.escape(name)}['\"]?\s*[:=]")
        at = [n for n, line in enumerate(lines, 1) if written.match(line)]
        new = Setting(
            value,
            f"{source}:{at[0]}" if len(at) == 1 else source,
            f"{dotted} = {shorten(quoted, 200)}",
        )
        run.entries.append((name, new))
        if name not in run.settings:
            run.settings[name] = new
        elif run.settings[name].value != value:
            run.repeated.append((new, run.settings[name]))


def from_table(data: dict[str, Any], text: str, source: str) -> Run:
    """A run from a JSON or TOML table: a recipe or a finished run of ours, or keyword arguments of
    the libraries."""
    ours = len((OURS - HF - {"model"}) & data.keys())
    run = Run(source, "hf", "settings of transformers, PEFT or TRL")
    flatten(data, source, run, text.splitlines())
    theirs = len((HF - OURS) & run.settings.keys())
    if not (OURS | HF) & run.settings.keys():
        raise UserError(
            f"{source}: no key of a recipe, TrainingArguments, SFTConfig, LoraConfig "
            f"or BitsAndBytesConfig; {GIVE}"
        )
    if ours > theirs:
        ranks = data.get("ranks")  # a run folder's config.json has it
        return Run(
            source,
            "train.py",
            "a recipe" if ranks is None else "the settings of a run",
            run.settings,
            ranks if isinstance(ranks, int) else None,
        )
    run.trl = run.trl or bool(TRL & run.settings.keys())
    if "image_processor_type" in data or "processor_class" in data:
        run.what = "a processor's settings"
    return run


def read_table(path: Path, source: str) -> Run:
    text = read_text(path)
    if path.suffix == ".json":
        data = read_json(path)
        if "model_type" in data and data.keys() & {"text_config", "vision_config", "hidden_size"}:
            run = Run(source, "hf", "a model's config")
            read_image_settings(path, source, run)
            return run
        return from_table(data, text, source)
    try:
        return from_table(tomllib.loads(text), text, source)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{source}: {escape_controls(e)}; correct the file") from None


def with_recipe(run: Run) -> Run:
    """A train.py command with what its recipe sets below its flags."""
    name = run.text("recipe") or ("" if "data" in run.settings else "toy")
    if not name:
        return run
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{Path(name).name}.toml"
    if not path.is_file():
        read_recipe(name, RECIPES, {})  # says what there is
    recipe = read_table(path, path.name).settings
    run.settings = recipe | {"recipe": Setting(name, run.source, f"--recipe {name}")} | run.settings
    return run


# ---- folders


def tensor_names(path: Path) -> list[str]:
    """The names in the header of a safetensors file; no tensor is read."""
    check_file(path)
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        raw = f.read(size) if 2 <= size <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(raw)
        return sorted(name for name in header.keys() if name != "__metadata__")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(
            f"{shorten(path, 400)}: damaged or not a safetensors file; save the adapter again"
        ) from None


def read_adapter(folder: Path, source: str) -> Run:
    """A folder that PEFT, LLaVA or train.py has left, by its adapter_config.json."""
    path = folder / "adapter_config.json"
    text, data = read_text(path), read_json(path)
    files = tuple(sorted(p.name for p in folder.iterdir()))
    run = Run(source, "hf", "an adapter folder", adapter="peft", files=files)
    flatten(data, source + "/adapter_config.json", run, text.splitlines())
    if "adapter_model.safetensors" in files:
        run.tensors = tensor_names(folder / "adapter_model.safetensors")
    original = "config.json" in files and any(
        k.startswith("mm_") for k in read_json(folder / "config.json")
    )
    if original or "non_lora_trainables.bin" in files:
        run.adapter, run.what = "llava", "an adapter folder of the original LLaVA"
    for name in (*PROCESSOR, "config.json"):  # how images are prepared where it is served
        if name in files and name not in run.settings:
            read_image_settings(folder / name, f"{source}/{name}", run)
    return run


def read_image_settings(path: Path, source: str, run: Run) -> None:
    """`image_aspect_ratio`, `do_pad` and `padding_side` of a model's file, also where it is nested;
    its other settings are `entries` alone."""
    found = Run(source, "hf", "")
    flatten(read_json(path), source, found, read_text(path).splitlines())
    run.entries += found.entries
    for name in ("image_aspect_ratio", "do_pad", "padding_side"):
        if name in found.settings:
            run.settings.setdefault(name, found.settings[name])


def read_folder(folder: Path, source: str) -> Run:
    if (folder / "adapter_config.json").exists():
        return read_adapter(folder, source)
    if (folder / "checkpoints").is_dir() and (folder / "config.json").is_file():  # of train.py
        return read_table(folder / "config.json", f"{source}/config.json")
    run = Run(source, "hf", "a model folder")
    for name in (*PROCESSOR, "tokenizer_config.json", "config.json"):
        if (folder / name).exists():
            read_image_settings(folder / name, f"{source}/{name}", run)
    if not run.entries:
        raise UserError(
            f"{source}: no adapter_config.json, and no config of a model or processor; {GIVE}"
        )
    return run


# ---- all of them


def read_input(given: str) -> list[Run]:
    """The runs that an input describes: one, or as many as a script starts. Raises UserError for
    what none is."""
    source, path = shorten(given, 200), Path(given)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # too long for a name, as a command line may be
        is_folder = exists = False
    if is_folder:
        return [read_folder(path, shorten(path.resolve().name, 200))]
    if not exists:
        if given in {p.stem for p in RECIPES.glob("*.toml")}:
            return [read_table(RECIPES / f"{given}.toml", f"{given}.toml")]
        is_command = " " in given or "train.py" in given
        runs = read_commands(given, "command", lines=False) if is_command else []
        if not runs:
            raise UserError(f"{source}: no such file, folder or recipe; {GIVE}")
        return [with_recipe(run) if run.kind == "train.py" else run for run in runs]
    source = shorten(path.name, 200)
    if path.name == "adapter_config.json":
        return [read_adapter(path.parent, shorten(path.parent.resolve().name, 200))]
    if path.suffix in (".json", ".toml"):
        return [read_table(path, source)]
    runs = read_commands(read_text(path, MAX_SCRIPT_BYTES), source)
    if not runs:
        raise UserError(f"{shorten(given, 200)}: no training command found in it; {GIVE}")
    return [with_recipe(run) if run.kind == "train.py" else run for run in runs]
