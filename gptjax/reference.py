"""Our weights in an independent PyTorch model, on the CPU: Hugging Face's GPT-2, or a plain one in
nanoGPT's style. Needs PyTorch, and transformers for Hugging Face's."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from gptjax import convert, state_dict, torch_gpt
from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.state_dict import HEAD, PREFIX

Against = Literal["hf", "nanogpt-style"]
Precision = Literal["float32", "bfloat16"]


class Reference:
    """The same weights in an independent PyTorch model."""

    def __init__(self, params: Any, config: ModelConfig, against: Against, precision: Precision):
        """Raises UserError if Hugging Face's GPT-2 cannot express the model."""
        self.against = against
        self.layout: state_dict.Layout = "in_out" if against == "hf" else "out_in"
        self.context = functools.partial(
            torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bfloat16"
        )
        self.block_size = config.block_size
        if against == "hf":
            self.model = _hugging_face(params, config)
        else:
            tensors = state_dict.to_torch(params, config, self.layout, padding=False)
            self.model = torch_gpt.from_state_dict(config, tensors)
        # What we do not have (Hugging Face's GPT-2 always has biases) stays zero.
        ours = state_dict.places(config, self.layout)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in ours)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, V]."""
        with self.context():
            output = self.model(tokens)
        return output if isinstance(output, torch.Tensor) else output.logits

    def loss(self, windows: np.ndarray) -> torch.Tensor:
        """Mean cross-entropy of windows [B, T + 1]."""
        tokens = torch.from_numpy(windows).long()
        return torch_gpt.cross_entropy(self.logits(tokens[:, :-1]), tokens[:, 1:])

    def gradients(self) -> dict[str, np.ndarray]:
        """Of the last backward pass, by parameter."""
        gradients = {name: parameter.grad for name, parameter in self.parameters().items()}
        return {n: grad.numpy().copy() for n, grad in gradients.items() if grad is not None}

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those that are trained, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def optimizer(self, config: TrainConfig) -> Callable[[int], None]:
        """A fresh AdamW: step -> update by the gradients of the last backward pass."""
        adamw = torch_gpt.adamw(
            self.model, learning_rate=config.learning_rate, betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )  # fmt: skip
        trained = list(self.parameters().values())

        def update(step: int) -> None:
            for group in adamw.param_groups:
                group["lr"] = learning_rate(config, step)
            if config.grad_clip:
                _clip(trained, config.grad_clip)
            adamw.step()

        return update

    def backward(self, windows: np.ndarray) -> float:
        """The loss of windows [B, T + 1], whose gradients replace those before."""
        self.model.zero_grad()
        loss = self.loss(windows)
        loss.backward()
        return loss.item()

    def values(self) -> dict[str, np.ndarray]:
        """Copies of the trained parameters, by name."""
        return {name: p.detach().numpy().copy() for name, p in self.parameters().items()}

    @torch.no_grad()
    def restore(self, values: dict[str, np.ndarray]) -> None:
        """Put back what `values` gave."""
        for name, parameter in self.parameters().items():
            parameter.copy_(torch.from_numpy(values[name]))

    def activations(self, tokens: torch.Tensor) -> dict[str, np.ndarray]:
        """The outputs of the embedding and of every part of every block, by name."""
        found: dict[str, np.ndarray] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                output = output[0] if isinstance(output, tuple) else output
                found[name] = output.detach().float().numpy()

            return hook

        parts = r"drop|ln_f|h\.\d+(\.(ln_1|attn|ln_2|mlp))?"
        hooks = [
            module.register_forward_hook(keep(name.removeprefix(PREFIX)))
            for name, module in self.model.named_modules()
            if re.fullmatch(PREFIX.replace(".", r"\.") + f"({parts})", name)
        ]
        with torch.no_grad():
            found["logits"] = self.logits(tokens).float().numpy()
        for hook in hooks:
            hook.remove()
        return found

    def greedy(self, prompt: np.ndarray, count: int) -> np.ndarray:
        """int [count]: the likeliest token each time. By Hugging Face's own `generate` with its
        cache while everything fits the block, else by an uncached loop over its end."""
        text = torch.from_numpy(prompt).long()[None]
        fits = len(prompt) + count <= self.block_size
        with torch.no_grad(), self.context():
            if self.against == "hf" and fits:
                text = self.model.generate(
                    text, attention_mask=torch.ones_like(text), max_new_tokens=count,
                    min_new_tokens=count, do_sample=False, pad_token_id=0,
                )  # fmt: skip
            else:
                for _ in range(count):
                    last = self.logits(text[:, -self.block_size :])[:, -1]
                    text = torch.cat([text, last.argmax(-1, keepdim=True)], dim=1)
        return text[0, len(prompt) :].numpy()


def _hugging_face(params: Any, config: ModelConfig) -> Any:
    try:
        import transformers  # only this comparison needs it
    except ImportError:
        raise UserError(
            "--against hf needs transformers: pip install -r requirements-torch.txt"
        ) from None
    if missing := convert.obstacles(config, None, "hf"):
        raise UserError(
            f"Hugging Face's GPT-2 cannot express {', '.join(missing)}; use --against nanogpt-style"
        )
    settings, tensors = convert.hf_model(params, config)
    if config.tied_head:
        tensors[HEAD] = tensors[f"{PREFIX}wte.weight"]
    ends = {"bos_token_id": None, "eos_token_id": None}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(settings | ends))
    theirs.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    return theirs.eval()


def _clip(parameters: list[torch.nn.Parameter], largest: float) -> None:
    """As torch.nn.utils.clip_grad_norm_, whose float32 norm of GPT-2's embedding gradient is off by
    1e-3 on a CPU: here it is summed in float64."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients))
    for grad in gradients:
        grad.mul_(min(1.0, largest / (norm + 1e-6)))


def learning_rate(config: TrainConfig, step: int) -> float:
    """nanoGPT's schedule, in plain arithmetic."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    ratio = min(
        1.0, (step - config.warmup_steps) / max(1, config.decay_steps - config.warmup_steps)
    )
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (
        config.learning_rate - config.min_lr
    )
