"""The house stays in order: what a page may be, what it may import, and the words that are retired.

`python tests/test_layout.py` prints the table of pages.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llava_min"
SCRIPTS = [ROOT / f"{name}.py" for name in ("train", "eval", "sample")]
PAGES = sorted(PACKAGE.rglob("*.py")) + SCRIPTS
SPINE = [p for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")]
MOST_SPINE, MOST_PAGE, MOST_FUNCTION = 3000, 300, 80  # lines

MODEL = {"clip", "llama", "cache", "ops", "llava", "sampling", "decoding", "generate"}
ANSWERS = {"options", "sampling", "decoding", "generate"}
# page or room -> the rooms and pages of the package that it may import
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors", "checks"},
    "names": set(),
    **dict.fromkeys(MODEL - ANSWERS, MODEL - ANSWERS | {"errors", "config", "checks", "fast"}),
    **dict.fromkeys(ANSWERS, MODEL | ANSWERS | {"errors", "checks", "fast"}),
    "quant": {"quant", "errors", "parallel"},
    "fast": {"fast", "quant", "errors", "config"},
}
# room -> what it never imports
NEVER = {
    "data": MODEL
    | {"load", "lora", "adapter", "weights", "training", "evaluation", "tools", "report"},
    "checks": MODEL | {"training", "evaluation", "tools", "report", "load"},
    "parallel": {"training", "evaluation", "tools", "report", "load", "data"},
    "util": {"training", "evaluation", "tools", "report", "load", "data"} | MODEL,
    "lora": MODEL | {"data", "training", "evaluation", "tools", "report", "load", "quant"},
}
RETIRED = {
    "Knobs", "knobs", "trunk", "asking", "roomy", "widen", "told", "tell", "weigh", "At",
    "Conversation", "FrozenLinear", "WideAttention", "deafen", "Unheard", "by_flag", "printable",
}  # fmt: skip


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def lines_of(page: Path) -> int:
    return len(page.read_text(encoding="utf-8").splitlines())


def room_of(page: Path) -> str:
    parts = page.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else page.stem


def imports_of(page: Path) -> set[str]:
    """The rooms and top pages that a page imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(page.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llava_min":
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "llava_min" and len(name) > 1}
    return found


def test_the_spine_is_an_afternoon():
    total = sum(map(lines_of, SPINE))
    assert total <= MOST_SPINE, f"{total} lines"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_is_one_idea(page):
    assert lines_of(page) <= MOST_PAGE
    for node in ast.walk(ast.parse(page.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MOST_FUNCTION, f"{node.name}: {length} lines"


@pytest.mark.parametrize("page", [p for p in PAGES if p not in SCRIPTS], ids=name_of)
def test_imports_point_one_way(page):
    room, imported = room_of(page), imports_of(page)
    assert not imported & {"train", "eval", "sample"}
    if room in MAY_IMPORT:
        assert imported <= MAY_IMPORT[room], imported - MAY_IMPORT[room]
    assert not imported & NEVER.get(room, set())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_retired_name(page):
    text = page.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    names = {t.string for t in tokens if t.type == tokenize.NAME}
    assert not names & RETIRED


def test_a_shape_letter_has_one_meaning_in_a_room():
    """`Shapes: B batch, T tokens, R = B * A rows`: the word behind a letter, on every page."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for page in (p for p in PAGES if p not in SCRIPTS):
        text = ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) or ""
        legend = re.search(r"^Shapes(?:, as in (\w+)/)?:(.+?)(?:\n\n|\Z)", text, re.M | re.S)
        if legend is None:
            continue
        room = legend[1] or ("spine" if page in SPINE else room_of(page))
        words = r"\b([A-Zb-z]) (?:= [A-Z][A-Z *]* )?([a-z_/]{3,})"
        for letter, word in re.findall(words, " ".join(legend[2].split())):
            found.setdefault((room, letter), {}).setdefault(word, name_of(page))
    assert len(found) >= 30 and found["spine", "K"].keys() == {"key/value"}
    several = {key: words for key, words in found.items() if len(words) > 1}
    assert not several, several


def test_the_readme_counts_right():
    """README's table of walks names each page with its number of lines, within a tenth."""
    rows = [
        line.split("|")[1:3]
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `") and line.count("|") >= 4
    ]
    counted = 0
    for page, number in rows:
        path = ROOT / page.strip(" `")
        if path.is_file() and number.strip().isdigit():
            assert abs(lines_of(path) - int(number)) <= max(5, lines_of(path) // 10), page
            counted += 1
    assert counted >= 15


if __name__ == "__main__":
    for page in SPINE:
        print(f"{lines_of(page):6} {name_of(page)}")
    print(f"{sum(map(lines_of, SPINE)):6} spine")
    for room in sorted({room_of(p) for p in PAGES if p not in SCRIPTS}):
        pages = [p for p in PAGES if p not in SCRIPTS and room_of(p) == room]
        if len(pages) > 1:
            longest = max(pages, key=lines_of)
            total = sum(map(lines_of, pages))
            print(f"{total:6} {room}/ in {len(pages)} pages, {longest.name} {lines_of(longest)}")
