# SPDX-License-Identifier: Apache-2.0
"""What the processes of a program do about signals."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

# A launcher passes on what its process group got already: for so many seconds these are one request.
REPEAT = 1.0


def end_at_once(number: int) -> None:
    """What a signal does where nobody listens: SIGINT raises, SIGTERM ends the process."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def leave_stopping_to_main() -> None:
    """For a worker process: signals reach the whole group, and the main process ends its workers.

    A second SIGTERM ends it, or a worker that hangs could not be ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first: list[float] = []

    def receive(number: int, frame: Any) -> None:
        first.append(time.monotonic())
        if first[-1] - first[0] > REPEAT:
            end_at_once(number)

    signal.signal(signal.SIGTERM, receive)
