"""What a run reports about its steps: progress, skipped steps, evaluations."""

import time
from collections.abc import Sequence

from torch import Tensor

from llava_min.data.formats import Record
from llava_min.data.records import count_records
from llava_min.data.sampler import Step, records_of
from llava_min.errors import shorten
from llava_min.parallel.ranks import World, all_reduce_sum
from llava_min.training.log import Log, peak_memory


class Progress:
    """Counts what the ranks do between two progress lines, and words the lines of `log`."""

    def __init__(self, log: Log, world: World, records: Sequence[Record], plan: list[Step]):
        self.log, self.world, self.records, self.plan = log, world, records, plan
        self.reset()

    def reset(self) -> None:
        self.seconds, self.tokens, self.images = 0.0, 0, 0

    def start(self, data: str, model: str, rows: int, place: str) -> None:
        """The first line: `data` and `model` are hashes, `rows` those of one step."""
        self.log.say(
            f"data {data[:12]}, model {model[:12]}: {count_records(self.records)}, "
            f"{len(self.plan)} steps of {rows} rows, into {place}"
        )

    def step_started(self) -> None:
        self.started = time.perf_counter()

    def count(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """Add this rank's micro-batches of a step, and the time since it started."""
        self.seconds += time.perf_counter() - self.started
        self.tokens += sum(batch["input_ids"].numel() for batch in batches)
        self.images += sum(len(batch.get("pixel_values", ())) for batch in batches)

    def line(self, step: int, **values: float) -> None:
        """Log the numbers of a step, with the speed of all ranks since the last line."""
        tokens, images = all_reduce_sum(self.world, self.tokens, self.images)
        self.log.step(
            step,
            **values,
            tokens_per_s=tokens / self.seconds,
            pictures_per_s=images / self.seconds,
            peak_gb=peak_memory(self.world.device),
        )
        self.reset()

    def skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """A warning that step `step` (from 1) changed no weight."""
        ids = [self.records[i].id for i in records_of(self.plan[step - 1])]
        self.log.write(step=step, skipped=ids)
        self.log.say(
            f"warning: step {step}: loss {loss:.3g} and gradient norm {grad_norm:.3g}; no weight "
            f"was changed; records {self.record_ids(step)}"
        )

    def evaluation(
        self, step: int, scores: dict[str, float], rows: Sequence[dict], remarks: Sequence[str]
    ) -> None:
        """The scores of an evaluation after `step` steps, and a line for each remark on them."""
        self.log.write(
            step=step,
            **{f"eval_{name}": value for name, value in scores.items()},
            eval_cut_answers=sum(row.get("stopped") == "limit" for row in rows),
            **({"remarks": list(remarks)} if remarks else {}),
        )
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.log.say(f"step {step}: {shown} on {len(rows)} held-out records")
        for remark in remarks:
            self.log.say(f"step {step}: {remark}")

    def record_ids(self, step: int) -> str:
        """The first records of step `step` (from 1), for a message."""
        ids = [self.records[i].id for i in records_of(self.plan[step - 1])[:8]]
        return ", ".join(map(shorten, ids))
