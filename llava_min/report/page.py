"""What both pages are made of: text that is safe to show, the HTML file around it, headings, notes
and settings.

Whatever comes from data is hostile until shown. Static text goes through `escape`, what a script
draws travels as JSON in which `<`, `>` and `&` are written as \\u escapes and comes out through
textContent alone. The policy in the page's head (CSP level 3, W3C) names our script and style by
their hashes; nothing else runs or loads.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_min.errors import UserError, escape_controls
from llava_min.util.files import replace

LONGEST = 4000  # characters of a text; the rest is left out, and the page says so


def shown(x: object) -> str:
    """`x` as text whose control and bidirectional-override characters are visible; lines, tabs and
    joined emoji stay.
    """
    return re.sub(r"[^\n\t\u200c\u200d]+", lambda m: escape_controls(m[0]), str(x))


def cut(x: object, limit: int) -> str:
    text = str(x)
    return (
        shown(text)
        if len(text) <= limit
        else f"{shown(text[:limit])} … ({len(text) - limit:,} characters more)"
    )


def escape(x: object) -> str:
    return html.escape(shown(x), quote=True)


def number(x: object) -> str:
    if finite(x) is None:
        return "–"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


def finite(x: object) -> float | None:
    """A score that is one: NaN, infinity and what is no number are none."""
    return float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None


def flat(settings: dict, prefix: str = "") -> dict:
    """{"lora": {"r": 16}} → {"lora.r": 16}"""
    out = {}
    for key, value in settings.items():
        out |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
    return out


# ---- the file


def asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def page(title: str, body: str, data: object, script: str) -> str:
    """A whole HTML file: `body` is ours, `data` is what `script` draws."""
    css, js = asset("page.css"), asset(script)
    allow = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in (css, js)]
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = re.sub("[<>&\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-{allow[0]}'; \
script-src 'sha256-{allow[1]}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>{css}</style>
<body>
{body}
<script type="application/json" id="data">{text}</script>
<script>{js}</script>
</html>
"""


def write(path: Path, text: str) -> None:
    """`path` is the old page or the new one, never half of it. Raises UserError when it cannot be
    written.
    """
    try:
        replace(path, text)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({e.strerror or escape_controls(e)}); "
            "free space or give another path"
        ) from None


def heading(kind: str, title: object, under: Iterable[object]) -> str:
    parts = "".join(f"<span>{escape(x)}</span>" for x in under)
    return f'<header><p class="kind">{kind}</p><h1>{escape(title)}</h1><p class="under">{parts}</p></header>'


def settings_list(settings: dict, title: str) -> str:
    """What is not set is left out."""
    items = ""
    for name, value in flat(settings).items():
        if value is None or value == []:
            continue
        value = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
        room = (
            ' class="wide"'
            if len(text) > 60 or "\n" in text
            else ' class="long"'
            if len(text) > 18
            else ""
        )
        items += f"<div{room}><dt>{escape(name)}</dt><dd><bdi>{escape(cut(text, LONGEST))}</bdi></dd></div>"
    return (
        f"<section><details open><summary><h2>{title}</h2></summary>"
        f'<dl class="settings">{items}</dl></details></section>'
    )


def notes_list(notes: Sequence[str]) -> str:
    return (
        f'<ul class="notes">{"".join(f"<li>{escape(n)}</li>" for n in notes)}</ul>' if notes else ""
    )
