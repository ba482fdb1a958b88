"""Frozen parameters stay bit for bit, rates differ by layer, and adapters are what LoRA's paper
says."""

import dataclasses
import functools

import jax
import numpy as np
import numpy_gpt
import pytest
import tiny_runs
from flax.traverse_util import flatten_dict
from helpers import assert_same_run, largest_gap, logged
from small_models import random_params
from tiny_runs import Recorder

import gptjax
from gptjax import finetune, head, model, optim, train_step
from gptjax.config import ModelConfig, OptimizerConfig, TrainConfig
from gptjax.devices import memory
from gptjax.devices.strategy import get_strategy
from gptjax.errors import UserError
from gptjax.interop import convert
from gptjax.runtime_config import RuntimeConfig

MODEL = ModelConfig(2, 2, 16, 8, vocab_size=11, tied_head=False)
CONFIG = TrainConfig(
    MODEL, optimizer=OptimizerConfig(1e-2, 1e-2, 0, weight_decay=0.5), batch_size=8, max_steps=9
)
LORA = dataclasses.replace(MODEL, lora_rank=2, lora_alpha=3.0, lora_targets=("attn", "c_fc"))
WINDOWS = np.random.default_rng(0).integers(0, 11, (8, 9))


def by_layer(config: TrainConfig) -> dict[str, float]:
    """Each parameter's factor, by name."""
    params = jax.eval_shape(functools.partial(model.init, config.model), jax.random.key(0))
    found = flatten_dict(finetune.factors(config, params))
    out = {}
    for path, x in flatten_dict(params).items():
        names = finetune.names(path, x)
        values = np.broadcast_to(np.ravel(found[path]), len(names)).tolist()
        out |= dict(zip(names, values, strict=True))
    return out


def start_of(config: TrainConfig) -> train_step.TrainState:
    shapes = jax.eval_shape(lambda: train_step.init_state(config))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return zeros._replace(params=random_params(config.model))


def three_steps(config: TrainConfig, pieces: int = 1):
    """(the parameters before, and by name and layer; the state after three steps)."""
    state = start = start_of(config)
    step = jax.jit(functools.partial(train_step.train_step, config=config))
    batch = train_step.whole_batch(WINDOWS.reshape(pieces, -1, 9))
    for _ in range(3):
        state, _ = step(state, batch)
    return start.params, state


def moved(before, after) -> set[str]:
    """The names of what is not bitwise the same."""
    out, now = set(), flatten_dict(after)
    for path, x in flatten_dict(before).items():
        pairs = zip(x, now[path], strict=True) if path[0] == "h" else [(x, now[path])]
        same = [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs]
        out |= {name for name, kept in zip(finetune.names(path, x), same, strict=True) if not kept}
    return out


# ----------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("wte", "wte", True),
        ("h.1", "h.1.attn.c_attn.kernel", True),
        ("h.1", "h.11.attn.c_attn.kernel", False),
        ("h.1.attn", "h.1.attn.c_proj.bias", True),
        ("h.*.mlp.c_fc.kernel", "h.7.mlp.c_fc.kernel", True),
        ("h.*.mlp.c_fc.kernel", "h.7.mlp.c_fc.bias", False),
        ("h.[0-3]", "h.3.ln_1.scale", True),
        ("h.[0-3]", "h.4.ln_1.scale", False),
        ("*.bias", "ln_f.bias", True),
        ("attn", "h.0.attn.c_attn.kernel", False),
    ],
)
def test_a_pattern_is_that_of_a_name_or_of_its_beginning(pattern, name, expected):
    assert finetune.matches(pattern, name) == expected


@pytest.mark.parametrize(
    ("kind", "pieces"), [("adamw", 2), pytest.param("muon", 1, marks=pytest.mark.slow)]
)
def test_what_is_frozen_stays_bit_for_bit(kind, pieces):
    """Whole arrays, and layers of arrays whose other layers learn; weight decay included."""
    rates = dataclasses.replace(CONFIG.optimizer, kind=kind)
    frozen = ("wte", "h.0", "h.*.mlp.c_fc", "ln_f.bias")
    config = dataclasses.replace(CONFIG, optimizer=rates, freeze=frozen)
    before, state = three_steps(config, pieces)
    learned = {n for n in by_layer(config) if not any(finetune.matches(p, n) for p in frozen)}
    assert "h.1.mlp.c_proj.kernel" in learned and "wpe" in learned
    assert moved(before, state.params) == learned
    held = {path[-1].key for path, _ in jax.tree.leaves_with_path(state.opt_state)
            if hasattr(path[-1], "key")}  # fmt: skip
    assert "wpe" in held and "wte" not in held


