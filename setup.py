# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: the compiled extension, and the torch that the wheel has to be used with."""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))  # the backend's own path when run as `python setup.py`

from gfl_build.commands import BuildExt, BuildPy, extensions  # noqa: E402
from gfl_build.plan import BuildError, make_plan, runtime_requirements  # noqa: E402

try:
    plan = make_plan()
except BuildError as error:
    raise SystemExit(f"gfl-ops: {error}") from None
# What a wheel was built for, behind its version: "torch2.13.cpu" makes 0.2.0+torch2.13.cpu (scripts/build_wheels.py).
local = os.environ.get("GFL_OPS_LOCAL_VERSION", "")
setup(
    options={"egg_info": {"tag_build": f"+{local}"}} if local else {},
    license="Apache-2.0",
    ext_modules=extensions(plan, ROOT),
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    install_requires=runtime_requirements(plan),
)
