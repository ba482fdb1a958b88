"""What a program costs, loops counted as often as they run."""

import functools

import jax
import jax.numpy as jnp
import pytest

from gptjax import train_step
from gptjax.config import ModelConfig, TrainConfig
from gptjax.devices import memory, roofline
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

N = 64


def program(function, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return roofline.Program(jax.jit(function).lower(*shapes).compile().as_text())


def test_a_matrix_product_is_two_operations_a_pair():
    cost = program(jnp.matmul, (N, 2 * N), (2 * N, 3 * N)).cost()
    assert cost.flops == 2 * N * 2 * N * 3 * N
    assert cost.bytes == 4 * (N * 2 * N + 2 * N * 3 * N + N * 3 * N)


@pytest.mark.parametrize("nested", [False, True])
def test_a_loop_counts_as_often_as_it_runs(nested):
    def layer(x, w):
        if nested:  # 5 products more, each time
            x = jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)
        return x @ w, None

    cost = program(lambda x, ws: jax.lax.scan(layer, x, ws)[0], (N, N), (7, N, N)).cost()
    products = 7 * (6 if nested else 1)
    assert cost.flops == pytest.approx(products * 2 * N**3, rel=0.05)
    # Each reads two matrices and writes one; a little more moves besides.
    assert products * 12 * N**2 <= cost.bytes < 3 * products * 12 * N**2


def test_a_scanned_model_costs_what_the_unrolled_one_does():
    config = TrainConfig(ModelConfig(6, 2, 64, block_size=64, vocab_size=128), batch_size=8)
    unrolled, scanned = (
        roofline.Program(
            memory.compile_step(
                config, RuntimeConfig(compute=ComputeConfig(remat="none", scan_unroll=unroll))
            ).as_text()
        ).cost()
        for unroll in (6, 1)
    )
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.02)
    # 6 operations a parameter and token, and attention: the model's own count.
    expected = config.model.flops_per_token() * config.model.block_size
    assert unrolled.flops == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("strategy", ["pmap", "fsdp"])
def test_what_devices_send_is_known(strategy):
    config = TrainConfig(ModelConfig(2, 2, 64, block_size=32, vocab_size=128), batch_size=8)
    compiled = memory.compile_step(config, RuntimeConfig(strategy=strategy))
    sent = roofline.Program(compiled.as_text()).sent()
    parameters = jax.eval_shape(functools.partial(train_step.init_state, config)).params
    size = 4 * sum(x.size for x in jax.tree.leaves(parameters))
    matrices = 4 * (2 * 12 * 64**2 + (128 + 32) * 64)
    blocks = 4 * 2 * 12 * 64**2
    # Each of 8 devices sends 7/8 of an array; of a sum twice.
    if strategy == "pmap":  # the gradients, and some single numbers; each device's stop signal
        assert sent["all-reduce"] == pytest.approx(2 * 7 / 8 * size, abs=200)
        assert sent["all-gather"] == 7 * 4
    else:  # weights, those of blocks for the backward pass again; gradients; biases and norms
        assert sent["all-gather"] == pytest.approx(7 / 8 * (matrices + blocks), abs=200)
        assert sent["reduce-scatter"] == 7 / 8 * matrices
        assert sent["all-reduce"] == pytest.approx(2 * 7 / 8 * (size - matrices), abs=200)


def test_asynchronous_results_are_counted_once():
    text = """HloModule m, replica_count=4

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %a = (f32[8], f32[32]) all-gather-start(%g), replica_groups={{0,1},{2,3}}, dimensions={0}
  %b = f32[32] all-gather-done(%a)
}

%test (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(12)
}

%one (x: f32[8]) -> f32[8] {
  %c = f32[16] all-gather(%x), frontend_attributes={chain_id="3"}, dimensions={0}
}

%other (x: f32[8]) -> f32[8] {
  %d = f32[16] all-gather(%x), frontend_attributes={chain_id="3"}, dimensions={0}
}

%all-reduce-scatter.1 (x: f32[8]) -> f32[2] {
  %e = f32[8] all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%sum
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%test, body=%body
  %r = (bf16[4,4], f32[2]) all-reduce(%u, %v), channel_id=9, to_apply=%sum
  %f = f32[8] fusion(%x), calls=%one
  %g = f32[8] fusion(%x), calls=%other
  %h = f32[2] fusion(%x), calls=%all-reduce-scatter.1
  %i = f32[8] collective-permute(%x), source_target_pairs={{0,1}}
}
"""
    assert roofline.Program(text).sent() == {
        "all-gather": 12 * 128 / 2 + 64 * 3 / 4,
        "all-reduce": 2 * (32 + 8) * 3 / 4,
        "reduce-scatter": 32 * 3 / 4,
        "collective-permute": 32,
    }


