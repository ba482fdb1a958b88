"""Weights from and to PyTorch's world, against transformers and torch themselves."""

import dataclasses
import json
import math
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from conftest import ROOT, TEXT, assert_one_clear_line
from hypothesis import given
from hypothesis import strategies as st
from test_state_dict import SMALL, VARIANTS, assert_bitwise, random_params
from test_tokenizers import GPT2, needs_gpt2
from test_weights import Trap

import train_jax
from gptjax import checkpoint, config, convert, data, state_dict, torch_gpt, train
from gptjax.config import PRESETS, ModelConfig, TrainConfig
from gptjax.convert import ExportFlags, ImportFlags
from gptjax.errors import UserError
from gptjax.model import apply
from gptjax.tokenizers import CharTokenizer, SentencePieceTokenizer

TRAIN = ROOT / "train_jax.py"
CHARS = CharTokenizer("".join(sorted(set(TEXT)))[:23])
TOKENS = np.random.default_rng(0).integers(0, 23, (2, 12), np.int32)


def write_chars(folder, tokenizer=CHARS):
    """nanoGPT's meta.pkl."""
    itos = dict(enumerate(tokenizer.characters))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def bring(source, run_dir, **flags) -> checkpoint.Loaded:
    """Import, and load what has come."""
    convert.import_model(str(source), run_dir, ImportFlags(**flags))
    return checkpoint.load(run_dir, "best")


def make_run(folder, model: ModelConfig, tokenizer=CHARS, **facts) -> checkpoint.Loaded:
    """A run with random parameters."""
    params = random_params(model)
    wanted = TrainConfig(model=model, data=config.DataConfig(tokenizer=tokenizer.kind))
    state = facts.pop("state", None)
    with checkpoint.Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(
            facts.pop("step", 7), params, state and state(wanted, params),
            checkpoint.Facts(wanted, convert.tokenizers.to_json(tokenizer), "f00d", 2.5, 2.5),
        )  # fmt: skip
    return checkpoint.load(folder, "best")


def our_logits(loaded, tokens=TOKENS):
    return np.asarray(apply(loaded.facts.config.model, loaded.params, tokens)[0])


@torch.no_grad()
def their_logits(model, tokens=TOKENS):
    found = model.eval()(torch.from_numpy(tokens).long())
    return getattr(found, "logits", found).float().numpy()


