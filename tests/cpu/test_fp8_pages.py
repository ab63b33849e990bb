"""KV pages in fp8: what is stored and read, by every backend, and engines that serve from them."""

import ctypes
import queue
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_same_generations
from golden import tiny
from lane_pool import DTYPES
from paged_case import interpreter

from duetjax.build_device import build_engine
from duetjax.checkpoint.source import resolve_model
from duetjax.config import EngineConfig, SamplingParams
from duetjax.model.kv_pages import KVLayout
from duetjax.policy.request import NewRequest
from duetjax.runtime import host_kernels
from duetjax.runtime.inspection import inspect_program
from duetjax.runtime.memory import plan_memory
from duetjax.runtime.placeholders import mark
from duetjax.runtime.target import absent_gpu
from pallas_kernels import xla, xla_fixed
from pallas_kernels.mosaic import MosaicKernels
from pallas_kernels.pages import FP8, LEAST_SCALE, MOST_FP8, ROOM, ScaledPages
from pallas_kernels.shapes import Tuning

MODEL = "mistral"  # with heads of 16, as the launcher's kernels need
K, S, D, H = 2, 64, 32, 8
LENGTHS, NUM_PAGES = (200, 70, 1), 9
TABLE = np.array([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]], np.int32)
OFFSETS = np.cumsum([0, *LENGTHS]).astype(np.int32)
CACHED = np.zeros(3, np.int32)


def empty():
    return ScaledPages(jnp.zeros((NUM_PAGES, K, 2, S, D), FP8), jnp.zeros((NUM_PAGES, K, 2)))


class OfXla:
    """Pages that are XLA's."""

    def __init__(self, kernels):
        self._write, self._prefill = map(jax.jit, (kernels.write_kv, kernels.prefill_attention))
        self._decode = jax.jit(kernels.decode_attention)
        self.pages = empty()

    def write(self, *tokens):
        self.pages = self._write(self.pages, *tokens)

    def prefill(self, q, *rows):
        return np.asarray(self._prefill(q, self.pages, *rows))

    def decode(self, q, *rows):
        return np.asarray(self._decode(q, self.pages, *rows))

    @property
    def stored(self):
        """Bytes of the values but the dummy page's, and scales."""
        values, scales = (np.asarray(part)[1:] for part in self.pages)
        return values.view(np.uint8), scales


class OfLauncher:
    """Pages of the launcher's, behind a handle."""

    def __init__(self, dtype="float32"):
        host_kernels.register()
        layout = KVLayout(NUM_PAGES, S, K, D, 1, FP8, in_pool=True)
        self.pool = host_kernels.open_pool(layout, dtype)
        self.pages = np.array([self.pool.number, 0], np.int32)
        self._write, self._prefill, self._decode = map(
            jax.jit,
            (
                host_kernels.write_kv,
                host_kernels.prefill_attention,
                host_kernels.decode_attention,
            ),
        )

    write, prefill, decode = OfXla.write, OfXla.prefill, OfXla.decode

    @property
    def values(self):
        """The memory itself, when what was to be written has been."""
        jax.block_until_ready(self.pages)
        memory = (ctypes.c_uint8 * self.pool.num_bytes).from_address(self.pool.address)
        return np.frombuffer(memory, np.uint8).reshape(NUM_PAGES, K, 2, S, D)


needs_launcher = pytest.mark.skipif(
    host_kernels._launcher is None, reason="no C compiler when installed"
)
BACKENDS = [
    pytest.param(lambda: OfXla(xla), id="xla"),
    pytest.param(lambda: OfXla(xla_fixed), id="xla_fixed"),
    pytest.param(OfLauncher, id="launcher", marks=needs_launcher),
]


