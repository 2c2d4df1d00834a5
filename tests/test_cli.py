"""Flags from a dataclass: kinds, bounds, recipes, guesses; what is printed cannot drive a terminal."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from llava_min.checks.ranges import Fraction, PositiveFloat, PositiveInt, Seed
from llava_min.errors import UserError, escape_controls, guess, label, preview
from llava_min.util.cli import PathArg, flags, parse
from llava_min.util.script import run


@dataclass
class Knobs:
    files: list[str] = field(default_factory=list)  # what is not a flag
    recipe: str | None = None  # settings by name
    lr: PositiveFloat = 1e-3  # a number above 0
    batch_size: PositiveInt = 4  # rows, 100 % of them
    share: Fraction = 0.5  # from 0 to 1
    mode: Literal["a", "b"] = "a"  # one of two
    betas: tuple[float, ...] = (0.9, 0.999)  # several
    shuffle: bool = True  # a switch
    name: str | None = None  # text
    seed: Seed = 0  # of all
    place: PathArg | None = None  # files


def read(*argv, recipes=None):
    return parse(Knobs, list(argv), "A test.", positional="files", recipes=recipes)


def test_flags_become_fields():
    k = read(
        "one",
        "--lr",
        "2e-4",
        "--batch-size=8",
        "--mode",
        "b",
        "--betas",
        "0.8,0.9",
        "--no-shuffle",
        "two words",
    )
    assert (k.lr, k.batch_size, k.mode, k.betas, k.shuffle, k.files) == (
        2e-4,
        8,
        "b",
        (0.8, 0.9),
        False,
        ["one", "two words"],
    )
    assert read() == Knobs()
    home = os.path.expanduser("~")
    assert (read("--place=~/a,b,~/c").place, read("--name=~/a").name) == (
        f"{home}/a,b,{home}/c",
        "~/a",
    )
    assert read("--", "-dashed.jpg").files == ["-dashed.jpg"]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--lr", "abc"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--lr", "0"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--batch-size", "1.5"], "--batch-size"),
        (["--share", "1.1"], "--share"),
        (["--mode", "c"], "a, b"),
        (["--betas", "0.9,x"], "--betas"),
        (["--shuffle", "False", "--shuffle=False"], "--shuffle"),
        (["--batchsize", "3"], "did you mean --batch-size"),
        (["--lr", "1", "--lr", "2"], "twice"),
        (["--shuffle", "--no-shuffle"], "--no-shuffle: given twice"),
        (["--lr"], "--lr"),
        (["--no-such-thing-at-all"], "see --help"),
        (["--shuffle", "--lr", "-1e-3"], "--lr"),
        (["--seed", str(1 << 63)], "to 2\\*\\*63 - 1"),
        (["--name", ""], "--name: is empty"),
        (["--place", " "], "--place: is empty"),
    ],
)
def test_what_does_not_fit_is_one_line(argv, named):
    with pytest.raises(UserError, match=named) as e:
        read(*argv)
    assert "\n" not in str(e.value)


def test_what_the_system_does_not_let_through_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").symlink_to(tmp_path / "b"), (tmp_path / "b").symlink_to(tmp_path / "a")
    for place in ("x" * 300, str(tmp_path / "a"), f"{tmp_path}," + "x" * 300):
        with pytest.raises(UserError, match="^--place: .* cannot be reached .*check the path"):
            read("--place", place)
    assert read("--place", f"{tmp_path}/none/x,toy:a").place.endswith("toy:a")

    def locked(argv):
        raise PermissionError(errno.EACCES, "Permission denied", "/locked/\x1bx")

    with pytest.raises(SystemExit) as e:
        run(locked)
    assert (
        e.value.code == 2
        and capsys.readouterr().err
        == "error: /locked/\\x1bx: cannot be reached (Permission denied); check the path and its permissions\n"
    )


@pytest.mark.parametrize("size", ["1", "2"])
def test_a_rank_ends_in_order_but_for_the_interpreter(size):
    """Output, exit code and what was registered for the end are there; torch's threads are not
    waited for.
    """
    code = (
        "import atexit, os, sys\nfrom llava_min.util.script import run\nclass Last:\n    def "
        "__del__(self, write=os.write): write(1, b'interpreter ')\n"
        "last = Last()\natexit.register(lambda: os.write(1, b'registered '))\nrun(lambda argv: "
        "print('said', end=' ') or 3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "WORLD_SIZE": size},
    )
    assert done.returncode == 3 and done.stdout.split() == [
        "said",
        "registered",
        *(["interpreter"] if size == "1" else []),
    ], done


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    (tmp_path / "mine.toml").write_text(
        "lr = 0.5\nbatch_size = 2\nbetas = [0.1, 0.2]\nshuffle = false\n"
    )
    k = read("--recipe", "mine", "--lr", "0.25", "--shuffle", recipes=tmp_path)
    assert (k.lr, k.batch_size, k.betas, k.shuffle) == (0.25, 2, (0.1, 0.2), True)
    assert read("--recipe", str(tmp_path / "mine.toml"), recipes=tmp_path).batch_size == 2


@pytest.mark.parametrize(
    "text, named",
    [
        ("lr = 'fast'", "lr"),
        ("batchsize = 3", "did you mean batch_size"),
        ("lr = ", "mine.toml"),
        ("batch_size = 1.5", "batch"),
        ("lr = [1]", "lr"),
        (f"lr = {10**400}", "lr"),
        ("shuffle = 'no'", "shuffle"),
        ("recipe = 'x'", "recipe"),
        ("betas = [[0.9], 0.99]", r"--betas: \[0.9\] is not a number"),
        ("batch_size = 2024-01-01", "--batch-size: datetime.date.* is not a whole number"),
        ("seed = {}", "--seed: {} is not a whole number"),
        ("batch_size = true", "--batch-size: True is not a whole number"),
        ("betas = {}", "--betas"),
        (f"seed = {'9' * 5000}", "mine.toml: .*; correct the file"),
        ("place = [1]", "--place"),
        ("mode = ['a']", "--mode"),
        ("betas = " + "[" * 5000, "mine.toml: .*; correct the file"),
    ],
)
def test_a_recipe_that_does_not_fit_names_the_key(tmp_path, text, named):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=named) as e:
        read("--recipe", "mine", recipes=tmp_path)
    assert "\n" not in str(e.value)


def test_an_unknown_recipe_is_guessed(tmp_path):
    (tmp_path / "pretrain.toml").write_text("lr = 1.0")
    with pytest.raises(UserError, match="did you mean pretrain"):
        read("--recipe", "pretran", recipes=tmp_path)


def test_many_names_are_shown_by_the_first_and_counted():
    names = [f"layer.{i}" for i in range(7)]
    assert preview(names[:2], ", ") == "layer.0, layer.1"
    assert preview(iter(names), ", ", 3) == "layer.0, layer.1, layer.2, and 4 more"
    assert preview(names) == "layer.0 | layer.1 | layer.2 | layer.3 | layer.4 | and 2 more"
    assert preview(["a\x1b[31m", "b" * 999], ", ") == r"a\x1b[31m, " + "b" * 280 + "…"


def test_a_guess_is_the_nearest_or_what_else_to_do():
    assert guess("top-k", ["top_k", "top_p"], "see --help") == "did you mean top_k?"
    assert guess("zzz", ["top_k", "top_p"], "see --help") == "see --help"


def test_help_shows_comments_and_defaults(capsys):
    with pytest.raises(SystemExit) as e:
        read("--help")
    out = capsys.readouterr().out
    assert (
        e.value.code == 0
        and "rows, 100 % of them (4)" in out
        and "--no-shuffle" in out
        and "{a,b}" in out
    )


@dataclass
class Named:
    images: list[str] = field(default_factory=list)  # positional
    batch_size: int = 4  # rows
    template: str | None = None  # not given
    eval_metrics: tuple[str, ...] = ("x",)  # in a script that has no --metrics
    out: str = "run"  # a folder that may be called like a flag


@pytest.mark.parametrize(
    "config, field, said",
    [
        (Named(), "batch_size", "--batch-size: 0 was given; give one"),
        (Named(), "metrics", "--eval-metrics: 0 was given; give one"),  # in a script without it
        (Named(), "eval_metrics", "--eval-metrics: 0 was given; give one"),
        (Named(), "template", "--template: 0 was given; give one"),  # also where it was not given
        (Named(), "batch_sizes", "batch_sizes: 0 was given; give one"),
        (Named(out="template", template="x"), "template", "--template: 0 was given; give one"),
    ],
)
def test_an_error_about_an_argument_names_its_flag_in_a_script(config, field, said):
    with flags(config):
        assert str(UserError("0 was given; give one", field)) == said
        assert label(field) == said.partition(":")[0]
        for line in ("batch_size: two", "/x/out: is full", "template: exists"):  # about no argument
            assert str(UserError(line)) == line
    error = UserError("0 was given; give one", field)
    assert str(error) == f"{field}: 0 was given; give one" and error.field == field


def test_printable_escapes_what_drives_a_terminal():
    assert escape_controls("a\x1b]52;c;x\x07\u202eb\r\n") == "a\\x1b]52;c;x\\x07\\u202eb\\r\\n"
    assert escape_controls("é 猫 🙂") == "é 猫 🙂"


def test_a_switch_takes_no_value():
    with pytest.raises(UserError, match="False: belongs to no option; a switch takes no value"):
        parse(Switches, ["--shuffle", "False"], "A test.")


@dataclass
class Switches:
    shuffle: bool = True  # a switch


def test_help_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        read("--help")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "1>/dev/full"])
def test_closed_streams_are_no_fault(tmp_path, closed):
    page = tmp_path / "page.py"
    page.write_text(
        "import sys\nfrom llava_min.errors import info\nfrom llava_min.util.script import "
        "run\n\n\ndef main(argv):\n    "
        "print(sys.stderr.isatty())\n    info('told')\n\n\nrun(main)\n"
    )
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} {page} {closed}"], capture_output=True, text=True
    )
    assert done.returncode == (2 if "full" in closed else 0) and "Traceback" not in done.stderr
    assert "full" not in closed or done.stderr.endswith(
        "error: the output cannot be written (No space left on device); free space\n"
    )


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("--x: \x1b[2J was given"), 2, "error: --x: \\x1b[2J was given\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (None, 0, ""),
    ],
)
def test_how_a_script_ends(error, code, said, capsys):
    def main(argv):
        if error:
            raise error

    with pytest.raises(SystemExit) as e:
        run(main)
    assert (e.value.code, capsys.readouterr().err) == (code, said)


def test_a_closed_pipe_is_a_quiet_end(tmp_path):
    page = tmp_path / "page.py"
    page.write_text(
        "import sys\nfrom llava_min.util.script import run\n\n\ndef main(argv):\n    "
        "sys.stdin.read()\n    print('told')\n\n\nrun(main)\n"
    )
    pipe = subprocess.PIPE
    script = subprocess.Popen(
        [sys.executable, page],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    script.stdout.close()
    script.stdin.close()
    assert (script.stderr.read(), script.wait()) == (b"", 141)


def test_the_ends_of_a_range_belong_to_it():
    k = read("--share", "1", "--batch-size", "1", "--seed", str((1 << 63) - 1))
    assert (k.share, k.batch_size, k.seed, read("--share", "0").share) == (1, 1, (1 << 63) - 1, 0)


@dataclass
class Reading:
    recipe: str | None = None  # settings by name
    data: str | None = None  # what is read
    image_folder: str | None = None  # of the data
    eval_data: str | None = None  # beside it
    epochs: int = 1  # of any


def test_what_goes_with_the_data_of_a_recipe_does_not_go_with_another(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'data = "a"\nimage_folder = "b"\neval_data = "c"\nepochs = 2\n'
    )
    get = lambda *argv: parse(Reading, ["--recipe", "mine", *argv], "A test.", recipes=tmp_path)
    assert get("--epochs", "3") == Reading("mine", "a", "b", "c", 3)
    assert get("--data", "x") == Reading("mine", "x", epochs=2)
    assert get("--data", "x", "--eval-data", "y") == Reading("mine", "x", eval_data="y", epochs=2)
