# SPDX-License-Identifier: Apache-2.0
"""Batches of images through a detector as fast as the device allows: the work behind ``Detector(…, optimize=True)``.

There the network is `models.fused.FusedGFL`. On a GPU everything from uint8 images to boxes is one CUDA graph per batch
shape; images are copied from pinned memory and resized on a stream of their own while the batch before is computed, and
the host waits for nothing but the detections.

The shape is that of the images, padded to a multiple of 32 and no further: cells of the padding have logits too and
count in the group norms, so that every box would depend on it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import gfl_ops

from ..config import InferenceConfig, ModelConfig
from ..data import transforms
from ..draw import Edges
from ..models.autotune import CudnnTuning
from ..models.fused import FusedGFL
from ..models.gfl import GFL, locations
from .distributed import current_device
from .graphs import GraphCache, host_waits

T = TypeVar("T")

# Networks that are in use, or were; see `testing`.
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()


class InputBatch(NamedTuple):
    """Images as the network takes them except for normalising."""

    images: Tensor  # uint8 [B, 3, H, W] on the device, padded right and below
    sizes: Tensor  # fp32 [B, 2], (height, width) without padding
    scale_factors: Tensor | None = None  # fp32 [B, 2], (width, height) that boxes are divided by


class Predictions(NamedTuple):
    """Detections of a batch in the network's pixels, or divided by its factors, and their edges if requested."""

    detections: gfl_ops.Detections
    edges: Edges | None  # [B, K, …] each, in the network's pixels; unused slots mean nothing


class Pipeline:
    """Runs a detector, any `GFL` on `device` and in evaluation, on batches of images.

    Its settings in `test` may change between batches. With `graphs` a GPU has one CUDA graph per batch shape, where
    kernels serve that a graph can hold; with `compile` the network's kernels are `torch.compile`'s, and the first batch
    of each shape takes minutes. Calls of several threads come one after another by `testing`.
    """

    def __init__(self, network: GFL, device: torch.device, *, graphs: bool = False, compile: bool = False) -> None:
        self.network, self.device = network, device
        self.maps: Callable[[Tensor], tuple[list[Tensor], list[Tensor]]] = network.predict_maps
        if compile:
            self.maps = torch.compile(network.predict_maps, dynamic=False)
        # Here and not in the network: a setting that a compiled network changes would break it into several graphs.
        self._tuning = CudnnTuning()
        self.graphs = GraphCache(device=device) if graphs and device.type == "cuda" else None
        self._copies = torch.cuda.Stream(device) if self.graphs is not None else None
        self._done: torch.cuda.Event | None = None  # the last use of the graphs' memory
        self._unwanted: dict[tuple[int, ...], Tensor] = {}  # masks of classes; graphs read them
        self.seconds = (0.0, 0.0)  # of the last batch on a CPU: the network, and from its maps to boxes

    def graphed(self) -> bool:
        """Whether batches run as graphs, by the backend that is set now."""
        return self.graphs is not None and not host_waits(self.device, "postprocess")

    def stage(self, image: Tensor) -> Tensor:
        """An image of the CPU where `load` takes it from; for any thread."""
        return image if self._copies is None else image.pin_memory()

    def load(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], rows: int = 0) -> InputBatch:
        """Images uint8 ``[3, H, W]`` of the CPU on the device, resized to the (height, width) in `sizes` and padded.

        With graphs this happens while the device computes, and empty images fill the batch up to `rows`.
        """
        test = self.network.test
        divisor, resize = test.size_divisor, partial(transforms.resize, stretch=test.resize == "stretch")
        if self._copies is None:
            # Also on a GPU without graphs: results are to be the CPU's.
            resized = [resize(image, *size) for image, size in zip(images, sizes, strict=True)]
            return InputBatch(*(part.to(self.device) for part in transforms.pad(resized, divisor)))
        with current_device(self.device):
            with torch.cuda.stream(self._copies):
                sent = [self._send(image) for image in images]
                resized = [resize(image, *size, fp32=True) for image, size in zip(sent, sizes, strict=True)]
                resized += [sent[0].new_zeros(3, 1, 1)] * (rows - len(sent))
                batch, inner = transforms.pad(resized, divisor)
                loaded = InputBatch(batch, self._send(inner))
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._copies)
            for tensor in loaded[:2]:
                # Allocated on the other stream: its memory may be reused there only when this one is done with it.
                tensor.record_stream(now)
        return loaded

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @torch.no_grad()
    def run(self, batch: InputBatch, *, edges: bool = False, without: tuple[int, ...] = ()) -> Predictions:
        """Detections of a batch, none of the classes `without`; on a GPU they are queued, not there yet."""
        if without and without not in self._unwanted:
            mask = torch.zeros(self.network.config.num_classes, 1, 1, dtype=torch.bool)
            mask[list(without)] = True
            self._unwanted[without] = mask.to(self.device)
        function, inputs = partial(self._predict, edges=edges, without=without), [x for x in batch if x is not None]
        with current_device(self.device):
            if self.graphs is None or not self.graphed():
                return function(*inputs)
            # Graphs share memory, and threads may have streams of their own.
            now = torch.cuda.current_stream(self.device)
            if self._done is not None:
                now.wait_event(self._done)
            key = (gfl_ops.get_backend(), edges, without, *dataclasses.astuple(self.network.test))
            # The next run writes to the same places.
            found: Predictions = tree_map_only(Tensor, torch.clone, self.graphs.run(function, *inputs, key=key))
            self._done = now.record_event()
            return found

    def _predict(
        self,
        images: Tensor,
        sizes: Tensor,
        scale_factors: Tensor | None = None,
        *,
        edges: bool,
        without: tuple[int, ...] = (),
    ) -> Predictions:
        begun = time.perf_counter()
        whole = False  # on a GPU to know would be to wait
        if self.graphs is None and sizes.device.type == "cpu":
            whole = bool((sizes == sizes.new_tensor(images.shape[2:])).all())
        normalised = transforms.normalise(images, None if whole else sizes, self.network.config)
        with self._tuning(normalised):
            cls_scores, reg_preds = self.maps(normalised)
        middle = time.perf_counter()
        if without:
            cls_scores = [scores.masked_fill(self._unwanted[without], -torch.inf) for scores in cls_scores]
        found = self.network.read_maps(cls_scores, reg_preds, sizes, scale_factors)
        result = Predictions(found, _edges(reg_preds, found.locations, self.network.config) if edges else None)
        self.seconds = (middle - begun, time.perf_counter() - middle)
        return result


