# SPDX-License-Identifier: Apache-2.0
"""Batches of photos through a detector as fast as the device allows: the work behind ``Detector(…, optimize=True)``.

There the network is `models.fused.FusedGFL`. On a GPU all from uint8 images to boxes is one CUDA graph for each size
of batch; images are copied from pinned memory and resized on a stream of their own, while the batch before is computed,
and detections come back without the host waiting for anything but them.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

import gfl_ops

from ..data import transforms
from ..models.gfl import GFL

# Sizes of batches that a graph is kept for; they share their memory, which is that of the largest.
GRAPHS = 8
# Runs before a graph is captured: they let cuDNN choose, and load what is loaded at the first use.
WARM_UP = 3


class Batch(NamedTuple):
    """Photos as the network takes them but for normalising.

    Attributes:
        images: uint8 ``[B, 3, H, W]`` on the device, padded right and below.
        sizes: fp32 ``[B, 2]``, (height, width) without padding.
    """

    images: Tensor
    sizes: Tensor


class Found(NamedTuple):
    """What a batch gave: detections in the network's pixels, and the maps they were read from.

    The maps are a graph's own memory on a GPU, valid until the next batch is started.
    """

    detections: gfl_ops.Detections
    cls_scores: list[Tensor]
    reg_preds: list[Tensor]


Function = Callable[..., Found]


class Captured(Protocol):
    """A function recorded for inputs of some shapes; called with others of the same shapes."""

    def __call__(self, *inputs: Tensor) -> Found: ...


class Recent:
    """A captured function for each key, of which the `limit` used last are kept.

    Args:
        capture: records a function at example inputs.
        limit: how many recordings are kept.
    """

    def __init__(self, capture: Callable[[Function, Sequence[Tensor]], Captured], limit: int = GRAPHS) -> None:
        self._capture, self._limit = capture, limit
        self._kept: OrderedDict[Hashable, Captured] = OrderedDict()

    def run(self, key: Hashable, function: Function, *inputs: Tensor) -> Found:
        """``function(*inputs)``, recorded under `key` if it is not yet."""
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            # The one that goes is freed before the new one takes memory.
            while len(self._kept) >= self._limit:
                self._kept.popitem(last=False)
            self._kept[key] = self._capture(function, inputs)
        return self._kept[key](*inputs)

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept


class Graph:
    """A CUDA graph of a function.

    Args:
        function: neither waits for the device nor allocates outside of torch.
        inputs: of the shapes that it will be called with; they are copied.
        pool: memory that graphs which never run at once may share.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor], pool: Any = None) -> None:
        self._inputs = [x.clone() for x in inputs]
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._found = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Found:
        """Inputs may be reused as soon as what was queued on the current stream is done."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        # The next run writes to the same places.
        detections = gfl_ops.Detections(*(part.clone() for part in self._found.detections))
        return self._found._replace(detections=detections)


class Engine:
    """Runs a detector on batches of photos.

    Args:
        network: any `GFL` on `device`, in evaluation while it runs. Its settings in `test` may change between batches.
        device: to compute on.
        graphs: on a GPU, one CUDA graph a size of batch.
        compile: let `torch.compile` make the network's kernels: the first batch of each size takes minutes.
    """

    def __init__(self, network: GFL, device: torch.device, *, graphs: bool = False, compile: bool = False) -> None:
        self.network = network
        self.device = device
        self.maps: Callable[[Tensor], tuple[list[Tensor], list[Tensor]]] = network.predict_maps
        if compile:
            self.maps = torch.compile(network.predict_maps, dynamic=False)
        self._recent: Recent | None = None
        if graphs and device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            self._recent = Recent(lambda function, inputs: Graph(function, inputs, pool))
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load(self, photos: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Batch:
        """Photos on the device, resized and padded; on a GPU beside what it computes.

        Args:
            photos: uint8 ``[3, H, W]`` each, on the CPU.
            sizes: (height, width) that each is resized to.
        """
        divisor = self.network.test.size_divisor
        if self._copies is None or self._recent is None:
            # On a GPU too where results are to be the CPU's: its resizing rounds otherwise.
            resized = [transforms.resize(photo, *size) for photo, size in zip(photos, sizes, strict=True)]
            images, inner = transforms.pad(resized, divisor)
            return Batch(images.to(self.device), inner.to(self.device))
        with torch.cuda.stream(self._copies):
            sent = [self._send(photo) for photo in photos]
            batch = Batch(resize_and_pad(sent, sizes, divisor), self._send(torch.tensor(sizes, dtype=torch.float32)))
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._copies)
        for part in batch:
            # Made on the other stream: its memory may go back there only when this one is done with it.
            part.record_stream(now)
        return batch

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @torch.no_grad()
    def run(self, batch: Batch) -> Found:
        """Detections of a batch in pixels of the network's input; on a GPU they are queued, not there yet."""
        if self._recent is None:
            return self._find(*batch)
        key = (tuple(batch.images.shape), dataclasses.astuple(self.network.test))
        return self._recent.run(key, self._find, *batch)

    def _find(self, images: Tensor, sizes: Tensor) -> Found:
        maps = self.maps(transforms.normalise(images, sizes))
        return Found(self.network.read_maps(*maps, sizes), *maps)


class Coming:
    """Detections on their way to the CPU."""

    def __init__(self, detections: gfl_ops.Detections) -> None:
        self._event: torch.cuda.Event | None = None
        self._here = detections
        if detections.boxes.is_cuda:
            self._here = gfl_ops.Detections(*(torch.empty_like(x, device="cpu", pin_memory=True) for x in detections))
            for mine, given in zip(self._here, detections):
                mine.copy_(given, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> gfl_ops.Detections:
        """Those of the batch, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._here


def resize_and_pad(photos: Sequence[Tensor], sizes: Sequence[tuple[int, int]], divisor: int) -> Tensor:
    """`transforms.resize` and `transforms.pad` where the photos are, in fp32: within one level of theirs.

    Args:
        photos: uint8 ``[3, H, W]`` each, of one device.
        sizes: (height, width) of each in the batch.
        divisor: of the padded height and width, pixels.

    Returns:
        uint8 ``[B, 3, H, W]`` in channels-last order in memory, zero in the padding.
    """
    height, width = (-(-max(size[i] for size in sizes) // divisor) * divisor for i in (0, 1))
    batch = photos[0].new_zeros((len(photos), 3, height, width)).contiguous(memory_format=torch.channels_last)
    for row, photo, (h, w) in zip(batch, photos, sizes, strict=True):
        if tuple(photo.shape[1:]) == (h, w):
            row[:, :h, :w] = photo
            continue
        resized = functional.interpolate(photo[None].float(), (h, w), mode="bilinear", align_corners=False)[0]
        row[:, :h, :w] = resized.round_().clamp_(0, 255)
    return batch
