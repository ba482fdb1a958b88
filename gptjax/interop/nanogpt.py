"""nanoGPT's ckpt.pt, with its settings and its optimizer's state, so that training goes on; its
meta.pkl for characters; and the checkpoints of build-nanogpt. Needs PyTorch."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import optim
from gptjax.config import FINETUNE, ModelConfig, TrainConfig
from gptjax.config_io import flatten, from_dict, setting_types, to_dict
from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer, Tokenizer
from gptjax.errors import UserError, first_line, quoted
from gptjax.interop import huggingface, parameter_names, tensor_files
from gptjax.interop.parameter_names import EMBEDDING, HEAD
from gptjax.interop.weights import Gelu, Weights, model_config, plain
from gptjax.other_names import from_nanogpt, nanogpt_names
from gptjax.runtime_config import RuntimeConfig
from gptjax.settings import INT_LIMIT

MODEL = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")


class BuildConfig:
    """In place of build-nanogpt's dataclass GPTConfig: it holds the fields and does nothing."""


BUILD_NAMES = ("__main__.GPTConfig", "train_gpt2.GPTConfig")
"""Of that class, as its checkpoints name it."""


def read(path: Path, *, optimizer: bool = True, gelu: Gelu = "erf") -> Weights:
    """The model in a ckpt.pt.

    Args:
        optimizer: with the state of its AdamW, where it is there; else the step is 0.
        gelu: its form, which the file does not say: nanoGPT's was tanh until 2023, erf since.
            (build-nanogpt's is tanh.)

    UserError: the file is damaged, would run code, or is another model's.
    """
    stand_ins = [(BuildConfig, name) for name in BUILD_NAMES]
    saved, where = tensor_files.load_torch_file(path, stand_ins), str(path)
    # Of the very type: a file may overwrite the methods of an OrderedDict.
    if type(saved) is dict and type(saved.get("config")) is BuildConfig:
        saved |= {"model_args": vars(saved["config"]), "iter_num": saved.get("step", 0)}
        gelu = "tanh"
    if type(saved) is not dict or type(saved.get("model_args")) is not dict:
        raise UserError(f"{path} is not nanoGPT's: expected `model` and `model_args` in it")
    fields = {"bias": True, "activation": f"gelu_{gelu}"} | saved["model_args"]
    model = model_config(fields, f"{where}, model_args")
    settings, notes, dataset = saved.get("config"), list[str](), None
    config, runtime = FINETUNE.replace(model=model), RuntimeConfig()
    if type(settings) is dict:
        dataset = settings.get("dataset")
        try:
            config, runtime = _read_settings(settings, config, f"{where}, config")
        except UserError as error:  # good weights may come with settings that we refuse
            notes.append(f"its training settings are left out ({error})")
    tensors = tensor_files.torch_tensors(saved.pop("model", None), where)
    params = parameter_names.from_torch(tensors, model, "out_in", where)
    step = saved.get("iter_num", 0)
    if type(step) is not int or not 0 <= step < INT_LIMIT:
        raise UserError(f"{where}: iter_num is not the number of a step")
    state = saved.pop("optimizer", None) if optimizer else None
    if state is None or state == {}:
        return Weights(config, params, runtime, notes=tuple(notes), dataset=dataset)
    try:
        opt_state = _read_optimizer(state, config, f"{where}, optimizer")
    except Exception as error:  # it may be anything
        raise UserError(
            f"{where}: `optimizer` is not AdamW's state of this model ({first_line(error)}); to"
            " import the weights alone, add --optimizer False"
        ) from None
    return Weights(config, params, runtime, step, opt_state, notes=tuple(notes), dataset=dataset)


def vocabulary_folder(dataset: Any, folder: Path) -> Path | None:
    """Where nanoGPT's data set `dataset`, whose name a checkpoint in `folder` gives, has its
    meta.pkl: in data/ here, or beside `folder`."""
    if not isinstance(dataset, str) or not dataset.isprintable() or len(dataset) > 255:
        return None
    data = Path("data"), folder.absolute().parent / "data"
    found = (each / dataset for each in data if (each / dataset / "meta.pkl").is_file())
    return next(found, None)


