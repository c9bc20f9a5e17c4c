# SPDX-License-Identifier: Apache-2.0
"""The build backend's decisions, on made-up machines."""

from __future__ import annotations

import ctypes
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="64")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "build_backend"))

from bare_machine import bare_machine  # noqa: E402, F401

import gfl_build  # noqa: E402
from gfl_build import cuda, host, ninja_build, plan, torch_info  # noqa: E402
from gfl_build.commands import record  # noqa: E402
from gfl_build.flags import FLAGS  # noqa: E402

CUDA_13 = frozenset(["7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0"])
CUDA_12_4 = frozenset(["5.0", "7.0", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0"])


def make_torch(site: Path, version: str, cuda: str | None = None, hip: str | None = None) -> torch_info.TorchInfo:
    folder = site / "torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    lines = [
        "from typing import Optional",
        f"__version__ = {version!r}",
        "debug = False",
        f"cuda: Optional[str] = {cuda!r}",
        f"hip: Optional[str] = {hip!r}",
    ]
    (folder / "version.py").write_text("\n".join(lines))
    found = torch_info.read_torch(folder)
    assert found is not None
    return found


def make_nvcc(home: Path, version: str, archs: frozenset[str] = CUDA_13, headers: bool = True) -> Path:
    """A script that answers as nvcc does, with the toolkit's folders around it."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    known = "\\n".join("compute_" + a.replace(".", "") for a in sorted(archs, key=float))
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$*" in\n--version) echo "Cuda compilation tools, release {version}, V{version}.1";;\n'
        f'--list-gpu-arch) printf "{known}\\n";;\n*--dryrun*) echo "#$ TOP={home}/bin/.." >&2;;\nesac\n'
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    (home / "lib64").mkdir()
    (home / "lib64" / f"libcudart.so.{version.split('.')[0]}").touch()
    return nvcc


@pytest.fixture
def only_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Hides this machine's own toolkit: no nvcc but those that a test makes, in CUDA_HOME or in site-packages."""
    own = cuda._nvccs
    monkeypatch.setattr(cuda, "_sites", lambda torch_site: [torch_site])
    monkeypatch.setattr(cuda.shutil, "which", lambda name, **_: None)
    monkeypatch.setattr(cuda, "_nvccs", lambda site: [n for n in own(site) if tmp_path in n.parents])
    monkeypatch.setattr(plan, "visible_gpus", lambda: [])


# --- which torch -----------------------------------------------------------------------------------------------------


def test_reads_torch_without_importing_it(tmp_path: Path) -> None:
    info = make_torch(tmp_path, "2.13.0+cu130", cuda="13.0")
    assert (info.version, info.cuda, info.hip, info.release, info.site) == (
        "2.13.0+cu130",
        "13.0",
        None,
        (2, 13),
        tmp_path,
    )
    assert torch_info.read_torch(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("own", "expected"), [("['-std=c++17']", 17), ("['-std=c++17', '-std=c++20']", 20), ("['-std=c++14']", 17)]
)
def test_language_standard_is_the_one_of_torchs_own_extensions(own: str, expected: int, tmp_path: Path) -> None:
    info = make_torch(tmp_path, "2.13.0")
    assert info.standard == 17
    (info.folder / "utils").mkdir()
    (info.folder / "utils" / "cpp_extension.py").write_text(f"cflags += {own}\n")
    assert info.standard == expected


def test_finds_the_targets_torch_from_within_isolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_torch(tmp_path / "site", "2.9.1")
    monkeypatch.setattr(torch_info, "_importable", lambda: [])
    monkeypatch.setattr(torch_info, "_outside_isolation", lambda: [])
    monkeypatch.setattr(
        torch_info.sysconfig, "get_paths", lambda: dict.fromkeys(["purelib", "platlib"], tmp_path / "site")
    )
    found = torch_info.find_torch()
    assert found is not None and found.version == "2.9.1"


def test_torch_that_is_too_old_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_torch(tmp_path / "old", "2.5.1")
    new = make_torch(tmp_path / "new", "2.6.0")
    monkeypatch.setattr(torch_info, "_site_packages", lambda: [])
    monkeypatch.setattr(torch_info, "_importable", lambda: [old.folder])
    monkeypatch.setattr(torch_info, "_outside_isolation", lambda: [])
    assert torch_info.find_torch() is None
    monkeypatch.setattr(torch_info, "_outside_isolation", lambda: [new.folder])
    assert torch_info.find_torch() == new


def test_asks_the_interpreter_outside_the_isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What pip's isolation sets is taken away again for the question.
    make_torch(tmp_path, "2.7.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outside = [folder for folder in torch_info._outside_isolation() if folder.parent == tmp_path]
    assert outside == []


@pytest.mark.parametrize(
    ("torch", "compiler", "expected"),
    [(True, True, []), (False, True, ["torch>=2.6"]), (False, False, []), (True, False, [])],
    ids=["there", "absent", "absent-no-compiler", "there-no-compiler"],
)
def test_torch_is_a_build_requirement_only_where_it_is_needed(
    torch: bool, compiler: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = make_torch(tmp_path, "2.8.0") if torch else None
    monkeypatch.setattr(plan, "find_torch", lambda: info)
    monkeypatch.setattr(plan, "_no_host", lambda: "" if compiler else "none")
    assert plan.build_requirements() == expected
    for hook in (gfl_build.get_requires_for_build_wheel, gfl_build.get_requires_for_build_editable):
        monkeypatch.setattr(gfl_build._setuptools, hook.__name__, lambda settings: ["setuptools"])
        assert hook() == ["setuptools", *expected]


# --- what is built ---------------------------------------------------------------------------------------------------


def plan_with(monkeypatch: pytest.MonkeyPatch, info: torch_info.TorchInfo | None) -> plan.Plan:
    monkeypatch.setattr(plan, "find_torch", lambda: info)
    monkeypatch.setattr(plan, "find_compiler", lambda: host.Compiler(("c++",), "c++ 12"))
    monkeypatch.setattr(plan, "_no_host", lambda: "")
    return plan.make_plan()


def test_wheel_asks_for_the_torch_it_was_built_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan_with(monkeypatch, make_torch(tmp_path, "2.13.0+cpu"))
    assert plan.runtime_requirements(made)[0] == "torch==2.13.*"
    assert (made.reason, made.cuda_reason) == ("", "torch 2.13.0+cpu is a CPU build")


def test_pure_wheel_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    made = plan.make_plan()
    assert made.torch is None and "no C++ compiler" in made.reason
    assert plan.runtime_requirements(made)[0] == "torch>=2.6"
    assert record(made)["extension"] is False and record(made)["reason"] == made.reason


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_pure_wheel_elsewhere(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.sys, "platform", platform)
    assert "Linux only" in plan.make_plan().reason


def test_backend_imports_where_there_is_only_the_portable_library() -> None:
    code = "import sys; sys.modules['fcntl'] = None; sys.path.append(sys.argv[1]); import gfl_build.commands"
    subprocess.run([sys.executable, "-c", code, str(ROOT / "build_backend")], check=True, timeout=120)


def test_pure_wheel_without_python_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "find_compiler", lambda: host.Compiler(("c++",), "c++ 12"))
    monkeypatch.setattr(plan.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(plan.sys, "platform", "linux")
    assert "headers of Python" in plan.make_plan().reason


def test_pure_wheel_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_with(monkeypatch, None).reason == "no torch>=2.6 was found to compile against"


def test_compiler_may_have_options(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setenv("CXX", "g++ -m64")
    found = host.find_compiler()
    assert found is not None and found.command == ("g++", "-m64") and found.version


# --- the CUDA part ---------------------------------------------------------------------------------------------------


def test_cuda_part_from_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_nvcc: None) -> None:
    nvcc = make_nvcc(tmp_path / "toolkit", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    made = plan_with(monkeypatch, make_torch(tmp_path / "site", "2.13.0+cu130", cuda="13.0"))
    assert made.cuda is not None and made.cuda_reason == ""
    assert (made.cuda.nvcc, made.cuda.version, made.cuda.archs) == (nvcc, "13.0", CUDA_13)
    assert made.archs == ("sm_75", "sm_80", "compute_80", "sm_90", "sm_100", "sm_120", "compute_120")


def test_cuda_part_for_the_gpu_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_nvcc: None
) -> None:
    make_nvcc(tmp_path / "toolkit", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(plan, "visible_gpus", lambda: ["8.9"])
    torch = make_torch(tmp_path / "site", "2.13.0+cu130", cuda="13.0")
    assert plan_with(monkeypatch, torch).archs == ("sm_89",)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    plan.make_plan.cache_clear()
    assert plan_with(monkeypatch, torch).archs == ("sm_90",)


def test_cuda_part_from_pip_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_nvcc: None) -> None:
    nvcc = make_nvcc(tmp_path / "site" / "nvidia" / "cu13", "13.1")
    made = plan_with(monkeypatch, make_torch(tmp_path / "site", "2.13.0+cu130", cuda="13.0"))
    assert made.cuda is not None and made.cuda.nvcc == nvcc


def test_toolkit_of_another_major_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_nvcc: None
) -> None:
    make_nvcc(tmp_path / "new", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "new"))
    torch = make_torch(tmp_path / "site", "2.6.0+cu124", cuda="12.4")
    made = plan_with(monkeypatch, torch)
    assert made.torch is torch and made.cuda is None
    assert "is of CUDA 13.0, torch was built with CUDA 12.4" in made.cuda_reason
    fitting = make_nvcc(tmp_path / "site" / "nvidia" / "cuda_nvcc", "12.6")
    plan.make_plan.cache_clear()
    made = plan.make_plan()
    assert made.cuda is not None and made.cuda.nvcc == fitting


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ({"version": "2.13.0+cpu"}, "torch 2.13.0+cpu is a CPU build"),
        ({"version": "2.13.0+rocm7.0", "hip": "7.0"}, "torch 2.13.0+rocm7.0 is a ROCm build"),
        ({"version": "2.13.0+cu130", "cuda": "13.0"}, "no nvcc was found"),
    ],
    ids=["cpu", "rocm", "no-nvcc"],
)
def test_cpu_only_says_why(
    torch: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_nvcc: None
) -> None:
    info = make_torch(tmp_path / "site", **torch)
    assert expected in plan_with(monkeypatch, info).cuda_reason
    plan.make_plan.cache_clear()
    monkeypatch.setenv("GFL_OPS_WITH_CUDA", "1")
    with pytest.raises(plan.BuildError, match="GFL_OPS_WITH_CUDA=1, but .*" + expected.replace("+", r"\+")):
        plan.make_plan()


