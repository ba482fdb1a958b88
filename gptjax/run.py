"""A trained run, to use: what a notebook and every command that reads one start from."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax import (
    beam_search,
    files,
    head,
    launch,
    model,
    numerics,
    resume,
    run_metadata,
    sampling,
    train_step,
)
from gptjax.cache import Cache
from gptjax.checkpoint import on_one_device
from gptjax.config import ModelConfig, TrainConfig
from gptjax.data import batches, prepare, token_files, tokenizers
from gptjax.data.tokenizers import Tokenizer
from gptjax.decode_layout import unstack
from gptjax.devices import memory, setup
from gptjax.devices.strategy import get_strategy
from gptjax.errors import RunError, UserError
from gptjax.generation import GrowingText, grow, prompt_ids
from gptjax.generation_config import GenerationConfig, Overflow
from gptjax.model import Params
from gptjax.runtime_config import RuntimeConfig
from gptjax.trainer import Callback

Text = str | Sequence[int] | np.ndarray
"""A text, or token ids [T] or [B, T]."""

RECORDED = (model.Block, nn.Dense, nn.LayerNorm)
"""The modules whose outputs are the `activations`."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A model with its tokenizer. Its weights are read-only; training goes on by `gptjax.train`."""

    config: ModelConfig
    params: Params
    """A nested dict of float32 arrays, on one device unless they were loaded `sharded`."""
    tokenizer: Tokenizer
    step: int = 0
    """Optimizer steps that the weights have seen."""
    experiment: TrainConfig = TrainConfig()  # noqa: RUF009
    """All settings they were trained with."""
    data_fingerprint: str | None = None
    """Of the tokens they were trained on; None where these are not known."""

    def __repr__(self) -> str:
        size, kind = self.config.num_parameters(), self.tokenizer.kind
        return f"<Run: {size:,} parameters, {kind} tokenizer, step {self.step}>"

    @numerics.standard()
    def generate(
        self,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int = 200,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        num_samples: int | None = None,
        seed: int = 1337,
        stop: tuple[str, ...] = (),
        ignore_end_of_text: bool = False,
        skip_unknown: bool = False,
        overflow: Overflow = "exact",
        stream: bool = False,
    ) -> Any:
        """Continue a prompt. The same seed and settings give the same text.

        Args:
            max_new_tokens: 0: for ever, with `stream`.
            prompt: None: a line end. "": the token that ends a document, so a new one begins.
            temperature: below 1 safer, above 1 wilder; 0 always takes the likeliest token.
            top_k: draw from the k likeliest tokens only; 0 from all.
            top_p: draw from the fewest likeliest tokens that have this probability together.
            min_p: draw from the tokens at least this many times as likely as the likeliest.
            repetition_penalty: above 1, tokens that are in the text or the prompt already become
                less likely.
            num_samples: so many continuations, drawn side by side, as a list; None: one, as text.
            stop: a sample ends before any of these texts.
            ignore_end_of_text: go on after the token that ends a document.
            skip_unknown: leave out characters that the tokenizer does not know.
            overflow: past block_size: "exact", as an uncached model that sees the last block_size
                tokens; "half" drops the older half and goes on, faster; "stop" ends there.
            stream: an iterator of pieces of text as they come (of the one continuation).

        Returns:
            The new text, without the prompt: str, list[str] with `num_samples`, or an iterator of
            str with `stream`.

        Raises:
            UserError: the prompt is empty and the tokenizer has no token that ends a document, or
                does not know a character; or a setting is out of range.
        """
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, repetition_penalty=repetition_penalty,
            num_samples=1 if num_samples is None else num_samples, seed=seed, stop=stop,
            ignore_end_of_text=ignore_end_of_text, overflow=overflow,
        )  # fmt: skip
        if not (stream or max_new_tokens):
            raise UserError("max_new_tokens 0 is for ever; that takes stream=True")
        if stream and settings.num_samples != 1:
            raise UserError("only one sample can be streamed; leave out num_samples")
        ids = prompt_ids(self.tokenizer, prompt, skip_unknown=skip_unknown)
        eot = None if ignore_end_of_text else self.tokenizer.eot
        pieces = tokens(self._decoding_params, ids, self.config, settings, stream=stream)
        texts = [
            GrowingText(self.tokenizer, settings.stop, eot) for _ in range(settings.num_samples)
        ]
        growing = grow(texts, pieces)
        if stream:
            pieces_of_text = (texts[0].take(keep=False) for _ in numerics.each(growing))
            return filter(None, pieces_of_text)
        for _ in growing:
            pass
        found = [text.text for text in texts]
        return found[0] if num_samples is None else found

    @numerics.standard()
    def beam_search(
        self,
        prompt: Text | None = None,
        *,
        max_new_tokens: int = 100,
        num_beams: int = 4,
        length_penalty: float = 1.0,
        ignore_end_of_text: bool = False,
    ) -> list[tuple[float, str]]:
        """The likeliest continuations that a beam search finds, best first, with their scores: the
        log-probability, divided by the number of tokens to the power of `length_penalty`. They end
        at the end-of-text token, after `max_new_tokens`, or where the block is full.

        Args:
            prompt: as of `generate`; or token ids.
            num_beams: so many texts are kept after each token, and returned.

        Raises:
            UserError: as `generate`; or so many beams do not fit the memory.
        """
        if num_beams < 1 or not math.isfinite(length_penalty):
            raise UserError(
                f"num_beams {num_beams} must be at least 1, length_penalty {length_penalty} finite"
            )
        settings = GenerationConfig(max_new_tokens=max_new_tokens)
        if prompt is None or isinstance(prompt, str):
            ids = prompt_ids(self.tokenizer, prompt)
        else:
            ids = self._ids(prompt)[0]
        steps = settings.max_new_tokens or self.config.block_size
        memory.refuse_too_many(self.config, num_beams, len(ids) + steps, 1, setting="num_beams")
        found = beam_search.search(
            self._decoding_params, ids, steps, self.config, beams=num_beams,
            length_penalty=length_penalty,
            eot=None if ignore_end_of_text else self.tokenizer.eot,
        )  # fmt: skip
        return [(each.score, self.tokenizer.decode(each.tokens.tolist())) for each in found]

    @functools.cached_property
    def _decoding_params(self) -> Params:
        return unstack(self.params, self.config)

    def _ids(self, text: Text) -> np.ndarray:
        """int [B, T]."""
        try:
            ids = self.tokenizer.encode(text) if isinstance(text, str) else np.asarray(text)
        except ValueError:  # rows of different lengths
            ids = np.array(0.0)
        ids, vocab_size = np.atleast_2d(ids), self.config.vocab_size or 0
        if not ids.size:
            raise UserError("the text is empty; give at least one token")
        if ids.dtype.kind not in "iu" or ids.ndim > 2:
            raise UserError("expected a text, or whole numbers: token ids [T] or [B, T]")
        if wrong := [i for i in (ids.min(), ids.max()) if not 0 <= i < vocab_size]:
            raise UserError(f"token id {wrong[0]} is not one of the model's 0 to {vocab_size - 1}")
        return ids

    def _tokens(self, text: Text) -> jax.Array:
        """int32 [B, T], of at most block_size."""
        ids = self._ids(text)
        if ids.shape[1] > self.config.block_size:
            raise UserError(
                f"{ids.shape[1]} tokens do not fit the model's block_size {self.config.block_size}"
            )
        return jnp.asarray(ids, jnp.int32)

    @numerics.standard()
    def logits(self, text: Text) -> np.ndarray:
        """float32 [T, V], or [B, T, V] for ids [B, T]: next-token logits after each token.

        Raises:
            UserError: more than block_size tokens, or none; or an id that the model has not.
        """
        tokens = self._tokens(text)
        found = np.asarray(_logits(self.params, tokens, self.config))
        return found if np.ndim(text) == 2 else found[0]

    @numerics.standard()
    def loss(self, text: Text) -> float:
        """Mean nats per token of a text of 2 to block_size + 1 tokens: of each given those before.
        (For longer texts: `gptjax evaluate`.)"""
        tokens = self._ids(text)
        if tokens.shape[1] < 2:
            raise UserError("a loss takes a text of at least two tokens")
        logits = self.logits(tokens[:, :-1])
        return float(
            train_step.cross_entropy(jnp.asarray(logits), jnp.asarray(tokens[:, 1:])).mean()
        )

    @numerics.standard()
    def score(self, text: Text) -> np.ndarray:
        """float32 [T], or [B, T] for ids [B, T]: the log-probability of each token after those
        before it; NaN for the first. A text may have any length: past the block a token sees at
        least half a block before it."""
        ids, block = self._ids(text), self.config.block_size
        found = np.full(ids.shape, np.nan, np.float32)
        for row, own in zip(ids, found, strict=True):
            for window in batches.windows_over(len(row), block, stride=max(1, block // 2)):
                tokens, counts = batches.window_batch(row, [window], block, 1)
                nats = np.asarray(_nats(self.params, tokens, self.config))
                own[window.first : window.end] = -nats[counts > 0]
        return found if np.ndim(text) == 2 else found[0]

    @numerics.standard()
    def attention(self, text: Text) -> np.ndarray:
        """float32 [L, H, T, T] (or [B, L, H, T, T]): how much each token (third axis) looks at each
        token (last axis), per layer and head; rows sum to 1."""
        if not self.config.n_layer:
            raise UserError("a model without layers has no attention")
        tokens = self._tokens(text)
        found = np.asarray(_attention(self._decoding_params, tokens, self.config))
        return found if np.ndim(text) == 2 else found[0]

    @numerics.standard()
    def activations(self, text: Text) -> dict[str, np.ndarray]:
        """What the network computes on its way to the logits, in float32.

        Named as the parameters that make it: "embedding" [T, C], the sum of token and position; in
        each layer i "h.i.ln_1", "h.i.attn.c_attn" [T, 3 C] (query, key and value of all heads, side
        by side), "h.i.attn.weights" [H, T, T], "h.i.attn.joined" [T, C] (the heads' outputs),
        "h.i.attn.c_proj", "h.i.ln_2", "h.i.mlp.c_fc" [T, n_inner], "h.i.mlp.hidden" (activated),
        "h.i.mlp.c_proj", and "h.i", the residual stream after the layer; "ln_f"; "logits" [T, V].
        For ids [B, T] each has a leading axis B.
        """
        found = _activations(self._decoding_params, self._tokens(text), self.config)
        arrays = {name: np.asarray(array) for name, array in found.items()}
        return arrays if np.ndim(text) == 2 else {name: x[0] for name, x in arrays.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model and its tokenizer as Hugging Face's files, for
        `transformers.AutoModelForCausalLM.from_pretrained`.

        Raises:
            UserError: the format cannot express the model, or `folder` exists.
        """
        # Not at the top: Hugging Face's libraries take longer to load than a small model does.
        from gptjax.interop import convert
        from gptjax.interop.weights import Weights

        experiment = self.experiment.replace(model=self.config)
        fingerprint = self.data_fingerprint
        weights = Weights(
            experiment, self.params, step=self.step, data_fingerprint=fingerprint,
            trained=self.experiment,
        )  # fmt: skip
        convert.write_pretrained(weights, self.tokenizer, files.path(str(folder)))


def tokens(
    params: Params, prompt: np.ndarray, config: ModelConfig, settings: GenerationConfig, *,
    stream: bool,
) -> Iterator[np.ndarray]:  # fmt: skip
    """As `sampling.generate`; one token at a time where they are streamed. UserError: so many
    samples do not fit."""
    total = len(prompt) + (settings.max_new_tokens or config.block_size)
    # Weights that are shared out stay so; else the samples are.
    shared = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    alone = all(len(x.sharding.device_set) == 1 for x in shared)
    devices = jax.local_devices() if alone else []
    memory.refuse_too_many(config, settings.num_samples, total, max(1, len(devices)))
    return sampling.generate(
        params,
        prompt,
        settings.max_new_tokens or None,
        config,
        sampling.Sampling.of(settings),
        num_samples=settings.num_samples,
        seed=settings.seed,
        overflow=settings.overflow,
        chunk=1 if stream else sampling.CHUNK,
        devices=devices,
    )


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    return model.apply(config, params, tokens)[0]


@functools.partial(jax.jit, static_argnames="config")
def _nats(params: Params, windows: jax.Array, config: ModelConfig) -> jax.Array:
    """float32 [B, T] of int32 windows [B, T + 1]."""
    x, output, _ = model.features(config, params, windows[:, :-1])
    return head.losses(x, output, windows[:, 1:], config.vocab_size)


@functools.partial(jax.jit, static_argnames="config")
def _attention(params: Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """[B, L, H, T, T]."""
    found = _activations(params, tokens, config)
    return jnp.stack([found[f"h.{i}.attn.weights"] for i in range(config.n_layer)], axis=1)


def activations(
    params: Params, tokens: jax.Array, config: ModelConfig, cache: Cache | None = None
) -> dict[str, jax.Array]:
    """As `Run.activations`, of [B, T] tokens, after those in `cache`. `params`: unstacked, so that
    there is a call of the block for every layer."""
    found: dict[str, jax.Array] = {}

    def keep(next_method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        given: Any = args[0] if args else None
        name = ".".join(context.module.path).replace("h_", "h.", 1)
        out = next_method(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, RECORDED):
            record(name, out[0] if isinstance(out, tuple) else out)
            if name.endswith("c_proj"):
                own = "joined" if name.endswith("attn.c_proj") else "hidden"
                record(name.replace("c_proj", own), given)
        if context.method_name == "dropout" and isinstance(context.module, model.GPT):
            record("embedding", given)
        if context.method_name == "dropout" and given.ndim == 4:
            record(f"{name}.weights", given)
        return out

    def record(name: str, x: jax.Array) -> None:
        shape = x.shape if x.ndim > 2 else (*tokens.shape, x.shape[-1])
        found[name] = x.reshape(shape).astype(jnp.float32)

    with nn.intercept_methods(keep):
        found["logits"] = model.apply(config, params, tokens, cache)[0]
    return found


_activations = jax.jit(activations, static_argnames="config")


@numerics.standard()
def load(
    run_dir: str | Path,
    checkpoint: str | int = "best",
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    sharded: bool = False,
) -> Run:
    """A run that was trained or imported.

    Args:
        run_dir: its folder; nothing else is needed. gs://BUCKET/PATH too.
        checkpoint: "best" (lowest validation loss), "latest", or a step.
        dtype: compute precision; auto: the run's own.
        sharded: share the weights out over all devices, where one cannot hold them.

    Raises:
        UserError: there is no such run or checkpoint, or none that is whole.
    """
    name = str(run_dir)
    targets = get_strategy("fsdp").targets if sharded else on_one_device
    loaded = run_metadata.load_checkpoint(files.path(name), str(checkpoint), targets)
    metadata = loaded.metadata
    config = loaded.model
    config = setup.resolve_dtype(config if dtype == "auto" else config.replace(dtype=dtype))
    tokenizer = tokenizers.from_json(metadata.tokenizer, name)
    return Run(
        config, loaded.params, tokenizer, loaded.step, metadata.config, metadata.data_fingerprint
    )


@numerics.standard()
def untrained(config: TrainConfig) -> Run:
    """A model with the weights that training would begin with, and its tokenizer.

    Raises:
        UserError: there is no text to make a tokenizer of, or it would begin with another run's
            weights.
    """
    if config.init_from:
        raise UserError(f"it begins with the weights of {config.init_from}; load these instead")
    if config.data.dir:
        tokenizer = token_files.load(files.path(config.data.dir)).tokenizer
    else:
        tokenizer = prepare.make_tokenizer(config.data)
    shape = config.model.replace(vocab_size=config.model.vocab_size or tokenizer.n_vocab)
    shape = setup.resolve_dtype(shape)
    params = model.init(shape, train_step.random_key(config.seed))
    return Run(shape, params, tokenizer, experiment=config)


@numerics.standard()
def from_pretrained(name: str) -> Run:
    """A GPT-2 that another program wrote: a folder in Hugging Face's format, nanoGPT's ckpt.pt, or
    a name on the Hugging Face Hub such as "gpt2". Nothing is written.

    Raises:
        UserError: it cannot be read, or is not a GPT-2 that can be computed exactly.
    """
    from gptjax.interop import convert  # as in `save_pretrained`

    weights, tokenizer = convert.read_pretrained(name, optimizer=False)
    params = jax.tree.map(jnp.asarray, weights.params)
    config = setup.resolve_dtype(weights.config.model)
    return Run(config, params, tokenizer, weights.step, weights.config)


@numerics.standard()
def train(
    config: TrainConfig,
    run_dir: str | Path,
    *,
    runtime: RuntimeConfig = RuntimeConfig(),
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], int] = lambda: 0,
) -> Run:
    """Train in `run_dir`, from the start or from where the run was left, and load its best weights.

    Args:
        callbacks: how to listen; `gptjax.MetricsLog()` writes metrics.jsonl, and
            `gptjax.ProgressDisplay()` prints progress.
        stop: asked between steps; a number other than 0 stops and saves.

    Raises:
        UserError: something about the settings, the data or the run directory is not as it must be.
        RunError: what was begun cannot be finished, or was stopped before the first step.
    """
    runtime = runtime.replace(run_dir=str(run_dir), dry_run=False)
    config, tokenizer = resume.adopt_weights(config, str(run_dir))
    trainer = launch.train(config, runtime, tokenizer=tokenizer, callbacks=callbacks, stop=stop)
    if trainer and trainer.checkpoints.latest_step is None:
        raise RunError(f"{run_dir} was stopped before the first step; there is nothing to load")
    return load(run_dir)
