# SPDX-License-Identifier: Apache-2.0
"""Build one wheel per version of torch, and check each in a fresh environment.

A wheel fits the torch that it was compiled against and the Python that runs this script; its version says which torch,
as gfl_ops-0.2.0+torch2.13.cpu. Each is built in an environment of its own from a copy of the tracked files.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Without the source tree beside it: what is installed loads, and its kernels are right.
CHECK = """
import gfl_ops, torch
from gfl_ops.core.extension import EXTENSION
assert EXTENSION.module is not None, EXTENSION.reason
assert gfl_ops.self_check("cpu").ok
print(f"{gfl_ops.__file__}: kernels right with torch {torch.__version__}")
"""


def run(*words: str | Path, **environment: str) -> None:
    print("$", *words, flush=True)
    subprocess.run(
        [str(word) for word in words], check=True, env={**os.environ, **environment}, cwd=tempfile.gettempdir()
    )


def environment(folder: Path, *packages: str, index: str | None) -> Path:
    """A new virtual environment's Python, with these packages."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", *(["--extra-index-url", index] if index else []), *packages)
    return python


def sources(folder: Path) -> Path:
    """A copy of what git tracks, so that no object of another build is in it."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build(torch: str, options: argparse.Namespace, work: Path) -> Path:
    """One wheel, moved to --out once it is checked."""
    python = environment(work / "build", f"torch=={torch}", "ninja", "setuptools>=70.1", "wheel", index=options.index)
    minor = ".".join(re.findall(r"\d+", torch)[:2])
    found = subprocess.run(
        [python, "-c", "import torch; print(torch.version.cuda or '')"], check=True, capture_output=True, text=True
    ).stdout.strip()
    kind = f"cu{found.replace('.', '')}" if options.cuda else "cpu"
    made = {"GFL_OPS_LOCAL_VERSION": f"torch{minor}.{kind}", "GFL_OPS_WITH_CUDA": str(int(options.cuda))}
    if options.archs:
        made["TORCH_CUDA_ARCH_LIST"] = options.archs
    tree = sources(work / "tree")
    start = time.monotonic()
    run(python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", work / "wheel", tree, **made)
    (wheel,) = (work / "wheel").glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")
    fresh = environment(work / "check", f"torch=={torch}", str(wheel), index=options.index)
    # With a new cache, so that no verdict of another build counts.
    run(fresh, "-c", CHECK, XDG_CACHE_HOME=str(work / "cache"))
    options.out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(wheel, options.out / wheel.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--torch", nargs="+", required=True, metavar="X.Y.Z", help="versions of torch, a wheel for each")
    add("--index", metavar="URL", help="further package index, as https://download.pytorch.org/whl/cu130")
    add("--cuda", action="store_true", help="with the CUDA part; it fails where that can't be built")
    add("--archs", metavar="LIST", help="GPU architectures, as '8.0;9.0+PTX' [7.5 to 12.0]")
    add("--out", type=Path, default=Path("wheelhouse"), metavar="DIR", help="folder for the wheels [%(default)s]")
    options = parser.parse_args()
    options.out = options.out.resolve()
    for torch in options.torch:
        with tempfile.TemporaryDirectory() as work:
            print("written:", build(torch, options, Path(work)))


if __name__ == "__main__":
    main()
