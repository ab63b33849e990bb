"""Programs compiled for absent GPUs keep the launcher's rules, and the committed table is true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_table import (
    ALIGNMENT,
    BUCKETS,
    HAS_CUDA_WHEELS,
    PAIRS,
    SAMPLED,
    WHY_NOT,
    Pair,
    broken_rules,
    header,
    key_name,
    read_table,
    text_hash,
    versions,
)
from jax import lax

from duetjax.model.kv_pages import KVLayout
from duetjax.policy.launch import Program
from duetjax.runtime.hlo_text import instructions
from duetjax.runtime.inspection import inspect_program
from duetjax.runtime.placeholders import MARKER, mark
from duetjax.runtime.target import absent_gpu, local_target

pytestmark = pytest.mark.skipif(not HAS_CUDA_WHEELS, reason=WHY_NOT)

LAYOUT = KVLayout(128, 16, 2, 64, 2, "bfloat16")
RENEW = "run `make check-device` and commit the table"
ONE_GPU_EACH = tuple({model: (model, gpu) for model, gpu in reversed(PAIRS)}.values())
"""Lowering knows the model and not the GPU, so that one GPU's programs stand for the others'."""
COMPILED = tuple(names for names in PAIRS if names[0] != "qwen3-14b")
"""Qwen3 14B is Qwen3 8B with other numbers."""


def written(kv, new, place):
    return [pages.at[place, :, :, 0].set(new) for pages in kv]


def toy(body, donated=(0,), target=None):
    """Facts about `body(kv, new [8, 2, 2, 64], place [8], wide [4, 8192])`."""
    target = target or absent_gpu("h200-sxm")
    kv = [target.abstract(LAYOUT.shape, LAYOUT.dtype)] * LAYOUT.num_arrays
    new = target.abstract((8, LAYOUT.num_kv_heads, 2, LAYOUT.head_dim), LAYOUT.dtype)
    place, wide = target.abstract((8,), jnp.int32), target.abstract((4, 8192), jnp.float32)
    with target.context():
        jitted = jax.jit(body, donate_argnums=donated, keep_unused=True)
        lowered = jitted.lower(kv, new, place, wide)
    return inspect_program(lowered, target, LAYOUT)


def assert_caught(facts, sentence):
    assert any(sentence in found for found in facts.violations), facts.violations


def test_a_program_that_keeps_the_rules_is_not_accused():
    def body(kv, new, place, wide):
        return mark([*written(kv, new, place), jnp.sort(jnp.sin(wide[:, :4096]), axis=1)])

    facts = toy(body)
    assert facts.violations == ()
    assert facts.alias_bytes == LAYOUT.num_pages * LAYOUT.page_bytes
    assert facts.thunks[-1] == "kCustomCall"
    assert facts.custom_calls == {MARKER: 1}


def test_a_loop_whose_counter_begins_in_xla_s_own_memory_is_caught():
    def body(kv, new, place, wide):
        small = lax.fori_loop(0, 5, lambda _, x: jnp.sin(x) * 2, wide[:, :4096])
        return mark([*written(kv, new, place), small])

    assert_caught(toy(body), "is a constant in memory of XLA's own")


def test_a_cache_that_is_not_donated_is_caught():
    facts = toy(lambda kv, new, place, _: mark(written(kv, new, place)), donated=())
    assert_caught(facts, "0 bytes are donated, less than the KV cache's 2097152")


def test_a_copy_of_a_kv_array_is_caught():
    def body(kv, new, place, _):
        # Without aliases the marker's results are other buffers than its arguments.
        shapes = [jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in kv]
        return jax.ffi.ffi_call(MARKER, shapes)(*written(kv, new, place))

    assert_caught(toy(body), "copies 1048576 bytes; a KV array has 1048576")


def test_a_donated_cache_that_no_output_can_take_is_caught():
    def body(kv, new, place, _):
        return mark([pages.astype(jnp.float32) for pages in written(kv, new, place)])

    assert_caught(toy(body), "0 bytes are updated in place, but 2097152 are donated")


def test_work_behind_the_marker_is_caught():
    def body(kv, new, place, wide):
        *pages, wide = mark([*written(kv, new, place), wide + 1])
        return [*pages, wide * 2]

    facts = toy(body)
    assert_caught(facts, "is scheduled last, not the marker")
    assert_caught(facts, "the last thunk is a kCustomKernel, not the marker")


def test_a_recomputed_donated_state_is_caught_by_the_copy_behind_the_marker():
    def body(kv, new, place, wide):
        return mark([*written(kv, new, place), jnp.flip(wide, axis=1)])

    assert_caught(toy(body, donated=(0, 3)), "the last thunk is a kCopy, not the marker")


@pytest.mark.parametrize("count", [0, 2])
def test_anything_but_one_marker_is_caught(count):
    def body(kv, new, place, _):
        outputs = written(kv, new, place)
        for _ in range(count):
            outputs = mark(outputs)
        return outputs

    assert_caught(toy(body), f"the program has {count} markers")


def test_a_while_without_a_trip_count_is_caught():
    def body(kv, new, place, wide):
        small = lax.while_loop(lambda x: x.sum() < 100, lambda x: x * x + 1, wide)
        return mark([*written(kv, new, place), small])

    assert_caught(toy(body), "is a while without a known trip count")


def test_a_conditional_is_caught():
    def body(kv, new, place, wide):
        small = lax.cond(place[0] > 3, lambda x: jnp.sort(x[:, :4096]), lambda x: x[:, 4096:], wide)
        return mark([*written(kv, new, place), small])

    assert_caught(toy(body), "is a conditional")


def test_a_wide_sort_is_caught():
    facts = toy(lambda kv, new, place, wide: mark([*written(kv, new, place), jnp.sort(wide)]))
    assert_caught(facts, "sorts 8192 elements, more than 4096")


def test_a_call_to_the_host_is_caught():
    def body(kv, new, place, wide):
        shape = jax.ShapeDtypeStruct(wide.shape, wide.dtype)
        small = jax.pure_callback(np.asarray, shape, wide)
        return [*written(kv, new, place), small]

    assert_caught(toy(body, target=local_target()), "calls back to the host")


def test_programs_on_the_processor_are_held_to_the_rules_without_a_marker():
    facts = toy(lambda kv, new, place, _: written(kv, new, place), target=local_target())
    assert facts.violations == ()
    assert facts.thunks == ()


def test_instructions_are_read_with_tuple_types_and_index_comments():
    text = (
        "%inner (p: f32[2]) -> f32[2] {\n"
        "  ROOT %copy.1 = f32[2]{0} copy(%p)\n"
        "}\n"
        "ENTRY %main () -> pred[7] {\n"
        "  %sort.2 = (bf16[4,6]{1,0}, /*index=1*/s32[4,6]{1,0}) sort(%a, %b), dimensions={1}\n"
        '  ROOT %call = pred[7]{0} custom-call(%c), custom_call_target="there"\n'
        "}\n"
    )
    copy, sort, call = instructions(text)
    assert (copy.opcode, copy.num_bytes, copy.is_entry) == ("copy", 8, False)
    assert (sort.opcode, sort.num_bytes, sort.sort_width) == ("sort", 96, 6)
    assert (call.call_target, call.num_bytes, call.is_entry) == ("there", 7, True)


def test_the_table_has_every_program_and_none_breaks_a_rule():
    rows = read_table()["programs"]
    assert {pair: list(group) for pair, group in rows.items()} == {
        Pair(*names).name: [key_name(key) for key in BUCKETS] for names in PAIRS
    }, RENEW
    broken = {
        f"{pair} {key}": row["broken_rules"]
        for pair, group in rows.items()
        for key, row in group.items()
        if row["broken_rules"]
    }
    assert broken == {}


@pytest.mark.parametrize("names", ONE_GPU_EACH, ids="-".join)
def test_programs_that_the_table_does_not_describe_keep_the_rules(names):
    """Slow where much has changed: the more reason to renew the table."""
    table, pair = read_table(), Pair(*names)
    if table["versions"].get("jax") != jax.__version__:
        return  # another jax writes programs differently; the next test checks some of them
    gpus = [Pair(model, gpu) for model, gpu in PAIRS if model == pair.model]
    for key in BUCKETS:
        lowered = pair.lower(key)
        for on in gpus:
            if table["programs"][on.name][key_name(key)]["sha256"] != text_hash(lowered):
                assert broken_rules(on, key, on.inspect(key, on.lower(key))) == [], on.name


@pytest.mark.parametrize(
    ("pair", "key"),
    [(Pair(*names), SAMPLED) for names in COMPILED] + [(Pair(*PAIRS[0]), (Program.PREFILL, 512))],
    ids=lambda value: value.name if isinstance(value, Pair) else key_name(value),
)
def test_a_serving_program_compiles_to_what_the_table_says(pair, key):
    table = read_table()
    lowered = pair.lower(key)
    facts = pair.inspect(key, lowered)
    assert broken_rules(pair, key, facts) == []
    if table["versions"] == versions():
        assert table["targets"] == header()["targets"], RENEW
        row = table["programs"][pair.name][key_name(key)]
        if row["sha256"] != text_hash(lowered):
            return  # the table is about another program
        found = {
            "entries": len(facts.thunks),
            "alias_bytes": facts.alias_bytes,
            "flops": facts.flops,
        }
        assert found == {name: row[name] for name in found}, RENEW
        assert abs(facts.temp_bytes - row["temp_bytes"]) <= ALIGNMENT, RENEW
