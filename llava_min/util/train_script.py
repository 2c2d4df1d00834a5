"""What train.py takes, for verbs that read its recipes and command lines. The script lies beside
the package; loaded here, it defines its settings and runs nothing.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

from llava_min.errors import UserError, shorten
from llava_min.util.cli import parse

SCRIPT = Path(__file__).parents[2] / "train.py"
RECIPES = Path(__file__).parents[1] / "recipes"


@functools.cache
def train_settings() -> type:
    """The dataclass of train.py's settings. Raises UserError where the package was installed
    without the script."""
    if not SCRIPT.is_file():
        raise UserError(
            f"{shorten(SCRIPT, 400)}: train.py is not beside the package; install it from a clone "
            "of the repository: pip install -e ."
        )
    spec = importlib.util.spec_from_file_location("llava_min_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module.TrainConfig


def read_command(argv: list[str]) -> Any:
    """The settings of `train.py ARGV`, a recipe's among them. Raises UserError as train.py does."""
    return parse(train_settings(), argv, "Fine-tune a LLaVA.", recipes=RECIPES)
