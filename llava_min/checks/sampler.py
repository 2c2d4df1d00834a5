"""Plans that cannot be made: too few records for a step, or more rows than any run has."""

from llava_min.errors import UserError, label

MAX_ROWS = 100_000_000  # rows of a run: more is a slip, and its plan has no room in memory


def check_grouping(group_by_length: bool, packing: int) -> None:
    if group_by_length and packing:
        raise UserError(
            f"with {label('packing')} there is no padding to save; choose one of them",
            "group_by_length",
        )


def check_step(
    records: int, rows: int, batch_size: int, grad_accum: int, world: int, packing: int
) -> None:
    """`rows` of an epoch fill at least one step, or UserError."""
    step = batch_size * grad_accum * world
    if rows < step:
        what = f"{records} records" + (f", {rows} rows when packed," if packing else "")
        raise UserError(
            f"{what} are fewer than the {step} rows of one step (batch size {batch_size} × "
            f"accumulation {grad_accum} × ranks {world}); lower it or {label('grad_accum')}, or "
            "give more data",
            "batch_size",
        )


def check_run(epochs: float, max_steps: int, rows_of_epoch: int, rows_of_step: int) -> None:
    """A run has at most MAX_ROWS rows, or UserError."""
    rows = max_steps * rows_of_step if max_steps else epochs * rows_of_epoch
    if rows > MAX_ROWS:
        given = f"{max_steps} steps" if max_steps else f"{epochs:g} epochs"
        raise UserError(
            f"{given} would be {rows:.3g} rows, more than {MAX_ROWS}; lower it",
            "max_steps" if max_steps else "epochs",
        )
