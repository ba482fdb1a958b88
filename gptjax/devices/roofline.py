"""What a compiled program costs: operations, bytes and communication, and the time that these take
at least (Williams et al. 2009, "Roofline").

XLA counts the body of a loop once, however often it runs. Here each loop's body is counted by XLA
as a program of its own, and as often as it runs.
"""

import functools
import importlib
import math
import re
from collections import Counter
from typing import NamedTuple

import jax

WHILE = re.compile(r" while\(.*?condition=%?([\w.-]+), body=%?([\w.-]+)(.*)")
CALLED = re.compile(r"(?:to_apply=|calls=|branch_computations=\{)%?([\w.-]+)")
COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+)\[([\d,]*)\]")


class Cost(NamedTuple):
    """Of one device."""

    flops: float
    bytes: float
    """Read from and written to memory."""


class Program:
    """An optimised program of XLA, as text."""

    def __init__(self, text: str):
        self._header = re.match(r"HloModule [\w.-]+", text)[0]  # type: ignore[index]
        self._computations: dict[str, str] = {}
        body = re.sub(r", metadata=\{[^}]*\}", "", text[text.index("\n") :])
        for found in re.finditer(r"^(ENTRY )?%?([\w.-]+) \(.*?^\}", body, re.M | re.S):
            self._computations[found[2]] = found[0].removeprefix("ENTRY ")
            if found[1]:
                self._entry = found[2]

    def cost(self) -> Cost:
        return self._total(self._entry)

    def _total(self, name: str) -> Cost:
        flops, size = self._once(name)
        for body, times in self._loops(name):
            once, total = self._once(body), self._total(body)
            flops += times * total.flops - once.flops
            size += times * total.bytes - once.bytes
        return Cost(flops, size)

    @functools.cache  # noqa: B019 (programs are few)
    def _once(self, name: str) -> Cost:
        """By XLA, of a module whose entry is this computation."""
        # Not public, but what `jax.stages.Compiled.cost_analysis` calls.
        parse = importlib.import_module("jaxlib._hlo").hlo_module_from_text
        analyse = importlib.import_module("jaxlib._jax").hlo_module_cost_analysis
        text = "\n\n".join(
            f"ENTRY {body}" if other == name else body for other, body in self._computations.items()
        )
        client = jax.local_devices(backend="cpu")[0].client
        found = analyse(client, parse(f"{self._header}\n\n{text}\n"))
        return Cost(found.get("flops", 0.0), found["bytes accessed"])

    def _loops(self, name: str) -> list[tuple[str, int]]:
        """(body, how often it runs) of the loops in a computation and in what it calls."""
        text = self._computations[name]
        found = [(body, self._trips(test, rest)) for test, body, rest in WHILE.findall(text)]
        for called in set(CALLED.findall(text)) & set(self._computations):
            found += self._loops(called)
        return found

    def _trips(self, condition: str, attributes: str) -> int:
        """How often a loop runs: as XLA says, or the number that its counter is compared with."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', attributes):
            return int(known[1])
        limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", self._computations[condition])
        return max(map(int, limits), default=1)

    def collectives(self) -> Counter[str]:
        """{kind: bytes of its results, as often as it runs}."""
        found = Counter[str]()
        # An asynchronous one is spread over several fusions, under one number.
        for kind, size, times in self._channels(self._entry).values():
            found[kind] += size * times
        return found

    def _channels(self, name: str) -> dict[str, tuple[str, int, int]]:
        """{channel: (kind, bytes, how often)} of a computation and all that it runs."""
        text, found = self._computations[name], dict[str, tuple[str, int, int]]()
        for line in text.splitlines():
            if match := COLLECTIVE.search(line):
                arrays = ARRAY.findall(match[1])
                if match[3] and match[2] != "all-reduce":  # (operands, results, ...)
                    arrays = arrays[1:2]
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else f"{name} {len(found)}"
                found[key] = (match[2], sum(map(_bytes, arrays)), 1)
        for called in set(CALLED.findall(text)) & set(self._computations):
            found |= self._channels(called)
        for test, body, rest in WHILE.findall(text):
            trips = self._trips(test, rest)
            for key, (kind, size, times) in self._channels(body).items():
                found[key] = kind, size, times * trips
        return found


def _bytes(array: tuple[str, str]) -> int:
    kind, sides = array
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
    return math.prod(map(int, filter(None, sides.split(",")))) * bits // 8
