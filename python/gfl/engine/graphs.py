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

# Runs before a capture: cuDNN chooses its algorithms, and what is loaded or allocated at the first use is there.
WARM_UP = 3

Function = Callable[..., Any]
Context = Callable[[], AbstractContextManager[object]]
# Makes of a function and example inputs something that is called with inputs of the same shapes.
Record = Callable[[Function, Sequence[Tensor]], Function]


class Graph:
    """A CUDA graph of a function, captured on a stream of its own.

    The function neither waits for the device nor allocates outside of torch. It is run a few times before the capture,
    within a context that `warm_up` makes, such as one that undoes what they change. `inputs` are of the shapes that it
    will be called with, and are copied; without any, `device` tells the device, by default the current one. Graphs that
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
        self._device = inputs[0].device if inputs else device
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream(self._device)
            with warm_up():
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP):
                        function(*self._inputs)
                torch.cuda.current_stream().wait_stream(stream)
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
    """A recording per shapes of inputs and key, at most `limit`; all share one pool of memory.

    With `evict` the one used longest ago makes room for another; otherwise calls of further shapes run the function.
    `record` by default captures a `Graph`, whose `warm_up` is given.
    """

    def __init__(
        self, limit: int, *, evict: bool = True, warm_up: Context = nullcontext, record: Record | None = None
    ) -> None:
        self._limit, self._evict = limit, evict
        self._record = record or partial(Graph, pool=torch.cuda.graph_pool_handle(), warm_up=warm_up)
        self._kept: OrderedDict[Hashable, Function] = OrderedDict()

    def run(self, function: Function, *inputs: Tensor, key: Hashable = ()) -> Any:
        """``function(*inputs)`` by the recording of these shapes, which is made if missing.

        `key` holds whatever else the function's work depends on; the function is always the same for one key.
        """
        key = (key, *(tuple(x.shape) for x in inputs))
        if key not in self._kept:
            if len(self._kept) >= self._limit and not self._evict:
                return function(*inputs)
            # The one that goes is freed before the new one takes memory.
            while len(self._kept) >= self._limit:
                self._kept.popitem(last=False)
            self._kept[key] = self._record(function, inputs)
        self._kept.move_to_end(key)
        return self._kept[key](*inputs)

    def __len__(self) -> int:
        return len(self._kept)
