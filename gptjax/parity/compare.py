"""Our model beside PyTorch's: the same weights, the same batches, one table of differences.

Relative error is the Euclidean norm of the difference over that of PyTorch's values, or the largest
difference over the largest value, whichever is larger; after AdamW's steps, over how far PyTorch's
parameters moved.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from gptjax import files, head, model, optim, run, sampling, train_step
from gptjax.config import ModelConfig, OptimizerConfig, OptimizerKind, TrainConfig
from gptjax.data import token_files
from gptjax.data.batches import Tokens, batch_at
from gptjax.data.tokenizers import Tokenizer
from gptjax.devices import setup
from gptjax.errors import RunError, UserError
from gptjax.evals import perplexity
from gptjax.interop import parameter_names
from gptjax.interop.parameter_names import PREFIX
from gptjax.parity.reference import Against, Precision, Reference
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

TOLERANCES: dict[Precision, dict[str, float]] = {
    "float32": {
        "activation": 1e-5, "logits": 1e-5, "loss": 1e-5, "gradient": 1e-4, "update": 1e-4,
        "trajectory": 1e-3, "greedy": 0.0,
    },
    # Parameters and optimizer are float32 here too. Greedy tokens are not judged.
    "bfloat16": {
        "activation": 3e-2, "logits": 3e-2, "loss": 1e-2, "gradient": 1e-1, "update": 1e-4,
        "trajectory": 2e-2, "greedy": math.inf,
    },
}  # fmt: skip
"""The largest difference that passes: relative errors, but of losses (`loss` and, in training,
`trajectory`) nats, and `greedy` the share of tokens that may differ."""

LABELS = {"adamw": "AdamW", "muon": "Muon"}

OPTIMIZER_STEPS = 5
"""Updates from the same gradients: the first shows neither betas nor the schedule."""


class Row(NamedTuple):
    """One comparison, in the order in which the numbers are computed."""

    name: str
    absolute: float
    """The largest difference of any element."""
    relative: float
    limit: float
    judged: Literal["absolute", "relative"] = "relative"
    shown: bool = True
    """In the table always, or only if it fails."""

    @property
    def passed(self) -> bool:
        return getattr(self, self.judged) <= self.limit  # False for NaN


def difference(name: str, ours: Any, expected: Any, limit: float, **how: Any) -> Row:
    """Compare two arrays of one shape. `how`: more fields of the row."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    gap = ours - expected
    absolute, norm = float(np.abs(gap).max(initial=0)), float(np.linalg.norm(gap))
    size, largest = float(np.linalg.norm(expected)), float(np.abs(expected).max(initial=0))
    # A row that is all wrong may be lost in the norm of a large tensor, but not in its maximum.
    relative = max(norm / size, absolute / largest) if size else (0.0 if norm == 0 else math.inf)
    return Row(name.replace(PREFIX, ""), absolute, relative, limit, **how)


def our_activations(
    params: Any, tokens: np.ndarray, config: ModelConfig, compute: ComputeConfig = ComputeConfig()
) -> dict[str, np.ndarray]:
    """The outputs of the embedding and of every part of every block, by PyTorch's names, and the
    logits; in the order in which they are computed."""
    found = _outputs(params, tokens, config, compute)
    stacks = {name: np.asarray(x, np.float32) for name, x in found.items()}
    out = {"drop": stacks["Dropout_0"][0]}
    for i in range(config.n_layer):
        for part in (".ln_1", ".attn", ".ln_2", ".mlp", ""):
            out[f"h.{i}{part}"] = stacks[f"h{part}"][i]
    if config.n_layer:
        out["ln_f"] = stacks["ln_f"][0]
    return out | {"logits": stacks["logits"]}


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _outputs(
    params: Any, tokens: jax.Array, config: ModelConfig, compute: ComputeConfig
) -> dict[str, jax.Array]:
    """Of the modules that `our_activations` takes [L, B, T, C], or [1, B, T, C]; and the logits.
    The compiler removes what the others return."""
    (x, output, _), found = model.GPT(config, compute, train=False).apply(
        {"params": params}, tokens, capture_intermediates=True, mutable=["intermediates"]
    )
    flat, out = (
        flatten_dict(found["intermediates"], sep="."),
        {"logits": head.logits(x, output, config.vocab_size)},
    )
    for name in ("Dropout_0", "h.ln_1", "h.attn", "h.ln_2", "h.mlp", "h", "ln_f"):
        if calls := flat.get(f"{name}.__call__"):
            first = jax.tree.leaves(calls)[0]  # a block returns (x, cache)
            out[name] = first.reshape(-1, *tokens.shape, config.n_embd)
    return out


