"""Weights from and to PyTorch's world.

    python -m gptjax.convert import SOURCE RUN_DIR      (Hugging Face GPT-2, or nanoGPT's ckpt.pt)
    python -m gptjax.convert export RUN_DIR DIR --format hf|nanogpt

An imported run is an ordinary one: sample from it, evaluate it, train on.
"""

import dataclasses
import json
import pickle
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from gptjax import (
    checkpoint,
    cli,
    data,
    devices,
    hf_tokenizer,
    optim,
    state_dict,
    tokenizers,
    weights,
)
from gptjax import config as config_lib
from gptjax.checkpoint import Checkpoints, Facts
from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import RunError, UserError, first_line, shown
from gptjax.places import place, replace_file
from gptjax.state_dict import HEAD, PREFIX
from gptjax.tokenizers import CharTokenizer, Gpt2Tokenizer, SentencePieceTokenizer, Tokenizer

Format = Literal["hf", "nanogpt"]

GPT2_IDS = 50257
# Rows of an embedding that may be there for its shape alone (nanoGPT has 50304 for 50257 ids).
MOST_PADDING = 1024
# Files above this size are written in several parts, as Hugging Face does.
SHARD_BYTES = 2 << 30


# --------------------------------------------------------------------------------- import


class Imported(NamedTuple):
    """What was read from PyTorch's world."""

    config: TrainConfig
    """With `model.vocab_size` as many rows as the embedding has."""
    params: Any
    where: str
    folder: Path
    """Where a tokenizer may lie."""
    step: int = 0
    opt_state: Any = None


def read_hugging_face(folder: Path) -> Imported:
    """A GPT-2 in Hugging Face's format: config.json with model.safetensors, in one file or
    sharded, or pytorch_model.bin.

    Raises:
        UserError: files are missing or damaged, tensors do not fit, or the model is not a GPT-2
            that we can compute exactly.
    """
    settings = weights.read_json(folder / "config.json")
    model, bare = _from_hf_config(settings, str(folder / "config.json"))
    params = state_dict.from_torch(
        weights.hugging_face_tensors(folder), model, "in_out", str(folder)
    )
    if bare != model and (fewer := state_dict.without_zeros(params, model, bare)):
        model, params = bare, fewer
    config = dataclasses.replace(config_lib.FINETUNE, model=model)
    return Imported(config, params, str(folder), folder)


def _from_hf_config(settings: dict[str, Any], where: str) -> tuple[ModelConfig, ModelConfig]:
    """(the model, the same without the biases that gptjax wrote as zeros). What a setting may
    be is what the formula of `transformers.GPT2LMHeadModel` needs to be ours."""
    required: dict[str, tuple[Any, ...]] = {
        "model_type": ("gpt2",),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * settings["n_embd"] if isinstance(settings.get("n_embd"), int) else 0),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    }
    default = {name: allowed[0] for name, allowed in required.items()}
    wrong = [
        f"{name} {shown(settings.get(name, default[name]))}"
        f" (expected {' or '.join(map(shown, allowed))})"
        for name, allowed in required.items()
        if settings.get(name, default[name]) not in allowed
    ]
    sizes = {
        "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
        "n_positions": "block_size", "vocab_size": "vocab_size",
    }  # fmt: skip
    wrong += [f"{name} is missing" for name in sizes if name not in settings]
    if wrong:
        raise UserError(f"{where} is not of a GPT-2 that gptjax can compute: {', '.join(wrong)}")
    drops = [settings.get(f"{name}_pdrop", 0.1) for name in ("resid", "embd", "attn")]
    odd = [drop for drop in drops if not isinstance(drop, (int, float))]
    if not odd and drops.count(drops[0]) < len(drops):
        print(f"note: dropout is set to 0 (resid, embd and attn have {drops}; we have one rate)")
    fields = {ours: settings[theirs] for theirs, ours in sizes.items()} | {
        "gelu": "erf" if settings.get("activation_function") == "gelu" else "tanh",
        "tied_head": settings.get("tie_word_embeddings", True),
        # One rate for all three places, or none.
        "dropout": odd or (drops[0] if drops.count(drops[0]) == len(drops) else 0.0),
    }
    ours = settings.get("gptjax")
    ours = ours if isinstance(ours, dict) else {}
    return (
        _checked(fields, where),
        _checked(fields | {k: ours[k] for k in ("bias", "qkv_bias") if k in ours}, where),
    )


