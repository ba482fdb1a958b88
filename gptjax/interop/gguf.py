"""GGUF, llama.cpp's format: one file with the weights and the tokenizer. Needs the package gguf."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import ModelConfig
from gptjax.data.tokenizers import Gpt2Tokenizer, SentencePieceTokenizer, Tokenizer
from gptjax.interop import hf_tokenizer, huggingface, parameter_names
from gptjax.interop.tensor_files import optional
from gptjax.interop.weights import Weights

FILE = "model.gguf"

NAMES = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm", "lm_head": "output", "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
"""Hugging Face's names, those within a block without its number -> llama.cpp's."""

KINDS = {"piece": 1, "unknown": 2, "control": 3, "added": 4, "byte": 6}
"""llama.cpp's numbers of the kinds of tokens."""


def obstacles(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """What of this model llama.cpp's GPT-2 does not compute; empty if it can be exported exactly.
    (It always takes some token for the end of a text, which `char` does not have; what a
    tokenizer.json does to a text is not for a file of GGUF to say.)"""
    differs = {
        f"the activation {config.activation} (--activation gelu_tanh)": (
            config.activation != "gelu_tanh"
        ),
        "attention's scores scaled in another way": {*config.query_scales} - {1.0},
        f"a {tokenizer.kind} tokenizer (--tokenizer gpt2 or sentencepiece)": (
            tokenizer.kind in ("char", "json")
        ),
    }
    return huggingface.obstacles(config) + [what for what, is_so in differs.items() if is_so]


def write(weights: Weights, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model.gguf, in float32 (llama-quantize makes smaller ones of it). Raises OSError: it
    cannot be written; UserError: the package gguf is not installed."""
    gguf = optional("gguf", "writing GGUF", "'.[gguf]'")
    assert isinstance(tokenizer, Gpt2Tokenizer | SentencePieceTokenizer)
    config = weights.config.model
    # llama.cpp's GPT-2 always has biases, as Hugging Face's.
    _, tensors = huggingface.convert(weights.params, config)
    writer = gguf.GGUFWriter(folder / FILE, "gpt2")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.inner_size)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    _add_tokenizer(writer, tokenizer)
    linear = {
        name
        for name, parameter in parameter_names.torch_parameters(config, "out_in").items()
        if parameter.transposed
    }
    for name, array in tensors.items():
        array = np.ascontiguousarray(array.T) if name in linear else array
        writer.add_tensor(_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    """llama.cpp's of one of Hugging Face's tensors."""
    module, _, kind = name.rpartition(".")
    if module.startswith("transformer.h."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def _add_tokenizer(writer: Any, tokenizer: Gpt2Tokenizer | SentencePieceTokenizer) -> None:
    ids = range(tokenizer.n_vocab)
    if isinstance(tokenizer, Gpt2Tokenizer):
        converted = hf_tokenizer.convert(tokenizer)
        merges = json.loads(converted.to_str())["model"]["merges"]
        tokens = [str(converted.id_to_token(i)) for i in ids]
        kinds = ["piece"] * tokenizer.eot + ["control"] + ["added"] * len(tokenizer.added)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in merges])
        unknown = tokenizer.eot
    else:
        tokens = [tokenizer.piece(i) for i in ids]
        kinds = ["added" if tokens[i] == "\n" else tokenizer.kind_of(i) for i in ids]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([tokenizer.score(i) for i in ids])
        writer.add_add_space_prefix(False)
        unknown = kinds.index("unknown")
    writer.add_token_list(tokens)
    writer.add_token_types([KINDS[kind] for kind in kinds])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_unk_token_id(unknown)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
