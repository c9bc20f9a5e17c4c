# SPDX-License-Identifier: Apache-2.0
"""One step of a training: losses, gradients, new weights, all queued on the device; the host reads nothing back.

On a GPU the whole step may be a CUDA graph for each size of batch: images, sizes and objects are copied to fixed
places, the objects of an image into a fixed number of slots, and one launch does the rest, assignment included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..data.loader import Batch
from ..data.transforms import normalise
from ..models.gfl import GFL

LOSSES = ("loss_cls", "loss_bbox", "loss_dfl")
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Sizes of batches that get a graph, the first ones that come; they share their memory. A batch of another size is
# queued kernel by kernel.
GRAPHS = 16
# Steps before a capture, undone afterwards: cuDNN chooses, the optimiser makes its state.
WARM_UP = 3


class Step:
    """Takes batches on the device and changes the weights.

    Args:
        model: what is trained.
        network: the model, or what wraps it for several processes.
        optimizer: of its weights.
        settings: precision, limit of the gradient's norm, graphs and their slots.
        device: of all.

    Attributes:
        sums: fp32 ``[3]`` on the device, of the `LOSSES` since it was last zeroed.
        scaler: of the loss, for fp16.
    """

    def __init__(
        self,
        model: GFL,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: TrainConfig,
        device: torch.device,
    ) -> None:
        self.model, self.network, self.optimizer, self.settings = model, network, optimizer, settings
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.sums = torch.zeros(len(LOSSES), device=device)
        self._graphs: dict[tuple[int, ...], _Recording] | None = {} if settings.graph else None
        self._pool: Any = None
        if settings.graph:
            check_graph(settings, device, network is not model)
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch, rate: float) -> None:
        """One step at a learning rate."""
        self.set_rate(rate)
        if self._graphs is not None and max(batch.counts, default=0) <= self.settings.graph_slots:
            key = tuple(batch.images.shape)
            inputs = (batch.images, batch.image_sizes, *slots(batch, self.settings.graph_slots))
            if key not in self._graphs and len(self._graphs) < GRAPHS:
                self._graphs[key] = _Recording(self, inputs, self._pool)
            if key in self._graphs:
                self._graphs[key](inputs)
                return
        images = self._images(batch.images, batch.image_sizes)
        with self._precision(images.device):
            losses = self.network(images, batch.image_sizes, targets=batch.targets)
        self._descend(losses)

    def set_rate(self, rate: float) -> None:
        """In a graph a tensor, which is filled without waiting."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def compute(self, images: Tensor, image_sizes: Tensor, boxes: Tensor, labels: Tensor) -> None:
        """The step of a batch with its objects in slots; nothing in it asks the device.

        Args:
            images: uint8 ``[B, 3, H, W]``.
            image_sizes: fp32 ``[B, 2]``, (height, width) without padding.
            boxes: fp32 ``[B, G, 4]``, labels: int64 ``[B, G]``, −1 in slots that are not used.
        """
        inputs = self._images(images, image_sizes)
        with self._precision(images.device):
            losses = self.model.padded_loss(inputs, boxes, labels, image_sizes)
        self._descend(losses)

    def _images(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        # In uint8 until here: the images travel in a byte a value.
        return normalise(images, image_sizes)

    def _precision(self, device: torch.device) -> torch.autocast:
        amp = self.settings.amp
        # A graph is captured with the casts of the weights in it, made anew by each run.
        kept = self._graphs is None
        return torch.autocast(device.type, PRECISION.get(amp), enabled=amp in PRECISION, cache_enabled=kept)

    def _descend(self, losses: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        cls, box, dfl = (losses[name] for name in LOSSES)
        self.scaler.scale(cls + box + dfl).backward()
        if self.settings.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums += torch.stack([cls.detach(), box.detach(), dfl.detach()])


class _Recording:
    """A CUDA graph of a step at one size of batch."""

    def __init__(self, step: Step, inputs: tuple[Tensor, ...], pool: Any) -> None:
        self._inputs = [x.clone() for x in inputs]
        with unchanged(step):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP):
                    step.compute(*self._inputs)
            torch.cuda.current_stream().wait_stream(beside)
        step.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        # Capturing computes nothing: weights are as before.
        with torch.cuda.graph(self._graph, pool=pool):
            step.compute(*self._inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> None:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()


class unchanged:
    """A context after which weights, statistics, optimiser and sums are as before, each in its place in memory.

    State that the optimiser makes within is zeroed: a momentum of 0 is what the first step starts from.
    """

    def __init__(self, step: Step) -> None:
        self._step = step

    def __enter__(self) -> None:
        step = self._step
        self._weights = [(x, x.detach().clone()) for x in (*step.model.parameters(), *step.model.buffers())]
        self._sums = step.sums.clone()
        self._state = {p: copy.deepcopy(state) for p, state in step.optimizer.state.items()}

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for place, value in self._weights:
            place.copy_(value)
        self._step.sums.copy_(self._sums)
        for parameter, state in self._step.optimizer.state.items():
            before = self._state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor):
                    value.copy_(before[name]) if isinstance(before.get(name), Tensor) else value.zero_()


def check_graph(settings: TrainConfig, device: torch.device, wrapped: bool) -> None:
    """
    Raises:
        ValueError: a graph of the step that can't be.
    """
    if device.type != "cuda":
        raise ValueError(f"gfl: `graph` needs a GPU, the training is on {device}")
    if wrapped:
        raise ValueError("gfl: `graph` is for one process")
    if settings.amp == "fp16":
        raise ValueError("gfl: `graph` goes with `amp` none or bf16: fp16's scale is decided by the host")
    if settings.graph_slots < 1:
        raise ValueError(f"gfl: `graph_slots` must be positive, got {settings.graph_slots}")


def slots(batch: Batch, number: int) -> tuple[Tensor, Tensor]:
    """The objects of a batch in `number` slots an image: boxes fp32 ``[B, G, 4]``, labels int64 ``[B, G]``, −1 unused.

    Raises:
        ValueError: an image has more objects.
    """
    images = len(batch.counts)
    most = max(batch.counts, default=0)
    if most > number:
        raise ValueError(f"`graph_slots` is {number}, an image has {most} objects")
    # Where each object goes follows from the counts, which the host has: nothing is read back.
    place = torch.tensor([row * number + slot for row, count in enumerate(batch.counts) for slot in range(count)])
    if batch.boxes.is_cuda:
        place = place.pin_memory()
    place = place.to(batch.boxes.device, non_blocking=True, dtype=torch.int64)
    boxes = batch.boxes.new_zeros(images * number, 4).index_copy_(0, place, batch.boxes)
    labels = batch.labels.new_full((images * number,), -1).index_copy_(0, place, batch.labels)
    return boxes.view(images, number, 4), labels.view(images, number)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device; on a GPU the next one is copied while it computes."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copies = torch.cuda.Stream(device)

    def send(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            return batch.to(device), copies.record_event()

    def receive(batch: Batch, copied: torch.cuda.Event) -> Batch:
        now = torch.cuda.current_stream(device)
        now.wait_event(copied)
        for part in (batch.images, batch.image_sizes, batch.scale_factors, batch.boxes, batch.labels):
            part.record_stream(now)
        return batch

    coming: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        here, coming = coming, send(batch)
        if here is not None:
            yield receive(*here)
    if coming is not None:
        yield receive(*coming)
