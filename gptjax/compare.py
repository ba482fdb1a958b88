"""Do we compute what PyTorch computes? One table, from the same weights and the same batches.

    python -m gptjax.compare RUN_DIR [--against hf|nanogpt-style] [--steps 100]

Needs PyTorch, and transformers for --against hf (requirements-torch.txt). PyTorch runs on the CPU.
Relative error is the Euclidean norm of the difference over that of PyTorch's values, or the largest
difference over the largest value, whichever is larger; after AdamW's steps, over how far PyTorch's
parameters moved.
"""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

try:
    import torch
except ImportError:
    print("error: comparing needs PyTorch: pip install -r requirements-torch.txt", file=sys.stderr)
    sys.exit(2)

from gptjax import (
    checkpoint,
    cli,
    corpus,
    data,
    devices,
    evaluate,
    generate,
    model,
    optim,
    state_dict,
    tokenizers,
    train,
    weights,
)
from gptjax.config import LARGEST, DeviceKind, ModelConfig, TrainConfig
from gptjax.data import Tokens
from gptjax.errors import RunError, UserError
from gptjax.places import place
from gptjax.reference import Against, Precision, Reference
from gptjax.state_dict import PREFIX
from gptjax.tokenizers import Tokenizer


class Tolerance(NamedTuple):
    """The largest difference that passes. All are relative errors but for the losses, in nats."""

    activation: float
    logits: float
    loss: float
    gradient: float
    update: float
    trajectory: float
    greedy: float
    """Share of greedy tokens that may differ."""


TOLERANCES: dict[Precision, Tolerance] = {
    "float32": Tolerance(1e-5, 1e-5, 1e-5, 1e-4, 1e-4, 1e-3, 0.0),
    # Parameters and optimizer are float32 here too. Greedy tokens are not judged.
    "bfloat16": Tolerance(3e-2, 3e-2, 1e-2, 1e-1, 1e-4, 2e-2, math.inf),
}

OPTIMIZER_STEPS = 5
"""AdamW's steps from the same gradients: the first sees neither its betas nor the schedule."""


class Row(NamedTuple):
    """One comparison, in the order in which the numbers are computed."""

    name: str
    absolute: float
    """The largest difference of any element."""
    relative: float
    limit: float
    judged: Literal["absolute", "relative"] = "relative"
    shown: bool = True
    """In the table always, or only when it fails."""

    @property
    def passed(self) -> bool:
        return getattr(self, self.judged) <= self.limit  # False for NaN


