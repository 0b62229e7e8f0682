"""Functions made of source that was generated."""

import itertools
import linecache
import weakref
from types import FunctionType
from typing import Any

from torch import nn

_files = itertools.count()


def compiled(source: str, scope: dict[str, Any], cls: type[nn.Module]) -> FunctionType:
    """The `forward` that the source defines; a traceback or a debugger can show its lines."""
    filename = f"<fastres.fuse {next(_files)}: {cls.__qualname__}>"
    exec(compile(source, filename, "exec"), scope)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    weakref.finalize(scope["forward"], linecache.cache.pop, filename, None)
    return scope["forward"]