def _checked(model: dict[str, Any], where: str) -> ModelConfig:
    """Raises UserError if a field is unknown, ill-typed or out of range."""
    config = _settings({"model": model}, where).model
    if config.vocab_size is None:
        raise UserError(f"{where}: vocab_size is {model.get('vocab_size')!r}; expected a number")
    return config


def _settings(fields: dict[str, Any], where: str) -> TrainConfig:
    try:
        text = json.dumps(fields)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} holds more than plain values: {error}") from None
    return config_lib.from_json(text, where)


def read_nanogpt(
    path: Path, *, optimizer: bool = True, gelu: Literal["tanh", "erf"] = "erf"
) -> Imported:
    """nanoGPT's ckpt.pt, with its settings and its AdamW's state, so that training goes on.

    Raises:
        UserError: the file is damaged, would run code, or is another model's.
    """
    saved = weights.load_torch_file(path)
    # Of the very type: a file may overwrite the methods of an OrderedDict.
    if type(saved) is not dict or type(saved.get("model_args")) is not dict:
        raise UserError(f"{path} is not nanoGPT's: expected `model` and `model_args` in it")
    where, settings = str(path), saved.get("config")
    settings = settings if type(settings) is dict else {}
    # nanoGPT always ties the head. It computed GELU by its tanh form until 2023, and by its exact
    # formula since; the file does not say.
    fields = {"bias": True, "gelu": gelu, "tied_head": True} | saved["model_args"]
    _check_plain(fields, f"{where}, model_args")
    model = _checked(fields, f"{where}, model_args")
    try:
        config = _from_nanogpt_settings(settings, model, f"{where}, config")
    except UserError as error:  # good weights may come with settings that we refuse
        print(f"note: its training settings are left out ({error})")
        config = dataclasses.replace(config_lib.FINETUNE, model=model)
    params = state_dict.from_torch(weights.TorchTensors(saved.pop("model", None), where), model,
                                   "out_in", where)  # fmt: skip
    step = saved.get("iter_num", 0)
    if not isinstance(step, int) or not 0 <= step < config_lib.LARGEST:
        found = shown(step) if isinstance(step, int) else type(step).__name__
        raise UserError(f"{where}: iter_num is {found}; expected a step's number")
    state = saved.pop("optimizer", None) if optimizer else None
    has_state = state is not None and state != {}
    return Imported(
        config,
        params,
        where,
        path.parent,
        step if has_state else 0,
        _from_torch_adamw(state, config, where) if has_state else None,
    )


def _check_plain(fields: dict[str, Any], where: str) -> None:
    """A pickle's lists may hold one another so often that no text could spell them."""
    for name, value in fields.items():
        if not isinstance(value, (str, int, float, type(None))):
            kind = type(value).__name__
            raise UserError(f"{where}: {shown(name)} is a {kind}; expected a number, text or none")


def _from_nanogpt_settings(settings: dict[str, Any], model: ModelConfig, where: str) -> TrainConfig:
    """nanoGPT's train.py globals as ours."""
    names = {
        "learning_rate": "learning_rate", "min_lr": "min_lr", "weight_decay": "weight_decay",
        "beta1": "beta1", "beta2": "beta2", "grad_clip": "grad_clip", "max_iters": "max_steps",
        "warmup_iters": "warmup_steps", "lr_decay_iters": "lr_decay_steps",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "eval_interval": "eval_interval", "log_interval": "log_interval",
        "batch_size": "batch_size", "eval_iters": "eval_batches",
    }  # fmt: skip
    fields = {ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}
    _check_plain(fields, where)
    if settings.get("decay_lr") is False:
        rate = fields.get("learning_rate", config_lib.FINETUNE.learning_rate)
        fields |= {"min_lr": rate, "warmup_steps": 0}
    # nanoGPT counts the sequences of one micro-batch.
    steps, rows = fields.get("gradient_accumulation_steps", 1), fields.get("batch_size", 0)
    if isinstance(steps, int) and isinstance(rows, int) and rows:
        fields["batch_size"] = rows * steps
    base = dataclasses.asdict(config_lib.FINETUNE) | {"model": dataclasses.asdict(model)}
    return _settings(base | fields, where)


