"""How a script runs and ends: exit codes, signals, closed streams, ranks."""

import atexit
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llava_min.errors import UserError, info, shorten

UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class BestEffortStream(io.FileIO):
    """stderr that ignores write errors (closed terminal or pipe)."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def open_streams() -> None:
    """stdout and stderr that never raise for a character, and stderr not at all."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__:
        raw, encoding = BestEffortStream(2, "w", closefd=False), sys.stderr.encoding
        sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", write_through=True)


@contextmanager
def tidy_when_terminated() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP leave by SystemExit, so that processes are ended and what is
    half-written removed. A handler that is there, as that of a training run, stays.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():  # no other may set a handler
        every = (signal.SIGTERM, signal.SIGHUP)
        ours = [number for number in every if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def exit_code_of(error: OSError) -> int:
    """Reports an error of the file system that the user can mend; any other is raised."""
    if error.filename is not None and error.errno in UNREACHABLE:
        info(
            f"error: {shorten(error.filename, 400)}: cannot be reached ({error.strerror}); check "
            "the path and its permissions"
        )
        return 2
    if error.filename is None and error.errno in UNWRITABLE:
        # the interpreter flushes stdout once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 141  # as a shell reports SIGPIPE
        info(f"error: the output cannot be written ({error.strerror}); free space")
        return 2
    raise error


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run a script's main: a user's mistake becomes one line and exit code 2, Ctrl-C 130, a closed
    pipe a quiet end.
    """
    open_streams()
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
        code = exit_code_of(e)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # gloo's threads may still hold a tensor, and the interpreter's own end would abort them
        # (pytorch#179291, #190489)
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
