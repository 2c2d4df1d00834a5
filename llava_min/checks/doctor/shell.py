"""Launch scripts and command lines: which training commands they hold, with which flags.

Nothing is executed. What of the shell is followed: quotes, comments, line continuations,
`NAME=value` and arrays, `$NAME`, `${NAME:-x}`, and what separates commands. What only running could
tell, as `$1` or `$(nproc)`, stays as it is written, and rules that need its value are silent.
"""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from llava_min.checks.doctor.facts import DIALECTS, OURS, TRL, Run, Setting, plain
from llava_min.errors import UserError

# Flags that only LLaVA's train.py and its relatives have.
LLAVA_ONLY = set(
    """mm_projector_type vision_tower mm_vision_select_layer tune_mm_mlp_adapter
    lora_enable mm_projector_lr pretrain_mm_mlp_adapter group_by_modality_length mm_use_im_start_end
    mm_use_im_patch_token""".split()
)
HF = (
    {name for key in DIALECTS["hf"].values() for name in key.names if name != "model"}
    | TRL
    | {"output_dir", "num_train_epochs", "lora_dropout"}
)
MAX_VALUE_LENGTH = 1 << 16  # characters of a variable
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
QUOTED, LITERAL = "\ue000", "\ue001"  # a $ between double and between single quotes
VARIABLE = re.compile(rf"[${QUOTED}](?:(\w+)|{{(\w+)(\[@\])?(?::?-([^}}$]{{0,200}}))?}})")


class Word(NamedTuple):
    text: str
    line: int


def scan(line: str, quote: str) -> tuple[str, str, bool]:
    """(`line` without its comment, the quote open at its end, whether a backslash continues it).

    quote: what is open at its beginning, "" for none. A $ between quotes is replaced.
    """
    escaped, out = False, ""
    for i, c in enumerate(line):
        out += {'"': QUOTED, "'": LITERAL}.get(quote, c) if c == "$" else c
        if escaped:
            escaped = False
        elif c == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c == "#" and (i == 0 or line[i - 1] in " \t;&|"):
            return out[:-1], "", False
    return (out[:-1] if escaped else out), quote, escaped


def split(text: str, where: str, line: int) -> list[Word]:
    """The words and separators of text whose quotes are closed."""
    lex = shlex.shlex(re.sub(r"(?<=\s)\d(?=[<>])", "", text), posix=True, punctuation_chars=";&|<>")
    lex.whitespace_split, lex.commenters = True, ""
    try:
        return [Word(word, line) for word in lex if word.strip() or not word]  # "\\ " is a blank
    except ValueError as e:
        raise UserError(
            f"{where}: line {line}: not readable as shell ({e}); correct the line"
        ) from None


def commands(text: str, where: str) -> Iterator[list[Word]]:
    """The commands of a script, each as its words with their lines."""
    words: list[Word] = []
    part, begun, quote, heredoc, in_array = "", 0, "", None, False
    for number, line in enumerate(text.split("\n"), 1):
        if heredoc:
            heredoc = None if line.strip() == heredoc else heredoc
            continue
        begun = begun or number
        kept, quote, continued = scan(line.removesuffix("\r"), quote)
        part += kept
        if quote:
            part += "" if continued else "\n"
            continue
        found, part, begun = split(part, where, begun), "", 0
        if here := re.search(r"<<-?\s*['\"]?(\w+)", kept):
            heredoc = here[1]
        for word in found:
            if word.text and set(word.text) <= set(";&|"):
                yield words
                words = []
            else:
                words.append(word)
        in_array = in_array or bool(words and re.match(r"\w+=\(", words[0].text))
        in_array = in_array and not any(word.text.endswith(")") for word in found)
        if not continued and not in_array:
            yield words
            words = []
    if quote:
        raise UserError(
            f"{where}: line {begun}: a quotation mark ({quote}) is never closed; close it"
        )
    yield words


def fill(word: str, variables: dict[str, str], where: str) -> str:
    """`word` with the variables that are known; the others stay as they are written."""
    known = lambda m: variables.get(m[1] or m[2], m[0] if m[4] is None else m[4])
    filled = VARIABLE.sub(known, word).replace(QUOTED, "$").replace(LITERAL, "$")
    if len(filled) > MAX_VALUE_LENGTH:  # A=$B$B, B=$C$C, and so on
        raise UserError(
            f"{where}: a variable of {len(filled):,} characters, expected at most "
            f"{MAX_VALUE_LENGTH:,}; is it a launch script?"
        )
    return filled


def expand(words: list[Word], variables: dict[str, str], where: str) -> list[Word]:
    """Variables filled in. As in the shell, one that is not quoted may become several words."""
    out = []
    for word in words:
        filled = fill(word.text, variables, where)
        alone = VARIABLE.fullmatch(word.text)
        parts = filled.split() if alone and (word.text[0] == "$" or alone[3]) else [filled]
        out += [Word(part, word.line) for part in parts]
    return out


def redirected(words: list[Word]) -> list[Word]:
    """Without `> file` and `< file`."""
    signs = {i for i, word in enumerate(words) if word.text and set(word.text) <= set("<>&")}
    return [word for i, word in enumerate(words) if i not in signs and i - 1 not in signs]


def program(words: list[str]) -> int | None:
    """The index of the Python program that a command runs, after its launcher."""
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        module = before == "-m" and not word.startswith(("torch.", "accelerate", "deepspeed"))
        if word.endswith(".py") or module or (before, word) == ("trl", "sft"):
            return i
    return None


def whole(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"[1-9]\d{0,5}", text) else None


