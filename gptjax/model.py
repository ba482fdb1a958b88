"""The GPT as pure functions: `apply(config, params, tokens, ...) -> (logits, cache)`.

Letters in shape comments:
  B batch, T tokens of this call, S cache slots, N = B * T, C n_embd, H heads, D head size,
  V vocabulary, L layers.

Parameter names are GPT-2's (wte, wpe, h, ln_1, attn/c_attn, ...); those of the blocks are stacked
along a leading L axis.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gptjax.config import ModelConfig

INIT_STD = 0.02
LAYER_NORM_EPSILON = 1e-5  # GPT-2's and torch's; linen's default is 1e-6
SHARDS = "shards"
"""The mesh axis over which `parallel.Fsdp` shares out weights and sequences."""
MASKED = -1e30  # finite, so that no row of masked scores turns into NaN


Params = Any
"""A nested dict of float32 arrays, as Flax makes it."""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far."""

    k: Any
    """[L, B H, S, D]; a tuple of L [B H, S, D] for unstacked parameters. B and H are one axis,
    because that is what XLA makes of two, writing every new key and value twice for it."""
    v: Any
    """As `k`."""
    length: jax.Array
    """int32 []: how many of the S slots hold tokens."""


def init_cache(config: ModelConfig, batch: int, slots: int, *, stacked: bool = True) -> Cache:
    """An empty cache for `batch` sequences of at most `slots` tokens."""
    shape = (batch * config.n_head, slots, config.head_size)

    def empty() -> Any:
        if stacked:
            return jnp.zeros((config.n_layer, *shape), compute_dtype(config))
        return tuple(jnp.zeros(shape, compute_dtype(config)) for _ in range(config.n_layer))

    return Cache(empty(), empty(), jnp.zeros((), jnp.int32))


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The precision of activations; "auto" asks which device JAX runs on."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def attention_kernel(config: ModelConfig, *, train: bool) -> tuple[str, str]:
    """(kernel, why): "cudnn", flash attention, where it computes this model; else "xla"."""
    if config.attention == "xla":
        return "xla", "asked for"
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and "rocm" not in device.client.platform_version.lower()
    ampere = nvidia and float(device.compute_capability) >= 8.0
    obstacles = [
        (not nvidia, "cuDNN needs an NVIDIA GPU"),
        (nvidia and not ampere, "cuDNN needs compute capability 8.0"),
        (compute_dtype(config) == jnp.float32, "cuDNN needs bfloat16"),
        (config.head_size > 128 or config.head_size % 8 != 0, "cuDNN needs head size 8k <= 128"),
        (train and config.dropout > 0, "attention dropout"),
        ("banded" in config.attention_pattern, "banded layers share one compiled block"),
    ]
    reasons = [reason for applies, reason in obstacles if applies]
    if reasons:
        return "xla", ", ".join(reasons)
    return "cudnn", "flash attention"


def sinusoids(block_size: int, n_embd: int) -> np.ndarray:
    """float32 [block_size, n_embd]: the fixed position embedding of "Attention is all you need"
    (arXiv:1706.03762, section 3.5); sine in even columns, cosine in odd ones."""
    position = np.arange(block_size)[:, None]
    angle = position / 10000.0 ** (np.arange(0, n_embd, 2) / n_embd)
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(block_size, n_embd).astype("f4")


def _is_sharded() -> bool:
    """Whether this is traced for `parallel.Fsdp`: it sets a mesh. Elsewhere every device has its
    own model, and nothing is to be said about where arrays lie."""
    return SHARDS in jax.sharding.get_abstract_mesh().axis_names


def _whole(weights: jax.Array) -> jax.Array:
    """Weights at their use: of their shares, put together for this use only."""
    return jax.lax.with_sharding_constraint(weights, PartitionSpec()) if _is_sharded() else weights


def _by_sequence(x: jax.Array) -> jax.Array:
    """Activations [N, ...] or [B, ...] stay with the devices that have their sequences. (Left to
    itself XLA moves them to the shares of the weights, and they are larger.)"""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(SHARDS)) if _is_sharded() else x


