"""GPT-2 in Hugging Face's format: config.json beside model.safetensors, pytorch_model.bin or
flax_model.msgpack."""

import dataclasses
import errno
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import safetensors.numpy

from gptjax.config import FINETUNE, Activation, ModelConfig
from gptjax.config_io import from_dict
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import RunError, UserError, first_line, quoted
from gptjax.files import parse_json
from gptjax.generation_config import GenerationConfig
from gptjax.interop import hf_tokenizer, parameter_names
from gptjax.interop.parameter_names import EMBEDDING
from gptjax.interop.tensor_files import (
    SAFETENSORS,
    hugging_face_tensors,
    read_object,
    read_safetensors,
)
from gptjax.interop.weights import Weights, model_config

SHARD_BYTES = 2 << 30
"""Larger weights are written in several files, as Hugging Face does."""

SIZES = {
    "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
    "n_positions": "block_size", "vocab_size": "vocab_size",
}  # fmt: skip
"""Their settings -> ours."""

SAME = (
    "n_inner", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
)  # fmt: skip
"""Settings that have one name and one default here and there."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh", "gelu": "gelu_erf", "relu": "relu", "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu",
}  # fmt: skip
"""Their names, the default first -> ours."""


OTHER_HEADS = re.compile(
    r"(score|classifier|qa_outputs|multiple_choice_head\.summary)\.(weight|bias)"
)
"""Of classifiers and the like, which we do not have."""


def read(folder: Path) -> Weights:
    """The GPT-2 in a folder. UserError: files are missing or damaged, tensors do not fit, or the
    model is not a GPT-2 that we compute exactly."""
    where = str(folder / "config.json")
    settings = read_object(folder / "config.json")
    fields, notes = _model_fields(settings, where)
    model = model_config(fields, where)
    # We export the biases that a model does not have as zeros, and note here which.
    noted = settings.get("gptjax")
    if isinstance(noted, dict):
        fields |= {name: noted[name] for name in ("bias", "qkv_bias") if name in noted}
    smaller = model_config(fields, where)
    tensors = hugging_face_tensors(folder)
    if heads := sorted(filter(OTHER_HEADS.fullmatch, tensors)):
        notes.append(f"left out another head than the language model's: {', '.join(heads)}")
        for name in heads:
            del tensors[name]
    params = parameter_names.from_torch(tensors, model, "in_out", str(folder))
    if fewer := parameter_names.without_zeros(params, smaller):
        model, params = smaller, fewer
    return Weights(FINETUNE.replace(model=model), params, notes=tuple(notes))


def _model_fields(settings: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """(`ModelConfig`'s fields, notes). Raises UserError unless the formula is that of
    `transformers.GPT2LMHeadModel` where it is ours too."""
    allowed: dict[str, tuple[Any, ...]] = {  # the first is the default
        "model_type": ("gpt2",),
        "add_cross_attention": (False,),
        "activation_function": (*ACTIVATIONS,),
    }
    wrong = [
        f"{name} {quoted(found)} (expected {' or '.join(map(quoted, values))})"
        for name, values in allowed.items()
        if (found := settings.get(name, values[0])) not in values
    ]
    wrong += [f"{name} is missing" for name in SIZES if name not in settings]
    rates = [settings.get(f"{name}_pdrop", 0.1) for name in ("resid", "embd", "attn")]
    wrong += [f"dropout {quoted(rate)}" for rate in rates if not isinstance(rate, int | float)]
    if wrong:
        raise UserError(f"{where} is not of a GPT-2 that gptjax can compute: {', '.join(wrong)}")
    fields = {ours: settings[name] for name, ours in SIZES.items()} | {
        **{name: settings[name] for name in SAME if name in settings},
        "activation": ACTIVATIONS[settings.get("activation_function", "gelu_new")],
        "tied_head": settings.get("tie_word_embeddings", True),
        "dropout": rates[0],
    }
    if rates.count(rates[0]) == len(rates):
        return fields, []
    note = f"dropout is set to 0 (resid, embd and attn have {rates}; we have one rate)"
    return fields | {"dropout": 0.0}, [note]


def obstacles(config: ModelConfig) -> list[str]:
    """What of this model the format cannot say; empty if it can be exported exactly."""
    differs = {
        "n_layer 0 (there the format has a final LayerNorm, we have none)": config.n_layer == 0,
        "sinusoidal positions": config.position == "sinusoidal",
        "banded attention": "banded" in config.attention_pattern,
    }
    return [what for what, is_so in differs.items() if is_so]


def convert(
    params: Any, config: ModelConfig, *, keep_padding: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, state dict) for `transformers.GPT2LMHeadModel`. Biases that the model does
    not have are zeros there, which is the same function."""
    full = dataclasses.replace(config, bias=True, qkv_bias=None)
    ours = parameter_names.to_torch(params, config, "in_out", padding=keep_padding)
    tensors = {
        name: ours[name] if name in ours else np.zeros(parameter.shape, np.float32)
        for name, parameter in parameter_names.torch_parameters(full, "in_out").items()
    }
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: getattr(config, ours) for name, ours in SIZES.items()},
        "vocab_size": len(tensors[EMBEDDING]),
        "activation_function": next(n for n, o in ACTIVATIONS.items() if o == config.activation),
        **{name: getattr(config, name) for name in SAME},
        "tie_word_embeddings": config.tied_head,
        "dtype": "float32",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "gptjax": {"bias": config.bias, "qkv_bias": config.qkv_bias},
    }
    return settings, tensors


