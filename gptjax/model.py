"""The GPT as pure functions: `apply(config, params, tokens, ...) -> (logits, cache)`.

Letters in shape comments:
  B batch, T tokens of this call, S cache slots, N = B * T, C n_embd, H heads, D head size,
  V vocabulary, L layers.

Parameter names are GPT-2's (wte, wpe, h, ln_1, attn/c_attn, ...); those of the blocks are stacked
along a leading L axis.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig

INIT_STD = 0.02
LAYER_NORM_EPSILON = 1e-5  # GPT-2's and torch's; linen's default is 1e-6
MASKED = -1e30  # finite, so that no row of masked scores turns into NaN


Params = Any
"""A nested dict of float32 arrays, as Flax makes it."""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far."""

    k: jax.Array
    """[L, B, H, S, D]"""
    v: jax.Array
    """[L, B, H, S, D]"""
    length: jax.Array
    """int32 []: how many of the S slots hold tokens."""


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache for `batch` sequences of at most `slots` tokens."""
    shape = (config.n_layer, batch, config.n_head, slots, config.head_size)
    dtype = compute_dtype(config)
    # Two arrays, not one twice: both can be donated.
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


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


def _dense(config: ModelConfig, features: int, use_bias: bool, std: float, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=compute_dtype(config),
        kernel_init=nn.initializers.normal(std),
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


class CausalSelfAttention(nn.Module):
    """Masked multi-head attention ("Attention is all you need", section 3.2)."""

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, batch: int, cache: Cache | None, layer: jax.Array, window: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        """x [N, C] -> ([N, C], the cache with this call's keys and values written).

        `window` []: how many tokens back this layer looks, itself included.
        """
        config = self.config
        qkv = _dense(config, 3 * config.n_embd, config.use_qkv_bias, INIT_STD, "c_attn")(x)
        # [N, 3C] -> 3 x [B, H, T, D]
        qkv = qkv.reshape(batch, -1, 3, config.n_head, config.head_size)
        kernel, _ = attention_kernel(config, train=self.train)
        if kernel == "cudnn" and cache is None:
            q, k, v = (qkv[:, :, i] for i in range(3))
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        else:
            q, k, v = qkv.transpose(2, 0, 3, 1, 4)
            start = jnp.zeros((), jnp.int32)
            if cache is not None:
                start = cache.length
                at = (layer, 0, 0, start, 0)
                cache = cache._replace(
                    k=jax.lax.dynamic_update_slice(cache.k, k[None], at),
                    v=jax.lax.dynamic_update_slice(cache.v, v[None], at),
                )
                k = jax.lax.dynamic_index_in_dim(cache.k, layer, keepdims=False)
                v = jax.lax.dynamic_index_in_dim(cache.v, layer, keepdims=False)
            y = self._attend(q, k, v, start, window).transpose(0, 2, 1, 3)
        y = y.reshape(x.shape)
        y = _dense(config, config.n_embd, config.bias, _residual_std(config), "c_proj")(y)
        return nn.Dropout(config.dropout, deterministic=not self.train)(y), cache

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, window: jax.Array
    ) -> jax.Array:
        """q [B, H, T, D], k and v [B, H, S, D] -> [B, H, T, D]; q's first position is `start`."""
        scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
        scores *= 1 / math.sqrt(q.shape[-1])
        # How far back each key lies. Unwritten cache slots lie ahead, so they are masked too.
        back = (start + jnp.arange(q.shape[2]))[:, None] - jnp.arange(k.shape[2])
        visible = back >= 0
        if "banded" in self.config.attention_pattern:
            visible &= back < window
        weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1).astype(v.dtype)
        weights = nn.Dropout(self.config.dropout, deterministic=not self.train)(weights)
        return jnp.einsum("bhts,bhsd->bhtd", weights, v)


class MLP(nn.Module):
    """Two linear layers, 4 C wide between them, with GELU (arXiv:1606.08415)."""

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, C] -> [N, C]."""
        config = self.config
        x = _dense(config, 4 * config.n_embd, config.bias, INIT_STD, "c_fc")(x)
        x = jax.nn.gelu(x, approximate=config.gelu == "tanh")
        x = _dense(config, config.n_embd, config.bias, _residual_std(config), "c_proj")(x)
        return nn.Dropout(config.dropout, deterministic=not self.train)(x)


class Block(nn.Module):
    """Pre-LayerNorm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    train: bool
    batch: int

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], per_layer: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        """carry: x [N, C] and the whole cache, updated in place by XLA; per_layer: (index,
        window)."""
        x, cache = carry
        y = _layer_norm(self.config, "ln_1")(x)
        y, cache = CausalSelfAttention(self.config, self.train, name="attn")(
            y, self.batch, cache, *per_layer
        )
        x = x + y
        y = _layer_norm(self.config, "ln_2")(x)
        x = x + MLP(self.config, self.train, name="mlp")(y)
        return (x, cache), None


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) and GPT-3 (arXiv:2005.14165), by `config`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        cache: Cache | None = None,
        *,
        logits_at: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """Next-token logits after each token.

        Args:
            tokens: int32 [B, T]. They follow the `cache.length` tokens in the cache.
            cache: from `init_cache`, or from the call before; at most S tokens in all.
            logits_at: int32 []; only this position's logits are computed, as [B, 1, V].
            train: with dropout, from the "dropout" rng.

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
        x = wte[tokens] + jax.lax.dynamic_slice_in_dim(wpe, start, t)  # [B, T, C]
        x = x.astype(compute_dtype(config))
        x = nn.Dropout(config.dropout, deterministic=not train)(x)

        if config.n_layer:
            # Flat [N, C] through the blocks: XLA's CPU matmuls are much faster on two axes.
            x = x.reshape(b * t, config.n_embd)
            block = nn.remat(Block, prevent_cse=False) if config.remat else Block
            # Remat frees nothing in straight-line code: XLA needs the loop.
            loops = config.remat or config.n_layer > 12
            unroll = config.scan_unroll or (1 if loops else config.n_layer)
            blocks = nn.scan(
                block,
                # Intermediates are there for who asks Flax to capture them.
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=config.n_layer,
                unroll=unroll,
            )(config, train, b, name="h")
            per_layer = (jnp.arange(config.n_layer), jnp.array(config.windows))
            (x, cache), _ = blocks((x, cache), per_layer)
            x = _layer_norm(config, "ln_f")(x).reshape(b, t, config.n_embd)
        if logits_at is not None:
            x = jax.lax.dynamic_slice_in_dim(x, logits_at, 1, axis=1)

        head = wte
        if not config.tied_head:
            head = self.param("lm_head", init, (config.padded_vocab_size, config.n_embd))
        x = x.reshape(-1, config.n_embd)
        logits = jnp.einsum(
            "nc,vc->nv", x, head.astype(x.dtype), preferred_element_type=jnp.float32
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
) -> tuple[jax.Array, Any]:
    """`GPT.__call__` as a function of its parameters; with `dropout_key`, in training."""
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    return GPT(config).apply(
        {"params": params}, tokens, cache, logits_at=logits_at, train=bool(rngs), rngs=rngs
    )


def init_params(config: ModelConfig, seed: int) -> Params:
    """Fresh parameters: GPT-2's initialisation."""
    key = jax.random.key(seed, impl="threefry2x32")
    return GPT(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