def _saves_no_whole_weights(operation: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: the backward pass puts weights together again."""
    return operation.name not in ("sharding_constraint", "convert_element_type")


def _matmul(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return jax.lax.dot_general(x, _whole(kernel), *args, **kwargs)


def _dense(config: ModelConfig, features: int, use_bias: bool, std: float, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=compute_dtype(config),
        kernel_init=nn.initializers.normal(std),
        dot_general=_matmul,
        name=name,
    )


def _layer_norm(config: ModelConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=LAYER_NORM_EPSILON,
        use_bias=config.bias,
        # Two passes: E[x^2] - E[x]^2 loses digits where the mean is large.
        use_fast_variance=False,
        dtype=compute_dtype(config),
        name=name,
    )


def _residual_std(config: ModelConfig) -> float:
    # GPT-2, section 2.3: the two projections of each block that feed the residual stream are
    # scaled down, so that its variance does not grow with depth.
    return INIT_STD / math.sqrt(2 * config.n_layer)


def mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser (Appleby 2011) of uint32 numbers: one to one, and every bit of the
    argument acts on every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def hashed_bits(key: jax.Array, size: int) -> jax.Array:
    """uint32 [..., size] random bits for uint32 keys [..., 2]: number i's are a hash of i and the
    key. A few integer operations in the middle of other work; the same on every kind of device.

    JAX's own generators cost a fifth of a training step with dropout on a CPU, and more than the
    network when a small model samples.
    """
    number = jax.lax.iota(jnp.uint32, size)
    return mix(mix(number ^ key[..., :1]) + key[..., 1:])


class Dropout(nn.Module):
    """Zero each number with probability `rate`, scale the others up (Srivastava et al. 2014)."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """x of any shape whose leading axis is, or begins with, the batch; int32 `rows` [B]: the
        numbers of its sequences in the global batch. The mask of a sequence follows from the key
        and its number: it does not matter which device computes it, or in which micro-batch."""
        if self.deterministic or not self.rate:
            return x
        key = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        keys = jnp.stack(
            [jnp.broadcast_to(key[0], rows.shape), mix(rows.astype(jnp.uint32) ^ key[1])]
        )
        bits = hashed_bits(keys.T, x.size // rows.size)
        kept = bits.reshape(x.shape) >= jnp.uint32(self.rate * 2**32)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype))


KeysValues = tuple[jax.Array, jax.Array] | None
"""One layer's part of the cache: [B H, S, D] each."""


class CausalSelfAttention(nn.Module):
    """Masked multi-head attention ("Attention is all you need", section 3.2)."""

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rows: jax.Array,
        start: jax.Array,
        kv: KeysValues,
        window: jax.Array,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """x [N, C] -> ([N, C], the keys and values so far with this call's written from slot
        `start` []); `rows` [B]: for Dropout; `window` []: how many tokens back this layer looks,
        itself included; with `only` [] just this token of the T looks: [B, C]."""
        config, batch = self.config, rows.size
        qkv = _dense(config, 3 * config.n_embd, config.use_qkv_bias, INIT_STD, "c_attn")(x)
        qkv = qkv.reshape(batch, -1, 3, config.n_head, config.head_size)
        kernel, _ = attention_kernel(config, train=self.train)
        if kernel == "cudnn" and kv is None and only is None:
            q, k, v = (qkv[:, :, i] for i in range(3))
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        else:
            # [B, T, 3, H, D] -> 3 x [B H, T, D]
            qkv = qkv.transpose(2, 0, 3, 1, 4)
            q, k, v = qkv.reshape(3, batch * config.n_head, -1, config.head_size)
            if kv is not None:
                k = jax.lax.dynamic_update_slice(kv[0], k, (0, start, 0))
                v = jax.lax.dynamic_update_slice(kv[1], v, (0, start, 0))
                kv = k, v
            if only is not None:
                q, start = jax.lax.dynamic_slice_in_dim(q, only, 1, axis=1), start + only
            y = self._attend(q, k, v, rows, start, window)
            y = y.reshape(batch, config.n_head, -1, config.head_size).transpose(0, 2, 1, 3)
        y = y.reshape(-1, config.n_embd)
        y = _dense(config, config.n_embd, config.bias, _residual_std(config), "c_proj")(y)
        return Dropout(config.dropout, deterministic=not self.train)(y, rows), kv

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rows: jax.Array,
        start: jax.Array,
        window: jax.Array,
    ) -> jax.Array:
        """q [B H, T, D], k and v [B H, S, D] -> [B H, T, D]; q's first position is `start`."""
        scores = jnp.einsum("btd,bsd->bts", q, k, preferred_element_type=jnp.float32)
        scores *= 1 / math.sqrt(q.shape[-1])
        # How far back each key lies. Unwritten cache slots lie ahead, so they are masked too.
        back = (start + jnp.arange(q.shape[1]))[:, None] - jnp.arange(k.shape[1])
        visible = back >= 0
        if "banded" in self.config.attention_pattern:
            visible &= back < window
        weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1).astype(v.dtype)
        weights = Dropout(self.config.dropout, deterministic=not self.train)(weights, rows)
        return jnp.einsum("bts,bsd->btd", weights, v)