BYTES = {
    # (an entry's instructions, its bytes by hand): arrays of 4096 bytes, slices of 64
    "an operand given twice is read once": (
        "ROOT %r = f32[1024] fusion(%x, %x), kind=kLoop, calls=%sum", 2 * 4096,
    ),
    "an update in place writes the slice": (
        "ROOT %r = f32[1024] fusion(%x, %s, %i), kind=kLoop, calls=%update", 2 * 64 + 4,
    ),
    "a fresh array is written whole": (
        "ROOT %r = f32[1024] fusion(%s, %i), kind=kLoop, calls=%fresh", 4096 + 64 + 4,
    ),
    "what is passed on by a view is read": (
        "ROOT %r = f32[1024] fusion(%x), kind=kLoop, calls=%nested", 2 * 4096,
    ),
    "what starts is read and written once": (
        "%a = (f32[1024], f32[4096]) all-gather-start(%x), dimensions={0}\n"
        "  ROOT %r = f32[4096] all-gather-done(%a)", 5 * 4096,
    ),
    "several arrays at once": (
        "%a = ((f32[1024], f32[16]), (f32[2048], f32[32])) all-gather-start(%x, %s)\n"
        "  ROOT %r = f32[2048] get-tuple-element(%a)", 3 * (4096 + 64),
    ),
    "of a condition the cheapest branch": (
        "ROOT %r = f32[1024] conditional(%i, %x, %x), branch_computations={%exp, %same}", 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_of_memory(name):
    entry, expected = BYTES[name]
    text = f"""HloModule m

%sum (a: f32[1024], b: f32[1024]) -> f32[1024] {{
  %a = f32[1024] parameter(0)
  %b = f32[1024] parameter(1)
  ROOT %c = f32[1024] add(%a, %b)
}}

%update (a: f32[1024], b: f32[16], i: s32[]) -> f32[1024] {{
  %a = f32[1024] parameter(0)
  %b = f32[16] parameter(1)
  %i = s32[] parameter(2)
  ROOT %c = f32[1024] dynamic-update-slice(%a, %b, %i)
}}

%fresh (b: f32[16], i: s32[]) -> f32[1024] {{
  %b = f32[16] parameter(0)
  %i = s32[] parameter(1)
  %z = f32[] constant(0)
  %a = f32[1024] broadcast(%z), dimensions={{}}
  ROOT %c = f32[1024] dynamic-update-slice(%a, %b, %i)
}}

%view (a: f32[1024]) -> f32[1024,1] {{
  %a = f32[1024] parameter(0)
  ROOT %c = f32[1024,1] bitcast(%a)
}}

%nested (a: f32[1024]) -> f32[1024] {{
  %a = f32[1024] parameter(0)
  %b = f32[1024,1] fusion(%a), kind=kLoop, calls=%view
  ROOT %c = f32[1024] reduce(%b)
}}

%exp (a: f32[1024]) -> f32[1024] {{
  %a = f32[1024] parameter(0)
  ROOT %c = f32[1024] exponential(%a)
}}

%same (a: f32[1024]) -> f32[1024] {{
  ROOT %a = f32[1024] parameter(0)
}}

ENTRY %main (x: f32[1024], s: f32[16], i: s32[]) -> f32[1024] {{
  %x = f32[1024] parameter(0)
  %s = f32[16] parameter(1)
  %i = s32[] parameter(2)
  {entry}
}}
"""
    assert sum(size for size, _ in roofline.Program(text).traffic()) == expected


def test_arrays_count_as_they_lie_in_a_tpus_memory():
    """In tiles of 8 x 128; what lies in its fast memory costs nothing."""
    text = """HloModule m

ENTRY %main (x: bf16[12,64]) -> bf16[12,64] {
  %x = bf16[12,64]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[12,64]{0,1:T(8,128)(2,1)S(1)} copy(%x)
  ROOT %z = bf16[12,64]{0,1:T(8,128)(2,1)} copy(%y)
}
"""
    # 16 rows of 128; 64 rows of 128
    assert sum(size for size, _ in roofline.Program(text).traffic()) == 2 * (16 * 128 + 64 * 128)