def write(
    weights: Weights, tokenizer: Tokenizer, folder: Path, *,
    keep_padding: bool = False, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write config.json, generation_config.json (our defaults), model.safetensors (in files of at
    most `shard_bytes`) and the tokenizer's files. OSError, safetensors.SafetensorError: they cannot
    be written."""
    config = weights.config.model
    settings, tensors = convert(weights.params, config, keep_padding=keep_padding)
    # None: transformers would fill in GPT-2's ids.
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    sampling = GenerationConfig()
    generation: dict[str, Any] = {"do_sample": True, "bos_token_id": tokenizer.eot}
    generation |= {"eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot}
    generation |= {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    hf_tokenizer.write(tokenizer, folder, config.block_size)
    shards = huggingface_hub.split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda array: array.nbytes, max_shard_size=shard_bytes,
        filename_pattern="model{suffix}.safetensors",
    )  # fmt: skip
    for file, names in shards.filename_to_tensors.items():
        _save({name: tensors[name] for name in names}, folder / file)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(weights: Weights, folder: Path, *, keep_padding: bool = False) -> None:
    """Write model.safetensors alone: every parameter that the model has and no other, and in the
    file's metadata, as "gptjax", the model's settings in JSON. Raises as `write`."""
    config = weights.config.model
    tensors = parameter_names.to_torch(weights.params, config, "in_out", padding=keep_padding)
    settings = json.dumps(dataclasses.asdict(config))
    _save(tensors, folder / SAFETENSORS, gptjax=settings)


def read_alone(path: Path) -> Weights:
    """The model that `write_tensors` wrote. UserError: it is not, it is damaged, or tensors do not
    fit."""
    tensors, where = read_safetensors(path), str(path)
    with safetensors.safe_open(path, framework="numpy", backend="pread") as file:
        noted = (file.metadata() or {}).get("gptjax")
    if not noted or EMBEDDING not in tensors:
        raise UserError(
            f"{path} says nothing of a model's settings: expected a config.json beside it, or what"
            " gptjax exports by --format safetensors"
        )
    fields, rows = parse_json(noted, where), tensors[EMBEDDING].shape[:1]
    if isinstance(fields, dict):
        fields |= {"vocab_size": rows[0] if rows else 0, "vocab_multiple": 1}
    model = from_dict(ModelConfig, fields, where)
    params = parameter_names.from_torch(tensors, model, "in_out", where)
    return Weights(FINETUNE.replace(model=model), params)


def _save(tensors: dict[str, np.ndarray], path: Path, **more: str) -> None:
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"} | more)
    path.chmod(0o644)  # the library lets nobody else read it


def download(name: str) -> Path:
    """The folder with a model of the Hugging Face Hub; it is fetched once. UserError: there is no
    network, or no such model. RunError: the disk is full."""
    print(f"there is no file or folder {name}: asking the Hugging Face Hub for it", flush=True)
    small = ["config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt",
             "added_tokens.json"]  # fmt: skip
    for weights in (["model*.safetensors*"], ["pytorch_model*.bin*"], ["flax_model*.msgpack*"]):
        try:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=small + weights))
        except Exception as error:  # of the HTTP library, the Hub's own, or the file system's
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise RunError(f"no room left on the disk for {name}") from None
            raise UserError(
                f"{name!r} is no file or folder here, and could not be fetched from the Hugging"
                f" Face Hub ({type(error).__name__}); check the name and the network, or download"
                " it elsewhere and name its folder"
            ) from None
        if any(folder.glob(weights[0])):
            break
    return folder


def upload(folder: Path, name: str) -> str:
    """Make `folder` the content of the model `name` on the Hugging Face Hub, private if it is new;
    its address. RunError: it could not be uploaded."""
    try:
        api = huggingface_hub.HfApi()
        repo = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message="Exported by gptjax"
        )
        return str(repo)
    except Exception as error:  # of the HTTP library, the Hub's own, or the file system's
        raise RunError(
            f"wrote {folder}, but could not push it to {name!r} on the Hugging Face Hub"
            f" ({type(error).__name__}: {first_line(error)}); log in by `hf auth login`, then `hf"
            f" upload {name} {folder}` does it"
        ) from None
