"""Watching what a module's forward reads from modules while it is traced.

Every attribute that the code reads becomes a *guard*: a condition that the trace depends on and that is
checked at each call, such as `self.downsample is None`. What cannot be guarded is refused.
"""

from __future__ import annotations

import abc
import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FrameType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from fastres.vet import (
    Untraceable,
    is_machinery,
    torch_state,
    vet_frame,
    vet_global,
)

# Words in which `self` is the module that is fused; or, as from `sites.why_not`, a child and words on it.
Reason = str | tuple[nn.Module | None, str]


@dataclass(frozen=True)
class Guard:
    """A condition on the module under which its trace equals its forward.

    Attributes:
        code: Python expression over `self` and the names in `constants`.
        reason: what is the matter where it does not hold; or a function of the module that tells.
        constants: objects that `code` refers to by name.
    """

    code: str
    reason: str | Callable[[nn.Module], Reason]
    constants: tuple[tuple[str, Any], ...] = ()

    def holds(self, module: nn.Module) -> bool:
        return bool(eval(self.code, dict(self.constants), {"self": module}))

    def why(self, module: nn.Module) -> Reason:
        return self.reason if isinstance(self.reason, str) else self.reason(module)


class ForeignInit:
    """A mix-in that keeps the bases' `__init_subclass__`, such as a registry, from seeing a class.

    It comes first among the bases. Like nn.Module it has no __slots__, so that an instance can change
    between the class and its subclass.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has without fastres."""
    return getattr(type(module), "_stock_class", type(module))


def is_torch_layer(module: nn.Module) -> bool:
    """A layer of torch.nn: it writes to its input only if `inplace` is set, and keeps nothing."""
    cls = stock_class(module)
    return cls.__module__.startswith("torch.nn.modules.") and cls is not nn.Sequential


def module_code(path: str) -> str:
    """Python expression for the submodule at `path`; `_modules` is ten times as fast as `self.name`."""
    parts = path.split(".") if path else []
    return "self" + "".join(f"._modules[{part!r}]" for part in parts)


def child_code(path: str) -> str:
    """The same, but None where the last part is missing."""
    parent, _, name = path.rpartition(".")
    return f"{module_code(parent)}._modules.get({name!r})"


