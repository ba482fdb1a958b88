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

from gptjax import finetune, train_step
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


def leaf(tree: Any) -> str | None:
    """The name of the first array in a tree that is not finite; None if all are."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all()):
            return jax.tree_util.keystr(path, simple=True, separator=".")
    return None


def explain(
    params: Any, windows: np.ndarray, rows: np.ndarray, size: int, step: int,
    config: TrainConfig, compute: ComputeConfig, eot: int | None = None,
) -> str:  # fmt: skip
    """Why a training step was not finite, in words.

    Args:
        params: whole, as they were before the step.
        windows: int32 [B, T + 1], with `rows` [B], their numbers in the global batch.
        size: windows at a time.
        step: steps done before it.
        eot: as of `train_step.loss`.
    """
    if name := leaf(params):
        return f"the update of step {step} made {name} so"
    key = jax.random.fold_in(train_step.random_key(config.seed), step)

    def gradients(params: Any, windows: Any, rows: Any) -> Any:
        return train_step.loss_and_gradient(params, windows, config, compute, key, rows, eot)

    total: Any = 0.0, jax.tree.map(np.zeros_like, finetune.split(config, params)[0])
    try:
        for at in range(0, len(windows), size):
            part = params, jnp.asarray(windows[at : at + size]), jnp.asarray(rows[at : at + size])
            found = jax.jit(gradients)(*part)
            if leaf(found) is not None:
                return first(gradients, *part) or "computed one by one, all operations are finite"
            total = jax.tree.map(jnp.add, total, found)
    except Exception as error:  # whatever it is, the failure itself must be told
        return f"why cannot be found on one device: {first_line(error)}"
    if name := leaf(total[1]):
        return f"each gradient is finite, but not the sum of all rows' for {name}"
    sizes = jax.tree.map(lambda x: float(jnp.abs(x).max()), total[1])
    path, largest = max(jax.tree_util.tree_leaves_with_path(sizes), key=lambda found: found[1])
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return (
        "the loss and gradients of this host's rows are finite; if not another host's, then the"
        f" norm overflows, the largest gradient is {largest:.3g} in {name}"
    )


def first(function: Callable[..., Any], *args: Any) -> str | None:
    """The operation of `function(*args)` that makes the first infinity out of finite numbers, and,
    if it is another one, that which makes the first NaN out of numbers; None if all results are
    finite. Runs on one device.

    What is already not finite in `args` is no operation's doing (see `leaf`).
    """
    traced, search = jax.make_jaxpr(function)(*args), _Search()
    try:
        results = search.run(traced.jaxpr, traced.consts, jax.tree.leaves(args), ())
    except _Found as found:
        return str(found)
    return search.infinity if leaf(results) else None


class _Turn(NamedTuple):
    """Of a loop."""

    number: int
    length: int
    stack: str
    """Where the loop stands: names of modules, and what JAX made of them."""


class _Found(Exception):
    """A NaN; the message describes where it comes from."""


class _Search:
    """Runs jaxprs operation by operation."""

    infinity: str | None = None
    """What made the first one."""

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], loops: tuple[_Turn, ...]
    ) -> list[Any]:
        """The values of a jaxpr's outputs. `loops`: those that this is inside of."""
        # What is used for the last time is let go, or all that a step ever makes would be kept.
        last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if _is_variable(v)}
        kept = {v for v in jaxpr.outvars if _is_variable(v)}
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(v: Any) -> Any:
            return values[v] if _is_variable(v) else v.val

        for i, eqn in enumerate(jaxpr.eqns):
            made = self._apply(jaxpr, eqn, [read(v) for v in eqn.invars], loops)
            values.update(zip(eqn.outvars, made, strict=True))
            for v in [*eqn.invars, *eqn.outvars]:
                if _is_variable(v) and v not in kept and last.get(v, i) <= i:
                    values.pop(v, None)
        return [read(v) for v in jaxpr.outvars]

    def _apply(self, jaxpr: Any, eqn: Any, args: list[Any], loops: tuple[_Turn, ...]) -> list[Any]:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(eqn, args, loops)
        if name == "while":
            return self._while(params, args, loops)
        if name == "cond":
            branch = params["branches"][int(args[0])]
            return self.run(branch.jaxpr, branch.consts, args[1:], loops)
        if name in CALLS:
            inner = params[CALLS[name]]
            closed = isinstance(inner, core.ClosedJaxpr)
            jaxpr, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
            return self.run(jaxpr, consts, args, loops)
        given = {v: x for v, x in zip(eqn.invars, args, strict=True) if _is_variable(v)}
        alone = core.Jaxpr((), [*given], eqn.outvars, [eqn], eqn.effects, jaxpr.debug_info)
        made = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())
        if _any(jnp.isnan, made) and not _any(jnp.isnan, args):
            told = _describe(eqn, args, "nan", loops)
            raise _Found(f"{self.infinity}; then {told}" if self.infinity else told)
        if self.infinity is None and _any(jnp.isinf, made) and not _any(jnp.isinf, args):
            self.infinity = _describe(eqn, args, "inf", loops)
        return made

    def _scan(self, eqn: Any, args: list[Any], loops: tuple[_Turn, ...]) -> list[Any]:
        params, stack = eqn.params, str(eqn.source_info.name_stack)
        body, length, n_carry = params["jaxpr"], params["length"], params["num_carry"]
        n_consts = params["num_consts"]
        consts, carry, xs = args[:n_consts], args[n_consts:][:n_carry], args[n_consts + n_carry :]
        turns = range(length)[::-1] if params["reverse"] else range(length)
        rows: dict[int, list[Any]] = {}
        for i in turns:
            here = (*loops, _Turn(i, length, stack))
            given = [*consts, *carry, *(x[i] for x in xs)]
            out = self.run(body.jaxpr, body.consts, given, here)
            carry, rows[i] = out[:n_carry], out[n_carry:]
        if not length:
            return [*carry, *(jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[n_carry:])]
        stacks = zip(*(rows[i] for i in range(length)), strict=True)
        return [*carry, *(jnp.stack(each) for each in stacks)]

    def _while(
        self, params: dict[str, Any], args: list[Any], loops: tuple[_Turn, ...]
    ) -> list[Any]:
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        for_test, args = args[: params["cond_nconsts"]], args[params["cond_nconsts"] :]
        for_body, carry = args[: params["body_nconsts"]], args[params["body_nconsts"] :]
        while bool(self.run(test.jaxpr, test.consts, [*for_test, *carry], loops)[0]):
            carry = self.run(body.jaxpr, body.consts, [*for_body, *carry], loops)
        return carry


