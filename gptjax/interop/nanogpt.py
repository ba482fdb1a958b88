"""nanoGPT's ckpt.pt, with its settings and its optimizer's state, so that training goes on; and
its meta.pkl for characters. Needs PyTorch."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import optim
from gptjax.config import FINETUNE, ModelConfig, TrainConfig
from gptjax.config_io import from_dict, to_dict
from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer, SentencePieceTokenizer, Tokenizer
from gptjax.errors import UserError, first_line, quoted
from gptjax.interop import huggingface, parameter_names, tensor_files
from gptjax.interop.parameter_names import EMBEDDING, HEAD
from gptjax.interop.weights import Gelu, Weights, model_config, plain
from gptjax.runtime_config import RuntimeConfig
from gptjax.settings import INT_LIMIT

OPTIMIZER = {
    "learning_rate": "learning_rate", "min_lr": "min_lr", "weight_decay": "weight_decay",
    "beta1": "beta1", "beta2": "beta2", "grad_clip": "grad_clip",
    "warmup_iters": "warmup_steps", "lr_decay_iters": "lr_decay_steps",
}  # fmt: skip
"""nanoGPT's settings -> ours."""

RUNTIME = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "eval_interval": "eval_interval", "log_interval": "log_interval",
    "eval_iters": "eval_batches",
}  # fmt: skip

MODEL = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")


def read(path: Path, *, optimizer: bool = True, gelu: Gelu = "erf") -> Weights:
    """The model in a ckpt.pt.

    Args:
        optimizer: with the state of its AdamW, where it is there; else the step is 0.
        gelu: the form of GELU, which the file does not say: nanoGPT computed it by tanh until 2023,
            by its exact formula since.

    Raises:
        UserError: the file is damaged, would run code, or is another model's.
    """
    saved, where = tensor_files.load_torch_file(path), str(path)
    # Of the very type: a file may overwrite the methods of an OrderedDict.
    if type(saved) is not dict or type(saved.get("model_args")) is not dict:
        raise UserError(f"{path} is not nanoGPT's: expected `model` and `model_args` in it")
    fields = {"bias": True, "gelu": gelu, "tied_head": True} | saved["model_args"]
    model = model_config(fields, f"{where}, model_args")
    settings, notes = saved.get("config"), list[str]()
    config, runtime = dataclasses.replace(FINETUNE, model=model), RuntimeConfig()
    if type(settings) is dict:
        try:
            config, runtime = _read_settings(settings, config, f"{where}, config")
        except UserError as error:  # good weights may come with settings that we refuse
            notes.append(f"its training settings are left out ({error})")
    tensors = tensor_files.torch_tensors(saved.pop("model", None), where)
    params = parameter_names.from_torch(tensors, model, "out_in", where)
    step = plain({"iter_num": saved.get("iter_num", 0)})["iter_num"]
    if not isinstance(step, int) or not 0 <= step < INT_LIMIT:
        raise UserError(f"{where}: iter_num is {quoted(step)}; expected a step's number")
    state = saved.pop("optimizer", None) if optimizer else None
    if state is None or state == {}:
        return Weights(config, params, runtime, notes=tuple(notes))
    try:
        opt_state = _read_optimizer(state, config, f"{where}, optimizer")
    except (
        UserError, LookupError, TypeError, ValueError, OverflowError, RuntimeError, AttributeError,
    ) as error:  # fmt: skip
        raise UserError(
            f"{where}: `optimizer` is not AdamW's state of this model ({first_line(error)}); to"
            " import the weights alone, add --optimizer False"
        ) from None
    return Weights(config, params, runtime, step, opt_state, notes=tuple(notes))


