"""LLaVA-1.5 in plain PyTorch: `load` a checkpoint, `generate` or `stream` an answer about an image.

The public functions are imported when they are first used, so that `import llava_min` is quick and
comes without torch.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from llava_min.errors import UserError

# Huge pages for large blocks: on CPU every token reads all weights once, and small pages add an
# address look-up for each 4 KB. PyTorch reads the variable at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["UserError", "generate", "load", "new_cache", "save", "stream"]
_HOMES = {
    "load": "llava_min.load",
    "save": "llava_min.load",
    "generate": "llava_min.generate",
    "stream": "llava_min.generate",
    "new_cache": "llava_min.generate",
}


# `load` and `generate` are modules, too, and importing a submodule sets the package's attribute of
# that name to the module. A module-level __getattr__ (PEP 562) cannot prevent that: hence a class,
# whose __setattr__ keeps the function.
class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
