"""Vetting the Python code that a traced forward enters: is what it does decided by its arguments alone?

A trace freezes whatever is no stand-in for a tensor. So before a function's first instruction runs, its
bytecode is read. It may use its arguments, functions of torch that hand themselves to a stand-in, and a
few builtins. What keeps state elsewhere is refused: random numbers, globals, attributes that it sets,
context managers.
"""

from __future__ import annotations

import builtins
import dis
import functools
import sys
import sysconfig
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import get_overridable_functions


class Untraceable(Exception):
    """A module's forward could not be traced; the message is the reason, in words for the user."""


_BUILTINS = {
    getattr(builtins, name)
    for name in (
        "abs all any bool dict enumerate float getattr int len list max min range reversed round set slice "
        "sorted str sum super tuple zip"
    ).split()
}
# The last one is refused when it is called (fastres.watch), and harmless in a branch that is not taken.
_TORCH_FUNCTIONS = {
    torch.relu_,
    torch._assert,
    F.sigmoid,
    F.tanh,
    torch.jit.is_scripting,
    torch.utils.checkpoint.checkpoint,
}
_REFUSED_OPCODES = {
    "STORE_ATTR": "sets an attribute ({})",
    "DELETE_ATTR": "deletes an attribute ({})",
    "STORE_GLOBAL": "sets the global {}",
    "DELETE_GLOBAL": "deletes the global {}",
    "IMPORT_NAME": "imports {}",
    "PUSH_EXC_INFO": "has a with or try statement",  # CPython 3.11 and later
    "SETUP_FINALLY": "has a try statement",
    "SETUP_WITH": "has a with statement",
    "MATCH_SEQUENCE": "has a match statement",  # to which a stand-in is no sequence, mapping or class
    "MATCH_MAPPING": "has a match statement",
    "MATCH_CLASS": "has a match statement",
}
_SITES = f"{__package__}.sites"  # whose functions call the modules themselves when they are given stand-ins
_TRACING = {f"{__package__}.{name}" for name in ("vet", "watch", "trace", "aliasing", "patterns", "fuse")}
_TRACING |= {_SITES, f"{__package__}.recording"}  # which the sites tell


def from_torch(module_name: str) -> bool:
    return module_name == "torch" or module_name.startswith("torch.")


def is_machinery(module_name: str) -> bool:
    """Whether it is code that traces, and not code that is traced."""
    return module_name in _TRACING or from_torch(module_name) or _is_stdlib(module_name.partition(".")[0])


@functools.cache
def _is_stdlib(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None)  # a user's file may have the same name
    return package in sys.stdlib_module_names and (
        file is None or file.startswith(sysconfig.get_path("stdlib"))
    )


@functools.cache
def differentiable() -> frozenset[Any]:
    """The functions of torch that hand themselves to a stand-in when they are given one."""
    overridable = get_overridable_functions().values()
    return frozenset(function for functions in overridable for function in functions) | _TORCH_FUNCTIONS


def torch_state() -> tuple[Any, ...]:
    """What changes the meaning of an operation without being an argument of it."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.are_deterministic_algorithms_enabled(),
    )


def vet_frame(frame: FrameType) -> None:
    """Look at a function that has just been entered.

    Raises:
        Untraceable: where its bytecode uses what a trace does not see.
    """
    code = frame.f_code
    shown = (
        code.co_name
        if code.co_name in ("forward", "<genexpr>", "<lambda>")
        else f"{code.co_name}(), in forward,"
    )
    instructions = list(dis.get_instructions(code))
    results = _results(instructions)
    for at, instruction in enumerate(instructions):
        opcode, name = instruction.opname, instruction.argval
        if opcode in _REFUSED_OPCODES:
            raise Untraceable(f"{shown} {_REFUSED_OPCODES[opcode].format(name)}")
        if opcode == "IS_OP" and not _is_constant(instructions[at - 1]):
            raise Untraceable(f"{shown} asks whether two values are the same object")
        # A child may return None, but its stand-in never is.
        if _asks_for_none(instructions, at) and _is_result(instructions, at, results):
            raise Untraceable(f"{shown} asks whether the result of a call is None")
        if opcode in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = frame.f_globals.get(name, frame.f_builtins.get(name))
        elif (
            opcode in ("LOAD_DEREF", "LOAD_CLASSDEREF") and name in code.co_freevars and name != "__class__"
        ):
            if _is_defined_in(code, frame.f_back):
                continue
            value = frame.f_locals.get(name)
        else:
            continue
        for following in instructions[at + 1 :]:
            if not isinstance(value, ModuleType) or following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            name = f"{name}.{following.argval}"
            value = getattr(value, following.argval, None)
        vet_global(value, name, shown)


def _is_constant(instruction: dis.Instruction) -> bool:
    value = instruction.argval
    return instruction.opname == "LOAD_CONST" and (value is None or value is True or value is False)


def _asks_for_none(instructions: list[dis.Instruction], at: int) -> bool:
    """Whether a value is compared with None, which a jump may do by itself."""
    opcode = instructions[at].opname
    if opcode == "LOAD_CONST" and instructions[at].argval is None:
        return instructions[at + 1].opname == "IS_OP"
    return "JUMP" in opcode and opcode.endswith("_NONE")


def _results(instructions: list[dis.Instruction]) -> set[str]:
    """The variables that hold what a call returned."""
    found: set[str] = set()
    while True:
        stores = [i for i, store in enumerate(instructions) if store.opname.startswith("STORE_FAST")]
        more = {_variables(instructions[i])[0] for i in stores if _is_result(instructions, i, found)}
        if more <= found:
            return found
        found |= more


def _is_result(instructions: list[dis.Instruction], at: int, results: set[str]) -> bool:
    """Whether what this instruction stores or compares was returned by a call."""
    before = instructions[at - 1]
    if "LOAD_FAST" in before.opname:
        return _variables(before)[-1] in results
    if before.opname.startswith(("STORE_FAST", "UNPACK_SEQUENCE", "COPY", "DUP_TOP")):  # several variables
        return _is_result(instructions, at - 1, results)
    return before.opname.startswith("CALL")


def _variables(instruction: dis.Instruction) -> tuple[str, ...]:
    return instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)


def vet_global(value: Any, name: str, user: str = "forward") -> None:
    """Look at what a function reaches from outside; a Python function is looked at when it is entered.

    Raises:
        Untraceable: where the value may change, or is called for more than its result.
    """
    home = getattr(value, "__module__", None) or ""
    if isinstance(value, FunctionType) and (home == _SITES or not is_machinery(home)):
        return
    if isinstance(value, type) and issubclass(value, BaseException):
        return
    if isinstance(value, type) and issubclass(value, (nn.Module, Tensor)) and from_torch(home):
        return
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return
    if callable(value) and (home == "math" or value in _BUILTINS or value in differentiable()):
        return
    raise Untraceable(f"{user} uses {name}, on which its result may depend")


def _is_defined_in(code: CodeType, frame: FrameType | None) -> bool:
    """Whether the function was defined inside one that is running, and has been looked at."""
    while frame is not None:
        if code in frame.f_code.co_consts:
            return True
        frame = frame.f_back
    return False
