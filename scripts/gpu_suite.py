# SPDX-License-Identifier: Apache-2.0
"""Build, test, sanitize and time the package on this machine's GPU, without network.

Sections, in this order:
  build      pip install for the architecture of the GPU, without build isolation
             and dependencies, into the environment of the Python that runs this
  tests      pytest: Triton's kernels on the GPU, the native ones, all the rest
  sanitize   the C++ tests on the GPU, compiled by nvcc, plain and under
             compute-sanitizer
  bench      benchmarks/bench.py on the GPU: goals, losses, peers, detectors
  report     scripts/aot_report.py: registers, spills, shared memory
After each section DIR/gpu_suite.json and DIR/gpu_suite.md are written anew; the
benchmarks' JSON and plots are beside them. What is missing (a sanitizer that
refuses the GPU, pytest) is recorded. Exit status: 0, or 1 if something failed,
or 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

from gpu_outputs import Gpu, parse_bench, parse_gpus, parse_pytest, parse_sanitizer  # noqa: E402

import stamp  # noqa: E402

# Seconds that each section may take; together more than the whole may, since hardly any section needs all of its own.
LIMITS = {"build": 150, "tests": 210, "sanitize": 110, "bench": 180, "report": 60}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FILES = 8  # in DIR at most


@dataclass
class Outcome:
    """One line of the report; `status` is "passed", "failed", "out of time" or "not there"."""

    section: str
    name: str
    status: str
    seconds: float
    detail: str = ""
    command: str = ""
    tail: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "out of time")


@dataclass(frozen=True)
class Finished:
    """A finished command. `code` is None if its time ran out."""

    command: str
    code: int | None
    seconds: float
    output: str


class Suite:
    """Runs commands in a scratch folder within the time that is left, and keeps the report up to date."""

    def __init__(self, out: Path, gpu: Gpu, data: Path | None, minutes: float, dry: bool, scratch: Path) -> None:
        self.out, self.gpu, self.data, self.dry, self.scratch = out, gpu, data, dry, scratch
        self.end = time.monotonic() + 60 * minutes
        self.section_end = self.end
        self.outcomes: list[Outcome] = []
        self.section = ""
        # Not asked of torch, which would occupy a part of the GPU for as long as this process lives.
        known = f"{gpu.name} ({gpu.arch}), driver {gpu.driver}, {gpu.memory}"
        self.record: dict[str, Any] = stamp.stamp(known)
        self.seed = random.randrange(2**31)

    def left(self) -> float:
        return max(0.0, min(self.end, self.section_end) - time.monotonic())

    def environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        # Triton's interpreter, or a backend chosen in the shell, would not test this machine's GPU.
        env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "GFL_OPS_BACKEND", "PYTHONPATH")}
        env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "PYTHONUNBUFFERED": "1"}
        env |= {"GFL_TEST_SEED": str(self.seed)}
        if self.data:
            env["GFL_TEST_DATA"] = str(self.data)
        return env | (extra or {})

    def run(self, command: list[str], limit: float, env: dict[str, str] | None = None) -> Finished:
        """Run in the scratch folder: the source tree would shadow the installed package."""
        shown = shlex.join([*(f"{k}={v}" for k, v in (env or {}).items()), *command])
        if self.dry:
            print(f"  {shown}")
            return Finished(shown, 0, 0.0, "")
        limit = min(limit, self.left())
        begin = time.monotonic()
        if limit <= 1:
            return Finished(shown, None, 0.0, "no time was left")
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self.scratch,
                    env=self.environment(env),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return Finished(shown, 127, 0.0, str(error))
            code: int | None
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = None
                # SIGINT lets pytest print what it has; then everything that it started is killed.
                for ending in (signal.SIGINT, signal.SIGKILL):
                    try:
                        os.killpg(process.pid, ending)
                        process.wait(timeout=8)
                    except (ProcessLookupError, subprocess.TimeoutExpired):
                        continue
            log.seek(0)
            output = log.read()
        return Finished(shown, code, time.monotonic() - begin, output)

    def add(self, outcome: Outcome) -> Outcome:
        if not self.dry:
            self.outcomes.append(outcome)
            print(f"  {outcome.status:<12}{outcome.seconds:>6.1f} s  {outcome.name}: {outcome.detail}", flush=True)
        return outcome

    def note(self, name: str, done: Finished, status: str | None = None, detail: str = "", **rest: Any) -> Outcome:
        """Record a finished command, with the end of its output unless it passed."""
        if status is None:
            status = "passed" if done.code == 0 else "out of time" if done.code is None else "failed"
            detail = detail or ("" if done.code == 0 else f"exit code {done.code}" if done.code is not None else "")
        tail = done.output.rstrip().splitlines()[-40:] if status != "passed" else []
        return self.add(Outcome(self.section, name, status, done.seconds, detail, done.command, tail, **rest))

    def absent(self, name: str, why: str, status: str = "not there") -> None:
        if self.dry:
            print(f"  # {name}: {why}")
        self.add(Outcome(self.section, name, status, 0.0, why))

    def do(self, section: str, body: Callable[[Suite], None]) -> None:
        print(f"{section} (at most {LIMITS[section]} s)", flush=True)
        self.section, self.section_end = section, time.monotonic() + LIMITS[section]
        body(self)
        self.section_end = self.end
        self.write()

    def write(self) -> None:
        if self.dry:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        record = {"stamp": self.record, "seed": self.seed, "outcomes": [asdict(o) for o in self.outcomes]}
        (self.out / "gpu_suite.json").write_text(json.dumps(record, indent=1) + "\n")
        (self.out / "gpu_suite.md").write_text(markdown(self.record, self.outcomes))

    def keep(self, folder: Path) -> None:
        """Copy a benchmark's files into DIR, as far as its limit of files allows."""
        room = FILES - 2 - len([f for f in self.out.glob("*") if not f.name.startswith("gpu_suite.")])
        self.out.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("*")):
            if (self.out / file.name).exists() or room > 0:
                room -= not (self.out / file.name).exists()
                shutil.copy2(file, self.out / file.name)


