"""`python -m llava_min VERB …`: verbs are the pages of tools/ whose docstring begins so."""

import importlib
import re
import sys
from pathlib import Path

from llava_min.errors import UserError, escape_controls, guess
from llava_min.util.script import run


def verbs() -> dict[str, str]:
    """Verb -> what it does, read from the pages without importing them."""
    first = re.compile(r'"""`python -m llava_min (\w+)[^`]*`: (.+?)[.:]?(?:""")?\n')
    pages = sorted((Path(__file__).parent / "tools").glob("*.py"))
    found = (first.match(page.read_text(encoding="utf-8")) for page in pages)
    return {m[1]: m[2] for m in found if m}


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        lines = ["usage: python -m llava_min VERB [-h] …", ""]
        lines += [f"  {verb:10}{what}" for verb, what in verbs().items()]
        print("\n".join(lines), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    verb = argv[0]
    if verb not in verbs():
        fix = guess(verb, verbs(), f"there are {', '.join(verbs())}")
        raise UserError(f"{escape_controls(verb)}: no such verb; {fix}")
    sys.argv[0] = f"python -m llava_min {verb}"  # what --help calls the program
    return importlib.import_module(f"llava_min.tools.{verb}").main(argv[1:])


if __name__ == "__main__":
    run(main)
