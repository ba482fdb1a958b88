"""PyTorch's side of the benchmark, in a process of its own, without JAX: a GPT in nanoGPT's style
with fused attention and AdamW, or Hugging Face's GPT-2 with its cache.

python -m benchmarks.pytorch RUN_DIR trains a whole run, for `startup` and `race`; with "exact"
after it, it prints that run's loss over the whole validation split.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import worker
from benchmarks.worker import FIRST_STEP, Job, Turns
from gptjax import config_io, files
from gptjax.config import TrainConfig
from gptjax.parity import torch_gpt
from gptjax.runtime_config import RuntimeConfig


def device_of(runtime: RuntimeConfig) -> str:
    return "cuda" if runtime.device == "gpu" else "cpu"


class Training:
    """A model and its optimizer, trained and evaluated as nanoGPT's train.py does it."""

    def __init__(self, config: TrainConfig, runtime: RuntimeConfig, *, compiled: bool = False):
        self.config, self.runtime, self.device = config, runtime, device_of(runtime)
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA
        # nanoGPT pads the vocabulary as we do: an odd size is slow on a GPU.
        padded = config.model.replace(vocab_size=config.model.padded_vocab_size)
        model = torch_gpt.TorchGPT(padded, fused=True).to(self.device)
        torch_gpt.initialise(model)
        self.model: Any = torch.compile(model) if compiled else model
        rates = config.optimizer
        common: Any = {
            "betas": (rates.beta1, rates.beta2), "weight_decay": rates.weight_decay, "fused": True,
        }  # fmt: skip
        if rates.kind == "muon":
            self.optimizer: Any = torch_gpt.Muon(
                model, learning_rate=rates.muon_learning_rate, beta=rates.muon_beta,
                adamw_learning_rate=rates.learning_rate, iterations=rates.muon_iterations, **common,
            )  # fmt: skip
        else:
            self.optimizer = torch_gpt.adamw(
                model.parameters(), learning_rate=rates.learning_rate, **common
            )

    def logits(self, tokens: torch.Tensor, **how: bool) -> torch.Tensor:
        """In bfloat16 where our side computes in it."""
        narrow = self.config.model.dtype == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16, enabled=narrow):
            return self.model(tokens, **how)

    def tokens(self, split: str) -> np.ndarray:
        """int [n]: a split of the data set."""
        folder = Path(self.config.data.dir or "")
        dtype = files.read_json(folder / "meta.json")["dtype"]
        return np.memmap(folder / f"{split}.bin", dtype, "r")

    def loss(self, tokens: np.ndarray) -> torch.Tensor:
        """Of a micro-batch at random positions: nanoGPT's get_batch."""
        block, count = self.config.model.block_size, self.runtime.divide_batch(self.config, 1)
        starts = torch.randint(len(tokens) - block, (count,)).tolist()
        rows = torch.from_numpy(np.stack([tokens[i : i + block + 1] for i in starts]).astype("i8"))
        if self.device == "cuda":
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        return torch_gpt.cross_entropy(self.logits(rows[:, :-1]), rows[:, 1:])

    def step(self, tokens: np.ndarray) -> torch.Tensor:
        """One training step; the loss of its last micro-batch."""
        for _ in range(self.runtime.gradient_accumulation_steps):
            loss = self.loss(tokens)
            (loss / self.runtime.gradient_accumulation_steps).backward()
        if limit := self.config.optimizer.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss

    @torch.no_grad()
    def evaluate(self) -> None:
        self.model.eval()
        tokens = self.tokens("val")
        for _ in range(self.runtime.eval_batches):
            self.loss(tokens).item()
        self.model.train()


def train(job: Job, turns: Turns) -> None:
    """Steps of training."""
    training = Training(job.config, job.runtime, compiled=job.side == "torch.compile")
    training.model.train()
    tokens = training.tokens("train")
    for units in turns:
        for _ in range(units):
            loss = training.step(tokens)
        loss.item()


@torch.no_grad()
def generate(job: Job, turns: Turns) -> None:
    """Continuations of a prompt of one token, by nanoGPT's loop, which has no cache, or by Hugging
    Face's `generate`, which has one."""
    sample = (hugging_face_sampler if job.side.startswith("hf") else nanogpt_sampler)(job)
    prompt = torch.zeros(job.num_samples, 1, dtype=torch.long, device=device_of(job.runtime))
    for units in turns:
        for _ in range(units):
            sample(prompt).cpu()