def _adamw_order(config: ModelConfig) -> list[str]:
    """The parameters in the order of nanoGPT's optimizer: first what decays."""
    every = state_dict.places(config, "out_in")
    decayed = [name for name, place in every.items() if len(place.shape) > 1]
    return decayed + [name for name in every if name not in decayed]


def _from_torch_adamw(saved: Any, config: TrainConfig, where: str) -> Any:
    """Our optimizer's state from torch.optim.AdamW's state dict."""
    names = _adamw_order(config.model)
    advice = "; to import the weights alone, add --optimizer False"
    try:
        groups = [number for group in saved["param_groups"] for number in group["params"]]
        moments = [saved["state"].pop(number) for number in groups]
        counts = {int(moment.pop("step")) for moment in moments}
        first, second = (
            {name: moment.pop(key) for name, moment in zip(names, moments, strict=True)}
            for key in ("exp_avg", "exp_avg_sq")
        )
        rest = [*saved["state"], *(key for moment in moments for key in moment)]
        if len(counts) != 1 or not 0 <= min(counts) < config_lib.LARGEST:
            raise ValueError(f"its parameters were updated {sorted(counts)} times")
        if rest:
            raise ValueError(f"left over: {shown(rest[0])}")
    except (
        LookupError, TypeError, ValueError, OverflowError, RuntimeError, AttributeError,
    ) as error:  # fmt: skip
        raise UserError(
            f"{where}: `optimizer` is not AdamW's state of this model ({first_line(error)}){advice}"
        ) from None
    try:
        mu, nu = (
            state_dict.from_torch(
                weights.TorchTensors(part, where), config.model, "out_in", f"{where}, optimizer"
            )
            for part in (first, second)
        )
    except UserError as error:
        raise UserError(f"{error}{advice}") from None
    return optim.adam_state(config, np.asarray(counts.pop(), np.int32), mu, nu)


