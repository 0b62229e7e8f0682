"""Checkpoints, and the state of all that a training run draws from."""

import random
from pathlib import Path
from typing import Any

import numpy
import torch

from fastres.files import replaced


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that a crash at any moment leaves the old file or the new one."""
    with replaced(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of its archive, which a write that failed left unfinished
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from error
            raise


def random_states() -> dict[str, Any]:
    """Of every generator that training draws from."""
    _, keys, *rest = numpy.random.get_state()
    python = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (keys.tolist(), *rest),
        "python": (python[0], list(python[1]), python[2]),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    keys, *rest = states["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), *rest))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
