"""profile(): a model's step, fused and stock, block by block."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from fastres import sites
from fastres.errors import SettingsError, told_as
from fastres.fuse import fuse
from fastres.inference import optimize_for_inference
from fastres.profiler import limits
from fastres.profiler.advice import advice
from fastres.profiler.blocks import Block, Op, find_blocks
from fastres.profiler.count import Count
from fastres.profiler.result import VERSION, Profile
from fastres.profiler.trace import NoRoomError, Trace, trace
from fastres.profiler.walk import Part, Piece, Switch, SwitchAt, Walk
from fastres.saved import Saved
from fastres.timing import Machine, clock_of, cudnn_benchmark

VARIANTS = ("stock", "compile")
_WARM_UP = 2  # calls: the first makes the optimizer's state, the second runs in the memory so gained


class ProfileError(SettingsError):
    """The measurement that was asked for cannot be made; the message says why."""


def profile(
    model: nn.Module,
    input: Any,
    *,
    target: Tensor | None = None,
    mode: str = "train",
    dtype: str | torch.dtype = "fp32",
    against: tuple[str, ...] = ("stock",),
    repeat: int = 5,
    name: str | None = None,
    trace_path: str | Path | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Profile:
    """Measure a step of a model block by block, fused beside stock, and against the machine's limits.

    A copy of the model is measured. Both variants are that copy, with the same parameters, and take turns;
    each round runs each of them once in one go and once piece by piece.

    Args:
        model: any that `fastres.fuse` takes, fused or not, where its input is.
        input: what it takes: a tensor, a tuple of arguments, or a dict of keyword arguments; it should be
            channels_last, as in training.
        target: (N,) class indices for the cross entropy; by default drawn at random.
        mode: "train": forward, cross entropy, backward, SGD with momentum. "infer": forward, by
            `fastres.optimize_for_inference` where the input is channels_last.
        dtype: "fp32" or "bf16" (autocast), or the torch.dtype.
        against: "stock" and, for the whole step only, "compile": torch.compile of the stock model.
        repeat: rounds.
        name: of the model in the report; by default its class's.
        trace_path: where to write a trace of one fused and one stock step for Perfetto or chrome://tracing.
        advance: called after each of `steps(against, repeat)` steps, for a progress bar.

    Returns:
        The profile; its `show()` prints a table, `to_json` writes a file.

    Raises:
        ProfileError: the model cannot run so, or what was asked for makes no sense.
        OSError: the trace cannot be written.
    """
    with _errors():
        subject = _Subject(model, input, target, mode, dtype)
    unknown = set(against) - set(VARIANTS)
    if unknown or "stock" not in against:
        raise ProfileError(f"against={against!r}: expected 'stock', and 'compile' if wanted")
    if repeat < 1:
        raise ProfileError(f"repeat={repeat}: expected 1 or more")
    bound = limits.measured(subject.device)
    advance()
    with _errors(NoRoomError), cudnn_benchmark():
        name = name or type(model).__name__
        result, traces = _profile(subject, name, tuple(against), repeat, bound, advance)
    if trace_path is not None:
        _write_trace(traces, trace_path)
    return result


def _errors(*others: type[Exception]) -> AbstractContextManager[None]:
    """Tell what the model says to its input as a ProfileError."""
    return told_as(ProfileError, "the model cannot run these settings", *others)


def steps(against: tuple[str, ...], repeat: int) -> int:
    """How often `advance` is called."""
    variants = 1 + len(against)
    return variants * (_WARM_UP + repeat) + 2 * repeat + 6


def _profile(subject, name, against, repeat, bound, advance) -> tuple[Profile, dict[str, Trace]]:
    wholes = {"fused": subject.step, "stock": subject.stock_step}
    if "compile" in against:
        wholes["compile"] = subject.compiled_step()
    for whole in wholes.values():
        for _ in range(_WARM_UP):
            whole()
            advance()
    blocks = subject.look()
    advance()
    count = Count()
    with count:
        subject.stock_step(subject.walk(count.switch))
    advance()
    saved = {}
    if subject.training:
        saved = {variant: subject.saved_bytes(wholes[variant]) for variant in ("fused", "stock")}
    advance()
    clock, label = clock_of(subject.device), _labels(blocks)
    whole_marks: dict[str, list] = defaultdict(list)
    part_marks: dict[str, list] = defaultdict(list)
    for _ in range(repeat):
        for variant, whole in wholes.items():
            begin = clock.begin()
            whole()
            whole_marks[variant].append((begin, clock.end()))
            advance()
        for variant in ("fused", "stock"):
            part_marks[variant].append(_marks(subject, wholes[variant], clock, label))
            advance()
    machine = Machine.at_hand(subject.device)
    traces = {}
    for variant in ("fused", "stock"):
        step = wholes[variant]
        traces[variant] = trace(lambda *to, step=step: step(subject.walk(*to)), subject.device, label)
        advance()
    data = {
        "fastres_profile": VERSION,
        "settings": {**subject.settings(name), "repeat": repeat, "against": list(against)},
        "machine": machine.as_dict(),
        "limits": bound.as_dict(),
        "whole_step": {
            variant: [clock.between(*mark) for mark in marks] for variant, marks in whole_marks.items()
        },
        **_parts(blocks, part_marks, clock),
        "memory": {variant: trace.memory for variant, trace in traces.items()},
        "memory_marks": {
            v: [[t.backward, "backward"]] for v, t in traces.items() if t.backward is not None
        },
    }
    directions = ["forward", *(["backward"] if subject.training else [])]
    bytes = count.bytes()
    for block, written in zip(blocks, data["blocks"], strict=True):
        for op, entry in zip(block.ops, written["ops"], strict=True):
            _add_counts(entry, op, directions, count, bytes, bound, subject.dtype)
            if saved:
                entry["saved_bytes"] = {v: sum(s.bytes[p] for p in op.pieces) for v, s in saved.items()}
            place = f"{block.name}: {op.name}"
            entry["called"] = {
                v: {d: t.ops.get((place, d), []) for d in directions} for v, t in traces.items()
            }
    data["advice"] = advice(Profile({**data, "advice": []}))
    return Profile(data), traces


def _add_counts(entry, op: Op, directions, count: Count, bytes, bound: limits.Limits, dtype: str) -> None:
    places = {d: [(piece, d) for piece in op.pieces] for d in directions}
    entry["flops"] = {d: sum(count.flops[p] for p in places[d]) for d in directions}
    entry["bytes"] = {d: sum(bytes.get(p, 0) for p in places[d]) for d in directions}
    entry["stock_traffic"] = {d: sum(count.traffic[p] for p in places[d]) for d in directions}
    entry["bound"] = {d: bound.bound(entry["flops"][d], entry["bytes"][d], dtype) for d in directions}


# ---------------------------------------------------------------------------------------------------------
# the step


class _Subject:
    """The copy of the model, and what it is to do."""

    def __init__(self, model, input, target, mode, dtype) -> None:
        if not isinstance(model, nn.Module):
            raise ProfileError(f"model has type {type(model).__name__}, expected torch.nn.Module")
        if mode not in ("train", "infer"):
            raise ProfileError(f"mode={mode!r}: expected 'train' or 'infer'")
        names = {**{name: name for name in limits.DTYPES}, **{d: name for name, d in limits.DTYPES.items()}}
        if dtype not in names:
            raise ProfileError(f"dtype={dtype!r}: expected 'fp32' or 'bf16'")
        tensors = [leaf for leaf in tree_leaves(input) if isinstance(leaf, Tensor)]
        if not tensors:
            raise ProfileError("input holds no tensor")
        self.dtype, self.training = names[dtype], mode == "train"
        self.device, self.shape = tensors[0].device, tuple(tensors[0].shape)
        self.channels_last = tensors[0].dim() == 4 and tensors[0].is_contiguous(
            memory_format=torch.channels_last
        )
        input = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, input)
        self.arguments = input if isinstance(input, tuple) else () if isinstance(input, dict) else (input,)
        self.keywords = input if isinstance(input, dict) else {}
        self.target = target
        model = copy.deepcopy(getattr(model, "_orig_mod", model))
        if self.training or not self.channels_last:
            self.model = fuse(model, inplace=True).train(self.training)
        else:
            self.model = optimize_for_inference(model, inplace=True)
        # So small that a batch seen many times is not learned by heart: its gradients would become denormal
        # numbers, which are slow.
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.training and not parameters:
            raise ProfileError("no parameter of the model requires a gradient; profile it in mode 'infer'")
        self.optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9) if self.training else None
        self.forward: Callable[..., Any] = self.model
        self.pieces: list[Piece] = []
        self.one_by_one = False  # whether sequences are measured so, as they cannot be told apart otherwise

    def settings(self, name: str) -> dict:
        return {
            "model": name,
            "input": list(self.shape),
            "dtype": self.dtype,
            "device": self.device.type,
            "mode": "train" if self.training else "infer",
            "layout": "channels_last" if self.channels_last else "contiguous",
            "threads": torch.get_num_threads(),
        }

    def step(self, walk: Walk | None = None) -> None:
        """One step; with a walk, watched."""
        enter = (lambda part, phase="forward": None) if walk is None else walk.enter
        with ExitStack() as stack:
            if not self.training:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, self.dtype == "bf16"))
            enter("profiler")
            with nullcontext() if walk is None else walk.forward():
                enter("between blocks")
                output = self.forward(*self.arguments, **self.keywords)
                enter("profiler")
            if self.training:
                enter("loss")
                loss = self._loss(output)
        del output
        if self.training:
            if walk is not None:
                enter("profiler")
                walk.watch_backward(loss.grad_fn)
            enter("between blocks", "backward")
            loss.backward()
            del loss
            enter("optimizer")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        enter("end")

    def stock_step(self, walk: Walk | None = None) -> None:
        with sites.stock():
            self.step(walk)

    def compiled_step(self) -> Callable[[], None]:
        """The stock step, compiled."""
        other = copy.copy(self)
        other.forward = torch.compile(self.model)
        return other.stock_step

    def _loss(self, output: Any) -> Tensor:
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            logits = next((leaf for leaf in tree_leaves(logits) if isinstance(leaf, Tensor)), None)
            if logits is None:
                raise ProfileError("the model gives no tensor, of which a loss could be made")
        if logits.dim() != 2:
            return logits.float().square().mean()
        if self.target is None:
            generator = torch.Generator().manual_seed(0)
            classes = torch.randint(logits.size(1), (logits.size(0),), generator=generator)
            self.target = classes.to(logits.device)
        return F.cross_entropy(logits, self.target)

    def look(self) -> list[Block]:
        """The blocks of a fused step, which walks are from now on to go through."""
        first = Walk(self.model, lambda part, direction: None)
        self.step(first)
        self.pieces = first.pieces
        if not self.training:
            in_sequences = self.walk(*[lambda *switched: None] * 2)
            self.step(in_sequences)
            # Seen as a whole the model may have other sites than its parts have by themselves.
            self.one_by_one = not in_sequences.is_as_known()
        return find_blocks(self.model, self.pieces)

    def walk(self, switch: Switch, switch_at: SwitchAt | None = None) -> Walk:
        return Walk(self.model, switch, self.pieces, None if self.one_by_one else switch_at)

    def saved_bytes(self, step: Callable[[Walk], object]) -> Saved:
        own = [*self.model.parameters(), *self.model.buffers()]
        inputs = [t for t in tree_leaves((self.arguments, self.keywords)) if isinstance(t, Tensor)]
        saved = Saved([*own, *inputs])
        with saved.hooks():
            step(self.walk(saved.switch))
        return saved


# ---------------------------------------------------------------------------------------------------------
# times


def _marks(subject: _Subject, step, clock, label) -> list[tuple[tuple[Part, str], Any]]:
    """When which part began to work, in one step."""
    marks = []
    ranges = subject.device.type == "cuda"
    current = None  # range of nsys; of the process, as autograd's threads begin and end them too

    def switch(part: Part, direction: str) -> None:
        nonlocal current
        marks.append(((part, direction), clock.end()))
        if ranges:
            if current is not None:
                torch.cuda.nvtx.range_end(current)
            current = torch.cuda.nvtx.range_start(f"{label(part)}, {direction}")

    def switch_at(part: Part, direction: str, at: float) -> None:
        marks.append(((part, direction), at))

    walk = subject.walk(switch, switch_at)
    clock.begin()
    step(walk)
    if current is not None:
        torch.cuda.nvtx.range_end(current)
    if not walk.is_as_known():
        raise ProfileError("the model's forward calls other modules from one step to the next")
    return marks


def _parts(blocks: list[Block], part_marks: dict[str, list], clock) -> dict[str, Any]:
    """profiled_step, blocks and rest of the JSON."""
    rounds = {
        variant: [_seconds(marks, clock) for marks in all_marks]
        for variant, all_marks in part_marks.items()
    }
    directions = dict.fromkeys(d for times in rounds.values() for t in times for _, d in t)

    def of(op: Op, variant: str, direction: str) -> list[float]:
        return [sum(times.get((p, direction), 0.0) for p in op.pieces) for times in rounds[variant]]

    known = {piece for block in blocks for op in block.ops for piece in op.pieces}
    rest: dict[str, dict[str, list[float]]] = {}
    for variant, by_round in rounds.items():
        for index, times in enumerate(by_round):
            for (part, _), seconds in times.items():
                if part not in known:
                    name = part if isinstance(part, str) else "between blocks"
                    row = rest.setdefault(name, {v: [0.0] * len(by_round) for v in rounds})
                    row[variant][index] += seconds
    # Making ready to watch is no part of the step.
    rest.pop("profiler", None)
    profiled = {
        variant: [sum(s for (p, _), s in t.items() if p != "profiler") for t in by_round]
        for variant, by_round in rounds.items()
    }
    written = [
        {
            "name": block.name,
            "kind": block.kind,
            "ops": [
                {
                    "name": op.name,
                    "ran": op.ran,
                    "fused": op.fused,
                    "reason": op.reason,
                    "seconds": {v: {d: of(op, v, d) for d in directions} for v in rounds},
                }
                for op in block.ops
            ],
        }
        for block in blocks
    ]
    return {"profiled_step": profiled, "blocks": written, "rest": rest}


def _seconds(marks, clock) -> dict[tuple[Part, str], float]:
    times: dict[tuple[Part, str], float] = defaultdict(float)
    for (place, begin), (_, end) in zip(marks[:-1], marks[1:], strict=True):
        times[place] += clock.between(begin, end)
    return times


def _labels(blocks: list[Block]) -> Callable[[Part], str]:
    names = {
        piece: f"{block.name}: {op.name}" for block in blocks for op in block.ops for piece in op.pieces
    }
    return lambda part: names.get(part, part if isinstance(part, str) else "between blocks")


def _write_trace(traces: dict[str, Trace], path: str | Path) -> None:
    import json

    from fastres.files import replaced

    events = []
    for process, (variant, one) in enumerate(traces.items()):
        first = min((e["ts"] for e in one.events if "ts" in e), default=0)
        for event in one.events:
            event = {**event, "pid": f"{variant}, {event['pid']}"} if "pid" in event else dict(event)
            if "ts" in event:
                event["ts"] -= first
            if event.get("ph") in ("s", "f", "t"):  # flows are told apart by their number alone
                event["id"] = f"{process}.{event['id']}"
            events.append(event)
    with replaced(Path(path)) as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)
