# SPDX-License-Identifier: Apache-2.0
"""A fixture for tests of the build backend, which has to be on sys.path."""

from __future__ import annotations

import pytest

from gfl_build import plan


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice of the person who runs the tests leaks in, and no plan of one test into the next."""
    for name in ("GFL_OPS_WITH_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    plan.make_plan.cache_clear()
