# %% [markdown]
# # 14. GPT-2 itself
#
# **Idea:** with GPT-2's shapes and GPT-2's names, GPT-2's weights fit.
#
# **In a tutorial:** "Every effort moves you", 768, 12 heads, 50,257; reproducing GPT-2.
#
# We walk through GPT-2's shapes, step by step, with a real input. The weights are random here, so
# that this notebook needs no download of half a gigabyte; the real ones take one line, which
# stands at the end. (It takes PyTorch and transformers: requirements-torch.txt.)

# %%
import warnings

# A library for downloads looks for widgets of a progress bar, and warns where there are none.
warnings.filterwarnings("ignore", message="IProgress")

# %%
import itertools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import gptjax
from gptjax.data.tokenizers import Gpt2Tokenizer
from gptjax.parity.compare import our_activations

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# %% [markdown]
# ## Tokens
#
# GPT-2's tokens are pieces of words, like those of rung 1. A common word is one token, together
# with the space before it; a rare one is several.

# %%
tokenizer = Gpt2Tokenizer()
texts = ["Every effort moves you", "Every day holds a"]
tokens = np.stack([tokenizer.encode(text) for text in texts])  # [B, T]
print(tokens, tokens.shape)
print([tokenizer.decode([i]) for i in tokens[0].tolist()])
print([tokenizer.decode([i]) for i in tokenizer.encode("Hello World. Unbelievable!").tolist()])

# %% [markdown]
# They are made by byte-pair encoding (BPE): a word begins as single bytes, and two neighbours are
# joined again and again. Ids 0 to 255 are the bytes; each join that was learned, the most frequent
# first, has the next id. In a new word the join with the smallest id is made first. The library
# tiktoken, which the package calls, does the same, only faster:

# %%
ranks = tokenizer.ranks  # bytes of a token -> its id
parts = [bytes([byte]) for byte in b"lowest"]
while True:
    print(b"|".join(parts).decode())
    pairs = [a + b for a, b in itertools.pairwise(parts)]
    joins = [(ranks[pair], at) for at, pair in enumerate(pairs) if pair in ranks]
    if not joins:
        break
    _, at = min(joins)
    parts[at : at + 2] = [pairs[at]]
print("tiktoken agrees:", parts == [tokenizer.pieces[i] for i in tokenizer.encode("lowest")])

# %% [markdown]
# 256 bytes and 50,000 joins have the ids 0 to 50,255. The last id, 50,256, is no text but a mark,
# written `<|endoftext|>`. GPT-2 was trained on web pages one after the other, with this mark
# between them. The package puts it between the documents that you train on (files; or, where one
# file holds many, `data.end_of_text` names the word between them). `generate` stops when the model
# draws it, unless `ignore_end_of_text=True`, and begins with it when the prompt is empty. In a
# prompt the same letters are only letters:

# %%
print("the mark:", tokenizer.eot, tokenizer.decode([tokenizer.eot]))
print("its letters:", [tokenizer.decode([i]) for i in tokenizer.encode("<|endoftext|>").tolist()])

# %% [markdown]
# ## A GPT-2 by Hugging Face, with random weights
#
# GPT-2's smallest size, 768 wide with 12 heads; but 2 blocks instead of 12, to be quick.

# %%
torch.manual_seed(0)
theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2)).eval()
folder = tempfile.TemporaryDirectory()
theirs.save_pretrained(folder.name)
run = gptjax.from_pretrained(folder.name)
print(run)
print(run.config.n_layer, "blocks,", run.config.n_head, "heads, width", run.config.n_embd)

# %% [markdown]
# ## Every shape on the way
#
# The output of each part, for two texts of four tokens, in the package's names: `h.0` is block 0,
# `ln_1` and `ln_2` its two LayerNorms. All but the logits are [2, 4, 768], because attention and
# MLP read the stream and add to it.

# %%
meaning = {
    "drop": "token + position embedding, dropout (off)",
    "ln_1": "layer norm",
    "attn": "masked multi-head attention, projection",
    "ln_2": "layer norm of x + attention",
    "mlp": "feed forward: 768 -> 3072 -> 768",
    "ln_f": "final layer norm",
    "logits": "output head: 768 -> 50257",
}
for name, array in our_activations(run.params, tokens, run.config).items():
    print(f"{name:9} {array.shape!s:14} {meaning.get(name.split('.')[-1], 'output of the block')}")

# %% [markdown]
# Inside the parts are the shapes of rungs 6 and 7. Block 0 by hand, with the package's parameters:

# %%
outputs = our_activations(run.params, tokens, run.config)
block = jax.tree.map(lambda x: x[0], run.params["h"])
attention, mlp = block["attn"], block["mlp"]


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def split(x):
    """[B, T, C] -> [B, H, T, D]."""
    return x.reshape(2, 4, 12, 64).transpose(0, 2, 1, 3)


joined = linear(attention["c_attn"], outputs["h.0.ln_1"])
q, k, v = map(split, jnp.split(joined, 3, axis=-1))
scores = jnp.where(jnp.tril(jnp.ones((4, 4))) == 1, q @ k.mT / 64**0.5, -jnp.inf)
weights = jax.nn.softmax(scores)
found = weights @ v
side_by_side = found.transpose(0, 2, 1, 3).reshape(2, 4, 768)
hidden = jax.nn.gelu(linear(mlp["c_fc"], outputs["h.0.ln_2"]))
for name, array in {
    "q, k and v side by side": joined,
    "q (and k, and v), in 12 heads of 64": q,
    "weights, of each token for each": weights,
    "what each head found": found,
    "heads side by side": side_by_side,
    "inside the MLP": hidden,
}.items():
    print(f"{name:35} {array.shape}")
for part, mine in (
    ("attn", linear(attention["c_proj"], side_by_side)),
    ("mlp", linear(mlp["c_proj"], hidden)),
):
    print(part, "is that of the package:", jnp.allclose(mine, outputs[f"h.0.{part}"], atol=1e-5))

# %% [markdown]
# LayerNorm behaves as on rung 8: over the 768 numbers of a token, mean 0 and variance 1 (its
# scale and bias are still 1 and 0). Or nearly 1: fresh embeddings have a variance of 0.0008,
# beside which the 0.00001 that guards against division by 0 counts a little.

# %%
normalised = outputs["h.0.ln_1"][0, 0]
print(f"mean {abs(normalised.mean()):.3f}, variance {normalised.var():.3f}")

# %% [markdown]
# ## The next token
#
# Each token has a row of 50,257 logits: the row of "Every" scores what may follow "Every", the
# row of " you" what may follow the whole text. The weights are random, so what they say is
# nonsense; but it must be the same nonsense as Hugging Face's.

# %%
with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
logits = run.logits(tokens)
print("ours", logits.shape, "theirs", expected.shape)
print("equal within 1e-5:", bool(np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()))
likeliest, theirs_likeliest = logits.argmax(-1), expected.argmax(-1)  # [B, T]
print("the same likeliest token everywhere:", np.array_equal(likeliest, theirs_likeliest))

# %%
prompt = torch.from_numpy(tokens[:1]).long()
found = theirs.generate(
    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False,
    pad_token_id=0,
)  # fmt: skip
ours = run.generate(texts[0], max_new_tokens=20, temperature=0.0, ignore_end_of_text=True)
print("the same 20 greedy tokens:", ours == tokenizer.decode(found[0, 4:].tolist()))

# %% [markdown]
# ## And back
#
# What the package trains, transformers loads.

# %%
with tempfile.TemporaryDirectory() as parent:
    run.save_pretrained(f"{parent}/exported")
    again = transformers.AutoModelForCausalLM.from_pretrained(f"{parent}/exported").eval()
    with torch.no_grad():
        back = again(torch.from_numpy(tokens).long()).logits.numpy()
print("equal, exported and loaded:", bool(np.allclose(back, expected, atol=1e-6)))
folder.cleanup()

# %% [markdown]
# ## The real one
#
# The same call with a name of the Hugging Face Hub downloads GPT-2's weights once (548 MB):
#
# ```python
# run = gptjax.from_pretrained("gpt2")
# print(run.generate("Every effort moves you", max_new_tokens=30, seed=1))
# ```
#
# or, as commands, with fine-tuning on a text of your own:
#
#     gptjax convert import gpt2 runs/gpt2
#     gptjax generate runs/gpt2 --prompt "Every effort moves you"
#     gptjax train --init-from runs/gpt2 --data.source my.txt --block-size 256 --run-dir runs/tuned
#
# **Exercise.** How many parameters has GPT-2 with 12 blocks? *What to expect:* 50,257 x 768 + 1024
# x 768 for the tables, 12 C^2 + 13 C a block, 2 C at the end: 124,439,808. Check it with
# `gptjax.PRESETS["gpt2"].num_parameters()`. (`gptjax explain gpt2` says 124,373,760:
# `configs/gpt2.py` trains a GPT-2 without biases, and pads the token table to 50,304 rows.)
