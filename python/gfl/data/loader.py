# SPDX-License-Identifier: Apache-2.0
"""Batches of images: which images, in which order, how augmented, read by which process.

Nothing of a batch depends on chance, on the number of worker processes or on what was read before: its images follow
from (seed, epoch, position), each image's augmentation from (seed, epoch, image). So a training may stop after any
batch and go on there.
"""

from __future__ import annotations

import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..config import Config
from .coco import CocoDataset, Sample
from .transforms import UnreadableImage, flip, flip_boxes, keep_ratio_size, pad, resize, resize_boxes

# Neighbours that are tried in place of an image that can't be decoded, before the data set is given up.
ATTEMPTS = 100


@dataclass
class Batch:
    """B images as the network takes them but for `transforms.normalise`, which is quicker where the network is.

    The objects of all images are in one tensor, since each tensor costs a file handle on its way from a worker and a
    copy on its way to a GPU; `targets` cuts it.

    Attributes:
        images: uint8 ``[B, 3, H, W]``, RGB, padded right and below, in channels-last order in memory.
        image_sizes: fp32 ``[B, 2]``, (height, width) without padding, pixels.
        scale_factors: fp32 ``[B, 2]``, (width, height) over the image file's.
        boxes: fp32 ``[N, 4]``, xyxy in pixels of `images`, one image's after another's.
        labels: int64 ``[N]``.
        counts: objects of each image.
        image_ids: of the annotation file.
        original_sizes: (height, width) of the image files.
        unreadable: image files of this batch that can't be decoded, and why. A training batch has another image in
            their place; a test batch is shorter by them.
    """

    images: Tensor
    image_sizes: Tensor
    scale_factors: Tensor
    boxes: Tensor
    labels: Tensor
    counts: list[int]
    image_ids: list[int]
    original_sizes: list[tuple[int, int]]
    unreadable: dict[Path, str] = field(default_factory=dict)

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        """One an image: ``boxes`` fp32 ``[n, 4]``, ``labels`` int64 ``[n]``."""
        parts = zip(self.boxes.split(self.counts), self.labels.split(self.counts), strict=True)
        return [{"boxes": boxes, "labels": labels} for boxes, labels in parts]

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device, without waiting for the copies where `pin_memory` was called before."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU can copy from on its own."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            images=change(self.images),
            image_sizes=change(self.image_sizes),
            scale_factors=change(self.scale_factors),
            boxes=change(self.boxes),
            labels=change(self.labels),
        )


def training_dataset(config: Config) -> CocoDataset:
    """The images to train on, as `config.data` says; without those that have no object, but for ``keep_empty``."""
    data = config.data
    root = Path(data.data)
    return CocoDataset(root / data.train_annotations, root / data.train_images, keep_empty=data.keep_empty)


def validation_dataset(config: Config) -> CocoDataset:
    """The images to evaluate on, all of the annotation file.

    Raises:
        ValueError: `val_annotations` is empty; beside what `CocoDataset` raises.
    """
    if not config.data.val_annotations:
        raise ValueError("`val_annotations` is empty: there is nothing to evaluate on")
    root = Path(config.data.data)
    return CocoDataset(root / config.data.val_annotations, root / config.data.val_images)


