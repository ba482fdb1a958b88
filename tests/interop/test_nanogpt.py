"""nanoGPT's ckpt.pt: training goes on as PyTorch's does, in both directions."""

import copy
import dataclasses
import functools
import math
import os
import pickle
import sys
import types
import warnings

import jax
import numpy as np
import pytest
from fuzz import odd_values, read_or_refuse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import assert_bitwise, assert_close, logits, random_params

from gptjax import optim, train_step
from gptjax.config import FINETUNE, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.data.tokenizers import CharTokenizer
from gptjax.errors import UserError
from gptjax.interop import nanogpt, parameter_names
from gptjax.interop.convert import read_pretrained, write_pretrained
from gptjax.interop.weights import Weights
from gptjax.runtime_config import RuntimeConfig

torch = pytest.importorskip("torch", reason="needs PyTorch")
from gptjax.parity import torch_gpt  # noqa: E402

SMALLEST = ModelConfig(1, 1, 4, block_size=12, vocab_size=23, activation="gelu_erf")
NANO = ModelConfig(2, 2, 16, block_size=12, vocab_size=23, activation="gelu_erf")
RATES = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 2, "lr_decay_iters": 20,
         "max_iters": 30, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.9, "grad_clip": 0.7,
         "gradient_accumulation_steps": 2, "batch_size": 4, "eval_interval": 250, "eval_iters": 3,
         "decay_lr": True, "device": "cuda", "compile": True, "dataset": "d"}  # fmt: skip
CHARS = CharTokenizer("".join(map(chr, range(65, 88))))
TOKENS = np.random.default_rng(0).integers(0, 23, (2, 12), np.int32)


def rows_at(step):
    return np.random.default_rng(step).integers(0, 23, (8, 13), np.int32)


@torch.no_grad()
def their_logits(model) -> np.ndarray:
    return model.eval()(torch.from_numpy(TOKENS).long()).numpy()


class Nano:
    """nanoGPT's training loop, by its published formulas."""

    def __init__(self, model: ModelConfig = NANO, decay_lr=True):
        torch.manual_seed(0)
        self.net = torch_gpt.TorchGPT(model)
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.2)
        self.decay_lr = decay_lr
        self.adamw = torch_gpt.adamw(
            self.net.parameters(), learning_rate=1e-2, betas=(0.8, 0.9), weight_decay=0.2
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

    def train(self, rows=None) -> float:
        for group in self.adamw.param_groups:
            group["lr"] = self.rate()
        tokens = torch.from_numpy(rows_at(self.iter_num) if rows is None else rows).long()
        loss = torch_gpt.cross_entropy(self.net(tokens[:, :-1]), tokens[:, 1:])
        self.adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.7)
        self.adamw.step()
        self.iter_num += 1
        return loss.item()

    def save(self, folder, prefix="", **more):
        model = self.net.config
        args = {n: getattr(model, n) for n in ("n_layer", "n_head", "n_embd", "block_size", "bias",
                                               "dropout", "vocab_size")}  # fmt: skip
        saved = {
            "model": {prefix + n: tensor for n, tensor in self.net.state_dict().items()},
            "optimizer": self.adamw.state_dict(), "model_args": args,
            "iter_num": self.iter_num, "best_val_loss": torch.tensor(3.25),
            "config": RATES | {"decay_lr": self.decay_lr},
        }  # fmt: skip
        torch.save(saved | more, folder / "ckpt.pt")
        return folder / "ckpt.pt"


def trained(steps=1, *args) -> Nano:
    theirs = Nano(*args)
    for _ in range(steps):
        theirs.train()
    return theirs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = trained(1, SMALLEST).save(tmp_path_factory.mktemp("saved"))
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("bias", "prefix", "decay_lr"),
    [(True, "", True), pytest.param(False, "_orig_mod.", False, marks=pytest.mark.slow)],
)
def test_training_goes_on_as_torch_does(tmp_path, bias, prefix, decay_lr):
    theirs = trained(3, dataclasses.replace(NANO, bias=bias), decay_lr)
    found = nanogpt.read(theirs.save(tmp_path, prefix))
    assert found.step == 3 and not found.notes
    assert_close(logits(found.config.model, found.params, TOKENS), their_logits(theirs.net))

    theirs.net.train()
    state = train_step.TrainState(jax.numpy.int32(3), found.params, found.opt_state)
    step_once = jax.jit(functools.partial(train_step.train_step, config=found.config))
    for step in range(3, 6):
        # One micro-batch compiles faster.
        state, metrics = step_once(state, train_step.whole_batch(rows_at(step)[None]))
        assert float(metrics["learning_rate"]) == pytest.approx(theirs.rate(), rel=1e-6)
        assert float(metrics["train_loss"]) == pytest.approx(theirs.train(), rel=1e-5)
    ours = parameter_names.to_torch(state.params, found.config.model, "out_in")
    for name, expected in theirs.net.named_parameters():
        got, want = ours[name], expected.detach().numpy()
        if name.endswith("c_attn.bias"):
            # A key's bias has no gradient but rounding, which Adam magnifies.
            got, want = np.delete(got, np.s_[16:32]), np.delete(want, np.s_[16:32])
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5, err_msg=name)