def _is_variable(v: Any) -> bool:
    return not isinstance(v, core.Literal)


def _floats(arrays: Sequence[Any]) -> list[Any]:
    return [x for x in arrays if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and jnp.size(x)]


def _any(is_bad: Callable[[Any], Any], arrays: Sequence[Any]) -> bool:
    return any(bool(is_bad(x).any()) for x in _floats(arrays))


def _describe(eqn: Any, args: list[Any], kind: str, loops: tuple[_Turn, ...]) -> str:
    """ "square in h.1.ln_2 (model.py:95), forward, makes inf from numbers up to 6.61e+35"."""
    stack, traceback = str(eqn.source_info.name_stack), eqn.source_info.traceback
    frames = [f for f in traceback.frames if f.file_name.startswith(PACKAGE)] if traceback else []
    line = f" ({Path(frames[0].file_name).name}:{frames[0].line_num})" if frames else ""
    layers = [turn for turn in loops if turn.stack.endswith("GPT.blocks")]
    others = [f" (turn {t.number + 1} of a loop of {t.length})" for t in loops if t not in layers]
    # Without what JAX adds to names of modules, transpose(jvp(GPT)), and a product's indices.
    parts = [part for part in re.sub(r"\w+\(+|\)", "", stack).split("/") if part.strip("GPT")]
    parts = [part for part in parts if "->" not in part]
    if layers and parts[:1] == ["h"]:
        parts.insert(1, str(layers[0].number))
    backward = any("transpose(" in text for text in (stack, *(turn.stack for turn in loops)))
    largest = max((float(jnp.abs(x).max()) for x in _floats(args)), default=0.0)
    return (
        f"{eqn.primitive.name}{' in ' * any(parts)}{'.'.join(parts)}{line}{''.join(others)},"
        f" {'backward' if backward else 'forward'}, makes {kind} from numbers up to {largest:.3g}"
    )
