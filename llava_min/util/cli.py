"""What every script shares: flags from a dataclass, errors a user can act on, text that is safe to
print, regexes that are safe to run.

A script's knobs are the fields of a dataclass: the name is the flag, the annotation its kind, the
trailing comment its help. Nothing heavy is imported here, so `--help` and a mistyped flag answer at
once.
"""

import argparse
import atexit
import dataclasses
import difflib
import errno
import functools
import inspect
import io
import math
import os
import re
import shutil
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from llava_min.errors import UserError, escape_controls, info, set_labels, shorten

UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


@contextmanager
def flags(knobs: Any) -> Iterator[None]:
    """Within, the library's lines that begin with a keyword, `device: …`, begin with the flag that
    was typed, `--device: …`.

    The flags are the fields of `knobs` that have a value; `--eval-x` stands for the keyword x, too,
    where there is no --x.
    """
    given = {
        name: value
        for name, value in vars(knobs).items()
        if value is not None and not isinstance(value, list)
    }
    # a file may be called so
    named = {
        name: "--" + name.replace("_", "-")
        for name in given
        if name not in map(str, given.values())
    }
    every = {name: "--" + name.replace("_", "-") for name in vars(knobs)}
    set_labels(
        {name.removeprefix("eval_"): flag for name, flag in every.items()} | every,
        {name.removeprefix("eval_"): flag for name, flag in named.items()} | named,
    )
    try:
        yield
    finally:
        set_labels({})


def is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def is_quick(text: str, repetitions: int, length: int = 200) -> bool:
    """Whether a regex is soon through with a name: a stranger's could run for ever. No group may be
    repeated.
    """
    many = len(re.findall(r"[*+{]|(?<![*+}(])\?", text))  # the ? of *? and of (?: repeats nothing
    return len(text) <= length and many <= repetitions and not re.search(r"\)[*+?{]", text)


class BestEffortStream(io.FileIO):
    """A stream that nobody need read: what was lost with the terminal or the pipe is no reason to
    stop.
    """

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run a script's main: a user's mistake becomes one line and exit code 2, Ctrl-C 130, a closed
    pipe a quiet end.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell closed it
            setattr(sys, name, open(os.devnull, "w"))
        # a terminal that cannot show a character is no reason to stop
        getattr(sys, name).reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(
            BestEffortStream(2, "w", closefd=False),
            sys.stderr.encoding,
            "backslashreplace",
            write_through=True,
        )
    try:
        code = main(sys.argv[1:]) or 0
        print(end="", flush=True)
    except UserError as e:
        info(f"error: {e}")
        code = 2
    except KeyboardInterrupt:
        info("stopped")
        code = 130
    except OSError as e:
        code = 2
        if e.filename is not None and e.errno in UNREACHABLE:
            info(
                f"error: {shorten(e.filename, 400)}: cannot be reached ({e.strerror}); check the "
                "path and its permissions"
            )
        elif e.filename is None and e.errno in (
            errno.EPIPE,
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
        ):
            # the interpreter flushes once more on its way out
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if e.errno == errno.EPIPE:
                code = 141
            else:
                info(f"error: the output cannot be written ({e.strerror}); free space")
        else:
            raise
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # gloo's threads may hold a tensor still, and the end of the interpreter would abort them
        # (pytorch#179291, #190489)
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# Kinds of numbers: the annotation of a knob says what it may be.
PositiveInt = Annotated[int, 1, 1 << 31]
NonNegativeInt = Annotated[int, 0, 1 << 31]
Seed = Annotated[int, 0, (1 << 63) - 1]
PositiveFloat = Annotated[float, 1e-30, 1e30]
NonNegativeFloat = Annotated[float, 0.0, 1e30]
Fraction = Annotated[float, 0.0, 1.0]
# a path, or several with commas between; of --name=~/x the shell leaves the ~ to us
PathArg = Annotated[str, "~"]


