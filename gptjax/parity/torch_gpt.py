"""A plain PyTorch GPT in nanoGPT's style, to check ours against and to measure it.

It is written from the papers and nanoGPT's conventions, and shares nothing with gptjax.model:
modules per layer in a list, [B, T, C] activations, an explicit triangular mask. Its state dict has
nanoGPT's names; that is all the two have to agree on.

Letters in shape comments: B batch, T tokens, C n_embd, H heads, D head size, V vocabulary.
"""

import collections
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptjax.config import ModelConfig, TrainConfig


class SelfAttention(nn.Module):
    """Causal multi-head attention over the last `window` tokens; `fused`: by PyTorch's own kernel,
    where a token sees all those before it. `layer`: its number, from 0."""

    def __init__(self, config: ModelConfig, layer: int, fused: bool):
        super().__init__()
        self.heads = config.n_head
        self.window = config.windows[layer]
        self.fused = fused and self.window >= config.block_size
        self.scale = 1 / math.sqrt(config.head_size) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
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
            y = functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale
            )
        else:
            scores = q @ k.transpose(-2, -1) * self.scale
            visible = torch.ones(time, time, device=x.device).tril().triu(1 - self.window)
            scores = scores.masked_fill(visible == 0, float("-inf"))
            y = functional.dropout(scores.softmax(dim=-1), dropout) @ v
        return functional.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), dropout)


def mlp(config: ModelConfig) -> nn.Module:
    """Two linear layers with an activation between them: [B, T, C] -> [B, T, C]."""
    activations = {
        "gelu_tanh": nn.GELU("tanh"), "gelu_erf": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(),
    }  # fmt: skip
    parts: dict[str, nn.Module] = {
        "c_fc": nn.Linear(config.n_embd, config.inner_size, bias=config.bias),
        "activation": activations[config.activation],
        "c_proj": nn.Linear(config.inner_size, config.n_embd, bias=config.bias),
        "dropout": nn.Dropout(config.dropout),
    }
    return nn.Sequential(collections.OrderedDict(parts))


def layer_norm(config: ModelConfig) -> nn.Module:
    return nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)


class Block(nn.Module):
    """A pre-LayerNorm block."""

    def __init__(self, config: ModelConfig, layer: int, fused: bool):
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = SelfAttention(config, layer, fused)
        self.ln_2 = layer_norm(config)
        self.mlp = mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchGPT(nn.Module):
    """The model, without padded rows of the vocabulary; `fused`: with PyTorch's own attention
    kernel instead of the formula."""

    def __init__(self, config: ModelConfig, *, fused: bool = False):
        super().__init__()
        self.config = config
        trunk: Any = nn.Module()  # all but the head, under nanoGPT's name
        self.transformer = trunk
        trunk.wte = nn.Embedding(config.vocab_size or 0, config.n_embd)
        if config.position == "learned":
            trunk.wpe = nn.Embedding(config.block_size, config.n_embd)
        trunk.drop = nn.Dropout(config.dropout)
        trunk.h = nn.ModuleList(Block(config, i, fused) for i in range(config.n_layer))
        trunk.ln_f = layer_norm(config) if config.n_layer else None
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size or 0, bias=False)
        if config.tied_head:
            self.lm_head.weight = trunk.wte.weight

    def positions(self, time: int) -> Tensor:
        """[T, C]: rows of the learned table, or sinusoids."""
        if self.config.position == "learned":
            return self.transformer.wpe.weight[:time]
        # "Attention is all you need", section 3.5.
        power = torch.arange(0, self.config.n_embd, 2, dtype=torch.float64) / self.config.n_embd
        angle = torch.arange(time)[:, None] / 10000**power
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
        return table.to(self.transformer.wte.weight)

    def forward(self, tokens: Tensor, *, last_only: bool = False) -> Tensor:
        """int [B, T] -> logits [B, T, V], or those after the last token alone [B, 1, V]."""
        trunk = self.transformer
        x = trunk.drop(trunk.wte(tokens) + self.positions(tokens.shape[1]))
        for block in trunk.h:
            x = block(x)
        x = trunk.ln_f(x) if trunk.ln_f else x
        return self.lm_head(x[:, -1:] if last_only else x)


