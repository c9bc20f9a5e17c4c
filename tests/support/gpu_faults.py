# SPDX-License-Identifier: Apache-2.0
"""pytest -p gpu_faults: a process whose GPU has faulted ends after the test, so that no later one is blamed.

A fault stays with the process. pytest-xdist replaces a worker that ended; the file `GPU_FAULTS` names tells which test
it was.
"""

from __future__ import annotations

import os
import sys

import pytest

EXIT_STATUS = 70


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        with open(os.environ.get("GPU_FAULTS", "gpu_faults.txt"), "a", encoding="utf-8") as file:
            file.write(f"{item.nodeid}: {str(error).splitlines()[0]}\n")
        os._exit(EXIT_STATUS)
