"""What options that several commands have are to be."""

import argparse
import os
from pathlib import Path

import torch

from fastres.errors import SettingsError
from fastres.timing import usable_cores


def check(arguments: argparse.Namespace) -> None:
    """Counts, threads and device.

    Raises:
        SettingsError: one of them makes no sense here.
    """
    for name in ("batch", "image_size", "channels", "repeat", "threads"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    threads, most = getattr(arguments, "threads", None), 4 * usable_cores()
    if threads is not None and threads > most:
        raise SettingsError(f"--threads {threads}: expected at most {most}, 4 to a core")
    if getattr(arguments, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no CUDA device here; `fastres doctor` tells more")


def check_writable(option: str, path: Path | None) -> None:
    """Raise a SettingsError where fastres.files.replaced could not write there."""
    if path is None:
        return
    place = path if path.exists() and not path.is_file() else path.parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise SettingsError(f"--{option} {path}: cannot write there")
