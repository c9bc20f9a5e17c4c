# SPDX-License-Identifier: Apache-2.0
"""One training step: losses, gradients, new weights, all queued on the device; the host reads nothing back.

On a GPU the whole step may be a CUDA graph per batch shape, of which padding leaves few: images, sizes and objects are
copied to fixed places, the objects of an image into a fixed number of slots, and one launch does the rest, assignment
included.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..config import TrainConfig
from ..data.loader import Batch
from ..data.transforms import normalise
from ..models.autotune import CudnnTuning
from ..models.gfl import GFL
from ..models.losses import OPERATORS
from .graphs import GraphCache, few_shapes, host_waits
from .optimizer import SCALE

PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Step:
    """Takes batches on the device and updates the weights of `model`.

    `network` is the model, or what wraps it for several processes; `sums` are those of the model's losses, by its
    `loss_names`, since it was last zeroed, fp32 on the device. Without `graphs` every step is queued kernel by kernel.
    """

    def __init__(
        self, model: GFL, network: nn.Module, optimizer: Optimizer, settings: TrainConfig, device: torch.device
    ) -> None:
        self.model, self.network, self.optimizer, self.settings = model, network, optimizer, settings
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.losses = model.loss_names
        self.sums = torch.zeros(len(self.losses), device=device)
        self.graphs: GraphCache | None = None
        self._tuning = CudnnTuning()
        if settings.graph:
            check_graph(settings, device, network is not model)
            # A graph holds the operators of a step only if kernels run them.
            if without := host_waits(device, *OPERATORS[model.config.assignment], "group_norm_relu"):
                why = f"{', '.join(without)} run on the reference or with GFL_OPS_CHECK=1, which makes the host wait"
                warnings.warn(f"gfl: `graph` has no effect: {why}: see `gfl doctor`", RuntimeWarning, stacklevel=2)
            else:
                self.graphs = GraphCache(device=device, warm_up=lambda: preserve_training_state(self))

    def __call__(self, batch: Batch, rate: float) -> None:
        """One step at a learning rate."""
        self.set_rate(rate)
        images = batch.images
        count = self.settings.accumulate
        graphed = self.graphs is not None and max(batch.counts, default=0) <= self.settings.graph_slots
        if graphed:
            images = few_shapes(images, self.settings.train_long_side, self.model.test.size_divisor)
        with torch.cuda.device_of(images), self._tuning(images):
            if self.graphs is not None and graphed:
                objects = slots(batch, self.settings.graph_slots)
                self.graphs.run(self.compute, images, batch.image_sizes, *objects, key=self.model.aux_detached)
                return
            self.optimizer.zero_grad(set_to_none=True)
            for number, part in enumerate(batch.parts(count), 1):
                # Several processes add up their gradients once per step, with the last part.
                alone = isinstance(self.network, DistributedDataParallel) and number < count
                with self.network.no_sync() if alone else nullcontext():  # type: ignore[operator]
                    with self._precision(images.device):
                        inputs = self._input(part.images, part.image_sizes)
                        losses = self.network(inputs, part.image_sizes, targets=part.targets)
                    self._backward({name: loss / count for name, loss in losses.items()} if count > 1 else losses)
            self._descend()

    def set_rate(self, rate: float) -> None:
        """Of each group of weights, times its share; a graph reads it from a tensor, filled without waiting."""
        for group in self.optimizer.param_groups:
            own = rate * group.get(SCALE, 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(own)
            else:
                group["lr"] = own

    def compute(self, images: Tensor, image_sizes: Tensor, boxes: Tensor, labels: Tensor) -> None:
        """The step of a batch with its objects in `slots`; nothing in it makes the host wait."""
        with self._precision(images.device):
            losses = self.model.padded_loss(self._input(images, image_sizes), boxes, labels, image_sizes)
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(losses)
        self._descend()

    def _input(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        return normalise(images, image_sizes, self.model.config)

    def _precision(self, device: torch.device) -> torch.autocast:
        # Casts of weights are kept until the context ends, so that a layer of five levels casts its own once, and a
        # graph, which holds the whole context, casts them anew in each run.
        amp = self.settings.amp
        return torch.autocast(device.type, PRECISION.get(amp), enabled=amp in PRECISION)

    def _backward(self, losses: dict[str, Tensor]) -> None:
        values = [losses[name] for name in self.losses]
        self.scaler.scale(reduce(torch.add, values)).backward()
        self.sums += torch.stack([value.detach() for value in values])

    def _descend(self) -> None:
        if self.settings.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@contextmanager
def preserve_training_state(step: Step) -> Iterator[None]:
    """A context after which weights, statistics, optimizer and sums are as before, each in its place in memory.

    State that the optimizer creates within is zeroed: a momentum of 0 is what the first step starts from. Gradients are
    dropped.
    """
    places = [*step.model.parameters(), *step.model.buffers(), step.sums]
    values = [x.detach().clone() for x in places]
    before = {p: copy.deepcopy(state) for p, state in step.optimizer.state.items()}
    try:
        yield
    finally:
        step.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
            for parameter, state in step.optimizer.state.items():
                for name, value in state.items():
                    old = before.get(parameter, {}).get(name)
                    if isinstance(value, Tensor):
                        value.copy_(old) if isinstance(old, Tensor) else value.zero_()


def check_graph(settings: TrainConfig, device: torch.device, wrapped: bool) -> None:
    """Raises ValueError for a step that can't be a graph."""
    for wrong, text in (
        (device.type != "cuda", f"`graph` needs a GPU, the training is on {device}"),
        (wrapped, "`graph` is for one process"),
        (settings.amp == "fp16", "`graph` goes with `amp` none or bf16: fp16's scale is decided by the host"),
        (settings.accumulate > 1, "`graph` computes a batch at once: `accumulate` must be 1"),
        (settings.graph_slots < 1, f"`graph_slots` must be positive, got {settings.graph_slots}"),
    ):
        if wrong:
            raise ValueError(f"gfl: {text}")


def slots(batch: Batch, number: int) -> tuple[Tensor, Tensor]:
    """The objects in `number` slots per image, or a ValueError: boxes ``[B, G, 4]``, labels ``[B, G]``, −1 unused."""
    images, most = len(batch.counts), max(batch.counts, default=0)
    if most > number:
        raise ValueError(f"`graph_slots` is {number}, an image has {most} objects")
    # Where each object goes follows from the counts, which the host has: nothing is read back.
    places = [row * number + slot for row, count in enumerate(batch.counts) for slot in range(count)]
    place = torch.tensor(places, dtype=torch.int64)
    if batch.boxes.is_cuda:
        place = place.pin_memory()
    place = place.to(batch.boxes.device, non_blocking=True)
    boxes = batch.boxes.new_zeros(images * number, 4).index_copy_(0, place, batch.boxes)
    labels = batch.labels.new_full((images * number,), -1).index_copy_(0, place, batch.labels)
    return boxes.view(images, number, 4), labels.view(images, number)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device; on a GPU the next one is copied while the current one is computed."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies = torch.cuda.Stream(device)
    pending: tuple[Batch, torch.cuda.Event] | None = None
    for batch in chain(batches, [None]):
        with torch.cuda.stream(copies):
            ready, pending = pending, None if batch is None else (batch.to(device), copies.record_event())
        if ready is not None:
            now = torch.cuda.current_stream(device)
            now.wait_event(ready[1])
            for tensor in ready[0].tensors().values():
                tensor.record_stream(now)
            yield ready[0]
