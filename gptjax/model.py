"""The GPT as pure functions: `init(config, key)` and `apply(config, params, tokens)`.

Letters in shape comments:
  B sequences, T tokens of each in this call, N = B T, C n_embd, H heads, D head size,
  V vocabulary, L layers.

Parameter names are GPT-2's (wte, wpe, h, ln_1, attn/c_attn, ...); those of the blocks are stacked
along a leading L axis, because one block is compiled and scanned over them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax import flash_attention, head, remat, sharding
from gptjax.attention import attend, attend_in_blocks
from gptjax.cache import Cache, LayerCache, append
from gptjax.config import ModelConfig
from gptjax.layers import INIT_STD, Dropout, Part, activate, compute_dtype, sinusoids
from gptjax.runtime_config import ComputeConfig

Params = Any
"""A nested dict of float32 arrays, as Flax makes it."""


class Call(NamedTuple):
    """What all blocks of one call share."""

    rows: jax.Array
    """int32 [B]: the sequences' numbers in the global batch, on which their dropout depends."""
    start: jax.Array
    """int32 []: position of the first token; those before it are in the cache."""
    positions: jax.Array | None = None
    """int32 [B, T]: each token's position in its document, of which it sees that many tokens before
    itself, and none before; None: the sequence is one."""
    only: jax.Array | None = None
    """int32 []: the one token of the T whose output is wanted; None: all."""


class PerLayer(NamedTuple):
    """What differs from block to block besides parameters."""

    window: jax.Array
    """int32 []: how many tokens back attention looks, the current one included."""
    query_scale: jax.Array
    """float32 []: see `ModelConfig.query_scales`."""


class CausalSelfAttention(Part):
    """Masked multi-head attention ("Attention is all you need", section 3.2)."""

    @nn.compact
    def __call__(
        self, x: jax.Array, call: Call, cache: LayerCache, own: PerLayer
    ) -> tuple[jax.Array, LayerCache]:
        """x [N, C] -> ([N, C], or [B, C] with `call.only`; this layer's cache with the T
        tokens)."""
        config, b = self.config, call.rows.size
        qkv = self.dense("c_attn", 3 * config.n_embd, use_bias=config.use_qkv_bias)(x)
        q, k, v = (
            part.reshape(b, -1, config.n_head, config.head_size).transpose(0, 2, 1, 3)
            for part in jnp.split(checkpoint_name(qkv, "qkv"), 3, axis=-1)
        )  # [B, H, T, D] each
        if {*config.query_scales} != {1.0}:
            q = (q * own.query_scale).astype(q.dtype)
        kernel = self.compute.attention
        reach = own.window if "banded" in config.attention_pattern else None
        documents = None
        if call.positions is not None:
            length = call.positions + 1
            reach = length if reach is None else jnp.minimum(reach, length)
            documents = jnp.arange(length.shape[1]) - call.positions  # where each begins
        if kernel in ("blocks", "cudnn", "splash") and cache is None and call.only is None:
            keys = Dropout(config.dropout, self.train).keys(call.rows)
            if kernel == "blocks":
                y = attend_in_blocks(q, k, v, reach, keys, config.dropout)
            else:
                y = flash_attention.attend(
                    kernel, q, k, v, own.window, config.windows, keys, config.dropout, documents
                )
        else:
            k, v, cache = append(cache, k, v, call.start)
            start = call.start
            if call.only is not None:
                q, start = jax.lax.dynamic_slice_in_dim(q, call.only, 1, 2), start + call.only
            y = attend(q, k, v, start, reach, lambda weights: self.dropout(weights, call.rows))
        y = checkpoint_name(y.transpose(0, 2, 1, 3).reshape(-1, config.n_embd), "attention")
        y = self.dense("c_proj", config.n_embd, use_bias=config.bias, residual=True)(y)
        return self.dropout(y, call.rows), cache


