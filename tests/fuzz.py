"""Damaged files, for tests that a reader gives a whole result or one clear line, nothing else."""

import contextlib
import json

import numpy as np
from hypothesis import strategies as st

from gptjax.errors import UserError

DEEP = "@deep@"  # stands for lists in lists, deeper than the library can write
ODD = st.recursive(
    st.sampled_from([
        None, True, "", "\ud800", "a\nb\x1b[2J\0", "gpt2", "x" * 9999, [], {}, DEEP, DEEP, 0, 1, -1,
        0.5, 1e308, 2**31, 2**63, 10**400, -(10**400), int("9" * 4300), np.nan, np.inf, -np.inf,
    ]) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)  # fmt: skip


@st.composite
def odd_values(draw, root, value=ODD):
    """`root` with other values anywhere in it, or with something left out or renamed."""
    for _ in range(draw(st.integers(1, 3))):
        holder = node = {"": root}
        key = ""
        while isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
            node[key] = node = node[key].copy()
            keys = range(len(node)) if isinstance(node, list) else [*node][:40]
            key = draw(st.sampled_from(keys))
        if node is not holder and not draw(st.integers(0, 6)):
            del node[key]
        else:
            name = draw(st.sampled_from(["x\ny", "\ud800", "text"]) | st.text())
            rename = isinstance(node, dict) and not draw(st.integers(0, 6))
            node[name if rename and node is not holder else key] = draw(value)
        root = holder[""]
    return root


@st.composite
def damaged(draw, whole: bytes):
    """`whole` with bytes broken, exchanged or cut off, or with odd values in its JSON (or in that
    of its first line)."""
    for first in (whole, whole.split(b"\n")[0]):
        with contextlib.suppress(ValueError):
            root = json.loads(first)
            if draw(st.booleans()):
                text = json.dumps(draw(odd_values(root)), ensure_ascii=draw(st.booleans()))
                # At nearly 1000 levels Python can read it, but go no deeper to work with it.
                depth = draw(st.integers(850, 1000) | st.integers(1, 30) | st.just(100_000))
                text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
                return text.encode("utf-8", "surrogatepass") + whole[len(first) :]
    for _ in range(draw(st.integers(1, 3))):
        at, bit = draw(st.integers(0, len(whole))), 1 << draw(st.integers(0, 7))
        end = at + draw(st.integers(1, 16))
        before, part, after, new = whole[:at], whole[at:end], whole[end:], draw(st.binary())
        flipped = bytes(byte ^ bit for byte in part[:1]) + part[1:]
        middle = draw(st.sampled_from([b"", part + part, flipped, new, None]))
        whole = draw(st.sampled_from([before, new])) if middle is None else before + middle + after
    return whole


def read_or_refuse(read, where):
    """What `read()` returns, or None where it raises one readable line that names `where`."""
    try:
        return read()
    except UserError as error:
        message = str(error)
    assert str(where) in message and message.isprintable() and len(message) < 4000, message
    return None
