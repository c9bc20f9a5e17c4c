# SPDX-License-Identifier: Apache-2.0
"""Batches of images: which images, in which order, how augmented, read by which process.

A batch is a pure function: its images follow from (seed, epoch, position), each image's augmentation from (seed, epoch,
image), whatever the number of worker processes and whatever was read before. So a training may stop after any batch and
be resumed there.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..config import Config, InferenceConfig
from ..signals import leave_stopping_to_main
from ..threads import cores
from . import augment, sets
from .coco import CocoDataset, Sample
from .transforms import UnreadableImage, flip_boxes, input_size, pad, resize, resize_boxes
from .values import ImageId

# Following images tried in place of one that can't be decoded, before giving up.
ATTEMPTS = 100


@dataclass
class Batch:
    """B images as the network takes them except for `transforms.normalise`, which is faster where the network is.

    The objects of all images are in one tensor, since each tensor costs a file handle on its way from a worker and a
    copy on its way to a GPU; `targets` splits it.
    """

    images: Tensor  # uint8 [B, 3, H, W], RGB, padded right and below, in channels-last memory format
    image_sizes: Tensor  # fp32 [B, 2], (height, width) without padding, pixels
    scale_factors: Tensor  # fp32 [B, 2], (width, height) over the image file's
    boxes: Tensor  # fp32 [N, 4], xyxy in pixels of `images`, image after image
    labels: Tensor  # int64 [N]
    counts: list[int]  # objects of each image
    image_ids: list[ImageId]  # of the annotation file
    original_sizes: list[tuple[int, int]]  # (height, width) of the image files, in a training after `augment`
    # Files that can't be decoded, and why. A training batch has other images in their place; a test batch is shorter.
    unreadable: dict[Path, str] = field(default_factory=dict)

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        """Per image: ``boxes`` fp32 ``[n, 4]``, ``labels`` int64 ``[n]``."""
        parts = zip(self.boxes.split(self.counts), self.labels.split(self.counts), strict=True)
        return [{"boxes": boxes, "labels": labels} for boxes, labels in parts]

    def parts(self, number: int) -> list[Batch]:
        """The same images in so many batches, as equal as possible; views, of the same height and width."""
        if number == 1:
            return [self]
        images, result = len(self.counts), []
        for part in range(number):
            first, last = part * images // number, (part + 1) * images // number
            objects = slice(sum(self.counts[:first]), sum(self.counts[:last]))
            rows: dict[str, Any] = {
                name: value[objects if name in ("boxes", "labels") else slice(first, last)]
                for name, value in vars(self).items()
                if name != "unreadable"
            }
            result.append(Batch(**rows))
        return result

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device, without waiting for the copies if `pin_memory` was called before."""
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in self.tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU copies from on its own."""
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in self.tensors().items()}
        return replace(self, **pinned)


def training_dataset(config: Config) -> CocoDataset:
    """The images to train on, as `config.data` says; without those that have no object, unless ``keep_empty``."""
    found = sets.dataset(config.data, "train")
    assert found is not None
    return found


def validation_dataset(config: Config, classes: Sequence[str] | None = None) -> CocoDataset:
    """The images to evaluate on, with a model's classes; ValueError if there are none."""
    found = sets.dataset(config.data, "val", classes)
    if found is None:
        empty = (
            "`val_annotations` is empty" if not config.data.val_annotations else f"{config.data.data} has no val part"
        )
        raise ValueError(f"{empty}: there is nothing to evaluate on")
    return found


def training_order(dataset: CocoDataset, seed: int, epoch: int, repeat_threshold: float = 0.0) -> list[int]:
    """An epoch's images in random order, as indices; every epoch has the same number.

    Each image comes once, or with a threshold t as often on average as LVIS has it (Gupta et al., arXiv 1908.03195):
    the largest of its classes' max(1, √(t / f)), where f is the share of the images with that class.
    """
    order = list(range(len(dataset)))
    draw = random.Random(f"order {seed} {epoch}")
    if repeat_threshold > 0:
        classes = [set(dataset.labels_of(index).tolist()) for index in order]
        having = Counter(label for of_image in classes for label in of_image)
        factor = {label: max(1.0, math.sqrt(repeat_threshold * len(order) / n)) for label, n in having.items()}
        factors = [max((factor[label] for label in of_image), default=1.0) for of_image in classes]
        # Thresholds one apart in the running sum, from a random start: each image its whole factor, and one more as
        # often as the rest of it says.
        scale, start, total, order = round(sum(factors)) / sum(factors), draw.random(), 0.0, []
        for index, own in enumerate(factors):
            before, total = total, total + own * scale
            order += [index] * (math.floor(total + start) - math.floor(before + start))
        order = (order + order[:1])[: round(sum(factors))]  # the last sum is rounded
    draw.shuffle(order)
    return order