def assert_same_logits(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def strong(model):
    """Weights large enough that every tensor matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.2)
    return model


# ---------------------------------------------------------------------- Hugging Face, in


def gpt2(**settings):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 23}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    found = transformers.GPT2Config(**sizes | tokens | settings)
    return strong(transformers.GPT2LMHeadModel(found))


def masked(tensors):
    """With the causal masks of older versions."""
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 12, 12).tril().byte() for i in (0, 1)}
    more = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in (0, 1)}
    return tensors | masks | more


def bare(tensors):
    """As GPT2Model, without the head, names its tensors; so do the released weights."""
    kept = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return {name.removeprefix("transformer."): tensor for name, tensor in kept.items()}


def torch_shards(model, folder):
    tensors, weight_map = model.state_dict(), {}
    for number in range(3):
        name = f"pytorch_model-{number}.bin"
        names = list(tensors)[number::3]
        torch.save({n: tensors[n] for n in names}, folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def in_torch(change):
    return lambda model, f: torch.save(change(model.state_dict()), f / "pytorch_model.bin")


SAVED = {
    "safetensors": lambda model, f: model.save_pretrained(f),
    "sharded": lambda model, f: model.save_pretrained(f, max_shard_size="5KB"),
    "bare safetensors with masks": lambda model, f: safetensors.torch.save_file(
        bare(masked(model.state_dict())), f / "model.safetensors"
    ),
    "torch": in_torch(dict),
    "torch with masks": in_torch(masked),
    "bare torch": in_torch(bare),
    "sharded torch": torch_shards,
}


@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
def test_an_imported_gpt2_has_the_logits_of_transformers(tmp_path, save):
    model, folder = gpt2(), tmp_path / "model"
    model.config.save_pretrained(folder)
    save(model, folder)
    write_chars(folder)
    assert (len([f for f in folder.iterdir() if "-" in f.name]) > 1) == (
        save in (SAVED["sharded"], SAVED["sharded torch"])
    )
    loaded = bring(folder, tmp_path / "run")
    assert loaded.step == 0 and loaded.facts.config.model.vocab_size == 23
    assert_same_logits(our_logits(loaded), their_logits(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": False},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh", "n_inner": 64},
        {"n_layer": 1, "n_head": 4, "n_embd": 12, "n_positions": 40},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_variant_and_precision_of_gpt2_has_transformers_logits(tmp_path, settings, dtype):
    model = gpt2(**settings).to(dtype)
    model.save_pretrained(tmp_path / "model")
    write_chars(tmp_path / "model")
    loaded = bring(tmp_path / "model", tmp_path / "run")
    assert loaded.params["wte"].dtype == np.float32
    assert_same_logits(our_logits(loaded), their_logits(model.float()))


@needs_gpt2
def test_a_vocabulary_of_gpt2s_size_gets_gpt2s_tokenizer(tmp_path):
    gpt2(vocab_size=50304, n_layer=1, n_embd=4).save_pretrained(tmp_path / "model")
    loaded = bring(tmp_path / "model", tmp_path / "run")
    found = loaded.facts.config.model
    assert (found.vocab_size, found.padded_vocab_size) == (50257, 50304)
    assert json.loads(loaded.facts.tokenizer) == GPT2.state()


def hub_folder(folder, **settings):
    model = gpt2(n_layer=1, n_embd=4)
    model.save_pretrained(folder)
    write_chars(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation_function": "relu"}, ["activation_function 'relu'", "gelu_new"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx True"]),
        ({"scale_attn_weights": False}, ["scale_attn_weights False"]),
        ({"n_inner": 7}, ["n_inner 7", "16"]),
        ({"model_type": "llama"}, ["model_type 'llama'"]),
        ({"layer_norm_epsilon": 1e-6}, ["layer_norm_epsilon 1e-06", "1e-05"]),
        ({"add_cross_attention": True}, ["add_cross_attention True"]),
        ({"activation_function": "relu", "n_inner": 7}, ["activation_function", "n_inner"]),
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
        ({"resid_pdrop": [0.1]}, ["config.json"]),
        ({"attn_pdrop": {}}, ["config.json"]),
        ({"gptjax": {"bias": 3}}, ["model.bias is 3"]),
    ],
    ids=str,
)
def test_a_config_that_we_cannot_compute_is_refused_by_name(tmp_path, settings, words):
    with pytest.raises(UserError) as error:
        bring(hub_folder(tmp_path / "model", **settings), tmp_path / "run")
    for word in (str(tmp_path / "model"), *words):
        assert word in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder whose config.json may be overwritten."""
    return hub_folder(tmp_path_factory.mktemp("good"))


SETTINGS = ["model_type", "n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size",
            "resid_pdrop", "attn_pdrop", "tie_word_embeddings", "activation_function", "gptjax",
            "layer_norm_epsilon", "scale_attn_weights"]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["gpt2", "gelu"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["bias", "qkv_bias"]), inner)
    ),
)


@given(changes=st.dictionaries(st.sampled_from(SETTINGS), VALUES), text=st.none() | st.text())
def test_no_config_json_raises_anything_but_a_user_error(good, changes, text):
    path = good / "config.json"
    keep = path.read_bytes()
    try:
        changed = json.dumps(json.loads(keep) | changes)
        path.write_text(changed if text is None else text, encoding="utf-8", errors="replace")
        convert.read_model(str(good), ImportFlags())
    except UserError as error:
        assert str(good) in str(error)
    finally:
        path.write_bytes(keep)


def test_damaged_weights_leave_no_run(tmp_path):
    folder = hub_folder(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        bring(folder, tmp_path / "run")
    tensors["transformer.ln_f.weight"][1] = np.nan
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError, match=r"ln_f\.weight holds values that are not finite"):
        bring(folder, tmp_path / "run")
    path.unlink()
    torch.save({"wte.weight": Trap(tmp_path / "trap")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="was not run"):
        bring(folder, tmp_path / "run")
    assert not (tmp_path / "trap").exists() and not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- nanoGPT, in

NANO = ModelConfig(2, 2, 16, block_size=12, vocab_size=23, gelu="erf")
RATES = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 2, "lr_decay_iters": 20,
         "max_iters": 30, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.9, "grad_clip": 0.7,
         "gradient_accumulation_steps": 2, "batch_size": 4, "eval_interval": 250, "eval_iters": 3,
         "decay_lr": True, "device": "cuda", "compile": True, "dataset": "d"}  # fmt: skip


