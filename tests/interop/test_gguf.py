"""GGUF files, read by the package of llama.cpp's authors."""

import dataclasses

import numpy as np
import pytest
import sentencepiece
from small_models import SMALL, random_params

from gptjax.config import TrainConfig
from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer
from gptjax.errors import UserError
from gptjax.interop.convert import write_pretrained
from gptjax.interop.weights import Weights

gguf = pytest.importorskip("gguf", reason="needs gguf")


def exported(folder, model, tokenizer, **options):
    params = random_params(model)
    write_pretrained(Weights(TrainConfig(model), params), tokenizer, folder, "gguf", **options)
    return params, gguf.GGUFReader(folder / "model.gguf")


def test_every_tensor_and_setting_is_where_llama_cpp_expects_it(tmp_path, byte_pairs):
    added = Gpt2Tokenizer(byte_pairs.ranks, ["[user]"])
    model = dataclasses.replace(
        SMALL, vocab_size=264, vocab_multiple=16, tied_head=False, bias=False, n_inner=24,
        layer_norm_epsilon=1e-3,
    )  # fmt: skip
    params, file = exported(tmp_path / "out", model, added)
    found = {tensor.name: tensor.data for tensor in file.tensors}
    # llama.cpp's names of GPT-2's tensors, as the package lists them.
    kinds = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]
    names = {gguf.TENSOR_NAMES[kind] for kind in kinds}
    assert {name.rpartition(".")[0] for name in found} == {
        name.format(bid=layer) for name in names for layer in (0, 1)
    }
    h = params["h"]
    assert np.array_equal(found["token_embd.weight"], params["wte"][:264])
    assert np.array_equal(found["output.weight"], params["lm_head"][:264])
    assert np.array_equal(found["position_embd.weight"], params["wpe"])
    assert np.array_equal(found["output_norm.weight"], params["ln_f"]["scale"])
    for layer in (0, 1):
        for name, (part, inner) in {
            "attn_qkv": ("attn", "c_attn"), "attn_output": ("attn", "c_proj"),
            "ffn_up": ("mlp", "c_fc"), "ffn_down": ("mlp", "c_proj"),
        }.items():  # fmt: skip
            kernel = h[part][inner]["kernel"][layer]
            assert np.array_equal(found[f"blk.{layer}.{name}.weight"], kernel.T)
            bias = found[f"blk.{layer}.{name}.bias"]  # the model has none
            assert bias.shape == (kernel.shape[1],) and not bias.any()
        for name, own in {"attn_norm": "ln_1", "ffn_norm": "ln_2"}.items():
            assert np.array_equal(found[f"blk.{layer}.{name}.weight"], h[own]["scale"][layer])

    value = {name: field.contents() for name, field in file.fields.items()}
    assert value["general.architecture"] == "gpt2"
    settings = {
        "context_length": 12, "embedding_length": 16, "block_count": 2, "feed_forward_length": 24,
        "attention.head_count": 2, "attention.layer_norm_epsilon": np.float32(1e-3),
    }  # fmt: skip
    assert {name: value[f"gpt2.{name}"] for name in settings} == settings
    tokens = value["tokenizer.ggml.tokens"]
    assert tokens[65] == "A" and tokens[256:259] == ["Ġt", "he", "Ġthe"]
    assert tokens[262:] == ["<|endoftext|>", "[user]"]
    assert value["tokenizer.ggml.token_type"][261:] == [1, 3, 4]
    assert value["tokenizer.ggml.merges"][:3] == ["Ġ t", "h e", "Ġt he"]
    assert value["tokenizer.ggml.eos_token_id"] == 262 == value["tokenizer.ggml.bos_token_id"]


def test_a_sentencepiece_model_is_one_of_llamas(tmp_path, sentence_pieces):
    model = dataclasses.replace(SMALL, vocab_size=400)
    _, file = exported(tmp_path / "out", model, sentence_pieces)
    value = {name: field.contents() for name, field in file.fields.items()}
    tokens = value["tokenizer.ggml.tokens"]
    assert tokens[:5] == ["<unk>", "<s>", "</s>", "\n", "<0x00>"]
    # Unknown, control, added, bytes, pieces: sentencepiece_model.proto has the same numbers.
    assert value["tokenizer.ggml.token_type"] == [2, 3, 3, 4] + [6] * 256 + [1] * 140
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentence_pieces.model)
    scores = [processor.get_score(i) for i in range(400)]
    assert value["tokenizer.ggml.scores"] == scores and len(set(scores[260:])) == 140
    assert value["tokenizer.ggml.model"] == "llama" and value["tokenizer.ggml.eos_token_id"] == 2
    assert value["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"activation": "gelu_erf"}, "gelu_erf .--activation gelu_tanh.; the flags are"),
        ({"scale_attn_weights": False}, "attention's scores"),
        ({"attention_pattern": ("banded",)}, "banded"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path, byte_pairs, change, word):
    with pytest.raises(UserError, match=f"gguf cannot express .*{word}"):
        exported(tmp_path / "out", dataclasses.replace(SMALL, **change), byte_pairs)


def test_a_vocabulary_without_an_end_of_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a char tokenizer \(--tokenizer gpt2 or"):
        exported(tmp_path / "out", SMALL, CharTokenizer("ab"))
