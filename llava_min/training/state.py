"""Where a run is, and what it reads."""

from dataclasses import asdict, dataclass
from typing import Any

from llava_min.checks.training import best_metric_absent
from llava_min.data.dataset import Dataset
from llava_min.data.formats import Record
from llava_min.data.records import SkippedRecords

# The names that checkpoints have for some fields of TrainState.
STORED_NAMES = {
    "last_evaluation": "evaluated",
    "evals_without_improvement": "waited",
    "consecutive_skips": "lost",
}


@dataclass
class TrainState:
    """Where a run is; every checkpoint keeps it."""

    step: int = 0  # optimizer steps done
    last_evaluation: int = -1  # the step of it
    best: float | None = None  # value of `best_metric`, the larger the better
    best_step: int = -1
    evals_without_improvement: int = 0
    skipped: int = 0  # steps with a loss or gradient that is not finite
    consecutive_skips: int = 0  # of them, those since the last good step

    def improves(self, metric: str, scores: dict[str, float]) -> bool:
        """Note an evaluation of this step: whether it is the best so far by `metric`.

        Otherwise it counts for early stopping. Of a loss the smallest is best, of others the
        largest.
        """
        if metric not in scores:
            raise best_metric_absent(metric, scores)
        value = -scores["loss"] if metric == "loss" else scores[metric]
        if self.best is None or value > self.best:
            self.best, self.best_step, self.evals_without_improvement = value, self.step, 0
            return True
        self.evals_without_improvement += 1
        return False

    def forget_best(self) -> None:
        """Start comparing anew; this step counts as not evaluated."""
        self.best, self.best_step = None, -1
        self.evals_without_improvement, self.last_evaluation = 0, -1

    def as_stored(self) -> dict[str, Any]:
        return {STORED_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_stored(cls, stored: dict[str, Any]) -> "TrainState":
        ours = {name: field for field, name in STORED_NAMES.items()}
        return cls(**{ours.get(name, name): value for name, value in stored.items()})


@dataclass
class TrainData:
    """The records of a run."""

    source: str  # files with weights, as `data` names them
    records: list[Record]  # of them
    train: Dataset  # of `records`, without those that are too long
    held_out: list[Record]  # whole, as the questions of the evaluation
    validation: Dataset  # the training view of `held_out`, for its loss
    skips: SkippedRecords | None  # None: a bad record ends the run
