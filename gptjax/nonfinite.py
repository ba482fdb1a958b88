"""Which operation made the first number that is not finite, forward or backward.

A step computes all at once and says only that its loss is not finite. Here the same function is
taken apart into its operations, which run one after the other, those of loops too, each followed by
a look at what it made.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gptjax import train_step
from gptjax.config import TrainConfig
from gptjax.errors import first_line
from gptjax.runtime_config import ComputeConfig

PACKAGE = str(Path(__file__).parent)

CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "checkpoint": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr",
}  # fmt: skip
"""Operations that stand for others, and the parameter that holds those."""


class _Turn(NamedTuple):
    """Of a loop."""

    number: int
    length: int
    stack: str
    """Where the loop stands: names of modules, and what JAX made of them."""


class _Found(Exception):
    """The operation; the message describes it."""


def first(function: Callable[..., Any], *args: Any) -> str | None:
    """The operation of `function(*args)` that makes the first NaN out of numbers, or the first
    infinity out of finite numbers; None if none does. Runs on one device.

    What is already not finite in `args` is no operation's doing (see `leaf`).
    """
    traced = jax.make_jaxpr(function)(*args)
    try:
        _run(traced.jaxpr, traced.consts, jax.tree.leaves(args), ())
    except _Found as found:
        return str(found)
    return None


def leaf(tree: Any) -> str | None:
    """The name of the first array in a tree that is not finite; None if all are."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all()):
            return jax.tree_util.keystr(path, simple=True, separator=".")
    return None


def explain(
    params: Any, windows: np.ndarray, rows: np.ndarray, size: int, step: int,
    config: TrainConfig, compute: ComputeConfig,
) -> str:  # fmt: skip
    """Why a training step was not finite.

    Args:
        params: whole, as they were before the step.
        windows: int32 [B, T + 1], with `rows` [B], their numbers in the global batch.
        size: windows at a time.
        step: steps done before it.
    """
    if name := leaf(params):
        return f"{name} was not finite before it, though all gradients of earlier steps were"
    key = jax.random.fold_in(train_step.random_key(config.seed), step)

    def gradients(params: Any, windows: Any, rows: Any) -> Any:
        return jax.value_and_grad(train_step.loss)(
            params, windows, config.model, compute, key, rows
        )

    try:
        for at in range(0, len(windows), size):
            part = params, jnp.asarray(windows[at : at + size]), jnp.asarray(rows[at : at + size])
            if leaf(jax.jit(gradients)(*part)) is not None:
                return first(gradients, *part) or "computed one by one, all operations are finite"
    except jax.errors.JaxRuntimeError as error:
        return f"why cannot be found on one device: {first_line(error)}"
    return "the loss and gradients of this host's rows are finite when each is computed alone"


def _run(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], loops: tuple[_Turn, ...]
) -> list[Any]:
    """The values of a jaxpr's outputs. `loops`: those that this is inside of."""
    # What is used for the last time is let go, or all that a step ever makes would be kept.
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if _is_variable(v)}
    kept = {v for v in jaxpr.outvars if _is_variable(v)}
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(v: Any) -> Any:
        return values[v] if _is_variable(v) else v.val

    for i, eqn in enumerate(jaxpr.eqns):
        made = _apply(jaxpr, eqn, [read(v) for v in eqn.invars], loops)
        values.update(zip(eqn.outvars, made, strict=True))
        for v in [*eqn.invars, *eqn.outvars]:
            if _is_variable(v) and v not in kept and last.get(v, i) <= i:
                values.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def _is_variable(v: Any) -> bool:
    return not isinstance(v, core.Literal)


def _apply(jaxpr: Any, eqn: Any, args: list[Any], loops: tuple[_Turn, ...]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(eqn, args, loops)
    if name == "while":
        return _while(params, args, loops)
    if name == "cond":
        branch = params["branches"][int(args[0])]
        return _run(branch.jaxpr, branch.consts, args[1:], loops)
    if name in CALLS:
        inner = params[CALLS[name]]
        closed = isinstance(inner, core.ClosedJaxpr)
        jaxpr, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
        return _run(jaxpr, consts, args, loops)
    given = {v: x for v, x in zip(eqn.invars, args, strict=True) if _is_variable(v)}
    alone = core.Jaxpr((), [*given], eqn.outvars, [eqn], eqn.effects, jaxpr.debug_info)
    made = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())
    for kind, is_bad in (("nan", jnp.isnan), ("inf", lambda x: ~jnp.isfinite(x))):
        if _any(is_bad, made) and not _any(is_bad, args):
            raise _Found(_describe(eqn, args, kind, loops))
    return made


def _any(is_bad: Callable[[Any], Any], arrays: list[Any]) -> bool:
    floats = [x for x in arrays if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return any(bool(is_bad(x).any()) for x in floats)


def _scan(eqn: Any, args: list[Any], loops: tuple[_Turn, ...]) -> list[Any]:
    params, stack = eqn.params, str(eqn.source_info.name_stack)
    body, length, n_carry = params["jaxpr"], params["length"], params["num_carry"]
    n_consts = params["num_consts"]
    consts, carry, xs = args[:n_consts], args[n_consts:][:n_carry], args[n_consts + n_carry :]
    turns = range(length)[::-1] if params["reverse"] else range(length)
    rows: dict[int, list[Any]] = {}
    for i in turns:
        here = (*loops, _Turn(i, length, stack))
        out = _run(body.jaxpr, body.consts, [*consts, *carry, *(x[i] for x in xs)], here)
        carry, rows[i] = out[:n_carry], out[n_carry:]
    stacks = zip(*(rows[i] for i in range(length)), strict=True)
    return [*carry, *(jnp.stack(stack) for stack in stacks)]


def _while(params: dict[str, Any], args: list[Any], loops: tuple[_Turn, ...]) -> list[Any]:
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    for_test, args = args[: params["cond_nconsts"]], args[params["cond_nconsts"] :]
    for_body, carry = args[: params["body_nconsts"]], args[params["body_nconsts"] :]
    while bool(_run(test.jaxpr, test.consts, [*for_test, *carry], loops)[0]):
        carry = _run(body.jaxpr, body.consts, [*for_body, *carry], loops)
    return carry


def _describe(eqn: Any, args: list[Any], kind: str, loops: tuple[_Turn, ...]) -> str:
    """ "dot_general in h.1.attn (attention.py:84), forward, makes inf from numbers up to 3e+38"."""
    stack, traceback = str(eqn.source_info.name_stack), eqn.source_info.traceback
    frames = [f for f in traceback.frames if f.file_name.startswith(PACKAGE)] if traceback else []
    line = f" ({Path(frames[0].file_name).name}:{frames[0].line_num})" if frames else ""
    layers = [turn for turn in loops if turn.stack.endswith("GPT.blocks")]
    others = [f" (turn {t.number + 1} of a loop of {t.length})" for t in loops if t not in layers]
    parts = re.sub(r"(transpose|jvp|GPT)\(*|\)", "", stack).strip("/").split("/")
    if layers and parts[0] == "h":
        parts.insert(1, str(layers[0].number))
    backward = any("transpose(" in text for text in (stack, *(turn.stack for turn in loops)))
    floats = [x for x in args if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    largest = max((float(jnp.abs(x).max()) for x in floats if jnp.size(x)), default=0.0)
    return (
        f"{eqn.primitive.name}{' in ' * any(parts)}{'.'.join(parts)}{line}{''.join(others)},"
        f" {'backward' if backward else 'forward'}, makes {kind} from numbers up to {largest:.3g}"
    )
