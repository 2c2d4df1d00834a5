"""Which chat template a checkpoint wants, by its files and its jinja text, which is never run.

A jinja text is reduced to an outline: the text that it writes, where a message's role and text go,
and what depends on the role. If that is the outline of one of FORMS, the template is known,
whatever the variables are called. Any other outline gets the nearest template, by its role words or
by the language model, and a warning.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from llava_min.data.chat import QWEN_SYSTEM, TEMPLATE_KEY, TEMPLATES, VICUNA_SYSTEM, get_template
from llava_min.errors import info, label, warn

MAX_CHARACTERS = 20_000  # a longer jinja text is none of ours, and is not read
STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
CLOSE = {"{{": "}}", "{%": "%}", "{#": "#}"}
PATH = rf"[A-Za-z_]\w*(?:\.\w+(?:\(\))?|\[\s*(?:{STRING}|0|1:)\s*\])*"
TERM = re.compile(rf"(?P<string>{STRING})|[+~]|\s+|(?P<path>{PATH})(?:\s*\|\s*trim\b)?", re.S)
KEY = r"(?:\[\s*['\"]{0}['\"]\s*\]|\.{0}\b)"
ROLE = re.compile(rf"\(?\s*(\w+(?:\[0\])?){KEY.format('role')}\s*(==|!=)\s*['\"](\w+)['\"]\s*\)?")
TYPE = re.compile(rf"\w+{KEY.format('type')}\s*==\s*['\"](\w+)['\"]")
MESSAGES = re.compile(r"for \w+ in \w*messages(\[1:\])?")
SELECT = r"\s*\|\s*selectattr\(\s*'type'\s*,\s*'equalto'\s*,\s*'(\w+)'\s*\)".replace("'", "['\"]")
PARTS = re.compile(rf"for \w+ in \w+{KEY.format('content')}(?:{SELECT})?")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
OPERATORS = ("if", "else", "in", "is", "not", "and", "or")
ELSE = {
    "user": "assistant",
    "assistant": "user",
    "not user": "user",
    "not assistant": "assistant",
    "not system": "system",
}


def escape_literal(text: str) -> str:
    return text.replace("{", "(").replace("<s>", "{bos}").replace("</s>", "{eos}")


def outline_expression(expression: str, names: dict[str, str]) -> str:
    """What a jinja expression writes: strings and `names` of strings as they are, {text}, {role},
    {ROLE}, {bos}, {eos}, and {?} for anything else.
    """
    if expression.startswith("raise_exception("):
        return ""
    out, at = "", 0
    while at < len(expression):
        m = TERM.match(expression, at)
        if m is None:
            return out + "{?}"
        at, path = m.end(), m["path"]
        if m["string"]:
            unescaped = re.sub(r"(?s)\\(.)", lambda e: ESCAPES.get(e[1], e[1]), m["string"][1:-1])
            out += escape_literal(unescaped)
        elif path in ("bos_token", "eos_token"):
            out += "{" + path[:3] + "}"
        elif path in names:
            out += names[path]
        elif path:
            role, calls = re.search(KEY.format("role"), path), re.findall(r"(\w+)\(\)", path)
            known = path not in OPERATORS and calls in ([], ["upper"] if role else ["strip"])
            out += "{?}" if not known else "{text}" if not role else "{ROLE}" if calls else "{role}"
    return out


def condition(text: str) -> str:
    """What a branch depends on: a message's role, a part's type, `prompt` for the generation
    prompt, or else its own text.
    """
    if m := ROLE.fullmatch(text):
        return ("first " if m[1].endswith("]") else "") + ("not " if m[2] == "!=" else "") + m[3]
    if m := TYPE.fullmatch(text):
        return f"type {m[1]}"
    return "prompt" if text == "add_generation_prompt" else re.sub(r"\s+", "", text)


def outline_block(block: str, branches: list[str], names: dict[str, str], inside: bool) -> str:
    """The outline of a {% block %}.

    branches: what the open ones depend on. names: strings that are set before the loop over the
    messages. inside: whether it is in that loop.
    """
    word, rest = (*block.split(maxsplit=1), "", "")[:2]
    if word == "set":
        name, _, value = rest.partition("=")
        new = outline_expression(value.strip(), names)
        if new in ("{text}", "{role}", "{ROLE}"):  # a name for a part writes nothing yet
            return ""
        if inside or "{?}" in new:
            return new or "{?}"
        names[name.strip()] = new
        return ""
    if word == "if":
        branches.append(condition(rest))
        return f"{{if {branches[-1]}:}}"
    if word in ("elif", "else") and branches:
        what = condition(rest) if word == "elif" else ELSE.get(branches[-1], "else")
        branches[-1] = ""  # a second else would depend on both
        return f"{{{what}:}}"
    if word == "endif":
        del branches[-1:]
        return "{end}"
    if word == "for":
        loop = " ".join(block.split())
        parts = PARTS.fullmatch(loop)
        if parts:
            return f"{{for {parts[1] or 'part'}}}"
        return "{for}" if MESSAGES.fullmatch(loop) and not inside else "{?}"
    return {"endfor": "{next}", "generation": "", "endgeneration": ""}.get(word, "{?}")


def tags(source: str) -> Iterator[tuple[str, str, str]]:
    """(text before it, its opening, its content) of each jinja tag, and the text after the last.

    The end is found without a regex, which an untrusted text could make very slow.
    """
    at = 0
    while m := re.compile(r"\{[{%#]").search(source, at):
        end = source.find(CLOSE[m[0]], m.end())
        if end < 0:  # never closed: not understood
            yield source[at : m.start()], "{%", "?"
            return
        inside = source[m.end() : end]
        yield source[at : m.start()], m[0], inside.removeprefix("-").removesuffix("-").strip()
        at = end + 2
    yield source[at:], "", ""


def outline(source: str) -> tuple[str, str]:
    """(the text before the messages, without conditions; the outline of them and the rest)."""
    if len(source) > MAX_CHARACTERS:
        return "{?}", "{?}"
    head, body, branches, names = "", "", [], {}
    for text, kind, inside in tags(source):
        if not text.strip() and "\n" in text:  # the layout of the jinja text itself
            text = ""
        text = escape_literal(text)
        head, body = (head, body + text) if body else (head + text, "")
        if kind == "{{":
            new = outline_expression(inside, names)
        else:
            new = outline_block(inside, branches, names, bool(body)) if kind == "{%" else ""
        if body or kind == "{%" and inside.startswith("for"):
            body += new
        else:
            head += new
    for _ in range(4):  # drop last branches that write nothing, nested ones too
        body = re.sub(r"\{(?!if )[^{}]*:\}(?=\{end\})", "", body)
        body = re.sub(r"\{if [^{}]*:\}\{end\}", "", body)
    return re.sub(r"\{(?!\?)[^{}]*\}", "", head), body  # the tokenizer adds BOS


_VICUNA = VICUNA_SYSTEM + " "
_PROMPT = "{if prompt:}ASSISTANT:{end}"
_LLAVA_HF = "{for}{if not system:}{ROLE}: {end}{for image}<image>\n{next}%s{next}" + _PROMPT
_SEPARATE = "{for}%s{if user:}USER: {text} {assistant:}ASSISTANT: {text}{eos}{end}{next}" + _PROMPT
_HEADER = (
    "{for}<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
    "{if loop.index0==0:}{bos}{text}{end}{text}{next}%s"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
_PARTS = "{for text}{text} {next}"
_NO_SYSTEM = "{if loop.firstandmessages[0]['role']!='system':}"
_SYSTEM = "{if loop.firstandsystem_messageisdefined:}"
_INST = " [INST] {text} [/INST]"
# template -> outlines (see `outline`) of jinja texts that write the same, spaces included
FORMS = {
    "vicuna_v1": [
        (
            _VICUNA,  # as LLaMA-Factory saves it
            "{for}{if user:}USER: {text} ASSISTANT:{assistant:} {text}{eos}{end}{next}",
        ),
        (_VICUNA, _SEPARATE % ""),
        ("", _SEPARATE % ("{if loop.index0==0:}" + _VICUNA + "{end}")),
    ],
    "llava_hf": [  # two states of llava-hf's own
        ("", _LLAVA_HF % _PARTS),
        ("", _LLAVA_HF % ("{if not assistant:}" + _PARTS + "{assistant:}" + _PARTS + "{end}")),
    ],
    "chatml": [
        (
            "",
            "{for}"
            + _NO_SYSTEM
            + f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n"
            + "{end}<|im_start|>{role}\n{text}<|im_end|>\n{next}"
            "{if prompt:}<|im_start|>assistant\n{end}",
        ),
    ],
    "mistral": [
        ("", "{for}{if user:}" + _INST + "{assistant:} {text}{eos}{end}{next}"),
        (
            "",
            "{for}{if user:}"
            + _SYSTEM
            + " [INST] {text}\n\n{text} [/INST]{else:}"
            + _INST
            + "{end}{assistant:} {text}{eos}{end}{next}",
        ),
    ],
    "llama3": [("", _HEADER % "{if prompt:}" + "{end}"), ("", _HEADER % "")],
}
_ROLE_WORDS = {
    "<|im_start|>": "chatml",
    "<|start_header_id|>": "llama3",
    "[INST]": "mistral",
    "ASSISTANT:": None,
}  # vicuna_v1 or llava_hf, by the layout


def recognise(jinja: str) -> tuple[str | None, bool]:
    """(the template that a jinja text writes, or None; whether its spaces are the same)."""
    bare = lambda parts: tuple("".join(part.split()) for part in parts)
    found = outline(jinja)
    forms = [
        (name, form) for name, forms in FORMS.items() for form in forms if bare(form) == bare(found)
    ]
    return (forms[0][0], found in [form for _, form in forms]) if forms else (None, False)


def find_template(
    config: dict,
    processor_config: dict | None = None,
    chat_template: str | None = None,
    tokenizer=None,
    path: Path | str = "chat_template",
) -> str:
    """The template name for a checkpoint.

    config: its config.json. processor_config: its processor_config.json, where we record the name.
    chat_template: the jinja text that the file `path` has. tokenizer: has `token_id(content)`.
    """
    recorded = (processor_config or {}).get(TEMPLATE_KEY)
    if recorded is not None:
        get_template(recorded)
        return recorded
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    if not isinstance(chat_template, str) or not chat_template.strip():
        return by_model(text, tokenizer, flat=text is config)
    name, same = recognise(chat_template)
    if name is None:
        flat = text is config
        name = nearest(chat_template, flat) or by_model(text, tokenizer, flat=flat)
        warn(
            f"{path}: a chat template that is none of {', '.join(TEMPLATES)}; {name} is taken as "
            "the nearest, and the model may have learned another; say which with "
            f"{label('template')}"
        )
    elif not same:
        info(
            f"{path}: taken as {name}, from which it differs in spaces alone; {label('template')} "
            "takes another"
        )
    return name


def nearest(jinja: str, flat: bool) -> str | None:
    """The template whose role words are in a jinja text, None if those of several or none are."""
    found = [name for mark, name in _ROLE_WORDS.items() if mark in jinja]
    if len(found) != 1:
        return None
    vicuna = flat or VICUNA_SYSTEM in jinja.replace("\\'", "'")
    return found[0] or ("vicuna_v1" if vicuna else "llava_hf")


def by_model(text: dict, tokenizer, flat: bool) -> str:
    """The usual template of this language model; `flat`: config.json is the original LLaVA's."""
    kind = str(text.get("model_type", "llama"))
    if "qwen" in kind:
        return "chatml"
    if "mistral" in kind:
        return "mistral"
    vocab = text.get("vocab_size", 32000)
    if isinstance(vocab, int) and vocab >= 128256:
        if tokenizer is None or tokenizer.token_id("<|eot_id|>") is not None:
            return "llama3"
    return "vicuna_v1" if flat else "llava_hf"