def untouched(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling the module still means running `cls.forward` and nothing else, such as a hook."""
    return (
        (type(module) is cls or getattr(type(module), "_stock_class", None) is cls)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
    )


def untouched_guard(module: nn.Module, path: str) -> Guard:
    """That the submodule at `path` is called as its class has it."""
    cls = stock_class(module.get_submodule(path))
    name = f"_class_{id(cls)}"  # a path may have characters that a name may not

    def why(module: nn.Module) -> Reason:
        child = module.get_submodule(path)
        replaced = stock_class(child) is not cls
        return child, f"{type(child).__name__} instead of {cls.__name__}" if replaced else "a hook is set"

    code = f"_untouched({module_code(path)}, {name})"
    return Guard(code, why, (("_untouched", untouched), (name, cls)))


@functools.cache
def swappable(cls: type[nn.Module]) -> bool:
    """Whether instances may be given a subclass that overrides forward or attribute access."""
    names = own_names(cls)
    return (
        type(cls) in (type, abc.ABCMeta)
        and not any(vars(base).get("__slots__") for base in cls.__mro__)
        and "__getattribute__" not in names
        and "__getattr__" not in names
        and not issubclass(cls, (torch.jit.ScriptModule, fx.GraphModule))
    )


def own_names(cls: type[nn.Module]) -> set[str]:
    """What the class and its bases define below nn.Module."""
    return {name for base in _own_bases(cls) for name in vars(base)}


def own_functions(cls: type[nn.Module]) -> list[FunctionType]:
    """The functions among these, but for __init__, which no instance calls again."""
    members = [member for base in _own_bases(cls) for member in vars(base).items()]
    return [value for name, value in members if isinstance(value, FunctionType) and name != "__init__"]


def _own_bases(cls: type[nn.Module]) -> list[type]:
    return [base for base in cls.__mro__ if base not in (nn.Module, object)]


def plain(value: Any) -> bool:
    """Whether the value's repr is its source and no part of it can change."""
    if isinstance(value, tuple):
        return type(value) is tuple and all(map(plain, value))
    return (
        value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
    )


def equals(code: str, value: Any) -> str:
    """Source of a condition that `code` gives this plain value; never an error, whatever it gives."""
    if value is None or isinstance(value, bool):
        return f"{code} is {value}"
    return f"type({code}) is {type(value).__name__} and {code} == {value!r}"


class Watch:
    """Collects the guards of one trace, and the first reason to refuse it."""

    def __init__(self, root: nn.Module, training: bool) -> None:
        self.training = training
        self.paths = {module: path for path, module in root.named_modules()}
        self.guards: list[Guard] = []
        self.error: Untraceable | None = None
        self._seen: set[Any] = set()
        self._state = torch_state()
        self._thread = threading.get_ident()

    def elsewhere(self) -> bool:
        """Whether another thread asks than the one that traces."""
        return threading.get_ident() != self._thread

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the code that runs in this context."""
        previous = sys.getprofile()
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(previous)

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        code, home = frame.f_code, frame.f_globals.get("__name__", "")
        if event == "call" and home == "torch.utils.checkpoint":
            self.refuse("forward calls torch.utils.checkpoint, which a trace would go through")
        if event == "call" and code not in self._seen and not is_machinery(home):
            self._seen.add(code)
            try:
                vet_frame(frame)
            except Untraceable as reason:  # which the traced code might catch
                self.error = self.error or reason
                raise

    def refuse(self, reason: str) -> None:
        self.error = self.error or Untraceable(reason)
        raise self.error

    def guard(self, code: str, reason: str, **constants: Any) -> None:
        if code not in self._seen:
            self._seen.add(code)
            self.guards.append(Guard(code, reason, tuple(constants.items())))

    def check_state(self) -> None:
        if torch_state() != self._state:
            self.refuse("forward changes grad mode, autocast or the like")

    # Attributes

    def recording(self, cls: type[nn.Module]) -> type[nn.Module]:
        """A subclass of `cls` that reports each attribute which code outside torch reads."""
        watch = self

        def __getattribute__(module: nn.Module, name: str) -> Any:
            if watch.elsewhere():
                return object.__getattribute__(module, name)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not is_machinery(caller):
                return watch.read(module, name)
            if name == "_modules" and caller == "torch.nn.modules.container":
                watch.guard_children(module)
            return object.__getattribute__(module, name)

        namespace = {
            "__getattribute__": __getattribute__,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "_stock_class": cls,
        }
        return type(cls)(cls.__name__, (ForeignInit, cls), namespace)

    def read(self, module: nn.Module, name: str) -> Any:
        members = object.__getattribute__(module, "__dict__")
        path = self.paths[module]
        owner = module_code(path)
        shown = ".".join(filter(None, ("self", path, name)))
        if name == "training":
            self.guard(f"{owner}.training is {self.training}", f"{shown} is {not self.training}")
            return self.training
        if name == "_modules":
            self.guard_children(module)
            return members["_modules"]
        if name.startswith("__") or name in ("_parameters", "_buffers"):
            self.refuse(f"forward reads {shown}")
        if name in members["_modules"]:
            self.guard_child(module, name)
            child = members["_modules"][name]
            if child is not None and not swappable(stock_class(child)):
                # All that may be done with it is to call it: what is read from it would not be seen.
                return lambda *args, **kwargs: child(*args, **kwargs)
            raise AttributeError(name)  # python then asks nn.Module.__getattr__, which fx has patched
        if name in members["_parameters"] or name in members["_buffers"]:
            value = members["_parameters"].get(name, members["_buffers"].get(name))
            state = "None" if value is None else "not None"
            self.guard(f"{owner}.{name} is {state}", f"{shown} was {state} when fuse() ran")
            raise AttributeError(name)
        defined = inspect.getattr_static(type(module), name, None)
        if name in members or plain(defined) or (defined is not None and inspect.isclass(defined)):
            return self.guard_value(owner, shown, name, members.get(name, defined))
        if isinstance(defined, FunctionType) and defined.__module__ == "torch.nn.modules.module":
            if name not in ("children", "named_children"):
                self.refuse(f"forward calls {shown}()")
            self.guard_children(module)
        elif isinstance(defined, FunctionType):
            constant = f"_{len(self.guards)}_{name}"
            self.guard(
                f"{name!r} not in {owner}.__dict__ and {owner}.__class__.{name} is {constant}",
                f"{shown} was replaced",
                **{constant: defined},
            )
        elif not isinstance(defined, (staticmethod, classmethod, property)):
            self.refuse(
                f"forward reads {shown}, which is {'missing' if defined is None else 'no plain value'}"
            )
        return object.__getattribute__(module, name)

    def guard_value(self, owner: str, shown: str, name: str, value: Any) -> Any:
        if plain(value):
            self.guard(equals(f"{owner}.{name}", value), f"{shown} was {value!r} when fuse() ran")
        elif isinstance(value, (FunctionType, BuiltinFunctionType)):
            vet_global(value, shown)
            constant = f"_{len(self.guards)}_{name}"
            self.guard(
                f"{owner}.{name} is {constant}",
                f"{shown} is another function than when fuse() ran",
                **{constant: value},
            )
        else:
            self.refuse(f"forward reads {shown}, a {type(value).__name__}, whose changes cannot be seen")
        return value

    def guard_child(self, parent: nn.Module, name: str) -> None:
        path = ".".join(filter(None, (self.paths[parent], name)))
        child = object.__getattribute__(parent, "__dict__")["_modules"][name]
        if child is None:
            self.guard(f"{child_code(path)} is None", f"self.{path} was None when fuse() ran")
        elif self.paths[child] != path:  # the same module under two names: the graph knows the first only
            first = self.paths[child]
            self.guard(
                f"{child_code(path)} is {child_code(first)}",
                f"self.{path} was self.{first} when fuse() ran",
            )
        else:
            self.guard(f"{child_code(path)} is not None", f"self.{path} is gone")

    def guard_children(self, module: nn.Module) -> None:
        children = object.__getattribute__(module, "__dict__")["_modules"]
        path = self.paths[module]
        names = tuple(children)
        self.guard(
            f"tuple({module_code(path)}._modules) == {names!r}",
            f"{'self.' + path if path else 'self'} had other children when fuse() ran",
        )
        for name in names:
            if children[name] is None or self.paths[children[name]] != ".".join(filter(None, (path, name))):
                self.guard_child(module, name)
