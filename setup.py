"""Hands the build to CMake, so that pip and `cmake -G Ninja -B build` make the same library.

From the environment are taken FASTRES_CUDA and FASTRES_CUDA_ARCHS, which CMakeLists.txt explains, CXX and
CUDACXX, CMAKE_ARGS (more arguments for CMake) and MAX_JOBS (how many files are compiled at a time).
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        # Outside of pip's temporary folders, so that a second build compiles only what changed.
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        # What an earlier build was told, and where it found ninja, counts no longer.
        options = [
            f"-D{name}={os.environ[name]}" if os.environ.get(name) else f"-U{name}"
            for name in ("FASTRES_CUDA", "FASTRES_CUDA_ARCHS")
        ]
        options += [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if (ninja := shutil.which("ninja")) else []
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        configure = [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            ROOT,
            "-B",
            build,
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        subprocess.run([*configure, *(["--fresh"] if _is_stale(build) else []), *options], check=True)
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run(["cmake", "--build", build, "--target", "_C", *jobs], check=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(build / library.name, library)


def _is_stale(build: Path) -> bool:
    """Whether CMake did not get to its end there, or chose another compiler, which it never takes back."""
    cache = build / "CMakeCache.txt"
    if not cache.exists():
        return False
    if not (build / "build.ninja").exists():
        return True
    lines = cache.read_text().splitlines()
    chosen = {line.partition(":")[0]: line.partition("=")[2] for line in lines}
    for variable, name in (("CXX", "CMAKE_CXX_COMPILER"), ("CUDACXX", "CMAKE_CUDA_COMPILER")):
        words = shlex.split(os.environ.get(variable, ""))
        if words and name in chosen and shutil.which(words[0]) != chosen[name]:
            return True
    return False


class CleanModules(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # modules of an earlier build may be gone
            shutil.rmtree(Path(self.build_lib) / "fastres", ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("fastres._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanModules},
)
