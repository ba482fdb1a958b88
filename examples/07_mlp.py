# %% [markdown]
# # 7. The feed-forward network
#
# **Idea:** after letters have looked around, each one thinks about what it found, alone, in a
# layer four times as wide.
#
# **In a tutorial:** "Feed Forward", an "expansion and contraction" network.
#
# Attention only averages. Whatever it collects is a weighted sum of values, and sums cannot say
# "if the last letters are q and u, then ...". The feed-forward network (or MLP, multi-layer
# perceptron) can: a linear layer from C to 4 C numbers, a bend, and a linear layer back from 4 C
# to C.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ladder import batch_at, block_size, train, vocab_size

np.set_printoptions(precision=4, floatmode="fixed", suppress=True)

# %% [markdown]
# ## The bend
#
# Without a bend between them two linear layers would be one: (x A) B = x (A B). ReLU is the
# simplest bend: negative numbers become 0. GPT-2 takes [GELU](https://arxiv.org/abs/1606.08415),
# which is ReLU with a round corner: x times the probability that a normally distributed number is
# below x. By hand: below 0 lies half of the numbers, but 0 times a half is 0; below 1 lie 84.1 %,
# so GELU(1) = 0.841; below -1 lie 15.9 %, so GELU(-1) = -0.159. (GPT-2 computes it by a formula
# with tanh that is at most 0.0005 off, and so does `jax.nn.gelu`.)

# %%
x = jnp.array([-3.0, -1.0, 0.0, 1.0, 3.0])
print("ReLU", jax.nn.relu(x))
print("GELU", jax.nn.gelu(x))
figure, axes = plt.subplots(figsize=(4, 2.5))
grid = jnp.linspace(-3, 3, 200)
axes.plot(grid, jax.nn.relu(grid), label="ReLU")
axes.plot(grid, jax.nn.gelu(grid), label="GELU")
axes.legend()
plt.show()

# %% [markdown]
# What a bend can do that a sum cannot: XOR, "one of the two, but not both". By hand, with two
# hidden numbers, relu(a + b) - 2 relu(a + b - 1):

# %%
for a, b in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
    print(a, b, "->", jax.nn.relu(a + b) - 2 * jax.nn.relu(a + b - 1))

# %% [markdown]
# ## The network


# %%
def new_linear(key, inputs, outputs):
    kernel = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def new_mlp(key, n_embd):
    keys = jax.random.split(key, 2)
    return {
        "expand": new_linear(keys[0], n_embd, 4 * n_embd),
        "contract": new_linear(keys[1], 4 * n_embd, n_embd),
    }


def mlp(params, x):
    """[B, T, C] -> [B, T, C]."""
    hidden = jax.nn.gelu(linear(params["expand"], x))  # [B, T, 4 C]
    return linear(params["contract"], hidden)


params = new_mlp(jax.random.key(0), 64)
x = jax.random.normal(jax.random.key(1), (1, 5, 64))
print("hidden", linear(params["expand"], x).shape, "result", mlp(params, x).shape)

# %% [markdown]
# ## The model: attention, then MLP


# %%
n_embd, n_head = 64, 4


def new_attention(key):
    keys = jax.random.split(key, 4)
    names = ("query", "key", "value")
    params = {n: jax.random.normal(k, (n_embd, n_embd)) / n_embd**0.5 for n, k in zip(names, keys)}
    return params | {"projection": new_linear(keys[3], n_embd, n_embd)}


def attention(params, x):
    """[B, T, C] -> [B, T, C]: all heads as on rung 6, and their projection."""
    b, t, c = x.shape
    q, k, v = (
        (x @ params[name]).reshape(b, t, n_head, c // n_head).transpose(0, 2, 1, 3)
        for name in ("query", "key", "value")
    )  # [B, H, T, D] each
    scores = q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5  # [B, H, T, T]
    scores = jnp.where(jnp.tril(jnp.ones((t, t))) == 0, -jnp.inf, scores)
    y = jax.nn.softmax(scores, axis=-1) @ v  # [B, H, T, D]
    return linear(params["projection"], y.transpose(0, 2, 1, 3).reshape(b, t, c))


# %% [markdown]
# What does each of the two do with a letter's neighbours? Change letter 2 of five, and see which
# results change.


# %%
def changed(layer, params):
    before, after = layer(params, x)[0], layer(params, x.at[0, 2].add(1.0))[0]  # [T, C] each
    return [i for i in range(5) if (before[i] != after[i]).any()]


print("through attention:", changed(attention, new_attention(jax.random.key(2))))
print("through the MLP:  ", changed(mlp, params))

# %% [markdown]
# Attention moves information from a letter to those after it, never to those before: their results
# are the same to the last bit. The MLP treats each letter alone; it works on what has arrived.


# %%
def init(key):
    keys = jax.random.split(key, 5)
    return {
        "token_embedding": jax.random.normal(keys[0], (vocab_size, n_embd)),
        "position_embedding": jax.random.normal(keys[1], (block_size, n_embd)),
        "attention": new_attention(keys[2]),
        "mlp": new_mlp(keys[3], n_embd),
        "fc": new_linear(keys[4], n_embd, vocab_size),
    }


def apply(params, inputs):
    """inputs [B, T] -> logits [B, T, V]."""
    t = inputs.shape[1]
    x = params["token_embedding"][inputs] + params["position_embedding"][jnp.arange(t)]
    x = attention(params["attention"], x)  # [B, T, C]
    x = mlp(params["mlp"], x)  # [B, T, C]
    return linear(params["fc"], x)  # [B, T, V]


print("logits", apply(init(jax.random.key(0)), batch_at(0)[0]).shape)

# %%
params = train(apply, init(jax.random.key(0)))

# %% [markdown]
# Better again. Attention and MLP are the two halves of a transformer block. One would now stack
# such pairs, but the next rung shows first that this goes wrong, and then what helps.
#
# **Exercise.** Take the bend out (`hidden = linear(params["expand"], x)`). *What to expect:* 2.22,
# the loss of rung 6, because the two linear layers are one then, and after the projection of rung
# 6 one more linear layer adds nothing.
