"""A plain PyTorch GPT in nanoGPT's style, to check ours against and to measure it.

It is written from the papers and nanoGPT's conventions, and shares nothing with gptjax.model:
modules per layer in a list, [B, T, C] activations, an explicit triangular mask. Its state dict has
nanoGPT's names; that is all the two have to agree on.

Letters in shape comments: B batch, T tokens, C n_embd, H heads, D head size, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptjax.config import ModelConfig


class SelfAttention(nn.Module):
    """Causal multi-head attention over the last `window` tokens; `fused`: by PyTorch's own kernel,
    where a token sees all those before it."""

    def __init__(self, config: ModelConfig, window: int, fused: bool):
        super().__init__()
        self.heads = config.n_head
        self.window = window
        self.fused = fused and window >= config.block_size
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.use_qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        _, time, width = x.shape
        size, dropout = width // self.heads, self.dropout if self.training else 0.0
        q, k, v = (
            part.unflatten(2, (self.heads, size)).transpose(1, 2)  # [B, H, T, D]
            for part in self.c_attn(x).split(width, dim=2)
        )
        if self.fused:
            y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(size)
            visible = torch.ones(time, time, device=x.device).tril().bool()
            visible &= ~torch.ones(time, time, device=x.device).tril(-self.window).bool()
            scores = scores.masked_fill(~visible, float("-inf"))
            y = functional.dropout(scores.softmax(dim=-1), dropout) @ v
        return functional.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), dropout)


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.form = {"erf": "none", "tanh": "tanh"}[config.gelu]
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        y = self.c_proj(functional.gelu(self.c_fc(x), approximate=self.form))
        return functional.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    """A pre-LayerNorm block."""

    def __init__(self, config: ModelConfig, window: int, fused: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config, window, fused)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Trunk(nn.Module):
    """All but the output head, under the name that nanoGPT gives it."""

    def __init__(self, config: ModelConfig, fused: bool):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size or 0, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, window, fused) for window in config.windows)
        if config.n_layer:
            self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def positions(self, time: int) -> Tensor:
        """[T, C]: rows of the learned table, or sinusoids."""
        device = self.wte.weight.device
        if self.config.position == "learned":
            return self.wpe(torch.arange(time, device=device))
        # "Attention is all you need", section 3.5, entry by entry.
        table = torch.zeros(time, self.config.n_embd)
        for pos in range(time):
            for i in range(self.config.n_embd // 2):
                angle = pos / 10000 ** (2 * i / self.config.n_embd)
                table[pos, 2 * i], table[pos, 2 * i + 1] = math.sin(angle), math.cos(angle)
        return table.to(device)

    def forward(self, tokens: Tensor) -> Tensor:
        """int [B, T] -> [B, T, C]."""
        x = self.drop(self.wte(tokens) + self.positions(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) if self.config.n_layer else x


class TorchGPT(nn.Module):
    """The model, without padded rows of the vocabulary; `fused`: with PyTorch's own attention
    kernel instead of the formula."""

    def __init__(self, config: ModelConfig, *, fused: bool = False):
        super().__init__()
        self.config = config
        self.transformer = Trunk(config, fused)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size or 0, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens: Tensor, *, last_only: bool = False) -> Tensor:
        """int [B, T] -> logits [B, T, V], or those after the last token alone [B, 1, V]."""
        x = self.transformer(tokens)
        return self.lm_head(x[:, -1:] if last_only else x)


def initialise(model: TorchGPT) -> None:
    """GPT-2's: N(0, 0.02), and smaller with depth for projections into the residual stream."""
    for name, parameter in model.named_parameters():
        std = 0.02 / math.sqrt(2 * model.config.n_layer) if "c_proj" in name else 0.02
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def from_state_dict(config: ModelConfig, tensors: dict[str, Any]) -> TorchGPT:
    """A TorchGPT with these numpy arrays, under nanoGPT's names and in its layout."""
    with torch.device("meta"):
        model = TorchGPT(config)
    model.to_empty(device="cpu")
    if config.tied_head:
        model.lm_head.weight = model.transformer.wte.weight
        tensors = tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
    model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    return model.eval()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per target: logits [B, T, V], int targets [B, T] -> []."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def adamw(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float,
    fused: bool | None = None,
) -> torch.optim.AdamW:  # fmt: skip
    """With nanoGPT's two groups: tensors of two and more axes decay, the others do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
