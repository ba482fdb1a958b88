"""Import and export: what is read, what is refused, and what is left behind."""

import dataclasses
import io
import json

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tokenizers as hf
from fuzz import damaged, read_or_refuse
from helpers import TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import ALL_VARIANTS, SMALL, VARIANTS, assert_bitwise, random_params

from gptjax import run_metadata
from gptjax.config import PRESETS, ModelConfig, TrainConfig
from gptjax.data.tokenizers import CharTokenizer, JsonTokenizer, SentencePieceTokenizer
from gptjax.errors import RunError, UserError
from gptjax.interop import convert, gguf, hf_tokenizer, nanogpt
from gptjax.interop.convert import find_tokenizer, read_pretrained, write_pretrained
from gptjax.interop.weights import Weights
from gptjax.runtime_config import RuntimeConfig

CHARS = CharTokenizer("".join(map(chr, range(65, 88))))
TINY = ModelConfig(1, 1, 4, block_size=12, vocab_size=23)


def make(folder, model=TINY, tokenizer=CHARS, **options):
    """A model in Hugging Face's format; its parameters."""
    params = random_params(model)
    write_pretrained(Weights(TrainConfig(model), params), tokenizer, folder, **options)
    return params


def change_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


ROUND_TRIPS = {
    **VARIANTS,
    "xl, dropout": dataclasses.replace(
        PRESETS["gpt2-xl"], n_layer=1, vocab_size=23, block_size=32, vocab_multiple=64, dropout=0.25
    ),
}


@pytest.mark.parametrize("model", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_hugging_face_round_trips_are_bitwise(tmp_path, model):
    params = make(tmp_path / "out", model, keep_padding=True)
    again, tokenizer = read_pretrained(str(tmp_path / "out"))
    assert_bitwise(again.params, params)
    found = again.config.model
    assert dataclasses.replace(found, vocab_multiple=model.vocab_multiple) == model
    assert found.padded_vocab_size == model.padded_vocab_size
    assert tokenizer.state() == CHARS.state() and not again.notes


def test_an_imported_run_is_a_run_and_exports_again(tmp_path):
    padded = dataclasses.replace(TINY, vocab_size=64)
    params = make(tmp_path / "model", padded)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "model" / name).exists()
    said = convert.import_model(str(tmp_path / "model"), tmp_path / "run")
    assert "41 rows of the embedding taken for padding" in said
    assert f"from {tmp_path / 'model'}" in said and "gptjax generate" in said
    loaded = run_metadata.load_checkpoint(tmp_path / "run", "best")
    assert loaded.step == 0 and loaded.metadata.config.model.vocab_size == 23
    assert loaded.metadata.data_fingerprint is None and loaded.metadata.val_loss is None
    assert json.loads(loaded.metadata.tokenizer) == CHARS.state()
    assert_bitwise(jax_free(loaded.params), params)
    with pytest.raises(UserError, match="holds a run already"):
        convert.import_model(str(tmp_path / "model"), tmp_path / "run")
    with pytest.raises(UserError, match="is a run of gptjax already"):
        read_pretrained(str(tmp_path / "run"))

    assert convert.export_model(tmp_path / "run", tmp_path / "out") == f"wrote {tmp_path}/out (hf)"
    with pytest.raises(UserError, match="exists already"):
        convert.export_model(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="no checkpoint '8'"):
        convert.export_model(tmp_path / "run", tmp_path / "other", checkpoint="8")
    again, _ = read_pretrained(str(tmp_path / "out"))
    assert np.array_equal(again.params["wte"], params["wte"][:23])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "run"]


def jax_free(params):
    return {k: jax_free(v) if isinstance(v, dict) else np.asarray(v) for k, v in params.items()}


def test_a_sentencepiece_model_of_another_kind_is_not_exported(tmp_path, sentence_pieces):
    assert sentence_pieces.merges_pairs()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=100,
        model_type="unigram", normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    unigram = SentencePieceTokenizer(model.getvalue())
    weights = Weights(TrainConfig(model=ModelConfig(1, 1, 8, 8, unigram.n_vocab)), {})
    with pytest.raises(UserError, match="hf cannot express a SentencePiece model that is not"):
        write_pretrained(weights, unigram, tmp_path / "out")


def test_sentencepiece_goes_to_hugging_face_and_back(tmp_path, sentence_pieces):
    model = dataclasses.replace(TINY, vocab_size=400, activation="gelu_erf")
    params = make(tmp_path / "out", model, sentence_pieces)
    again, tokenizer = read_pretrained(str(tmp_path / "out"))
    assert_bitwise(again.params, params)
    assert tokenizer.state() == sentence_pieces.state()
    with pytest.raises(UserError, match="nanogpt cannot express a sentencepiece"):
        make(tmp_path / "nano", model, sentence_pieces, format="nanogpt")


