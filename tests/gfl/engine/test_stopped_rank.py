# SPDX-License-Identifier: Apache-2.0
"""Processes that wait for one that is stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, torch, torch.distributed as dist
from gfl.engine import distributed
distributed.ANSWER = 2.0
with distributed.processes("cpu", timeout=4.0) as process:
    process.wait()
    if process.rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(3))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP there")
@pytest.mark.parametrize("stopped", [0, 1])
def test_the_rank_that_does_not_answer_is_named(stopped: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    base |= {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(stopped)],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        _, errors = processes[1 - stopped].communicate(timeout=120)
        assert f"RuntimeError: rank {stopped} did not answer within 4 s" in errors
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