class Nano:
    """nanoGPT's training loop, by its published formulas."""

    def __init__(self, model: ModelConfig, decay_lr=True):
        self.net = strong(torch_gpt.TorchGPT(model))
        self.decay_lr = decay_lr
        self.adamw = torch_gpt.adamw(
            self.net, learning_rate=1e-2, betas=(0.8, 0.9), weight_decay=0.2
        )
        self.iter_num = 0

    def rate(self):
        it = self.iter_num
        if not self.decay_lr:
            return 1e-2
        if it < 2:
            return 1e-2 * (it + 1) / 3
        if it > 20:
            return 1e-3
        return 1e-3 + 0.5 * (1 + math.cos(math.pi * (it - 2) / 18)) * 9e-3

    def train(self, rows) -> float:
        for group in self.adamw.param_groups:
            group["lr"] = self.rate()
        tokens = torch.from_numpy(rows).long()
        loss = torch_gpt.cross_entropy(self.net(tokens[:, :-1]), tokens[:, 1:])
        self.adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.7)
        self.adamw.step()
        self.iter_num += 1
        return loss.item()

    def save(self, folder, prefix="", **more):
        folder.mkdir(exist_ok=True)
        model = self.net.config
        saved = {
            "model": {prefix + n: tensor for n, tensor in self.net.state_dict().items()},
            "optimizer": self.adamw.state_dict(),
            "model_args": {
                "n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd,
                "block_size": model.block_size, "bias": model.bias, "dropout": 0.0,
                "vocab_size": model.vocab_size,
            },
            "iter_num": self.iter_num,
            "best_val_loss": torch.tensor(3.25),
            "config": RATES | {"decay_lr": self.decay_lr},
        }  # fmt: skip
        torch.save(saved | more, folder / "ckpt.pt")
        write_chars(folder)
        return folder


def rows_at(step):
    return np.random.default_rng(step).integers(0, 23, (8, 13), np.int32)


@pytest.mark.parametrize(
    ("bias", "prefix", "decay_lr"), [(True, "", True), (False, "_orig_mod.", False)]
)
def test_training_goes_on_from_nanogpt_as_torch_does(tmp_path, bias, prefix, decay_lr):
    theirs = Nano(dataclasses.replace(NANO, bias=bias), decay_lr)
    for step in range(3):
        theirs.train(rows_at(step))
    loaded = bring(theirs.save(tmp_path / "nano", prefix), tmp_path / "run")
    settings = loaded.facts.config
    assert loaded.step == 3 and settings.batch_size == 8
    assert_same_logits(our_logits(loaded), their_logits(theirs.net))

    opt_state = checkpoint.load(tmp_path / "run", "best", optimizer=True).opt_state
    state = train.TrainState(jax.numpy.int32(loaded.step), loaded.params, opt_state)
    step_once = jax.jit(
        lambda state, windows: train.train_step(state, train.whole_batch(windows), settings)
    )
    for step in range(3, 6):
        state, metrics = step_once(state, rows_at(step)[None])  # one micro-batch compiles faster
        assert float(metrics["learning_rate"]) == pytest.approx(theirs.rate(), rel=1e-6)
        assert float(metrics["train_loss"]) == pytest.approx(theirs.train(rows_at(step)), rel=1e-5)
    ours = state_dict.to_torch(state.params, settings.model, "out_in")
    for name, expected in theirs.net.state_dict().items():
        if name == "lm_head.weight":
            continue
        got, want = ours[name], expected.numpy()
        if name.endswith("c_attn.bias"):
            # A key's bias has no gradient but rounding, which Adam magnifies.
            got, want = np.delete(got, np.s_[16:32]), np.delete(want, np.s_[16:32])
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5, err_msg=name)


def test_nanogpts_settings_become_ours(tmp_path):
    theirs = Nano(NANO)
    theirs.train(rows_at(0))
    found = bring(theirs.save(tmp_path / "nano"), tmp_path / "run").facts.config
    assert found.model == NANO
    expected = {
        "learning_rate": 1e-2, "min_lr": 1e-3, "warmup_steps": 2, "lr_decay_steps": 20,
        "max_steps": 30, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.9, "grad_clip": 0.7,
        "gradient_accumulation_steps": 2, "batch_size": 8, "eval_interval": 250,
        "eval_batches": 3,
    }  # fmt: skip
    assert expected.items() <= dataclasses.asdict(found).items()