def markdown(record: dict[str, Any], outcomes: Iterable[Outcome]) -> str:
    outcomes = list(outcomes)
    lines = ["# GPU suite", "", *(f"- {line}" for line in stamp.lines(record)), ""]
    lines += ["| section | what | result | s | |", "|---|---|---|--:|---|"]
    for o in outcomes:
        detail = o.detail.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {o.section} | {o.name} | {o.status} | {o.seconds:.1f} | {detail} |")
    for o in outcomes:
        if o.failures or (o.tail and o.status != "not there"):
            lines += ["", f"## {o.section}: {o.name}", "", f"`{o.command}`", ""]
            lines += [f"- {name}" for name in o.failures[:40]]
            lines += ["", "```", *o.tail[-25:], "```"] if o.tail else []
    return "\n".join(lines) + "\n"


PROBE = """
import json, gfl_ops
from gfl_ops.core import backends, extension
from gfl_ops.core.registry import SPECS
serving = {stem: backends.automatic(stem, "cuda") for stem in SPECS}
extension = extension.EXTENSION
print("PROBE " + json.dumps({"reason": extension.cuda_reason, "info": extension.info, "cuda": serving}))
"""


def build(suite: Suite) -> None:
    env = {"TORCH_CUDA_ARCH_LIST": suite.gpu.capability, "GFL_OPS_WITH_CUDA": "1"}
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--force-reinstall"]
    done = suite.run([sys.executable, "-m", "pip", "install", *options, str(ROOT)], LIMITS["build"] - 20, env)
    suite.note("pip install", done)
    done = suite.run([sys.executable, "-c", PROBE], 60)
    found = re.search(r"^PROBE (.+)$", done.output, re.MULTILINE)
    if suite.dry:
        return
    if not found:
        suite.note("import gfl_ops", done, "failed", "it does not import")
        return
    probe = json.loads(found[1])
    suite.record["build"] = probe["info"]
    suite.record["backends on cuda"] = probe["cuda"]
    by = sorted(set(probe["cuda"].values()))
    backends = "; ".join(f"{b}: {', '.join(s for s, x in probe['cuda'].items() if x == b)}" for b in by)
    suite.note("import gfl_ops", done, "failed" if probe["reason"] else "passed", probe["reason"] or backends)


