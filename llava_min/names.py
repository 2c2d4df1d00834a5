"""Tensor names: a row for each part of the model, a column for each published layout.

Reading takes every column, writing one; PEFT's paths are a column, and so is a new export. Prefixes
are looked up longest first, so the order of rows and columns means nothing.

    hf             llava-hf as published, transformers 4.36 to 4.51; every reader accepts it
    hf_4_52        transformers from 4.52 on, in memory
    hf_5           as transformers 5 saves
    hf_5_memory    transformers 5 in memory, which PEFT's keys repeat
    original       LLaVA's own checkpoints (liuhaotian), with the tower in the file
    original_clip  the same, with the tower in OpenAI's CLIP folder
    original_lora  the same under PEFT: the tower is added after LoRA, so no name reaches it
"""

LAYOUTS = (
    "hf",
    "hf_4_52",
    "hf_5",
    "hf_5_memory",
    "original",
    "original_clip",
    "original_lora",
)

_ORIGINAL_TOWER = "model.vision_tower.vision_tower.vision_model."
PARTS = {  # our prefix -> theirs, in the order of LAYOUTS; None: the layout has no such part
    "vision_tower.layers.": (
        "vision_tower.vision_model.encoder.layers.",
        "model.vision_tower.vision_model.encoder.layers.",
        "vision_tower.encoder.layers.",
        "model.vision_tower.encoder.layers.",
        f"{_ORIGINAL_TOWER}encoder.layers.",
        "vision_model.encoder.layers.",
        None,
    ),
    "vision_tower.": (
        "vision_tower.vision_model.",
        "model.vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.",
        _ORIGINAL_TOWER,
        "vision_model.",
        None,
    ),
    "multi_modal_projector.": (
        "multi_modal_projector.",
        "model.multi_modal_projector.",
        "multi_modal_projector.",
        "model.multi_modal_projector.",
        None,
        None,
        None,
    ),
    "multi_modal_projector.linear_1.": (
        "multi_modal_projector.linear_1.",
        "model.multi_modal_projector.linear_1.",
        "multi_modal_projector.linear_1.",
        "model.multi_modal_projector.linear_1.",
        *("model.mm_projector.0.",) * 3,
    ),
    "multi_modal_projector.linear_2.": (
        "multi_modal_projector.linear_2.",
        "model.multi_modal_projector.linear_2.",
        "multi_modal_projector.linear_2.",
        "model.multi_modal_projector.linear_2.",
        *("model.mm_projector.2.",) * 3,
    ),
    "language_model.": (
        "language_model.model.",
        "model.language_model.",
        "language_model.model.",
        "model.language_model.",
        *("model.",) * 3,
    ),
    "lm_head.": (
        "language_model.lm_head.",
        "lm_head.",
        "language_model.lm_head.",
        "lm_head.",
        *("lm_head.",) * 3,
    ),
}


def _column(layout: str) -> dict[str, str]:
    """Our prefix -> the layout's."""
    i = LAYOUTS.index(layout)
    return {ours: theirs[i] for ours, theirs in PARTS.items() if theirs[i] is not None}


def _longest_first(prefixes: dict[str, str]) -> list[tuple[str, str]]:
    return sorted(prefixes.items(), key=lambda pair: -len(pair[0]))


_WRITE = {layout: _longest_first(_column(layout)) for layout in LAYOUTS}
_READ = _longest_first({b: a for layout in LAYOUTS for a, b in _column(layout).items()})


def _renamed(name: str, prefixes: list[tuple[str, str]]) -> str | None:
    found = (new + name[len(old) :] for old, new in prefixes if name.startswith(old))
    return next(found, None)


def to_ours(name: str) -> str | None:
    """A tensor's name in any layout -> ours; None for what is no part of a LLaVA."""
    return _renamed(name, _READ)


def to_layout(name: str, layout: str) -> str | None:
    """Our name of a tensor -> the layout's; None where the layout has no such part."""
    return _renamed(name, _WRITE[layout])


def path_in(path: str, layout: str) -> str | None:
    """Our path of a module -> the layout's; None where the layout has no such part."""
    name = to_layout(f"{path}.", layout)
    return None if name is None else name.rstrip(".")
