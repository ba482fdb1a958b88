"""PyTorch's side of `gptjax.bench`, in a process of its own, without JAX: nanoGPT's way of doing
it, with fused attention and AdamW, or Hugging Face's GPT-2 with its cache."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptjax import bench, torch_gpt
from gptjax.bench import Job
from gptjax.config import TrainConfig
from gptjax.torch_gpt import TorchGPT


def _device(config: TrainConfig) -> str:
    wanted = {"gpu": "cuda"}.get(config.device, config.device)
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _autocast(config: TrainConfig) -> torch.autocast:
    """bfloat16 where our side computes in it."""
    device, wanted = _device(config), config.model.dtype
    enabled = wanted == "bfloat16" or (wanted == "auto" and device == "cuda")
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


def _model(job: Job) -> Any:
    torch.manual_seed(job.config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, as nanoGPT
    # nanoGPT pads the vocabulary as we do: an odd size is slow on a GPU.
    padded = dataclasses.replace(job.config.model, vocab_size=job.config.model.padded_vocab_size)
    model = TorchGPT(padded, fused=True).to(_device(job.config))
    torch_gpt.initialise(model)
    return torch.compile(model) if job.side == "torch.compile" else model


def _batch(tokens: np.ndarray, config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """nanoGPT's get_batch: rows at random places."""
    block, device = config.model.block_size, _device(config)
    places = torch.randint(len(tokens) - block, (config.micro_batch_size,)).tolist()
    rows = torch.from_numpy(np.stack([tokens[i : i + block + 1] for i in places]).astype("i8"))
    if device == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def _adamw(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    return torch_gpt.adamw(
        model, learning_rate=config.learning_rate, betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip


def _step(
    model: Any, adamw: torch.optim.Optimizer, config: TrainConfig
) -> Callable[[np.ndarray], torch.Tensor]:
    """A function that takes a training step and gives its (last micro-batch's) loss."""

    def step(tokens: np.ndarray) -> torch.Tensor:
        for _ in range(config.gradient_accumulation_steps):
            inputs, targets = _batch(tokens, config)
            with _autocast(config):
                loss = torch_gpt.cross_entropy(model(inputs), targets)
            (loss / config.gradient_accumulation_steps).backward()
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss

    return step


def trainer(job: Job) -> Callable[[int], None]:
    """A function that takes so many training steps."""
    model = _model(job).train()
    step = _step(model, _adamw(model, job.config), job.config)
    tokens = bench.random_tokens(job.config)

    def run(steps: int) -> None:
        for _ in range(steps):
            loss = step(tokens)
        loss.item()

    return run


def sampler(job: Job) -> Callable[[int], None]:
    """A function that continues a prompt of one token so many times: nanoGPT's loop without a
    cache, or Hugging Face's `generate` with one."""
    if job.side.startswith("hf"):
        return _hugging_face_sampler(job)
    config = job.config
    model, block = _model(job).eval(), config.model.block_size

    @torch.no_grad()
    def run(times: int) -> None:
        for _ in range(times):
            text = torch.zeros(job.samples, 1, dtype=torch.long, device=_device(config))
            for _ in range(job.tokens):
                with _autocast(config):
                    logits = model(text[:, -block:], last_only=True)[:, -1].float() / 0.8
                least = logits.topk(min(200, logits.shape[-1])).values[:, -1:]
                probabilities = logits.masked_fill(logits < least, -float("inf")).softmax(-1)
                text = torch.cat([text, torch.multinomial(probabilities, 1)], dim=1)
            text.cpu()

    return run


def _hugging_face_sampler(job: Job) -> Callable[[int], None]:
    import transformers  # heavy, and only this side needs it

    config, model = job.config, job.config.model
    device = _device(config)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=model.n_layer, n_head=model.n_head, n_embd=model.n_embd,
            n_positions=model.block_size, vocab_size=model.vocab_size or 0, eos_token_id=None,
            bos_token_id=None,
            activation_function={"tanh": "gelu_new", "erf": "gelu"}[model.gelu],
        )
    ).eval()  # fmt: skip
    theirs.to(torch.device(device))
    if _autocast(config)._enabled:
        theirs = theirs.bfloat16()  # faster than autocast, which casts the weights for every token
    prompt = torch.zeros(job.samples, 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def run(times: int) -> None:
        for _ in range(times):
            theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=job.tokens,
                min_new_tokens=job.tokens, do_sample=True, temperature=0.8, top_k=200,
                pad_token_id=0,
            ).cpu()  # fmt: skip

    return run


def ceilings(job: Job) -> Callable[[int], None]:
    """A function that measures one large matmul and one large copy, and puts down the best."""
    device = _device(job.config)
    width = 2048 if device == "cpu" else 8192
    narrow = _autocast(job.config)._enabled
    square = torch.ones(width, width, device=device, dtype=torch.bfloat16 if narrow else None)
    long = torch.ones(2**26 if device == "cpu" else 2**29, device=device)
    product, copy = torch.empty_like(square), torch.empty_like(long)

    def seconds(work: Callable[[], torch.Tensor]) -> float:
        work()[:1].cpu()
        times = []
        for _ in range(7):
            began = time.perf_counter()
            work()[:1].cpu()
            times.append(time.perf_counter() - began)
        return min(times)

    def run(_: int) -> None:
        best["matmul_flops"] = 2 * width**3 / seconds(lambda: torch.mm(square, square, out=product))
        best["copy_bytes_per_second"] = 2 * long.nbytes / seconds(lambda: copy.copy_(long))

    return run


def startup(job: Job) -> None:
    """A whole small run as nanoGPT's train.py does it: evaluate, a step, evaluate, save."""
    config = job.config
    width = "u2" if (config.model.vocab_size or 0) < 2**16 else "u4"
    splits = [np.memmap(f"{config.data.dir}/{name}.bin", width, "r") for name in ("train", "val")]
    model = _model(job)
    adamw = _adamw(model, config)
    step = _step(model, adamw, config)

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        for _ in range(config.eval_batches):
            inputs, targets = _batch(splits[1], config)
            with _autocast(config):
                torch_gpt.cross_entropy(model(inputs), targets).item()
        model.train()

    evaluate()
    step(splits[0]).item()
    print(bench.FIRST_STEP, flush=True)
    evaluate()
    state = {"model": model.state_dict(), "optimizer": adamw.state_dict()}
    torch.save(state, Path(config.run_dir or ".") / "ckpt.pt")


best: dict[str, float] = {}


def facts() -> dict[str, Any]:
    """What the table says of this side."""
    cuda = torch.cuda.is_available()
    return {
        "versions": f"PyTorch {torch.__version__}",
        "devices": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads",
        "device_count": 1,
        "peak_flops": None,
        "device_memory": torch.cuda.max_memory_allocated() if cuda else None,
        "ceilings": best,
    }


if __name__ == "__main__":
    asked = Job.from_json(sys.argv[1])
    if asked.mode == "startup":
        startup(asked)
    else:
        bench.serve({"train": trainer, "generate": sampler, "ceilings": ceilings}, facts)