def tests(suite: Suite) -> None:
    if importlib.util.find_spec("pytest") is None:
        suite.absent("pytest", f"pytest is not installed for {sys.executable}", "failed")
        return
    spread = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    common = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow", *spread]
    common += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests")]
    # What needs a GPU comes first, in case time runs out.
    parts = (
        ("Triton on the GPU", "triton and cuda", 80.0),
        ("native on the GPU", "cuda and not triton", 90.0),
        ("the rest", "not cuda", 200.0),
    )
    for name, selection, limit in parts:
        done = suite.run([*common, "-k", selection], limit)
        counts, failures = parse_pytest(done.output)
        summary = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
        if done.code == 5:
            suite.note(name, done, "failed", "no test ran")
        elif done.code is None:
            suite.note(name, done, None, f"cut off: {summary}", counts=counts, failures=failures)
        else:
            suite.note(name, done, None, summary or f"exit code {done.code}", counts=counts, failures=failures)


def sanitize(suite: Suite) -> None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        suite.absent("C++ tests", f"no nvcc on PATH or in {home}/bin")
        return
    programs = compile_tests(suite, nvcc)
    for stem, program in programs.items():
        done = suite.run([str(program)], 40)
        suite.note(f"{stem}: plain", done, detail=last_line(done.output))
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if sanitizer is None:
        suite.absent("compute-sanitizer", f"it is not on PATH or in {home}/bin")
        return
    jobs = [(stem, tool) for tool in TOOLS for stem in programs]

    def check(job: tuple[str, str]) -> Finished:
        stem, tool = job
        leaks = ["--leak-check", "full"] if tool == "memcheck" else []
        options = ["--tool", tool, *leaks, "--error-exitcode", "9", "--print-limit", "10"]
        return suite.run([sanitizer, *options, str(programs[stem])], 60)

    with ThreadPoolExecutor(1 if suite.dry else 4) as pool:
        for (stem, tool), done in zip(jobs, pool.map(check, jobs)):
            status, detail = parse_sanitizer(tool, done.code, done.output)
            suite.note(f"{stem}: {tool}", done, status, detail)


def compile_tests(suite: Suite, nvcc: str) -> dict[str, Path]:
    """The C++ tests of everything that has a CUDA kernel, by nvcc alone, with the flags of the package."""
    flags = json.loads((ROOT / "build_backend" / "gfl_build" / "flags.json").read_text())
    common = [nvcc, *flags["nvcc"], f"-std=c++{flags['std']}", "-lineinfo", f"-arch={suite.gpu.arch}"]
    common += ["-Xcompiler", ",".join(flags["nvcc_host"]), "-DGFL_WITH_CUDA", "-DGFL_TEST_CUDA"]
    common += [f"-I{ROOT / 'csrc' / name}" for name in ("include", ".", "tests")]
    kernels = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    stems = [k.stem for k in kernels if (ROOT / "csrc" / "tests" / f"test_{k.stem}.cpp").is_file()]
    for kernel in kernels:
        if kernel.stem not in stems:
            suite.absent(f"{kernel.stem}: plain", f"there is no csrc/tests/test_{kernel.stem}.cpp")
    sources = [*kernels, *(ROOT / "csrc" / "tests" / f"test_{stem}.cpp" for stem in stems)]
    objects = [suite.scratch / f"{source.name}.o" for source in sources]

    def compile_one(pair: tuple[Path, Path]) -> Finished:
        return suite.run([*common, "-c", str(pair[0]), "-o", str(pair[1])], 90)

    with ThreadPoolExecutor(1 if suite.dry else min(16, os.cpu_count() or 1)) as pool:
        compiled = list(pool.map(compile_one, zip(sources, objects)))
    good = [o for o, done in zip(objects, compiled) if done.code == 0]
    for source, done in zip(sources, compiled):
        if done.code != 0:
            suite.note(f"compile {source.name}", done)
    programs = {}
    for stem in stems:
        test, program = suite.scratch / f"test_{stem}.cpp.o", suite.scratch / f"test_{stem}"
        if test not in good:
            continue
        linked = [str(o) for o in good if o.name.endswith(".cu.o")]
        done = suite.run([nvcc, f"-arch={suite.gpu.arch}", str(test), *linked, "-o", str(program)], 60)
        if done.code == 0:
            programs[stem] = program
        else:
            suite.note(f"link {stem}", done)
    return programs


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else ""


