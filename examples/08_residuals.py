# %% [markdown]
# # 8. Shortcuts and LayerNorm
#
# **Idea:** let each layer *add* to x instead of replacing it, and give it x in a standard size.
# Only then can networks be deep.
#
# **In a tutorial:** "Add + Norm", "Shortcut Connection", "Layer Normalization".
#
# Why stack blocks? With one attention layer a letter sees what its neighbours are. With two it
# sees what its neighbours have seen. But a stack of the layers so far does not learn. First we
# watch it fail.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from ladder import batch_at, block_size, cross_entropy, generate, train, vocab_size

np.set_printoptions(precision=4, floatmode="fixed", suppress=True)

n_embd, n_head = 64, 4


def new_linear(key, inputs, outputs):
    kernel = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def attention(params, x):
    """[B, T, C] -> [B, T, C], as on rung 7."""
    b, t, c = x.shape
    q, k, v = (
        (x @ params[name]).reshape(b, t, n_head, c // n_head).transpose(0, 2, 1, 3)
        for name in ("query", "key", "value")
    )  # [B, H, T, D] each
    scores = q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5  # [B, H, T, T]
    scores = jnp.where(jnp.tril(jnp.ones((t, t))) == 0, -jnp.inf, scores)
    y = jax.nn.softmax(scores, axis=-1) @ v  # [B, H, T, D]
    return linear(params["projection"], y.transpose(0, 2, 1, 3).reshape(b, t, c))


def mlp(params, x):
    """[B, T, C] -> [B, T, C], as on rung 7."""
    return linear(params["contract"], jax.nn.gelu(linear(params["expand"], x)))


# %% [markdown]
# ## LayerNorm
#
# [LayerNorm](https://arxiv.org/abs/1607.06450) takes the C numbers of one letter, subtracts their
# mean and divides by their standard deviation: then the mean is 0 and the variance is 1. Each
# letter by itself, nothing is mixed. By hand: 1, 2, 3, 4 have the mean 2.5 and the variance (2.25 +
# 0.25 + 0.25 + 2.25) / 4 = 1.25, so 4 becomes 1.5 / 1.118 = 1.342. Then each column gets a scale
# and a bias that are learned; they begin as 1 and 0. (The small number guards against a division by
# 0; it is GPT-2's.)


# %%
def new_norm():
    return {"scale": jnp.ones(n_embd), "bias": jnp.zeros(n_embd)}


def normalise(x):
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5)


def layer_norm(params, x):
    """[..., C] -> [..., C]."""
    return params["scale"] * normalise(x) + params["bias"]


rows = jnp.array([[1.0, 2.0, 3.0, 4.0], [100.0, 200.0, 300.0, 400.0]])
print(normalise(rows))

# %% [markdown]
# Both rows become the same: LayerNorm keeps the pattern and drops the size.
#
# ## Three ways to stack
#
# - plain: `x = mlp(attention(x))`
# - with shortcuts ([residual connections](https://arxiv.org/abs/1512.03385)): `x = x +
#   attention(x)`, then `x = x + mlp(x)`
# - with shortcuts and LayerNorm: `x = x + attention(norm(x))`, then `x = x + mlp(norm(x))`


# %%
def new_block(key):
    keys = jax.random.split(key, 6)
    names = ("query", "key", "value")
    heads = {n: jax.random.normal(k, (n_embd, n_embd)) / n_embd**0.5 for n, k in zip(names, keys)}
    return {
        "norm_1": new_norm(),
        "attention": heads | {"projection": new_linear(keys[3], n_embd, n_embd)},
        "norm_2": new_norm(),
        "mlp": {
            "expand": new_linear(keys[4], n_embd, 4 * n_embd),
            "contract": new_linear(keys[5], 4 * n_embd, n_embd),
        },
    }


def plain(params, x):
    return mlp(params["mlp"], attention(params["attention"], x))


def shortcuts(params, x):
    x = x + attention(params["attention"], x)
    return x + mlp(params["mlp"], x)