def test_a_padded_nanogpt_vocabulary_keeps_its_rows_and_gives_no_logits_for_them(tmp_path):
    theirs = Nano(dataclasses.replace(NANO, vocab_size=64))
    theirs.train(rows_at(0))
    loaded = bring(theirs.save(tmp_path / "nano"), tmp_path / "run")
    found = loaded.facts.config.model
    assert (found.vocab_size, found.padded_vocab_size) == (23, 64)
    assert np.array_equal(loaded.params["wte"], theirs.net.lm_head.weight.detach())
    assert_same_logits(our_logits(loaded), their_logits(theirs.net)[..., :23])


def test_the_weights_alone_are_step_0(tmp_path):
    theirs = Nano(NANO)
    theirs.train(rows_at(0))
    folder = theirs.save(tmp_path / "nano", optimizer="damaged")
    with pytest.raises(UserError, match="--optimizer False"):
        bring(folder, tmp_path / "run")
    loaded = bring(folder / "ckpt.pt", tmp_path / "run", optimizer=False)
    assert loaded.step == 0
    assert_same_logits(our_logits(loaded), their_logits(theirs.net))
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        assert not checkpoints.has_optimizer(0)
    with pytest.raises(UserError, match="holds a run already"):
        bring(folder, tmp_path / "run", optimizer=False)


ARGS = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 5}
ONE = torch.ones(1)


@pytest.mark.parametrize("saved", [
    [], {}, {"model": {}}, {"model_args": ARGS}, {"model": 3, "model_args": ARGS},
    {"model": {1: ONE}, "model_args": ARGS},
    {"model": {"odd": 3}, "model_args": ARGS},
    {"model": {}, "model_args": ARGS | {"n_layer": 0, "vocab_size": None}},
    {"model": {}, "model_args": ARGS | {"n_layer": 10**9}},
    {"model": {}, "model_args": ARGS | {"n_layer": ONE}},
    {"model": {}, "model_args": ARGS | {(1, 2): 3}},
    {"model": {}, "model_args": ARGS | {"n_unknown": 3}},
    {"model": {}, "model_args": ARGS, "config": {"learning_rate": ONE}},
    {"model": {}, "model_args": ARGS, "config": {"learning_rate": -1.0}},
], ids=["list", "empty", "no args", "no model", "number for a model", "number for a name",
        "number for a tensor", "no vocabulary", "a billion layers", "tensor for a size",
        "tuple for a name", "unknown setting", "tensor for a rate", "negative rate"],
)  # fmt: skip
def test_a_ckpt_that_is_not_nanogpts_is_a_user_error(tmp_path, saved):
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt"):
        bring(tmp_path, tmp_path / "run")


@pytest.mark.parametrize("change", [
    lambda o: o.update(state={}),
    lambda o: o.pop("param_groups"),
    lambda o: o["param_groups"].pop(),
    lambda o: o["state"][0].pop("exp_avg"),
    lambda o: o["state"][0].update(step=torch.tensor(2.0)),
    lambda o: o["state"][0].update(exp_avg=ONE),
    lambda o: o["state"][0].update(exp_avg_sq=3),
    lambda o: [moment.update(step=torch.tensor(math.inf)) for moment in o["state"].values()],
    lambda o: [moment.update(step=torch.tensor(1e30)) for moment in o["state"].values()],
    lambda o: o["state"][0].update(step=torch.ones(3)),
], ids=["no state", "no groups", "one group", "no moment", "another count", "misshaped",
        "no tensor", "infinite count", "huge count", "many counts"],
)  # fmt: skip
def test_an_optimizer_that_does_not_fit_says_how_to_leave_it(tmp_path, change):
    theirs = Nano(NANO)
    theirs.train(rows_at(0))
    optimizer = theirs.adamw.state_dict()
    optimizer = optimizer | {"state": {k: dict(v) for k, v in optimizer["state"].items()}}
    change(optimizer)
    with pytest.raises(UserError, match="--optimizer False"):
        bring(theirs.save(tmp_path / "nano", optimizer=optimizer), tmp_path / "run")