@pytest.mark.parametrize(
    ("change", "formats", "word"),
    [
        ({"position": "sinusoidal"}, ["hf", "nanogpt"], "sinusoidal"),
        ({"attention_pattern": ("dense", "banded")}, ["hf", "nanogpt"], "banded"),
        ({"n_layer": 0}, ["hf", "nanogpt"], "n_layer 0"),
        ({"activation": "gelu_tanh"}, ["nanogpt"], "the activation gelu_tanh .--act"),
        ({"n_inner": 8}, ["nanogpt"], "n_inner 8"),
        ({"layer_norm_epsilon": 1e-6}, ["nanogpt"], "layer_norm_epsilon 1e-06"),
        ({"scale_attn_weights": False}, ["nanogpt"], "attention's scores"),
        ({"scale_attn_by_inverse_layer_idx": True, "n_layer": 2}, ["nanogpt"], "scores"),
        ({"tied_head": False}, ["nanogpt"], "untied"),
        ({"qkv_bias": False}, ["nanogpt"], "qkv_bias False"),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_name(tmp_path, change, formats, word):
    model = dataclasses.replace(TINY, **{"activation": "gelu_erf"} | change)
    for format in formats:
        with pytest.raises(UserError, match=f"{format} cannot express .*{word}"):
            make(tmp_path / "out", model, format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["every setting", "sinusoidal", "banded", "no layers", "padded"])
def test_safetensors_alone_round_trip_bitwise(tmp_path, name):
    model = ALL_VARIANTS[name]
    params = make(tmp_path / "out", model, format="safetensors", keep_padding=True)
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "mine.safetensors")
    hf_tokenizer.write(CHARS, tmp_path, 12)
    weights, _ = read_pretrained(str(tmp_path / "mine.safetensors"))
    assert_bitwise(weights.params, params)
    rows = model.vocab_multiple
    assert dataclasses.replace(weights.config.model, vocab_multiple=rows) == model


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_damaged_safetensors_alone_are_read_or_refused_in_one_line(tmp_path, drawn):
    if not (tmp_path / "whole").exists():
        make(tmp_path / "whole", format="safetensors")
    path = tmp_path / "model.safetensors"
    with safetensors.safe_open(tmp_path / "whole" / "model.safetensors", "numpy") as file:
        whole = file.metadata()["gptjax"].encode()
    tensors = safetensors.numpy.load_file(tmp_path / "whole" / "model.safetensors")
    noted = drawn.draw(damaged(whole))
    more = {"gptjax": noted.decode(errors="ignore")}
    safetensors.numpy.save_file(tensors, path, metadata=more)
    read_or_refuse(lambda: read_pretrained(str(tmp_path)), tmp_path)


def test_safetensors_alone_hold_any_model(tmp_path):
    model = dataclasses.replace(
        SMALL, position="sinusoidal", attention_pattern=("banded",), bias=False, vocab_multiple=16
    )
    params = make(tmp_path / "out", model, format="safetensors")
    (path,) = (tmp_path / "out").iterdir()
    found = safetensors.numpy.load_file(path)
    assert "transformer.wpe.weight" not in found and "transformer.ln_f.bias" not in found
    assert np.array_equal(found["transformer.wte.weight"], params["wte"][:23])
    kernel = params["h"]["mlp"]["c_fc"]["kernel"][1]
    assert np.array_equal(found["transformer.h.1.mlp.c_fc.weight"], kernel)
    with safetensors.safe_open(path, "numpy") as file:
        assert ModelConfig(**json.loads(file.metadata()["gptjax"])) == model


def test_another_byte_pair_encoding_is_not_nanogpts(tmp_path, byte_pairs):
    model = dataclasses.replace(TINY, vocab_size=byte_pairs.n_vocab, activation="gelu_erf")
    with pytest.raises(UserError, match="not GPT-2's own"):
        make(tmp_path / "out", model, byte_pairs, format="nanogpt")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"activation_function": "mish"}, ["activation_function 'mish'", "gelu_new"]),
        ({"scale_attn_by_inverse_layer_idx": 1}, ["scale_attn_by_inverse_layer_idx is 1"]),
        ({"scale_attn_weights": None}, ["scale_attn_weights is None"]),
        ({"n_inner": 7}, ["wrongly shaped", "[4, 16] instead of [4, 7]"]),
        ({"model_type": "llama"}, ["model_type 'llama'"]),
        ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon 0 is outside (0, 1)"]),
        ({"add_cross_attention": True}, ["add_cross_attention True"]),
        ({"activation_function": "mish", "model_type": "x"}, ["activation_function", "model_type"]),
        ({"n_layer": 10**9}, ["1000000000"]),
        ({"n_layer": 2}, ["missing", "h.1."]),
        ({"n_layer": 0}, ["left over"]),
        ({"n_layer": "1"}, ["n_layer is '1'"]),
        ({"n_head": 3}, ["n_embd 4 is not divisible by model.n_head 3"]),
        ({"n_embd": 0}, ["n_embd 0"]),
        ({"n_positions": 13}, ["wrongly shaped", "wpe.weight", "[12, 4]"]),
        ({"n_positions": None}, ["block_size is None"]),
        ({"vocab_size": None}, ["vocab_size"]),
        ({"vocab_size": 24}, ["wrongly shaped", "wte.weight"]),
        ({"tie_word_embeddings": False}, ["missing: lm_head.weight"]),
        ({"tie_word_embeddings": "yes"}, ["tied_head is 'yes'"]),
        ({"resid_pdrop": [0.1]}, ["dropout"]),
        ({"attn_pdrop": {}}, ["dropout"]),
        ({"gptjax": {"bias": 3}}, ["bias is 3"]),
    ],
    ids=str,
)
def test_a_config_that_we_cannot_compute_is_refused(tmp_path, config, words):
    make(tmp_path / "model")
    change_config(tmp_path / "model", **config)
    with pytest.raises(UserError) as error:
        convert.import_model(str(tmp_path / "model"), tmp_path / "run")
    for word in (str(tmp_path / "model"), *words):
        assert word in str(error.value)
    assert not (tmp_path / "run").exists()


