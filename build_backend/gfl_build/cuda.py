# SPDX-License-Identifier: Apache-2.0
"""The CUDA toolkit: where it is, whether it fits torch, and which architectures it compiles for."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .flags import FLAGS

_NAMES = {
    "Turing": "7.5",
    "Ampere": "8.0;8.6",
    "Ada": "8.9",
    "Hopper": "9.0",
    "Blackwell": "10.0;12.0",
}


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit.

    Attributes:
        nvcc: the compiler.
        version: for example "13.0".
        include: the folder of cuda_runtime.h.
        cudart: the shared runtime library that torch loads too.
        archs: what nvcc knows, for example {"8.0", "9.0"}.
    """

    nvcc: Path
    version: str
    include: Path
    cudart: Path
    archs: frozenset[str]


def find_toolkit(torch_cuda: str, torch_site: Path) -> tuple[CudaToolkit | None, str]:
    """The first toolkit of torch's CUDA major version: of CUDA_HOME, of PATH, of NVIDIA's pip packages; or why none."""
    reasons: dict[str, str] = {}  # by what is wrong, so that two paths to one toolkit are one reason
    for nvcc in _nvccs(torch_site):
        try:
            version = _nvcc_version(nvcc)
            if version.split(".")[0] == torch_cuda.split(".")[0]:
                return _toolkit(nvcc, version, torch_site), ""
            reasons.setdefault(version, f"{nvcc} is of CUDA {version}, torch was built with CUDA {torch_cuda}")
        except (OSError, subprocess.SubprocessError, LookupError) as error:
            reasons.setdefault(str(error), f"{nvcc}: {error}")
    return None, "; ".join(reasons.values()) or "no nvcc was found in CUDA_HOME, on PATH or in NVIDIA's pip packages"


