"""Hands the build to CMake, so that pip and `cmake -G Ninja -B build` make the same library.

FASTRES_CUDA and FASTRES_CUDA_ARCHS are taken from the environment; CMakeLists.txt says what they mean.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
        subprocess.run(
            [
                "cmake",
                "-G",
                "Ninja",
                "-S",
                ROOT,
                "-B",
                build,
                f"-DPython_EXECUTABLE={sys.executable}",
                *options,
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", build, "--target", "_C"], check=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(build / library.name, library)


setup(ext_modules=[Extension("fastres._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