def processes(launcher: list[str], variables: dict[str, str]) -> tuple[int | None, int]:
    """(how many processes a launcher starts, None where only the machine knows; their nodes)"""
    given: dict[str, str] = {}
    for word, after in zip(launcher, [*launcher[1:], ""]):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            given[name.replace("-", "_")] = value or after
    names = " ".join(word.rpartition("/")[2] for word in launcher)
    visible = variables.get("CUDA_VISIBLE_DEVICES", "")
    seen = len(visible.split(",")) if re.fullmatch(r"\d+(,\d+)*", visible) else None
    each, nodes = seen, whole(given.get("nnodes") or given.get("num_nodes") or "1") or 1
    if "torchrun" in names or "torch.distributed" in names:
        each = whole(given.get("nproc_per_node", "1"))
    elif "accelerate" in names:  # counts those of all machines
        return whole(given.get("num_processes")), whole(given.get("num_machines")) or 1
    elif "deepspeed" in names and (include := given.get("include")):
        hosts = [host.partition(":")[2] for host in include.split("@")]
        return (sum(len(host.split(",")) for host in hosts) if all(hosts) else None), len(hosts)
    elif "deepspeed" in names:
        each = whole(given.get("num_gpus")) or seen
    elif "srun" in names:
        return None, 1
    else:  # transformers' Trainer splits a batch over all GPUs that one process sees
        each = 1 if seen in (None, 1) else None
    return (each * nodes if each else None), nodes


def flags(words: list[Word], file: str, ours: bool = False) -> tuple[dict[str, Setting], list]:
    """Flags as settings by name; and pairs of settings of one name, of which the second counts."""
    found: dict[str, Setting] = {}
    place = lambda word: f"{file}:{word.line}" if word.line else file
    repeated, i = [], 0
    while i < len(words):
        word, i = words[i], i + 1
        if re.match(r"\$\{?[@*]", word.text):  # what the script itself is called with
            found["$@"] = Setting("$@", f"{file}:{word.line}", "$@")
        if ours and re.match(r"-[a-z]", word.text):  # a dash is missing
            found[word.text] = Setting(True, place(word), word.text, given=())
        if not word.text.startswith("--") or word.text == "--":
            continue
        name, equals, value = word.text[2:].partition("=")
        values = [value] if equals else []
        end = r"--|\$\{?[@*]" + ("|-[a-z]" if ours else "")
        while not equals and i < len(words) and not re.match(end, words[i].text):
            values.append(words[i].text)
            i += 1
        spelled = name if ours else name.replace("-", "_")
        text, name = f"--{spelled} {' '.join(values)}".strip(), name.replace("-", "_")
        words_given = tuple(values)
        if ours and name.startswith("no_"):
            name, values = name.removeprefix("no_"), ["False"]
        read = [plain(v) for v in values]
        new = Setting(
            True if not read else read[0] if len(read) == 1 else read,
            place(word),
            text,
            given=words_given,
        )
        if name in found:
            repeated.append((found[name], new))
        found[name] = new
    return found, repeated


def kind_of(path: str, words: list[Word]) -> str | None:
    """Whose program it is, by its path and flags; None for one that does not train."""
    names = set(flags(words, "")[0])
    spelled = [w.text[2:].partition("=")[0] for w in words if w.text.startswith("--")]
    # ours are spelled with dashes, those of transformers' scripts hardly ever
    dashed = sum("-" in name for name in spelled) > sum("_" in name for name in spelled)
    theirs = names & (HF - OURS)
    mine = not theirs or dashed and len(names & OURS) >= len(theirs)
    if names & LLAVA_ONLY or re.search(r"llava[/.]train[/.]", path):
        return "llava"
    if path.rpartition("/")[2] == "train.py" and mine:
        return "train.py"
    return "hf" if len(names & HF) >= 2 or path == "sft" else None


WHAT = {
    "llava": "a LLaVA launch script",
    "hf": "a launch script with transformers' flags",
    "train.py": "a train.py command",
}


def read_commands(text: str, source: str, lines: bool = True) -> list[Run]:
    """The training commands of a script or, without `lines` to name, of a command."""
    variables: dict[str, str] = {}
    runs: list[Run] = []
    after: Run | None = None  # the training command just before
    for words in commands(text, source):
        words = [w if lines else Word(w.text, 0) for w in words]
        while words and words[0].text in ("export", "declare", "local", "readonly"):
            words = words[1:]
        local = dict(variables)
        while words and (name := ASSIGNMENT.fullmatch(words[0].text)):
            value = name[2]
            if value.startswith("("):  # an array takes the words up to its closing bracket
                value = " ".join(w.text for w in words)[len(name[1]) + 2 :].rpartition(")")[0]
                words = words[:1]
            local[name[1]] = fill(value, local, source)
            words = words[1:]
        if not words:
            variables = local
            continue
        words = redirected(expand(words, local, source))
        texts = [w.text for w in words]
        if after and texts and texts[0].startswith("--"):
            after.stray += flags(words, source)[0].values()
            continue
        at, after = program(texts), None
        if at is None:
            continue
        kind = kind_of(texts[at], words[at + 1 :])
        if kind is None:
            continue
        found, repeated = flags(words[at + 1 :], source, kind == "train.py")
        after = Run(
            source, kind, WHAT[kind], found, *processes(texts[:at], local), repeated=repeated
        )
        after.trl = kind == "hf" and (
            "sft" in texts[at].rpartition("/")[2] or bool(TRL & found.keys())
        )
        runs.append(after)
    return runs