def difference(name: str, ours: Any, theirs: Any, limit: float, *, shown: bool = True) -> Row:
    """Compare two arrays."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    gap = ours - theirs
    absolute = float(np.abs(gap).max(initial=0))
    size = float(np.linalg.norm(theirs))
    norm = float(np.linalg.norm(gap))
    largest = float(np.abs(theirs).max(initial=0))
    # A row that is all wrong may be lost in the norm of a large tensor, but not in its maximum.
    relative = max(norm / size, absolute / largest) if size else (0.0 if norm == 0 else math.inf)
    return Row(name, absolute, relative, limit, shown=shown)


# -------------------------------------------------------------------------------- our side


@functools.partial(jax.jit, static_argnames="config")
def _with_activations(params: Any, tokens: jax.Array, config: ModelConfig) -> Any:
    parts = (model.Block, model.CausalSelfAttention, model.MLP, nn.LayerNorm)

    def wanted(module: nn.Module, _method: str) -> bool:
        return isinstance(module, parts) or module.path == ("Dropout_0",)

    (logits, _), found = model.GPT(config).apply(
        {"params": params}, tokens, capture_intermediates=wanted, mutable=["intermediates"]
    )
    return logits, found["intermediates"]


def activations(params: Any, tokens: np.ndarray, config: ModelConfig) -> dict[str, np.ndarray]:
    """The outputs of the embedding and of every part of every block, by PyTorch's names, and the
    logits; in the order in which they are computed."""
    logits, found = _with_activations(params, tokens, config)
    shape = (*tokens.shape, config.n_embd)

    def output(tree: Any) -> np.ndarray:
        value = tree["__call__"][0]
        while isinstance(value, tuple):  # a block gives ((x, cache), None)
            value = value[0]
        return np.asarray(value, np.float32)

    out = {"drop": output(found["Dropout_0"]).reshape(shape)}
    for i in range(config.n_layer):
        for part in ("ln_1", "attn", "ln_2", "mlp"):
            out[f"h.{i}.{part}"] = output(found["h"][part])[i].reshape(shape)
        out[f"h.{i}"] = output(found["h"])[i].reshape(shape)
    if config.n_layer:
        out["ln_f"] = output(found["ln_f"]).reshape(shape)
    return out | {"logits": np.asarray(logits)}


_loss_and_gradients = jax.jit(jax.value_and_grad(train.loss), static_argnames="config")
_train_step = jax.jit(train.train_step, static_argnames="config", donate_argnames="state")
_apply_gradients = jax.jit(train.apply_gradients, static_argnames="config", donate_argnames="state")


# ------------------------------------------------------------------------------ comparisons


def compare(
    params: Any,
    config: TrainConfig,
    batch: Callable[[int], np.ndarray],
    reference: Reference,
    precision: Precision,
    greedy_tokens: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Rows in the order of computation.

    Args:
        config: without dropout; `max_steps` are compared.
        batch: step -> int32 windows [B, T + 1].
    """
    limits, rows = TOLERANCES[precision], []
    first = batch(0)
    with jax.default_matmul_precision("highest"):
        progress("activations")
        ours = activations(params, first[:, :-1], config.model)
        outputs = reference.activations(torch.from_numpy(first[:, :-1]).long())
        for name, value in ours.items():
            limit = limits.logits if name == "logits" else limits.activation
            label = {"drop": "embedding", "logits": "logits"}.get(name, name)
            inner = name.count(".") > 1
            rows.append(difference(label, value, outputs[name], limit, shown=not inner))
        del ours, outputs

        progress("gradients")
        our_loss, gradients = _loss_and_gradients(params, first, config=config.model)
        loss = difference("loss", our_loss, reference.backward(first), limits.loss)
        rows.append(loss._replace(judged="absolute"))
        mine = state_dict.to_torch(gradients, config.model, reference.layout, padding=False)
        named = reference.gradients()
        # Backwards, as they are computed.
        for name in reversed(named):
            label = f"gradient {_short(name)}"
            rows.append(difference(label, mine[name], named[name], limits.gradient))

        progress("AdamW")
        rows += _compare_optimizer(config, batch, reference, limits)
        progress("greedy tokens")
        rows.append(_compare_greedy(params, config.model, first, reference, greedy_tokens, limits))
        return rows + _compare_training(params, config, batch, reference, limits, progress)


def _short(name: str) -> str:
    return name.removeprefix(PREFIX)


