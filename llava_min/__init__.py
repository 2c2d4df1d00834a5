"""LLaVA-1.5 in plain PyTorch: `load` a checkpoint, `generate` or `stream` an answer about a
picture.

The functions share their names with the modules that hold them, and the import system puts a
module, once it is imported, under its name into the package. Here the function always stands,
whatever was imported first; and torch is imported only when one is used.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from llava_min.errors import UserError

# Large blocks in huge pages: on CPU every token reads all weights once, and small pages add an
# address look-up for
# each 4 KB of them. PyTorch reads the variable at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["UserError", "generate", "load", "new_cache", "save", "stream"]
_HOMES = {
    "load": "llava_min.load",
    "save": "llava_min.load",
    "generate": "llava_min.generate",
    "stream": "llava_min.generate",
    "new_cache": "llava_min.generate",
}


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