_jit = functools.partial(jax.jit, static_argnames=("config", "compute"))
_loss_and_gradients = _jit(jax.value_and_grad(train_step.loss))
_train_step = _jit(train_step.train_step, donate_argnames="state")
_apply_gradients = jax.jit(
    train_step.apply_gradients, static_argnames="config", donate_argnames="state"
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and how. `run` does it."""

    params: Any
    config: TrainConfig
    """Without dropout; `max_steps` of training are compared."""
    batch: Callable[[int], np.ndarray]
    """step -> int32 windows [B, T + 1]."""
    reference: Reference
    limits: dict[str, float] = dataclasses.field(default_factory=TOLERANCES["float32"].copy)
    greedy_tokens: int = 200
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    title: str = ""
    """What is compared, in words."""

    def run(self, progress: Callable[[str], None] = lambda _: None) -> list[Row]:
        """All rows, in the order of computation."""
        parts = {
            "activations": self.activations, "gradients": self.gradients,
            "optimizer": self.optimizer, "greedy tokens": self.greedy,
            "training": lambda: self.training(progress),
        }  # fmt: skip
        rows: list[Row] = []
        with jax.default_matmul_precision("highest"):
            for name, compare in parts.items():
                progress(name)
                rows += compare()
        return rows

    def activations(self) -> list[Row]:
        """The output of every part, from the embedding to the logits."""
        tokens = self.batch(0)[:, :-1]
        ours = our_activations(self.params, tokens, self.config.model, self.compute)
        expected = self.reference.activations(torch.from_numpy(tokens).long())
        rows = []
        for name, value in ours.items():
            limit = self.limits["logits" if name == "logits" else "activation"]
            label, inner = "embedding" if name == "drop" else name, name.count(".") > 1
            rows.append(difference(label, value, expected[name], limit, shown=not inner))
        return rows

    def gradients(self) -> list[Row]:
        """The loss, and its gradients from the last layer to the first, as they are computed."""
        config, windows = self.config.model, self.batch(0)
        loss, tree = _loss_and_gradients(self.params, windows, config=config, compute=self.compute)
        theirs, limits = self.reference.backward(windows), self.limits
        rows = [difference("loss", loss, theirs, limits["loss"], judged="absolute")]
        ours = parameter_names.to_torch(tree, config, self.reference.layout, padding=False)
        for name, expected in reversed(self.reference.gradients().items()):
            rows.append(difference(f"gradient {name}", ours[name], expected, limits["gradient"]))
        return rows

    def optimizer(self) -> list[Row]:
        """The parameters after one update, and after a few, both from PyTorch's gradients: what
        rounding does to a gradient is judged elsewhere, and AdamW divides it by its own size.

        Relative to how far they moved, because an error of the optimizer is small beside the
        parameters themselves.
        """
        reference, steps, limit = self.reference, OPTIMIZER_STEPS, self.limits["update"]
        label = LABELS[self.config.optimizer.kind]
        # PyTorch has no padded rows.
        network = dataclasses.replace(self.config.model, vocab_multiple=1)
        rates = dataclasses.replace(
            self.config.optimizer, learning_rate=1e-2, min_lr=1e-3, warmup_steps=2,
            muon_learning_rate=0.1,  # of small steps rounding would be most
        )  # fmt: skip
        config = dataclasses.replace(self.config, model=network, optimizer=rates, max_steps=steps)

        def tree(arrays: dict[str, np.ndarray]) -> Any:
            params = parameter_names.from_torch({**arrays}, network, reference.layout, "PyTorch")
            return jax.tree.map(jnp.array, params)

        before = reference.values()
        state, update = _first_state(tree(before), config), reference.optimizer(config)
        rows: list[Row] = []
        for step in range(steps):
            reference.backward(self.batch(step))
            state = _apply_gradients(state, tree(reference.gradients()), config=config)
            update(step)
            ours = parameter_names.to_torch(state.params, network, reference.layout)
            expected = reference.values()
            moved = [
                difference(name, ours[name] - start, expected[name] - start, limit)
                for name, start in before.items()
            ]
            if step == 0:
                rows = [row._replace(name=f"{label} step {row.name}") for row in moved]
        worst = max(moved, key=lambda row: (not row.passed, row.relative))  # NaN is no maximum
        reference.restore(before)
        return [*rows, worst._replace(name=f"{steps} {label} steps (most {worst.name})")]

    def greedy(self) -> list[Row]:
        """A prompt's likeliest continuation."""
        config, limits, count = self.config.model, self.limits, self.greedy_tokens
        prompt = self.batch(0)[0, : max(1, min(8, config.block_size // 2))]
        pieces = sampling.generate(self.params, prompt, count, config, sampling.Sampling(0.0))
        ours = np.concatenate(list(pieces), axis=1)[0]
        expected = self.reference.greedy(prompt, count)
        differ = np.flatnonzero(ours != expected)
        at = int(differ[0]) if len(differ) else count
        name, share = f"greedy tokens, {at} of {count} the same", (count - at) / count
        if share:
            # Two tokens may be as likely as makes no difference: then either is right.
            text = np.concatenate([prompt, expected[:at]])[-config.block_size :][None]
            logits = np.asarray(model.apply(config, self.params, jnp.asarray(text))[0][0, -1])
            gap = abs(float(logits[ours[at]] - logits[expected[at]])) / float(np.abs(logits).max())
            if gap <= limits["logits"]:
                return [Row(f"{name}, then a tie", gap, gap, limits["logits"])]
        return [Row(name, share, share, limits["greedy"])]

    def training(self, progress: Callable[[str], None]) -> list[Row]:
        """The loss of every step of training both on the same batches."""
        state = _first_state(jax.tree.map(jnp.copy, self.params), self.config)
        update, steps, rows = self.reference.optimizer(self.config), self.config.max_steps, []
        for i in range(steps):
            windows = self.batch(i)
            batch = train_step.whole_batch(windows[None])
            state, metrics = _train_step(state, batch, config=self.config, compute=self.compute)
            expected = self.reference.backward(windows)
            update(i)
            rows.append(difference(
                f"step {i + 1} of training, loss {expected:.5f}", metrics["train_loss"], expected,
                self.limits["trajectory"], judged="absolute",
                shown=i == 0 or (i + 1) % max(1, steps // 10) == 0,
            ))  # fmt: skip
            progress(f"training step {i + 1} of {steps}")
        return rows


def _first_state(params: Any, config: TrainConfig) -> train_step.TrainState:
    """Step 0. The steps may consume `params`."""
    return train_step.TrainState(jnp.int32(0), params, optim.optimizer(config).init(params))


def table(rows: list[Row], *, every: bool = False) -> list[str]:
    """Lines of text. Without `every`, one line for a parameter of all layers: the worst of them."""
    shown: dict[str, Row] = {}
    for row in rows:
        kind = label = row.name
        layer = re.match(r"(gradient|AdamW step|Muon step) h\.(\d+)\.(.+)", row.name)
        if layer and not every:
            kind = f"{layer[1]} h.*.{layer[3]}"
            label = f"{kind} ({layer[2]})"
        wanted = row.shown or not row.passed or every
        if wanted and not (kind in shown and row.relative <= shown[kind].relative):
            shown[kind] = row._replace(name=label)
    width = max(len(row.name) for row in shown.values())
    lines = [f"{'':{width}}  max |diff|  relative  tolerance"]
    for row in shown.values():
        limit = f"{row.limit:.0e}" + (" abs" if row.judged == "absolute" else "    ")
        verdict = "pass" if row.passed else "FAIL"
        if row.limit == math.inf:
            limit, verdict = f"{'-':9}", "not judged"
        lines.append(
            f"{row.name:{width}}  {row.absolute:10.1e}  {row.relative:8.1e}  {limit}  {verdict}"
        )
    return lines


def verdict(rows: list[Row]) -> str:
    """That all is well. RunError: it is not; names the first difference."""
    failed = [row for row in rows if not row.passed]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(rows)} numbers differ by more than their tolerance; the first"
            f" difference arises at: {failed[0].name}"
        )
    return f"all {len(rows)} numbers agree within their tolerances"


def open_comparison(
    run_dir: Path, *, against: Against = "hf", steps: int = 100, batch_size: int = 2,
    sequence_length: int | None = None, text: str | None = None, learning_rate: float = 1e-4,
    greedy_tokens: int = 200, precision: Precision = "float32", checkpoint: str = "best",
    seed: int = 1337, optimizer: OptimizerKind = "adamw",
) -> Comparison:  # fmt: skip
    """A run's model beside PyTorch's. The arguments are the flags of `gptjax compare`. UserError:
    there is no such run or text, Hugging Face's GPT-2 cannot express the model, or the sequence
    length does not fit."""
    if optimizer == "muon" and precision != "float32":
        raise UserError("--optimizer muon is compared in float32; leave out --precision")
    loaded = run.load(run_dir, checkpoint, dtype=precision)
    network = dataclasses.replace(loaded.config, dropout=0.0)
    length = sequence_length or network.block_size
    if length > network.block_size:
        raise UserError(f"--sequence-length {length} exceeds the block_size {network.block_size}")
    tokens, where = _read_tokens(text, loaded.experiment.data.dir, loaded.tokenizer, seed)
    if len(tokens) <= length:
        raise UserError(f"{where} has {len(tokens)} tokens; expected more than {length}")
    rates = OptimizerConfig(
        learning_rate, learning_rate / 10, warmup_steps=10, beta2=0.95, kind=optimizer,
        # As much more as it is in training from scratch.
        muon_learning_rate=20 * learning_rate,
    )  # fmt: skip
    computed = network.replace(block_size=length)
    compute, _ = setup.resolve_compute(computed, RuntimeConfig(), train=True)
    return Comparison(
        params=loaded.params,
        config=TrainConfig(network, optimizer=rates, batch_size=batch_size, max_steps=steps),
        batch=functools.partial(batch_at, tokens, seed, batch_size=batch_size, block_size=length),
        reference=Reference(loaded.params, network, against, precision),
        limits=TOLERANCES[precision],
        greedy_tokens=greedy_tokens,
        compute=compute,
        title=f"gptjax (JAX {jax.__version__}, {setup.describe()}) against {against}"
        f" (PyTorch {torch.__version__}), {precision}: {network.num_parameters():,}"
        f" parameters of {run_dir}, step {loaded.step}; {batch_size} x {length} tokens of"
        f" {where}; attention by {compute.attention}",
    )


def _read_tokens(
    text: str | None, folder: str | None, tokenizer: Tokenizer, seed: int
) -> tuple[Tokens, str]:
    """(ids, where they come from): the text, the run's data folder, or random ones."""
    if text:
        return perplexity.read_text(text, tokenizer).tokens, text
    if folder and files.sizes(files.path(folder)):
        dataset = token_files.load(files.path(folder))
        if dataset.tokenizer.n_vocab == tokenizer.n_vocab:
            return dataset.train, folder
    draw = np.random.Generator(np.random.Philox(key=seed))
    return draw.integers(tokenizer.n_vocab, size=1 << 20), "random tokens"
