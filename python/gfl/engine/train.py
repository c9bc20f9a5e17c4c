# SPDX-License-Identifier: Apache-2.0
"""Training: batches through the model, optimizer steps, checkpoints, evaluations."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import checkpoint, files, models
from ..config import SECTION_OF, Config
from ..data import sets
from ..data.cache import ImageCache
from ..data.coco import CocoDataset
from ..data.loader import training_dataset, training_loader
from ..models.auxiliary import without_auxiliary
from . import report
from .callbacks import Callback
from .distributed import Process, processes
from .evaluate import evaluate
from .folder import BEST, CONFIG, LAST, PREVIOUS, restoring, saved_training
from .log import EVALUATIONS, STEPS, Pace, RunLog
from .optimizer import SCALE, Average, make_optimizer
from .schedule import learning_rate, schedule_warnings, total_steps
from .settings import check_settings, class_weights, initial_weights, largest_batch
from .step import Step, on_device
from .stopping import Stop

# Which of its kernels an optimizer uses, not what it computes.
OPTIMIZER_IMPL_KEYS = ("fused", "foreach", "capturable")
# What decides which images are in which step: a resumed training can't change it.
RESUME_LOCKED = ("batch_size", "accumulate", "seed", "keep_empty", "repeat_threshold")


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    progress: bool | None = None,
    callbacks: Iterable[Callback] = (),
) -> dict[str, float]:
    """Trains a detector, or resumes a training, and evaluates it.

    The folder `out` gets ``last.pt``, which `resume` starts from; ``previous.pt``, the one before it; ``best.pt``, the
    weights of the highest AP; ``config.json``; ``train.log``, ``steps.csv``, ``evaluations.csv`` and, if the package
    tensorboard is installed, its files; pictures, all of them in ``report.html``. A training that is killed at any
    moment and resumed ends with the weights of one that was not, bit for bit on a CPU: a checkpoint holds the position
    among the batches, and the number of threads that torch used, which is set again.

    Started by ``torchrun``, the processes share each batch, and their losses are those of one process with the whole
    batch; but batch norms that are trained see their process's share, and the box losses' normaliser is at least 1 per
    process.

    Args:
        config: detector, data and training; the number of classes is the data's. With `resume` the network is the
            checkpoint's.
        out: folder of the training, created if missing.
        resume: continue the training in `out`; what decides the batches, the data too, may not have changed.
        device: as for `torch.device`; None: a GPU if there is one.
        progress: show a progress bar; None: where standard error is a terminal.
        callbacks: told of steps, epochs and evaluations, in the process that writes.

    Returns:
        The last evaluation's metrics as `evaluate` names them; empty without validation data.

    Raises:
        ValueError: an argument or file that can't be used; `out` holds a training and `resume` is not given, or is in
            use by another process; ``last.pt`` is damaged: then the one before it takes its place for the next call.
        RuntimeError: loss or weights are no longer finite; the last checkpoint is from before.
        OSError: a file can't be read or written; the last whole checkpoint stays.
    """
    out = Path(out)
    if resume and not out.is_dir():
        raise ValueError(f"{out} holds no training to resume: there is no such folder")
    with (
        processes(device, config.train.rank_timeout) as process,
        files.locked(out) if process.main else nullcontext("") as gone,
    ):
        training = Training(config, out, process, resume, progress, callbacks if process.main else ())
        if gone:
            training.log.say(f"{out} is taken over from {gone}, which is no more")
        try:
            return training.run()
        finally:
            training.close()


@dataclass
class Position:
    """Where a training stands, between two steps."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches done of the next epoch
    step: int = 0  # steps in total
    evaluated_step: int = 0  # steps done at the last evaluation
    best: float = -1.0  # the highest AP
    stale: int = 0  # evaluations since then
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation

    def __post_init__(self) -> None:
        counts = (self.epoch, self.batch, self.step, self.evaluated_step, self.stale)
        if not all(type(n) is int and n >= 0 for n in counts) or not isinstance(self.best, (int, float)):
            raise TypeError(f"no position of a training: {self}")


