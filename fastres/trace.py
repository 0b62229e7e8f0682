"""Tracing one module's own forward, or saying why the trace could not be trusted.

torch.fx runs `forward` once with stand-ins for its tensors and writes down what was called; children are
leaves. A trace equals `forward` wherever its guards hold (see `fastres.watch` and `fastres.vet`), or it
is not made.
"""

from __future__ import annotations

import builtins
import dis
import functools
import gc
import inspect
import keyword
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from fastres.vet import Untraceable, from_torch
from fastres.watch import (
    Guard,
    Watch,
    is_torch_layer,
    own_functions,
    own_names,
    plain,
    stock_class,
    swappable,
)


@dataclass
class Trace:
    """What a module's forward does in one mode.

    Attributes:
        module: whose forward it is.
        training: the value of `self.training` in it.
        graph: its placeholders are the arguments that have no default, all of them tensors.
        defaults: the other arguments, which were taken at these values.
        guards: the conditions under which the graph equals the forward.
    """

    module: nn.Module
    training: bool
    graph: fx.Graph
    defaults: dict[str, Any]
    guards: list[Guard]

    def callee(self, node: fx.Node) -> nn.Module | None:
        """The module that the node calls."""
        return self.module.get_submodule(node.target) if node.op == "call_module" else None

    def calls(self, node: Any, *classes: type[nn.Module]) -> bool:
        """Whether the node calls a module of exactly one of these stock classes, or any, with one value."""
        return (
            isinstance(node, fx.Node)
            and node.op == "call_module"
            and (not classes or stock_class(self.callee(node)) in classes)
            and len(node.args) == 1
            and isinstance(node.args[0], fx.Node)
            and not node.kwargs
        )


# Tracing patches nn.Module while it runs, so that two threads must not do it at once.
_lock = threading.RLock()


def trace(module: nn.Module, *, training: bool, inline: frozenset[nn.Module] = frozenset()) -> Trace:
    """Trace the module's own forward; its children are leaves.

    Args:
        module: any module, fused or not: the forward of its stock class is what is traced.
        training: the value that `self.training` has in the trace, here and in the inlined children.
        inline: children (of any depth) whose forward is traced as well, in place of a call.

    Returns:
        The trace. The module is as it was before.

    Raises:
        Untraceable: where a trace might not equal what forward does.
    """
    forward = check_class(module)
    watch = Watch(module, training)
    recorded = {}
    with _lock, _no_garbage_collection():
        try:
            for child in module.modules():
                child_cls = stock_class(child)
                if child is module or swappable(child_cls):
                    recorded[child] = type(child)
                    object.__setattr__(child, "__class__", watch.recording(child_cls))
            tracer = _OwnForward(watch, forward, inline)
            graph = tracer.trace(module)
        except Untraceable:
            raise
        except (Exception, SystemExit) as error:  # of the user's code or fx: the module stays as it is
            raise watch.error or Untraceable(_first_sentence(error)) from error
        finally:
            for child, child_cls in recorded.items():
                object.__setattr__(child, "__class__", child_cls)
    if watch.error:
        raise watch.error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and any(map(keyword.iskeyword, node.target.split("."))):
            raise Untraceable(f"in {node.target!r} is a word of Python, which generated code cannot name")
    return Trace(module, training, graph, tracer.defaults, watch.guards)


def traceable_parts(module: nn.Module, *, training: bool) -> Iterator[nn.Module]:
    """The module, its children, their children and so on that can be traced, but for torch's layers."""
    if not is_torch_layer(module):
        try:
            trace(module, training=training)
        except Untraceable:
            return
        yield module
    for child in module.children():
        yield from traceable_parts(child, training=training)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Finalizers of anybody's objects would run in the middle of forward, and be taken for a part of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_class(module: nn.Module) -> FunctionType:
    """The forward that the module's stock class defines.

    Raises:
        Untraceable: where the class is of a kind that must not be traced or swapped.
    """
    cls = stock_class(module)
    forward = getattr(cls, "forward", None)
    if is_parametrized(module):
        raise Untraceable("its own parameters are parametrized")
    if isinstance(module, torch.jit.ScriptModule):
        raise Untraceable("it is a TorchScript module")
    if isinstance(module, fx.GraphModule):
        raise Untraceable("it is a torch.fx GraphModule, whose class rewrites its own forward")
    if "forward" in module.__dict__:
        raise Untraceable("forward is overridden on the instance")
    if "__call__" in own_names(cls):
        raise Untraceable("its class overrides __call__")
    if not isinstance(forward, FunctionType):
        raise Untraceable("its forward is not a plain function")
    if not swappable(cls):
        raise Untraceable("its class overrides attribute access, has a metaclass or has slots")
    if _calls_super_of_instance(cls):
        raise Untraceable("a method calls super() of self.__class__, which in a subclass never ends")
    if from_torch(forward.__module__ or "") and forward is not nn.Sequential.forward:
        raise Untraceable("its forward is torch's own")
    return forward


