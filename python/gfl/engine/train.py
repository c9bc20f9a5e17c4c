# SPDX-License-Identifier: Apache-2.0
"""Training: batches through the model, optimizer steps, checkpoints, evaluations."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import backbone_weights, checkpoint, files, models
from ..config import SECTION_OF, Config, TrainConfig
from ..data.coco import CocoDataset
from ..data.loader import training_dataset, training_loader, validation_dataset
from .distributed import Process, processes
from .evaluate import evaluate
from .folder import BEST, CONFIG, LAST, PREVIOUS, saved_training
from .log import EVALUATIONS, STEPS, RunLog
from .step import LOSSES, Step, on_device

# Which of its kernels an optimizer uses, not what it computes.
OPTIMIZER_IMPL_KEYS = ("fused", "foreach", "capturable")
# What decides which images are in which step: a resumed training can't change it.
RESUME_LOCKED = ("batch_size", "seed", "keep_empty")
# The paper's learning rate is for 16 images per step (arXiv 2006.04388, section 4).
BASE_BATCH = 16
WARMUP_START, DROP = 1e-3, 0.1


def train(
    config: Config, out: str | Path, *, resume: bool = False, device: str | None = None, progress: bool | None = None
) -> dict[str, float]:
    """Trains a detector, or resumes a training, and evaluates it.

    The folder `out` gets ``last.pt``, which `resume` starts from; ``previous.pt``, the one before it; ``best.pt``, the
    weights of the highest AP; ``config.json``; ``train.log``, ``steps.csv``, ``evaluations.csv`` and, if the package
    tensorboard is installed, its files. A training that is killed at any moment and resumed ends with the weights of
    one that was not, bit for bit on a CPU: a checkpoint holds the position among the batches, and the number of threads
    that torch used, which is set again.

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
        training = Training(config, out, process, resume, progress)
        if gone:
            training.log.say(f"{out} is taken over from {gone}, which is no more")
        try:
            return training.run()
        finally:
            training.log.close()


