# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: a function recorded once per shape of its inputs, and replayed with new values by one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gfl_ops.core import backends, checks

# Recordings that are kept; they share their memory, which is that of the largest, except for inputs and outputs.
GRAPHS = 32
# Runs before a capture: cuDNN chooses its algorithms, and what is loaded or allocated at the first use is there.
WARM_UP = 3
# Shapes whose last use is remembered, for each recording that is kept.
REMEMBERED = 64

Function = Callable[..., Any]
Context = Callable[[], AbstractContextManager[object]]
# Makes of a function and example inputs something that is called with inputs of the same shapes.
Record = Callable[[Function, Sequence[Tensor]], Function]


def host_waits(device: torch.device, *stems: str) -> list[str]:
    """Which of these operators make the host wait for the device, which a capture does not allow.

    The references do, since what they compute next depends on data, and so do the checks of ``GFL_OPS_CHECK=1``.
    """
    return [s for s in stems if checks.SYNCHRONISING or backends.serving(s, device.type) == "reference"]


class Graph:
    """A CUDA graph of a function, captured on a stream of its own.

    The function neither waits for the device nor allocates outside of torch. It is run a few times before the capture,
    within a context that `warm_up` makes, such as one that undoes what they change. `inputs` are of the shapes that it
    will be called with, and are copied. `device` is by default that of the inputs, or the current one. Graphs that
    never run at once may share a memory `pool`.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor] = (),
        *,
        device: torch.device | None = None,
        pool: Any = None,
        warm_up: Context = nullcontext,
    ) -> None:
        self._inputs = [x.clone() for x in inputs]
        self._device = inputs[0].device if inputs and device is None else device
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream(self._device)
            with warm_up():
                stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP):
                        function(*self._inputs)
                torch.cuda.current_stream(self._device).wait_stream(stream)
            # Other threads, such as one that pins memory, may call CUDA meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """What the function returns, in memory that the next call writes to.

        Inputs may be reused as soon as what was queued on the current stream is done.
        """
        with torch.cuda.device(self._device):
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given, non_blocking=True)
            self._graph.replay()
        return self._output


class GraphCache:
    """A recording per shapes of inputs and key, made when they are used a second time; all share one pool of memory.

    At most `limit` are kept. For a further one the recording used longest ago makes room, if the new shapes have come
    twice since; else, and at the first use of shapes, the function itself runs. So recordings that are used in turn
    never push each other out. `record` by default captures a `Graph` on `device`, whose `warm_up` is given.
    """

    def __init__(
        self,
        limit: int = GRAPHS,
        *,
        device: torch.device | None = None,
        warm_up: Context = nullcontext,
        record: Record | None = None,
    ) -> None:
        self._limit = limit
        self._record = record or partial(Graph, device=device, pool=torch.cuda.graph_pool_handle(), warm_up=warm_up)
        self._kept: dict[Hashable, Function] = {}
        self._runs = 0
        self._last_run: OrderedDict[Hashable, int] = OrderedDict()  # the longest ago first

    def run(self, function: Function, *inputs: Tensor, key: Hashable = ()) -> Any:
        """``function(*inputs)``, by the recording of these shapes if there is one.

        `key` holds whatever else the function's work depends on; the function is always the same for one key.
        """
        key = (key, *(tuple(x.shape) for x in inputs))
        if key not in self._kept and key in self._last_run and self._make_room(self._last_run[key]):
            self._kept[key] = self._record(function, inputs)
        self._runs += 1
        self._last_run[key] = self._runs
        self._last_run.move_to_end(key)
        if len(self._last_run) > REMEMBERED * self._limit:
            self._kept.pop(self._last_run.popitem(last=False)[0], None)
        return self._kept.get(key, function)(*inputs)

    def _make_room(self, since: int) -> bool:
        """Frees memory for one more, if something was last used before the run `since`."""
        if len(self._kept) < self._limit:
            return True
        oldest = min(self._kept, key=self._last_run.__getitem__)
        if self._last_run[oldest] > since:
            return False
        del self._kept[oldest]
        return True

    def __len__(self) -> int:
        return len(self._kept)


def few_shapes(images: Tensor, long_side: int, divisor: int) -> Tensor:
    """Images ``[B, C, H, W]`` padded with zeros so that batches of random scales come in few shapes.

    Sides become multiples of about an eighth of the `long_side` that they are limited to, itself a multiple of
    `divisor`: of 160 pixels for COCO's 1333.
    """
    step = divisor * max(1, round(long_side / (8 * divisor)))
    height, width = images.shape[2:]
    return functional.pad(images, (0, -width % step, 0, -height % step))
