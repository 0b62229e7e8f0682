"""fuse() and unfuse(): making any model run its batch norms, ReLUs and residual sums through the fused ops.

A module is fused by giving it another class: a subclass of its own, with a forward that was generated
from a trace of the original one. Nothing is stored on the instance, so parameters, state_dict, copies and
replicas are what they were, and unfuse() only has to give the class back. Wherever the trace does not
hold, the original forward runs.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastres.block_patterns import join_blocks
from fastres.generated import body_of, compiled
from fastres.inlining import containers_to_inline
from fastres.patterns import Chain, find_chains, makers_stay, rewrite
from fastres.trace import Trace, check_class, trace
from fastres.vet import Untraceable
from fastres.watch import ForeignInit, Guard, Reason, equals, is_torch_layer, own_names, stock_class


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Make a model run conv, batch norm, residual addition and ReLU as fused operations.

    What can be fused is found by tracing what each module's forward does. Whatever is not recognised
    stays as it was; `fastres.explain` tells what and why. Parameters, state_dict and results stay the
    same. Hooks fire as before: a layer that has one runs unfused.

    Args:
        model: any module. Its parameters may already be in an optimizer if `inplace`.
        inplace: change `model` itself instead of a deep copy of it.

    Returns:
        The fused model; `model` itself if `inplace`.

    Raises:
        TypeError: if `model` is no torch.nn.Module.
    """
    model = _own(model, inplace, "fuse")
    for module in model.modules():
        fuse_module(module)
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Give back the model as it was before `fuse`, with the parameters and buffers that it has now.

    Args:
        model: any module, fused or not.
        inplace: change `model` itself instead of a deep copy of it.

    Returns:
        The model, each module of which has its original class; `model` itself if `inplace`.

    Raises:
        TypeError: if `model` is no torch.nn.Module.
    """
    model = _own(model, inplace, "unfuse")
    for module in model.modules():
        if is_fused(module):
            set_class(module, stock_class(module))
    return model


def is_fused(module: nn.Module) -> bool:
    """Whether the module itself (not its children) has a fused forward."""
    return "_variants" in vars(type(module))


def _own(model: Any, inplace: bool, name: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastres.{name}: model has type {type(model).__name__}, expected torch.nn.Module")
    if inplace:
        return model
    copied = copy.deepcopy(model)
    for module, original in zip(copied.modules(), model.modules(), strict=True):
        module.training = original.training  # torchvision's feature extractors forget it in copies
    return copied


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", cls)  # past nn.Module's, and the user's, __setattr__


# ---------------------------------------------------------------------------------------------------------
# One module
# ---------------------------------------------------------------------------------------------------------


class Variant:
    """A module's forward in one mode (training or eval), and what of it can be fused.

    Args:
        module: the module.
        training: the mode.

    Raises:
        Untraceable: where its forward cannot be traced.
    """

    def __init__(self, module: nn.Module, training: bool) -> None:
        self.traced: Trace = trace(module, training=training)
        self.inlined = containers_to_inline(self.traced)
        if self.inlined:
            try:
                self.traced = trace(module, training=training, inline=self.inlined)
            except Untraceable:
                self.inlined = frozenset()
        self.chains: list[Chain] = find_chains(self.traced)
        try:
            needed = makers_stay(self.traced, self.chains, self.inlined)
        except Untraceable:
            self.chains = [chain for chain in self.chains if not chain.makers]
            needed = []
        self.guards = [*self.traced.guards, *needed]

    def depends_on_mode(self) -> bool:
        return any(".training is " in guard.code for guard in self.guards)


def fuse_module(module: nn.Module) -> None:
    """Fuse what the module's own forward does, as far as it can be; its children are left alone."""
    if is_fused(module):
        return
    variants = [
        variant for _, variant in variants_of(module) if isinstance(variant, Variant) and variant.chains
    ]
    if variants:
        set_class(module, _fused_class(module, variants))


def variants_of(module: nn.Module) -> Iterator[tuple[bool, Variant | Untraceable]]:
    """The module's forward in its present mode, and in the other one where that makes a difference."""
    if is_torch_layer(module):
        return
    if stock_class(module).__module__.startswith(f"{__package__}."):
        yield module.training, Untraceable("it calls the fused operations itself")
        return
    for training in (module.training, not module.training):
        try:
            _check_pickling(module)
            variant = Variant(module, training)
        except Untraceable as reason:
            yield training, reason
        else:
            yield training, variant
            if not variant.depends_on_mode():
                return


def _check_pickling(module: nn.Module) -> None:
    check_class(module)
    for name in ("__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__", "__setattr__"):
        if name in own_names(stock_class(module)):
            raise Untraceable(f"its class defines {name}")


# ---------------------------------------------------------------------------------------------------------
# The class of a fused module
# ---------------------------------------------------------------------------------------------------------

# A class lives as long as a module has it; modules with the same code share one.
_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = weakref.WeakValueDictionary()