@pytest.mark.parametrize("name", ["ckpt.pt", "meta.pkl"])
def test_code_in_nanogpts_pickles_is_not_run(tmp_path, name):
    theirs, trap = Nano(NANO), tmp_path / "trap"
    theirs.train(rows_at(0))
    folder = theirs.save(tmp_path / "nano", **({"extra": Trap(trap)} if "ckpt" in name else {}))
    if name == "meta.pkl":
        (folder / name).write_bytes(pickle.dumps({"itos": Trap(trap)}))
    with pytest.raises(UserError, match="mkdir"):
        bring(folder, tmp_path / "run")
    assert not trap.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_ckpt_is_named(tmp_path, keep):
    path = Nano(NANO).save(tmp_path / "nano") / "ckpt.pt"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=r"ckpt\.pt is damaged"):
        bring(path, tmp_path / "run")


def test_a_model_without_a_tokenizer_says_how_to_name_one(tmp_path):
    folder = hub_folder(tmp_path / "model")
    (folder / "meta.pkl").rename(tmp_path / "meta.pkl")
    with pytest.raises(UserError, match="--tokenizer"):
        bring(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"--tokenizer .*nowhere"):
        bring(folder, tmp_path / "run", tokenizer=str(tmp_path / "nowhere"))
    loaded = bring(folder, tmp_path / "run", tokenizer=str(tmp_path))
    assert json.loads(loaded.facts.tokenizer) == CHARS.state()
    write_chars(tmp_path, CharTokenizer("".join(map(chr, range(100, 124)))))
    with pytest.raises(UserError, match="24 ids, but the model knows 23"):
        bring(folder, tmp_path / "other", tokenizer=str(tmp_path))


# ---------------------------------------------------------------------------------- out


def send(run_dir, folder, **flags):
    convert.export(run_dir, folder, ExportFlags(**flags))


PADDED = dataclasses.replace(SMALL, vocab_multiple=32, bias=False, tied_head=False)


@pytest.mark.parametrize("model", [*VARIANTS.values(), PADDED], ids=[*VARIANTS, "padded"])
def test_transformers_loads_an_export_and_has_our_logits(tmp_path, model):
    loaded = make_run(tmp_path / "run", model)
    send(tmp_path / "run", tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.config.tie_word_embeddings == model.tied_head
    assert_same_logits(our_logits(loaded), their_logits(theirs))
    text = "".join(CHARS.characters)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode(text) == CHARS.encode(text).tolist()


def test_a_sharded_export_loads_in_transformers_and_comes_back_bitwise(tmp_path):
    loaded = make_run(tmp_path / "run", VARIANTS["untied"])
    (tmp_path / "out").mkdir()
    convert.export_hugging_face(loaded, CHARS, tmp_path / "out", shard_bytes=5000)
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "out/model.safetensors").exists()
    assert {len(list((tmp_path / "out").glob(f"*-of-{len(files):05}.safetensors")))} == {len(files)}
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert_same_logits(our_logits(loaded), their_logits(theirs))
    assert_bitwise(bring(tmp_path / "out", tmp_path / "again").params, loaded.params)


ROUND = {
    **VARIANTS,
    "padded": PADDED,
    "gpt2": dataclasses.replace(PRESETS["gpt2"], n_layer=1, vocab_size=23, block_size=32),
    "medium, untied": dataclasses.replace(
        PRESETS["gpt2-medium"], n_layer=1, vocab_size=23, block_size=32, tied_head=False
    ),
    "large, no bias": dataclasses.replace(
        PRESETS["gpt2-large"], n_layer=1, vocab_size=23, block_size=32, bias=False
    ),
    "xl, padded": dataclasses.replace(
        PRESETS["gpt2-xl"], n_layer=1, vocab_size=23, block_size=32, vocab_multiple=64
    ),
}


@pytest.mark.parametrize("model", ROUND.values(), ids=ROUND)
def test_hugging_face_round_trips_are_bitwise_and_keep_the_architecture(tmp_path, model):
    loaded = make_run(tmp_path / "run", model)
    send(tmp_path / "run", tmp_path / "out", keep_padding=True)
    again = bring(tmp_path / "out", tmp_path / "again")
    assert_bitwise(again.params, loaded.params)
    found = again.facts.config.model
    same = dataclasses.replace(model, vocab_multiple=found.vocab_multiple)
    assert found == same and found.padded_vocab_size == model.padded_vocab_size
    assert again.facts.tokenizer == loaded.facts.tokenizer