def read_model(source: str, flags: "ImportFlags") -> Imported:
    """From a folder, a ckpt.pt, or the Hugging Face Hub if nothing of that name is here.

    Raises:
        UserError: it is none of them, or cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return read_nanogpt(path, optimizer=flags.optimizer, gelu=flags.gelu)
    if (path / "checkpoints").is_dir():
        raise UserError(f"{source} is a run of gptjax already")
    if (path / "config.json").is_file():
        return read_hugging_face(path)
    if (path / "ckpt.pt").is_file():
        return read_nanogpt(path / "ckpt.pt", optimizer=flags.optimizer, gelu=flags.gelu)
    # A mistyped path must not become somebody's repository.
    a_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and source.strip(".")
    if a_name and not path.exists() and (path.parent == Path(".") or not path.parent.exists()):
        return read_hugging_face(weights.download(source))._replace(where=source)
    raise UserError(
        f"no model at {source!r}: expected a Hugging Face folder (config.json), nanoGPT's ckpt.pt,"
        " or a name on the Hugging Face Hub such as gpt2-xl"
    )


def find_tokenizer(asked: str | None, folder: Path, rows: int) -> Tokenizer:
    """The tokenizer of a model whose embedding has `rows`: the one in the folder `asked`, or
    "gpt2"; None: the one beside the weights, or GPT-2's if the size is right.

    Raises:
        UserError: none is found, or it has more ids than the embedding.
    """
    found = None
    if asked != "gpt2":
        place = Path(asked) if asked else folder
        run = checkpoint.newest_facts(place)
        found = tokenizers.from_json(run.tokenizer, str(place)) if run else None
        found = found or data.read_tokenizer(place) or hf_tokenizer.read(place)
        if asked and found is None:
            raise UserError(
                f"--tokenizer {asked}: expected gpt2, a run or data folder of gptjax, or a"
                " folder with tokenizer files of Hugging Face or nanoGPT (meta.pkl)"
            )
    if asked == "gpt2" or (found is None and GPT2_IDS <= rows <= GPT2_IDS + MOST_PADDING):
        found = Gpt2Tokenizer()
    if found is None:
        raise UserError(
            f"no tokenizer lies beside the weights, and {rows} ids are not GPT-2's; name the folder"
            " of one with --tokenizer (nanoGPT's data folder with meta.pkl, say)"
        )
    if not found.n_vocab or not 0 <= rows - found.n_vocab <= MOST_PADDING:
        raise UserError(
            f"the {found.kind} tokenizer has {found.n_vocab} ids, but the model knows {rows}; name"
            " another with --tokenizer"
        )
    return found


def _multiple(ids: int, rows: int) -> int:
    """The `vocab_multiple` that pads `ids` to `rows`."""
    likely = (1, *(2**n for n in range(3, 14)), rows)
    return next(m for m in likely if -(-ids // m) * m == rows)


def write_run(model: Imported, tokenizer: Tokenizer, run_dir: Path) -> TrainConfig:
    """A run directory with one checkpoint. RunError: it cannot be written."""
    rows = model.config.model.vocab_size
    assert rows is not None
    config = dataclasses.replace(
        model.config,
        run_dir=str(run_dir),
        model=dataclasses.replace(
            model.config.model,
            vocab_size=tokenizer.n_vocab,
            vocab_multiple=_multiple(tokenizer.n_vocab, rows),
        ),
        data=dataclasses.replace(model.config.data, tokenizer=tokenizer.kind),
    )
    facts = Facts(config, tokenizers.to_json(tokenizer), None, None)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with Checkpoints(run_dir, config.keep_checkpoints) as checkpoints:
            checkpoints.save(model.step, model.params, model.opt_state, facts)
        replace_file(run_dir / "config.json", config_lib.to_json(config) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {run_dir}: {error.strerror}") from None
    return config


# --------------------------------------------------------------------------------- export


def obstacles(config: ModelConfig, tokenizer: Tokenizer | None, to: Format) -> list[str]:
    """What of this model the format cannot say; empty when it can be exported exactly."""
    out = []
    if config.n_layer == 0:
        out.append("n_layer 0 (there the format has a final LayerNorm, we have none)")
    if config.position == "sinusoidal":
        out.append("sinusoidal positions")
    if "banded" in config.attention_pattern:
        out.append("banded attention")
    if to == "nanogpt":
        if config.gelu != "erf":
            out.append("GELU's tanh form")
        if not config.tied_head:
            out.append("an untied head")
        if config.use_qkv_bias != config.bias:
            out.append(f"qkv_bias {config.qkv_bias} beside bias {config.bias}")
        if isinstance(tokenizer, SentencePieceTokenizer):
            out.append("a sentencepiece tokenizer")
        if isinstance(tokenizer, Gpt2Tokenizer) and not tokenizer.is_gpt2s_own:
            out.append("a byte-pair encoding that is not GPT-2's own")
    return out


def hf_model(
    params: Any, config: ModelConfig, *, keep_padding: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, state dict) for `transformers.GPT2LMHeadModel`. Biases that the model does
    not have are written as zeros, which is the same function."""
    full = dataclasses.replace(config, bias=True, qkv_bias=None)
    ours = state_dict.to_torch(params, config, "in_out", padding=keep_padding)
    tensors = {
        name: ours[name] if name in ours else np.zeros(place.shape, np.float32)
        for name, place in state_dict.places(full, "in_out").items()
    }
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": len(tensors[f"{PREFIX}wte.weight"]),
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": {"tanh": "gelu_new", "erf": "gelu"}[config.gelu],
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": config.tied_head,
        "dtype": "float32",
        "gptjax": {"bias": config.bias, "qkv_bias": config.qkv_bias},
    }
    return settings | dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout
    ), tensors


