"""The run around the loop of train.py: when to save, evaluate, skip and stop.

`Run` does everything but forward, backward and update. All ranks call its methods at the same step;
what one rank alone knows (a signal, a due checkpoint, a bad record) they share before acting on it.
"""

import math
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_min.checks.training import ended_with_skips, no_supervised_token, too_many_skips
from llava_min.data.loader import loader
from llava_min.data.sampler import Step
from llava_min.errors import Interrupted, UserError, label
from llava_min.evaluation.predict import on_held_out
from llava_min.parallel.ranks import World, all_gather, all_reduce_sum
from llava_min.report import write_run_report
from llava_min.training.batch_size import count_supervised, out_of_memory
from llava_min.training.log import Log, show_samples
from llava_min.training.loss import autocast, summed_loss
from llava_min.training.optim import LossScale
from llava_min.training.progress import Progress
from llava_min.training.random_state import reseed
from llava_min.training.result import Result
from llava_min.training.run_folder import resume
from llava_min.training.saver import Saver, check_space, epoch_ends
from llava_min.training.signals import Signals
from llava_min.training.state import TrainData, TrainState
from llava_min.training.trainable import check_gradients
from llava_min.util.files import write_json

Batches = Sequence[dict[str, Tensor]]  # the micro-batches of one rank's step