def gelu(x: jax.Array, form: Literal["tanh", "erf"]) -> jax.Array:
    """x times the normal distribution function (Hendrycks & Gimpel, arXiv:1606.08415), or GPT-2's
    approximation of it by tanh; computed in float32, as PyTorch does."""
    if form == "tanh":
        return jax.nn.gelu(x, approximate=True)
    # By erf: jax.nn.gelu takes erfc, which on a CPU costs more than the layer's matmul.
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class MLP(nn.Module):
    """Two linear layers, 4 C wide between them, with GELU (arXiv:1606.08415)."""

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """[N, C] -> [N, C]; `rows` [B]: for Dropout."""
        config = self.config
        x = _dense(config, 4 * config.n_embd, config.bias, INIT_STD, "c_fc")(x)
        x = gelu(x, config.gelu)
        x = _dense(config, config.n_embd, config.bias, _residual_std(config), "c_proj")(x)
        return Dropout(config.dropout, deterministic=not self.train)(x, rows)


class Block(nn.Module):
    """Pre-LayerNorm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rows: jax.Array,
        start: jax.Array,
        kv: KeysValues,
        window: jax.Array,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """x [N, C] -> [N, C], or with `only` [B, C]; the rest as for CausalSelfAttention."""
        x = _by_sequence(x)
        y = _layer_norm(self.config, "ln_1")(x)
        y, kv = CausalSelfAttention(self.config, self.train, name="attn")(
            y, rows, start, kv, window, only
        )
        if only is not None:
            x = x.reshape(rows.size, -1, self.config.n_embd)
            x = jax.lax.dynamic_index_in_dim(x, only, axis=1, keepdims=False)
        x = x + y
        y = _layer_norm(self.config, "ln_2")(x)
        return x + MLP(self.config, self.train, name="mlp")(y, rows), kv


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) and GPT-3 (arXiv:2005.14165), by `config`."""

    config: ModelConfig
    stacked: bool = True
    """Whether the blocks' parameters are stacked ("h") or apart ("h_0", ...: `unstack`)."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        cache: Cache | None = None,
        *,
        logits_at: jax.Array | None = None,
        train: bool = False,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Next-token logits after each token.

        Args:
            tokens: int32 [B, T]. They follow the `cache.length` tokens in the cache.
            cache: from `init_cache`, or from the call before; at most S tokens in all.
            logits_at: int32 []; only this position's logits are computed, as [B, 1, V].
            train: with dropout, from the "dropout" rng.
            rows: int32 [B]: the sequences' numbers in the global batch, on which their dropout
                depends; None: 0 ... B - 1.

        Returns:
            float32 logits [B, T, V]; and the cache with these T tokens, or None without one.

        With `n_layer` 0 this is an embedding and a linear layer: there is no residual stream to
        normalise, so no final LayerNorm either.
        """
        config = self.config
        assert config.vocab_size is not None, "vocab_size is unknown until a tokenizer is chosen"
        b, t = tokens.shape
        if t > config.block_size:
            raise ValueError(f"{t} tokens do not fit block_size {config.block_size}")
        init = nn.initializers.normal(INIT_STD)
        wte = self.param("wte", init, (config.padded_vocab_size, config.n_embd))
        if config.position == "learned":
            wpe = self.param("wpe", init, (config.block_size, config.n_embd))
        else:
            wpe = jnp.asarray(sinusoids(config.block_size, config.n_embd))
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        x = _by_sequence(_whole(wte)[tokens]) + jax.lax.dynamic_slice_in_dim(
            wpe, start, t
        )  # [B, T, C]
        x = x.astype(compute_dtype(config))
        rows = jnp.arange(b) if rows is None else rows
        x = Dropout(config.dropout, deterministic=not train)(x, rows)

        if config.n_layer:
            # Flat [N, C] through the blocks: XLA's CPU matmuls are much faster on two axes.
            x = x.reshape(b * t, config.n_embd)
            block = Block
            if config.remat:
                block = nn.remat(Block, prevent_cse=False)
            elif _is_sharded() and train:
                block = nn.remat(Block, prevent_cse=False, policy=_saves_no_whole_weights)
            # Remat frees nothing in straight-line code: XLA needs the loop.
            loops = config.remat or config.n_layer > 12
            unroll = config.scan_unroll or (1 if loops else config.n_layer)
            kv = None if cache is None else (cache.k, cache.v)
            if self.stacked:
                blocks = nn.scan(
                    block,
                    # Intermediates are there for who asks Flax to capture them.
                    variable_axes={"params": 0, "intermediates": 0},
                    split_rngs={"params": True, "dropout": True},
                    in_axes=(nn.broadcast, nn.broadcast, 0, 0),
                    length=config.n_layer,
                    unroll=unroll,
                )(config, train, name="h")
                x, kv = blocks(x, rows, start, kv, jnp.array(config.windows))
            else:
                layers = []
                for i, window in enumerate(config.windows):
                    layer_kv = None if kv is None else (kv[0][i], kv[1][i])
                    layer = block(config, train, name=f"h_{i}")
                    # Of the last block the other tokens' outputs have no use.
                    only = logits_at if i == config.n_layer - 1 else None
                    x, layer_kv = layer(x, rows, start, layer_kv, jnp.array(window), only)
                    layers.append(layer_kv)
                kv = None if kv is None else tuple(zip(*layers, strict=True))
            if cache is not None and kv is not None:
                cache = cache._replace(k=kv[0], v=kv[1])
            x = _layer_norm(config, "ln_f")(_by_sequence(x)).reshape(b, -1, config.n_embd)
        if logits_at is not None and x.shape[1] > 1:
            x = jax.lax.dynamic_slice_in_dim(x, logits_at, 1, axis=1)

        head = wte
        if not config.tied_head:
            head = self.param("lm_head", init, (config.padded_vocab_size, config.n_embd))
        x = x.reshape(-1, config.n_embd)
        logits = jnp.einsum(
            "nc,vc->nv", x, _whole(head.astype(x.dtype)), preferred_element_type=jnp.float32
        )
        logits = logits.reshape(b, -1, head.shape[0])[..., : config.vocab_size]
        if cache is not None:
            cache = cache._replace(length=start + t)
        return logits, cache


