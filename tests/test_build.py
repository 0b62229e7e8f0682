"""What the build says where it cannot do what it is asked for."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def configure(folder: Path, *options: str, nvcc: str | None = None) -> subprocess.CompletedProcess:
    """Of CMake, in a folder that may be there already, with this nvcc before all others."""
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if nvcc is not None:
        tools = folder.with_name("tools")
        tools.mkdir(exist_ok=True)
        (tools / "nvcc").write_text(nvcc)
        (tools / "nvcc").chmod(0o755)
        path.insert(0, str(tools))
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    environment = {**os.environ, "PATH": ":".join(path)}
    environment.pop("CUDACXX", None)
    return subprocess.run([*command, *options], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "option, message",
    [
        ("FASTRES_CUDA=maybe", "FASTRES_CUDA is 'maybe'; it takes auto, on or off."),
        ("FASTRES_CUDA_ARCHS=", "FASTRES_CUDA_ARCHS is empty; it takes architectures"),
        ("FASTRES_CUDA_ARCHS=75;90a", "FASTRES_CUDA_ARCHS: '75' is none of the architectures from 80 on"),
        ("FASTRES_CUDA_ARCHS=90;all", "FASTRES_CUDA_ARCHS: 'all' is none of the architectures"),
        ("FASTRES_EMULATE=all", "FASTRES_EMULATE is 'all'; it takes off, amx or avx512."),
    ],
)
def test_an_option_that_makes_no_sense(option, message, tmp_path):
    done = configure(tmp_path / "build", f"-D{option}")
    assert done.returncode != 0 and message in " ".join(done.stderr.split())


def test_an_nvcc_that_compiles_nothing(tmp_path):
    broken = "#!/bin/sh\nexit 1\n"
    done = configure(tmp_path / "build", "-DFASTRES_CUDA=on", nvcc=broken)
    words = " ".join(done.stderr.split())
    assert (
        done.returncode != 0 and "FASTRES_CUDA=on, but " in words and "nvcc compiles nothing here" in words
    )
    done = configure(tmp_path / "build", "-DFASTRES_CUDA=auto", nvcc=broken)
    assert done.returncode == 0 and "building for the CPU alone" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------------------
# setup.py, with a stand-in for CMake

CMAKE = """#!/bin/sh
echo "$@" >> "$LOG"
case "$1" in
    -G)
        mkdir -p "$6" && touch "$6/build.ninja"
        echo "CMAKE_CXX_COMPILER:FILEPATH=$WHICH" > "$6/CMakeCache.txt"
        ;;
    --build) touch "$2/$LIBRARY" ;;
esac
"""


@pytest.fixture
def source(tmp_path):
    """As much of the source as pip looks at."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for folder, file in (("fastres", "__init__.py"), ("csrc/cpu", "kernels.h"), ("tests", "test_a.py")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).touch()
    (tmp_path / "bin").mkdir()
    for name, text in (("cmake", CMAKE), ("old-g++", "#!/bin/sh\n"), ("new-g++", "#!/bin/sh\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def set_up(source: Path, *words: str, **environment: str) -> list[str]:
    """The calls of CMake that setup.py makes."""
    log = source / "log"
    log.write_text("")
    bin = source / "bin"
    found = {
        **{name: value for name, value in os.environ.items() if name not in ("CXX", "CUDACXX")},
        "PATH": f"{bin}:{os.environ['PATH']}",
        "LOG": str(log),
        "WHICH": str(bin / environment.get("CXX", "old-g++")),
        "LIBRARY": f"_C{sysconfig.get_config_var('EXT_SUFFIX')}",
        **environment,
    }
    command = [sys.executable, "setup.py", "-q", *words]
    done = subprocess.run(command, cwd=source, env=found, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines()


def test_another_compiler_than_that_of_the_last_build(source):
    calls = [set_up(source, "build_ext", CXX=name)[0] for name in ("old-g++", "old-g++", "new-g++")]
    assert ["--fresh" in call for call in calls] == [False, False, True]
    (next((source / "build").glob("*/build.ninja"))).unlink()  # as where CMake had something to say
    assert "--fresh" in set_up(source, "build_ext", CXX="new-g++")[0]


def test_more_arguments_for_cmake(source):
    configured, built = set_up(source, "build_ext", CMAKE_ARGS="-DA='b c' -DD=e", MAX_JOBS="3")
    assert "-DA=b c -DD=e" in configured and built.endswith("--parallel 3")


def test_a_module_that_is_gone_is_not_installed(source):
    (source / "fastres" / "gone.py").touch()
    set_up(source, "build")
    (source / "fastres" / "gone.py").unlink()
    set_up(source, "build")
    modules = {path.name for path in (source / "build").glob("lib*/fastres/*.py")}
    assert modules == {"__init__.py"}


def test_the_source_archive_can_be_built_from(source):
    set_up(source, "sdist")
    with tarfile.open(next((source / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"CMakeLists.txt", "csrc/cpu/kernels.h", "fastres/__init__.py", "setup.py", "LICENSE"}
    assert wanted <= names and not any(name.startswith("tests") for name in names)