def _edges(reg_preds: Sequence[Tensor], found: Tensor, config: ModelConfig) -> Edges:
    """The distributions at the locations `found`, ``[B, K]``."""
    points, strides = locations(config, [(x.shape[2], x.shape[3]) for x in reg_preds], found.device)
    place = found.clamp(min=0)
    probabilities = gfl_ops.side_distributions(reg_preds, found, config.reg_max)
    return Edges(probabilities, points[place], strides.expand(-1, 2)[place])


@contextmanager
def testing(model: Any, test: InferenceConfig) -> Iterator[None]:
    """The model in evaluation by the settings `test`, if it has such; afterwards it is as before.

    One thread at a time is within: modes, settings and the memory of graphs are the model's, not a thread's.
    """
    with _LOCKS.setdefault(model, threading.RLock()):
        # A fused network is always in evaluation, and to ask its hundreds of modules takes milliseconds.
        trained = [] if isinstance(model, FusedGFL) else [module for module in model.modules() if module.training]
        before = getattr(model, "test", None)
        if trained:
            model.eval()
        if before is not None:
            model.test = test
        try:
            yield
        finally:
            for module in trained:
                module.training = True
            if before is not None:
                model.test = before


def fetch(found: T, device: torch.device) -> Callable[[], T]:
    """Starts to copy tensors from the device to the CPU; what it returns waits for them all at once and gives them."""
    if device.type != "cuda":
        return lambda: found

    def copy(x: Tensor) -> Tensor:
        return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)

    with current_device(device):
        copies: T = tree_map_only(Tensor, copy, found)
        copied = torch.cuda.current_stream(device).record_event()

    def wait() -> T:
        copied.synchronize()
        return copies

    return wait


def batches_by_shape(
    items: Iterable[T], shape: Callable[[T], Hashable], size: int, span: int
) -> Iterator[list[tuple[int, T]]]:
    """Up to `size` items of one shape at a time, each with its position.

    None is held back until more than `span` further ones have come, so that few are in memory and results can be put in
    order.
    """
    waiting: dict[Hashable, list[tuple[int, T]]] = {}
    for place, item in enumerate(items):
        group = waiting.setdefault(shape(item), [])
        group.append((place, item))
        if len(group) == size:
            yield waiting.pop(shape(item))
        # The first one in the dictionary has waited longest.
        while waiting and place - next(iter(waiting.values()))[0][0] >= span:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()
