"""Fine-tuning GPT-2 124M beside Hugging Face's Trainer, all parameters and by LoRA beside peft: in
turn, each in a process of its own, from the same weights (random ones) on the same batches.

    python -m benchmarks.finetune [--batch-size 4] [--block-size 256] [--steps 6] [--rounds 2]

Needs tiktoken's merges, PyTorch, transformers, accelerate and peft. All save their state at the
end.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import prepare as prepared
from gptjax import machine
from gptjax.config import DataConfig
from gptjax.data import prepare, token_files
from gptjax.data.batches import batch_at

RATES = {"learning_rate": 1e-4, "weight_decay": 0.1}

OURS = """
import time
import gptjax
from gptjax import launch, resume

times, losses = [], []

class Times(gptjax.Callback):
    def on_phase(self, trainer, phase):
        if phase.startswith("compiling"):
            times.append(time.perf_counter())
    def before_step(self, trainer, step):  # where the one before is done, on a CPU
        if step > 1:
            times.append(time.perf_counter())
    def on_step(self, trainer, row):
        losses.append(row["train_loss"])
        if row["step"] == trainer.config.max_steps:
            times.append(time.perf_counter())

config = gptjax.TrainConfig(
    model=gptjax.ModelConfig(block_size=given["block_size"], lora_rank=8 * given["lora"]),
    data=gptjax.DataConfig(None, dir="data"),
    optimizer=gptjax.OptimizerConfig(
        given["learning_rate"], given["learning_rate"], 0, weight_decay=given["weight_decay"],
        beta2=0.999,
    ),
    init_from="run", batch_size=given["batch_size"], max_steps=given["steps"],
)
runtime = gptjax.RuntimeConfig(run_dir="out")
config, tokenizer = resume.adopt_weights(config, "out")
launch.train(config, runtime, tokenizer=tokenizer, callbacks=[Times()])
"""

THEIRS = """
import time
import numpy as np
import torch
import transformers

times, losses = [], []
windows = torch.from_numpy(np.load("windows.npy")).long()

class Windows(torch.utils.data.IterableDataset):
    def __iter__(self):
        for row in windows:
            yield {"input_ids": row[:-1], "labels": row[:-1], "shift_labels": row[1:]}

class Times(transformers.TrainerCallback):
    def on_train_begin(self, args, state, control, **more):
        times.append(time.perf_counter())
    def on_step_end(self, args, state, control, **more):
        times.append(time.perf_counter())
    def on_log(self, args, state, control, logs, **more):
        if "loss" in logs:
            losses.append(float(logs["loss"]))

model = transformers.AutoModelForCausalLM.from_pretrained("hf")
if given["lora"]:
    import peft
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    )
settings = transformers.TrainingArguments(
    "out", per_device_train_batch_size=given["batch_size"], max_steps=given["steps"],
    learning_rate=given["learning_rate"], weight_decay=given["weight_decay"],
    lr_scheduler_type="constant", use_cpu=True, remove_unused_columns=False, logging_steps=1,
    save_steps=given["steps"], report_to="none", disable_tqdm=True,
)
transformers.Trainer(model, settings, train_dataset=Windows(), callbacks=[Times()]).train()
"""

BOTH = """
import json, sys
given = json.loads(sys.argv[1])
{}
json.dump({{"times": times, "losses": losses}}, open("found.json", "w"))
"""


class Found:
    """What was measured of one side: each list has an entry a round."""

    def __init__(self) -> None:
        self.step, self.first, self.memory = list[float](), list[float](), list[float]()
        self.losses: list[float] = []


def make_inputs(folder: Path, given: argparse.Namespace) -> None:
    """The same weights for both sides, and the same tokens."""
    import torch
    import transformers

    from gptjax.interop import convert

    torch.manual_seed(0)
    settings: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    network.save_pretrained(folder / "hf")
    convert.import_model(str(folder / "hf"), folder / "run", tokenizer="gpt2")
    data = DataConfig("shakespeare", "gpt2", val_fraction=0.0)
    prepare.prepare(data, folder / "data", Console(quiet=True))
    tokens = token_files.load(folder / "data").train
    steps = [
        batch_at(tokens, 1337, i, batch_size=given.batch_size, block_size=given.block_size)
        for i in range(given.steps)
    ]
    np.save(folder / "windows.npy", np.concatenate(steps))


def measure(script: str, folder: Path, settings: dict[str, Any], found: Found) -> None:
    """One process."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    _, memory = prepared.measure(BOTH.format(script), folder, json.dumps(settings))
    read = json.loads((folder / "found.json").read_text())
    seconds = np.diff(read["times"]).tolist()
    found.first.append(seconds[0])
    found.step.append(statistics.median(seconds[1:]))
    found.memory.append(memory)
    found.losses = read["losses"]
    print(f"{seconds[0]:.1f} s, then {found.step[-1]:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    print(f"{machine.describe()}; {given.batch_size} x {given.block_size} tokens", flush=True)
    sides = {"gptjax": (OURS, 0), "Trainer": (THEIRS, 0), "gptjax, LoRA": (OURS, 1),
             "Trainer, peft": (THEIRS, 1)}  # fmt: skip
    found = {name: Found() for name in sides}
    with tempfile.TemporaryDirectory() as scratch:
        make_inputs(Path(scratch), given)
        for _ in range(given.rounds):
            for name, (script, lora) in sides.items():
                print(f"{name}: the first step ", end="", flush=True)
                measure(script, Path(scratch), vars(given) | RATES | {"lora": lora}, found[name])
    for name, side in found.items():
        print(
            f"{name:13} {min(side.step):6.2f} s a step, the first {min(side.first):6.2f} s;"
            f" {max(side.memory):.2f} GiB at most; losses {side.losses[0]:.4f} to"
            f" {side.losses[-1]:.4f}"
        )
    for ours, theirs in (("gptjax", "Trainer"), ("gptjax, LoRA", "Trainer, peft")):
        time = min(found[theirs].step) / min(found[ours].step)
        memory = max(found[theirs].memory) / max(found[ours].memory)
        print(
            f"{ours}: {time:.2f} times as fast as {theirs}, which takes {memory:.2f} of the memory"
        )


if __name__ == "__main__":
    main()
