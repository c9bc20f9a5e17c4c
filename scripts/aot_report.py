# SPDX-License-Identifier: Apache-2.0
"""Compile every GPU kernel ahead of time and report registers, spills and shared memory; no GPU is needed.

csrc/cuda/*.cu is compiled by nvcc. Triton kernels are compiled for the calls that the benchmarks make, forward and
backward, and for the flags that only the contract tests' samples set, with the constants and alignments that follow
from those calls. Registers and spills are what ptxas reports; for Triton, what cuobjdump reads in the code.

Exit status: 0; 1 if something does not compile, or if a kernel spills registers in a call that users make; 2 if a
compiler is missing."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

# Why some kernels have no 16-byte loads, for the report.
WITHOUT_16 = """\
A kernel has no loads of 16 bytes where rows of 17 bins begin at any address (neighbouring threads read neighbouring
numbers), where a thread owns one element, box or key, in second stages, which read partial sums, and in the general
form of a walk, which takes any stride, fp64, probabilities and exponents other than 2."""


@dataclass
class Kernel:
    """The resources of one compiled kernel.

    Attributes:
        backend: "cuda" or "triton".
        name: the kernel; for Triton with dtype, operator and call, for CUDA with its template arguments.
        arch: "sm_90".
        registers: per thread.
        spill: bytes of spill stores and loads.
        stack: bytes of stack frame, local arrays among them.
        shared: bytes of static shared memory; for Triton all of it.
        loads_16: 16-byte loads from global memory in the disassembly; None without --sass.
        local: loads from and stores to local memory there.
        real: compiled for a call that users make, not only for a sample of the tests.
    """

    backend: str
    name: str
    arch: str
    registers: int
    spill: int
    stack: int
    shared: int
    loads_16: int | None = None
    local: int | None = None
    real: bool = True

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that its registers can hold, whatever the block size."""
        most = 48 if self.arch in ("sm_86", "sm_87", "sm_89", "sm_120", "sm_121") else 64
        # 65536 registers, allocated to warps in units of 256.
        return min(most, 65536 // (-(-max(self.registers, 1) * 32 // 256) * 256)) / most


class MissingCompilerError(RuntimeError):
    """A compiler or a tool is missing."""


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Mangled entry name -> registers, spill, stack and shared memory, from the output of ``ptxas -v``."""
    found: dict[str, dict[str, int]] = {}
    entries = set(re.findall(r"Compiling entry function '(\S+)'", text))
    current = ""
    for line in text.splitlines():
        if match := re.search(r"(?:Compiling entry function '|Function properties for )([^\s']+)", line):
            current = match[1]
        if current not in entries:
            continue
        values = found.setdefault(current, {"registers": 0, "spill": 0, "stack": 0, "shared": 0})
        if match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            values["stack"], values["spill"] = int(match[1]), int(match[2]) + int(match[3])
        if match := re.search(r"Used (\d+) registers", line):
            values["registers"] = int(match[1])
            shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", line)
            values["shared"] = int(shared[1]) if shared else 0
    return found


def triton_tool(name: str) -> Path | None:
    spec = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends" / "nvidia" / "bin" for p in (spec.submodule_search_locations or [])] if spec else []
    return next((f / name for f in folders if (f / name).is_file()), None)


def disassembler() -> str:
    found = shutil.which("cuobjdump") or triton_tool("cuobjdump")
    home = Path(find_nvcc()).parent / "cuobjdump" if find_nvcc() else None
    if found is None and home is not None and home.is_file():
        found = home
    if found is None:
        raise MissingCompilerError("no cuobjdump to read machine code with, neither the CUDA toolkit's nor Triton's")
    return str(found)


def disassembled(cubin: Path) -> dict[str, str]:
    """Entry name -> machine code as text."""
    text = subprocess.run([disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0].strip(): part.partition("\n")[2] for part in parts}


def count_instructions(code: str) -> tuple[int, int]:
    """16-byte global loads, and accesses to local memory."""
    return len(re.findall(r"\bLDG\.E(?:\.\w+)*?\.128\b", code)), len(re.findall(r"\b(?:LDL|STL)\b", code))


def local_bytes(code: str) -> int:
    """Bytes that the instructions of a listing store to and load from local memory, each counted once."""
    widths = {"8": 1, "16": 2, "64": 8, "128": 16}
    accesses = re.findall(r"\b(?:LDL|STL)((?:\.\w+)*)", code)
    return sum(next((w for bits, w in widths.items() if re.search(rf"\.[US]?{bits}\b", a)), 4) for a in accesses)


@functools.cache
def scene() -> Any:
    """One image of 800×1344 in training, as the benchmarks draw it."""
    return importlib.import_module("inputs").make_scene(1, data=ROOT / "nowhere")


def calls_of(stem: str, dtype: Any) -> Iterator[tuple[str, Callable[[], Any], bool]]:
    """(name, call, whether a user makes it) of the operator's calls, forward and backward, the most telling first."""
    import torch
    from torch.utils._pytree import tree_map

    from gfl_ops.core.registry import SPECS

    spec, operators = SPECS[stem], torch.ops.gfl_triton
    cases, harness = importlib.import_module("cases"), importlib.import_module("harness")
    # Where a kernel's result decides what is read next, a call without the kernel would read garbage.
    for case in cases.make(stem, scene(), dtype, "cpu") if spec.differentiable else []:
        yield case.name, harness.Run(case, case.ours, "auto", case.inputs).once, True
        if "avg_factor" in case.inputs or "reduction" in case.inputs:
            inputs = {key: value for key, value in case.inputs.items() if key != "avg_factor"} | {"reduction": "none"}
            yield f"{case.name} unreduced", harness.Run(case, case.ours, "auto", inputs).once, True

    def both_ways(*args: Any) -> None:
        results = getattr(operators, spec.forward_name)(*args)
        if spec.differentiable:
            results = results if isinstance(results, tuple) else (results,)
            grads = [tree_map(torch.zeros_like, results[i]) for i in spec.grads]
            saved = [results[i] for i in spec.saved_outputs]
            getattr(operators, spec.backward_name)(*grads, *saved, *args, [True] * len(spec.differentiable))

    samples = list(spec.samples(torch.device("cpu"), dtype, torch.Generator().manual_seed(0)))
    for sample in sorted(samples, key=lambda s: -sum(a.numel() for a in s.args if isinstance(a, torch.Tensor))):
        yield sample.id, functools.partial(both_ways, *sample.args), False


def launches_of(stem: str, dtype: Any, samples: bool = True) -> list[tuple[str, Any, bool]]:
    """(name of the call, launch, whether a user makes the call) of an operator.

    Per call that a user makes, one launch per kernel and set of flags; with `samples` one for each other set of flags.
    """
    from gfl_ops.core import backends
    from gfl_ops.triton import launch as launcher

    def triton(stem: str, device: str) -> str:
        return "triton" if backends.kernels(stem).triton else "reference"

    found: dict[tuple[Any, ...], tuple[str, Any, bool]] = {}
    seen = set()
    for name, call, by_user in calls_of(stem, dtype):
        if not (by_user or samples):
            break
        with launcher.record() as launches, mock.patch.object(backends, "serving", triton):
            call()
        for launch in launches:
            flags = tuple((key, value) for key, value in launch.constants.items() if isinstance(value, bool))
            kind = (launch.kernel.__name__, flags)
            if by_user or kind not in seen:
                found.setdefault((*kind, name), (name, launch, by_user))
            seen.add(kind)
    return list(found.values())


def specialised(launch: Any) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any], dict[str, Any]]:
    """Signature, constants, alignments and options that Triton derives from a launch's arguments."""
    import torch

    pointers = {
        torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int64: "i64",
        torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
    }  # fmt: skip
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, (name, value) in enumerate(zip(names, launch.args)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + pointers[value.dtype]
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        elif value == 1:
            signature[name], constants[(i,)], divisible = "constexpr", 1, False
        else:
            signature[name], divisible = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        if divisible:
            aligned[(i,)] = [["tt.divisibility", 16]]
    options = {}
    for name, value in launch.constants.items():
        if name in names:
            signature[name], constants[(names.index(name),)] = "constexpr", value
        else:
            options[name] = value
    return {name: signature[name] for name in names}, constants, aligned, options


def triton_kernels(options: argparse.Namespace, failures: list[str]) -> Iterator[Kernel]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gfl_ops.core import backends
    from gfl_ops.core.registry import SPECS
    from gfl_ops.triton import launch as launcher

    if launcher.INTERPRETS:
        raise MissingCompilerError("TRITON_INTERPRET=1 is set: an interpreting process can't compile; unset it")
    disassembler()
    seen = set()
    for stem, spec in SPECS.items():
        for dtype in (getattr(torch, name) for name in options.dtype):
            if not backends.kernels(stem).triton or dtype not in spec.dtypes:
                continue
            for call, launch, real in launches_of(stem, dtype, samples=str(dtype).endswith(options.dtype[0])):
                signature, constants, aligned, settings = specialised(launch)
                key = (launch.kernel.__name__, str(signature), str(constants), str(aligned))
                if key in seen or not options.kernels.search(launch.kernel.__name__):
                    continue
                seen.add(key)
                label = [str(dtype).removeprefix("torch."), "" if stem == call.split()[0] else stem, call]
                name = f"{launch.kernel.__name__}<{', '.join(filter(None, label))}>"
                for arch in options.arch:
                    source = ASTSource(launch.kernel, signature, constants, aligned)
                    try:
                        compiled = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=settings)
                    except triton.CompilationError as error:
                        failures.append(f"{name} for sm_{arch}:\n{error}\n{error.__cause__ or ''}")
                        continue
                    yield replace(_triton_kernel(compiled, name, arch, options.sass), real=real)


