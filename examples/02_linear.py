# %% [markdown]
# # 2. Embedding and linear layer
#
# **Idea:** give each letter a vector of C numbers that is learned, and let a linear layer make
# the V logits of it.
#
# **In a tutorial:** "Output Embedding" (`token_embedding_table`), "Linear" (`fc`).
#
# Rung 1 had a row of V logits for each letter. Here each letter gets C numbers first, its
# embedding: a place where the network can keep what it knows of a letter. All later rungs work on
# these vectors. At the end a linear layer turns them into logits.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ladder import batch_at, characters, encode, text, train, vocab_size

# %% [markdown]
# ## An embedding is a table, and a lookup is a matrix product
#
# Four letters with two numbers each, so C = 2. "Hello" is 0, 1, 2, 2, 3:

# %%
table = jnp.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])  # [V, C]
hello = jnp.array([0, 1, 2, 2, 3])  # [T]
print("looked up, [T, C]:\n", table[hello])
one_hot = jax.nn.one_hot(hello, 4)  # [T, V]: a 1 at the letter's id
print("the same as a product, [T, V] times [V, C]:", jnp.array_equal(one_hot @ table, table[hello]))

# %% [markdown]
# A linear layer is a product too: y = x W + b, with W of shape [C, V]. It takes the C numbers of
# one letter, whatever axes stand before: [B, T, C] becomes [B, T, V].
#
# To begin with, W gets random numbers with standard deviation 1/sqrt(C), and b zeros. Each y is a
# sum of C products, and a sum of C random numbers is about sqrt(C) times as large as one of them.
# So y is about as large as x: nothing grows or shrinks on its way through the layer.


# %%
def new_linear(key, inputs, outputs):
    return {
        "kernel": jax.random.normal(key, (inputs, outputs)) / inputs**0.5,
        "bias": jnp.zeros(outputs),
    }


def linear(params, x):
    """[..., inputs] -> [..., outputs]."""
    return x @ params["kernel"] + params["bias"]


x = jax.random.normal(jax.random.key(0), (1000, 64))
y = linear(new_linear(jax.random.key(1), 64, 65), x)
print(x.shape, "->", y.shape, f"standard deviation {x.std():.2f} -> {y.std():.2f}")

# %% [markdown]
# ## The model
#
# In PyTorch one would write `nn.Embedding(vocab_size, n_embd)` and `nn.Linear(n_embd,
# vocab_size)` in a class. Here the same two things are a dictionary of arrays and a function. JAX
# draws random numbers only with a key: the same key gives the same numbers, and `split` makes new
# keys of one.


# %%
def init(key, n_embd):
    keys = jax.random.split(key, 2)
    return {
        "token_embedding": jax.random.normal(keys[0], (vocab_size, n_embd)),
        "fc": new_linear(keys[1], n_embd, vocab_size),
    }


def apply(params, inputs):
    """inputs [B, T] -> logits [B, T, V]."""
    x = params["token_embedding"][inputs]  # [B, T, C]
    return linear(params["fc"], x)  # [B, T, V]


inputs, targets = batch_at(0)
params = init(jax.random.key(0), n_embd=64)
print("inputs", inputs.shape, "-> logits", apply(params, inputs).shape)

# %% [markdown]
# ## Two numbers a letter
#
# First with C = 2, which can be drawn. Letters that are followed by the same letters can share a
# direction; those with different ones must not. (With so few numbers a higher learning rate than
# the usual 0.01 ends lower: at 2.78 instead of 2.86.)

# %%
small = train(apply, init(jax.random.key(0), n_embd=2), learning_rate=0.03)

# %%
shown = [c for c in characters if c.isalpha()]
places = np.array(small["token_embedding"])[encode("".join(shown))]
for _ in range(100):  # letters that would be printed over each other step apart
    apart = places[:, None] - places
    distance = np.linalg.norm(apart, axis=-1, keepdims=True) + 1e-9
    places += (apart / distance * np.clip(0.2 - distance, 0, None)).sum(axis=1) / 4

figure, axes = plt.subplots(figsize=(7, 7))
for c, (x, y) in zip(shown, places, strict=True):
    colour = "tab:red" if c in "aeiou" else "tab:blue" if c.islower() else "tab:gray"
    axes.text(x, y, c, color=colour, ha="center", va="center")
axes.set(xlim=(places[:, 0].min() - 0.5, places[:, 0].max() + 0.5))
axes.set(ylim=(places[:, 1].min() - 0.5, places[:, 1].max() + 0.5))
axes.set(xlabel="first number", ylabel="second number", title="C = 2: red vowels, grey capitals")
plt.show()

# %% [markdown]
# Nobody told the network what a vowel is. Vowels lie together because the same letters follow
# them, and capitals lie together too. In larger models words that mean nearly the same come to
# lie close to each other, "cat" beside "kitten", for the same reason.
#
# And q? It is always followed by u, as no vowel is. But two numbers are too few to say so:

# %%
print(f"q is followed by u {text.count('qu')} times of {text.count('q')}")


def u_after(params, letters):
    """The probability of u after each of the letters, on average."""
    probabilities = jax.nn.softmax(apply(params, jnp.array([encode(letters)])))
    return probabilities[0, :, encode("u")[0]].mean()


for letters in ("q", "aeiou", "bcdfghjklmnprstvwxyz"):
    print(f"u after one of {letters}: {u_after(small, letters):.2f}")

# %% [markdown]
# Among the vowels u is twice as likely as among the consonants, and that is why q lies there.
#
# ## 64 numbers a letter

# %%
params = train(apply, params)
print(f"u after q: {u_after(params, 'q'):.2f}")

# %% [markdown]
# The loss is that of rung 1, to the second digit. It has to be: the model still sees one letter,
# and the best prediction from one letter is the counted table. Two numbers a letter were too few
# for that table, 64 are enough. But now there is a vector in the middle, where other letters can
# add what they know.
#
# **Exercise.** How many parameters does C = 8 take, and what is the loss? (`train(apply,
# init(jax.random.key(0), n_embd=8))`) *What to expect:* 65 x 8 + 8 x 65 + 65 = 1,105, about a
# quarter of the table of rung 1, with a loss of 2.54, only 0.06 above it.
