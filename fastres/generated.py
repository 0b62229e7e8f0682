"""Functions made of source that was generated."""

import ast
import itertools
import linecache
import weakref
from types import FunctionType
from typing import Any

from torch import fx, nn

from fastres.watch import module_code

_files = itertools.count()


def compiled(source: str, scope: dict[str, Any], cls: type[nn.Module]) -> FunctionType:
    """The `forward` that the source defines; a traceback or a debugger can show its lines."""
    filename = f"<fastres.fuse {next(_files)}: {cls.__qualname__}>"
    exec(compile(source, filename, "exec"), scope)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    weakref.finalize(scope["forward"], linecache.cache.pop, filename, None)
    return scope["forward"]


def body_of(graph: fx.Graph, module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The source of the graph's `forward`, and the objects that it names."""
    code = graph.python_code("self")
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)} - {""}
    return ast.unparse(_Modules(paths).visit(ast.parse(code.src))), code.globals


class _Modules(ast.NodeTransformer):
    """Puts `self._modules['name']` in the place of `self.name` where that is a module."""

    def __init__(self, paths: set[str]) -> None:
        self.paths = paths

    def visit(self, node: ast.AST) -> ast.AST:
        path = _path_in_self(node)
        if path is None or path not in self.paths:
            return self.generic_visit(node)
        return ast.parse(module_code(path), mode="eval").body


def _path_in_self(node: ast.AST) -> str | None:
    """The name of what `self.a.b` or `getattr(self.a, "b")` reads; of `self` itself the empty one."""
    match node:
        case ast.Name(id="self"):
            return ""
        case ast.Attribute(value=owner, attr=name):
            pass
        case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=name)]):
            pass
        case _:
            return None
    before = _path_in_self(owner)
    return before if before is None else f"{before}.{name}".removeprefix(".")
