"""A plain PyTorch GPT, written from the papers and nanoGPT's conventions, to check ours against.

It shares nothing with gptjax.model: modules per layer in a list, [B, T, C] activations, an explicit
triangular mask. `load` copies parameters over; that mapping is the only thing the two have to agree
on.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from gptjax.config import ModelConfig


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, window: int):
        super().__init__()
        self.heads = config.n_head
        self.window = window
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.use_qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        batch, time, width = x.shape
        size = width // self.heads
        q, k, v = (
            part.view(batch, time, self.heads, size).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(size)
        visible = torch.ones(time, time).tril().bool()
        visible &= ~torch.ones(time, time).tril(-self.window).bool()
        scores = scores.masked_fill(~visible, float("-inf"))
        y = scores.softmax(dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.form = {"erf": "none", "tanh": "tanh"}[config.gelu]

    def forward(self, x):
        return self.c_proj(functional.gelu(self.c_fc(x), approximate=self.form))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, window: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config, window)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchGPT(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, window) for window in config.windows)
        if config.n_layer:
            self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.wte.weight

    def positions(self, time):
        if self.config.position == "learned":
            return self.wpe(torch.arange(time))
        # "Attention is all you need", section 3.5, entry by entry.
        table = torch.zeros(time, self.config.n_embd)
        for pos in range(time):
            for i in range(self.config.n_embd // 2):
                angle = pos / 10000 ** (2 * i / self.config.n_embd)
                table[pos, 2 * i], table[pos, 2 * i + 1] = math.sin(angle), math.cos(angle)
        return table

    def forward(self, tokens, targets=None):
        x = self.wte(tokens) + self.positions(tokens.shape[1])
        for block in self.h:
            x = block(x)
        if self.config.n_layer:
            x = self.ln_f(x)
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def flax_name(name: str) -> tuple[list[str], int | None, bool]:
    """A torch parameter's name -> (path in our tree, layer, whether it is transposed)."""
    parts = name.split(".")
    layer = int(parts.pop(1)) if parts[0] == "h" else None
    if parts[0] in ("wte", "wpe", "lm_head"):
        return parts[:1], None, False
    if parts[-1] == "weight":
        norm = parts[-2].startswith("ln_")
        return [*parts[:-1], "scale" if norm else "kernel"], layer, not norm
    return parts, layer, False


def from_flax(params, name: str) -> np.ndarray:
    """Our parameter (or gradient) of a torch parameter's name, in torch's layout."""
    path, layer, transposed = flax_name(name)
    for key in path:
        params = params[key]
    array = np.asarray(params if layer is None else params[layer])
    return array.T if transposed else array


def load(config: ModelConfig, params) -> TorchGPT:
    """A TorchGPT with our parameters."""
    model = TorchGPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(from_flax(params, name).copy()))
    return model