def _triton_kernel(compiled: Any, name: str, arch: str, sass: bool) -> Kernel:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([disassembler(), "-res-usage", cubin], capture_output=True, text=True, check=True)
        usage = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
        if usage is None:
            raise RuntimeError(f"{name} for sm_{arch}: cuobjdump reports no resources:\n{done.stdout}")
        registers, stack = map(int, usage.groups())
        # Triton has no local arrays: whatever is on the stack was spilled.
        code = disassembled(cubin) if sass or stack else {}
    counts = [count_instructions(body) for body in code.values()]
    loads_16, local = counts[0] if sass else (None, None)
    spill = max(stack, sum(map(local_bytes, code.values()))) if stack else 0
    return Kernel("triton", name, f"sm_{arch}", registers, spill, stack, compiled.metadata.shared, loads_16, local)


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        candidate = Path(os.environ.get(variable, "")) / "bin" / "nvcc"
        if os.environ.get(variable) and candidate.is_file():
            return str(candidate)
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.is_file() else None)


def readable(names: list[str]) -> dict[str, str]:
    """Mangled -> demangled, without return type, namespaces and arguments."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    shown = names
    if tool and names:
        shown = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return {mangled: shortened(text) for mangled, text in zip(names, shown)}


def shortened(demangled: str) -> str:
    """'void gfl::cuda::(anonymous namespace)::k<float, 4>(int)' -> 'k<float, 4>'"""
    text = re.sub(r"\(anonymous namespace\)::|\b(?:\w+::)+", "", demangled)
    text = re.sub(r"\((int|bool|unsigned int|long)\)", "", text).removeprefix("void ")
    depth = 0
    for i, letter in enumerate(text):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return text[:i]
    return text


def compile_cuda(source: Path, arch: str, sass: bool) -> list[Kernel]:
    """The kernels of one file for one architecture."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise MissingCompilerError(
            "no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda; --only triton leaves CUDA out"
        )
    flags = json.loads((ROOT / "build_backend" / "gfl_build" / "flags.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [
            nvcc, f"-std=c++{flags['std']}", *flags["nvcc"], "-DGFL_WITH_CUDA", "-Xptxas", "-v", "-cubin",
            "-gencode", f"arch=compute_{arch},code=sm_{arch}",
            "-I", str(ROOT / "csrc" / "include"), "-I", str(ROOT / "csrc"), "-o", str(cubin), str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stderr.strip()}")
        found = parse_ptxas(done.stderr + done.stdout)
        code = disassembled(cubin) if sass else {}
    counts = {name: count_instructions(body) for name, body in code.items()}
    names = readable(list(found))
    kernels = [Kernel("cuda", names[m], f"sm_{arch}", *v.values(), *counts.get(m, ())) for m, v in found.items()]
    return sorted(kernels, key=lambda kernel: kernel.name)


def table(kernels: list[Kernel], sass: bool) -> str:
    """At most 120 columns; longer names are cut."""
    head = f"{'backend':<7} {'kernel':<60} {'arch':<6} {'regs':>4} {'occ':>4} {'spill':>5} {'stack':>5} {'shared':>7}"
    lines = [head + (f" {'ldg128':>6} {'local':>5}" if sass else "")]
    lines.append("-" * len(lines[0]))
    for k in kernels:
        name = k.name if len(k.name) <= 60 else k.name[:59] + "…"
        line = f"{k.backend:<7} {name:<60} {k.arch:<6} {k.registers:>4} {k.occupancy:>4.0%}"
        line += f" {k.spill:>5} {k.stack:>5} {k.shared:>7}"
        lines.append(line + (f" {k.loads_16!s:>6} {k.local!s:>5}" if sass else ""))
    return "\n".join(lines)


def written(kernels: list[Kernel], sass: bool, markdown: bool) -> str:
    found = versions()
    if not markdown:
        report = [asdict(k) | {"occupancy": k.occupancy} for k in kernels]
        return json.dumps({"versions": found, "kernels": report}, indent=1) + "\n"
    names = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return (
        f"# Resources of each GPU kernel\n\nBy {names}; no GPU has run them. `occ`: share of a"
        " multiprocessor's warps that the registers can hold;\n`shared`: what is static, of CUDA kernels; `ldg128`:"
        " 16-byte loads from global memory in the machine code; `local`: accesses to\nlocal memory there.\n\n"
        + WITHOUT_16
        + "\n\n```\n"
        + table(kernels, sass)
        + "\n```\n"
    )


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"nvcc": None, "triton": None}
    nvcc = find_nvcc()
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"V(\d+\.\d+\.\d+)", text)
        found["nvcc"] = release[1] if release else None
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.import_module("triton").__version__
    return found