def tokens(seed=0, size=1.0):
    """Keys and values of all rows, and their places."""
    dice = np.random.default_rng(seed)
    count = sum(LENGTHS)
    k, v = dice.normal(size=(2, count, K, D)).astype(np.float32) * size
    position = np.concatenate([np.arange(length) for length in LENGTHS])
    row = np.repeat(np.arange(3), LENGTHS)
    return k, v, TABLE[row, position // S], (position % S).astype(np.int32)


def queries(seed=1):
    shape = (sum(LENGTHS), H, D)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(q, k, v):
    """Causal attention of all rows in float64."""
    out = np.zeros(q.shape)
    for first, end in pairwise(OFFSETS):
        for at in range(first, end):
            keys, values = (
                np.repeat(x[first : at + 1].astype(np.float64), H // K, 1) for x in (k, v)
            )
            scores = np.einsum("hd,shd->hs", q[at].astype(np.float64), keys) / np.sqrt(D)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out[at] = np.einsum("hs,shd->hd", shares / shares.sum(-1, keepdims=True), values)
    return out


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def read_back(stored, places):
    """Keys and values [N, K, D] as pages have them."""
    values, scales = stored
    page, slot = places[0] - 1, places[1]
    exact = values.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[..., None, None]
    both = exact[page, :, :, slot]
    return both[:, :, 0], both[:, :, 1]


# What is stored.


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0, 1e4])
def test_attention_is_that_of_the_stored_numbers_which_are_near_those_given(size, make):
    backend, (k, v, *places), q = make(), tokens(size=size), queries() / size
    reference = OfXla(xla)
    for each in (backend, reference):
        each.write(k, v, *places)
    stored_k, stored_v = read_back(reference.stored, places)
    found = backend.prefill(q, TABLE, OFFSETS, CACHED)
    assert relative(found, dense(q, stored_k, stored_v)) < 1e-5
    if size >= 1e-2:  # three bits of mantissa: at most one part in 16 off
        for stored, given in ((stored_k, k), (stored_v, v)):
            assert np.abs(stored - given).max() <= np.abs(given).max() / 16
            assert relative(stored, given) < 0.03
        assert relative(found, dense(q, k, v)) < 0.05