def test_nanogpts_settings_become_ours(tmp_path):
    found = nanogpt.read(trained().save(tmp_path))
    assert found.config.model == NANO
    assert found.config.optimizer == OptimizerConfig(
        learning_rate=1e-2, min_lr=1e-3, warmup_steps=2, lr_decay_steps=20, weight_decay=0.2,
        beta1=0.8, beta2=0.9, grad_clip=0.7,
        muon_learning_rate=1e-3,  # as for fine-tuning
    )  # fmt: skip
    # A batch is all micro-batches of a step, an evaluation as many windows as there.
    assert (found.config.batch_size, found.config.max_steps) == (8, 30)
    runtime = RuntimeConfig(gradient_accumulation_steps=2, eval_interval=250, eval_batches=2)
    assert found.runtime == runtime


def test_settings_that_we_refuse_do_not_keep_good_weights_out(tmp_path):
    odd = RATES | {"learning_rate": 3e-5, "min_lr": 6e-5}
    found = nanogpt.read(Nano().save(tmp_path, config=odd), optimizer=False)
    assert "min_lr 6e-05 is above learning_rate 3e-05" in found.notes[0]
    assert found.config == dataclasses.replace(FINETUNE, model=NANO)


def test_the_weights_alone_are_step_0(tmp_path):
    theirs = trained()
    path = theirs.save(tmp_path, optimizer="damaged")
    with pytest.raises(UserError, match="--optimizer False"):
        nanogpt.read(path)
    found = nanogpt.read(path, optimizer=False)
    assert found.step == 0 and found.opt_state is None
    assert_close(logits(found.config.model, found.params, TOKENS), their_logits(theirs.net))


@pytest.mark.parametrize("change", [
    lambda o: o.update(state={}),
    lambda o: o.pop("param_groups"),
    lambda o: o["param_groups"].pop(),
    lambda o: o["state"][0].pop("exp_avg"),
    lambda o: o["state"][0].update(step=torch.tensor(2.0)),
    lambda o: o["state"][0].update(exp_avg=torch.ones(1)),
    lambda o: o["state"][0].update(exp_avg_sq=3),
    lambda o: o["state"][0].update(more=3),
    lambda o: [moment.update(step=torch.tensor(math.inf)) for moment in o["state"].values()],
    lambda o: [moment.update(step=torch.tensor(1e30)) for moment in o["state"].values()],
    lambda o: o["state"][0].update(step=torch.ones(3)),
], ids=["no state", "no groups", "one group", "no moment", "another count", "misshaped",
        "no tensor", "more", "infinite count", "huge count", "many counts"],
)  # fmt: skip
def test_an_optimizer_that_does_not_fit_says_how_to_leave_it(tmp_path, saved, change):
    optimizer = copy.deepcopy(saved["optimizer"])
    change(optimizer)
    torch.save(saved | {"optimizer": optimizer}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="--optimizer False"):
        nanogpt.read(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("place", ["beside", "here", "absolute"])
def test_the_data_set_that_a_ckpt_names_has_its_characters(tmp_path, monkeypatch, place):
    (tmp_path / "out").mkdir()
    data = tmp_path / "data" / "letters"
    data.mkdir(parents=True)
    (data / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(CHARS.characters))}))
    monkeypatch.chdir(tmp_path if place == "here" else tmp_path / "out")
    if place == "here":
        (tmp_path / "out").rename(tmp_path / "data" / "out")
    out = tmp_path / "data" / "out" if place == "here" else tmp_path / "out"
    name = str(data) if place == "absolute" else "letters"
    trained(1, SMALLEST).save(out, config=RATES | {"dataset": name})
    weights, tokenizer = read_pretrained(str(out))
    assert tokenizer.state() == CHARS.state()
    (note,) = weights.notes
    assert "letters/meta.pkl" in note and "trained on letters" in note


@pytest.mark.parametrize("dataset", ["elsewhere", 3, "a\0b", "x" * 5000, ["letters"]])
def test_a_data_set_that_is_not_there_is_not_guessed(tmp_path, dataset):
    trained(1, SMALLEST).save(tmp_path, config=RATES | {"dataset": dataset})
    with pytest.raises(UserError, match="no tokenizer lies in"):
        read_pretrained(str(tmp_path))