def block(params, x):
    x = x + attention(params["attention"], layer_norm(params["norm_1"], x))
    return x + mlp(params["mlp"], layer_norm(params["norm_2"], x))


def init(key, n_layer):
    keys = jax.random.split(key, n_layer + 3)
    return {
        "token_embedding": jax.random.normal(keys[0], (vocab_size, n_embd)),
        "position_embedding": jax.random.normal(keys[1], (block_size, n_embd)),
        "blocks": [new_block(key) for key in keys[3:]],
        "norm": new_norm(),
        "fc": new_linear(keys[2], n_embd, vocab_size),
    }


def stream(one_block, params, inputs):
    """inputs [B, T] -> [B, T, C], what comes out of the last block."""
    x = params["token_embedding"][inputs] + params["position_embedding"][: inputs.shape[1]]
    for layer in params["blocks"]:
        x = one_block(layer, x)
    return x


def apply_plain(params, inputs):
    """inputs [B, T] -> logits [B, T, V], as the two below."""
    return linear(params["fc"], stream(plain, params, inputs))


def apply_shortcuts(params, inputs):
    return linear(params["fc"], stream(shortcuts, params, inputs))


def apply(params, inputs):
    return linear(params["fc"], layer_norm(params["norm"], stream(block, params, inputs)))


kinds = {
    "plain": (plain, apply_plain),
    "shortcuts": (shortcuts, apply_shortcuts),
    "shortcuts and LayerNorm": (block, apply),
}

# %% [markdown]
# ## What arrives, in both directions
#
# Six blocks, fresh from `init`. Forwards: how large is x after the last block? Backwards: how
# large is the gradient of the first block's queries? If it is nearly 0, the first block learns
# nothing, whatever the optimizer does.

# %%
fresh = init(jax.random.key(0), n_layer=6)
inputs, targets = batch_at(0)
for name, (one_block, function) in kinds.items():
    size = stream(one_block, fresh, inputs).std()
    gradients = jax.jit(jax.grad(lambda p, f=function: cross_entropy(f(p, inputs), targets)))(fresh)
    first = gradients["blocks"][0]["attention"]["query"].std()
    print(f"{name:23}  x after 6 blocks {size:.1e}   first block's gradient {first:.1e}")

# %% [markdown]
# Plain blocks make x smaller and smaller: each attention averages, each GELU drops most of what is
# negative; and the gradient on its way back is multiplied by all of that again. It vanishes. A
# shortcut is a sum, and the gradient of a sum passes through unchanged: from the loss to the first
# block there is a way that no layer can block. But what is added up grows with depth, and so does
# the gradient; LayerNorm gives each layer its input in the standard size.
#
# ## Training them

# %% tags=["numbers-vary"]
for name, (_, function) in kinds.items():
    print(name)
    train(function, init(jax.random.key(0), n_layer=6), steps=100)

# %% [markdown]
# 3.34 nats is what one gets from the letters' frequencies alone, whatever came before: six plain
# blocks have learned hardly more than `fc`'s bias. With shortcuts alone the numbers are so large
# that training goes astray. The same blocks with shortcuts and LayerNorm learn at once.
#
# ## The model of this rung
#
# Two blocks of the last kind, for 1000 steps as on all rungs.

# %%
params = train(apply, init(jax.random.key(0), n_layer=2))

# %% tags=["text-varies"]
print(generate(apply, params, "ROMEO:", 200))

# %% [markdown]
# Better again, and this stack can be made deeper. One may read x as a stream, [B, T, C], that
# runs from the embedding to the logits; every layer reads from it and adds to it. GPT-2
# normalises before each layer, as here ("pre-norm"). The original picture normalises after the
# sum ("Add & Norm"); that lies in the way of the gradient again, and deep stacks need care.
#
# **Exercise.** Move LayerNorm after the sum, as in the picture: in `block`, `x =
# layer_norm(norm_1, x + attention(x))`, and the same for the MLP. Train two blocks for 1000 steps
# and six for 100. *What to expect:* two blocks learn no worse for it, 1.88. Six end at 3.34, the
# letters' frequencies again: the stack has hardly begun to learn.
