# SPDX-License-Identifier: Apache-2.0
"""The processes of a training started by ``torchrun``; a single process is a special case."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Process:
    """This process among those of the training."""

    rank: int  # its number, from 0
    world: int  # how many there are
    device: torch.device  # computes its share of the batch

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes(device: str | None = None) -> Iterator[Process]:
    """Joins the group that ``torchrun`` started, NCCL on GPUs and gloo on CPUs, and leaves it at the end.

    The device is `choose_device`'s, by default the GPU of this process's local rank, and so are the errors. Within, it
    is torch's current one.
    """
    single = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, world, local = (int(os.environ.get(name, default)) for name, default in single.items())
    where = choose_device(device, local)
    joined = world > 1 and not dist.is_initialized()
    with current_device(where):
        if joined and where.type == "cuda":
            dist.init_process_group("nccl", device_id=where)
        elif joined:
            dist.init_process_group("gloo")
        try:
            yield Process(rank, world, where)
        finally:
            if joined:
                dist.destroy_process_group()


def current_device(device: torch.device | str) -> AbstractContextManager[object]:
    """A context in which a GPU is torch's current device; nothing for a CPU.

    Collectives of objects, barriers, events and pinned memory are the current device's, whatever their tensors are on.
    """
    where = torch.device(device)
    return torch.cuda.device(where) if where.type == "cuda" else nullcontext()


def choose_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The device of that name; for None the GPU numbered `local_rank`, or the CPU where torch has no GPU.

    It is a ValueError if torch does not know the device or this machine does not have it. torch's current device stays
    what it is.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"`device` must be one of torch's, as cpu, cuda or cuda:1, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"`device` is {name!r}, but torch {torch.__version__} sees no GPU here")
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"`device` is {device}, but there are {torch.cuda.device_count()} GPUs")
    return device
