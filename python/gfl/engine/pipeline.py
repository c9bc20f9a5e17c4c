# SPDX-License-Identifier: Apache-2.0
"""Batches of images through a detector as fast as the device allows: the work behind ``Detector(…, optimize=True)``.

There the network is `models.fused.FusedGFL`. On a GPU everything from uint8 images to boxes is one CUDA graph per batch
shape; images are copied from pinned memory and resized on a stream of their own while the batch before is computed, and
the host waits for nothing but the detections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gfl_ops

from ..config import InferenceConfig
from ..data import transforms
from ..models.gfl import GFL
from .graphs import GraphCache

# Batch shapes that a graph is kept for; they share their memory, which is that of the largest.
GRAPHS = 8


class InputBatch(NamedTuple):
    """Images as the network takes them except for normalising."""

    images: Tensor  # uint8 [B, 3, H, W] on the device, padded right and below
    sizes: Tensor  # fp32 [B, 2], (height, width) without padding


class Predictions(NamedTuple):
    """Detections of a batch in the network's pixels, and the maps they were read from.

    With graphs the maps are valid until the next batch starts.
    """

    detections: gfl_ops.Detections
    cls_scores: list[Tensor]
    reg_preds: list[Tensor]


class Pipeline:
    """Runs a detector, any `GFL` on `device` and in evaluation, on batches of images.

    Its settings in `test` may change between batches. With `graphs` a GPU has one CUDA graph per batch shape; with
    `compile` the network's kernels are `torch.compile`'s, and the first batch of each shape takes minutes.
    """

    def __init__(self, network: GFL, device: torch.device, *, graphs: bool = False, compile: bool = False) -> None:
        self.network, self.device = network, device
        self.maps: Callable[[Tensor], tuple[list[Tensor], list[Tensor]]] = network.predict_maps
        if compile:
            self.maps = torch.compile(network.predict_maps, dynamic=False)
        self.graphs = GraphCache(GRAPHS) if graphs and device.type == "cuda" else None
        self._copies = torch.cuda.Stream(device) if self.graphs is not None else None

    def load(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> InputBatch:
        """Images uint8 ``[3, H, W]`` of the CPU on the device, resized to the (height, width) in `sizes` and padded.

        With graphs this happens while the device computes.
        """
        divisor = self.network.test.size_divisor
        if self._copies is None:
            # Also on a GPU without graphs: results are to be the CPU's.
            resized = [transforms.resize(image, *size) for image, size in zip(images, sizes, strict=True)]
            return InputBatch(*(part.to(self.device) for part in transforms.pad(resized, divisor)))
        with torch.cuda.stream(self._copies):
            sent = [self._send(image) for image in images]
            resized = [transforms.resize(image, *size, fp32=True) for image, size in zip(sent, sizes, strict=True)]
            batch, inner = transforms.pad(resized, divisor)
            loaded = InputBatch(batch, self._send(inner))
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._copies)
        for tensor in loaded:
            # Allocated on the other stream: its memory may be reused there only when this one is done with it.
            tensor.record_stream(now)
        return loaded

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @torch.no_grad()
    def run(self, batch: InputBatch) -> Predictions:
        """Detections of a batch in pixels of the network's input; on a GPU they are queued, not there yet."""
        if self.graphs is None:
            return self._predict(*batch)
        found: Predictions = self.graphs.run(self._predict, *batch, key=dataclasses.astuple(self.network.test))
        # The next run writes to the same places.
        return found._replace(detections=gfl_ops.Detections(*(x.clone() for x in found.detections)))

    def _predict(self, images: Tensor, sizes: Tensor) -> Predictions:
        maps = self.maps(transforms.normalise(images, sizes))
        return Predictions(self.network.read_maps(*maps, sizes), *maps)


@contextmanager
def testing(model: Any, test: InferenceConfig) -> Iterator[None]:
    """The model in evaluation by the settings `test`, if it has such; afterwards it is as before."""
    modes = [(module, module.training) for module in model.modules()]
    before = getattr(model, "test", None)
    model.eval()
    if before is not None:
        model.test = test
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if before is not None:
            model.test = before


def fetch(detections: gfl_ops.Detections) -> Callable[[], gfl_ops.Detections]:
    """Starts to copy detections to the CPU; what it returns waits for them and gives them."""
    if not detections.boxes.is_cuda:
        return lambda: detections
    pinned = gfl_ops.Detections(*(torch.empty_like(x, device="cpu", pin_memory=True) for x in detections))
    for mine, given in zip(pinned, detections):
        mine.copy_(given, non_blocking=True)
    copied = torch.cuda.current_stream(detections.boxes.device).record_event()

    def wait() -> gfl_ops.Detections:
        copied.synchronize()
        return pinned

    return wait
