# SPDX-License-Identifier: Apache-2.0
"""Batches of images through a detector as fast as the device allows: the work behind ``Detector(…, optimize=True)``.

There the network is `models.fused.FusedGFL`. On a GPU everything from uint8 images to boxes is one CUDA graph per batch
shape; images are copied from pinned memory and resized on a stream of their own while the batch before is computed, and
the host waits for nothing but the detections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import gfl_ops

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
    """Runs a detector on batches of images.

    Args:
        network: any `GFL` on `device`, in evaluation while it runs. Its settings in `test` may change between batches.
        device: to compute on.
        graphs: on a GPU, one CUDA graph per batch shape.
        compile: let `torch.compile` make the network's kernels: the first batch of each shape takes minutes.
    """

    def __init__(self, network: GFL, device: torch.device, *, graphs: bool = False, compile: bool = False) -> None:
        self.network = network
        self.device = device
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
            batch, inner = transforms.pad(resized, divisor)
            return InputBatch(batch.to(self.device), inner.to(self.device))
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


class PendingDetections:
    """Detections on their way to the CPU."""

    def __init__(self, detections: gfl_ops.Detections) -> None:
        self._copied: torch.cuda.Event | None = None
        self._detections = detections
        if detections.boxes.is_cuda:
            pinned = gfl_ops.Detections(*(torch.empty_like(x, device="cpu", pin_memory=True) for x in detections))
            for mine, given in zip(pinned, detections):
                mine.copy_(given, non_blocking=True)
            self._detections = pinned
            self._copied = torch.cuda.current_stream(detections.boxes.device).record_event()

    def wait(self) -> gfl_ops.Detections:
        """The batch's detections, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._detections