def bench(suite: Suite) -> None:
    # The goals first, in case time runs out.
    for name, options in {
        "gpu": [],
        "losses": ["--limit", "70", "--seconds", "0.3"],
        "peers": [],
        "detectors": ["--models", "gfl_r50_1x", "--batch", "1", "16", "--seconds", "2"],
    }.items():
        folder = suite.scratch / f"bench_{name}"
        command = [sys.executable, str(ROOT / "benchmarks" / "bench.py"), name, "--device", "cuda", *options]
        done = suite.run([*command, "--out", str(folder)], 110)
        suite.note(f"bench {name}", done, detail=f"{len(done.output.splitlines())} lines of output")
        if not suite.dry:
            suite.record[f"bench_{name}"] = parse_bench(done.output)
            suite.keep(folder)


def report(suite: Suite) -> None:
    program = ROOT / "scripts" / "aot_report.py"
    if not program.is_file():
        suite.absent("aot_report", "there is no scripts/aot_report.py")
        return
    jobs = str(min(16, os.cpu_count() or 1))
    done = suite.run([sys.executable, str(program), "--arch", suite.gpu.capability, "--jobs", jobs], LIMITS["report"])
    suite.note("aot_report", done, "not there" if done.code == 2 else None, last_line(done.output))
    suite.record["aot_report"] = done.output.rstrip().splitlines()[-120:]


SECTIONS: dict[str, Callable[[Suite], None]] = {
    "build": build,
    "tests": tests,
    "sanitize": sanitize,
    "bench": bench,
    "report": report,
}


def find_gpu() -> tuple[Gpu | None, str]:
    """The first GPU that nvidia-smi lists, or why there is none."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None, "nvidia-smi is not on PATH"
    command = [smi, "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)
    found = parse_gpus(done.stdout)
    return (found[0], "") if found else (None, f"nvidia-smi lists none: {last_line(done.stdout + done.stderr)}")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report, made if absent")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the real data, for tests and benchmarks")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help="only these sections")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    given = parser.parse_args(words)
    gpu, why = find_gpu()
    if gpu is None:
        print(f"no NVIDIA GPU here: {why}")
        if not given.dry_run:
            return 2
        gpu = Gpu("none", "none", "9.0", "none")
        print("the commands as they would be for sm_90:")
    else:
        print(f"{gpu.name} ({gpu.arch}), driver {gpu.driver}, {gpu.memory}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gfl-gpu-suite-") as scratch:
        data = given.data.resolve() if given.data else None
        suite = Suite(given.out.resolve(), gpu, data, given.minutes, given.dry_run, Path(scratch))
        for name, body in SECTIONS.items():
            if given.only is None or name in given.only:
                suite.do(name, body)
    bad = [o for o in suite.outcomes if o.bad]
    if not given.dry_run:
        print(f"{len(suite.outcomes) - len(bad)} of {len(suite.outcomes)} are well; see {suite.out / 'gpu_suite.md'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
