"""Every setting, with its unit and range, as frozen dataclasses; the GPT-2 and GPT-3 sizes."""

import dataclasses
import difflib
import json
import re
import runpy
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from gptjax.errors import UserError, shown

CONFIGS = Path(__file__).parent.parent / "configs"

LARGEST = 2**31
"""Whole numbers are int32 on devices."""

MOST_LAYERS = 100_000

DeviceKind = Literal["auto", "cpu", "gpu", "tpu"]
StrategyKind = Literal["pmap", "fsdp"]
TokenizerKind = Literal["char", "gpt2", "sentencepiece"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. Field names are GPT-2's and nanoGPT's; the defaults are GPT-2 124M."""

    n_layer: int = 12
    """Transformer blocks; 0 leaves embeddings and the output head only."""
    n_head: int = 12
    """Attention heads; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    block_size: int = 1024
    """Longest context, in tokens."""
    vocab_size: int | None = None
    """Token ids the model knows. None: as many as the tokenizer has."""
    vocab_multiple: int = 1
    """Round the embedding's rows up to a multiple (64 or 128 suits matrix units); padded ids
    have no logits."""
    dropout: float = 0.0
    """Probability of dropping embeddings, attention weights and residual branches, in [0, 1)."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Bias of the query/key/value projection. None: as `bias`."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU form: tanh is GPT-2's and Hugging Face's, erf is nanoGPT's."""
    position: Literal["learned", "sinusoidal"] = "learned"
    """Position embedding: a learned table, or the fixed sinusoids of "Attention is all you need"
    (section 3.5)."""
    tied_head: bool = True
    """Share the output head's matrix with the token embedding."""
    attention_pattern: tuple[Literal["dense", "banded"], ...] = ("dense",)
    """Attention per layer, repeated over the depth; GPT-3 alternates dense and banded."""
    attention_window: int = 256
    """Tokens a banded layer looks back over, itself included."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention kernel. auto: cuDNN's flash attention where it applies, XLA elsewhere."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; parameters stay float32. auto: bfloat16 on GPU and TPU, float32 on CPU."""
    remat: bool = False
    """Recompute each block's activations in the backward pass: less memory, more time."""
    scan_unroll: int = 0
    """Layers unrolled in the scan over blocks. 0: all of them up to 12 layers without remat,
    else 1."""

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding."""
        assert self.vocab_size is not None, "vocab_size is unknown until a tokenizer is chosen"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def use_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def windows(self) -> tuple[int, ...]:
        """Per layer, how many tokens back attention reaches, itself included."""
        reach = {"dense": self.block_size, "banded": min(self.attention_window, self.block_size)}
        pattern = self.attention_pattern
        return tuple(reach[pattern[i % len(pattern)]] for i in range(self.n_layer))

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Trained numbers; without `embeddings`, those outside wte, wpe and an untied head."""
        c, bias = self.n_embd, int(self.bias)
        norm = c * (1 + bias)
        attention = 4 * c * c + 3 * c * int(self.use_qkv_bias) + c * bias
        mlp = 8 * c * c + 5 * c * bias
        total = self.n_layer * (2 * norm + attention + mlp) + (norm if self.n_layer else 0)
        if embeddings:
            total += self.padded_vocab_size * c * (1 if self.tied_head else 2)
            total += self.block_size * c if self.position == "learned" else 0
        return total

    def flops_per_token(self) -> float:
        """Floating-point operations of one training step per token: 6 N + 12 L C T, with N the
        parameters that multiply (PaLM, arXiv:2204.02311, appendix B)."""
        multiplied = self.num_parameters(embeddings=False) + self.padded_vocab_size * self.n_embd
        return 6 * multiplied + 12 * self.n_embd * sum(self.windows)

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words; empty when the model can be built."""
        out = _outside(self, 0, "n_layer", "scan_unroll")
        out += _outside(self, 1, "n_head", "n_embd", "block_size", "attention_window")
        out += _outside(self, 1, "vocab_size", "vocab_multiple")
        if self.n_layer > MOST_LAYERS:  # each takes room, even where only shapes are made
            out.append(f"model.n_layer {self.n_layer} must be at most {MOST_LAYERS}")
        if self.n_head > 0 and self.n_embd > 0 and self.n_embd % self.n_head:
            near = [h for h in range(1, min(self.n_embd, 4096) + 1) if self.n_embd % h == 0]
            close = sorted(sorted(near, key=lambda h: abs(h - self.n_head))[:3])
            out.append(
                f"model.n_embd {self.n_embd} is not divisible by model.n_head {self.n_head};"
                f" n_head may be {_either(close)}"
            )
        if not 0 <= self.dropout < 1:
            out.append(f"model.dropout {self.dropout} is outside [0, 1)")
        if not self.attention_pattern:
            out.append("model.attention_pattern is empty; expected dense and/or banded")
        if self.position == "sinusoidal" and self.n_embd % 2:
            out.append(f"model.n_embd {self.n_embd} must be even for sinusoidal positions")
        return out


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text and how it becomes tokens."""

    source: str | None = "builtin"
    """builtin (the Python standard library's own source), shakespeare (downloaded once), or a
    .txt or .jsonl file (field `text`), a folder, or a glob of them. None: not known, the weights
    were imported."""
    tokenizer: TokenizerKind = "char"
    """char: one token a character; gpt2: GPT-2's byte-pair encoding; sentencepiece: a model
    trained on the text itself."""
    sentencepiece_vocab_size: int = 4096
    """Vocabulary of the sentencepiece model, in pieces."""
    val_fraction: float = 0.1
    """Share of the text's characters, at its end, held out for validation, in (0, 1)."""
    dir: str | None = None
    """Use this prepared folder as it is (also nanoGPT's train.bin, val.bin, meta.pkl). None:
    prepare `source` under data/."""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        out = _outside(self, 1, "sentencepiece_vocab_size")
        if self.source == "":
            out.append("data.source is empty; name a file, a folder or a glob")
        if not 0 < self.val_fraction < 1:
            out.append(f"data.val_fraction {self.val_fraction} is outside (0, 1)")
        return out


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices share the work."""

    strategy: StrategyKind = "pmap"
    """pmap: every device holds the whole model and its optimizer state (16 bytes a parameter).
    fsdp: each holds a share and puts weights together layer by layer: for models that one device
    cannot hold. The same numbers, the same checkpoints."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How several hosts find each other. All None: by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID, or by what SLURM or a TPU pod says; else there is one host."""

    coordinator_address: str | None = None
    """host:port of process 0, which all hosts can reach."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """This process's number, from 0."""
    initialization_timeout: int = 1800
    """Seconds to wait for the others at the start; a pod may take long to come up."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a host counts as dead, and the others end."""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        out = _outside(self, 1, "num_processes", "initialization_timeout", "heartbeat_timeout")
        out += _outside(self, 0, "process_id")
        named = (self.coordinator_address, self.num_processes, self.process_id)
        if None in named and any(value is not None for value in named):
            out.append(
                "distributed.coordinator_address, num_processes and process_id go together:"
                " give all three, or none"
            )
        elif self.coordinator_address and not re.fullmatch(
            r"\S+:\d{1,5}", self.coordinator_address
        ):
            out.append(
                f"distributed.coordinator_address {self.coordinator_address!r} is not host:port"
            )
        if (self.process_id or 0) >= (self.num_processes or LARGEST):
            out.append(
                f"distributed.process_id {self.process_id} is not below num_processes"
                f" {self.num_processes}; they count from 0"
            )
        return out


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    distributed: DistributedConfig = DistributedConfig()
    run_dir: str | None = None
    """Where checkpoints and metrics go; a run that exists there is resumed. None: runs/ and the
    config's name."""
    init_from: str | None = None
    """Start from the best weights of this run (an imported one, say) and its architecture, with a
    fresh optimizer. A smaller model.block_size crops its position table. None: random weights."""
    seed: int = 1337
    """Seeds the initial weights, the data order and dropout."""

    batch_size: int = 12
    """Sequences per optimizer step, over all devices, hosts and accumulation steps."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step: more fits a large batch into little memory."""
    max_steps: int = 2000
    """Optimizer steps of the whole run."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at and after the end of the decay."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    lr_decay_steps: int | None = None
    """Step at which the cosine decay ends. None: max_steps."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices and embeddings (never of biases and LayerNorms)."""
    beta1: float = 0.9
    """AdamW's decay of the first moment, in [0, 1)."""
    beta2: float = 0.99
    """AdamW's decay of the second moment, in [0, 1)."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""

    log_interval: int = 10
    """Steps between progress lines."""
    eval_interval: int = 250
    """Steps between evaluations; each is followed by a checkpoint (unless save_interval says
    otherwise and it is not the best) and a sample."""
    eval_batches: int = 20
    """Batches of fixed validation windows per evaluation."""
    eval_full_split: bool = False
    """Evaluate on the whole validation split, exactly, instead of eval_batches batches."""
    save_interval: int | None = None
    """Steps between checkpoints. None: as eval_interval."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the best by validation loss is kept besides."""
    sample_tokens: int = 300
    """Tokens of the sample printed after each evaluation; 0 prints none."""

    device: DeviceKind = "auto"
    """Kind of device to train on. auto: the fastest kind that is there."""
    num_devices: int | None = None
    """CPU devices to split this machine's cores into. None: one, which uses all of them."""
    dry_run: bool = False
    """Compile the training step, say what it needs of each device's memory and whether that is
    there, and end. (Where only the text can tell the vocabulary, it is prepared.)"""
    device_memory: float | None = None
    """Memory of one device, in GiB, for a dry run to compare with (of devices that are not here,
    say). None: what the device has; of a CPU what is free."""

    @property
    def decay_steps(self) -> int:
        return self.max_steps if self.lr_decay_steps is None else self.lr_decay_steps

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one micro-batch, over all devices."""
        return self.batch_size // self.gradient_accumulation_steps

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        out = self.model.problems() + self.data.problems() + self.distributed.problems()
        out += _outside(self, 0, "seed", "warmup_steps", "sample_tokens")
        if self.num_devices and self.num_devices > 1024:
            out.append(f"num_devices {self.num_devices} must be at most 1024")
        for name in ("run_dir", "init_from"):
            if getattr(self, name) == "":
                out.append(f"{name} is empty; name a folder")
        out += _outside(self, 1, "batch_size", "gradient_accumulation_steps", "max_steps")
        out += _outside(self, 1, "log_interval", "eval_interval", "eval_batches", "save_interval")
        out += _outside(self, 1, "keep_checkpoints", "num_devices", "lr_decay_steps")
        for name in ("learning_rate", "min_lr", "weight_decay", "grad_clip"):
            value = getattr(self, name)
            # Not `isfinite`, which has no answer for a whole number that no float holds.
            if not 0 <= value <= sys.float_info.max:
                out.append(f"{name} {value} must be a finite number of at least 0")
        if self.device_memory is not None and not self.device_memory > 0:
            out.append(f"device_memory {self.device_memory} must be a number above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                out.append(f"{name} {getattr(self, name)} is outside [0, 1)")
        if self.min_lr > self.learning_rate:
            out.append(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}")
        return out

    def divide_batch(self, num_devices: int) -> int:
        """Sequences of one device's micro-batch.

        Raises:
            UserError: the batch does not divide; names the nearest sizes that do.
        """
        unit = num_devices * self.gradient_accumulation_steps
        if self.batch_size % unit:
            down = self.batch_size // unit * unit
            near = [size for size in (down, down + unit) if size]
            raise UserError(
                f"batch_size {self.batch_size} does not divide over {num_devices} device(s) x"
                f" {self.gradient_accumulation_steps} accumulation step(s);"
                f" use {_either(near)} or another multiple of {unit}"
            )
        return self.batch_size // unit


FINETUNE = TrainConfig(data=DataConfig(source=None), learning_rate=3e-5, min_lr=3e-6, beta2=0.95)
"""To go on from pretrained weights, on a text that has to be named: nanoGPT's learning rate for
that."""

# What may change when a run is resumed: it alters reports, places and speed, but no number of the
# training beyond rounding. A data set may move: the fingerprint of its tokens is compared.
RESUME_MAY_CHANGE = {
    *("run_dir", "max_steps", "device", "num_devices", "dry_run", "device_memory"),
    *("log_interval", "eval_interval", "eval_batches", "eval_full_split"),
    *("save_interval", "keep_checkpoints", "sample_tokens"),
    *("data.dir", "model.attention", "model.scan_unroll", "model.remat", "parallel.strategy"),
    *(f"distributed.{field.name}" for field in dataclasses.fields(DistributedConfig)),
}


# What is not fixed by weights: how long a context they are used with, and how they are computed.
NOT_IN_WEIGHTS = {"block_size", "dropout", "attention", "dtype", "remat", "scan_unroll"}


def adopt(
    wanted: ModelConfig, weights: ModelConfig, *, unset: ModelConfig | None = ModelConfig()
) -> ModelConfig:
    """`wanted` with the architecture of `weights`. What equals `unset` is nobody's wish and becomes
    theirs; None: everything is one.

    Raises:
        UserError: a setting differs from theirs, or they know fewer positions than block_size.
    """
    found, problems = dataclasses.asdict(wanted), []
    for name, theirs in dataclasses.asdict(weights).items():
        value = found[name]
        is_unset = unset is not None and value == getattr(unset, name)
        if name not in NOT_IN_WEIGHTS:
            if value != theirs and not is_unset:
                problems.append(f"model.{name} {value} is not the weights' {theirs}; leave it out")
            found[name] = theirs
        elif name == "block_size":
            if value > theirs and not is_unset:
                problems.append(f"model.block_size {value} exceeds the weights' {theirs}")
            found[name] = theirs if is_unset else value
    if problems:
        raise UserError("; ".join(problems))
    return ModelConfig(**found)


def resume_conflicts(
    saved: TrainConfig, wanted: TrainConfig, *, imported: bool = False
) -> list[str]:
    """What differs and would make the resumed run another run, a line a setting. Of an `imported`
    run only the weights are fixed."""
    old, new = flatten(saved), flatten(wanted)
    if imported:
        free = {f"model.{name}" for name in NOT_IN_WEIGHTS - {"block_size"}}
        old = {n: v for n, v in old.items() if n.startswith("model.") and n not in free}
        return [
            f"{name}: {value!r} in the run, {new[name]!r} now"
            for name, value in old.items()
            if new[name] != value
        ]
    old["lr_decay_steps"], new["lr_decay_steps"] = saved.decay_steps, wanted.decay_steps
    advice = {"lr_decay_steps": f" (to train longer, add --lr-decay-steps {saved.decay_steps})"}
    return [
        f"{name}: {old[name]!r} in the run, {new[name]!r} now{advice.get(name, '')}"
        for name in old
        if old[name] != new[name] and name not in RESUME_MAY_CHANGE
    ]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.n_layer": 12, ...}: every leaf setting by its flag's name."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out |= flatten(value, f"{prefix}{field.name}.")
        else:
            out[prefix + field.name] = value
    return out


def to_json(config: TrainConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str, where: str) -> TrainConfig:
    """The inverse of `to_json`; `where` names the source in errors.

    Raises:
        UserError: not JSON, or unknown, ill-typed or out-of-range settings (all of them named).
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    problems: list[str] = []
    config = _build(TrainConfig, data, "", problems)
    if problems or (problems := config.problems()):
        raise UserError(f"{where}: " + "; ".join(problems))
    return config


def load(path: Path) -> TrainConfig:
    """The object `config` of a Python file.

    Raises:
        UserError: no such file, an error in it, or no TrainConfig of that name.
    """
    if not path.is_file():
        there = ", ".join(f"configs/{p.name}" for p in sorted(CONFIGS.glob("*.py")))
        raise UserError(f"no config file {path}; there are: {there}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:  # the file is the user's code: it may raise anything
        raise UserError(f"{path}: {type(error).__name__}: {_with_near_miss(error)}") from None
    if not isinstance(config, TrainConfig):
        raise UserError(f"{path} must set `config = TrainConfig(...)` (from gptjax.config)")
    # Python checks no types of fields; our reader of JSON does.
    return from_json(to_json(config), str(path))


def _with_near_miss(error: Exception) -> str:
    """The message, and the setting that an unknown keyword argument may have meant."""
    text = str(error).split(". Did you mean")[0]  # Python's own guess, from 3.13 on
    unknown = re.search(r"unexpected keyword argument '(\w+)'$", text)
    names = [name.split(".")[-1] for name in flatten(TrainConfig())]
    near = difflib.get_close_matches(unknown[1], names, n=1) if unknown else []
    return f"{text}; did you mean {near[0]}?" if near else text


def _build(cls: Any, data: Any, prefix: str, problems: list[str]) -> Any:
    """A dataclass from a plain dict, adding to `problems` what does not fit."""
    if not isinstance(data, dict):
        problems.append(f"{prefix.rstrip('.') or 'config'} is {shown(data)}; expected an object")
        return cls()
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if len(problems) == 100:
            break  # more than a message holds, and each takes time
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            problems.append(f"unknown setting {prefix}{key}{hint}")
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, f"{prefix}{key}.", problems)
        elif _fits(value, hints[key]):
            values[key] = tuple(value) if isinstance(value, list) else value
        else:
            kind = getattr(hints[key], "__name__", str(hints[key])).replace("typing.", "")
            problems.append(f"{prefix}{key} is {shown(value)}; expected {kind}")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _outside(config: Any, least: int, *names: str) -> list[str]:
    """What is wrong with whole numbers that must lie in [least, LARGEST)."""
    parts = {ModelConfig: "model.", DataConfig: "data.", DistributedConfig: "distributed."}
    prefix = parts.get(type(config), "")
    out = []
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            out.append(f"{prefix}{name} {value} must be at least {least}")
        if value is not None and value >= LARGEST:
            out.append(f"{prefix}{name} {value} must be below {LARGEST}")
    return out


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))