def _read_settings(
    settings: dict[Any, Any], config: TrainConfig, where: str
) -> tuple[TrainConfig, RuntimeConfig]:
    """Out of the globals of nanoGPT's train.py. UserError: we refuse one."""
    names = [*setting_types(TrainConfig), *setting_types(RuntimeConfig)]
    found = plain(from_nanogpt(settings, names))
    circumstances = {n: found.pop(n) for n in setting_types(RuntimeConfig) if n in found}
    runtime = from_dict(RuntimeConfig, circumstances, where)
    # The network is what model_args says.
    found = {name: value for name, value in found.items() if not name.startswith("model.")}
    config = from_dict(TrainConfig, to_dict(config) | found, where)
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
    own = not isinstance(tokenizer, Gpt2Tokenizer) or tokenizer.is_gpt2s_own
    differs = {
        f"the activation {config.activation} (--activation gelu_erf)": config.activation
        != "gelu_erf",
        f"n_inner {config.n_inner}": config.inner_size != 4 * config.n_embd,
        f"layer_norm_epsilon {config.layer_norm_epsilon}": config.layer_norm_epsilon != 1e-5,
        "attention's scores scaled in another way": {*config.query_scales} - {1.0},
        "an untied head (--tied-head True)": not config.tied_head,
        f"qkv_bias {config.qkv_bias} beside bias {config.bias}": config.use_qkv_bias != config.bias,
        f"a {tokenizer.kind} tokenizer": tokenizer.kind in ("sentencepiece", "json"),
        "a byte-pair encoding that is not GPT-2's own": not own,
    }
    return huggingface.obstacles(config) + [what for what, is_so in differs.items() if is_so]


def write(
    weights: Weights, tokenizer: Tokenizer, folder: Path, final: Path, *, keep_padding: bool = False
) -> None:
    """Write ckpt.pt for nanoGPT's sample.py and, with the optimizer's state, its train.py; for
    characters also meta.pkl. `final` is the name that `folder` will have. Raises OSError or
    RuntimeError: they cannot be written; UserError: there is no PyTorch."""
    torch = tensor_files.optional("torch", "writing ckpt.pt")
    config, runtime, best = weights.config, weights.runtime, weights.best_val_loss

    def named(tree: Any) -> dict[str, Any]:
        arrays = parameter_names.to_torch(tree, config.model, "out_in", padding=keep_padding)
        return {name: torch.tensor(array) for name, array in arrays.items()}

    tensors, settings = named(weights.params), flatten(config) | flatten(runtime)
    sizes = {name: getattr(config.model, name) for name in MODEL}
    saved: dict[str, Any] = {
        "model": tensors | {HEAD: tensors[EMBEDDING]},
        "model_args": sizes | {"vocab_size": len(tensors[EMBEDDING])},
        "iter_num": weights.step,
        "best_val_loss": 1e9 if best is None else best,  # nanoGPT begins with 1e9
        "config": {
            **{name: settings[ours] for name, ours in nanogpt_names(settings).items()},
            # sample.py looks for meta.pkl in data/DATASET; an absolute path leads it here.
            "dataset": str(final.absolute()),
            "batch_size": runtime.divide_batch(config, 1),
            "eval_iters": runtime.eval_batches * runtime.gradient_accumulation_steps,
            "lr_decay_iters": config.lr_decay_steps,
            "decay_lr": True,
        },
    }
    if weights.opt_state is not None:
        rates, (count, *moments) = config.optimizer, optim.adam_parts(weights.opt_state)
        mu, nu = map(named, moments)
        trained = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
        decayed = [parameter for parameter in trained.values() if parameter.ndim > 1]
        others = [parameter for parameter in trained.values() if parameter.ndim == 1]
        adamw = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}], rates.learning_rate,
            (rates.beta1, rates.beta2), weight_decay=rates.weight_decay,
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