def nanogpt_sampler(job: Job) -> Callable[[torch.Tensor], torch.Tensor]:
    training, block = Training(job.config, job.runtime), job.config.model.block_size
    training.model.eval()

    def sample(text: torch.Tensor) -> torch.Tensor:
        for _ in range(job.new_tokens):
            logits = training.logits(text[:, -block:], last_only=True)[:, -1].float() / 0.8
            least = logits.topk(min(200, logits.shape[-1])).values[:, -1:]
            probabilities = logits.masked_fill(logits < least, -float("inf")).softmax(-1)
            text = torch.cat([text, torch.multinomial(probabilities, 1)], dim=1)
        return text

    return sample


def hugging_face_sampler(job: Job) -> Callable[[torch.Tensor], torch.Tensor]:
    import transformers  # slow to import, and only this side needs it

    ours = job.config.model
    config = transformers.GPT2Config(
        n_layer=ours.n_layer, n_head=ours.n_head, n_embd=ours.n_embd, n_positions=ours.block_size,
        vocab_size=ours.vocab_size or 0, eos_token_id=None, bos_token_id=None,
        activation_function={"gelu_tanh": "gelu_new", "gelu_erf": "gelu"}[ours.activation],
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    model.to(torch.device(device_of(job.runtime)))
    if ours.dtype == "bfloat16":
        model = model.bfloat16()  # faster than autocast, which casts the weights for every token

    def sample(prompt: torch.Tensor) -> torch.Tensor:
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=job.new_tokens,
            min_new_tokens=job.new_tokens, do_sample=True, temperature=0.8, top_k=200,
            pad_token_id=0,
        )  # fmt: skip

    return sample


def ceilings(job: Job, turns: Turns) -> None:
    device = device_of(job.runtime)
    width, length = (2048, 2**26) if device == "cpu" else (8192, 2**29)
    dtype = torch.bfloat16 if job.config.model.dtype == "bfloat16" else torch.float32
    square = torch.ones(width, width, device=device, dtype=dtype)
    long = torch.ones(length, device=device)
    product, copy = torch.empty_like(square), torch.empty_like(long)
    found = worker.ceilings(
        width, lambda: torch.mm(square, square, out=product)[:1].cpu(),
        long.nbytes, lambda: copy.copy_(long)[:1].cpu(),
    )  # fmt: skip
    turns.facts = lambda: facts() | {"ceilings": found}
    next(turns)


MODES = {"train": train, "generate": generate, "ceilings": ceilings}


def facts() -> dict[str, Any]:
    """What the report says of this side."""
    cuda = torch.cuda.is_initialized()
    return {
        "versions": f"PyTorch {torch.__version__}",
        "devices": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads",
        "device_count": 1,
        "device_memory": torch.cuda.max_memory_allocated() if cuda else None,
    }


def whole_run(run_dir: Path) -> None:
    """Evaluate, train by the schedule, evaluate now and then and at the end, save."""
    training = _training(run_dir)
    tokens = training.tokens("train")
    for step in range(training.config.max_steps):
        if step % training.runtime.eval_interval == 0:
            training.evaluate()
        torch_gpt.set_rates(training.optimizer, training.config, step)
        training.step(tokens).item()
        if step == 0:
            print(FIRST_STEP, flush=True)
    training.evaluate()
    state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    torch.save(state, run_dir / "ckpt.pt")


def _training(run_dir: Path) -> Training:
    path = run_dir / "config.json"
    return Training(*config_io.run_settings(files.read_json(path), str(path)))


@torch.no_grad()
def exact_loss(run_dir: Path) -> float:
    """Nats per token over the whole validation split, in windows that do not overlap, of the model
    that `whole_run` saved."""
    training = _training(run_dir)
    training.model.load_state_dict(torch.load(run_dir / "ckpt.pt")["model"])
    training.model.eval()
    tokens, block = training.tokens("val"), training.config.model.block_size
    total = 0.0
    for start in range(0, len(tokens) - 1, block):
        window = torch.from_numpy(tokens[start : start + block + 1].astype("i8"))[None]
        loss = torch_gpt.cross_entropy(training.logits(window[:, :-1]), window[:, 1:])
        total += loss.item() * (window.shape[1] - 1)
    return total / (len(tokens) - 1)


if __name__ == "__main__":
    if sys.argv[2:] == ["exact"]:
        print(f"{exact_loss(Path(sys.argv[1])):.4f} nats")
    else:
        whole_run(Path(sys.argv[1]))
