"""Flags from a dataclass: a field's name is the flag, its annotation the kind, its trailing comment
the help. Recipes are .toml files with the same names.

Nothing heavy is imported, so `--help` and a mistyped flag answer at once.
"""

import argparse
import dataclasses
import inspect
import os
import re
import shutil
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from llava_min.checks.ranges import check_number, not_none, range_of
from llava_min.errors import UserError, escape_controls, guess, set_labels, shorten

# a path, or several with commas between; the shell does not expand ~ in --name=~/x
PathArg = Annotated[str, "~"]


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


@contextmanager
def flags(config: Any, **same: str) -> Iterator[None]:
    """Within, messages about a field of `config` name its flag: `--device: …` for `device: …`.

    `--eval-x` is the flag of the library's argument x, where there is no --x; same: other arguments
    of the library that have a field under another name. What `load` calls source is --model, or
    MODEL where it is no flag.
    """
    every = {name: flag_of(name) for name in vars(config)}
    every["source"] = every.get("model", "MODEL")
    every |= {name: flag_of(field) for name, field in same.items()}
    before = set_labels({n.removeprefix("eval_"): flag for n, flag in every.items()} | every)
    try:
        yield
    finally:
        set_labels(before)


def break_command(start: str, flags: Iterable[str], width: int) -> list[str]:
    """A command in lines of at most `width`, broken between flags, a `\\` at the end of each."""
    out = [start]
    for flag in flags:
        if len(out[-1]) + len(flag) + 3 > width:
            out[-1] += " \\"
            out.append("    " + flag)
        else:
            out[-1] += " " + flag
    return out


# ---- a value


def expand(flag: str, value: str) -> str:
    """Paths with ~ expanded; what exists must be reachable."""
    places = [os.path.expanduser(place) for place in value.split(",")]
    for place in places:
        try:
            os.stat(place)
        except (FileNotFoundError, NotADirectoryError):  # a hub id, or a file still to be written
            continue
        except (OSError, ValueError) as e:
            why = getattr(e, "strerror", None) or escape_controls(e)
            raise UserError(
                f"{flag}: {shorten(place, 400)} cannot be reached ({why}); check the path and its "
                "permissions"
            ) from None
    return ",".join(places)


def to_number(flag: str, kind: Any, value: Any) -> int | float:
    base, _ = range_of(kind)
    try:
        # neither true nor 1.5 is an integer
        exact = not isinstance(value, bool) and not (base is int and isinstance(value, float))
        number = base(value) if exact else None
    except (ValueError, TypeError, OverflowError):
        number = None
    if number is None:
        noun = {int: "a whole number", float: "a number"}[base]
        raise UserError(f"{flag}: {value!r} is not {noun}; give one")
    return check_number(number, kind, flag)


def convert(flag: str, kind: Any, value: Any) -> Any:
    """A flag's text or a recipe's value as `kind`, or UserError."""
    if value is None and not_none(kind) is not kind:
        return None
    kind = not_none(kind)
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return tuple(convert(flag, typing.get_args(kind)[0], item) for item in items)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            names = ", ".join(map(str, choices))
            raise UserError(f"{flag}: {value!r} is not one of {names}; choose one")
        return value
    if kind == PathArg:
        return expand(flag, convert(flag, str, value))
    if range_of(kind):
        return to_number(flag, kind, value)
    if not isinstance(value, kind):
        noun = "true or false" if kind is bool else "text"
        raise UserError(f"{flag}: {value!r} is not {noun}; correct it")
    if kind is str and not value.strip():
        raise UserError(f"{flag}: is empty; give a value, or leave it out")
    return value


# ---- the command line


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
        # argparse's own has no exponent
        number = r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$"
        self._negative_number_matcher = re.compile(number, re.IGNORECASE)

    def once(self, name: str, option: str | None) -> None:
        if name in self.seen:
            raise UserError(f"{option}: given twice; give it once")
        self.seen.add(name)

    def error(self, message: str):
        if unknown := re.search(r"unrecognized arguments: (--?[^\s=]+)", message):
            fix = guess(unknown[1], self._option_string_actions, "see --help", cutoff=0.7)
            raise UserError(f"{unknown[1]}: no such option; {fix}")
        if stray := re.match(r"unrecognized arguments: (\S+)", message):
            raise UserError(
                f"{stray[1]}: belongs to no option; a switch takes no value (--name or --no-name), "
                "see --help"
            )
        raise UserError(message.removeprefix("argument ") + "; see --help")