def test_three_rates_of_dropout_become_none_with_a_note(tmp_path):
    make(tmp_path / "model")
    change_config(tmp_path / "model", attn_pdrop=0.2)
    weights, _ = read_pretrained(str(tmp_path / "model"))
    assert weights.config.model.dropout == 0
    assert "dropout is set to 0" in weights.notes[0]


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_a_damaged_config_is_read_or_refused_in_one_line(tmp_path, drawn):
    folder = tmp_path / "model"
    if not folder.exists():
        make(folder)
        change_config(folder, n_inner=None, scale_attn_weights=True)
        (tmp_path / "whole.json").write_bytes((folder / "config.json").read_bytes())
    whole = (tmp_path / "whole.json").read_bytes()
    (folder / "config.json").write_bytes(drawn.draw(damaged(whole)))
    read_or_refuse(lambda: read_pretrained(str(folder)), folder)


def test_damaged_weights_leave_no_run(tmp_path):
    make(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        convert.import_model(str(tmp_path / "model"), tmp_path / "run")
    tensors["transformer.ln_f.weight"][1] = np.nan
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError, match=r"ln_f\.weight holds values that are not finite"):
        convert.import_model(str(tmp_path / "model"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_found_named_or_asked_for(tmp_path):
    make(tmp_path / "model")
    (tmp_path / "beside").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).rename(tmp_path / "beside" / name)
    folder = tmp_path / "model"
    with pytest.raises(UserError, match=r"no tokenizer lies in .*model for .*23 ids.*--tokenizer"):
        find_tokenizer(None, folder, 23)
    with pytest.raises(UserError, match=r"nowhere.* --tokenizer takes"):
        find_tokenizer(str(tmp_path / "nowhere"), folder, 23)
    beside = str(tmp_path / "beside")
    assert find_tokenizer(beside, folder, 23).state() == CHARS.state()
    convert.import_model(str(folder), tmp_path / "run", tokenizer=beside)
    assert find_tokenizer(str(tmp_path / "run"), folder, 23).state() == CHARS.state()
    with pytest.raises(UserError, match="23 ids, but the model knows 22"):
        find_tokenizer(beside, folder, 22)
    with pytest.raises(UserError, match="23 ids, but the model knows 2000"):
        find_tokenizer(beside, folder, 2000)
    (tmp_path / "tokenizer.json").write_text('{"kind": "char", "characters": ""}')
    with pytest.raises(UserError, match="has 0 ids"):
        find_tokenizer(str(tmp_path), folder, 5)


def test_a_vocabulary_of_gpt2s_size_gets_gpt2s_tokenizer(tmp_path, gpt2):
    for rows in (50257, 50304):
        assert find_tokenizer(None, tmp_path, rows).state() == gpt2.state()
    assert find_tokenizer("gpt2", tmp_path, 50260).state() == gpt2.state()


@pytest.mark.parametrize("source", ["a/b/c", "runs/gtp2", "..", "nope*"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=f"no model at '{source}'".replace("*", r"\*")):
        read_pretrained(source)


def test_a_model_is_fetched_from_the_hub_or_that_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = make(tmp_path / "published")
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, "model*.safetensors*" in allow_patterns))
        return str(tmp_path / "published")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    weights, _ = read_pretrained("some/model")
    assert_bitwise(weights.params, params)
    assert asked == [("some/model", True)]  # and no second copy as pickles

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"'gpt2-xl' is no file .*ConnectionError.* check the name"):
        read_pretrained("gpt2-xl")

    def fill(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill)
    with pytest.raises(RunError, match="no room left"):
        read_pretrained("gpt2-xl")


