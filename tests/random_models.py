"""Models whose forward is drawn at random: layers and residual blocks written in many ways, and what breaks
their patterns, such as values used twice, written in place, hidden in lists, and layers called again.
"""

import linecache
import random
import sys
import types

import torch
from torch import nn

CHANNELS = 32
_IMPORTS = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"


def random_model(seed: int) -> nn.Module:
    """A module that maps (N, CHANNELS, H, W) to the same; `source` is what it was made of."""
    writer = _Writer(random.Random(seed))
    source = _IMPORTS + writer.module()
    name = f"random_model_{seed}"
    # As of a file: fuse() and tracebacks read the source.
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
    torch.manual_seed(seed)
    model = module.M0()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
    model.source = source
    return model


class _Writer:
    """Writes modules; `values` are names of what the forward has made so far, the latest last."""

    def __init__(self, draw: random.Random, number: int = 0, depth: int = 0) -> None:
        self.draw, self.number, self.depth = draw, number, depth
        self.classes: list[str] = []
        self.attributes: list[str] = []
        self.body: list[str] = []
        self.values = ["x"]
        self.made: dict[str, list[str]] = {"conv": [], "bn": [], "relu": []}
        self.names = 0

    def module(self) -> str:
        draw = self.draw
        for _ in range(draw.choice([1, 2, 3] if self.depth == 0 else [1, 2])):
            write = draw.choices([self.block, self.layer, self.part, self.break_pattern], [5, 2, 1, 3])[0]
            write()
        lines = [
            *self.classes,
            f"class M{self.number}(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in self.attributes),
            "    def forward(self, x):",
            *(f"        {line}" for line in self.body),
            f"        return {self.values[-1]}",
        ]
        return "\n".join(lines) + "\n"

    # -----------------------------------------------------------------------------------------------------
    # values and layers

    def likely(self, share: float) -> bool:
        return self.draw.random() < share

    def value(self) -> str:
        return self.draw.choice(self.values[-3:] if self.likely(0.75) else self.values)

    def assign(self, expression: str, name: str | None = None) -> str:
        if name is None:
            self.names += 1
            name = f"v{self.names}"
        self.body.append(f"{name} = {expression}")
        self.values = [value for value in self.values if value != name] + [name]
        return name

    def attribute(self, expression: str) -> str:
        name = f"a{len(self.attributes)}"
        self.attributes.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def again_or(self, kind: str, share: float, expression: str) -> str:
        """A layer that is there already, or a new one."""
        made = self.made[kind]
        if not made or not self.likely(share):
            made.append(self.attribute(expression))
            return made[-1]
        return self.draw.choice(made)

    def conv(self) -> str:
        kernel, groups = self.draw.choice([1, 3, 3]), self.draw.choice([1, 1, 1, 4])
        options = f"padding={kernel // 2}, groups={groups}, bias={self.likely(0.3)}"
        return self.again_or("conv", 0.08, f"nn.Conv2d({CHANNELS}, {CHANNELS}, {kernel}, {options})")

    def bn(self) -> str:
        option = self.draw.choice(["affine=False", "track_running_stats=False", "momentum=None"] + [""] * 9)
        return self.again_or("bn", 0.06, f"nn.BatchNorm2d({CHANNELS}, {option})")

    def relu_of(self, value: str) -> str:
        module = self.again_or("relu", 0.6, f"nn.ReLU(inplace={self.likely(0.5)})")
        ways = ["F.relu({})", "torch.relu({})", "({}).relu()", "F.relu({}, inplace=True)", "({}).relu_()"]
        return self.draw.choice([*ways, *[module + "({})"] * 4]).format(value)

    def conv_bn(self, value: str) -> str:
        return f"{self.bn()}({self.conv()}({value}))"

    def container(self, last: str) -> str:
        layers = [
            f"nn.Conv2d({CHANNELS}, {CHANNELS}, 1, bias={self.likely(0.3)})",
            f"nn.BatchNorm2d({CHANNELS})",
        ]
        return self.attribute(f"nn.Sequential({', '.join([*layers, last])})")

    # -----------------------------------------------------------------------------------------------------
    # statements

    def layer(self) -> None:
        value = self.value()
        inplace = self.likely(0.5)
        ways = [
            lambda: self.conv_bn(value),
            lambda: self.relu_of(self.conv_bn(value)),
            lambda: f"{self.container(f'nn.ReLU({inplace})')}({value})",
        ]
        self.assign(self.draw.choice(ways)())

    def block(self) -> None:
        value = shortcut = self.value()
        if self.likely(0.35):
            projections = [
                lambda: f"{self.container('nn.Identity()')}({value})",
                lambda: self.conv_bn(value),
                lambda: f"{self.bn()}({value})",
            ]
            shortcut = self.assign(self.draw.choice(projections)())
        for _ in range(self.draw.choice([0, 1, 1, 2])):
            value = self.assign(self.relu_of(self.conv_bn(value)))
        value = self.assign(self.conv_bn(value))
        in_place = f"{value}.add_({shortcut})"
        sums = [
            f"{value} + {shortcut}",
            f"{shortcut} + {value}",
            f"torch.add({value}, {shortcut})",
            in_place,
        ]
        total = self.assign(self.draw.choice(sums), self.draw.choice([None, value]))
        if self.likely(0.85):
            self.assign(self.relu_of(total), self.draw.choice([None, total, "x"]))

    def part(self) -> None:
        if self.depth == 2:
            return self.layer()
        writer = _Writer(self.draw, 10 * self.number + len(self.classes) + 1, self.depth + 1)
        self.classes.append(writer.module())
        made = f"M{writer.number}()"
        part = self.attribute(self.draw.choice([made, f"nn.Sequential({made}, {made})"]))
        self.assign(f"{part}({self.value()})")

    def break_pattern(self) -> None:
        value, other = self.value(), self.value()
        ways = [
            lambda: self.assign(f"{value}.detach()"),
            lambda: self.assign(f"{value}.contiguous()"),
            lambda: self.assign(f"{value}.clone()"),
            lambda: self.assign(f"F.max_pool2d({value}, 3, 1, 1)"),
            lambda: self.assign(f"{value} * torch.sigmoid({value}.mean((2, 3), keepdim=True))"),
            lambda: self.assign(f"torch.cat([{value}[:, :8], {other}[:, 8:]], 1)"),
            lambda: self.assign(f"sum([{value}, {self.conv_bn(value)}])"),
            lambda: self.assign(f"{self.bn()}({value}) + {value}"),
            lambda: self.body.append(f"{value} += {other}"),
            lambda: self.body.append(f"{value}[:, 0] = 0.5"),
            lambda: self.body.append(f"if self.training: {value} = {self.relu_of(value)}"),
            lambda: self.body.append(
                f"if {value}.requires_grad: {value}.register_hook(lambda grad: 2 * grad)"
            ),
            lambda: self.body.append(
                f"with torch.no_grad(): {value} = {self.relu_of(self.conv_bn(value))}"
            ),
            lambda: self.body.append(f"for _ in range(2): {value} = {self.conv_bn(value)}"),
        ]
        self.draw.choice(ways)()