def architecture(text: str) -> str:
    """ "9.0", "90" and "sm_90" are the same."""
    match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)[af]?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no architecture; write 90, 9.0 or sm_90")
    return match[1] + match[2]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    argument = parser.add_argument
    help = "architectures to compile for, as 90, 9.0 or sm_90 (default: 80 90)"
    argument("--arch", type=architecture, nargs="+", default=["80", "90"], help=help)
    argument("--only", choices=("cuda", "triton"), help="leave out the other backend")
    dtypes = ("float16", "bfloat16", "float32", "float64")
    help = "input dtypes of the Triton calls (default: bfloat16 float32); a .cu file is compiled for all of its own"
    argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=dtypes, help=help)
    help = "only Triton kernels and .cu files whose name matches"
    argument("--kernels", type=re.compile, default=re.compile(""), metavar="REGEX", help=help)
    help = "also disassemble: count 16-byte global loads (ldg128) and accesses to local memory (local)"
    argument("--sass", action="store_true", help=help)
    argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="nvcc processes at a time (default: 2)")
    argument("--out", type=Path, metavar="FILE", help="write the report as JSON, or as Markdown (.md), with versions")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    kernels: list[Kernel] = []
    failures: list[str] = []
    try:
        if options.only != "triton":
            sources = [s for s in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if options.kernels.search(s.stem)]
            with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
                waiting = [pool.submit(compile_cuda, s, arch, options.sass) for s in sources for arch in options.arch]
                for future in waiting:
                    try:
                        kernels += future.result()
                    except MissingCompilerError:
                        raise
                    except RuntimeError as error:
                        failures.append(str(error))
        if options.only != "cuda":
            from gfl_ops.core import backends

            if reason := backends.why_no_triton():
                raise MissingCompilerError(f"{reason}; --only cuda leaves Triton out")
            kernels += triton_kernels(options, failures)
    except MissingCompilerError as error:
        print(f"aot_report: {error}", file=sys.stderr)
        return 2
    print(table(kernels, options.sass))
    # Samples have odd shapes, where a few bytes cost nobody anything.
    spilling = [k for k in kernels if k.spill and k.real]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(written(kernels, options.sass, options.out.suffix == ".md"), encoding="utf-8")
    print(f"{len(kernels)} kernels, {sum(k.spill > 0 for k in kernels)} with spills")
    for k in spilling:
        print(f"aot_report: {k.name} spills {k.spill} bytes on {k.arch}", file=sys.stderr)
    for failure in failures:
        print(f"aot_report: does not compile: {failure}", file=sys.stderr)
    return 1 if spilling or failures else 0


if __name__ == "__main__":
    if importlib.util.find_spec("gfl_ops") is None:
        sys.path.insert(0, str(ROOT))
    sys.exit(main())