def test_an_export_is_pushed_to_the_hub_or_that_is_told(tmp_path, monkeypatch):
    weights = Weights(TrainConfig(TINY), random_params(TINY))
    convert.write_run(weights, CHARS, tmp_path / "run")
    pushed = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            assert private and exist_ok
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            pushed.append((repo_id, {path.name for path in folder_path.iterdir()}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    said = convert.export_model(tmp_path / "run", tmp_path / "out", push="mine")
    assert said.endswith("pushed it to https://huggingface.co/me/mine")
    ((name, files),) = pushed
    assert name == "me/mine"
    assert files > {"README.md", "config.json", "generation_config.json", "model.safetensors"}

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(Api, "upload_folder", fail)
    with pytest.raises(RunError, match=r"wrote .*out2, but .*'mine'.*no route.*hf upload mine"):
        convert.export_model(tmp_path / "run", tmp_path / "out2", push="mine")
    assert (tmp_path / "out2" / "config.json").exists()


def test_settings_of_an_import_are_in_its_run(tmp_path):
    weights = Weights(TrainConfig(SMALL), random_params(SMALL), RuntimeConfig(eval_interval=7))
    convert.write_run(weights, CHARS, tmp_path / "run")
    metadata = run_metadata.newest_metadata(tmp_path / "run")
    assert metadata.config == weights.config
    assert metadata.runtime == RuntimeConfig(eval_interval=7, run_dir=str(tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["runtime"]["eval_interval"] == 7
    assert saved["experiment"]["model"]["n_embd"] == 16
    assert hf_tokenizer.read(tmp_path / "run") is None


@pytest.mark.parametrize("room", [nanogpt, gguf])
def test_a_tokenizer_file_is_refused_where_it_cannot_be_expressed(room):
    own = hf.Tokenizer(hf.models.BPE())
    own.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(["a"], hf.trainers.BpeTrainer(initial_alphabet=alphabet))
    found = room.obstacles(ModelConfig(vocab_size=256), JsonTokenizer(own.to_str()))
    assert any(what.startswith("a json tokenizer") for what in found)


def test_a_tokenizer_of_another_kind_comes_and_goes_with_the_weights(tmp_path):
    own = hf.Tokenizer(hf.models.Unigram())
    own.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        [TEXT], hf.trainers.UnigramTrainer(vocab_size=300, initial_alphabet=alphabet)
    )
    tokenizer = JsonTokenizer(own.to_str())
    make(tmp_path / "model", dataclasses.replace(TINY, vocab_size=tokenizer.n_vocab), tokenizer)
    said = convert.import_model(str(tmp_path / "model"), tmp_path / "run")
    assert "note: its tokenizer.json is of no kind that we know; it is used as it is" in said
    loaded = run_metadata.load_checkpoint(tmp_path / "run", "best")
    found = find_tokenizer(str(tmp_path / "run"), tmp_path, tokenizer.n_vocab)
    assert (
        found.encode(TEXT).tolist() == own.encode(TEXT).ids
        and found.decode(own.encode(TEXT).ids) == TEXT
    )
    write_pretrained(Weights(loaded.metadata.config, loaded.params), found, tmp_path / "again")
    again = hf.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert again.encode(TEXT).ids == own.encode(TEXT).ids


def test_transformers_knows_what_ends_a_text(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra torch")
    own = hf.Tokenizer(hf.models.BPE())
    own.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator([TEXT], hf.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>", "</s>"]
    ))  # fmt: skip
    tokenizer = JsonTokenizer(own.to_str())
    make(tmp_path / "model", dataclasses.replace(TINY, vocab_size=tokenizer.n_vocab), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (theirs.eos_token, theirs.eos_token_id) == ("</s>", tokenizer.eot)
