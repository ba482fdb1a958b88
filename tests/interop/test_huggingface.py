"""GPT-2 of transformers, in and out: the same logits, the same ids, and nothing guessed."""

import json

import jax
import numpy as np
import pytest
from flax import serialization as flax_serialization
from flax.traverse_util import unflatten_dict
from fuzz import damaged, read_or_refuse
from helpers import TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import SMALL, VARIANTS, assert_bitwise, assert_close, logits, random_params

from gptjax import model as ours
from gptjax.config import TrainConfig
from gptjax.data.tokenizers import CharTokenizer
from gptjax.interop import convert, hf_tokenizer, huggingface, parameter_names
from gptjax.interop.tensor_files import FLAX
from gptjax.interop.weights import Weights

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs PyTorch")

TOKENS = np.random.default_rng(0).integers(0, 23, (2, 12), np.int32)
ODD = "'ll x\n\n\n  y\t12345 é中😀\ufeff don't <|end"
CHARS = CharTokenizer("".join(map(chr, range(65, 88))))


def make_gpt2(**settings):
    """A GPT-2 whose every tensor matters."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 23}
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | ends | settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.2)
    return model


@torch.no_grad()
def their_logits(model) -> np.ndarray:
    return model.eval()(torch.from_numpy(TOKENS).long()).logits.float().numpy()


def masked(tensors):
    """With the causal masks of older versions."""
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 12, 12).tril().byte() for i in (0, 1)}
    more = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in (0, 1)}
    return tensors | masks | more


def flax(model):
    """As FlaxGPT2LMHeadModel of transformers 4 names its parameters; its Conv1D is [out, in]."""
    tree = {}
    for name, tensor in model.state_dict().items():
        *path, last = name.split(".")
        array = tensor.numpy()
        if last == "weight":
            last = "embedding" if array.ndim == 2 and path[-1] in ("wte", "wpe") else "kernel"
            last = "scale" if array.ndim == 1 else last
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            tree[*path, last] = array.T if last == "kernel" else array
    return tree


def save_flax(model, folder, shards=1):
    """As transformers 4.40 writes them: an index names parameters with slashes."""
    tree, index = flax(model), {}
    for i in range(shards):
        name = f"flax_model-{i + 1:05}-of-{shards:05}.msgpack" if shards > 1 else FLAX
        part = dict([*tree.items()][i::shards])
        index |= {"/".join(names): name for names in part}
        (folder / name).write_bytes(flax_serialization.msgpack_serialize(unflatten_dict(part)))
    if shards > 1:
        (folder / f"{FLAX}.index.json").write_text(json.dumps({"weight_map": index}))


def bare(tensors):
    """As GPT2Model, without the head, names its tensors; so do the released weights."""
    kept = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return {name.removeprefix("transformer."): tensor for name, tensor in kept.items()}


SAVED = {
    "safetensors": lambda model, f: model.save_pretrained(f),
    "sharded": lambda model, f: model.save_pretrained(f, max_shard_size="5KB"),
    "bare safetensors with masks": lambda model, f: safetensors_torch.save_file(
        bare(masked(model.state_dict())), f / "model.safetensors"
    ),
    "bare torch with masks": lambda model, f: torch.save(
        bare(masked(model.state_dict())), f / "pytorch_model.bin"
    ),
    "flax": save_flax,
    "flax, sharded": lambda model, f: save_flax(model, f, 3),
}


@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
def test_every_kind_of_file_has_the_logits_of_transformers(tmp_path, save):
    model = make_gpt2(tie_word_embeddings=save is not SAVED["flax"])
    model.config.save_pretrained(tmp_path)
    save(model, tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (save is SAVED["sharded"])
    found = huggingface.read(tmp_path)
    assert found.config.model.vocab_size == 23 and not found.notes
    assert_close(logits(found.config.model, found.params, TOKENS), their_logits(model))


HALF = {"n_layer": 1, "n_head": 4, "n_embd": 12, "n_inner": 48, "n_positions": 40}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"tie_word_embeddings": False, "activation_function": "gelu"}, torch.float16),
        ({"activation_function": "gelu_pytorch_tanh"} | HALF, torch.bfloat16),
        ({"activation_function": "relu", "n_inner": 24, "layer_norm_epsilon": 0.02}, torch.float32),
        ({"activation_function": "silu", "scale_attn_by_inverse_layer_idx": True,
          "reorder_and_upcast_attn": True, "attn_implementation": "eager"}, torch.float32),
        ({"activation_function": "gelu_fast", "scale_attn_weights": False,
          "scale_attn_by_inverse_layer_idx": True}, torch.float32),
    ],
)  # fmt: skip
def test_every_variant_has_the_logits_and_gradients_of_transformers(tmp_path, options, dtype):
    model = make_gpt2(**options).to(dtype)
    model.save_pretrained(tmp_path)
    found, model = huggingface.read(tmp_path), model.float()
    config = found.config.model
    assert found.params["wte"].dtype == np.float32
    assert_close(logits(config, found.params, TOKENS), their_logits(model))

    @jax.jit
    def loss(params):
        return ours.apply(config, params, TOKENS)[0].var()

    tensors = parameter_names.to_torch(jax.grad(loss)(found.params), config, "in_out")
    model(torch.from_numpy(TOKENS).long()).logits.var(unbiased=False).backward()
    for name, parameter in model.named_parameters():
        expected = parameter.grad.numpy()
        assert np.abs(tensors[name] - expected).max() < 1e-4 * np.abs(expected).max(), name


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_damaged_flax_weights_are_read_or_refused_in_one_line(tmp_path, drawn):
    path = tmp_path / FLAX
    if not path.exists():
        model = make_gpt2(n_layer=1, n_embd=4)
        model.config.save_pretrained(tmp_path)
        save_flax(model, tmp_path)
        path.rename(tmp_path / "whole")
    path.write_bytes(drawn.draw(damaged((tmp_path / "whole").read_bytes())))
    read_or_refuse(lambda: huggingface.read(tmp_path), tmp_path)


OTHERS = {
    "GPT2DoubleHeadsModel": [],
    "GPT2ForSequenceClassification": ["score.weight"],
    "GPT2ForTokenClassification": ["classifier.bias", "classifier.weight"],
    "GPT2ForQuestionAnswering": ["qa_outputs.bias", "qa_outputs.weight"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_body_of_a_model_with_another_head_is_read(tmp_path, name):
    body = make_gpt2()
    model = getattr(transformers, name)(body.config)
    model.transformer.load_state_dict(body.transformer.state_dict())
    model.save_pretrained(tmp_path)
    found = huggingface.read(tmp_path)
    assert_close(logits(found.config.model, found.params, TOKENS), their_logits(body))
    (note,) = found.notes
    assert "left out another head" in note and all(head in note for head in OTHERS[name])


QUICK = ("only qkv bias", "padded")


@pytest.mark.parametrize("model", [
    pytest.param(model, marks=() if name in QUICK else pytest.mark.slow, id=name)
    for name, model in VARIANTS.items()
])  # fmt: skip
def test_transformers_loads_an_export_and_has_our_logits(tmp_path, model):
    params = random_params(model)
    convert.write_pretrained(Weights(TrainConfig(model), params), CHARS, tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.config.tie_word_embeddings == model.tied_head
    assert_close(logits(model, params, TOKENS), their_logits(theirs))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode(CHARS.characters) == list(range(23))
    how = theirs.generation_config
    assert (how.do_sample, how.temperature, how.top_k, how.eos_token_id) == (True, 0.8, 200, None)


def test_a_sharded_export_loads_and_comes_back_bitwise(tmp_path):
    weights = Weights(TrainConfig(SMALL), random_params(SMALL))
    huggingface.write(weights, CHARS, tmp_path, shard_bytes=5000)
    files = list(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "model.safetensors").exists()
    assert all(f"-of-{len(files):05}." in file.name for file in files)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    assert_close(logits(SMALL, weights.params, TOKENS), their_logits(theirs))
    assert_bitwise(huggingface.read(tmp_path).params, weights.params)


def through_files(tokenizer, folder):
    """As transformers loads it."""
    hf_tokenizer.write(tokenizer, folder, 32)
    config = {"model_type": "gpt2", "vocab_size": tokenizer.n_vocab}
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_gives_the_same_ids_and_text(tokenizer, tmp_path):
    theirs = through_files(tokenizer, tmp_path)
    text = TEXT + getattr(tokenizer, "characters", ODD)
    ids = tokenizer.encode(text).tolist()
    assert theirs.encode(text) == ids == theirs(text)["input_ids"]
    assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.n_vocab
    assert theirs.eos_token_id == tokenizer.eot
    assert theirs.model_max_length == 32


def test_what_transformers_saves_is_read_as_the_same_tokenizer(tokenizer, tmp_path):
    theirs = through_files(tokenizer, tmp_path)
    (tmp_path / "saved").mkdir()
    theirs.save_pretrained(tmp_path / "saved")
    if tokenizer.kind != "sentencepiece":
        assert hf_tokenizer.read(tmp_path / "saved").state() == tokenizer.state()
        return
    # transformers leaves out tokenizer.model, and nothing else says how ours was trained.
    found = hf_tokenizer.read(tmp_path / "saved")
    assert found.kind == "json" and found.eot == tokenizer.eot
    assert found.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


@pytest.mark.slow
def test_gpt2s_own_tokenizer_is_the_one_that_transformers_knows(gpt2, tmp_path):
    theirs = through_files(gpt2, tmp_path)
    for text in (TEXT, ODD, "Every effort moves you"):
        ids = gpt2.encode(text).tolist()
        assert theirs.encode(text) == ids and theirs.decode(ids) == text
    assert theirs.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert theirs.eos_token_id == 50256 and len(theirs) == 50257
