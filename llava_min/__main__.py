"""`python -m llava_min VERB …`: a verb is a page of tools/ whose docstring begins with its command."""

import difflib
import importlib
import re
import sys
from pathlib import Path

from llava_min.errors import UserError, escape_controls
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
        near = difflib.get_close_matches(verb, verbs(), n=1)
        mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(verbs())}"
        raise UserError(f"{escape_controls(verb)}: no such verb; {mend}")
    sys.argv[0] = f"python -m llava_min {verb}"  # what --help calls the program
    return importlib.import_module(f"llava_min.tools.{verb}").main(argv[1:])


if __name__ == "__main__":
    run(main)