@dataclasses.dataclass
class GPTConfig:
    """As build-nanogpt's."""

    block_size: int = 12
    vocab_size: int = 23
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16


def name_it(monkeypatch, name):
    """Pickles call the class above by this name."""
    module, _, short = name.rpartition(".")
    monkeypatch.setitem(sys.modules, module, sys.modules.get(module, types.ModuleType(module)))
    monkeypatch.setattr(sys.modules[module], short, GPTConfig, raising=False)
    monkeypatch.setattr(GPTConfig, "__module__", module)


@pytest.mark.parametrize("name", nanogpt.BUILD_NAMES)
def test_build_nanogpts_checkpoints_are_read_with_a_stand_in(tmp_path, monkeypatch, name):
    net = trained(1, dataclasses.replace(NANO, activation="gelu_tanh")).net
    name_it(monkeypatch, name)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(12, 12).tril()[None, None] for i in (0, 1)}
    saved = {"model": net.state_dict() | masks, "config": GPTConfig(), "step": 7, "val_loss": 3.0}
    torch.save(saved, tmp_path / "model_00007.pt")
    found = nanogpt.read(tmp_path / "model_00007.pt")
    assert_close(logits(found.config.model, found.params, TOKENS), their_logits(net))
    torch.save(saved | {"config": Trap(tmp_path / "trap")}, tmp_path / "model_00007.pt")
    with pytest.raises(UserError, match="mkdir"):
        nanogpt.read(tmp_path / "model_00007.pt")
    assert not (tmp_path / "trap").exists()


ARGS = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 5}


@pytest.mark.parametrize("saved", [
    [], {}, {"model": {}}, {"model_args": ARGS}, {"model": 3, "model_args": ARGS},
    {"model": {}, "model_args": ARGS | {"n_layer": 0, "vocab_size": None}},
    {"model": {}, "model_args": ARGS | {"n_layer": 10**9}},
    {"model": {}, "model_args": ARGS | {"n_layer": torch.ones(1)}},
    {"model": {}, "model_args": ARGS | {(1, 2): 3}},
    {"model": {}, "model_args": ARGS | {"n_unknown": 3}},
], ids=["list", "empty", "no args", "no model", "number for a model", "no vocabulary",
        "a billion layers", "tensor for a size", "tuple for a name", "unknown setting"],
)  # fmt: skip
def test_a_ckpt_that_is_not_nanogpts_is_a_user_error(tmp_path, saved):
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt"):
        nanogpt.read(tmp_path / "ckpt.pt")