def training_batches(
    dataset: CocoDataset, batch_size: int, seed: int, epoch: int, repeat_threshold: float = 0.0
) -> list[list[int]]:
    """An epoch's batches, over all processes, as indices into the data set; a pure function of its arguments.

    The images of `training_order` are dealt in this order to landscape and portrait batches, to pad little; what is
    left of both at the end is put together. The epoch's first images also fill the last batch.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size}")
    order = training_order(dataset, seed, epoch, repeat_threshold)
    portrait = (dataset.sizes[:, 0] > dataset.sizes[:, 1]).tolist()
    batches: list[list[int]] = []
    groups: list[list[int]] = [[], []]
    for index in order:
        group = groups[portrait[index]]
        group.append(index)
        if len(group) == batch_size:
            batches.append(group)
            groups[portrait[index]] = []
    rest = groups[0] + groups[1]
    missing = -len(rest) % batch_size
    rest += (order * -(-missing // len(order)))[:missing]
    return batches + [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]


def test_batches(dataset: CocoDataset, batch_size: int) -> list[list[int]]:
    """Batches in which each image comes once, those of similar shape together; the last one may be shorter."""
    if batch_size < 1:
        raise ValueError(f"`test_batch_size` must be positive, got {batch_size}")
    height, width = dataset.sizes.double().unbind(1)
    order = (height / width).argsort(stable=True).tolist()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def training_loader(
    dataset: CocoDataset, config: Config, epoch: int = 0, start_batch: int = 0, rank: int = 0, world: int = 1
) -> Loader:
    """Augmented batches of one process: its share of each of `training_batches`, from `start_batch` of the epoch on.

    An image that can't be decoded is counted in ``dataset.problems``, warned of once, and replaced by the
    next image of the data set that can be.

    Raises:
        ValueError: `batch_size` is not positive or no multiple of `world`, or `train_short_side` or `flip` is out of
            range. While iterating: what `CocoDataset` raises for an image.
    """
    train = config.train
    if train.batch_size % world:
        raise ValueError(f"`batch_size` must be a multiple of the {world} processes, got {train.batch_size}")
    low, high = train.train_short_side
    if not 0 < low <= high <= train.train_long_side:
        rule = "`train_short_side` must rise and stay within `train_long_side`"
        raise ValueError(f"{rule}, got {low},{high} and {train.train_long_side}")
    if not 0 <= train.flip <= 1:
        raise ValueError(f"`flip` must be in 0 to 1, got {train.flip}")
    share = train.batch_size // world
    if share % train.accumulate:
        raise ValueError(f"`accumulate` must divide the {share} images of a process's batch, got {train.accumulate}")

    def batches(epoch: int) -> list[list[int]]:
        whole = training_batches(dataset, train.batch_size, train.seed, epoch, train.repeat_threshold)
        return [batch[rank * share : (rank + 1) * share] for batch in whole]

    return Loader(BatchReader(dataset, config, training=True), batches, config.data.workers).at(epoch, start_batch)


def test_loader(dataset: CocoDataset, config: Config, rank: int = 0, world: int = 1) -> Loader:
    """Batches of one process: every `world`-th of `test_batches`, so that all processes together see each image once.

    An image's batch is the same for any number of processes, and so is what is found in it. An image that can't be
    decoded is counted in ``dataset.problems``, warned of, and left out of its batch.
    """
    batches = test_batches(dataset, config.test.test_batch_size)[rank::world]
    return Loader(BatchReader(dataset, config, training=False), lambda epoch: batches, config.data.workers)


@dataclass
class BatchReader(torch.utils.data.Dataset["Batch | Exception"]):
    """Reads and resizes the images of a batch, for a training augmented; what a worker process is given."""

    dataset: CocoDataset
    config: Config
    training: bool

    def __post_init__(self) -> None:
        self._steps = augment.parse(self.config.train.augment) if self.training else []

    def __getitem__(self, position: tuple[int, list[int]]) -> Batch | Exception:
        """The batch at a position, or the error: raised in a worker, its text would be buried in a traceback's."""
        try:
            return self.read(*position)
        except (ValueError, OSError) as error:
            return error

    def read(self, epoch: int, indices: Sequence[int]) -> Batch:
        unreadable: dict[Path, str] = {}
        samples: list[tuple[Sample, Sample]] = []  # as in the file, as the network takes it
        attempts = min(ATTEMPTS, len(self.dataset)) if self.training else 1
        for index in indices:
            for candidate in (i % len(self.dataset) for i in range(index, index + attempts)):
                try:
                    sample = self.dataset[candidate]
                except UnreadableImage as error:
                    unreadable[self.dataset.path(candidate)] = str(error)
                else:
                    sample = self._augmented(sample, epoch, candidate)
                    samples.append((sample, self._prepared(sample, epoch, candidate)))
                    break
            else:
                if self.training:
                    first = next(iter(unreadable.values()))
                    raise ValueError(f"none of {attempts} images can be decoded; {first}")
        images, image_sizes = pad([new.image for _, new in samples], self.config.test.size_divisor)
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

    def _augmented(self, sample: Sample, epoch: int, index: int) -> Sample:
        if not self._steps:
            return sample

        def other(number: int) -> Sample:
            # Where it can't be decoded the image itself is taken; a batch that it belongs to will report it.
            try:
                return self.dataset[number]
            except UnreadableImage:
                return sample

        key = f"{self.config.train.seed} {epoch} {index}"
        return augment.apply(self._steps, sample, key, other, len(self.dataset))

    def _prepared(self, sample: Sample, epoch: int, index: int) -> Sample:
        train, test = self.config.train, self.config.test
        if not self.training:
            return _resized(sample, test.short_side, test.long_side, test)
        # Of a seeded generator only `random()` is the same in every Python.
        draw = random.Random(f"image {train.seed} {epoch} {index}").random
        low, high = train.train_short_side
        sample = _resized(sample, low + int(draw() * (high - low + 1)), train.train_long_side, test)
        if draw() < train.flip:
            sample = sample._replace(image=sample.image.flip(2), boxes=flip_boxes(sample.boxes, sample.size[1]))
        return sample