def test_the_gradient_of_what_is_frozen_counts_for_nothing():
    """The others' are those of the whole model."""
    config = dataclasses.replace(CONFIG, freeze=("wte", "h.1"))
    state = start_of(config)
    batch = train_step.whole_batch(WINDOWS[None])
    found = jax.jit(functools.partial(train_step.gradients, config=config))(state, batch)[1]
    whole = jax.jit(functools.partial(train_step.gradients, config=CONFIG))(state, batch)[1]
    expected = {path: np.array(x) for path, x in flatten_dict(whole).items() if path != ("wte",)}
    for path, x in expected.items():
        if path[0] == "h":
            x[1] = 0
    assert flatten_dict(found).keys() == expected.keys()
    for path, x in flatten_dict(found).items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-5, atol=1e-7)


def test_a_frozen_head_gets_no_gradient(monkeypatch):
    """Nor is one computed, where the loss comes in chunks: the product is left out of the loop."""
    monkeypatch.setattr(head, "LOGITS", 8 * 11 * 4)

    def products(freeze):
        config = dataclasses.replace(CONFIG, freeze=freeze)
        step = functools.partial(train_step.gradients, config=config)
        state = jax.eval_shape(lambda: train_step.init_state(config))
        return str(jax.make_jaxpr(step)(state, train_step.whole_batch(WINDOWS[None]))).count("dot_")

    assert products(("lm_head",)) == products(()) - 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze": ("h.0", "h.3")}, r"no parameter is called 'h\.3'; there are lm_head, ln_f,"
         r" wpe, wte, and in each of 2 layers, such as h\.0: attn\.c_attn\.bias, attn"),
        ({"freeze": ("h.0", "*")}, "all parameters would be frozen"),
        ({"model.lora_rank": 2, "optimizer.kind": "muon"}, "muon is for kernels"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        finetune.check(CONFIG.replace(changes))


# ------------------------------------------------------------------------------------ rates


def test_rates_fall_from_layer_to_layer():
    rates = dataclasses.replace(CONFIG.optimizer, layer_decay=0.5)
    config = dataclasses.replace(CONFIG, optimizer=rates)
    found = by_layer(config)
    expected = {"wte": 1 / 4, "wpe": 1 / 4, "h.0": 1 / 2, "h.1": 1, "ln_f": 1, "lm_head": 1}
    for name, factor in found.items():
        (top,) = [top for top in expected if finetune.matches(top, name)]
        assert factor == expected[top], name
    # They are those of the updates, decay included.
    params, grads = random_params(MODEL), random_params(MODEL, seed=1)
    steps = {}
    for each in (CONFIG, config):
        transform, state = optim.optimizer(each, 1e-2), start_of(each).opt_state
        steps[each] = jax.jit(transform.update)(grads, state, params)[0]
    for path, x in flatten_dict(steps[CONFIG]).items():
        names = finetune.names(path, x)
        factors = np.reshape([found[n] for n in names], (-1, *[1] * (x.ndim - 1)))
        ours = np.asarray(flatten_dict(steps[config])[path])
        np.testing.assert_allclose(ours, (factors * x).reshape(x.shape), rtol=1e-6)


# ------------------------------------------------------------------------------------- LoRA


def merged_by_hand(params) -> dict:
    """LoRA's formula in numpy: W + A B alpha / rank."""
    out = flatten_dict(params)
    for path in [path[:-1] for path in out if path[-1] == "lora_a"]:
        a, b = out.pop((*path, "lora_a")), out.pop((*path, "lora_b"))
        product = [x.astype("f8") @ y * (3 / 2) for x, y in zip(a, b, strict=True)]
        out[*path, "kernel"] = out[*path, "kernel"] + np.array(product)
    return finetune.unflatten_dict(out)


def test_adapters_are_added_to_what_their_kernels_compute():
    params = random_params(LORA)
    whole = merged_by_hand(params)
    assert {path[1:3] for path in flatten_dict(params) if path[-1] == "lora_a"} == {
        ("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"),
    }  # fmt: skip
    expected = numpy_gpt.logits(MODEL, whole, WINDOWS[:, :8])
    ours = jax.jit(model.apply, static_argnums=0)(LORA, params, WINDOWS[:, :8])[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    plain, merged = finetune.merge(LORA, jax.tree.map(jax.numpy.asarray, params))
    assert plain == MODEL
    for path, x in flatten_dict(merged).items():
        np.testing.assert_allclose(x, flatten_dict(whole)[path], rtol=1e-5, atol=1e-6)


def test_adapters_gradients_follow_from_their_kernels():
    """By the chain rule: that of A is s G B', of B s A' G, with G that of the merged kernel."""
    params = random_params(LORA)
    config = dataclasses.replace(CONFIG, model=LORA)
    _, found = jax.jit(functools.partial(train_step.loss_and_gradient, config=config))(
        params, WINDOWS
    )
    whole = jax.tree.map(np.float32, merged_by_hand(params))
    _, of_whole = jax.jit(functools.partial(train_step.loss_and_gradient, config=CONFIG))(
        whole, WINDOWS
    )
    flat, found = flatten_dict(params), flatten_dict(found)
    assert {path[-1] for path in found} == {"lora_a", "lora_b"}
    for path, x in found.items():
        gradient = flatten_dict(of_whole)[*path[:-1], "kernel"]
        a, b = flat[*path[:-1], "lora_a"], flat[*path[:-1], "lora_b"]
        expected = gradient @ b.mT if path[-1] == "lora_a" else a.mT @ gradient
        np.testing.assert_allclose(x, 1.5 * expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_adapters_loss_and_gradients_are_pefts():
    """Beside transformers' GPT-2 with the adapters of the package peft."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    peft = pytest.importorskip("peft", reason="needs peft")
    from gptjax.parity.reference import Reference

    params = random_params(LORA)
    base = finetune.like(random_params(MODEL), params)
    reference = Reference(base, MODEL, "hf", "float32")
    targets = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["c_attn", "attn.c_proj", "c_fc"], fan_in_fan_out=True
    )
    reference.model = peft.get_peft_model(reference.model, targets)
    theirs = reference.parameters()
    assert sum(x.numel() for x in theirs.values()) == LORA.num_adapter_parameters()
    ours = {}
    for path, x in flatten_dict(finetune.only_adapters(params)).items():
        for name, layer in zip(finetune.names(path, x), x, strict=True):
            own, _, letter = name.rpartition(".lora_")
            full = f"base_model.model.transformer.{own}.lora_{letter.upper()}.default.weight"
            theirs[full].data = torch.from_numpy(layer.T.copy())
            ours[full] = path, int(own.split(".")[1])
    expected = reference.backward(WINDOWS)
    function = functools.partial(
        train_step.loss_and_gradient, config=dataclasses.replace(CONFIG, model=LORA)
    )
    loss, gradient = jax.jit(function)(params, WINDOWS)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for full, (path, layer) in ours.items():
        expected = theirs[full].grad.numpy().T
        found = np.asarray(flatten_dict(gradient)[path][layer])
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected), full


def test_adapters_begin_as_pefts_and_change_nothing():
    wide = ModelConfig(2, 2, 64, 8, vocab_size=11, lora_rank=16)
    params = jax.jit(model.init, static_argnums=0)(wide, jax.random.key(0))
    a, b = (params["h"]["attn"]["c_attn"][name] for name in finetune.ADAPTERS)
    assert a.shape == (2, 64, 16) and b.shape == (2, 16, 192) and not b.any()
    # Kaiming's uniform distribution with a = sqrt(5): up to 1 / sqrt(64).
    assert 0.12 < abs(a).max() <= 0.125 and a.std() == pytest.approx(0.125 / 3**0.5, rel=0.05)
    assert not np.array_equal(a[0], a[1])


def test_numbers_that_are_trained_are_counted():
    """GPT-2 124M: rank 8 of c_attn alone has 12 x 8 x (768 + 2304)."""
    gpt2 = gptjax.PRESETS["gpt2"]
    config = TrainConfig(gpt2.replace(lora_rank=8))
    assert finetune.describe(config) == "294,912 of 124,734,720"
    for each in (config.model, gpt2.replace(lora_rank=4, lora_targets=("mlp", "c_proj"))):
        shapes = jax.eval_shape(functools.partial(model.init, each), jax.random.key(0))
        assert each.num_parameters() == sum(x.size for x in jax.tree.leaves(shapes))
        assert each.num_parameters() - each.num_adapter_parameters() == gpt2.num_parameters()
    frozen = TrainConfig(MODEL, freeze=("h.0", "wte", "lm_head", "ln_f"))
    assert finetune.num_trained(frozen) == 12 * 16 * 16 + 13 * 16 + 8 * 16
    kinds = memory.by_kind(dataclasses.replace(CONFIG, model=LORA), RuntimeConfig(),
                           jax.devices()[:1])  # fmt: skip
    assert kinds["parameters"] == 4 * LORA.num_parameters()
    assert kinds["optimizer"] == 8 * LORA.num_adapter_parameters() + 4


# Without a bias of keys, whose gradient is nothing but rounding.
PARTLY = {"model": MODEL.replace(qkv_bias=False), "freeze": ("wte", "h.1", "*.ln_2")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("fsdp", {"model": LORA}), ("pmap", {"model": LORA}), ("fsdp", PARTLY), ("shard_map", PARTLY)],
)
def test_many_devices_train_the_same_parts_as_one(kind, changes):
    config = dataclasses.replace(CONFIG, **changes)
    strategy, start = get_strategy(kind), start_of(config)
    step = strategy.map_train_step(functools.partial(train_step.train_step, config=config))
    state = strategy.to_devices(
        strategy.initialise(lambda tree: jax.tree.map(jax.numpy.copy, tree), start)
    )
    for _ in range(3):
        state, _ = step(state, WINDOWS)
    before, alone = three_steps(config)
    ours = jax.tree.map(np.asarray, strategy.for_saving(state))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
    assert moved(before, ours.params) == moved(before, alone.params)


@pytest.fixture(scope="module")
def adapted(tiny, train_tiny, tmp_path_factory):
    """(the settings of a fine-tuned run, its folder, what it told)."""
    config = dataclasses.replace(
        tiny.config, model=tiny_runs.MODEL.replace(lora_rank=2), init_from=str(tiny.run_dir)
    )
    run_dir = tmp_path_factory.mktemp("adapted") / "run"
    return config, run_dir, train_tiny(config, run_dir)


def test_a_loaded_run_has_its_adapters_in_the_kernels(tiny, adapted):
    _, run_dir, recorder = adapted
    assert recorder.rows[0]["val_loss"] == pytest.approx(tiny.recorder.rows[-1]["val_loss"])
    assert recorder.rows[-1]["val_loss"] < recorder.rows[0]["val_loss"]
    run, trainer = gptjax.load(run_dir, "latest"), recorder.trainer
    assert run.config == tiny.run.config and run.experiment.model.lora_rank == 2
    params = trainer.strategy.for_sampling(trainer.state.params)
    assert moved(tiny.run.params, finetune.like(tiny.run.params, params)) == set()
    assert moved(tiny.run.params, run.params) == {"h.0.attn.c_attn.kernel"}
    tokens = np.arange(16)[None] % 11
    unmerged = model.apply(trainer.config.model, params, tokens)[0]
    np.testing.assert_allclose(run.logits(tokens), unmerged, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_of_adapters_equals_the_uninterrupted_one(adapted, train_tiny, tmp_path):
    config, whole, _ = adapted
    train_tiny(config, tmp_path / "run", Recorder(stop_after=5))
    train_tiny(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole, 12)
    with pytest.raises(UserError, match=r"model\.lora_rank: 2 in the run, 4 now"):
        train_tiny(config.replace({"model.lora_rank": 4}), tmp_path / "run")


@pytest.mark.slow
def test_other_devices_go_on_with_adapters_and_other_runs_begin_with_them(
    adapted, train_tiny, tmp_path
):
    config, whole, _ = adapted
    train_tiny(config, tmp_path / "run", Recorder(stop_after=5), strategy="fsdp")
    train_tiny(config, tmp_path / "run")
    assert largest_gap(tmp_path / "run", whole) < 1e-4
    shared, alone = gptjax.load(whole, sharded=True), gptjax.load(whole)
    kernel = [run.params["h"]["attn"]["c_attn"]["kernel"] for run in (shared, alone)]
    assert len(kernel[0].sharding.device_set) == 8 and np.allclose(*kernel, atol=1e-6)
    again = config.replace({"init_from": str(whole), "model.lora_rank": 0, "max_steps": 2})
    recorder = train_tiny(again, tmp_path / "next")
    best = min(row["val_loss"] for row in logged(whole) if row.get("val_loss"))
    assert recorder.rows[0]["val_loss"] == pytest.approx(best, rel=1e-5)


def test_adapters_take_weights_to_adapt(tiny, train_tiny, tmp_path):
    config = tiny.config.replace({"model.lora_rank": 2})
    with pytest.raises(UserError, match=r"LoRA .* name their run with --init-from"):
        train_tiny(config, tmp_path / "run")


@pytest.mark.slow
def test_an_exported_run_of_adapters_is_transformers(tiny, adapted, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    run_dir = adapted[1]
    convert.export_model(run_dir, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = np.arange(16)[None] % 11
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(gptjax.load(run_dir).logits(tokens), expected, rtol=1e-4, atol=1e-4)
    size = tiny.run.config.num_parameters()
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "--model.lora-rank 2" in card and f"of {size:,} parameters" in card
