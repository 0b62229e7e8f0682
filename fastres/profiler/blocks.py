"""The blocks of a model, and the ops in them, found in the pieces of one forward."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from fastres.profiler.walk import Piece, is_layer

REST = "rest of the block"


@dataclass
class Op:
    """What is measured as one: a site, a layer, or what a block does beside its sites and layers.

    Attributes:
        name: of its modules, as seen from the block; and the number of the call from the second one on.
        ran: the site's fused op, or the layer's class.
        fused: whether it ran fused.
        reason: why not; "" for a layer that is no site.
        pieces: indices.
    """

    name: str
    ran: str
    fused: bool
    reason: str
    pieces: list[int] = field(default_factory=list)


@dataclass
class Block:
    """A residual block, or what comes before the first or after the last of them.

    Attributes:
        name: the module's qualified name, or "stem", "head", "model".
        kind: the module's class, "" where it is none.
    """

    name: str
    kind: str
    ops: list[Op] = field(default_factory=list)


def find_blocks(model: nn.Module, pieces: list[Piece]) -> list[Block]:
    """The blocks in the order of the forward, which hold every piece but those around blocks.

    A residual block is a module in whose forward a sum with a residual runs as a site; in a model without
    such sums, one in whose forward two or more sites run.
    """
    names = {module: name for name, module in model.named_modules()}
    owners = _owners(pieces)
    has_children = {piece.parent for piece in pieces}
    around = {parent for owner in owners for parent in _parents(pieces, owner)}
    blocks: dict[int | str, Block] = {}
    for index, piece in enumerate(pieces):
        owner = next((i for i in (index, *_parents(pieces, index)) if i in owners), None)
        if owner is None and (index in around or piece.modules[0] is model):
            continue
        if owner is not None:
            module = pieces[owner].modules[0]
            key, name, kind = owner, names[module], type(module).__name__
        else:
            key = name = "model" if not owners else "stem" if index < min(owners) else "head"
            if owners and min(owners) < index < max(owners):
                module = piece.modules[0]
                key = name = names[module]
            kind = ""
        block = blocks.setdefault(key, Block(name, kind))
        _add(block, index, piece, is_layer(piece, index in has_children), names)
    return list(blocks.values())


def _owners(pieces: list[Piece]) -> set[int]:
    sites = [piece for piece in pieces if piece.record is not None and piece.parent >= 0]
    owners = {piece.parent for piece in sites if "add" in piece.record.ran}
    if not owners:
        parents = [piece.parent for piece in sites]
        owners = {parent for parent in parents if parents.count(parent) > 1 and pieces[parent].parent >= 0}
    # Of a block within a block the outer one.
    return {owner for owner in owners if owners.isdisjoint(_parents(pieces, owner))}


def _parents(pieces: list[Piece], index: int):
    while (index := pieces[index].parent) >= 0:
        yield index


def _add(block: Block, index: int, piece: Piece, layer: bool, names: dict[nn.Module, str]) -> None:
    if not layer:
        rest = next((op for op in block.ops if op.name == REST), None)
        if rest is None:
            block.ops.append(rest := Op(REST, "", False, ""))
        rest.pieces.append(index)
        return
    prefix = f"{block.name}."
    name = " ".join(names[module].removeprefix(prefix) for module in piece.modules) or "add"
    calls = sum(op.name.partition(" #")[0] == name for op in block.ops)
    name = f"{name} #{calls + 1}" if calls else name  # a block may call a module again
    record = piece.record
    if record is None:
        op = Op(name, type(piece.modules[0]).__name__, False, "")
    else:
        op = Op(name, record.ran, record.fused, _in_words(record.reason, names))
    op.pieces.append(index)
    block.ops.append(op)


def _in_words(reason, names: dict[nn.Module, str]) -> str:
    if reason is None:
        return ""
    module, text = reason
    return f"{text} on {names[module]}" if module in names else text