def _resized(sample: Sample, short_side: int, long_side: int, test: InferenceConfig) -> Sample:
    size = input_size(sample.size, short_side, long_side, test)
    boxes = resize_boxes(sample.boxes, sample.size, size)
    return sample._replace(image=resize(sample.image, *size, stretch=test.resize == "stretch"), boxes=boxes, size=size)


class Loader:
    """The batches of a process, read ahead by worker processes that live as long as this object.

    `batches` gives an epoch's batches as lists of indices, `reader` reads them, in `workers` processes but at most one
    per core; with 0, in this one.
    """

    def __init__(self, reader: BatchReader, batches: Callable[[int], list[list[int]]], workers: int):
        self.dataset, self._reader = reader.dataset, reader
        self._of_epoch = batches
        # The sampler is a list and not this object: in a reference cycle the workers would outlive it until killed.
        self._positions: list[tuple[int, list[int]]] = []
        workers = min(workers, cores())
        self._loader: DataLoader[Any] = DataLoader(
            reader,
            batch_size=None,
            sampler=self._positions,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            # One of its own, or it would draw from the generator of the training's other draws.
            generator=torch.Generator(),
        )
        self.at(0)

    def at(self, epoch: int, start_batch: int = 0) -> Loader:
        """Moves to a position and returns itself; ValueError if the epoch has no such batch."""
        batches = self._of_epoch(epoch)
        if not 0 <= start_batch <= len(batches):
            raise ValueError(f"an epoch has {len(batches)} batches, got `start_batch` = {start_batch}")
        self._positions[:] = [(epoch, batch) for batch in batches[start_batch:]]
        return self

    def __len__(self) -> int:
        """Batches from the position to the end of the epoch."""
        return len(self._positions)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, Exception):
                try:
                    raise batch
                finally:
                    del batch  # an error that its own traceback holds would be such a cycle
            for path, reason in batch.unreadable.items():
                if self.dataset.pass_over(path):
                    warnings.warn(f"{reason}; it is passed over", stacklevel=2)
            yield batch


def _start_worker(number: int) -> None:
    torch.set_num_threads(1)  # each worker has one core
    leave_stopping_to_main()
