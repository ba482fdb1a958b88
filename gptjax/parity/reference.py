"""Our weights in an independent PyTorch model, on the CPU: Hugging Face's GPT-2 (which needs
transformers), or a plain one in nanoGPT's style."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook

from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.interop import huggingface, parameter_names
from gptjax.interop.parameter_names import PREFIX, Layout
from gptjax.interop.tensor_files import optional
from gptjax.parity import torch_gpt

Against = Literal["hf", "nanogpt-style"]
Precision = Literal["float32", "bfloat16"]


class Reference:
    """A PyTorch model with our weights, and how it is run and trained."""

    def __init__(self, params: Any, config: ModelConfig, against: Against, precision: Precision):
        """Raises UserError if Hugging Face's GPT-2 cannot express the model."""
        self.against = against
        self.layout: Layout = "in_out" if against == "hf" else "out_in"
        self.autocast = functools.partial(
            torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bfloat16"
        )
        self.block_size = config.block_size
        if against == "hf":
            transformers = optional("transformers", "--against hf")
            if missing := ", ".join(huggingface.obstacles(config)):
                raise UserError(
                    f"Hugging Face's GPT-2 cannot express {missing}; use --against nanogpt-style"
                )
            settings, tensors = huggingface.convert(params, config)
            settings |= {"bos_token_id": None, "eos_token_id": None}  # not GPT-2's
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(settings))
        else:
            tensors = parameter_names.to_torch(params, config, self.layout, padding=False)
            model = None
        self.model = torch_gpt.from_state_dict(config, tensors, model)
        # What we do not have (Hugging Face's GPT-2 always has biases) stays zero.
        ours = parameter_names.torch_parameters(config, self.layout)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in ours)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """int [B, T] -> [B, T, V]."""
        with self.autocast():
            output = self.model(tokens)
        return output if isinstance(output, torch.Tensor) else output.logits

    def backward(self, windows: np.ndarray) -> float:
        """Mean nats per target of int windows [B, T + 1]; its gradients replace those before."""
        tokens = torch.from_numpy(windows).long()
        self.model.zero_grad()
        loss = torch_gpt.cross_entropy(self.logits(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        return loss.item()

    def parameters(self) -> dict[str, Any]:
        """Those that are trained, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self) -> dict[str, np.ndarray]:
        """Of the last backward pass, by parameter."""
        return {name: p.grad.numpy().copy() for name, p in self.parameters().items()}

    def optimizer(self, config: TrainConfig) -> Callable[[int], None]:
        """A fresh one: step -> update by the gradients of the last backward pass."""
        rates, parameters = config.optimizer, self.parameters()
        common: Any = {
            "betas": (rates.beta1, rates.beta2), "weight_decay": rates.weight_decay,
        }  # fmt: skip
        optimizer: Any
        if rates.kind == "muon":
            optimizer = torch_gpt.Muon(
                self.model, learning_rate=0.0, adamw_learning_rate=0.0, beta=rates.muon_beta,
                iterations=rates.muon_iterations, in_out=self.layout == "in_out", **common,
            )  # fmt: skip
        else:
            optimizer = torch_gpt.adamw(parameters.values(), learning_rate=0.0, **common)

        def update(step: int) -> None:
            torch_gpt.set_rates(optimizer, config, step)
            if rates.grad_clip:
                clip([*parameters.values()], rates.grad_clip)
            # Muon rounds to bfloat16 whatever it is given, which would hide the errors looked for.
            with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
                optimizer.step()

        return update

    def values(self) -> dict[str, np.ndarray]:
        """Copies of the trained parameters, by name."""
        return {name: p.detach().numpy().copy() for name, p in self.parameters().items()}

    def restore(self, values: dict[str, np.ndarray]) -> None:
        """Put back what `values` returned."""
        tensors = {name: torch.from_numpy(value) for name, value in values.items()}
        self.model.load_state_dict(tensors, strict=False)

    @torch.no_grad()
    def activations(self, tokens: torch.Tensor) -> dict[str, np.ndarray]:
        """The outputs of the embedding and every part of every block, by name; and the logits."""
        found: dict[str, np.ndarray] = {}
        names = {module: name.removeprefix(PREFIX) for name, module in self.model.named_modules()}

        def hook(module: Any, _inputs: Any, output: Any) -> None:
            name = names.get(module, "")
            if re.fullmatch(r"drop|ln_f|h\.\d+(\.(ln_1|attn|ln_2|mlp))?", name):
                output = output[0] if isinstance(output, tuple) else output
                found[name] = output.float().numpy()

        with register_module_forward_hook(hook):
            logits = self.logits(tokens).float().numpy()
        return found | {"logits": logits}

    @torch.no_grad()
    def greedy(self, prompt: np.ndarray, count: int) -> np.ndarray:
        """int [count]: the likeliest token each time. By Hugging Face's own `generate` with its
        cache while all fits the block, else by an uncached loop over the text's end."""
        text = torch.from_numpy(prompt).long()[None]
        with self.autocast():
            if self.against == "hf" and len(prompt) + count <= self.block_size:
                text = self.model.generate(
                    text, attention_mask=torch.ones_like(text), max_new_tokens=count,
                    min_new_tokens=count, do_sample=False, pad_token_id=0,
                )  # fmt: skip
            else:
                for _ in range(count):
                    last = self.logits(text[:, -self.block_size :])[:, -1]
                    text = torch.cat([text, last.argmax(-1, keepdim=True)], dim=1)
        return text[0, len(prompt) :].numpy()


def clip(parameters: list[torch.nn.Parameter], limit: float) -> None:
    """As torch.nn.utils.clip_grad_norm_, whose float32 norm of GPT-2's embedding gradient is off by
    1e-3 on a CPU: here it is summed in float64."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients))
    for grad in gradients:
        grad.mul_(min(1.0, limit / (norm + 1e-6)))