def random_state(wanted, params):
    first, second = random_params(wanted.model, 1), random_params(wanted.model, 2)
    count = np.asarray(7, np.int32)
    return convert.optim.adam_state(wanted, count, first, jax.tree.map(np.abs, second))


NANO_ROUND = {
    "bias": NANO,
    "no bias": dataclasses.replace(NANO, bias=False),
    "padded": dataclasses.replace(NANO, vocab_multiple=64),
    "gpt2": dataclasses.replace(ROUND["gpt2"], gelu="erf"),
}


@pytest.mark.parametrize("model", NANO_ROUND.values(), ids=NANO_ROUND)
def test_nanogpt_round_trips_are_bitwise_with_the_optimizers_state(tmp_path, model):
    loaded = make_run(tmp_path / "run", model, state=random_state)
    send(tmp_path / "run", tmp_path / "out", format="nanogpt", keep_padding=True)
    again = bring(tmp_path / "out", tmp_path / "again")
    assert again.step == loaded.step == 7
    assert_bitwise(again.params, loaded.params)
    before, after = (
        checkpoint.load(tmp_path / name, "best", optimizer=True).opt_state
        for name, run in (("run", loaded), ("again", again))
    )
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)
    found, was = again.facts.config, loaded.facts.config
    for name in ("batch_size", "learning_rate", "beta2", "weight_decay", "max_steps", "grad_clip"):
        assert getattr(found, name) == getattr(was, name)


@pytest.mark.parametrize("model", [NANO, dataclasses.replace(NANO, bias=False, vocab_multiple=32)])
def test_torch_loads_a_nanogpt_export_strictly_and_trains_on(tmp_path, model):
    loaded = make_run(tmp_path / "run", model, state=random_state)
    send(tmp_path / "run", tmp_path / "out", format="nanogpt")
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    args = dict(saved["model_args"])
    assert args == {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 23,
                    "bias": model.bias, "dropout": 0.0}  # fmt: skip
    theirs = torch_gpt.TorchGPT(dataclasses.replace(model, vocab_multiple=1))
    theirs.load_state_dict(saved["model"], strict=True)
    assert_same_logits(our_logits(loaded), their_logits(theirs))

    # nanoGPT's train.py restores the optimizer so, and goes on.
    adamw = torch_gpt.adamw(theirs, learning_rate=1.0, betas=(0.1, 0.1), weight_decay=0.9)
    adamw.load_state_dict(saved["optimizer"])
    decays = {group["weight_decay"] for group in adamw.param_groups}
    assert decays == {loaded.facts.config.weight_decay, 0.0}
    moment = adamw.state[theirs.transformer.h[1].mlp.c_fc.weight]
    expected = random_params(model, 1)["h"]["mlp"]["c_fc"]["kernel"][1]
    assert np.array_equal(moment["exp_avg"], expected.T) and moment["step"] == 7
    theirs(torch.from_numpy(TOKENS).long()).sum().backward()
    adamw.step()

    assert saved["iter_num"] == 7 and saved["best_val_loss"] == 2.5
    meta = pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())
    text = CHARS.characters[::-1]
    assert [meta["stoi"][c] for c in text] == CHARS.encode(text).tolist()
    assert "".join(meta["itos"][i] for i in CHARS.encode(text)) == text
    assert meta["vocab_size"] == 23