def comments(config: type) -> dict[str, str]:
    """The trailing comment of each field of a dataclass, inherited ones too."""
    found = {}
    for cls in reversed(config.__mro__[:-1]):
        for line in inspect.getsource(cls).splitlines():
            if m := re.match(r"    (\w+):[^#]*#\s*(.*)", line):
                found[m[1]] = m[2]
    return found


def add_flag(parser: Parser, f: dataclasses.Field, kind: Any, text: str) -> None:
    default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
    kind = not_none(kind)
    if kind is bool:
        parser.add_argument(flag_of(f.name), action=Switch, default=None, help=text)
        return
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else "X"
    if default not in (None, "", dataclasses.MISSING):
        text += f" ({default})"
    parser.add_argument(flag_of(f.name), action="once", default=None, metavar=metavar, help=text)


def parse(
    config: type,
    argv: list[str],
    description: str,
    positional: str | None = None,
    recipes: Path | None = None,
) -> Any:
    """`argv` as an instance of the dataclass `config`; flags win over the recipe, the recipe over
    the defaults. Raises UserError for whatever does not fit.

    positional: a field of type list that takes the arguments that are not flags. recipes: the
    folder of the recipes that --recipe names.
    """
    help_of, kinds = comments(config), typing.get_type_hints(config, include_extras=True)
    parser = Parser(description=description)
    parser.register("action", "once", Once)
    if positional:
        metavar = positional.upper().rstrip("S")
        parser.add_argument(positional, nargs="*", metavar=metavar, help=help_of.get(positional))
    # a class's own flags before those it inherits
    own = inspect.get_annotations(config)
    for f in sorted(dataclasses.fields(config), key=lambda f: f.name not in own):
        if f.name != positional:
            text = help_of.get(f.name, "").replace("%", "%%")
            add_flag(parser, f, kinds[f.name], text)

    # arguments after -- may begin with a dash
    end = argv.index("--") if positional and "--" in argv else len(argv)
    typed = vars(parser.parse_intermixed_args(argv[:end]))
    given = {name: value for name, value in typed.items() if value is not None and value != []}
    if end < len(argv):
        given[positional] = given.get(positional, []) + argv[end + 1 :]

    if positional and not all(text.strip() for text in given.get(positional, [])):
        raise UserError(f"{metavar}: is empty; give a value, or leave it out")

    if recipes is not None and (name := given.get("recipe", getattr(config, "recipe", None))):
        recipe = read_recipe(name, recipes, kinds)
        if "data" in given:  # the companions of the recipe's own data do not fit another file
            recipe = {k: v for k, v in recipe.items() if k not in ("image_folder", "eval_data")}
        given = recipe | given
    for name, value in given.items():
        if name != positional:
            given[name] = convert(flag_of(name), kinds[name], value)
    # the checks of the dataclass itself name the flags, too
    with flags(types.SimpleNamespace(**dict.fromkeys(kinds, ""))):
        return config(**given)


def read_recipe(name: str, folder: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe: a name of `folder`, or the path of a .toml file."""
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.toml"))
        fix = guess(name, names, f"there are {', '.join(names)}")
        raise UserError(f"--recipe {escape_controls(name)}: no such recipe or .toml file; {fix}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    # not TOML, not UTF-8, a number of 5000 digits
    except (ValueError, RecursionError, OSError) as e:
        raise UserError(f"{path}: {escape_controls(e)}; correct the file") from None
    for key in data:
        if key not in kinds or key == "recipe":
            fix = guess(key, kinds, "see --help")
            raise UserError(f"{path}: {escape_controls(key)} is not a setting; {fix}")
    return data