def apply(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: Cache | None = None,
    *,
    logits_at: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """`GPT.__call__` as a function of its parameters; with `dropout_key`, in training."""
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    stacked = "h_0" not in params
    return GPT(config, stacked).apply(
        {"params": params}, tokens, cache,
        logits_at=logits_at, train=bool(rngs), rows=rows, rngs=rngs,
    )  # fmt: skip


def init_params(config: ModelConfig, seed: int) -> Params:
    """Fresh parameters: GPT-2's initialisation."""
    key = jax.random.key(seed, impl="threefry2x32")
    return GPT(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


@functools.partial(jax.jit, static_argnames="dtype")
def _apart(x: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    return tuple(layer.astype(dtype) for layer in x)


def unstack(params: Params, config: ModelConfig, *, consume: bool = False) -> Params:
    """The same parameters, made for reading one token after another: the blocks' apart, because XLA
    would copy each one's slice for every token; and matrices in the compute precision, because
    their reading is what takes the time. `consume` frees each given array when it is done with it.
    """
    wanted = compute_dtype(config)
    out: dict[tuple[str, ...], jax.Array] = {}
    for path, x in flax.traverse_util.flatten_dict(params).items():
        # Norms are computed in float32, and so is the sum of the two embeddings.
        wide = path[0] == "wpe" or any(name.startswith("ln_") for name in path)
        dtype = x.dtype if wide else wanted
        if path[0] == "h":
            for i, layer in enumerate(_apart(x, dtype)):
                out[f"h_{i}", *path[1:]] = layer
        else:
            out[path] = x.astype(dtype)
        if consume and (path[0] == "h" or dtype != x.dtype):
            x.delete()
    return flax.traverse_util.unflatten_dict(out)