def initialise(model: TorchGPT) -> None:
    """GPT-2's: N(0, 0.02), and smaller with depth for projections into the residual stream."""
    for name, parameter in model.named_parameters():
        std = 0.02 / math.sqrt(2 * model.config.n_layer) if "c_proj" in name else 0.02
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def from_state_dict(config: ModelConfig, tensors: dict[str, Any], model: Any = None) -> Any:
    """A TorchGPT with these numpy arrays, under nanoGPT's names and in its layout; or `model`, in
    which they fit."""
    model = model or TorchGPT(config)
    if config.tied_head:
        tensors = tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
    model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    return model.eval()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per target: logits [B, T, V], int targets [B, T] -> []."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def learning_rate(config: TrainConfig, step: int) -> float:
    """nanoGPT's schedule, in plain arithmetic."""
    peak, least = config.optimizer.learning_rate, config.optimizer.min_lr
    warmup = config.optimizer.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, config.lr_decay_steps - warmup))
    linear = config.optimizer.lr_schedule == "linear"
    left = 1 - progress if linear else 0.5 * (1 + math.cos(math.pi * progress))
    return least + left * (peak - least)


def set_rates(optimizer: "torch.optim.Optimizer | Muon", config: TrainConfig, step: int) -> None:
    """Those of the update that follows `step` updates."""
    rate, adamw = learning_rate(config, step), optimizer
    if isinstance(optimizer, Muon):
        adamw = optimizer.adamw
        for group in optimizer.muon.param_groups:
            rates = config.optimizer
            group["lr"] = rates.muon_learning_rate * rate / rates.learning_rate
    assert isinstance(adamw, torch.optim.Optimizer)
    for group in adamw.param_groups:
        group["lr"] = rate


class Muon:
    """torch.optim.Muon for the blocks' matrices, those of queries, keys and values apart, and
    `adamw` for the rest."""

    def __init__(
        self, model: nn.Module, *, learning_rate: float, adamw_learning_rate: float,
        betas: tuple[float, float], weight_decay: float, beta: float = 0.95, iterations: int = 5,
        in_out: bool = False, fused: bool | None = None,
    ):  # fmt: skip
        """`in_out`: weights are [in, out], as Hugging Face's."""
        self._in_out = in_out
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._matrices = [(name, p) for name, p in trained.items() if ".h." in name and p.ndim == 2]
        # Views: what the optimizer does to them is done to the model.
        self._views = [
            nn.Parameter(view) for name, p in self._matrices for view in self._split(name, p.data)
        ]
        self.muon = torch.optim.Muon(
            self._views, lr=learning_rate, weight_decay=weight_decay, momentum=beta,
            ns_steps=iterations,
        )  # fmt: skip
        served = {name for name, _ in self._matrices}
        others = [p for name, p in trained.items() if name not in served]
        self.adamw = adamw(
            others, learning_rate=adamw_learning_rate, betas=betas, weight_decay=weight_decay,
            fused=fused,
        )  # fmt: skip

    def _split(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """A weight or its gradient as matrices [out, in]."""
        matrix = x.T if self._in_out else x
        return matrix.chunk(3) if name.endswith("c_attn.weight") else (matrix,)

    def step(self) -> None:
        gradients = (self._split(name, p.grad) for name, p in self._matrices if p.grad is not None)
        for view, gradient in zip(self._views, itertools.chain(*gradients), strict=True):
            view.grad = gradient
        self.muon.step()
        self.adamw.step()
        for view in self._views:
            view.grad = None  # it would keep the model's gradients

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}


def adamw(
    parameters: Iterable[nn.Parameter], *, learning_rate: float, betas: tuple[float, float],
    weight_decay: float, fused: bool | None = None,
) -> torch.optim.AdamW:  # fmt: skip
    """With nanoGPT's two groups: tensors of two and more axes decay, the others do not."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