def export_hugging_face(
    loaded: checkpoint.Loaded, tokenizer: Tokenizer, folder: Path, *,
    keep_padding: bool = False, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """config.json, model.safetensors (sharded above `shard_bytes`) and the tokenizer's files."""
    config = loaded.facts.config.model
    settings, tensors = hf_model(loaded.params, config, keep_padding=keep_padding)
    # None: transformers would fill in GPT-2's ids.
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    hf_tokenizer.write(tokenizer, folder, config.block_size)

    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
        size = sum(part.nbytes for part in shards[-1].values())
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = array
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library lets nobody else read it
        weight_map |= dict.fromkeys(shard, file)
    if count > 1:
        total = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / weights.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def export_nanogpt(
    loaded: checkpoint.Loaded, tokenizer: Tokenizer, folder: Path, final: Path, *,
    keep_padding: bool = False,
) -> None:  # fmt: skip
    """ckpt.pt for nanoGPT's sample.py and, with the optimizer's state, its train.py; meta.pkl
    for characters. `final` is the folder's name in the end."""
    torch = weights.pytorch()
    config = loaded.facts.config
    model = config.model

    def named(tree: Any) -> dict[str, Any]:
        arrays = state_dict.to_torch(tree, model, "out_in", padding=keep_padding)
        return {name: torch.tensor(array) for name, array in arrays.items()}

    tensors = named(loaded.params)
    rows = len(tensors[f"{PREFIX}wte.weight"])
    best = loaded.facts.best_val_loss
    saved: dict[str, Any] = {
        "model": tensors | {HEAD: tensors[f"{PREFIX}wte.weight"]},
        "model_args": {
            "n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd,
            "block_size": model.block_size, "bias": model.bias, "vocab_size": rows,
            "dropout": model.dropout,
        },
        "iter_num": loaded.step,
        "best_val_loss": 1e9 if best is None else best,  # nanoGPT begins with 1e9
        "config": {
            # sample.py looks for meta.pkl in data/DATASET; an absolute path leads it here.
            "dataset": str(final.absolute()),
            "batch_size": config.micro_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "learning_rate": config.learning_rate, "min_lr": config.min_lr, "decay_lr": True,
            "warmup_iters": config.warmup_steps, "lr_decay_iters": config.decay_steps,
            "max_iters": config.max_steps, "weight_decay": config.weight_decay,
            "beta1": config.beta1, "beta2": config.beta2, "grad_clip": config.grad_clip,
            "eval_interval": config.eval_interval, "log_interval": config.log_interval,
            "eval_iters": config.eval_batches,
        },
    }  # fmt: skip
    if loaded.opt_state is not None:
        count, *moments = optim.adam_parts(loaded.opt_state)
        mu, nu = map(named, moments)
        order = _adamw_order(model)
        decayed = [i for i, name in enumerate(order) if tensors[name].ndim > 1]
        plain = list(range(len(decayed), len(order)))
        with_rates = torch.optim.AdamW(
            [{"params": [torch.zeros(())], "weight_decay": decay} for decay in
             (config.weight_decay, 0.0)],
            lr=config.learning_rate, betas=(config.beta1, config.beta2),
        ).state_dict()["param_groups"]  # fmt: skip
        saved["optimizer"] = {
            "state": {
                i: {"step": torch.tensor(float(count)), "exp_avg": mu[n], "exp_avg_sq": nu[n]}
                for i, n in enumerate(order)
            },
            "param_groups": [
                group | {"params": numbers}
                for group, numbers in zip(with_rates, (decayed, plain), strict=True)
            ],
        }
    torch.save(saved, folder / "ckpt.pt")
    if isinstance(tokenizer, CharTokenizer):
        itos = dict(enumerate(tokenizer.characters))
        meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def export(run_dir: Path, folder: Path, flags: "ExportFlags") -> None:
    """Write the run's checkpoint to `folder`, which appears when it is whole.

    Raises:
        UserError: the format cannot express the model, or `folder` exists. RunError: it cannot
            be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name another folder or delete it")
    loaded = checkpoint.load(run_dir, flags.checkpoint, optimizer=flags.format == "nanogpt")
    tokenizer = tokenizers.from_json(loaded.facts.tokenizer, str(run_dir))
    if missing := obstacles(loaded.facts.config.model, tokenizer, flags.format):
        raise UserError(f"the format {flags.format} cannot express {', '.join(missing)}")
    padding = flags.keep_padding
    try:
        with data.made_whole(folder) as scratch:
            if flags.format == "hf":
                export_hugging_face(loaded, tokenizer, scratch, keep_padding=padding)
            else:
                export_nanogpt(loaded, tokenizer, scratch, folder, keep_padding=padding)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise RunError(f"cannot write {folder}: {first_line(error)}") from None


# -------------------------------------------------------------------------------- command


@dataclasses.dataclass(frozen=True)
class ImportFlags:
    """Make a run directory from PyTorch weights: a Hugging Face GPT-2 folder, nanoGPT's ckpt.pt, or
    a name on the Hugging Face Hub such as gpt2-xl."""

    tokenizer: str | None = None
    """gpt2, a run or data folder of gptjax, or a folder with tokenizer files of Hugging Face or
    nanoGPT (meta.pkl). None: those beside the weights, else GPT-2's where the size is right."""
    optimizer: bool = True
    """Take over the state of nanoGPT's optimizer, so that training goes on."""
    gelu: Literal["tanh", "erf"] = "erf"
    """GELU form of a ckpt.pt: erf is nanoGPT's since 2023, tanh was its before. (A Hugging Face
    folder says which it is.)"""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        return ["--tokenizer is empty; name a folder"] if self.tokenizer == "" else []


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    """Write a run's weights for PyTorch. hf: transformers.AutoModelForCausalLM.from_pretrained(DIR)
    loads them; nanogpt: nanoGPT's sample.py --out_dir=DIR does."""

    format: Format = "hf"
    """hf or nanogpt."""
    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    keep_padding: bool = False
    """Keep the embedding's padded rows. They have no logits here, but would have in PyTorch."""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        return []


USAGE = """\
python -m gptjax.convert import SOURCE RUN_DIR [--help]
python -m gptjax.convert export RUN_DIR DIR [--format hf|nanogpt] [--help]"""


def main(argv: list[str]) -> None:
    """`python -m gptjax.convert import|export ...`."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("--help", "-h"):
        print(f"{__doc__}\n{USAGE}")
        return
    prog = f"python -m gptjax.convert {command}"
    if command == "import":
        named, importing = cli.parse(ImportFlags(), rest, prog, "SOURCE RUN_DIR")
        if len(named) < 2:
            raise UserError(f"which model, and where to? {prog} SOURCE RUN_DIR")
        devices.use_platform("cpu")
        import_model(named[0], place(named[1]), importing)
    elif command == "export":
        named, exporting = cli.parse(ExportFlags(), rest, prog, "RUN_DIR DIR")
        if len(named) < 2:
            raise UserError(f"which run, and where to? {prog} RUN_DIR DIR")
        devices.use_platform("cpu")
        export(place(named[0]), Path(named[1]), exporting)
        print(f"wrote {named[1]} ({exporting.format})")
        if (Path(named[1]) / "meta.pkl").exists():
            print(
                "its ckpt.pt names this folder, where nanoGPT finds meta.pkl: if you move it, copy"
                " meta.pkl to the data folder that nanoGPT looks in"
            )
    else:
        raise UserError(f"import or export? {' | '.join(USAGE.splitlines())}")


def import_model(source: str, run_dir: Path, flags: ImportFlags) -> None:
    """Import, and say what came of it and what to do with it."""
    if checkpoint.newest_facts(run_dir):
        raise UserError(f"{run_dir} holds a run already; name another folder")
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; name a folder")
    model = read_model(source, flags)
    rows = model.config.model.vocab_size
    assert rows is not None
    tokenizer = find_tokenizer(flags.tokenizer, model.folder, rows)
    config = write_run(model, tokenizer, run_dir).model
    spare = rows - tokenizer.n_vocab
    padding = f", {spare} rows of the embedding taken for padding" if spare else ""
    state = f", step {model.step}, with its optimizer's state" if model.opt_state else ""
    print(
        f"imported {config.num_parameters():,} parameters ({config.n_layer} layers,"
        f" {config.n_head} heads, {config.n_embd} wide, block {config.block_size},"
        f" GELU's {config.gelu} form, {tokenizer.kind} tokenizer{padding}{state}) from"
        f" {model.where}\n"
        f"sample: python generate_jax.py --run-dir {shlex.quote(str(run_dir))}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