def training_batches(dataset: CocoDataset, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches, over all processes, as indices into the data set; a pure function of its arguments.

    The images are shuffled, and dealt in this order to landscape and portrait batches, so that little is padded. What
    is left of both at the end is put together. Every image comes once; if they don't make whole batches, the last one
    is filled with the epoch's first images, which come twice then.

    Raises:
        ValueError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size}")
    order = list(range(len(dataset)))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    portrait = (dataset.sizes[:, 0] > dataset.sizes[:, 1]).tolist()
    batches: list[list[int]] = []
    open_: tuple[list[int], list[int]] = ([], [])
    for index in order:
        group = open_[portrait[index]]
        group.append(index)
        if len(group) == batch_size:
            batches.append(group.copy())
            group.clear()
    rest = open_[0] + open_[1]
    missing = -len(rest) % batch_size
    rest += (order * -(-missing // len(order)))[:missing]
    return batches + [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]


def test_batches(dataset: CocoDataset, batch_size: int) -> list[list[int]]:
    """Batches in which each image comes once, those of like shape together; the last one may be shorter.

    Raises:
        ValueError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"`test_batch_size` must be positive, got {batch_size}")
    height, width = dataset.sizes.double().unbind(1)
    order = (height / width).argsort(stable=True).tolist()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def training_loader(
    dataset: CocoDataset, config: Config, epoch: int = 0, start_batch: int = 0, rank: int = 0, world: int = 1
) -> Loader:
    """Augmented batches of one process: its share of each of `training_batches`.

    Iterating gives the epoch's batches from `start_batch` on; `Loader.at` moves to another epoch and keeps the worker
    processes. An image that can't be decoded is counted in ``dataset.problems``, warned of once, and the next
    image of the data set that can be is taken in its place.

    Raises:
        ValueError: `batch_size` is not positive or no multiple of `world`, or `train_short_side` or `flip` is out of
            range. While iterating: what `CocoDataset` raises for an image.
    """
    train = config.train
    if train.batch_size % world:
        raise ValueError(f"`batch_size` must be a multiple of the {world} processes, got {train.batch_size}")
    low, high = train.train_short_side
    if not 0 < low <= high <= train.train_long_side:
        raise ValueError(
            f"`train_short_side` must rise and stay within `train_long_side`, got {low},{high} and "
            f"{train.train_long_side}"
        )
    if not 0 <= train.flip <= 1:
        raise ValueError(f"`flip` must be in 0 to 1, got {train.flip}")
    share = train.batch_size // world

    def batches(epoch: int) -> list[list[int]]:
        whole = training_batches(dataset, train.batch_size, train.seed, epoch)
        return [batch[rank * share : (rank + 1) * share] for batch in whole]

    return Loader(TrainingReader(dataset, config), batches, config.data.workers).at(epoch, start_batch)


def test_loader(dataset: CocoDataset, config: Config, rank: int = 0, world: int = 1) -> Loader:
    """Batches of one process: every `world`-th of `test_batches`, so that all processes together see each image once.

    An image's batch is the same for any number of processes, and so is what is found in it. An image that can't be
    decoded is counted in ``dataset.problems``, warned of, and left out of its batch.

    Raises:
        ValueError: `test_batch_size` is not positive. While iterating: what `CocoDataset` raises for an image.
    """
    batches = test_batches(dataset, config.test.test_batch_size)[rank::world]
    return Loader(TestReader(dataset, config), lambda epoch: batches, config.data.workers)


@dataclass
class TrainingReader:
    """Reads a training batch; what a worker process is given."""

    dataset: CocoDataset
    config: Config

    def __call__(self, epoch: int, indices: Sequence[int]) -> Batch:
        unreadable: dict[Path, str] = {}
        samples = [self._sample(epoch, index, unreadable) for index in indices]
        return _batch(samples, self.config.test.size_divisor, unreadable)

    def _sample(self, epoch: int, index: int, unreadable: dict[Path, str]) -> tuple[Sample, Sample]:
        for step in range(min(ATTEMPTS, len(self.dataset))):
            candidate = (index + step) % len(self.dataset)
            try:
                sample = self.dataset[candidate]
            except UnreadableImage as error:
                unreadable[self.dataset.path(candidate)] = str(error)
            else:
                return sample, self._augment(sample, epoch, candidate)
        raise ValueError(f"none of {step + 1} images can be decoded; {next(iter(unreadable.values()))}")

    def _augment(self, sample: Sample, epoch: int, index: int) -> Sample:
        train = self.config.train
        # Only `random()` of a seeded generator is the same in every Python.
        draw = random.Random(f"image {train.seed} {epoch} {index}").random
        low, high = train.train_short_side
        sample = _resized(sample, low + int(draw() * (high - low + 1)), train.train_long_side)
        if draw() < train.flip:
            sample = sample._replace(image=flip(sample.image), boxes=flip_boxes(sample.boxes, sample.size[1]))
        return sample


@dataclass
class TestReader:
    """Reads a test batch; what a worker process is given."""

    __test__ = False  # its name is not a test's

    dataset: CocoDataset
    config: Config

    def __call__(self, epoch: int, indices: Sequence[int]) -> Batch:
        test = self.config.test
        unreadable: dict[Path, str] = {}
        samples = []
        for index in indices:
            try:
                sample = self.dataset[index]
            except UnreadableImage as error:
                unreadable[self.dataset.path(index)] = str(error)
            else:
                samples.append((sample, _resized(sample, test.short_side, test.long_side)))
        return _batch(samples, test.size_divisor, unreadable)


def _resized(sample: Sample, short_side: int, long_side: int) -> Sample:
    height, width = keep_ratio_size(*sample.size, short_side, long_side)
    return sample._replace(
        image=resize(sample.image, height, width),
        boxes=resize_boxes(sample.boxes, sample.size, (height, width)),
        size=(height, width),
    )


def _batch(samples: Sequence[tuple[Sample, Sample]], divisor: int, unreadable: dict[Path, str]) -> Batch:
    """Of pairs (as in the file, as the network takes it)."""
    images, image_sizes = pad([new.image for _, new in samples], divisor)
    factors = [(new.size[1] / old.size[1], new.size[0] / old.size[0]) for old, new in samples]
    return Batch(
        images,
        image_sizes,
        torch.tensor(factors, dtype=torch.float32).reshape(-1, 2),
        torch.cat([new.boxes for _, new in samples] or [torch.zeros(0, 4)]),
        torch.cat([new.labels for _, new in samples] or [torch.zeros(0, dtype=torch.int64)]),
        [len(new.labels) for _, new in samples],
        [old.image_id for old, _ in samples],
        [old.size for old, _ in samples],
        unreadable,
    )


class Loader:
    """The batches of a process, read ahead by worker processes that live as long as this object.

    Args:
        reader: makes a batch of (epoch, indices).
        batches: an epoch's batches, as lists of indices.
        workers: processes that read, at most one a core; 0: this one does.
    """

    def __init__(self, reader: TrainingReader | TestReader, batches: Callable[[int], list[list[int]]], workers: int):
        self.dataset = reader.dataset
        self._of_epoch = batches
        self._to_come = _ToCome()
        workers = min(workers, _cores())
        self._loader: DataLoader[Any] = DataLoader(
            _Reading(reader),  # type: ignore[arg-type]  # any object with __getitem__ will do
            batch_size=None,
            sampler=self._to_come,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            # Of its own, or it would draw from the generator that the training's other draws come from.
            generator=torch.Generator(),
        )
        self.at(0)

    def at(self, epoch: int, start_batch: int = 0) -> Loader:
        """Moves to a position; returns itself.

        Raises:
            ValueError: the epoch has no such batch.
        """
        batches = self._of_epoch(epoch)
        if not 0 <= start_batch <= len(batches):
            raise ValueError(f"an epoch has {len(batches)} batches, got `start_batch` = {start_batch}")
        self._to_come.positions = [(epoch, batch) for batch in batches[start_batch:]]
        return self

    def __len__(self) -> int:
        """Batches from the position to the end of the epoch."""
        return len(self._to_come)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, Exception):
                try:
                    raise batch
                finally:
                    del batch  # an error that its own traceback holds is such a cycle as in `_ToCome`
            self._report(batch)
            yield batch

    def _report(self, batch: Batch) -> None:
        for path, reason in batch.unreadable.items():
            if self.dataset.pass_over(path):
                warnings.warn(f"{reason}; it is passed over", stacklevel=3)


class _ToCome:
    """The positions that are still to come, asked for anew by each iteration.

    Not the `Loader` itself: in a cycle of references the workers would outlive it until they are ended by force.
    """

    def __init__(self) -> None:
        self.positions: list[tuple[int, list[int]]] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


@dataclass
class _Reading:
    """A batch for a position, or the error: raised in a worker, its text would be buried in a traceback's."""

    reader: TrainingReader | TestReader

    def __getitem__(self, position: tuple[int, list[int]]) -> Batch | Exception:
        try:
            return self.reader(*position)
        except (ValueError, OSError) as error:
            return error


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(number: int) -> None:
    # Each worker has one core; and Ctrl-C reaches all processes, of which the main one ends the others.
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