class Run:
    """One rank's part of a run into the folder `out`.

    plan: the steps, as `sampler.plan` gives them. result: the loaded model, and how it is stored.
    resumed: the checkpoint to continue from, which has to be of the same `identity`.
    """

    def __init__(
        self,
        config: Any,
        world: World,
        signals: Signals,
        out: Path,
        data: TrainData,
        plan: list[Step],
        result: Result,
        optimizer: torch.optim.Optimizer,
        scaler: LossScale,
        identity: dict[str, Any],
        resumed: Path | None,
    ):
        self.config, self.world, self.signals, self.out = config, world, signals, out
        self.data, self.plan, self.result, self.model = data, plan, result, result.model
        self.optimizer, self.scaler, self.identity = optimizer, scaler, identity
        self.compute_loss = partial(summed_loss, self.model, result.dtype, world.device)
        self.state, self.gradients_checked, is_first = TrainState(), False, world.rank == 0

        # random streams and state: fresh, or those of the checkpoint
        reseed(config.seed, 0, world.rank)
        if resumed:
            self.resume(resumed)
        start = self.state.step if resumed else -1
        ends, best_step = epoch_ends(plan, len(data.train)), self.state.best_step
        self.saver = Saver(out, world, config.save_every, config.keep, ends, start, best_step)

        # the run folder and the log, which rank 0 alone writes
        settings = asdict(config) | {
            "out": str(out),
            "ranks": world.size,
            "image_aspect_ratio": result.processor.image_config.aspect,
            "template": result.processor.template_name,
        }
        if is_first and config.save_every != "0":
            check_space(out, self.model, config.save_only_model)
        if is_first:
            write_json(out / "config.json", settings)
        self.log = Log(out if is_first else None, len(plan), start, config.log, settings)
        self.progress = Progress(self.log, world, data.train.records, plan)
        self.progress.start(
            identity["training data"],
            identity["base model"],
            config.batch_size * config.grad_accum * world.size,
            f"{out}, continuing from step {start}" if resumed else str(out),
        )
        self.batches = loader(
            data.train,
            [micro for step in plan[self.state.step :] for micro in step[world.rank]],
            config.workers,
            packing=config.packing,
            skip=True,
            pin_memory=world.device.type == "cuda",
        )

    def resume(self, checkpoint: Path) -> None:
        """Restore weights, optimizer, random streams and the state of the run."""
        args = (self.model, self.optimizer, self.world, self.config.seed)
        saved = resume(checkpoint, self.identity, *args)
        self.state = TrainState.from_stored(saved["at"])
        vars(self.scaler).update(saved["scale"])
        if checkpoint.parent != (self.out / "checkpoints").resolve():
            # the best checkpoint stays in the other run's folder
            self.state.forget_best()

    # ---- one step

    def finished(self) -> bool:
        patience, waited = self.config.early_stopping, self.state.evals_without_improvement
        return self.state.step >= len(self.plan) or 0 < patience <= waited

    def next_batches(self) -> tuple[Batches, float]:
        """The rank's micro-batches of the next step, and the supervised tokens of all ranks.

        Before it returns, it saves if a checkpoint is due, and stops or raises if a signal came or
        a record is bad.
        """
        step = self.state.step
        self.progress.step_started()
        # on one rank a signal need not wait for a slow disk; on several, the others wait for this
        with self.signals.interruptible(self.world.size == 1):
            micro_batches = self.plan[step][self.world.rank]
            batches, errors = zip(*(next(self.batches) for _ in micro_batches))
        errors = sum(errors, [])
        save_due = self.world.rank == 0 and self.saver.is_due(step)

        # one exchange for all that the ranks decide together
        num_tokens = sum(map(count_supervised, batches))
        num_tokens, stop, save_due, num_errors = all_reduce_sum(
            self.world, num_tokens, self.signals.requested, save_due, len(errors)
        )
        is_fatal = num_errors and not self.data.skips
        if save_due or is_fatal and step > 0 and self.saver.needs_save(step):
            self.save()
        if stop:
            raise Interrupted
        if num_errors:
            self.skip_records(sum(all_gather(self.world, errors), []))
        if not num_tokens:
            raise no_supervised_token(step + 1, self.progress.record_ids(step + 1))
        return batches, num_tokens

    def skip_records(self, errors: list[str]) -> None:
        if not self.data.skips:
            raise UserError(errors[0])
        self.data.skips.add(errors)
        self.data.skips.write()

    def check_gradients(self) -> None:
        """Before the first update: every trainable parameter has a gradient, and no other."""
        if not self.gradients_checked:
            check_gradients(self.model)
            self.gradients_checked = True

    def count_skip(self, loss: float) -> None:
        """Count a step without an update, unless fp16 is only searching for its loss scale."""
        if not self.scaler.searching or not math.isfinite(loss):
            self.state.skipped += 1
            self.state.consecutive_skips += 1

    def step_done(
        self, updated: bool, loss: float, lr: float, grad_norm: float, batches: Batches
    ) -> None:
        """Count the step and report it, then evaluate if that is due."""
        config, state = self.config, self.state
        state.step += 1
        if updated:
            state.consecutive_skips = 0
        else:
            self.progress.skipped(state.step, loss, grad_norm)
        if state.skipped >= config.max_skips:
            ids, other = self.progress.record_ids(state.step), "fp32"
            if self.scaler.enabled:  # in fp16
                other = "bf16"
            raise too_many_skips(state.step, state.skipped, ids, other, self.last_checkpoint())
        self.progress.count(batches)
        is_last = state.step == len(self.plan)
        if config.log_every and (state.step % config.log_every == 0 or is_last):
            self.progress.line(state.step, loss=loss, lr=lr, grad_norm=grad_norm)
        self.evaluate_if_due()

    # ---- evaluation

    def evaluate_if_due(self) -> None:
        """Before the first step, every `eval_every` steps, and after the last."""
        step, every = self.state.step, self.config.eval_every
        if not self.data.held_out or self.diverged() or self.state.last_evaluation >= step:
            return
        if step in (0, len(self.plan)) or every > 0 and step % every == 0:
            self.evaluate()

    def evaluate(self) -> None:
        """Loss, answers and metrics on the held-out records; saves if they are the best so far."""
        config, data, step = self.config, self.data, self.state.step
        # on several ranks, or with FSDP's hooks, a signal waits for a point that all ranks reach
        may_interrupt = self.world.size == 1 and not config.cpu_offload
        precision = autocast(self.world.device, self.result.dtype)
        with self.signals.interruptible(may_interrupt), precision:
            scores, rows, remarks = on_held_out(
                self.model,
                data.validation,
                data.held_out,
                self.compute_loss,
                self.world,
                config.eval_metrics,
                config.eval_batch_size,
                lambda: self.signals.requested,
                num_beams=config.num_beams,
                max_new_tokens=config.max_new_tokens,
            )
        self.progress.evaluation(step, scores, rows, remarks)
        self.log.samples(step, rows[: config.samples], data.held_out)
        if self.world.rank == 0:
            write_run_report(self.out)
        self.state.last_evaluation = step
        if config.best_metric and self.state.improves(config.best_metric, scores):
            self.save()

    # ---- save and stop

    def save(self) -> None:
        """Write a checkpoint of this step. All ranks call this."""
        model, optimizer, more = self.model, self.optimizer, {}
        if self.config.save_only_model:
            optimizer = None
        if self.result.kind == "adapter":
            more["adapter"] = partial(self.result.export, weights=self.result.gather())
            if self.config.save_only_model:  # the adapter has it all
                model = None
        run = {
            "identity": self.identity,
            "at": self.state.as_stored(),
            "scale": vars(self.scaler),
            "model": self.config.model,
        }
        self.saver.save(self.state.step, self.state.best_step, model, optimizer, run, more)

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Within, a signal saves and exits; the end of the block is saved like a due checkpoint."""
        self.signals.raises_now = False  # from here on a signal must checkpoint
        try:
            yield
            if self.saver.needs_save(self.state.step):
                self.save()
        except Interrupted:
            self.stop()
        except torch.OutOfMemoryError:
            rows = self.config.batch_size * self.config.grad_accum
            raise out_of_memory(self.state.step + 1, self.config.batch_size, rows) from None

    def stop(self) -> None:
        """Save, say how to continue, and exit with the signal's code."""
        if self.saver.saved_step != self.state.step:
            self.save()
        how = f"resume with the same command and {label('resume')} auto {label('out')} {self.out}"
        if self.config.save_only_model:
            how = f"from which no run can continue ({label('save_only_model')})"
        self.log.say(
            f"saved step {self.state.step}, {how}; python -m llava_min finish {self.out} DIR makes "
            f"its {self.result.kind}"
        )
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.exit(self.signals.code)

    def diverged(self) -> bool:
        """The run ended with steps that changed no weight, and has no best checkpoint instead."""
        at_end = self.state.step == len(self.plan)
        return at_end and self.state.consecutive_skips > 0 and not self.config.best_metric

    def last_checkpoint(self) -> Path | None:
        return self.out / "last" if self.saver.saved_step >= 0 else None

    def write_result(self) -> None:
        """Write the adapter or model: of the best checkpoint if there is one, or of the end."""
        state, metric, kind = self.state, self.config.best_metric, self.result.kind
        if self.diverged():
            last = self.last_checkpoint()
            raise ended_with_skips(state.step, state.consecutive_skips, kind, last)
        best = self.out / "best" if metric and state.best_step != state.step else None
        if best:
            self.log.say(f"{metric} was best at step {state.best_step}: ending with that")
        self.result.write(self.out, best, self.world)
        if self.world.rank == 0:
            show_samples(self.out, state.best_step if metric else state.step)
            write_run_report(self.out)
        self.log.say(f"saved {self.out / kind}")