def convert(flag: str, kind: Any, value: Any) -> Any:
    """A flag's text or a recipe's value as `kind`, or UserError."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # X | None
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return tuple(convert(flag, typing.get_args(kind)[0], item) for item in items)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(
                f"{flag}: {value!r} is not one of {', '.join(map(str, typing.get_args(kind)))}; "
                "choose one"
            )
        return value
    if kind == PathArg:
        places = [os.path.expanduser(place) for place in convert(flag, str, value).split(",")]
        for place in places:
            try:
                os.stat(place)
            except (
                FileNotFoundError,
                NotADirectoryError,
            ):  # as a hub id, or what is still to be written
                continue
            except (OSError, ValueError) as e:
                why = getattr(e, "strerror", None) or escape_controls(e)
                raise UserError(
                    f"{flag}: {shorten(place, 400)} cannot be reached ({why}); check the path and "
                    "its permissions"
                ) from None
        return ",".join(places)
    low, high = -math.inf, math.inf
    if typing.get_origin(kind) is Annotated:
        kind, low, high = typing.get_args(kind)
    if kind in (int, float):
        try:
            number = (
                kind(value)
                if not isinstance(value, bool) and not (kind is int and isinstance(value, float))
                else None
            )
        except (ValueError, TypeError, OverflowError):
            number = None
        name = {int: "a whole number", float: "a number"}[kind]
        if number is None or not low <= number <= high or not math.isfinite(number):
            bounds = ""
            if low > -math.inf:
                bounds = (
                    f" from {low:g} up" if high in (1 << 31, 1e30) else f" from {low:g} to {high:g}"
                )
            raise UserError(f"{flag}: {value!r} is not {name}{bounds}; give one")
        return number
    if not isinstance(value, kind):
        raise UserError(
            f"{flag}: {value!r} is not {'true or false' if kind is bool else 'text'}; correct it"
        )
    if kind is str and not value.strip():
        raise UserError(f"{flag}: is empty; give a value, or leave it out")
    return value


class Once(argparse.Action):
    def __call__(self, parser, namespace, value, option=None):
        parser.once(self.dest, option)
        setattr(namespace, self.dest, value)


class Switch(argparse.BooleanOptionalAction):
    def __call__(self, parser, namespace, value, option=None):
        parser.once(self.dest, option)
        super().__call__(parser, namespace, value, option)


class Parser(argparse.ArgumentParser):
    """argparse with errors in our form, a guess for a mistyped flag, and no flag given twice."""

    def __init__(self, **other):
        width = min(shutil.get_terminal_size().columns, 100)
        layout = lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=width)
        super().__init__(allow_abbrev=False, formatter_class=layout, **other)
        self.seen: set[str] = set()
        # argparse's own lacks the exponent
        self._negative_number_matcher = re.compile(
            r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE
        )

    def once(self, name: str, option: str | None) -> None:
        if name in self.seen:
            raise UserError(f"{option}: given twice; give it once")
        self.seen.add(name)

    def error(self, message: str):
        if unknown := re.search(r"unrecognized arguments: (--?[^\s=]+)", message):
            near = difflib.get_close_matches(
                unknown[1], self._option_string_actions, n=1, cutoff=0.7
            )
            message = f"{unknown[1]}: no such option; " + (
                f"did you mean {near[0]}?" if near else "see --help"
            )
        elif stray := re.match(r"unrecognized arguments: (\S+)", message):
            message = f"{stray[1]}: belongs to no option; a switch takes no value (--name or --no-name), see --help"
        else:
            message = message.removeprefix("argument ") + "; see --help"
        raise UserError(message)


def comments(knobs: type) -> dict[str, str]:
    """The trailing comment of each field of a dataclass."""
    return {
        m[1]: m[2]
        for line in inspect.getsource(knobs).splitlines()
        if (m := re.match(r"    (\w+):[^#]*#\s*(.*)", line))
    }


def parse(
    knobs: type,
    argv: list[str],
    description: str,
    positional: str | None = None,
    recipes: Path | None = None,
) -> Any:
    """`argv` as an instance of the dataclass `knobs`; flags win over the recipe, the recipe over
    the defaults.

    `positional` names a field of type list that takes what is not a flag. Raises UserError for
    whatever does not fit.
    """
    help_of, kinds = comments(knobs), typing.get_type_hints(knobs, include_extras=True)
    parser = Parser(description=description)
    parser.register("action", "once", Once)
    if positional:
        parser.add_argument(
            positional,
            nargs="*",
            metavar=positional.upper().rstrip("S"),
            help=help_of.get(positional),
        )
    for f in dataclasses.fields(knobs):
        if f.name == positional:
            continue
        flag, text = "--" + f.name.replace("_", "-"), help_of.get(f.name, "").replace("%", "%%")
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        default = "" if f.default in (None, "", dataclasses.MISSING) else f" ({default})"
        if kinds[f.name] is bool or kinds[f.name] == bool | None:
            parser.add_argument(flag, action=Switch, default=None, help=text)
        else:
            choices = (
                typing.get_args(kinds[f.name])
                if typing.get_origin(kinds[f.name]) is Literal
                else None
            )
            meta = "{" + ",".join(map(str, choices)) + "}" if choices else "X"
            parser.add_argument(
                flag, action="once", default=None, metavar=meta, help=text + default
            )
    # what follows -- may begin with a dash
    cut = argv.index("--") if positional and "--" in argv else len(argv)
    given = {
        k: v
        for k, v in vars(parser.parse_intermixed_args(argv[:cut])).items()
        if v is not None and v != []
    }
    if cut < len(argv):
        given[positional] = given.get(positional, []) + argv[cut + 1 :]
    if recipes is not None and (name := given.get("recipe", getattr(knobs, "recipe", None))):
        recipe = read_recipe(name, recipes, kinds)
        if "data" in given:  # what goes with the recipe's own data does not go with another
            recipe = {k: v for k, v in recipe.items() if k not in ("image_folder", "eval_data")}
        given = {**recipe, **given}
    return knobs(
        **{
            k: v if k == positional else convert("--" + k.replace("_", "-"), kinds[k], v)
            for k, v in given.items()
        }
    )


def read_recipe(name: str, folder: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe: a name of `folder`, or the path of a .toml file."""
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.toml"))
        near = difflib.get_close_matches(name, names, n=1)
        mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"--recipe {escape_controls(name)}: no such recipe or .toml file; {mend}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (
        ValueError,
        RecursionError,
        OSError,
    ) as e:  # not TOML, not UTF-8, a number of 5000 digits
        raise UserError(f"{path}: {escape_controls(e)}; correct the file") from None
    for key in data:
        if key not in kinds or key == "recipe":
            near = difflib.get_close_matches(key, kinds, n=1)
            raise UserError(
                f"{path}: {escape_controls(key)} is not a setting; "
                + (f"did you mean {near[0]}?" if near else "see --help")
            )
    return data