@functools.cache
def _calls_super_of_instance(cls: type[nn.Module]) -> bool:
    """Whether a method says super(self.__class__, self) or super(type(self), self)."""
    return any(map(_is_super_of_instance, own_functions(cls)))


def _is_super_of_instance(function: FunctionType) -> bool:
    instructions = [i for i in dis.get_instructions(function) if i.opname not in ("PUSH_NULL", "CACHE")]
    for called, first, second in zip(instructions, instructions[1:], instructions[2:], strict=False):
        if called.opname == "LOAD_GLOBAL" and called.argval == "super":
            if second.argval == "__class__" or (first.opname == "LOAD_GLOBAL" and first.argval == "type"):
                return True
    return False


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


# ---------------------------------------------------------------------------------------------------------
# The tracer
# ---------------------------------------------------------------------------------------------------------


class _Strict(fx.Proxy):
    """A stand-in that refuses to be a key, or text: neither would ever equal that of the value itself."""

    def __hash__(self) -> int:
        raise Untraceable("forward looks up a value that depends on its input in a set or dict")

    def __str__(self) -> str:
        raise Untraceable("forward makes text of a value that depends on its input")

    def __format__(self, spec: str) -> str:
        return str(self)


class _Attribute(_Strict, fx.proxy.Attribute):
    """Of a stand-in."""


class _Value(_Strict):
    """A stand-in for a tensor that keeps `x += y` apart from `x = x + y`, which fx.Proxy does not."""

    def __getattr__(self, name: str) -> fx.Proxy:
        of_module = self.node.op == "call_module"  # which may return something else than a tensor
        if not (of_module or hasattr(Tensor, name)) or name in ("grad", "grad_fn", "_base", "_grad"):
            raise Untraceable(f"forward asks a tensor for its {name}, which may be missing")
        return _Attribute(self, name)


def _inplace_operator(function: Any) -> Any:
    def method(self: _Value, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in "iadd isub imul imatmul itruediv ifloordiv imod ipow ilshift irshift iand ixor ior".split():
    setattr(_Value, f"__{_name}__", _inplace_operator(getattr(operator, _name)))


class _OwnForward(fx.Tracer):
    """Traces the root's forward; children are leaves but for those to inline."""

    proxy_buffer_attributes = True

    def __init__(self, watch: Watch, forward: FunctionType, inline: frozenset[nn.Module]) -> None:
        super().__init__()
        self.watch = watch
        self.forward = forward
        self.inline = inline
        self.defaults: dict[str, Any] = {}

    # While it traces, modules that other threads call come by here as well.

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.watch.elsewhere():
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return (
            attr_val if self.watch.elsewhere() else super().getattr(attr, attr_val, parameter_proxy_cache)
        )

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        positional, keyword = [self.root], {}
        for parameter in list(inspect.signature(self.forward, follow_wrapped=False).parameters.values())[
            1:
        ]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                self.watch.refuse(f"forward takes {parameter}")
            if (
                parameter.name.startswith("_")
                or hasattr(builtins, parameter.name)
                and parameter.name != "input"
            ):
                self.watch.refuse(f"forward has an argument called {parameter.name}")
            if parameter.default is parameter.empty:
                value = self.create_proxy("placeholder", parameter.name, (), {})
            elif plain(parameter.default):
                value = self.defaults[parameter.name] = parameter.default
            else:
                self.watch.refuse(
                    f"forward's argument {parameter.name} has a default that is no plain value"
                )
            if parameter.kind is parameter.KEYWORD_ONLY:
                keyword[parameter.name] = value
            else:
                positional.append(value)

        def watched() -> Any:
            with self.watch.running():
                return self.forward(*positional, **keyword)

        return watched, []

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.watch.check_state()
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not any(
            a is t for t in (*self.root.parameters(), *self.root.buffers())
        ):
            self.watch.refuse("forward uses a tensor that is neither a parameter nor a buffer")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inline