@dataclass
class Position:
    """Where a training stands, between two steps."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches done of the next epoch
    step: int = 0  # steps in total
    evaluated: int = 0  # epochs completed at the last evaluation
    best: float = -1.0  # the highest AP
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


class Training:
    """One training in one process; `train` says what it does."""

    def __init__(self, config: Config, out: Path, process: Process, resume: bool, progress: bool | None) -> None:
        self.out, self.process, self.progress = out, process, progress
        saved = saved_training(out, resume, process)
        settings = config.train
        _check(settings)
        self.data = training_dataset(config)
        self.digest = self.data.digest()
        self.validation = validation_dataset(config) if config.data.val_annotations else None
        notes, classes = [], self.data.classes
        if self.validation is not None and self.validation.classes != classes:
            raise ValueError(
                f"gfl: the classes of {config.data.val_annotations} are {', '.join(self.validation.classes)}; those of "
                f"{config.data.train_annotations} are {', '.join(classes)}"
            )
        if config.model.num_classes != len(classes):
            config = config.replace(num_classes=len(classes))
            notes.append(f"{len(classes)} classes, as the data has them: {', '.join(classes)}")
        torch.manual_seed(settings.seed)
        if saved is None:
            model = models.build(config.model, config.test)
            notes += _initial_weights(model, config.train)
        else:
            before = Config.from_dict(saved["meta"]["config"])
            if saved["meta"]["classes"] != classes:
                raise ValueError(
                    f"{out / LAST} was trained on the classes {', '.join(saved['meta']['classes'])}; "
                    f"{config.data.train_annotations} has {', '.join(classes)}"
                )
            model = models.build(before.model, config.test)
        self.config = config = dataclasses.replace(config, model=model.config)
        self.model = model.to(process.device)
        self.model.backbone.fold_norms(settings.fold_norms)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        # Computes the losses: the model, or what wraps it for several processes.
        self.network: nn.Module = self.model
        if process.world > 1:
            ids = [process.device.index] if process.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=ids)
        self.optimizer = _optimizer(model, config, process.device)
        self.step = Step(self.model, self.network, self.optimizer, settings, process.device)

        self.loader = training_loader(self.data, config, 0, 0, process.rank, process.world)
        self.steps_per_epoch = len(self.loader)
        self.position = Position()
        # Steps since the last row of the log, whose losses `step.sums` holds.
        self.summed = 0
        notes += self._restore(saved, before) if saved is not None else self._describe()
        self.log = RunLog(out, self.position.step, self.position.evaluated * self.steps_per_epoch, active=process.main)
        for line in notes:
            self.log.say(line)
        if saved is None and process.main:
            config.save(out / CONFIG)

    def run(self) -> dict[str, float]:
        """The rest of the training."""
        at = self.position
        with _stop_signals(self.process) as stopped:
            while True:
                if self.validation is not None and self._evaluation_due():
                    self._evaluate(self.validation)
                if at.epoch >= self.config.train.epochs:
                    return at.metrics
                self._epoch(stopped)

    def _epoch(self, stopped: threading.Event) -> None:
        at, settings = self.position, self.config.train
        self.network.train()
        self._started, self._images = time.perf_counter(), 0
        batches = on_device(self.loader.at(at.epoch, at.batch), self.process.device)
        hidden = not self.process.main or (None if self.progress is None else not self.progress)
        title, total = f"epoch {at.epoch + 1}/{settings.epochs}", self.steps_per_epoch
        bar = tqdm(batches, title, total, initial=at.batch, unit="step", leave=False, disable=hidden)
        for batch in bar:
            self.step(batch, learning_rate(at.step, self.steps_per_epoch, settings))
            self.summed += 1
            self._images += settings.batch_size
            at.batch += 1
            at.step += 1
            if at.step % settings.log_steps == 0:
                bar.set_postfix_str(self._write_row())
            last = at.batch == self.steps_per_epoch
            if last:
                at.epoch, at.batch = at.epoch + 1, 0
            if last or stopped.is_set() or (settings.checkpoint_steps and at.batch % settings.checkpoint_steps == 0):
                self._save()
            if stopped.is_set():
                self.log.say(f"stopped after step {at.step}, saved in {self.out / LAST}")
                raise KeyboardInterrupt

    def _write_row(self) -> str:
        """Logs the mean losses since the last row and returns them for the progress bar."""
        at = self.position
        sums = self.step.sums.clone()
        if self.process.world > 1:
            torch.distributed.all_reduce(sums)
        means = [value / (self.summed * self.process.world) for value in sums.tolist()]
        if not math.isfinite(sum(means)):
            self._check_finite(sum(means))
        seconds, self._started = time.perf_counter() - self._started, time.perf_counter()
        rate = float(self.optimizer.param_groups[0]["lr"])
        row = {"epoch": (at.step - 1) // self.steps_per_epoch + 1, "lr": rate, "loss": sum(means)}
        row |= dict(zip(LOSSES, means))
        row |= {"images_per_second": self._images / seconds, "unreadable_images": len(self.data.unreadable)}
        self.log.row(STEPS, at.step, row)
        self.step.sums.zero_()
        self.summed = self._images = 0
        return f"loss {sum(means):.4f}, lr {rate:.2g}"

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
        at, settings = self.position, self.config.train
        if at.batch or at.evaluated == at.epoch:
            return False
        return at.epoch >= settings.epochs or bool(settings.eval_every and at.epoch % settings.eval_every == 0)

    def _evaluate(self, validation: CocoDataset) -> None:
        at, started = self.position, time.perf_counter()
        shown = self.progress is not False
        metrics, _ = evaluate(self.model, validation, self.config, self.process.device, progress=shown)
        at.metrics, at.evaluated = metrics, at.epoch
        seconds = time.perf_counter() - started
        self.log.row(EVALUATIONS, at.step, {"epoch": at.epoch, **metrics, "seconds": seconds})
        figures = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("AP", "AP50", "AP75"))
        self.log.say(f"epoch {at.epoch}/{self.config.train.epochs}: {figures}")
        if math.isnan(metrics["AP"]):
            self.log.say(f"{validation.annotations.path} has no object to find: no AP, no {BEST}")
        if metrics["AP"] > at.best:
            self._check_finite(0.0)
            at.best = metrics["AP"]
            if self.process.main:
                checkpoint.write(self.out / BEST, {"meta": self._meta(), "state_dict": self.model.state_dict()})
        self._save()

    def _meta(self) -> dict[str, Any]:
        return checkpoint.meta(self.config, self.data.classes, self.data.category_ids) | {"epoch": self.position.epoch}

    def _save(self) -> None:
        self._check_finite(self.step.sums.sum().item())
        if self.process.main:
            optimizer = self.optimizer.state_dict()
            for group in optimizer["param_groups"]:
                group["lr"] = float(group["lr"])  # a graph's is a tensor; a checkpoint is the same without one
            content = {
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
        keys = ("lr", *OPTIMIZER_IMPL_KEYS)
        own = [{key: group[key] for key in keys if key in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update(values)
        self.step.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["generator"])
        self.step.sums.copy_(state["sums"])
        self.summed = state["summed"]
        self.position = Position(**state["position"])
        notes = [f"resuming after step {self.position.step} of {self.steps_per_epoch * self.config.train.epochs}"]
        if self.process.device.type == "cpu" and state["threads"] != torch.get_num_threads():
            now = f"{state['threads']} threads, as before, for the same results"
            notes.append(f"{now}: torch had {torch.get_num_threads()}")
            torch.set_num_threads(state["threads"])
        return notes

    def _describe(self) -> list[str]:
        """What a new training says of its data and its length."""
        data, settings = self.data, self.config.train
        lines = [
            f"{len(data)} images, {len(data.classes)} classes; {settings.epochs} epochs of {self.steps_per_epoch} "
            f"steps of {settings.batch_size} images on {self.process.world} × {self.process.device.type}"
        ]
        for kind, dataset in (("training", data), ("validation", self.validation)):
            if dataset is not None:
                lines += [f"{kind} data: {count} {what}" for what, count in dataset.problems.items()]
        return lines


def learning_rate(step: int, steps_per_epoch: int, train: TrainConfig) -> float:
    """At a step, from 0: a linear warm-up, times drops at epochs or half a cosine over the training."""
    rate = train.lr * train.batch_size / BASE_BATCH
    if step < train.warmup_steps:
        rate *= WARMUP_START + (1 - WARMUP_START) * step / train.warmup_steps
    if train.schedule == "cosine":
        return rate * (1 + math.cos(math.pi * step / (steps_per_epoch * train.epochs))) / 2
    return rate * DROP ** sum(step >= epoch * steps_per_epoch for epoch in train.lr_drops)


def _check(settings: TrainConfig) -> None:
    positive = ("epochs", "lr", "log_steps", "rank_timeout")
    for name in (*positive, "warmup_steps", "clip_grad_norm", "eval_every", "checkpoint_steps", "weight_decay"):
        value = getattr(settings, name)
        if value < 0 or (value == 0 and name in positive):
            raise ValueError(
                f"gfl: `{name}` must {'be positive' if name in positive else 'not be negative'}, got {value}"
            )


def _initial_weights(model: models.GFL, settings: TrainConfig) -> list[str]:
    if settings.init:
        return checkpoint.start(model, settings.init)
    if not settings.backbone_weights:
        raise ValueError(
            "`backbone_weights` must be given: a file, torchvision or timm for weights trained on ImageNet, or none to "
            "train from scratch (all of the backbone, its norms too)"
        )
    return backbone_weights.load(model.backbone, settings.backbone_weights)


def _optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    settings = config.train
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    graph = settings.graph and device.type == "cuda"
    # Fused: a few kernels for all weights, and on the CPU one pass over each. A graph reads its rate from a tensor.
    rate: Any = torch.tensor(settings.lr, device=device) if graph else settings.lr
    rest: dict[str, Any] = {"lr": rate, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, betas=(settings.momentum, 0.999), capturable=graph, **rest)
    return torch.optim.SGD(parameters, momentum=settings.momentum, **rest)


@contextmanager
def _stop_signals(process: Process) -> Iterator[threading.Event]:
    """Makes SIGINT and SIGTERM wait for the end of the step and a checkpoint; the event is set when one came.

    Several processes would stop at different steps and wait for each other forever: there the signals end them at
    once, and the last checkpoint is what is left.
    """
    stopped = threading.Event()
    if process.world > 1 or threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