def _compare_greedy(
    params: Any,
    config: ModelConfig,
    windows: np.ndarray,
    reference: Reference,
    count: int,
    limits: Tolerance,
) -> Row:
    prompt = windows[0, : max(1, min(8, config.block_size // 2))]
    pieces = generate.generate(params, prompt, count, config, generate.Sampling(0.0))
    ours, theirs = np.concatenate(list(pieces), axis=1)[0], reference.greedy(prompt, count)
    differ = np.flatnonzero(ours != theirs)
    if not len(differ):
        return Row(f"greedy tokens, {count} of {count} the same", 0.0, 0.0, limits.greedy)
    at = int(differ[0])
    # Two tokens may be as likely as makes no difference: then either is right.
    text = np.concatenate([prompt, theirs[:at]])[-config.block_size :][None]
    logits = np.asarray(model.apply(config, params, jnp.asarray(text))[0][0, -1])
    gap = abs(float(logits[ours[at]] - logits[theirs[at]])) / float(np.abs(logits).max())
    if gap <= limits.logits:
        return Row(f"greedy tokens, {at} of {count} the same, then a tie", gap, gap, limits.logits)
    share = (count - at) / count
    return Row(f"greedy tokens, {at} of {count} the same", share, share, limits.greedy)


def _our_state(params: Any, config: TrainConfig) -> train.TrainState:
    """Step 0 with a copy of the parameters, which the steps may consume."""
    params = jax.tree.map(jnp.copy, params)
    return train.TrainState(jnp.int32(0), params, optim.optimizer(config).init(params))


def _compare_optimizer(
    config: TrainConfig,
    batch: Callable[[int], np.ndarray],
    reference: Reference,
    limits: Tolerance,
) -> list[Row]:
    """The parameters after one AdamW step, and after a few, both from PyTorch's gradients: what
    rounding does to a gradient is judged elsewhere, and AdamW divides it by its own size.

    Relative to how far they moved, because an error of the optimizer is small beside the
    parameters themselves.
    """
    steps = OPTIMIZER_STEPS
    once = dataclasses.replace(
        config, learning_rate=1e-2, min_lr=1e-3, warmup_steps=2, max_steps=steps
    )
    # PyTorch has no padded rows.
    network = dataclasses.replace(config.model, vocab_multiple=1)

    def tree(arrays: dict[str, np.ndarray]) -> Any:
        tensors = weights.TorchTensors(
            {name: torch.from_numpy(array) for name, array in arrays.items()}, "PyTorch"
        )
        return jax.tree.map(
            jnp.array, state_dict.from_torch(tensors, network, reference.layout, "PyTorch")
        )

    before = reference.values()
    state = _our_state(tree(before), once)
    update = reference.optimizer(once)
    rows: list[Row] = []
    for step in range(steps):
        reference.backward(batch(step))
        state = _apply_gradients(state, tree(reference.gradients()), config=once)
        update(step)
        if step not in (0, steps - 1):
            continue
        ours = state_dict.to_torch(state.params, network, reference.layout)
        theirs = reference.values()
        moved = [
            difference(name, ours[name] - start, theirs[name] - start, limits.update)
            for name, start in before.items()
        ]
        if step == 0:
            rows += [row._replace(name=f"AdamW step {_short(row.name)}") for row in moved]
        else:
            worst = max(moved, key=lambda row: row.relative)
            rows.append(worst._replace(name=f"{steps} AdamW steps (most {_short(worst.name)})"))
    reference.restore(before)
    return rows


def _compare_training(
    params: Any,
    config: TrainConfig,
    batch: Callable[[int], np.ndarray],
    reference: Reference,
    limits: Tolerance,
    progress: Callable[[str], None],
) -> list[Row]:
    """The loss of every step of training both on the same batches."""
    state = _our_state(params, config)
    update = reference.optimizer(config)
    rows = []
    for i in range(config.max_steps):
        windows = batch(i)
        state, metrics = _train_step(state, train.whole_batch(windows[None]), config=config)
        theirs = reference.backward(windows)
        update(i)
        name = f"step {i + 1} of training, loss {theirs:.5f}"
        row = difference(name, metrics["train_loss"], theirs, limits.trajectory)
        shown = i == 0 or (i + 1) % max(1, config.max_steps // 10) == 0
        rows.append(row._replace(judged="absolute", shown=shown))
        progress(f"training step {i + 1} of {config.max_steps}")
    return rows


# -------------------------------------------------------------------------------- the table


def table(rows: list[Row], *, every: bool) -> list[str]:
    """Lines of text; the parameters of all layers as their worst one, unless `every` is asked."""
    shown = [row for row in rows if row.shown or not row.passed or every]
    if not every:
        worst: dict[str, Row] = {}
        for row in shown:
            kind = re.sub(r"^(gradient|AdamW step) h\.\d+\.", r"\1 h.*.", row.name)
            if kind not in worst or not row.relative <= worst[kind].relative:
                layer = row.name.removeprefix(kind.split("*")[0])
                label = f"{kind} ({layer.split('.')[0]})" if "*" in kind else kind
                worst[kind] = row._replace(name=label)
        shown = list(worst.values())
    width = max(len(row.name) for row in shown)
    lines = [f"{'':{width}}  max |diff|  relative  tolerance"]
    for row in shown:
        limit = f"{row.limit:.0e}" + (" abs" if row.judged == "absolute" else "    ")
        verdict = "pass" if row.passed else "FAIL"
        if row.limit == math.inf:
            limit, verdict = f"{'-':9}", "not judged"
        lines.append(
            f"{row.name:{width}}  {row.absolute:10.1e}  {row.relative:8.1e}  {limit}  {verdict}"
        )
    return lines


# -------------------------------------------------------------------------------- command


@dataclasses.dataclass(frozen=True)
class CompareFlags:
    """Compare a run's model with PyTorch's, number by number, and say where they part. Exit code 1
    if any number is beyond its tolerance."""

    against: Against = "hf"
    """hf: transformers.GPT2LMHeadModel; nanogpt-style: a plain GPT of torch.nn modules, for what
    Hugging Face's cannot express."""
    steps: int = 100
    """Training steps to take side by side, from the run's weights."""
    batch_size: int = 2
    """Sequences per batch."""
    sequence_length: int | None = None
    """Tokens per sequence. None: the model's block_size."""
    text: str | None = None
    """Text for the batches: a file, a folder or a glob. None: the run's own training tokens where
    they are still there, else random ones."""
    learning_rate: float = 1e-4
    """Peak rate of the training steps, after 10 steps of warm-up; it decays to a tenth."""
    greedy_tokens: int = 200
    """Tokens to continue a prompt by, always taking the likeliest."""
    precision: Precision = "float32"
    """float32: at the highest precision of matrix products; bfloat16: under PyTorch's autocast."""
    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    seed: int = 1337
    """Seeds the choice of batches."""
    verbose: bool = False
    """Every parameter of every layer, and the loss at every step."""
    device: DeviceKind = "auto"
    """Kind of device for our side."""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        out = []
        for name in ("steps", "batch_size", "sequence_length", "greedy_tokens"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < LARGEST:
                out.append(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            out.append(f"--learning-rate {self.learning_rate} must be a number of at least 0")
        if not 0 <= self.seed < LARGEST:
            out.append(f"--seed must be at least 0 and below {LARGEST}")
        return out


def read_tokens(
    text: str | None, config: TrainConfig, tokenizer: Tokenizer, seed: int
) -> tuple[Tokens, str]:
    """(ids, where they come from): the text, the run's data folder, or random ones."""
    if text:
        return evaluate.read_text(text, tokenizer).tokens, text
    folder = config.data.dir
    if folder and Path(folder).exists():
        dataset = data.load(Path(folder))
        if dataset.tokenizer.n_vocab == tokenizer.n_vocab:
            return dataset.train, folder
    draw = np.random.Generator(np.random.Philox(key=seed))
    return draw.integers(tokenizer.n_vocab, size=1 << 20), "random tokens"


def main(argv: list[str]) -> None:
    """`python -m gptjax.compare RUN_DIR [flags]`."""
    named, flags = cli.parse(CompareFlags(), argv, "python -m gptjax.compare", "RUN_DIR")
    if not named:
        raise UserError("which run? python -m gptjax.compare RUN_DIR")
    devices.use_platform(flags.device)
    devices.use_compilation_cache(corpus.cache_dir() / "xla")
    loaded = checkpoint.load(place(named[0]), flags.checkpoint)
    tokenizer = tokenizers.from_json(loaded.facts.tokenizer, named[0])
    settings = loaded.facts.config
    dtype = flags.precision
    network = dataclasses.replace(settings.model, dropout=0.0, dtype=dtype)
    config = TrainConfig(
        model=network, batch_size=flags.batch_size, max_steps=flags.steps, warmup_steps=10,
        learning_rate=flags.learning_rate, min_lr=flags.learning_rate / 10, beta2=0.95,
    )  # fmt: skip
    length = flags.sequence_length or network.block_size
    if length > network.block_size:
        raise UserError(f"--sequence-length {length} exceeds the block_size {network.block_size}")
    tokens, where = read_tokens(flags.text, settings, tokenizer, flags.seed)
    if len(tokens) <= length:
        raise UserError(f"{where} has {len(tokens)} tokens; expected more than {length}")
    batch = functools.partial(
        data.batch_at, tokens, flags.seed, batch_size=flags.batch_size, block_size=length
    )
    reference = Reference(loaded.params, network, flags.against, flags.precision)
    print(
        f"gptjax (JAX {jax.__version__}, {devices.describe()}) against {flags.against}"
        f" (PyTorch {torch.__version__}), {flags.precision}: {network.num_parameters():,}"
        f" parameters of {named[0]}, step {loaded.step}; {flags.batch_size} x {length} tokens of"
        f" {where}; attention by {model.attention_kernel(network, train=True)[0]}",
        flush=True,
    )
    rows = compare(
        loaded.params, config, batch, reference, flags.precision, flags.greedy_tokens, cli.status
    )
    cli.status("")
    print("\n".join(table(rows, every=flags.verbose)))
    failed = [row for row in rows if not row.passed]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(rows)} numbers differ by more than their tolerance; the first"
            f" difference arises at: {failed[0].name}"
        )
    print(f"all {len(rows)} numbers agree within their tolerances")


if __name__ == "__main__":
    sys.exit(cli.run(main))
