# %% [markdown]
# # 12. Beside PyTorch, gradient by gradient
#
# **Idea:** two programs that share no line but compute the same numbers are probably both right.
#
# **In a tutorial:** all of its code: `class AttentionHead`, `class Model`, `forward`.
#
# Most tutorials build a GPT in PyTorch. Here such a model stands beside the package's, with the
# same weights: logits, loss, every gradient, and steps of Adam. (It takes PyTorch:
# requirements-torch.txt.)

# %%
import warnings

# A library for downloads looks for widgets of a progress bar, and warns where there are none.
warnings.filterwarnings("ignore", message="IProgress")

# %%
import contextlib
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from ladder import batch_at, block_size, read_text, vocab_size
from torch import nn
from torch.nn import functional as F

import gptjax
from gptjax import train_step
from gptjax.parity import compare

# %% [markdown]
# ## The model of the tutorials
#
# With what their first versions often lack: the division by the square root of the head size, the
# softmax over the last axis (`dim=-1`), a mask cut to T letters, and `self.` before each layer.

# %%
n_layer, n_head, n_embd = 2, 4, 64
head_size = n_embd // n_head


class AttentionHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        k, q, v = self.key(x), self.query(x), self.value(x)  # [B, T, D]
        wei = q @ k.transpose(-2, -1) * head_size**-0.5  # [B, T, T]
        t = x.shape[1]
        wei = wei.masked_fill(self.tril[:t, :t] == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ v


class MultiHeadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([AttentionHead() for _ in range(n_head)])
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x):
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = nn.Linear(n_embd, 4 * n_embd)
        self.contract = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.contract(F.gelu(self.expand(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(n_embd), MultiHeadAttention()
        self.ln2, self.ffwd = nn.LayerNorm(n_embd), FeedForward()

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*[Block() for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.fc = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, input):
        tok_emb = self.token_embedding_table(input)  # [B, T, C]
        pos_emb = self.position_embedding_table(torch.arange(input.shape[1]))  # [T, C]
        return self.fc(self.ln_f(self.blocks(tok_emb + pos_emb)))  # [B, T, V]


# %% [markdown]
# ## The package's model, by its settings
#
# No bias for query, key and value, and a head of its own: that makes it the same network.

# %%
config = gptjax.ModelConfig(
    n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size,
    qkv_bias=False, tied_head=False, dtype="float32",
)  # fmt: skip
# Three times GPT-2's initialisation and some noise, for biases and scales too: so that no error can
# hide in numbers that are 0 or 1.
params = jax.jit(gptjax.init, static_argnums=0)(config, jax.random.key(0))
keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
params = jax.tree.map(lambda x: 3 * x + 0.05 * jax.random.normal(next(keys), x.shape), params)
model = Model()
print("PyTorch", f"{sum(p.numel() for p in model.parameters()):,}", "parameters")
print("gptjax ", f"{config.num_parameters():,}", "parameters")

# %% [markdown]
# ## The same weights
#
# `nn.Linear` keeps its matrix as [outputs, inputs], Flax as [inputs, outputs]: hence the `.T`.
# And the columns of `c_attn`, [C, 3 C], hold the queries of all heads, then the keys, then the
# values.


# %%
def for_torch(params):
    """The package's parameters (or their gradients), by the names of the class above."""
    found = {
        "token_embedding_table.weight": params["wte"],
        "position_embedding_table.weight": params["wpe"],
        "ln_f.weight": params["ln_f"]["scale"],
        "ln_f.bias": params["ln_f"]["bias"],
        "fc.weight": params["lm_head"],
    }
    for i in range(n_layer):
        layer, block = jax.tree.map(lambda x, i=i: x[i], params["h"]), f"blocks.{i}."
        three = jnp.split(layer["attn"]["c_attn"]["kernel"], 3, axis=1)  # [C, C] each
        for name, matrix in zip(("query", "key", "value"), three):
            for h, columns in enumerate(jnp.split(matrix, n_head, axis=1)):  # [C, D]
                found[f"{block}attention.heads.{h}.{name}.weight"] = columns.T
        linears = {
            "attention.proj": layer["attn"]["c_proj"],
            "ffwd.expand": layer["mlp"]["c_fc"],
            "ffwd.contract": layer["mlp"]["c_proj"],
        }
        for name, linear in linears.items():
            found[f"{block}{name}.weight"] = linear["kernel"].T
            found[f"{block}{name}.bias"] = linear["bias"]
        for name in ("1", "2"):
            found[f"{block}ln{name}.weight"] = layer[f"ln_{name}"]["scale"]
            found[f"{block}ln{name}.bias"] = layer[f"ln_{name}"]["bias"]
    return {name: np.array(x) for name, x in found.items()}


weights = {name: torch.from_numpy(x) for name, x in for_torch(params).items()}
print(model.load_state_dict(weights, strict=False).unexpected_keys, "were unexpected")

# %% [markdown]
# ## Logits and loss


# %%
def error(ours, theirs):
    """The size of the difference, relative to the size of PyTorch's numbers."""
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


inputs, targets = batch_at(0)
our_logits, _ = gptjax.apply(config, params, jnp.asarray(inputs))
their_logits = model(torch.from_numpy(inputs))
print("logits", our_logits.shape, tuple(their_logits.shape))
print("equal within 1e-5:", bool(error(our_logits, their_logits.detach().numpy()) < 1e-5))

windows = jnp.asarray(np.concatenate([inputs, targets[:, -1:]], axis=1))  # [B, T + 1]
value_and_grad = jax.jit(jax.value_and_grad(lambda p, w: train_step.loss(p, w, config)))
our_loss, our_gradients = value_and_grad(params, windows)
their_loss = F.cross_entropy(their_logits.flatten(0, 1), torch.from_numpy(targets).flatten())
their_loss.backward()
print(f"loss {our_loss:.4f} {their_loss.item():.4f}")

# %% [markdown]
# ## Every gradient
#
# JAX derives a function, PyTorch records a graph and walks it backwards. Here are the relative
# differences (of the four heads of a block only head 0's), from the last layer to the first, as
# the backward pass goes. The logits agree already, so a difference here would come from a wrong
# derivative, and begin in the list at the layer whose derivative it is, or just after it.

# %% tags=["numbers-vary"]
gradients = for_torch(our_gradients)
errors = {
    name: error(gradients[name], parameter.grad.numpy())
    for name, parameter in reversed(list(model.named_parameters()))
}
for name, size in errors.items():
    if ".heads." not in name or ".heads.0." in name:
        print(f"{name:40} {size:.0e}")

# %%
print(f"{len(errors)} gradients, equal within 1e-4:", all(size < 1e-4 for size in errors.values()))

# %% [markdown]
# ## Training side by side
#
# Thirty steps of Adam, ours by optax, theirs by `torch.optim.Adam`.

# %%
optimizer, torch_optimizer = optax.adam(1e-3), torch.optim.Adam(model.parameters(), lr=1e-3)


@jax.jit
def update(params, state, windows):
    loss, gradients = jax.value_and_grad(lambda p: train_step.loss(p, windows, config))(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, loss


state, furthest = optimizer.init(params), 0.0
for step in range(30):
    inputs, targets = batch_at(step)
    windows = np.concatenate([inputs, targets[:, -1:]], axis=1)
    params, state, our_loss = update(params, state, windows)
    logits = model(torch.from_numpy(inputs))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    torch_optimizer.zero_grad()
    loss.backward()
    torch_optimizer.step()
    furthest = max(furthest, abs(float(our_loss) - loss.item()))
    if step % 10 == 0 or step == 29:
        print(f"step {step:2}: gptjax {our_loss:.4f}, PyTorch {loss.item():.4f}")
print("all losses equal within 1e-3:", furthest < 1e-3)

# %% [markdown]
# ## The same, as a command
#
# `gptjax compare RUN` does this for any run, beside Hugging Face's GPT-2 or a plain PyTorch one:
# activations, logits, gradients, the optimizer's steps, greedy text, training. Here from Python,
# for a run of a few steps.

# %% tags=["text-varies"]
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    Path("text.txt").write_text(read_text())
    experiment = gptjax.TrainConfig(
        model=config,
        data=gptjax.DataConfig(source="text.txt"),
        batch_size=8,
        max_steps=20,
    )
    runtime = gptjax.RuntimeConfig(eval_interval=20, eval_batches=2, sample_tokens=0)
    gptjax.train(experiment, "run", runtime=runtime)
    comparison = compare.open_comparison(
        Path("run"), against="nanogpt-style", steps=20, greedy_tokens=100
    )
    rows = comparison.run()
print("\n".join(compare.table(rows)))

# %%
print(compare.verdict(rows))

# %% [markdown]
# **Exercise.** Take the division by the square root of the head size out of `AttentionHead`.
# *What to expect:* logits, loss (5.95 instead of 6.04) and all gradients differ, but all shapes
# are still right and the model would train: no error message would have told you. That is what
# such a comparison is for. (And the first gradient that differs says nothing now: where the
# forward pass is wrong, all of them are.)