@pytest.mark.parametrize(
    ("change", "formats", "word"),
    [
        ({"position": "sinusoidal"}, ["hf", "nanogpt"], "sinusoidal"),
        ({"attention_pattern": ("dense", "banded")}, ["hf", "nanogpt"], "banded"),
        ({"n_layer": 0}, ["hf", "nanogpt"], "n_layer 0"),
        ({"gelu": "tanh"}, ["nanogpt"], "GELU's tanh"),
        ({"tied_head": False}, ["nanogpt"], "untied"),
        ({"qkv_bias": False}, ["nanogpt"], "qkv_bias False"),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_name(tmp_path, change, formats, word):
    make_run(tmp_path / "run", dataclasses.replace(NANO, **change))
    for to in formats:
        with pytest.raises(UserError, match=f"{to} cannot express .*{word}"):
            send(tmp_path / "run", tmp_path / "out", format=to)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_nanogpt_has_no_sentencepiece(tmp_path):
    tokenizer = SentencePieceTokenizer.train([TEXT], 400)
    model = dataclasses.replace(NANO, vocab_size=400)
    loaded = make_run(tmp_path / "run", model, tokenizer)
    with pytest.raises(UserError, match="sentencepiece"):
        send(tmp_path / "run", tmp_path / "out", format="nanogpt")
    send(tmp_path / "run", tmp_path / "out")
    again = bring(tmp_path / "out", tmp_path / "again")
    assert again.facts.tokenizer == loaded.facts.tokenizer
    assert_bitwise(again.params, loaded.params)


def test_an_export_overwrites_nothing(tmp_path):
    make_run(tmp_path / "run", SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        send(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="no checkpoint '8'"):
        send(tmp_path / "run", tmp_path / "other", checkpoint="8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert (tmp_path / "out" / "mine").read_text() == "mine"


# ------------------------------------------------------------------------ the commands


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["import or export?"]),
        (["port"], ["import or export?"]),
        (["import"], ["SOURCE RUN_DIR"]),
        (["export", "run"], ["RUN_DIR DIR"]),
        (["import", "a/b/c", "run"], ["no model at 'a/b/c'"]),
        (["import", "x", "run", "--tokeniser", "y"], ["--tokeniser", "--tokenizer"]),
        (["export", "nope", "out"], ["no run in nope"]),
        (["export", "nope", "out", "--format", "onnx"], ["onnx"]),
    ],
)
def test_bad_arguments_are_user_errors(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        convert.main(argv)
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_hub_name_without_a_network_is_one_clear_line(command):
    result = command(
        "-m", "gptjax.convert", "import", "gpt2-xl", "run", HF_HUB_OFFLINE="1", HF_HOME="empty"
    )
    assert_one_clear_line(result, "'gpt2-xl'", "Hugging Face Hub", "check the name")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as one model needs: `folder`, as some/model."""

    folder = None

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path in ("/api/models/some/model/revision/main", "/api/models/some/model"):
            files = [{"rfilename": f.name} for f in self.folder.iterdir()]
            found = {"id": "some/model", "sha": COMMIT, "siblings": files, "private": False}
            return self.answer(json.dumps(found).encode(), "application/json")
        if path.startswith("/api/models/some/model/tree/"):
            found = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f"{i:040}"}
                for i, f in enumerate(self.folder.iterdir())
            ]
            return self.answer(json.dumps(found).encode(), "application/json")
        if "/some/model/resolve/" in path and (self.folder / name).is_file():
            return self.answer((self.folder / name).read_bytes(), "application/octet-stream")
        return self.send_error(404)

    def answer(self, body, kind):
        self.send_response(200)
        for header in {"Content-Type": kind, "Content-Length": str(len(body)),
                       "ETag": f'"{hash(body):x}"', "X-Repo-Commit": COMMIT}.items():  # fmt: skip
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_model_is_fetched_from_the_hub(command, tmp_path, kind):
    model, folder = gpt2(), tmp_path / "published"
    model.config.save_pretrained(folder)
    SAVED[kind](model, folder)
    convert.hf_tokenizer.write(CHARS, folder, 12)
    (folder / "never.fetched").write_text("by us")
    handler = type("Handler", (Hub,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        result = command(
            "-m", "gptjax.convert", "import", "some/model", "run",
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "home"),
            HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0",
        )  # fmt: skip
        server.shutdown()
        thread.join()
    assert result.returncode == 0, result.stderr
    assert "from some/model" in result.stdout
    assert not list((tmp_path / "home").rglob("never.fetched"))
    loaded = checkpoint.load(tmp_path / "run", "best")
    assert_same_logits(our_logits(loaded), their_logits(model))


# -------------------------------------------------------------------------- training on

FULL = CharTokenizer("".join(sorted(set(TEXT))))
TRAINABLE = dataclasses.replace(NANO, vocab_size=FULL.n_vocab)


@pytest.fixture
def imported(tmp_path):
    """nanoGPT's network after two steps, and its import in run/."""
    theirs = Nano(TRAINABLE)
    for step in range(2):
        theirs.train(rows_at(step))
    folder = theirs.save(tmp_path / "nano")
    write_chars(folder, FULL)
    (tmp_path / "text.txt").write_text(TEXT)
    bring(folder, tmp_path / "run")
    return theirs


FEW = "--sample-tokens 0 --eval-full-split --batch-size 4"


def settings_of(*argv):
    return train_jax.read_settings([*map(str, argv)])[0]


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


@torch.no_grad()
def torch_val_loss(net, run_dir, block):
    """Mean over the whole validation split, in windows of `block`."""
    folder = json.loads((run_dir / "config.json").read_text())["data"]["dir"]
    tokens = torch.from_numpy(np.array(data.load(data.Path(folder)).val[:], np.int64))
    whole = (len(tokens) - 1) // block
    rows = tokens[: whole * block + 1].unfold(0, block + 1, block)
    parts = [rows, tokens[None, whole * block :]]  # the last window is shorter
    total = sum(
        row[:, 1:].numel() * torch_gpt.cross_entropy(net(row[:, :-1]), row[:, 1:]).item()
        for row in parts
        if row.shape[1] > 1
    )
    return total / (len(tokens) - 1)


def test_an_imported_run_needs_a_text_then_counts_on(imported, command, tmp_path):
    assert_one_clear_line(command(TRAIN, "--run-dir", "run"), "--data.source")
    flags = f"--run-dir run --data.source text.txt --max-steps 4 {FEW}".split()
    result = command(TRAIN, *flags)
    assert result.returncode == 0, result.stderr
    assert "(imported, at step 2)" in result.stdout
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest_step == 4
        assert checkpoints.facts(4).data_fingerprint


def test_new_runs_start_from_imported_weights_with_a_cropped_block(imported, command, tmp_path):
    flags = f"--init-from run --run-dir new --data.source text.txt --model.block-size 8 {FEW}"
    # On two devices: nothing may wake JAX before they are made.
    result = command(TRAIN, *flags.split(), "--max-steps", 2, "--num-devices", 2)
    assert "from" in result.stdout and "2 x cpu" in result.stdout
    assert result.returncode == 0, result.stderr
    expected = torch_val_loss(imported.net, tmp_path / "new", 8)
    assert losses(tmp_path / "new")[0] == pytest.approx(expected, rel=1e-5)

    result = command(TRAIN, "--run-dir", "new", "--max-steps", 3, "--lr-decay-steps", 2)
    assert result.returncode == 0 and "resumed at step 2" in result.stdout, result.stderr
    with checkpoint.Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.facts(3).config.model.block_size == 8


def test_the_settings_of_a_new_run_follow_its_weights(imported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = settings_of("--init-from", "run", "--run-dir", "new").model
    assert found == TRAINABLE


def test_another_architecture_than_the_weights_is_refused_by_name(imported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, words in {
        "--model.n-layer 3": "model.n_layer 3 .*2",
        "--model.block-size 13": "model.block_size 13 exceeds .*12",
        "--model.tied-head False": "model.tied_head",
    }.items():
        with pytest.raises(UserError, match=words):
            settings_of("--init-from", "run", "--run-dir", "new", *flags.split())
    with pytest.raises(UserError, match="no run in nowhere"):
        settings_of("--init-from", "nowhere", "--run-dir", "new")


def test_a_tokenizer_far_smaller_than_the_embedding_is_refused(tmp_path):
    gpt2(n_layer=1, n_embd=4, vocab_size=2000).save_pretrained(tmp_path / "model")
    write_chars(tmp_path / "model")
    with pytest.raises(UserError, match="has 23 ids, but the model knows 2000"):
        bring(tmp_path / "model", tmp_path / "run")


def test_rows_taken_for_padding_are_told(tmp_path, capsys):
    gpt2(n_layer=1, n_embd=4, vocab_size=64).save_pretrained(tmp_path / "model")
    write_chars(tmp_path / "model")
    bring(tmp_path / "model", tmp_path / "run")
    assert "41 rows of the embedding taken for padding" in capsys.readouterr().out


def test_settings_that_we_refuse_do_not_keep_good_weights_out(tmp_path, capsys):
    folder = Nano(NANO).save(tmp_path / "nano")
    saved = torch.load(folder / "ckpt.pt")
    saved["config"] |= {"learning_rate": 3e-5, "min_lr": 6e-5}
    torch.save(saved, folder / "ckpt.pt")
    loaded = bring(folder, tmp_path / "run", optimizer=False)
    assert "min_lr 6e-05 is above learning_rate 3e-05" in capsys.readouterr().out
    assert loaded.facts.config.learning_rate == config.FINETUNE.learning_rate


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no model at 'runs/gtp2'"):
        convert.read_model("runs/gtp2", ImportFlags())