def _read_settings(
    settings: dict[Any, Any], config: TrainConfig, where: str
) -> tuple[TrainConfig, RuntimeConfig]:
    """Out of the globals of nanoGPT's train.py. UserError: we refuse one."""
    names = OPTIMIZER | RUNTIME | {"batch_size": "batch_size", "max_iters": "max_steps"}
    found = plain({name: settings[name] for name in names if name in settings})
    ours = {names[name]: value for name, value in found.items()}
    if settings.get("decay_lr") is False:
        ours["min_lr"] = ours.get("learning_rate", config.optimizer.learning_rate)
        ours["warmup_steps"] = 0
    circumstances = {name: ours.pop(name) for name in RUNTIME.values() if name in ours}
    rates = {name: ours.pop(name) for name in OPTIMIZER.values() if name in ours}
    runtime = from_dict(RuntimeConfig, circumstances, where)
    ours["optimizer"] = to_dict(config.optimizer) | rates
    config = from_dict(TrainConfig, to_dict(config) | ours, where)
    # nanoGPT counts the sequences of one micro-batch, in training and in evaluation.
    steps = runtime.gradient_accumulation_steps
    if "batch_size" in found:
        config = config.replace({"batch_size": config.batch_size * steps})
    if "eval_iters" in found:
        runtime = runtime.replace({"eval_batches": -(-runtime.eval_batches // steps)})
    return config, runtime


def _read_optimizer(saved: Any, config: TrainConfig, where: str) -> Any:
    """Our optimizer's state from torch.optim.AdamW's state dict, which may be anything else."""
    parameters = parameter_names.torch_parameters(config.model, "out_in")
    # Those of two axes come first: they decay.
    names = sorted(parameters, key=lambda name: len(parameters[name].shape) == 1)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    moments = [saved["state"].pop(number) for number in numbers]
    counts = {int(moment.pop("step")) for moment in moments}
    if len(counts) != 1 or not 0 <= min(counts) < INT_LIMIT:
        raise ValueError(f"its parameters were updated {sorted(counts)} times")
    trees = []
    for key in ("exp_avg", "exp_avg_sq"):
        named = {name: moment.pop(key) for name, moment in zip(names, moments, strict=True)}
        tensors = tensor_files.torch_tensors(named, where)
        trees.append(parameter_names.from_torch(tensors, config.model, "out_in", where))
    if rest := [*saved["state"], *(key for moment in moments for key in moment)]:
        raise ValueError(f"left over: {quoted(rest[0])}")
    return optim.adam_state(config, np.asarray(counts.pop(), np.int32), *trees)


def obstacles(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """What of this model the format cannot say; empty if it can be exported exactly."""
    out = huggingface.obstacles(config)
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


def write(
    weights: Weights, tokenizer: Tokenizer, folder: Path, final: Path, *, keep_padding: bool = False
) -> None:
    """Write ckpt.pt for nanoGPT's sample.py and, with the optimizer's state, its train.py; for
    characters also meta.pkl. `final` is the name that `folder` will have.

    Raises:
        OSError, RuntimeError: they cannot be written. UserError: there is no PyTorch.
    """
    torch, config = tensor_files.pytorch("writing ckpt.pt"), weights.config
    model = config.model

    def named(tree: Any) -> dict[str, Any]:
        arrays = parameter_names.to_torch(tree, model, "out_in", padding=keep_padding)
        return {name: torch.tensor(array) for name, array in arrays.items()}

    tensors, best = named(weights.params), weights.best_val_loss
    runtime, optimizer = weights.runtime, config.optimizer
    args = {name: getattr(model, name) for name in MODEL} | {"vocab_size": len(tensors[EMBEDDING])}
    saved: dict[str, Any] = {
        "model": tensors | {HEAD: tensors[EMBEDDING]},
        "model_args": args,
        "iter_num": weights.step,
        "best_val_loss": 1e9 if best is None else best,  # nanoGPT begins with 1e9
        "config": {
            **{name: getattr(optimizer, ours) for name, ours in OPTIMIZER.items()},
            **{name: getattr(runtime, ours) for name, ours in RUNTIME.items()},
            # sample.py looks for meta.pkl in data/DATASET; an absolute path leads it here.
            "dataset": str(final.absolute()),
            "batch_size": runtime.divide_batch(config, 1),
            "eval_iters": runtime.eval_batches * runtime.gradient_accumulation_steps,
            "max_iters": config.max_steps,
            "lr_decay_iters": config.lr_decay_steps,
            "decay_lr": True,
        },
    }
    if weights.opt_state is not None:
        count, *moments = optim.adam_parts(weights.opt_state)
        mu, nu = map(named, moments)
        trained = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
        decayed = [parameter for parameter in trained.values() if parameter.ndim > 1]
        others = [parameter for parameter in trained.values() if parameter.ndim == 1]
        adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optimizer.weight_decay},
             {"params": others, "weight_decay": 0.0}],
            lr=optimizer.learning_rate, betas=(optimizer.beta1, optimizer.beta2),
        )  # fmt: skip
        for name, parameter in trained.items():
            moment = {"exp_avg": mu[name], "exp_avg_sq": nu[name]}
            adamw.state[parameter] = {"step": torch.tensor(float(count)), **moment}
        saved["optimizer"] = adamw.state_dict()
    torch.save(saved, folder / "ckpt.pt")
    if isinstance(tokenizer, CharTokenizer):
        itos = dict(enumerate(tokenizer.characters))
        meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
