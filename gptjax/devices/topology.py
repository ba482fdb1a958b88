"""TPU slices that need not be here: the TPU's own compiler, which jax[tpu] brings, compiles for any
of them on any x86-64 Linux machine."""

import importlib.util
import math
import re

import jax

from gptjax.devices import chips
from gptjax.errors import UserError, first_line

FLAT = ("v2", "v3", "v5e", "v6e")
"""Kinds whose chips lie on a plane; those of the others in a space."""

BY_CORES = ("v2", "v3", "v4", "v5p")
"""Kinds that are named by TensorCores, of which a chip has two; the others are by chips."""

SAME = {"v5litepod": "v5e", "v5lite": "v5e"}


def shape(name: str) -> tuple[str, tuple[int, ...]]:
    """(kind, chips along each axis) of a slice: "v5e-8" is ("v5e", (2, 4)), "v4-32" ("v4", (2, 2,
    4)), and "v5p:4x4x4" says it itself.

    Raises:
        UserError: it is no such name.
    """
    found = re.fullmatch(r"(v\d+\w*?)(-(\d{1,6})|:(\d+(?:x\d+){1,2}))", name.lower())
    kind = SAME.get(found[1], found[1]) if found else ""
    if found is None or kind not in (*FLAT, "v4", "v5p"):
        raise UserError(
            f"--topology {name}: expected a TPU slice such as v5e-8, v4-32, v5p-128, v6e-256 or"
            " v5e:2x4"
        )
    axes = 2 if kind in FLAT else 3
    if found[4]:
        sides = tuple(map(int, found[4].split("x")))
        if len(sides) != axes or 0 in sides:
            raise UserError(f"--topology {name}: a {kind} slice has {axes} axes")
        return kind, sides
    chips = int(found[3]) / (2 if kind in BY_CORES else 1)
    power = int(math.log2(chips)) if chips else 0
    if chips != 2**power or power == 1:
        raise UserError(
            f"--topology {name}: there is no such slice; sizes are powers of two (v5e-1, v5e-4,"
            " v5e-8, ..., v4-8, v4-16, ...); name another shape as v5p:4x4x12"
        )
    if axes == 2:
        return kind, (2 ** (power // 2), 2 ** ((power + 1) // 2))
    if power < 3:
        return kind, (2, 2, 1) if power else (1, 1, 1)
    return kind, tuple(2 ** ((power + i) // 3) for i in range(3))


def devices(name: str) -> list[jax.Device]:
    """Of a slice, to compile for. Call after JAX has been told to run on the CPU.

    Raises:
        UserError: there is no such slice, or no compiler.
    """
    kind, sides = shape(name)
    if not importlib.util.find_spec("libtpu"):
        raise UserError("--topology needs the TPU's compiler; pip install 'jax[tpu]'")
    chips.prepare_tpu_library()
    from jax.experimental import topologies  # only here

    # Hosts of four chips, but where a smaller slice has one, or v5e's and v6e's one with eight.
    bounds = sides if math.prod(sides) in (1, 8 if kind in ("v5e", "v6e") else 1) else (2, 2, 1)
    try:
        found = topologies.get_topology_desc(
            f"{kind}:{'x'.join(map(str, sides))}", platform="tpu",
            chips_per_host_bounds=(*bounds, 1)[:3],
        )  # fmt: skip
    except Exception as error:  # of libtpu, in no documented form
        raise UserError(f"--topology {name}: {first_line(error)}") from None
    return list(found.devices)
