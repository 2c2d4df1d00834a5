"""What the system does to the processes that load images, in words of `workers`."""

from llava_min.errors import UserError, label, shorten


def refuse_start(e: OSError, workers: int) -> None:
    """UserError for `e`, raised when the processes were started."""
    raise UserError(
        f"the system starts no more processes ({e.strerror}), and {workers} were asked for; "
        f"lower {label('workers')}, or raise the limit (ulimit -u)",
        "workers",
    ) from None


def check_alive(e: Exception, workers: int) -> None:
    """UserError if `e` is how torch reports that a process was killed; other errors are faults."""
    is_fault = str(e).startswith("Caught ")  # raised in the process, and raised again here
    if isinstance(e, RuntimeError) and "DataLoader worker" not in str(e):
        is_fault = True
    if workers and not is_fault:
        raise UserError(
            f"one of {workers} processes that load images was killed, by the system if memory ran "
            f"out ({type(e).__name__}: {shorten(e, 200)}); lower {label('workers')}, or free "
            "memory or /dev/shm",
            "workers",
        ) from None
