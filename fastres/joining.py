"""The gradients of a residual block's input, added up where the second of them is stored.

That input goes into the block's first convolution and into its shortcut: into the sum at the block's end,
or into the projection's convolution. Autograd adds the two gradients in a pass of its own, which reads both
and writes one. Here whichever is computed first waits for the other, whose convolution adds to it.
"""

import torch
from torch import Tensor

_LONGEST_BRANCH = 8  # layers


class Meeting:
    """Of the nodes of one backward pass whose gradients of the same tensor are to be added up.

    A node has one for each pass, which threads may run at the same time.
    """

    def __init__(self, nodes: int) -> None:
        self.expected, self.sum = nodes, None


def nodes_that_meet(node_type: type, input: Tensor, residual: Tensor) -> tuple:
    """The nodes between a block's input and its last layer that give a gradient to the block's input.

    Wherever that gradient is wanted all of them run, after the last layer's node.

    Args:
        node_type: of layers whose first input is what flows through the branch.
        input, residual: of the block's last layer.

    Returns:
        The branch's first node; and the projection's, where the shortcut has one; or nothing.
    """
    shortcut, source = residual.grad_fn, (residual.grad_fn, residual.output_nr)
    if shortcut is None:
        return ()
    first = _first_of_branch(node_type, input, source)
    if first is not None:
        return (first,)
    if type(shortcut) is node_type:
        first = _first_of_branch(node_type, input, shortcut.next_functions[0])
    if first is None or first is shortcut:  # whose output is added to the last layer of itself
        return ()
    return first, shortcut


def _first_of_branch(node_type: type, output: Tensor, source: tuple):
    """The node whose input is `source`'s output, on a way to `output` of nothing but nodes of the type."""
    node = output.grad_fn
    for _ in range(_LONGEST_BRANCH):
        if type(node) is not node_type or source[0] is None:
            return None
        if node.next_functions[0] == source:
            return node
        node = node.next_functions[0][0]
    return None


def arrange(nodes: tuple, grad_residual: Tensor | None) -> Tensor | None:
    """Have the nodes meet later in this pass.

    Args:
        nodes: as nodes_that_meet found them.
        grad_residual: of the sum at the block's end.

    Returns:
        What is left of it for autograd: nothing, where a single node waits for it.
    """
    met_already = any(_meeting_of(node) is not None for node in nodes)
    if not nodes or grad_residual is None or met_already:
        return grad_residual
    meeting = Meeting(len(nodes))
    for node in nodes:
        node.meetings[torch._C._current_graph_task_id()] = meeting
    if len(nodes) > 1:
        return grad_residual
    meeting.sum = grad_residual
    return None


def _meeting_of(node) -> Meeting | None:
    """Where the node is expected in this pass."""
    return node.meetings.get(torch._C._current_graph_task_id())


def waiting_for(node) -> Tensor | None:
    """The gradient of the node's input that another left, to which it adds its own."""
    meeting = _meeting_of(node)
    return None if meeting is None else meeting.sum


def leave(node, grad_input: Tensor | None) -> Tensor | None:
    """What the node gives to autograd of the gradient of its input, which has the meeting's sum in it."""
    meeting = node.meetings.pop(torch._C._current_graph_task_id(), None)
    if meeting is None:
        return grad_input
    meeting.expected -= 1
    meeting.sum, grad_input = (grad_input, None) if meeting.expected else (None, grad_input)
    return grad_input