class Training:
    """One training in one process; `train` says what it does."""

    def __init__(
        self,
        config: Config,
        out: Path,
        process: Process,
        resume: bool,
        progress: bool | None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.out, self.process, self.progress, self.callbacks = out, process, progress, list(callbacks)
        saved = saved_training(out, resume, process)
        check_settings(config.train)
        self.data = training_dataset(config)
        self.digest = self.data.digest()
        if config.train.cache != "none":
            # A killed training's file goes with the parts of files that it left.
            file = out / f"{files.PART}images-{process.rank}" if config.train.cache == "disk" else None
            out.mkdir(parents=True, exist_ok=True)
            self.data.cache = ImageCache(self.data.sizes, file)
        self.validation = sets.dataset(config.data, "val", self.data.classes)
        notes, classes = [], self.data.classes
        if self.validation is not None and self.validation.classes != classes:
            raise ValueError(
                f"gfl: the classes of {self.validation.annotations.path} are {', '.join(self.validation.classes)}; "
                f"those of {self.data.annotations.path} are {', '.join(classes)}"
            )
        if config.model.num_classes != len(classes):
            config = config.replace(num_classes=len(classes))
            notes.append(f"{len(classes)} classes, as the data has them: {', '.join(classes)}")
        torch.manual_seed(config.train.seed)
        if saved is None:
            model = models.build(config.model, config.test, training=True)
            notes += initial_weights(model, config.train)
        else:
            with restoring(out / LAST):
                before, names = Config.from_dict(saved["meta"]["config"]), list(map(str, saved["meta"]["classes"]))
            if names != classes:
                raise ValueError(
                    f"{out / LAST} was trained on the classes {', '.join(names)}; "
                    f"{self.data.annotations.path} has {', '.join(classes)}"
                )
            model = models.build(before.model, config.test, training=True)
        self.model = model.to(process.device)
        if config.train.batch_size == 0:
            fitting = before.train.batch_size if saved is not None else largest_batch(model, config, process)
            config = config.replace(batch_size=fitting)
            notes.append(f"{fitting} images per step, as many as fit")
        self.config = config = dataclasses.replace(config, model=model.config)
        settings = config.train
        model.class_weights = class_weights(settings.class_weights, self.data, process.device)
        self.model.backbone.fold_norms(settings.fold_norms)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        if settings.compile:
            for part in self.model.children():
                part.compile()
        self.average = Average(self.model, settings.ema) if settings.ema else None
        # Computes the losses: the model, or what wraps it for several processes.
        self.network: nn.Module = self.model
        if process.world > 1:
            ids = [process.device.index] if process.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=ids)
        self.optimizer = make_optimizer(model, settings, process.device)
        self.step = Step(self.model, self.network, self.optimizer, settings, process.device)

        self.loader = training_loader(self.data, config, 0, 0, process.rank, process.world)
        self.steps_per_epoch = len(self.loader)
        self.total_steps = total_steps(self.steps_per_epoch, settings)
        # In a short training too there are some lines.
        self.log_steps = min(settings.log_steps, self.steps_per_epoch, self.total_steps)
        self.pace = Pace(process.device)
        self.position = Position()
        # Steps since the last row of the log, whose losses `step.sums` holds.
        self.summed = 0
        if saved is None:
            notes += self._describe()
        else:
            with restoring(out / LAST):
                notes += self._restore(saved, before)
        notes += schedule_warnings(self.steps_per_epoch, settings)
        self.log = RunLog(out, self.position.step, self.position.evaluated_step, active=process.main)
        for line in notes:
            self.log.say(line)
        if saved is None and process.main:
            config.save(out / CONFIG)
        # Those of the last evaluation in this run.
        self.detections: list[dict[str, Any]] | None = None

    def run(self) -> dict[str, float]:
        """The rest of the training."""
        at = self.position
        with Stop(self.process) as stop:
            while True:
                if self.validation is not None and self._evaluation_due():
                    try:
                        with stop.interruptible():
                            metrics = self._measure(self.validation)
                    except KeyboardInterrupt:
                        self.log.say(f"stopped in the evaluation after step {at.step}, saved in {self.out / LAST}")
                        raise
                    self._evaluated(metrics, self.validation)
                if self._done():
                    stop.finish()
                    self._report()
                    return at.metrics
                self._epoch(stop)

    def _report(self) -> None:
        """Pictures and the page, unless the training had ended before this run."""
        fresh = self.detections is not None if self.validation is not None else self.pace.began
        if self.process.main and fresh:
            if not report.has_plots():
                self.log.say(report.MISSING)
            drawn = report.finish(self.out, self.config, self.validation, self.detections)
            self.log.pictures(drawn, self.position.step)
            self.log.say(f"report: {self.out / report.REPORT}")

    def close(self) -> None:
        """Ends the log and removes what was kept for this run alone."""
        self.log.close()
        if self.data.cache is not None:
            self.data.cache.close()

    def _done(self) -> bool:
        at, patience = self.position, self.config.train.patience
        if patience and at.stale >= patience:
            self.log.say(f"no higher AP for {at.stale} evaluations: the training ends after step {at.step}")
            return True
        return at.step >= self.total_steps

    def _epoch(self, stop: Stop) -> None:
        at, settings = self.position, self.config.train
        self.network.train()
        self.model.aux_detached = at.epoch >= settings.aux_epochs
        batches = on_device(self.loader.at(at.epoch, at.batch), self.process.device)
        epochs = -(-self.total_steps // self.steps_per_epoch)
        title = f"epoch {at.epoch + 1}/{epochs}"
        total = min(self.steps_per_epoch, at.batch + self.total_steps - at.step)
        hidden = not self.process.main or (None if self.progress is None else not self.progress)
        self.pace.start()
        bar = tqdm(self.pace.waiting(batches), title, total, initial=at.batch, unit="step", disable=hidden)
        for batch in bar:
            if at.step == 0 and self.process.main:
                self.log.pictures(report.begin(self.out, self.data, batch), 0)
            self.step(batch, learning_rate(at.step, self.steps_per_epoch, settings))
            if self.average is not None:
                self.average.update_parameters(self.model)
            self.summed += 1
            self.pace.count(settings.batch_size)
            at.batch += 1
            at.step += 1
            if at.step % self.log_steps == 0:
                bar.set_postfix_str(self._write_row())
            whole, done = at.batch == self.steps_per_epoch, at.step >= self.total_steps
            if whole:
                at.epoch, at.batch = at.epoch + 1, 0
            stopped = stop.now()
            due = settings.checkpoint_steps and at.batch % settings.checkpoint_steps == 0
            if whole or done or stopped or due:
                self._save()
            if whole:
                for callback in self.callbacks:
                    callback.on_epoch(at.epoch)
            if stopped:
                self.log.say(f"stopped after step {at.step}, saved in {self.out / LAST}")
                raise KeyboardInterrupt
            if done:
                return

    def _write_row(self) -> str:
        """Logs the mean losses since the last row and returns them for the progress bar."""
        at = self.position
        sums = self.step.sums.clone()
        if self.process.world > 1:
            torch.distributed.all_reduce(sums)
        means = [value / (self.summed * self.process.world) for value in sums.tolist()]
        if not math.isfinite(sum(means)):
            self._check_finite(sum(means))
        rate = float(self.optimizer.param_groups[0]["lr"]) / self.optimizer.param_groups[0].get(SCALE, 1)
        row = {"epoch": (at.step - 1) // self.steps_per_epoch + 1, "lr": rate, "loss": sum(means)}
        row |= dict(zip(self.step.losses, means))
        row |= self.pace.read() | {"unreadable_images": len(self.data.unreadable)}
        self.log.row(STEPS, at.step, row)
        parts = ", ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in zip(self.step.losses, means))
        self.log.say(
            f"epoch {row['epoch']}  step {at.step}/{self.total_steps}  loss {row['loss']:.4f} ({parts})  "
            f"lr {rate:.2g}  {row['images_per_second']:.1f} images/s  waiting for data {row['data_wait']:.0%}  "
            f"memory {row['memory_gib']:.1f} GiB  {self.pace.left(self.total_steps - at.step)} left"
        )
        for callback in self.callbacks:
            callback.on_step(at.step, row)
        self.step.sums.zero_()
        self.summed = 0
        return f"loss {row['loss']:.4f}, lr {rate:.2g}"

    def _check_finite(self, loss: float) -> None:
        """Of a sum of losses, and of the weights, which one bad gradient after it is enough to spoil."""
        floats = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        wrong = f"the loss is {loss}" if not math.isfinite(loss) else ""
        if not wrong and not bool(torch.stack([value.isfinite().all() for value in floats]).all()):
            wrong = "the weights are no longer finite"
        if wrong:
            raise RuntimeError(
                f"{wrong} by step {self.position.step}; no checkpoint was written of it. "
                "A smaller `lr`, a longer `warmup_steps` or `clip_grad_norm` may help"
            )

    def _evaluation_due(self) -> bool:
        at, every = self.position, self.config.train.eval_every
        if at.evaluated_step == at.step:
            return False
        return at.step >= self.total_steps or bool(not at.batch and every and at.epoch % every == 0)

    @property
    def result(self) -> models.GFL:
        """The network that is evaluated and kept as the best: the average of the weights, if there is one."""
        return self.model if self.average is None else cast(models.GFL, self.average.module)

    def _measure(self, validation: CocoDataset) -> dict[str, float]:
        started = time.perf_counter()
        shown = self.progress is not False
        metrics, self.detections = evaluate(self.result, validation, self.config, self.process.device, progress=shown)
        return metrics | {"seconds": time.perf_counter() - started}

    def _evaluated(self, measured: dict[str, float], validation: CocoDataset) -> None:
        """Logs and keeps what an evaluation measured, and the best weights."""
        at = self.position
        metrics = {name: value for name, value in measured.items() if name != "seconds"}
        at.metrics, at.evaluated_step = metrics, at.step
        epoch = -(-at.step // self.steps_per_epoch)
        self.log.row(EVALUATIONS, at.step, {"epoch": epoch, **measured})
        figures = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("AP", "AP50", "AP75"))
        self.log.say(f"epoch {epoch}/{-(-self.total_steps // self.steps_per_epoch)}: {figures}")
        if math.isnan(metrics["AP"]):
            self.log.say(f"{validation.annotations.path} has no object to find: no AP, no {BEST}")
        at.stale += 1
        if metrics["AP"] > at.best:
            self._check_finite(0.0)
            at.best, at.stale = metrics["AP"], 0
            if self.process.main:
                meta = self._meta() | {"score_threshold": metrics.get("threshold")}
                weights = without_auxiliary(self.result.state_dict())
                checkpoint.write(self.out / BEST, {"meta": meta, "state_dict": weights})
        self._save()
        for callback in self.callbacks:
            callback.on_evaluation(at.step, metrics)

    def _meta(self) -> dict[str, Any]:
        return checkpoint.meta(self.config, self.data.classes, self.data.category_ids) | {"epoch": self.position.epoch}

    def _save(self) -> None:
        self._check_finite(self.step.sums.sum().item())
        if self.process.main:
            optimizer = self.optimizer.state_dict()
            for group in optimizer["param_groups"]:
                group["lr"] = float(group["lr"])  # a graph's is a tensor; a checkpoint is the same without one
            content: dict[str, Any] = {
                "meta": self._meta(),
                "state_dict": self.model.state_dict(),
                "optimizer": optimizer,
                "training": {
                    "position": dict(vars(self.position)),
                    "data": self.digest,
                    "sums": self.step.sums.cpu(),
                    "summed": self.summed,
                    "scaler": self.step.scaler.state_dict(),
                    "threads": torch.get_num_threads(),
                    "generator": torch.get_rng_state(),
                },
            }
            if self.average is not None:
                # Under this name readers of a checkpoint find them before the others.
                content["ema"] = self.average.module.state_dict()
                content["training"]["averaged"] = int(self.average.n_averaged)
            checkpoint.write(self.out / LAST, content, self.out / PREVIOUS)
        self.process.wait()

    def _restore(self, saved: dict[str, Any], before: Config) -> list[str]:
        path, state = self.out / LAST, saved["training"]
        for name in RESUME_LOCKED:
            now, then = (getattr(getattr(config, SECTION_OF[name]), name) for config in (self.config, before))
            if now != then:
                raise ValueError(f"`{name}` was {then} when {path} was written; a training can't go on with {now}")
        if state.get("data") != self.digest:
            raise ValueError(
                f"the training data are no longer those of {path} (images, their order, boxes or classes): it can't go "
                "on with others; `init` starts a new training from its weights"
            )
        checkpoint.load_weights(self.model, saved["state_dict"])
        # The choice of kernels, and a rate that a graph reads, stay this optimizer's own.
        keys = ("lr", SCALE, *OPTIMIZER_IMPL_KEYS)
        own = [{key: group[key] for key in keys if key in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update(values)
        self.step.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["generator"])
        self.step.sums.copy_(state["sums"])
        self.summed = int(state["summed"])
        position = dict(state["position"])
        if "evaluated" in position:  # in epochs, as an earlier version wrote it
            position["evaluated_step"] = position.pop("evaluated") * self.steps_per_epoch
        self.position = Position(**position)
        if self.average is not None:
            averaged = saved.get("ema", saved["state_dict"])
            checkpoint.load_weights(self.average.module, averaged)
            self.average.n_averaged.fill_(state.get("averaged", 0))
        notes = [f"resuming after step {self.position.step} of {self.total_steps}"]
        if self.process.device.type == "cpu" and state["threads"] != torch.get_num_threads():
            now = f"{state['threads']} threads, as before, for the same results"
            notes.append(f"{now}: torch had {torch.get_num_threads()}")
            torch.set_num_threads(state["threads"])
        return notes

    def _describe(self) -> list[str]:
        """What a new training says of its data and its length."""
        data, settings = self.data, self.config.train
        length = (
            f"{settings.steps} steps, {self.steps_per_epoch} an epoch,"
            if settings.steps
            else (f"{settings.epochs} epochs of {self.steps_per_epoch} steps")
        )
        lines = [
            f"{len(data)} images, {len(data.classes)} classes; {length} of {settings.batch_size} images on "
            f"{self.process.world} × {self.process.device.type}"
        ]
        for kind, dataset in (("training", data), ("validation", self.validation)):
            if dataset is not None:
                lines += [f"{kind} data: {line}" for line in dataset.problems.lines()]
        return lines if self.validation is not None else [*lines, f"no validation data: no AP, no {BEST}"]
