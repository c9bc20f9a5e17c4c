# SPDX-License-Identifier: Apache-2.0
"""A plugin for pytest: what tests run by the backend "triton" is the PTX that Triton compiles for a GPU, on the CPU.

    GFL_PTX_ON_HOST=ENGINE PYTHONPATH=tests/ptx pytest -p on_ptx --ptx-arch 80 --ptx-build build tests/ptx

The engine, the folder of triton_on_host.py, executes PTX with the addresses, masks, barriers and launch shapes of a GPU
and lets warps take turns at random. An access that would trap raises RuntimeError; a test during which the engine
reports a race, or a read of unset shared memory, fails. The same works for any test of the project, as
tests/test_triton.py. `Run` says what the C++ tests of test_cuda.py need to know too.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

ENGINE = Path(os.environ.get("GFL_PTX_ON_HOST", ""))
STATE: Any = None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptx", "compiled PTX on the CPU")
    group.addoption("--ptx-arch", default="90", help="the architecture to compile for: 80, 90 (default), …")
    group.addoption("--ptx-half", action="store_true", help="every second test; another architecture takes the others")
    group.addoption("--ptx-build", type=Path, required=True, help="where tests/ptx/CMakeLists.txt was built")


def pytest_configure(config: pytest.Config) -> None:
    """Take a GPU's place in Triton, before any kernel of the package is defined."""
    global STATE
    if not (ENGINE / "triton_on_host.py").is_file():
        raise pytest.UsageError("GFL_PTX_ON_HOST must name the folder of triton_on_host.py, got " + repr(str(ENGINE)))
    build = config.getoption("ptx_build").resolve()
    # Triton keeps the "binary" of a kernel, which here is its PTX: apart from what is compiled for real GPUs.
    os.environ["TRITON_CACHE_DIR"] = str(build / "triton")
    os.environ["POH_BUILD"] = str(build)
    sys.path.insert(0, str(ENGINE))
    import triton_on_host

    STATE = triton_on_host.install(int(config.getoption("ptx_arch")))

    from gfl_ops.core import backends
    from gfl_ops.triton import launch

    assert not launch.INTERPRETS, "TRITON_INTERPRET=1 is set: an interpreting process can't compile; unset it"
    # Only now: the kernels are those of a GPU, and the backend counts as able to run on the CPU.
    backends.TRITON_INTERPRETS = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("ptx_half"):
        mine = STATE.arch // 10 % 2
        left = [item for item in items if zlib.crc32(item.nodeid.encode()) % 2 != mine]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    before = len(STATE.warnings)
    yield
    if len(STATE.warnings) > before:
        pytest.fail("\n".join(STATE.warnings[before : before + 20]), pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    import triton_on_host

    found: dict[str, list[int]] = {}
    for key, counts in triton_on_host.coverage().items():
        entry = found.setdefault(key.split("#")[0], [0, 0, 0, 0])
        for i, count in enumerate((1, STATE.launches.get(key, 0), *counts)):
            entry[i] += count
    for name, (variants, launches, ran, total) in sorted(found.items()):
        terminalreporter.write_line(
            f"sm_{STATE.arch} {name}: {variants} variants, {launches} launches, {ran / total:.0%} of instructions ran"
        )