class Trap:
    """A pickle of it makes a folder when it is read, unless reading runs nothing."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["ckpt.pt", "meta.pkl"])
def test_code_in_nanogpts_pickles_is_not_run(tmp_path, name):
    trap = Trap(tmp_path / "trap")
    trained().save(tmp_path, **({"extra": trap} if "ckpt" in name else {}))
    if name == "meta.pkl":
        (tmp_path / name).write_bytes(pickle.dumps({"itos": trap}))
    with pytest.raises(UserError, match="mkdir"):
        read_pretrained(str(tmp_path))
    assert not (tmp_path / "trap").exists()


SHARED: list = []
for _ in range(60):
    SHARED = [SHARED, SHARED]  # 2**60 lists to whoever counts them
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they are a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(2)])
VALUES = st.sampled_from([None, "x", 3, "a\nb", 1.5, np.nan, "huge", "shared", [], {}])
TENSOR = st.sampled_from([
    torch.ones(3), torch.ones(()), torch.tensor(np.nan), torch.ones(1).expand(2**40),
    torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.cfloat),
    torch.ones(1, dtype=torch.bfloat16).expand(2**40), NESTED,
])  # fmt: skip


def spelled_out(node):
    """With what hypothesis could not print."""
    if isinstance(node, dict):
        return {key: spelled_out(value) for key, value in node.items()}
    if isinstance(node, list):
        return [*map(spelled_out, node)]
    odd = {"huge": 2**100_000, "shared": SHARED}
    return odd.get(node, node) if isinstance(node, str) else node


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_odd_values_are_read_or_refused_in_one_line(tmp_path, saved, drawn):
    path = tmp_path / "ckpt.pt"
    torch.save(spelled_out(drawn.draw(odd_values(saved, VALUES | TENSOR))), path)
    read_or_refuse(lambda: nanogpt.read(path), path)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_odd_values_of_build_nanogpts_are_read_or_refused_in_one_line(tmp_path, monkeypatch, drawn):
    name_it(monkeypatch, nanogpt.BUILD_NAMES[1])
    config = GPTConfig()
    fields = spelled_out(drawn.draw(odd_values(vars(config), VALUES)))
    config.__dict__ = fields if isinstance(fields, dict) else {"block_size": fields}
    torch.save({"model": {}, "config": config, "step": 7}, tmp_path / "model.pt")
    read_or_refuse(lambda: nanogpt.read(tmp_path / "model.pt"), tmp_path / "model.pt")


EXPORTED = {
    "bias": NANO,
    "no bias, padded": dataclasses.replace(NANO, bias=False, vocab_multiple=64),
    "gpt2": dataclasses.replace(NANO, n_layer=1, n_head=12, n_embd=768, block_size=32),
}


def weights_of(model: ModelConfig) -> Weights:
    """As of a run after 7 steps, with random moments."""
    rates = OptimizerConfig(
        2e-3, 1e-4, 10, lr_decay_steps=50, weight_decay=0.3, beta2=0.9, muon_learning_rate=1e-3
    )
    config = TrainConfig(model, optimizer=rates, batch_size=6, max_steps=60)
    runtime = RuntimeConfig(gradient_accumulation_steps=3, eval_batches=5, log_interval=7)
    mu, nu = random_params(model, 1), jax.tree.map(np.abs, random_params(model, 2))
    state = optim.adam_state(config, np.asarray(7, np.int32), mu, nu)
    return Weights(config, random_params(model), runtime, 7, state, best_val_loss=2.5)


@pytest.mark.parametrize("model", EXPORTED.values(), ids=EXPORTED)
def test_round_trips_are_bitwise_with_the_optimizers_state(tmp_path, model):
    weights = weights_of(model)
    write_pretrained(weights, CHARS, tmp_path / "out", "nanogpt", keep_padding=True)
    again, tokenizer = read_pretrained(str(tmp_path / "out"))
    assert_bitwise(again.params, weights.params)
    assert tokenizer.state() == CHARS.state()
    assert again.step == 7 and not again.notes
    assert jax.tree.structure(again.opt_state) == jax.tree.structure(weights.opt_state)
    for x, y in zip(*map(jax.tree.leaves, (again.opt_state, weights.opt_state)), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)
    for name in ("optimizer", "batch_size", "max_steps"):
        assert getattr(again.config, name) == getattr(weights.config, name)
    assert again.runtime == weights.runtime
    found = again.config.model
    assert found.padded_vocab_size == model.padded_vocab_size
    assert dataclasses.replace(found, vocab_multiple=model.vocab_multiple) == model


def test_torch_loads_an_export_strictly_and_trains_on(tmp_path):
    model = dataclasses.replace(NANO, bias=False, vocab_multiple=32)
    weights = weights_of(model)
    write_pretrained(weights, CHARS, tmp_path / "out", "nanogpt")
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert saved["model_args"] == {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12,
                                   "vocab_size": 23, "bias": False, "dropout": 0.0}  # fmt: skip
    theirs = torch_gpt.TorchGPT(dataclasses.replace(model, vocab_multiple=1))
    theirs.load_state_dict(saved["model"], strict=True)
    assert_close(logits(model, weights.params, TOKENS), their_logits(theirs))

    # nanoGPT's train.py restores the optimizer so, and goes on.
    adamw = torch_gpt.adamw(
        theirs.parameters(), learning_rate=1.0, betas=(0.1, 0.1), weight_decay=0.9
    )
    adamw.load_state_dict(saved["optimizer"])
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]
    assert adamw.param_groups[0]["betas"] == (0.9, 0.9)
    moment = adamw.state[theirs.transformer.h[1].mlp.c_fc.weight]
    expected = random_params(model, 1)["h"]["mlp"]["c_fc"]["kernel"][1]
    assert np.array_equal(moment["exp_avg"], expected.T) and moment["step"] == 7
    theirs(torch.from_numpy(TOKENS).long()).sum().backward()
    adamw.step()

    assert saved["iter_num"] == 7 and saved["best_val_loss"] == 2.5
    expected = {
        "batch_size": 2, "eval_iters": 15, "max_iters": 60, "lr_decay_iters": 50,
        "gradient_accumulation_steps": 3, "dataset": str(tmp_path / "out"),
    }  # fmt: skip
    assert expected.items() <= saved["config"].items()
    meta = pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())
    text = CHARS.characters[::-1]
    assert [meta["stoi"][c] for c in text] == CHARS.encode(text).tolist()
    assert "".join(meta["itos"][i] for i in CHARS.encode(text)) == text
    assert meta["vocab_size"] == 23
