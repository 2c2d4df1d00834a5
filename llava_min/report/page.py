"""The parts of both reports: safe text, the HTML file around it, headings, notes and settings.

Text from data is untrusted. Static text goes through `escape`; what a script draws is JSON in which
`<`, `>` and `&` are written as \\u escapes, and is only ever assigned to textContent. The policy in
the page's head (CSP level 3, W3C) allows our script and style by their hashes and nothing else.
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

MAX_TEXT = 4000  # characters of a text; the rest is left out, and the page says so


def shown(x: object) -> str:
    """`x` as text whose control and bidirectional-override characters are visible; lines, tabs and
    joined emoji stay.
    """
    return re.sub(r"[^\n\t\u200c\u200d]+", lambda m: escape_controls(m[0]), str(x))


def cut(x: object, limit: int) -> str:
    text = str(x)
    if len(text) <= limit:
        return shown(text)
    return f"{shown(text[:limit])} … ({len(text) - limit:,} characters more)"


def escape(x: object) -> str:
    return html.escape(shown(x), quote=True)


def number(x: object, digits: int) -> str:
    if finite(x) is None:
        return "–"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.{digits}f}"


def finite(x: object) -> float | None:
    """`x` as a float if it is a finite number, else None."""
    return float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None


def flat(settings: dict, prefix: str = "") -> dict:
    """{"lora": {"r": 16}} → {"lora.r": 16}"""
    out = {}
    for key, value in settings.items():
        nested = isinstance(value, dict) and value
        out |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


# ---- the file


def asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def page(title: str, body: str, data: object, script: str) -> str:
    """A whole HTML file: `body` is ours, `data` is what `script` draws."""
    css, js = asset("page.css"), asset(script)
    digest = lambda text: hashlib.sha256(text.encode()).digest()
    style, code = (base64.b64encode(digest(text)).decode() for text in (css, js))
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; "
        f"script-src 'sha256-{code}'; base-uri 'none'; form-action 'none'"
    )
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = re.sub("[<>&\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
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
    return (
        f'<header><p class="kind">{kind}</p><h1>{escape(title)}</h1>'
        f'<p class="under">{parts}</p></header>'
    )


def settings_list(settings: dict, title: str) -> str:
    """A list of names and values; those that are None or [] are left out."""
    items = ""
    for name, value in flat(settings).items():
        if value is None or value == []:
            continue
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        if not isinstance(text, str):
            text = json.dumps(text, ensure_ascii=False, default=str)
        width = "wide" if len(text) > 60 or "\n" in text else "long" if len(text) > 18 else ""
        width = f' class="{width}"' if width else ""
        items += (
            f"<div{width}><dt>{escape(name)}</dt>"
            f"<dd><bdi>{escape(cut(text, MAX_TEXT))}</bdi></dd></div>"
        )
    return (
        f"<section><details open><summary><h2>{title}</h2></summary>"
        f'<dl class="settings">{items}</dl></details></section>'
    )


def notes_list(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if notes else ""