@needs_launcher
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6])
def test_all_backends_store_the_same_bytes(size, dtype):
    k, v, *places = tokens(seed=3, size=size)
    k[5, 1, 7], v[6, 0, 0], v[70, 1, 3], k[0, 0, 0] = np.nan, np.inf, -np.inf, np.nan
    v[150] *= 1e4
    v[201], k[64] = 0.0, -0.0
    k, v = (x.astype(DTYPES[dtype]) for x in (k, v))
    one, other, launched = OfXla(xla), OfXla(xla_fixed), OfLauncher(dtype)
    for backend in (one, other, launched):
        backend.write(k, v, *places)
    for mine, theirs in zip(one.stored, other.stored, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(one.stored[0], launched.values[1:])
    assert not np.isnan(one.stored[0].view(ml_dtypes.float8_e4m3fn).astype(np.float32)).any()


@needs_launcher
def test_the_launcher_reads_every_number_that_there_is():
    backend = OfLauncher()
    backend.write(*(np.zeros((1, K, D), np.float32),) * 2, np.array([7], np.int32), CACHED[:1])
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    exact = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for first in range(0, len(codes), D):
        chosen = codes[first : first + D]
        backend.values[7, :, 1, 0, : len(chosen)] = chosen
        out = backend.decode(queries()[:1], TABLE[2:], np.array([1], np.int32))[0, 0]
        np.testing.assert_array_equal(out[: len(chosen)], exact[first:][:D] * LEAST_SCALE)


def test_a_page_holds_what_its_first_token_does_not_foretell():
    """Up to a bound whatever that is, or so many times as much; what is more is cut off."""
    k = v = np.full((4, K, D), 1e-3, np.float32)
    k = k * np.array([1, 1, 20_000, 1e9], np.float32)[:, None, None]
    v = np.array([100, 1600, -1600, 1e9], np.float32)[:, None, None] * np.ones((1, K, D), "f")
    backend, places = OfXla(xla), (np.full(4, 1, np.int32), np.arange(4, dtype=np.int32))
    backend.write(k, v, *places)
    stored_k, stored_v = read_back(backend.stored, places)
    assert LEAST_SCALE * MOST_FP8 == 28
    np.testing.assert_allclose(stored_k[2:, 0, 0], [20, 28])
    np.testing.assert_allclose(stored_v[:, 0, 0], [100, 1600, -1600, 1600])
    assert ROOM == 16


@pytest.mark.parametrize("make", BACKENDS)
def test_a_page_that_was_never_begun_stays_finite(make):
    backend, zeros = make(), np.zeros((1, K, D), np.float32)
    backend.write(zeros, zeros + 2, np.array([7], np.int32), np.array([3], np.int32))
    k, v = (np.ones((1, K, D), np.float32) * size for size in (0.5, 3))
    backend.write(k, v, np.array([7], np.int32), np.array([0], np.int32))
    out = backend.decode(queries()[:1], TABLE[2:], np.array([4], np.int32))
    assert np.isfinite(out).all()


@pytest.mark.parametrize("make", BACKENDS)
def test_how_a_prompt_is_cut_changes_no_bit(make):
    k, v, page, slot = tokens(seed=4)
    whole, cut = make(), make()
    whole.write(k, v, page, slot)
    for start, end in zip((0, 1, 63, 65, 190), (1, 63, 65, 190, len(k)), strict=True):
        some = slice(start, end)
        cut.write(k[some], v[some], page[some], slot[some])
    q = queries()
    wanted, found = (each.prefill(q, TABLE, OFFSETS, CACHED) for each in (whole, cut))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("make", BACKENDS)
def test_a_page_s_next_owner_has_scales_of_its_own(make):
    (k, v, *places), q = tokens(seed=5), queries()
    used, fresh = make(), make()
    used.write(k * 1e3, v * 1e3, *places)
    for each in (used, fresh):
        each.write(k, v, *places)
    found, wanted = (each.prefill(q, TABLE, OFFSETS, CACHED) for each in (used, fresh))
    np.testing.assert_array_equal(found, wanted)


def test_scales_of_keys_in_place_of_values_would_be_noticed():
    (k, v, *places), q = tokens(seed=6), queries()
    backend = OfXla(xla)
    backend.write(k, v * 50, *places)
    wanted = backend.prefill(q, TABLE, OFFSETS, CACHED)
    backend.pages = backend.pages._replace(scales=backend.pages.scales[..., ::-1])
    assert relative(backend.prefill(q, TABLE, OFFSETS, CACHED), wanted) > 0.5


# The kernels' interface, and programs of a GPU.


@pytest.mark.parametrize("size", [1.0, 6e4, 1e6])
def test_mosaics_kernels_read_what_xla_has_written(size):
    kernels = MosaicKernels(Tuning(128, 64, 2, 4), interpreted=True)
    dice = np.random.default_rng(7)
    k, v = jnp.array(dice.normal(size=(2, 100, 1, 64)), "bfloat16") * size
    page, slot = np.arange(100) // 64 + 1, np.arange(100) % 64
    pages = ScaledPages(jnp.zeros((4, 1, 2, 64, 64), FP8), jnp.zeros((4, 1, 2)))
    pages = kernels.write_kv(pages, k, v, page, slot)
    q = jnp.array(dice.normal(size=(3, 4, 64)), "bfloat16") / size
    table = np.array([[1, 2]], np.int32)
    one = q[:1], pages, table, np.array([100], np.int32)
    three = q, pages, table, np.array([0, 3], np.int32), np.array([97], np.int32)
    for method, operands in (("decode_attention", one), ("prefill_attention", three)):
        with interpreter() as has_raced:
            found = jax.block_until_ready(getattr(kernels, method)(*operands))
            assert not has_raced()
        wanted = getattr(xla, method)(operands[0].astype(jnp.float32), *operands[1:])
        assert relative(*(np.asarray(x, np.float64) for x in (found, wanted))) < 6e-3


def test_a_page_has_a_scale_for_each_head_s_keys_and_values():
    layout = KVLayout(256, 64, 8, 128, 2, FP8)
    assert layout.page_bytes == 2 * 8 * 2 * (64 * 128 + 4)


def test_a_copy_of_scales_breaks_a_rule():
    target, layout = absent_gpu("h200-sxm"), KVLayout(256, 64, 8, 128, 1, FP8)

    def program(pages, k, page, slot):
        written = xla_fixed.write_kv(pages, k, k, page, slot)
        return mark([*written, pages.scales])  # those of before, too

    k, place = target.abstract((4, 8, 128), "bfloat16"), target.abstract((4,), jnp.int32)
    with target.context():
        jitted = jax.jit(program, donate_argnums=0)
        lowered = jitted.lower(layout.operand(target.abstract), k, place, place)
    broken = inspect_program(lowered, target, layout).violations
    assert any("copies the scales of a KV array" in each for each in broken), broken


# Engines.


class Engine:
    """Runs requests; the tokens, and the gap to the next likely one at each."""

    def __init__(self, folder, **settings):
        config = EngineConfig(
            **{"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64} | settings
        )
        self.client, self.plan = build_engine(resolve_model(str(folder)), config)
        self._outputs = queue.SimpleQueue()
        self.client.start(self._outputs.put)

    def run(self, *news):
        for new in news:
            self.client.submit(new)
        got, running = {new.id: [] for new in news}, len(news)
        while running:
            for output in self._outputs.get(timeout=120):
                got[output.id] += zip(output.token_ids, output.logprobs, strict=True)
                running -= output.finish is not None
        return got

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.shutdown(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp(MODEL)
    tiny.write_checkpoint(MODEL, made)
    return made


def requests(count, seed=0, **sampling):
    dice = np.random.default_rng(seed)
    vocab = tiny.CONFIGS[MODEL]["vocab_size"]
    beginning = dice.integers(vocab, size=130).tolist()
    return [
        NewRequest(
            f"{index}",
            (*beginning, *dice.integers(vocab, size=1 + index).tolist()),
            24,
            SamplingParams(seed=index, logprobs=2, **{"temperature": 0.0} | sampling),
        )
        for index in range(count)
    ]


def assert_same(one, other):
    ids = [[np.array([token for token, _ in got[name]]) for name in one] for got in (one, other)]
    gaps = [np.array([lp.top[0][1] - lp.top[1][1] for _, lp in one[name]]) for name in one]
    assert_same_generations(*ids, gaps)


@needs_launcher
def test_lanes_and_plain_jax_serve_the_same_tokens_from_pages_in_fp8(folder):
    with Engine(folder, kv_cache_dtype="fp8") as lanes:
        assert lanes.plan.layout.in_pool
        found = lanes.run(*requests(8))
    with Engine(folder, kv_cache_dtype="fp8_e4m3", backend="jax") as plain:
        assert not plain.plan.layout.in_pool
        assert_same(found, plain.run(*requests(8)))


def test_logprobs_are_near_those_of_pages_in_the_model_s_own_dtype(folder):
    with Engine(folder, kv_cache_dtype="fp8") as small, Engine(folder) as large:
        found, wanted = (each.run(*requests(8)) for each in (small, large))
    firsts = [[got[name][0][1].logprob for name in got] for got in (found, wanted)]
    differences = np.abs(np.subtract(*firsts))
    assert 0 < differences.max() < 0.1


@pytest.mark.parametrize("backend", ["auto", "jax"])
def test_deterministic_engines_keep_their_promise_in_fp8(folder, backend):
    settings = {"deterministic": True, "kv_cache_dtype": "fp8", "backend": backend}
    news = requests(6, temperature=0.8)
    with Engine(folder, **settings) as cached:
        alone = {new.id: cached.run(new)[new.id] for new in news}
        again = cached.run(*(replace(new, id=f"{new.id}b") for new in news))
        assert cached.client.stats().prefix_hits > 0
    with Engine(folder, enable_prefix_caching=False, **settings) as computed:
        assert computed.run(*news) == alone
    assert {name.removesuffix("b"): got for name, got in again.items()} == alone


def test_the_same_memory_holds_four_times_as_many_tokens_as_in_float32(folder):
    model, memory = resolve_model(str(folder)).config, 2**20
    pages = []
    for dtype in ("auto", "fp8"):
        engine = EngineConfig(kv_cache_dtype=dtype, max_num_seqs=48)
        layout = plan_memory(model, engine, "float32", memory).layout
        pages.append(layout.num_pages)
        assert layout.num_pages * layout.page_bytes <= memory
    assert 3.9 * pages[0] < pages[1] <= 4 * pages[0] + 4
