"""What a compiled program costs: operations, bytes and communication, and the time that these take
at least (Williams et al. 2009, "Roofline").

XLA counts the body of a loop once, however often it runs; nothing of what it cannot look into (the
kernels of `flash_attention`); and what stays in a TPU's fast memory as if it went to the large one.
So operations are counted by XLA, each loop's body as a program of its own and as often as it runs,
and bytes here: what each instruction reads from the device's memory and writes there.
"""

import functools
import importlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*?^\}", re.M | re.S)
NAME = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ", re.M)
ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+)\w*\[([\d,]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(
    r"(?:to_apply|calls|branch_computations|true_computation|false_computation)="
    r"(%?[\w.-]+|\{[^}]*\})"
)
COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"

MOVES_NOTHING = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "AllocateBuffer",
    "ConcatBitcast",
)  # fmt: skip
"""Instructions that only name what is there already, or run others. What ends an asynchronous
one ("copy-done") moves nothing either."""

SLICES = "dynamic-slice", "slice", "gather"

KERNEL = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
OWN_KERNEL = re.compile(r"dropout_(forward|dq|dkv)_(\d+)x(\d+)")
"""Of `dropout_attention`: the blocks of a head, and their size."""
PRODUCTS = {"fwd": 2, "forward": 2, "dq": 3, "dkv": 4}
"""Matrix products of each block in a kernel of attention."""


class Cost(NamedTuple):
    """Of one device."""

    flops: float
    bytes: float
    """Read from and written to memory."""


class Instruction(NamedTuple):
    name: str
    kind: str
    """Its opcode: "fusion", "copy", ..."""
    results: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def source(self) -> str:
        """Where in our program it comes from, as JAX says; or ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def shortly(self) -> str:
        """For people: its largest result, and the end of its source."""
        kind, sides, _ = max(_arrays(self.results), key=lambda x: _size(x, everywhere=True))
        words = "/".join(self.source.split("/")[-3:])
        return f"{self.kind} {kind}[{','.join(map(str, sides))}] {words}".rstrip()


class Program:
    """An optimised program of XLA, as text."""

    def __init__(self, text: str):
        self._header = re.match(r"HloModule [\w.-]+", text)[0]  # type: ignore[index]
        counts = re.findall(r"(?:replica_count|num_partitions)=(\d+)", text.split("\n", 1)[0])
        self._devices = math.prod(map(int, counts))
        # What describes a kernel holds line ends, which XLA's own parser does not read.
        body = re.sub(r"frontend_attributes=\{kernel_metadata=\{.*?\n\}\}, ", "", text, flags=re.S)
        body = body[body.index("\n") :]
        self._computations: dict[str, str] = {}
        self._instructions: dict[str, dict[str, Instruction]] = {}
        for found in COMPUTATION.finditer(body):
            plain = re.sub(r", metadata=\{[^}]*\}", "", found[0])
            self._computations[found[2]] = plain.removeprefix("ENTRY ")
            self._instructions[found[2]] = {x.name: x for x in _instructions(found[0])}
            if found[1]:
                self._entry = found[2]

    def cost(self) -> Cost:
        kernels = sum(
            self._kernel(name, instruction)[0] * times
            for name, instruction, times in self._executed(self._entry)
        )
        return Cost(self._flops(self._entry) + kernels, sum(size for size, _ in self.traffic()))

    @functools.cache  # noqa: B019 (programs are few)
    def traffic(self) -> list[tuple[float, Instruction]]:
        """(bytes, as often as it runs; instruction), largest first."""
        found = [
            (times * self._bytes(name, instruction), instruction)
            for name, instruction, times in self._executed(self._entry)
        ]
        return sorted(found, key=lambda pair: -pair[0])

    def sent(self) -> Counter[str]:
        """{kind of collective: bytes that a device sends}, where they go round in a ring."""
        found: dict[str, tuple[str, float]] = {}
        for name, instruction, times in self._executed(self._entry, inside=True):
            kind = instruction.kind.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            here = self._instructions[name]
            given = "".join(here[x].results for x in instruction.operands if x in here)
            size: float = max(_total(x, everywhere=True) for x in (given, instruction.results))
            if kind != instruction.kind and kind != "all-reduce":
                size = _total(_second(instruction.results), everywhere=True)
            if "all-reduce-scatter" in name:  # of which each device keeps its part
                kind = "reduce-scatter"
            group = self._group(instruction.attributes)
            passes = {"all-reduce": 2, "collective-permute": group / max(1, group - 1)}
            size *= passes.get(kind, 1) * (group - 1) / group
            # An asynchronous one is spread over several fusions, under one number.
            chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
            found[chain[1] if chain else f"{name} {instruction.name}"] = kind, times * size
        sizes = Counter[str]()
        for kind, size in found.values():
            sizes[kind] += round(size)
        return sizes

    def _group(self, attributes: str) -> int:
        """How many devices take part in a collective."""
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return listed[1].count(",") + 1
        if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
            return int(counted[1])
        return self._devices

    def _executed(
        self, name: str, times: float = 1, *, inside: bool = False
    ) -> Iterator[tuple[str, Instruction, float]]:
        """(computation, instruction, how often) of all that a computation runs; `inside`: of
        fusions too. Of a condition the cheapest branch counts; but dense and banded attention
        equally, because layers take them in turn."""
        for instruction in self._instructions[name].values():
            yield name, instruction, times
            if instruction.kind == "while":
                body, trips = self._loop(instruction)
                yield from self._executed(body, times * trips, inside=inside)
            elif instruction.kind == "conditional":
                branches = _called(instruction)
                if "/attn/" not in instruction.source:
                    branches = [min(branches, key=self._weight)]
                for branch in branches:
                    yield from self._executed(branch, times / len(branches), inside=inside)
            elif instruction.kind == "call" or inside:
                for called in _called(instruction):
                    if called in self._instructions:
                        yield from self._executed(called, times, inside=inside)

    def _weight(self, name: str) -> float:
        """Bytes of a computation and all that it runs."""
        return sum(times * self._bytes(at, x) for at, x, times in self._executed(name))

    def _loop(self, instruction: Instruction) -> tuple[str, int]:
        """(a loop's body, how often it runs: as XLA says, or the number that its counter is
        compared with)."""
        attributes = instruction.attributes
        body, condition = (
            re.search(rf"{which}=%?([\w.-]+)", attributes)[1]  # type: ignore[index]
            for which in ("body", "condition")
        )
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', attributes):
            return body, int(known[1])
        limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", self._computations[condition])
        return body, max(map(int, limits), default=1)

    # ------------------------------------------------------------------------- operations

    def _flops(self, name: str) -> float:
        total = self._flops_once(name)
        for body, times in self._loops(name):
            total += times * self._flops(body) - self._flops_once(body)
        return total

    @functools.cache  # noqa: B019 (programs are few)
    def _flops_once(self, name: str) -> float:
        """By XLA, of a module whose entry is this computation."""
        # Not public, but what `jax.stages.Compiled.cost_analysis` calls.
        parse = importlib.import_module("jaxlib._hlo").hlo_module_from_text
        analyse = importlib.import_module("jaxlib._jax").hlo_module_cost_analysis
        text = "\n\n".join(
            f"ENTRY {body}" if other == name else body for other, body in self._computations.items()
        )
        client = jax.local_devices(backend="cpu")[0].client
        return analyse(client, parse(f"{self._header}\n\n{text}\n")).get("flops", 0.0)

    def _loops(self, name: str) -> list[tuple[str, int]]:
        """(body, how often it runs) of the loops in a computation and in what it calls."""
        found = []
        for instruction in self._instructions[name].values():
            if instruction.kind == "while":
                found.append(self._loop(instruction))
            for called in set(_called(instruction)) & set(self._computations):
                found += self._loops(called)
        return found

    def _kernel(self, name: str, instruction: Instruction) -> tuple[float, float]:
        """(operations, bytes read more than once) of a kernel of attention: of the blocks of
        [queries, keys] that its grid has and its mask leaves."""
        if instruction.kind != "custom-call":
            return 0, 0
        if own := OWN_KERNEL.search(instruction.name):
            b, h, d, _ = max(_arrays(instruction.results), key=lambda array: len(array[1]))[1]
            return b * h * int(own[2]) * PRODUCTS[own[1]] * 2 * int(own[3]) ** 2 * d, 0
        found = KERNEL.search(instruction.name)
        if not found:
            return 0, 0
        operands = [self._instructions[name][operand].results for operand in instruction.operands]
        grid = _arrays(operands[0])[0][1]
        # Queries may lie with either axis innermost; the outputs with the head's.
        *batch, t, d = max(_arrays(instruction.results), key=lambda array: len(array[1]))[1]
        q = max((_arrays(x)[0] for x in operands), key=lambda array: len(array[1]))
        across, along = sorted(grid[-2:])
        blocks = sum(min(i + 1, across) for i in range(along))
        products = PRODUCTS[found[1]] * 2 * (t // along) ** 2 * d
        again = (blocks / along - 1) * 2 * _size(q)
        return math.prod(batch) * blocks * products, again

    # ------------------------------------------------------------------------- bytes

    def _bytes(self, name: str, instruction: Instruction) -> float:
        """What an instruction reads from and writes to the device's memory; an operand that it
        reads twice counts once."""
        kind = instruction.kind
        if kind in MOVES_NOTHING or kind.endswith("-done"):
            return 0
        here = self._instructions[name]
        operands = [here[x].results for x in dict.fromkeys(instruction.operands) if x in here]
        if kind in ("copy-start", "slice-start"):  # (to, from, ...); (from, to, ...)
            first, second = _arrays(instruction.results)[:2]
            to, source = (first, second) if kind == "copy-start" else (second, first)
            return _size(to) + (_size(to, everywhere=True) if _size(source) else 0)
        called = _called(instruction)
        if kind == "fusion" and called:
            return self._fusion(called[0], instruction)
        if kind == "async-start" and called:
            return self._weight(called[0])
        results = instruction.results
        if kind.endswith("-start") and kind != "all-reduce-start":
            results = _second(results)
        read, written = sum(map(_total, operands)), _total(results)
        if kind in SLICES:
            read = min(read, written or read)
        if kind in ("dynamic-update-slice", "scatter"):
            update = here[instruction.operands[1 if kind[0] == "d" else -1]]
            read = written = _total(update.results)
        return read + written + self._kernel(name, instruction)[1]

    def _fusion(self, called: str, instruction: Instruction) -> float:
        """Of an operand that it only slices it reads the slice; where it updates a slice in place
        it writes the slice."""
        read: dict[str, float] = {}  # an operand that is given twice is read once
        for at, each in self._parameters(called).items():
            if size := _total(each.results):
                operand = instruction.operands[at]
                read[operand] = min(size, read.get(operand, 0) + self._read(called, each))
        total = sum(read.values())
        root = self._root(called)
        results = root.operands if root.kind == "tuple" else [root.name]
        sizes = [_size(x) for x in _arrays(instruction.results)]
        for result, size in zip(results, sizes, strict=False):
            total += min(size, self._written(called, result))
        return total

    def _read(self, name: str, value: Instruction) -> float:
        """Bytes of a value in this computation that are looked at; inf: all of it."""
        total = 0.0
        for user in self._users(name).get(value.name, []):
            if user.kind == "bitcast" or (
                user.kind == "dynamic-update-slice" and value.name == user.operands[0]
            ):  # what is updated in place may be used in here too
                total += self._read(name, user)
            elif user.kind in SLICES:
                total += _total(user.results, everywhere=True)
            elif user.kind == "fusion":
                (called,) = _called(user)
                inside = self._parameters(called)[user.operands.index(value.name)]
                total += self._read(called, inside)
                if self._origin(called, self._root(called)) == inside:  # it is passed on
                    total += self._read(name, user)
            elif user.kind != "tuple":
                return math.inf
        return total

    def _origin(self, name: str, value: Instruction) -> Instruction:
        """What a value of this computation is a view of, or was before it was updated in place."""
        while value.kind in ("bitcast", "dynamic-update-slice"):
            value = self._instructions[name][value.operands[0]]
        return value

    def _written(self, name: str, result: str) -> float:
        """As `_read`, of a value that this computation makes."""
        found = self._instructions[name][result]
        if found.kind == "bitcast":
            return self._written(name, found.operands[0])
        if found.kind == "dynamic-update-slice" and self._origin(name, found).kind == "parameter":
            update = self._instructions[name][found.operands[1]]
            return _total(update.results, everywhere=True)
        return math.inf

    def _root(self, name: str) -> Instruction:
        return next(x for x in self._instructions[name].values() if x.root)

    def _parameters(self, name: str) -> dict[int, Instruction]:
        return {
            int(x.operands[0]): x
            for x in self._instructions[name].values()
            if x.kind == "parameter"
        }

    @functools.cache  # noqa: B019 (programs are few)
    def _users(self, name: str) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for each in self._instructions[name].values():
            for operand in dict.fromkeys(each.operands):
                users.setdefault(operand, []).append(each)
        return users


def _called(instruction: Instruction) -> list[str]:
    """The computations that it runs, but for a loop's."""
    found = CALLED.findall(instruction.attributes)
    return [name.strip(" %") for names in found for name in names.strip("{}").split(",")]


def _second(results: str) -> str:
    """Of what starts an asynchronous instruction, (operands, results, ...), the results."""
    parts = results[1:-1]
    first = parts[: _closing(parts)] if parts[0] == "(" else parts.split(", ", 1)[0]
    rest = parts[len(first) :].lstrip(", ")
    return rest[: _closing(rest)] if rest[:1] == "(" else rest.split(" ", 1)[0]


def _instructions(text: str) -> Iterator[Instruction]:
    starts = list(NAME.finditer(text))
    for found, following in zip(starts, [*starts[1:], None], strict=True):
        line = text[found.end() : following.start() if following else len(text)]
        results = line[: _closing(line)] if line[0] == "(" else line.split(" ", 1)[0]
        rest = line[len(results) :].lstrip()
        kind, _, after = rest.partition("(")
        if kind == "custom-call" and "tpu_custom_call" not in after:
            kind = (re.findall(r'custom_call_target="(\w+)"', after) or [kind])[0]
        end = _closing("(" + after) - 1
        operands = re.findall(r"%([\w.-]+)", after[:end]) or re.findall(r"[\w.-]+", after[:end])
        yield Instruction(found[2], kind, results, tuple(operands), after[end:], bool(found[1]))


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with has been closed."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    return len(text)


Array = tuple[str, tuple[int, ...], str]
"""(kind of its numbers, sides, layout)."""


def _arrays(results: str) -> list[Array]:
    return [
        (kind, tuple(map(int, filter(None, sides.split(",")))), layout)
        for kind, sides, layout in ARRAY.findall(results)
    ]


def _total(results: str, *, everywhere: bool = False) -> int:
    return sum(_size(array, everywhere=everywhere) for array in _arrays(results))


def _size(array: Array, *, everywhere: bool = False) -> int:
    """Bytes in the device's memory, as it lies there: a TPU fills up the two innermost axes to
    tiles. 0 for what lies in another memory, unless `everywhere`."""
    kind, sides, layout = array
    if re.search(r"S\([1-9]", layout) and not everywhere:
        return 0
    order = [int(x) for x in re.findall(r"\d+", layout.split(":")[0])]
    tile = re.search(r"T\(([\d,]+)\)", layout)
    padded = list(sides)
    if tile and len(order) == len(sides):
        for axis, unit in zip(order, reversed([int(x) for x in tile[1].split(",")]), strict=False):
            padded[axis] = -(-padded[axis] // unit) * unit
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
    return math.prod(padded) * bits // 8
