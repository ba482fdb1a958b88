"""GPT-2 and its variants in numpy, in float64 and one sequence at a time, written from the papers:
what the tests compare the network with where there is no PyTorch."""

import math

import numpy as np

from gptjax.config import ModelConfig


def forward(config: ModelConfig, params, tokens) -> tuple[np.ndarray, np.ndarray]:
    """(logits [T, V], attention weights [L, H, T, T]) of int tokens [T]; blocks stacked in "h"."""
    seen = activations(config, params, tokens)
    looks = [seen[f"h.{layer}.attn.weights"] for layer in range(config.n_layer)]
    return seen["logits"], np.array(looks)


def activations(config: ModelConfig, params, tokens) -> dict[str, np.ndarray]:
    """Everything on the way, of int tokens [T], named as the parameters that make it."""
    leaf = dict(_leaves(params))
    wte, length = leaf["wte"], len(tokens)
    seen = {"embedding": wte[np.asarray(tokens)] + _positions(config, leaf)[:length]}
    x = seen["embedding"]
    for layer in range(config.n_layer):
        block = {n[2:]: v[layer] for n, v in leaf.items() if n.startswith("h/")}
        banded = config.attention_pattern[layer % len(config.attention_pattern)] == "banded"
        own = {"ln_1": _norm(config, x, block, "ln_1")}
        reach = config.attention_window if banded else length
        divisor = math.sqrt(config.n_embd / config.n_head) if config.scale_attn_weights else 1
        divisor *= layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
        own |= _attention(config, block, own["ln_1"], reach, divisor)
        middle = x + own["attn.c_proj"]
        own["ln_2"] = _norm(config, middle, block, "ln_2")
        own["mlp.c_fc"] = _linear(own["ln_2"], block, "mlp/c_fc")
        own["mlp.hidden"] = _activation(own["mlp.c_fc"], config.activation)
        own["mlp.c_proj"] = _linear(own["mlp.hidden"], block, "mlp/c_proj")
        x = seen[f"h.{layer}"] = middle + own["mlp.c_proj"]
        seen |= {f"h.{layer}.{name}": array for name, array in own.items()}
    if config.n_layer:
        x = seen["ln_f"] = _norm(config, x, leaf, "ln_f")
    head = wte if config.tied_head else leaf["lm_head"]
    return seen | {"logits": (x @ head.T)[:, : config.vocab_size]}


def logits(config: ModelConfig, params, tokens) -> np.ndarray:
    """[B, T, V] of int tokens [B, T]."""
    return np.stack([forward(config, params, row)[0] for row in tokens])


def nats(config: ModelConfig, params, windows) -> np.ndarray:
    """[B, T]: -log p of each target of int windows [B, T + 1]."""
    found = logits(config, params, windows[:, :-1])
    total = np.log(np.exp(found).sum(axis=-1))
    return total - np.take_along_axis(found, windows[:, 1:, None], axis=-1)[..., 0]


def greedy(config: ModelConfig, params, prompt, count: int) -> list[int]:
    """The likeliest tokens one after the other, from the last block_size tokens each time."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(forward(config, params, text[-config.block_size :])[0][-1].argmax()))
    return text[len(prompt) :]


def _leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value, np.float64)


def _positions(config, leaf):
    if config.position == "learned":
        return leaf["wpe"]
    table = np.zeros((config.block_size, config.n_embd))
    for position in range(config.block_size):
        for i in range(config.n_embd // 2):
            angle = position / 10000 ** (2 * i / config.n_embd)
            table[position, 2 * i : 2 * i + 2] = math.sin(angle), math.cos(angle)
    return table


def _norm(config, x, leaf, name):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(variance + config.layer_norm_epsilon)
    return scaled * leaf[f"{name}/scale"] + leaf.get(f"{name}/bias", 0)


def _linear(x, leaf, name):
    return x @ leaf[f"{name}/kernel"] + leaf.get(f"{name}/bias", 0)


def _activation(x, name):
    if name == "relu":
        return np.maximum(x, 0)
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu_erf":
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _attention(config, block, x, reach, divisor):
    length, size = len(x), config.n_embd // config.n_head
    heads, weights = [], np.zeros((config.n_head, length, length))
    qkv = _linear(x, block, "attn/c_attn")
    q, k, v = (qkv[:, i * config.n_embd : (i + 1) * config.n_embd] for i in range(3))
    for head in range(config.n_head):
        part = slice(head * size, (head + 1) * size)
        for t in range(length):
            seen = slice(max(0, t - reach + 1), t + 1)
            scores = np.exp(k[seen, part] @ q[t, part] / divisor)
            weights[head, t, seen] = scores / scores.sum()
        heads.append(weights[head] @ v[:, part])
    joined = np.concatenate(heads, axis=-1)
    out = {"c_attn": qkv, "weights": weights, "joined": joined}
    out["c_proj"] = _linear(joined, block, "attn/c_proj")
    return {f"attn.{name}": array for name, array in out.items()}