class MLP(Part):
    """Two linear layers with an activation between them, where a token is usually 4 C wide."""

    @nn.compact
    def __call__(self, x: jax.Array, call: Call) -> jax.Array:
        """x [N, C] -> [N, C]."""
        config = self.config
        x = self.dense("c_fc", config.inner_size, use_bias=config.bias)(x)
        x = activate(checkpoint_name(x, "hidden"), config.activation)
        x = self.dense("c_proj", config.n_embd, use_bias=config.bias, residual=True)(x)
        return self.dropout(x, call.rows)


class Block(Part):
    """Pre-LayerNorm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    @nn.compact
    def __call__(
        self, x: jax.Array, call: Call, cache: LayerCache, own: PerLayer
    ) -> tuple[jax.Array, LayerCache]:
        """As `CausalSelfAttention`."""
        parts = (self.config, self.compute, self.train)
        attention = CausalSelfAttention(*parts, name="attn")
        y, cache = attention(self.layer_norm("ln_1")(x), call, cache, own)
        if call.only is not None:
            x = x.reshape(call.rows.size, -1, self.config.n_embd)
            x = jax.lax.dynamic_index_in_dim(x, call.only, axis=1, keepdims=False)
        x = checkpoint_name(x + y, "middle")
        return x + MLP(*parts, name="mlp")(self.layer_norm("ln_2")(x), call), cache


class GPT(Part):
    """GPT-2 (Radford et al. 2019) and GPT-3 (arXiv:2005.14165), by `config`."""

    stacked: bool = True
    """Whether the blocks' parameters are stacked ("h") or apart ("h_0", ...; `decode_layout`)."""
    gather_block: Callable[[Any], Any] | None = None
    """Makes a block's variables whole, where a device has parts of them (`sharding`)."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        cache: Cache | None = None,
        rows: jax.Array | None = None,
        logits_at: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        """See `features`."""
        config = self.config
        assert config.vocab_size is not None, "vocab_size is unknown until a tokenizer is chosen"
        (b, t), dtype = tokens.shape, compute_dtype(config)
        if t > config.block_size:
            raise ValueError(f"{t} tokens do not fit block_size {config.block_size}")
        init = nn.initializers.normal(INIT_STD)
        wte = self.param("wte", init, (config.padded_vocab_size, config.n_embd))
        if config.position == "learned":
            wpe = self.param("wpe", init, (config.block_size, config.n_embd))
        else:
            assert config.position == "sinusoidal", config.position
            wpe = jnp.asarray(sinusoids(config.block_size, config.n_embd))
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        assert positions is None or cache is None, "what is cached is one document"
        call = Call(jnp.arange(b) if rows is None else rows, start, positions)

        at = jax.lax.dynamic_slice_in_dim(wpe, start, t) if positions is None else wpe[positions]
        x = self.dropout((wte[tokens] + at).astype(dtype), call.rows)  # [B, T, C]
        if config.n_layer:
            # XLA's CPU matmuls are much faster on two axes than on three.
            x, cache = self.blocks(x.reshape(b * t, config.n_embd), call, cache, logits_at)
            x = self.layer_norm("ln_f")(x).reshape(b, -1, config.n_embd)
        if logits_at is not None and x.shape[1] > 1:
            x = jax.lax.dynamic_slice_in_dim(x, logits_at, 1, axis=1)
        output = wte
        if not config.tied_head:
            output = self.param("lm_head", init, (config.padded_vocab_size, config.n_embd))
        if cache is not None:
            cache = cache._replace(length=start + t)
        return x, output.astype(dtype), cache

    def blocks(
        self, x: jax.Array, call: Call, cache: Cache | None, logits_at: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        """All blocks, one after the other: x [N, C] -> [N, C] ([B, C] with `logits_at` where the
        blocks are apart: the last one then computes that position only)."""
        config, parts = self.config, (self.config, self.compute, self.train)
        layers: Any = None if cache is None else (cache.keys, cache.values)
        own = PerLayer(jnp.array(config.windows), jnp.array(config.query_scales))
        if not self.stacked:
            filled = []
            for i in range(config.n_layer):
                if i == config.n_layer - 1:
                    call = call._replace(only=logits_at)
                layer = None if layers is None else (layers[0][i], layers[1][i])
                this = PerLayer(own.window[i], own.query_scale[i])
                x, layer = Block(*parts, name=f"h_{i}")(x, call, layer, this)
                filled.append(layer)
            layers = None if layers is None else tuple(zip(*filled, strict=True))
        else:
            block: Any = Block
            compute = remat.resolve(
                self.compute, config.n_layer, loop=self.gather_block is not None
            )
            if self.gather_block:
                block = nn.map_variables(Block, "params", self.gather_block)
            gathers = self.gather_block is not None
            if policy := remat.policy(str(compute.remat), gathers=gathers):
                block = nn.remat(block, prevent_cse=False, policy=policy)
            scan = nn.scan(
                block,
                # So that Flax can capture intermediates.
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0, 0),
                length=config.n_layer,
                unroll=compute.scan_unroll,
            )
            x, layers = scan(*parts, name="h")(x, call, layers, own)
        if cache is not None:
            cache = cache._replace(keys=layers[0], values=layers[1])
        return x, cache


def features(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: Cache | None = None,
    *,
    compute: ComputeConfig = ComputeConfig(),
    dropout_key: jax.Array | None = None,
    rows: jax.Array | None = None,
    logits_at: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Cache | None]:
    """As `apply`, with ([B, T, C], the head's matrix [V or more, C]) in place of their product."""
    gather_block = None
    if sharding.mapped_axes():
        axes = shared_axes(config, params)
        params = {  # those outside the blocks
            name: x if name == "h" else sharding.gather(x, axes[name], jnp.float32)
            for name, x in params.items()
        }
        # Without the leading axis of layers, which is never shared out.
        own = jax.tree.map(lambda axis: max(axis - 1, sharding.WHOLE), axes.get("h"))

        def gather_block(variables: Any) -> Any:
            found = dict(variables["params"])
            return {"params": sharding.gather(found, own, compute_dtype(config))}

    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    gpt = GPT(config, compute, bool(rngs), "h_0" not in params, gather_block)
    return gpt.apply(  # type: ignore
        {"params": params}, tokens, cache, rows, logits_at, positions, rngs=rngs
    )


def apply(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: Cache | None = None,
    **options: Any,
) -> tuple[jax.Array, Cache | None]:
    """Next-token logits after each token.

    Args:
        tokens: int32 [B, T]. They follow the `cache.length` tokens in the cache.
        cache: from `init_cache`, or from the call before; it must have room for the T tokens.
        compute: how to compute it, as `attention.choose` found possible. "auto" is XLA here.
        dropout_key: given in training; the mask follows from it and from `rows`.
        rows: int32 [B]: the sequences' numbers in the global batch; None: 0 ... B - 1.
        logits_at: int32 []; only this position's logits are computed, as [B, 1, V].
        positions: int32 [B, T], where a sequence holds several documents that must not see each
            other: each token's position in its own (`layers.document_positions`). Not with a cache.

    Returns:
        float32 logits [B, T, V]; and the cache with these T tokens, or None without one.

    Raises:
        ValueError: more than block_size tokens.

    With `n_layer` 0 this is an embedding and a linear layer: there is no residual stream to
    normalise, so no final LayerNorm either.
    """
    x, output, cache = features(config, params, tokens, cache, **options)
    return head.logits(x, output, config.vocab_size), cache


def shared_axes(config: ModelConfig, params: Params) -> Any:
    """For each parameter the axis along which it is a part of the whole one (`sharding.axes`)."""
    if not sharding.mapped_axes():
        return jax.tree.map(lambda _: sharding.WHOLE, params)
    whole = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return sharding.axes(params, whole)


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters by GPT-2's initialisation: N(0, 0.02), the projections into the
    residual stream N(0, 0.02 / sqrt(2 L)), biases 0."""
    gpt = GPT(config, ComputeConfig(), train=False)
    return gpt.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