def _nvccs(torch_site: Path) -> Iterable[Path]:
    seen = set()
    candidates: list[Path] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(Path(os.environ[variable]) / "bin" / "nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for site in _sites(torch_site):
        candidates += sorted(site.glob("nvidia/*/bin/nvcc"), reverse=True)
    for nvcc in candidates:
        if nvcc not in seen and nvcc.is_file() and os.access(nvcc, os.X_OK):
            seen.add(nvcc)
            yield nvcc


def _sites(torch_site: Path) -> Iterable[Path]:
    yield torch_site
    yield Path(sysconfig.get_paths()["purelib"])
    yield from (Path(p) for p in sys.path if p)


def _nvcc_version(nvcc: Path) -> str:
    said = _run(nvcc, "--version")
    found = re.search(r"release (\d+\.\d+)", said)
    if not found:
        raise LookupError("does not tell its version")
    return found[1]


def _toolkit(nvcc: Path, version: str, torch_site: Path) -> CudaToolkit:
    homes = [_home(nvcc)]
    for site in _sites(torch_site):
        homes += [site / "nvidia" / f"cu{version.split('.')[0]}", site / "nvidia" / "cuda_runtime"]
    includes = [h / sub for h in homes for sub in ("include", "targets/x86_64-linux/include")]
    include = next((i for i in includes if (i / "cuda_runtime.h").is_file()), None)
    if include is None:
        raise LookupError("its headers (cuda_runtime.h) are not there")
    major = version.split(".")[0]
    # torch's own copy first: it is the one in the process.
    libraries = [
        h / sub / f"libcudart.so{suffix}"
        for suffix in (f".{major}", f".{major}.0", "")
        for h in reversed(homes)
        for sub in ("lib", "lib64", "targets/x86_64-linux/lib")
    ]
    cudart = next((c for c in libraries if c.is_file()), None)
    if cudart is None:
        raise LookupError(f"the runtime library libcudart.so.{major} is not there")
    archs = frozenset(_dotted(a) for a in re.findall(r"compute_(\d+)\b", _run(nvcc, "--list-gpu-arch")))
    return CudaToolkit(nvcc, version, include, cudart, archs)


def probe(toolkit: CudaToolkit, archs: tuple[str, ...]) -> str:
    """Compile a kernel of one line; what is wrong with the toolkit, empty if nothing is.

    Packages of different versions, a header package left out or a host compiler too new show here, in a second, instead
    of in the build.
    """
    text = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cuda_runtime.h>\n"
    text += "__global__ void f(float* x) { *x = 1.0f; }\nvoid g(float* x) { f<<<1, 1>>>(x); }\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(text)
        command = [str(toolkit.nvcc), "-c", str(source), "-o", str(source.with_suffix(".o")), *gencode(archs[-1:])]
        tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode == 0:
        return ""
    said = [line.strip() for line in (tried.stderr + tried.stdout).splitlines() if line.strip()]
    telling = next((line for line in said if "error" in line or "fatal" in line), (said or ["it says nothing"])[0])
    return f"{toolkit.nvcc} can't compile a kernel: {telling}"


def _home(nvcc: Path) -> Path:
    """The toolkit's folder, as nvcc itself reports it: nvcc on PATH may be a script or a link."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.touch()
        dry_run = subprocess.run([str(nvcc), "--dryrun", "-c", str(source)], capture_output=True, text=True, timeout=60)
    found = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(found[1].strip()).resolve() if found else nvcc.resolve().parent.parent


def _run(nvcc: Path, option: str) -> str:
    return subprocess.run([str(nvcc), option], capture_output=True, text=True, timeout=60, check=True).stdout


def _dotted(number: str) -> str:
    return f"{number[:-1]}.{number[-1]}"


def visible_gpus() -> list[str]:
    """The compute capabilities of the GPUs that CUDA_VISIBLE_DEVICES leaves, as "9.0", each once.

    The driver is asked, since the build doesn't import torch.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), index):
            return []
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        for value, attribute in ((major, 75), (minor, 76)):
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return []
        found.append(f"{major.value}.{minor.value}")
    return list(dict.fromkeys(found))


def target_archs(wish: str, known: frozenset[str], gpus: Sequence[str] = ()) -> tuple[str, ...]:
    """nvcc's code names for an arch list as torch's TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", "8.0 9.0a", "Hopper").

    "sm_90" is machine code for 9.0, "compute_90" PTX of it. Without a wish: the architectures of this machine's GPUs;
    where there is none, or the toolkit does not know them all, those of flags.json that it knows, and PTX of the newest
    for later GPUs.

    Raises:
        ValueError: the wish names an architecture that does not exist or that the toolkit does not know.
    """
    listed = [a for a in re.split(r"[;,\s]+", wish.strip()) if a]
    if not listed and known.issuperset(gpus):
        listed = list(gpus)
    if not listed:
        listed = [a for a in FLAGS["cuda_archs"] if a.partition("+")[0] in known]
        if not listed:
            raise ValueError(f"this nvcc knows none of {', '.join(FLAGS['cuda_archs'])}")
        listed[-1] = f"{listed[-1].partition('+')[0]}+PTX"
    codes: list[str] = []
    for item in listed:
        name, plus, ptx = item.partition("+")
        for arch in _NAMES.get(name, name).split(";"):
            form = re.fullmatch(r"(\d+\.\d)([af]?)", arch)
            if not form or (plus and ptx != "PTX"):
                raise ValueError(f"TORCH_CUDA_ARCH_LIST: {item!r} is no architecture; write 8.0, 9.0a or 9.0+PTX")
            if form[1] not in known:
                has = ", ".join(sorted(known, key=float))
                raise ValueError(f"TORCH_CUDA_ARCH_LIST: this nvcc does not know {arch}, only {has}")
            number = arch.replace(".", "")
            codes += [f"sm_{number}", *([f"compute_{number}"] if plus else [])]
    return tuple(dict.fromkeys(codes))


def gencode(codes: tuple[str, ...]) -> list[str]:
    """nvcc's options for code names."""
    return [word for code in codes for word in ("-gencode", f"arch=compute_{code.rpartition('_')[2]},code={code}")]