def test_incomplete_toolkit_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_nvcc: None) -> None:
    make_nvcc(tmp_path / "toolkit", "13.0", headers=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    made = plan_with(monkeypatch, make_torch(tmp_path / "site", "2.13.0+cu130", cuda="13.0"))
    assert made.cuda is None and "cuda_runtime.h" in made.cuda_reason


def test_cuda_part_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_nvcc: None) -> None:
    make_nvcc(tmp_path / "toolkit", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("GFL_OPS_WITH_CUDA", "0")
    made = plan_with(monkeypatch, make_torch(tmp_path / "site", "2.13.0+cu130", cuda="13.0"))
    assert made.cuda is None and "GFL_OPS_WITH_CUDA=0" in made.cuda_reason


def test_wish_for_cuda_is_yes_or_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFL_OPS_WITH_CUDA", "maybe")
    with pytest.raises(plan.BuildError, match="must be 0, 1 or unset, got 'maybe'"):
        plan.make_plan()


def test_compiler_that_fails_on_a_kernel_is_told(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'unsupported GNU version' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    toolkit = cuda.CudaToolkit(nvcc, "13.0", tmp_path, tmp_path, CUDA_13)
    assert "unsupported GNU version" in cuda.probe(toolkit, ("sm_90",))


@pytest.mark.parametrize(
    ("wish", "known", "expected"),
    [
        ("", CUDA_13, "sm_75 sm_80 compute_80 sm_90 sm_100 sm_120 compute_120"),
        ("", CUDA_12_4, "sm_75 sm_80 compute_80 sm_90 compute_90"),
        ("9.0", CUDA_13, "sm_90"),
        ("8.0;8.6+PTX", CUDA_13, "sm_80 sm_86 compute_86"),
        ("8.0 9.0a", CUDA_13, "sm_80 sm_90a"),
        ("8.0, 8.0", CUDA_13, "sm_80"),
        ("Ampere;Hopper+PTX", CUDA_13, "sm_80 sm_86 sm_90 compute_90"),
    ],
)
def test_architectures(wish: str, known: frozenset[str], expected: str) -> None:
    assert cuda.target_archs(wish, known) == tuple(expected.split())


@pytest.mark.parametrize(
    ("gpus", "wish", "expected"),
    [
        (["9.0"], "", "sm_90"),
        (["8.6", "9.0"], "", "sm_86 sm_90"),
        (["9.0"], "8.0+PTX", "sm_80 compute_80"),
        # This nvcc is older than the GPU, which can only run PTX.
        (["10.0"], "", "sm_75 sm_80 compute_80 sm_90 compute_90"),
    ],
)
def test_architectures_of_this_machine(gpus: list[str], wish: str, expected: str) -> None:
    assert cuda.target_archs(wish, CUDA_12_4, gpus) == tuple(expected.split())


@pytest.mark.parametrize(
    ("capabilities", "expected"), [([], []), ([(9, 0)], ["9.0"]), ([(8, 6), (12, 0), (8, 6)], ["8.6", "12.0"])]
)
def test_the_driver_names_the_gpus(
    capabilities: list[tuple[int, int]], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Driver:
        """Three functions of libcuda."""

        def cuInit(self, flags: int) -> int:
            return 0 if capabilities else 100  # CUDA_ERROR_NO_DEVICE

        def cuDeviceGetCount(self, count: ctypes.Array) -> int:
            count._obj.value = len(capabilities)
            return 0

        def cuDeviceGet(self, device: ctypes.Array, index: int) -> int:
            device._obj.value = index
            return 0

        def cuDeviceGetAttribute(self, value: ctypes.Array, attribute: int, device: ctypes.c_int) -> int:
            value._obj.value = capabilities[device.value][{75: 0, 76: 1}[attribute]]
            return 0

    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver())
    assert cuda.visible_gpus() == expected


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    assert cuda.visible_gpus() == []


@pytest.mark.parametrize(
    ("wish", "message"),
    [("90", "'90' is no architecture"), ("9.0+SASS", "is no architecture"), ("10.0", "does not know 10.0, only 5.0")],
)
def test_architectures_refused(wish: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cuda.target_archs(wish, CUDA_12_4)


def test_code_names_as_options() -> None:
    codes = cuda.gencode(("sm_90a", "compute_120"))
    assert codes == ["-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_120,code=compute_120"]


# --- how it is compiled ----------------------------------------------------------------------------------------------


def test_commands_by_kind_of_source(tmp_path: Path) -> None:
    torch = make_torch(tmp_path / "site", "2.13.0+cu130", cuda="13.0")
    toolkit = cuda.CudaToolkit(
        Path("/toolkit/nvcc"), "13.0", Path("/toolkit/include"), Path("/x/libcudart.so"), CUDA_13
    )
    made = plan.Plan(torch, host.Compiler(("c++",), "c++ 12"), toolkit, ("sm_90", "compute_90"), "", "")
    for name in ("binding/score.cpp", "cpu/qfl.cpp", "cpu/deeper/dfl.cpp", "cuda/qfl.cu", "cuda/notes.txt"):
        file = tmp_path / "csrc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    todo = ninja_build.steps(made, tmp_path, tmp_path / "out", torch_info.Abi(False, (("STDLIB", "_libstdcpp"),)))
    commands = {s.source.relative_to(tmp_path / "csrc").as_posix(): s.command for s in todo}
    assert sorted(commands) == ["binding/score.cpp", "cpu/deeper/dfl.cpp", "cpu/qfl.cpp", "cuda/qfl.cu"]
    includes = {name: any(str(torch.folder) in word for word in command) for name, command in commands.items()}
    assert includes == {name: name.startswith("binding") for name in commands}
    assert all("-DGFL_WITH_CUDA" in command for command in commands.values())
    assert {"-D_GLIBCXX_USE_CXX11_ABI=0", '-DPYBIND11_STDLIB="_libstdcpp"'} <= set(commands["binding/score.cpp"])
    assert commands["cuda/qfl.cu"][0] == "/toolkit/nvcc" and "arch=compute_90,code=sm_90" in commands["cuda/qfl.cu"]
    assert len({s.output for s in todo}) == len(todo)
    link = ninja_build.link_command(made, [s.output for s in todo], tmp_path / "_C.so")
    assert {"-lc10_cuda", "-ltorch_cuda", "/x/libcudart.so"} <= set(link)
    without = plan.Plan(torch, made.compiler, None, (), "", "off")
    words = ninja_build.link_command(without, [], tmp_path / "_C.so")
    assert not any("cuda" in word.replace(str(tmp_path), "") for word in words)


def test_flags_keep_ieee_arithmetic() -> None:
    host_flags = [*FLAGS["cxx"], *FLAGS["nvcc_host"]]
    assert host_flags.count("-ffp-contract=off") == 2
    every = " ".join([*host_flags, *FLAGS["nvcc"]])
    assert not any(word in every for word in ("fast", "unsafe", "-ftz", "-prec", "-march"))


def test_ninja_file_escapes_paths(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    step = ninja_build.Step(folder / "x.o", folder / "x.cpp", ("c++", "-DA=$HOME"))
    text = ninja_build.ninja_file([step], ["c++", "-shared"], folder / "_C.so")
    assert "a$ folder/x.o: compile" in text and "'-DA=$$HOME'" in text


@pytest.mark.parametrize("with_ninja", [True, False], ids=["ninja", "plain"])
def test_compiles_and_links(with_ninja: bool, tmp_path: Path) -> None:
    compiler = host.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    if with_ninja and ninja_build._find_ninja() is None:
        pytest.skip("ninja is not installed")
    todo = []
    for name in ("one", "two"):
        source = tmp_path / "a folder" / f"{name}.cpp"
        source.parent.mkdir(exist_ok=True)
        source.write_text(f'extern "C" int {name}() {{ return sizeof(NAME); }}\n')
        output = tmp_path / "out" / source.parent.name / f"{name}.o"
        todo.append(ninja_build.Step(output, source, (*compiler.command, "-fPIC", f'-DNAME="{name} $"')))
    library = tmp_path / "out" / "lib.so"
    library.parent.mkdir()
    link = [*compiler.command, "-shared", *(str(s.output) for s in todo), "-o", str(library)]
    ninja_build.run_steps(todo, link, library, ninja_build._find_ninja() if with_ninja else None)
    loaded = ctypes.CDLL(str(library))
    assert (loaded.one(), loaded.two()) == (6, 6)


def test_number_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ninja_build.job_count() >= 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert ninja_build.job_count() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(RuntimeError, match="MAX_JOBS must be a positive integer"):
        ninja_build.job_count()