class Fused(ForeignInit):
    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # Written as a module of the original class, which the reader can import; fused again when read.
        create, (_, *arguments), *state = super().__reduce_ex__(max(protocol, 2))
        return (_restore, (stock_class(self), *arguments), *state)

    def __prepare_scriptable__(self) -> nn.Module:
        # What this returned, torch.jit.script would put in the place of the module in its parent.
        raise RuntimeError(
            "torch.jit.script cannot compile a fused module; torch.jit.script(fastres.unfuse(model)) "
            "compiles the model as it was, with the weights that it has now"
        )


class _Restoring(ForeignInit):
    """The class of a fused module between its creation and its state, in copying and unpickling."""

    def __setstate__(self, state: Any) -> None:
        set_class(self, stock_class(self))
        self.__setstate__(state)
        fuse_module(self)


def _restore(cls: type[nn.Module], *arguments: Any) -> nn.Module:
    module = cls.__new__(cls, *arguments)
    set_class(module, subclass(_Restoring, cls, {}))
    return module


def subclass(mixin: type, cls: type[nn.Module], namespace: dict[str, Any]) -> type[nn.Module]:
    """A class of the same name, which knows the one that it stands for; `mixin` comes first in it once."""
    names = {name: vars(cls).get(name) for name in ("__module__", "__doc__")}
    names |= {"__qualname__": cls.__qualname__, "_stock_class": getattr(cls, "_stock_class", cls)}
    bases = (cls,) if issubclass(cls, mixin) else (mixin, cls)
    return type(cls)(cls.__name__, bases, {**names, **namespace})


def _fused_class(module: nn.Module, variants: list[Variant]) -> type[nn.Module]:
    cls = stock_class(module)
    own = Guard(
        "_cls.forward is _stock",
        "its class has another forward than when fuse() ran",
        (("_cls", cls), ("_stock", cls.forward)),
    )
    guards = []
    for variant in variants:
        needed = rewrite(variant.traced, variant.chains, variant.inlined)
        guards.append([own, *variant.guards, *needed, *join_blocks(variant.traced)])
    bodies = [body_of(variant.traced.graph, module) for variant in variants]
    constants = {name: value for guard in sum(guards, []) for name, value in guard.constants}
    defaults = variants[0].traced.defaults
    source = _dispatch_source(cls, defaults, guards)
    scopes = [constants, *(names for _, names in bodies)]
    names = tuple((name, id(value)) for scope in scopes for name, value in scope.items())
    key = (cls, source, tuple(body for body, _ in bodies), names)
    fused = _classes.get(key)
    if fused is None:
        scope = {"Tensor": Tensor, **constants}
        for index, (body, named) in enumerate(bodies):
            scope[f"_fused_{index}"] = compiled(body, dict(named), cls)
        forward = compiled(source, scope, cls)
        for name in (
            "__defaults__",
            "__kwdefaults__",
            "__annotations__",
            "__doc__",
            "__module__",
            "__qualname__",
        ):
            setattr(forward, name, getattr(cls.forward, name))
        names = {"forward": forward, "_variants": guards, "_defaults": defaults}
        fused = _classes[key] = subclass(Fused, cls, names)
    return fused


def _dispatch_source(cls: type[nn.Module], defaults: dict[str, Any], guards: list[list[Guard]]) -> str:
    """The source of a forward with the original's signature, which picks the variant whose guards hold."""
    parameters = list(inspect.signature(cls.forward, follow_wrapped=False).parameters.values())
    own, arguments = parameters[0].name, parameters[1:]
    signature = inspect.Signature(
        [
            p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None)
            for p in parameters
        ]
    )
    passed = [f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in arguments]
    tensors = [p.name for p in arguments if p.name not in defaults]
    checks = [f"isinstance({name}, Tensor)" for name in tensors] + [
        equals(*item) for item in defaults.items()
    ]
    lines = [f"def forward{signature}:"]
    if own != "self":
        lines += [f"    self = {own}"]
    lines += [f"    if {' and '.join(checks) or 'True'}:"]
    for index, conditions in enumerate(guards):
        condition = "\n            and ".join(guard.code for guard in conditions) or "True"
        lines += [f"        if (\n            {condition}\n        ):"]
        lines += [f"            return _fused_{index}({', '.join(['self', *tensors])})"]
    lines += [f"    return _cls.forward({', '.join(['self', *passed])})"]
    return "\n".join(lines)


def why_stock(module: nn.Module, *args: Any, **kwargs: Any) -> Reason | None:
    """Why this call of a fused module runs its original forward; None if it does not.

    Returns:
        Words in which `self` is the module; or one of its children, and words on that.
    """
    cls = type(module)
    passed = inspect.signature(cls.forward).bind(module, *args, **kwargs).arguments
    for name, value in list(passed.items())[1:]:
        if name in cls._defaults and not eval(equals("value", cls._defaults[name]), {"value": value}):
            return f"the argument {name} was passed, and only its default is fused"
        if name not in cls._defaults and not isinstance(value, Tensor):
            return f"the argument {name} is a {type(value).__name__}, and only tensors are fused"
    broken = []
    for guards in cls._variants:
        failed = next((guard for guard in guards if not guard.holds(module)), None)
        if failed is None:
            return None
        broken.append(failed)
    other_mode = [guard for guard in broken if ".training is " in guard.code]
    return next((guard for guard in broken if guard not in other_mode), broken[0]).why(module)
