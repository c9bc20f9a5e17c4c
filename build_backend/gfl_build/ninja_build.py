# SPDX-License-Identifier: Apache-2.0
"""Compiles the sources under csrc/ in parallel, again only what changed.

torch's own BuildExtension would give one flag list to every file and torch's include folders to the kernels, which need
none; the three kinds of sources (binding, CPU, CUDA) are distinguished here by their folder.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .cuda import gencode
from .flags import FLAGS
from .plan import Plan
from .torch_info import Abi


@dataclass(frozen=True)
class Step:
    """One compilation: what it makes, of what, by which command without input and output."""

    output: Path
    source: Path
    command: tuple[str, ...]


def sources(root: Path, with_cuda: bool) -> list[Path]:
    """The extension's sources. Whoever adds a file need not list it anywhere."""
    folders = {"binding": "*.cpp", "cpu": "*.cpp", **({"cuda": "*.cu"} if with_cuda else {})}
    return [file for name, pattern in folders.items() for file in sorted((root / "csrc" / name).rglob(pattern))]


def instruction_sets() -> dict[str, list[str]]:
    """The instruction sets that csrc/cpu/simd is compiled for, with the flags of each; "portable" always."""
    x86 = FLAGS["x86_isas"] if platform.machine().lower() in ("x86_64", "amd64") else {}
    return {"portable": [], **x86}


def job_count() -> int:
    """How many compilers run at once: MAX_JOBS, otherwise one for each core this process may use."""
    wish = os.environ.get("MAX_JOBS", "").strip()
    if wish:
        if not wish.isdigit() or int(wish) < 1:
            raise RuntimeError(f"MAX_JOBS must be a positive integer, got {wish!r}")
        return int(wish)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def steps(plan: Plan, root: Path, objects: Path, abi: Abi) -> list[Step]:
    """One step for each source; for those in csrc/cpu/simd, one for each instruction set."""
    assert plan.torch is not None and plan.compiler is not None
    kernels = ["-I" + str(root / "csrc" / "include"), "-I" + str(root / "csrc")]
    define = ["-DGFL_WITH_CUDA"] if plan.cuda else []
    std = f"-std=c++{FLAGS['std']}"
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    cxx = [*plan.compiler.command, *FLAGS["cxx"], *FLAGS["openmp"], *FLAGS["simd"], std, "-fPIC", *define, *kernels]
    isas = instruction_sets()
    if len(isas) > 1:
        cxx.append("-DGFL_HAS_X86_ISAS")
    if plan.cuda:
        cxx += ["-isystem", str(plan.cuda.include)]
    torch_include = plan.torch.folder / "include"
    binding = [
        *cxx,
        f"-std=c++{plan.torch.standard}",
        *("-isystem", str(torch_include), "-isystem", str(torch_include / "torch" / "csrc" / "api" / "include")),
        *("-isystem", sysconfig.get_paths()["include"]),
        "-DTORCH_EXTENSION_NAME=_C",
        *("-DTORCH_API_INCLUDE_EXTENSION_H", *abi.flags),
        # In the command line, so that another torch in the same folder compiles everything again.
        f'-DGFL_TORCH_VERSION="{plan.torch.version}"',
        *extra,
    ]
    result = []
    for source in sources(root, plan.cuda is not None):
        kind = source.relative_to(root / "csrc").parts[0]
        if kind == "cuda":
            assert plan.cuda is not None
            command = [str(plan.cuda.nvcc), *FLAGS["nvcc"], std, *define, *kernels]
            command += ["-Xcompiler", ",".join([*FLAGS["nvcc_host"], "-fPIC"])]
            if os.environ.get("CXX") == plan.compiler.command[0] and "NVCC_CCBIN" not in os.environ:
                command += ["-ccbin", plan.compiler.command[0]]
            command += gencode(plan.archs)
        else:
            command = binding if kind == "binding" else [*cxx, *extra]
        output = objects / source.relative_to(root / "csrc").with_suffix(source.suffix + ".o")
        if source.parent.name == "simd":
            for isa, flags in isas.items():
                step = Step(output.with_suffix(f".{isa}.o"), source, (*command, *flags, f"-DGFL_ISA={isa}"))
                result.append(step)
            continue
        result.append(Step(output, source, tuple(command)))
    return result


def link_command(plan: Plan, objects: list[Path], output: Path) -> list[str]:
    """The linker's command. No path of torch is written into the library: torch is always imported before it."""
    assert plan.torch is not None and plan.compiler is not None
    libraries = ["c10", "torch", "torch_cpu", "torch_python", *(["c10_cuda", "torch_cuda"] if plan.cuda else [])]
    command = [*plan.compiler.command, "-shared", *FLAGS["openmp"], *(str(o) for o in objects), "-o", str(output)]
    command += ["-L" + str(plan.torch.folder / "lib"), "-Wl,--as-needed", *(f"-l{name}" for name in libraries)]
    if plan.cuda:
        command.append(str(plan.cuda.cudart))
    return [*command, *shlex.split(os.environ.get("LDFLAGS", ""))]


def build(plan: Plan, abi: Abi, root: Path, folder: Path) -> Path:
    """Compile and link the extension below `folder`; returns the library."""
    assert plan.torch is not None
    folder = folder.resolve() / f"torch-{plan.torch.version}{'-cuda' if plan.cuda else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    todo = steps(plan, root, folder, abi)
    library = folder / "_C.so"
    link = link_command(plan, [s.output for s in todo], library)
    import fcntl  # not on Windows, which reads this file too, for the pure wheel

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two installs from one source tree share its objects
        run_steps(todo, link, library, _find_ninja())
    return library


def run_steps(todo: list[Step], link: list[str], library: Path, ninja: str | None) -> None:
    """Compile and link: by ninja what is out of date; without it everything, each time."""
    if ninja:
        (library.parent / "build.ninja").write_text(ninja_file(todo, link, library), encoding="utf-8")
        subprocess.run([ninja, "-C", str(library.parent), f"-j{job_count()}"], check=True, stdout=sys.stderr)
        return

    def compile_one(step: Step) -> None:
        step.output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*step.command, "-c", str(step.source), "-o", str(step.output)], check=True, stdout=sys.stderr)

    with ThreadPoolExecutor(job_count()) as pool:
        list(pool.map(compile_one, todo))
    subprocess.run(link, check=True, stdout=sys.stderr)


def ninja_file(todo: list[Step], link: list[str], library: Path) -> str:
    """The text of build.ninja."""

    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5"]
    lines += ["rule compile", "  command = $run -MD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $run"]
    for step in todo:
        lines += [f"build {path(step.output)}: compile {path(step.source)}", f"  run = {_shell(step.command)}"]
    inputs = " ".join(path(s.output) for s in todo)
    lines += [f"build {path(library)}: link {inputs}", f"  run = {_shell(link)}", f"default {path(library)}"]
    return "\n".join(lines) + "\n"


def _shell(command: tuple[str, ...] | list[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _find_ninja() -> str | None:
    # The package's module knows its program also where the environment's bin folder is not on PATH.
    try:
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR)
        if program:
            return program
    except ImportError:
        pass
    return shutil.which("ninja")
