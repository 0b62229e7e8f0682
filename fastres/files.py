"""Files that are whole or absent: written beside, flushed, then renamed; where lasting ones are kept."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def cache_path(name: str) -> Path:
    """Where a file is kept for later processes: in fastres's part of the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # there is no home, as in some containers
            cache = tempfile.gettempdir()
    return Path(cache) / "fastres" / name


@contextmanager
def replaced(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write in place of `path`, so that a crash at any moment leaves the old one or the new one.

    What is no file, such as /dev/null, is written to; of a link, what it leads to is replaced.

    Args:
        mode: "w" or "wb".

    Raises:
        OSError: it cannot be written, and its message names a file; what was there before still is.
    """
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if path.exists() and not path.is_file():
        with open(path, mode, **options) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a write
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