def _sized(n_layer: int, n_head: int, n_embd: int, **other: Any) -> ModelConfig:
    return ModelConfig(n_layer, n_head, n_embd, vocab_size=50257, **other)


def _gpt3(n_layer: int, n_head: int, n_embd: int) -> ModelConfig:
    # "Alternating dense and locally banded sparse attention patterns" (arXiv:2005.14165, section
    # 2.1). The paper gives no bandwidth; 256 of the 2048-token context is our choice.
    return _sized(n_layer, n_head, n_embd, block_size=2048, attention_pattern=("dense", "banded"))


PRESETS: dict[str, ModelConfig] = {
    "gpt2": _sized(12, 12, 768),
    "gpt2-medium": _sized(24, 16, 1024),
    "gpt2-large": _sized(36, 20, 1280),
    "gpt2-xl": _sized(48, 25, 1600),
    # GPT-3, table 2.1, as (n_layers, n_heads, d_model). Two rows contradict themselves, because
    # n_heads x d_head should be d_model: XL lists 24 x 128 for 2048, where 16 heads fit and give
    # the stated 1.3B; 13B lists d_model 5140 for 40 x 128 = 5120, where 5120 fits.
    "gpt3-small": _gpt3(12, 12, 768),
    "gpt3-medium": _gpt3(24, 16, 1024),
    "gpt3-large": _gpt3(24, 16, 1536),
    "gpt3-xl": _gpt3(24, 16, 2048),
    "gpt3-2.7b": _gpt3(32, 32, 2560),
    "gpt3-6.7b": _gpt3(32, 32, 4096),
    "gpt3-13b": _gpt3(40, 40, 5120),
    "gpt3-175b": _gpt3(96, 96, 12288),
}
