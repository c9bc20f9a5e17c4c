# SPDX-License-Identifier: Apache-2.0
"""The processes of a training started by ``torchrun``; a single process is a special case."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Seconds that a process waits for the others, and for their answer when it has waited so long.
TIMEOUT, ANSWER = 600.0, 10.0
_LOST = re.compile(r"(?i)timed? ?out|connection (closed|reset|refused)|closed by peer")


@dataclass(frozen=True)
class Process:
    """This process among those of the training."""

    rank: int  # its number, from 0
    world: int  # how many there are
    device: torch.device  # computes its share of the batch
    host: Any = None  # a group for what processes tell each other on the CPU; None for a single process

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes(device: str | None = None, timeout: float = TIMEOUT) -> Iterator[Process]:
    """Joins the group that ``torchrun`` started, NCCL on GPUs and gloo on CPUs, and leaves it at the end.

    The device is `choose_device`'s, by default the GPU of this process's local rank, and so are the errors. Within, it
    is torch's current one. A process that waits `timeout` seconds for another raises a RuntimeError that names the
    ranks which don't answer.
    """
    single = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, world, local = (int(os.environ.get(name, default)) for name, default in single.items())
    where = choose_device(device, local)
    joined = world > 1 and not dist.is_initialized()
    limit = timedelta(seconds=timeout)
    with current_device(where):
        if joined and where.type == "cuda":
            dist.init_process_group("nccl", device_id=where, timeout=limit)
        elif joined:
            dist.init_process_group("gloo", timeout=limit)
        # Of its own, since a group is unusable after an error.
        monitor = dist.new_group(backend="gloo", timeout=limit) if joined else None
        host = dist.new_group(backend="gloo", timeout=limit) if world > 1 else None
        try:
            yield Process(rank, world, where, host)
        except RuntimeError as error:
            if not joined or not _LOST.search(str(error)):
                raise
            raise RuntimeError(f"{_silent(monitor, rank)} within {timeout:.0f} s: {error}") from error
        finally:
            if joined:
                dist.destroy_process_group()


def current_device(device: torch.device | str) -> AbstractContextManager[object]:
    """A context in which a GPU is torch's current device; nothing for a CPU.

    Collectives of objects, barriers, events and pinned memory are the current device's, whatever their tensors are on.
    """
    where = torch.device(device)
    return torch.cuda.device(where) if where.type == "cuda" else nullcontext()


def _silent(monitor: Any, rank: int) -> str:
    """Says which ranks don't answer any more; those that do all come here after the same time."""
    try:
        dist.monitored_barrier(monitor, timedelta(seconds=ANSWER), wait_all_ranks=True)
    except RuntimeError as error:
        # Rank 0 asks all others; they ask rank 0.
        listed = re.search(r"[Rr]anks? ([\d, ]+?) failed", str(error))
        return f"rank {listed[1] if rank == 0 and listed else 0} did not answer"
    return "a rank did not answer"


def choose_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The device of that name, as cuda:1 or 1; for None the GPU numbered `local_rank`, or the CPU where there is none.

    It is a ValueError if torch does not know the device or this machine does not have it. torch's current device stays
    what it is.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{name}" if name.isdecimal() else name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"`device` must be cpu, cuda, or a GPU as cuda:1 or 1, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"`device` is {name!r}, but torch {torch.__version__} sees no GPU here")
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"`device` is {device}, but there are {torch.cuda.device_count()} GPUs")
    return device
