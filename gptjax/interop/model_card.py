"""The README.md of an exported model: what it is, its data and loss, the command that made it."""

import math
import re
import shlex
from pathlib import Path
from typing import Literal

from gptjax import config_io
from gptjax.config import FINETUNE, TrainConfig
from gptjax.data.tokenizers import Tokenizer
from gptjax.interop.weights import Weights

NOT_IN_COMMAND = ("model.vocab_size", "data.source", "data.dir", "init_from")
"""Settings that the data decide, and those that are paths of one machine."""

PATHS = ("data.mix", "data.val_source", "data.tokenizer_file")
"""Of such paths the last part is named."""

HOW = {
    "hf": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer("...", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=COUNT)[0]))
```""",
    "gguf": """\
```
llama-completion -m FOLDER/model.gguf -no-cnv -n COUNT -p "..."
```""",
}


def text(weights: Weights, tokenizer: Tokenizer, name: str, format: Literal["hf", "gguf"]) -> str:
    """The card of the model `name`, in Markdown."""
    config, model = weights.config, weights.config.model
    sizes = f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide"
    lines = [
        "---",
        "pipeline_tag: text-generation",
        *(["library_name: transformers"] if format == "hf" else []),
        "tags:",
        "- gptjax",
        "- gpt2",
        "---",
        "",
        f"# {_plain(name)}",
        "",
        f"A GPT of {model.num_parameters():,} parameters: {sizes}, a context of"
        f" {model.block_size:,} tokens, {tokenizer.n_vocab:,} ids ({tokenizer.kind}). Exported by"
        " gptjax.",
        "",
        HOW[format].replace("COUNT", str(min(100, model.block_size // 2))),
        "",
        "## Training",
        "",
    ]
    if config.init_from:
        lines += [f"- Started from the weights of `{_plain(Path(config.init_from).name)}`."]
    if weights.data_fingerprint is None:
        lines += [
            "- Data, loss and command: not known. gptjax imported the weights from elsewhere."
        ]
        return "\n".join([*lines, ""])
    data = config.data
    source = data.source or data.dir or ""
    names = [_local(name) for name in data.mix] or [_plain(Path(source).name)]
    tokens = weights.step * config.batch_size * model.block_size
    lines += [
        f"- Data: `{' '.join(names)}` (tokens with the fingerprint"
        f" `{weights.data_fingerprint[:12]}`).",
        f"- Steps: {weights.step:,} of {config.batch_size} sequences, {tokens:,} tokens in all.",
        f"- Validation loss: {_loss(weights.val_loss)}.",
        f"- Command: `{command(weights.trained or config)}`",
    ]
    return "\n".join([*lines, ""])


def command(config: TrainConfig) -> str:
    """What trains the same, where the data and the weights it began with are in the folder: the
    settings that `gptjax train` would choose otherwise, as flags."""
    origin, source = config.init_from, config.data.source or config.data.dir or ""
    chosen = config_io.flatten(FINETUNE if origin else config_io.load_config("quickstart")[0])
    arguments = ["--init-from", _plain(Path(origin).name)] if origin else []
    if not config.data.mix:
        arguments += ["--data.source" if config.data.source else "--data.dir"]
        arguments += [_plain(Path(source).name)]
    for name, value in config_io.flatten(config).items():
        same = value == chosen[name] and name != "model.block_size"  # the weights' may be longer
        if not same and name not in NOT_IN_COMMAND:
            values = value if isinstance(value, tuple) else [value]
            values = [*map(_local, values)] if name in PATHS else values
            arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(["gptjax", "train", *arguments])


def _local(value: str) -> str:
    """A path, or one with a weight, without the folder."""
    path, equals, weight = value.rpartition("=") if "=" in value else (value, "", "")
    return f"{_plain(Path(path).name)}{equals}{_plain(weight)}"


def _loss(nats: float | None) -> str:
    if nats is None:
        return "not measured"
    return f"{nats:.4f} nats per token (perplexity {math.exp(min(nats, 700)):.4g})"


def _plain(name: str) -> str:
    """Without what Markdown or a line would read as more than a name."""
    return re.sub(r"[^\w. /:*+-]", "?", name)
