"""The store of compiled programs: what it gives back, what it refuses, what bad disks do to it.

Real files and XLA's CPU programs, small ones in the serving programs' form: flat leaves, donated
KV.
"""

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import platform
import random
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duetjax.runtime import compilations, store
from duetjax.runtime.store import (
    ProgramFacts,
    ProgramStore,
    StoredProgram,
    default_folder,
    facts_of,
    host_target,
)

FLIPS = 2000
OPTIONS = {"xla_cpu_enable_fast_math": False}
FACTS = ProgramFacts(1.5, 100, 50, 30, 20, flops=7.0, bytes_accessed=None)
OTHER_KEY = "0" * 64


def body(weights, kv, tokens):
    """A while loop, a sort, top-k and random numbers: what the serving programs are made of."""

    def step(state):
        index, x = state
        return index + 1, jnp.tanh(x @ weights[1])

    _, x = jax.lax.while_loop(lambda s: s[0] < tokens.shape[0], step, (0, weights[0]))
    values, ids = jax.lax.top_k(x, 4)
    noise = jax.random.uniform(jax.random.wrap_key_data(jnp.array([1, 2], jnp.uint32)), (8,))
    return [k.at[tokens].add(values) for k in kv], jnp.sort(ids[0]) + jnp.argmax(noise)


def lower(function=body, width=8, **options):
    float32 = jnp.float32
    weights = [jax.ShapeDtypeStruct((width, width), float32)] * 2
    kv = [jax.ShapeDtypeStruct((16, 4), float32)] * 2
    tokens = jax.ShapeDtypeStruct((width,), jnp.int32)
    options = {"donate_argnums": 1, "keep_unused": True} | options
    return jax.jit(function, **options).lower(weights, kv, tokens)


def arguments():
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((8, 8), np.float32) for _ in range(2)]
    return weights, [jnp.asarray(np.ones((16, 4), np.float32)) for _ in range(2)], np.arange(8)


def call(executable):
    """(outputs as numpy, whether the KV came back in the memory that it was given in)."""
    weights, kv, tokens = arguments()
    given = [array.unsafe_buffer_pointer() for array in kv]
    kv_out, ids = executable(weights, kv, tokens.astype(np.int32))
    in_place = given == [array.unsafe_buffer_pointer() for array in kv_out]
    assert all(array.is_deleted() for array in kv)
    return [np.asarray(x) for x in (*kv_out, ids)], in_place


def key_of(lowered, options=OPTIONS, target="cpu", **more):
    return ProgramStore.key(lowered, options, target, **more)


@pytest.fixture(scope="module")
def compiled():
    """Never called: a CPU program that sorts can be serialised only before its first call."""
    return lower().compile(OPTIONS)


@pytest.fixture(scope="module")
def expected():
    """What the program computes, by another compilation of it."""
    outputs, in_place = call(lower().compile())
    assert in_place
    return outputs


@pytest.fixture(scope="module")
def key():
    return key_of(lower())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "programs"


@pytest.fixture
def programs(folder, key, compiled):
    """A store with one entry."""
    programs = ProgramStore(folder)
    programs.save(key, compiled, FACTS, tuned=True)
    return programs


@pytest.fixture
def entry(programs, folder, key):
    return folder / f"{key}.program"


@pytest.fixture
def no_loading(monkeypatch):
    """Native code must not be reached."""

    def reached(*_):
        raise AssertionError("a bad entry was deserialised")

    monkeypatch.setattr(store, "_deserialise", reached)
    monkeypatch.setattr(pickle, "loads", reached)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def refused(programs, key, caplog, reason=""):
    """Whether a load gives nothing and says so once, naming the file and the reason."""
    caplog.clear()
    missed = programs.load(key) is None
    said = warnings_of(caplog)
    assert not any("was deserialised" in message for message in said)
    return (
        missed
        and len(said) == 1
        and f"{key}.program" in said[0]
        and reason in said[0]
        and "\n" not in said[0]
    )


def sealed(header, payload):
    """An entry with a right digest, as someone would write it who knows the format."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    rest = len(text).to_bytes(8, "little") + text + payload
    return hashlib.sha256(rest).digest() + rest


def opened(data):
    length = int.from_bytes(data[32:40], "little")
    return json.loads(data[40 : 40 + length]), data[40 + length :]


# Round trip


def test_a_loaded_program_computes_the_same_in_place_and_compiles_nothing(programs, key, expected):
    compilations.install()
    before = compilations.count()
    found = programs.load(key)
    outputs, in_place = call(found.executable)
    assert compilations.count() == before
    assert in_place
    for output, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(output, wanted)


def test_facts_and_tuning_come_back_as_saved(programs, key, compiled):
    assert programs.load(key).facts == FACTS
    assert programs.load(key).tuned
    programs.save(key, compiled, replace(FACTS, flops=None), tuned=False)
    assert programs.load(key).facts == replace(FACTS, flops=None)
    assert not programs.load(key).tuned


def test_another_process_loads_the_program_and_compiles_nothing(entry, folder, key, tmp_path):
    out = in_process(
        f"""
        from duetjax.runtime import compilations
        compilations.install()
        found = ProgramStore(Path({str(folder)!r})).load({key!r})
        weights, kv, tokens = np.eye(8, dtype=np.float32), np.ones((16, 4), np.float32), range(8)
        kv = [jax.device_put(kv), jax.device_put(kv)]
        kv, ids = found.executable([weights, weights], kv, np.array(tokens, np.int32))
        print(compilations.count(), ids.shape)
        """
    )
    assert out.split("\n")[-1] == "0 (4,)"


def test_facts_of_a_program_are_what_xla_says(compiled):
    facts, memory = facts_of(compiled, 2.5), compiled.memory_analysis()
    assert facts.compile_seconds == 2.5
    assert facts.argument_bytes == memory.argument_size_in_bytes == 2 * 256 + 2 * 256 + 32
    assert facts.alias_bytes == 2 * 256
    assert facts.output_bytes == memory.output_size_in_bytes
    assert facts.temp_bytes == memory.temp_size_in_bytes > 0
    assert facts.flops > 0
    assert facts.bytes_accessed > 0


def test_facts_of_a_silent_backend_are_zero_bytes_and_no_estimate():
    class Silent:
        def memory_analysis(self):
            return None

        cost_analysis = memory_analysis

    assert facts_of(Silent(), 1.0) == ProgramFacts(1.0, 0, 0, 0, 0, None, None)


def test_a_program_of_the_second_device_of_two_is_loaded_on_it(tmp_path):
    """JAX would load for all devices of the process, and such a program fails when called."""
    script = f"""
        device = jax.devices()[1]
        x = jax.ShapeDtypeStruct((4,), np.float32,
                                 sharding=jax.sharding.SingleDeviceSharding(device))
        lowered = jax.jit(lambda x: x + 1).lower(x)
        store = ProgramStore(Path({str(tmp_path)!r}))
        key = store.key(lowered, {{}}, "cpu")
        compiled = lowered.compile()
        store.save(key, compiled, facts_of(compiled, 1.0), tuned=True)
        out = store.load(key).executable(jax.device_put(np.ones(4, np.float32), device))
        print(out, out.devices() == {{device}})
        """
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    assert in_process(script, **two).endswith("[2. 2. 2. 2.] True")


def test_a_store_without_a_folder_keeps_nothing(key, compiled, caplog):
    nothing = ProgramStore(None)
    nothing.save(key, compiled, FACTS, tuned=True)
    assert nothing.load(key) is None
    assert not warnings_of(caplog)


def test_a_program_never_stored_is_missed_without_a_word(programs, caplog):
    assert programs.load(OTHER_KEY) is None
    assert not warnings_of(caplog)


def test_only_the_owner_can_write_the_folder_and_read_an_entry(entry, folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


# Keys


def in_process(script, **environment):
    head = """
        from pathlib import Path
        import jax, numpy as np
        from duetjax.runtime.store import ProgramStore, facts_of, host_target
        """
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    text = here + textwrap.dedent(head) + textwrap.dedent(script)
    run = subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_key_of_a_program_is_the_same_in_another_process(key):
    script = "import test_store; print(test_store.key_of(test_store.lower()))"
    assert in_process(script, PYTHONHASHSEED="7") == key


def scaled(factor):
    def function(weights, kv, tokens):
        kv, ids = body(weights, kv, tokens)
        return kv, ids * factor

    return function


def test_the_key_names_the_code_shapes_and_constants(key):
    others = {key_of(lower(width=16)), key_of(lower(scaled(2))), key_of(lower(scaled(3)))}
    assert len(others | {key}) == 4
    assert key_of(lower(scaled(2))) in others


def test_the_key_names_every_value_of_a_large_constant():
    first, second = np.zeros(100_000, np.float32), np.zeros(100_000, np.float32)
    second[50_000] = 1.0
    keys = set()
    for constant in (first, second):
        x = jax.ShapeDtypeStruct((100_000,), np.float32)
        keys.add(key_of(jax.jit(lambda x, constant=constant: x + constant).lower(x)))
    assert len(keys) == 2


def test_the_key_names_donation(key):
    assert key_of(lower(donate_argnums=())) != key


def test_the_key_names_the_trees_of_arguments_and_results():
    x = jax.ShapeDtypeStruct((3,), np.float32)
    as_list = jax.jit(lambda xs: [xs[0] + xs[1]]).lower([x, x])
    as_tuple = jax.jit(lambda xs: [xs[0] + xs[1]]).lower((x, x))
    bare = jax.jit(lambda xs: xs[0] + xs[1]).lower([x, x])
    assert len({key_of(lowered) for lowered in (as_list, as_tuple, bare)}) == 3


def test_the_key_names_what_a_call_checks_of_arguments_and_the_text_does_not_say():
    strong = jax.jit(lambda x: -x).lower(jax.ShapeDtypeStruct((3,), np.float32))
    weak = jax.jit(lambda x: -x).lower(jax.ShapeDtypeStruct((3,), np.float32, weak_type=True))
    assert strong.as_text() == weak.as_text()
    assert key_of(strong) != key_of(weak)


def test_a_program_that_drops_arguments_is_told_to_keep_them():
    x = jax.ShapeDtypeStruct((3,), np.float32)
    first = jax.jit(lambda a, b: a + 1).lower(x, x)
    second = jax.jit(lambda a, b: b + 1).lower(x, x)
    assert first.as_text() == second.as_text()
    with pytest.raises(ValueError, match=r"1 parameters for 2 arguments .* keep_unused=True"):
        key_of(first)


def test_the_key_names_options_target_and_autotune_results(key):
    program = lower()
    assert key_of(program, dict(OPTIONS)) == key
    others = {
        key_of(program, {}),
        key_of(program, OPTIONS | {"xla_cpu_enable_fast_math": True}),
        key_of(program, OPTIONS | {"xla_cpu_enable_fast_math": "false"}),
        key_of(program, target="cpu other"),
        key_of(program, target="NVIDIA H200"),
        key_of(program, autotune=b"results"),
    }
    assert len(others | {key}) == 7


def test_the_order_of_options_does_not_change_the_key():
    program, pairs = lower(), [("a", 1), ("b", "2"), ("c", True)]
    assert key_of(program, dict(pairs)) == key_of(program, dict(reversed(pairs)))


@pytest.mark.parametrize("package", ["jax", "jaxlib"])
def test_the_key_names_versions(package, key, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "99.0" if name == package else real(name)
    )
    assert key_of(lower()) != key


def test_the_key_names_the_format(key, monkeypatch):
    monkeypatch.setattr(store, "_FORMAT", "99.0")
    assert key_of(lower()) != key


def test_the_key_of_a_gpu_program_names_the_versions_of_cuda_packages(key, monkeypatch):
    program = lower()
    gpu_key = key_of(program, target="NVIDIA H200")
    monkeypatch.setattr(store, "_cuda_versions", lambda: {"jax-cuda13-plugin": "99.0"})
    assert key_of(program) == key
    assert key_of(program, target="NVIDIA H200") != gpu_key


@pytest.mark.parametrize("name", ["XLA_FLAGS", "NPROC", "TRITON_DEFAULT_FP_FUSION"])
def test_the_key_names_the_environment_of_the_compiler(name, key, monkeypatch):
    program = lower()
    monkeypatch.setenv(name, "--xla_cpu_enable_fast_math=true")
    assert key_of(program) != key


def test_the_key_names_what_a_file_of_flags_holds(tmp_path, monkeypatch):
    program, file = lower(), tmp_path / "flags"
    monkeypatch.setenv("XLA_FLAGS", str(file))
    keys = set()
    for flags in ("--xla_a=1", "--xla_a=2"):
        file.write_text(flags)
        keys.add(key_of(program))
    assert len(keys) == 2


@pytest.mark.parametrize("name", store._JAX_OPTIONS)
def test_every_jax_setting_in_the_key_is_one_that_jax_has(name):
    assert name in jax.config.values


def test_the_key_names_jax_settings_that_reach_the_compiler(key):
    program = lower()
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert key_of(program) != key
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def test_a_program_for_a_processor_has_another_key_on_another_machine(key, monkeypatch):
    program = lower()
    gpu_key = key_of(program, target="NVIDIA H200")
    monkeypatch.setattr(store, "host_target", lambda: "cpu of another make")
    assert key_of(program) != key
    assert key_of(program, target="NVIDIA H200") == gpu_key


def host_with(cpuinfo, monkeypatch):
    def read_text(path, **_):
        assert path == Path("/proc/cpuinfo")
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        return host_target.__wrapped__()


INTEL = "model name\t: Xeon\ncpu MHz\t\t: 2500.1\nflags\t\t: sse avx2\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd0c\n"


def test_the_host_is_told_by_its_features_and_not_by_its_clock(monkeypatch):
    intel = host_with(INTEL, monkeypatch)
    assert host_with(INTEL.replace("2500", "1800"), monkeypatch) == intel
    assert host_with(INTEL + INTEL, monkeypatch) == intel
    assert host_with(INTEL.replace("avx2", "avx2 avx512f"), monkeypatch) != intel
    assert host_with(INTEL.replace("Xeon", "Core"), monkeypatch) != intel
    arm = host_with(ARM, monkeypatch)
    assert arm != intel
    assert host_with(ARM.replace("asimd", "asimd sve"), monkeypatch) != arm


@pytest.mark.parametrize("cpuinfo", [None, "", "model name : unknown\n"])
def test_a_host_without_features_is_told_by_its_own_name(cpuinfo, monkeypatch):
    here = host_with(cpuinfo, monkeypatch)
    other = platform.uname_result("Darwin", "another machine", "25", "T6000", platform.machine())
    monkeypatch.setattr(platform, "uname", lambda: other)
    assert host_with(cpuinfo, monkeypatch) != here


def test_the_number_of_cores_tells_hosts_apart(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    one = host_with(INTEL, monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert host_with(INTEL, monkeypatch) != one


def test_the_default_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    monkeypatch.setenv("DUETJAX_CACHE_DIR", "/fast/duetjax")
    assert default_folder() == Path("/fast/duetjax/programs")
    monkeypatch.delenv("DUETJAX_CACHE_DIR")
    assert default_folder() == Path("/var/caches/duetjax/programs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path("/home/someone/.cache/duetjax/programs")


# Damage


def test_every_flipped_byte_is_found_before_anything_is_parsed(
    programs, entry, key, caplog, no_loading, monkeypatch
):
    """Every byte of digest and header, and bytes of the payload drawn at random."""
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("a damaged header was parsed"))
    data, rng = bytearray(entry.read_bytes()), random.Random(2)
    front = 40 + int.from_bytes(data[32:40], "little")
    assert front < FLIPS - 500
    drawn = [rng.randrange(front, len(data)) for _ in range(FLIPS - front)]
    for position in [*range(front), *drawn]:
        bits = rng.randrange(1, 256)
        data[position] ^= bits
        entry.write_bytes(data)
        assert refused(programs, key, caplog, "damaged"), position
        data[position] ^= bits


def test_a_damaged_entry_is_written_over_and_found_again(
    programs, entry, key, caplog, compiled, expected
):
    good, rng = entry.read_bytes(), random.Random(3)
    for _ in range(FLIPS // 200):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        entry.write_bytes(data)
        assert refused(programs, key, caplog)
        programs.save(key, compiled, FACTS, tuned=True)
        outputs, in_place = call(programs.load(key).executable)
        assert in_place
        for output, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(output, wanted)


def test_an_entry_cut_short_anywhere_is_refused(programs, entry, key, caplog, no_loading):
    data = entry.read_bytes()
    front = 40 + int.from_bytes(data[32:40], "little")
    borders = (0, 32, 40, front, len(data))
    for size in {border + step for border in borders for step in (-1, 0, 1)} - {-1, len(data)}:
        entry.write_bytes((data + b"\0")[:size])
        assert refused(programs, key, caplog, "damaged"), size


def test_an_entry_under_another_key_is_refused(programs, entry, folder, key, caplog, no_loading):
    (folder / f"{OTHER_KEY}.program").write_bytes(entry.read_bytes())
    assert refused(programs, OTHER_KEY, caplog, key)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("the payload ran",)


def test_a_hostile_payload_of_another_format_is_refused_unread(
    programs, entry, key, caplog, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    header, _ = opened(entry.read_bytes())
    payload = pickle.dumps((Hostile(), None, None))
    changed = header | {"payload_bytes": len(payload), "format": header["format"] + 1}
    entry.write_bytes(sealed(changed, payload))
    assert refused(programs, key, caplog, "its format is 2, not 1")
    assert not (tmp_path / "the payload ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda header, payload: (header, b""),
        lambda header, payload: (header, payload + b"\0"),
        lambda header, payload: (b"", payload),
        lambda header, payload: (b"[]", payload),
        lambda header, payload: (b"\xff", payload),
        lambda header, payload: ({**header, "format": "1"}, payload),
        lambda header, payload: ({k: v for k, v in header.items() if k != "key"}, payload),
    ],
)
def test_a_right_digest_over_wrong_contents_is_refused(
    change, programs, entry, key, caplog, no_loading
):
    entry.write_bytes(sealed(*change(*opened(entry.read_bytes()))))
    assert refused(programs, key, caplog)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, payload: (header, b"\0" * len(payload)),
        lambda header, payload: ({**header, "payload_bytes": 4}, pickle.dumps(1)[:4]),
        lambda header, payload: ({**header, "facts": {"unknown": 1}}, payload),
        lambda header, payload: ({**header, "platform": "tpu"}, payload),
        lambda header, payload: ({**header, "devices": [99]}, payload),
        lambda header, payload: ({**header, "devices": []}, payload),
    ],
)
def test_an_entry_that_does_not_load_is_refused(change, programs, entry, key, caplog):
    entry.write_bytes(sealed(*change(*opened(entry.read_bytes()))))
    assert refused(programs, key, caplog)


def test_an_executable_that_xla_refuses_is_a_miss(programs, entry, key, caplog):
    header, payload = opened(entry.read_bytes())
    code, *trees = pickle.loads(payload)
    payload = pickle.dumps((code.replace(b"xla", b"alx"), *trees))
    entry.write_bytes(sealed({**header, "payload_bytes": len(payload)}, payload))
    assert refused(programs, key, caplog)


def test_a_folder_or_a_pipe_in_place_of_an_entry_is_refused(programs, entry, key, caplog):
    entry.unlink()
    entry.mkdir()
    assert refused(programs, key, caplog, "not a regular file")
    entry.rmdir()
    os.mkfifo(entry)
    assert refused(programs, key, caplog, "not a regular file")


def test_an_entry_that_cannot_be_read_is_refused(programs, entry, key, caplog, monkeypatch):
    def read_bytes(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert refused(programs, key, caplog, "Permission denied")


# Disks that do not take it


def saves_twice(programs, key, compiled, caplog):
    """The warnings of two saves; neither may raise."""
    for each in (key, OTHER_KEY):
        programs.save(each, compiled, FACTS, tuned=True)
    return warnings_of(caplog)


def test_a_file_in_place_of_the_folder_gives_one_warning(tmp_path, key, compiled, caplog):
    folder = tmp_path / "programs"
    folder.write_text("a file")
    programs = ProgramStore(folder)
    assert programs.load(key) is None
    [warning] = saves_twice(programs, key, compiled, caplog)
    assert str(folder) in warning
    assert folder.read_text() == "a file"


def test_a_folder_that_cannot_be_made_gives_one_warning(tmp_path, key, compiled, caplog):
    (tmp_path / "file").write_text("")
    programs = ProgramStore(tmp_path / "file" / "programs")
    assert programs.load(key) is None
    assert len(saves_twice(programs, key, compiled, caplog)) == 1


@pytest.mark.parametrize(
    ("module", "name"), [(tempfile, "mkstemp"), (os, "replace"), (os, "fsync")]
)
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_disk_that_refuses_gives_one_warning_and_leaves_nothing(
    module, name, code, folder, key, compiled, caplog, monkeypatch
):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, name, fail)
    [warning] = saves_twice(ProgramStore(folder), key, compiled, caplog)
    assert os.strerror(code) in warning
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_in_a_write_keeps_the_entry_that_was_there(
    programs, entry, folder, key, compiled, caplog, monkeypatch
):
    before, fdopen = entry.read_bytes(), os.fdopen

    class Full:
        def __init__(self, *args):
            self.file = fdopen(*args)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", Full)
        [warning] = saves_twice(programs, key, compiled, caplog)
    assert "No space left" in warning
    assert list(folder.iterdir()) == [entry]
    assert entry.read_bytes() == before
    assert programs.load(key) is not None


def test_an_entry_whose_time_cannot_be_set_is_loaded_all_the_same(
    programs, key, caplog, monkeypatch
):
    def fail(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", fail)
    assert isinstance(programs.load(key), StoredProgram)
    assert not warnings_of(caplog)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_program_that_calls_python_is_not_stored_and_says_why(folder, caplog):
    x = jax.ShapeDtypeStruct((4,), np.float32)
    lowered = jax.jit(lambda x: jax.pure_callback(np.sin, x, x)).lower(x)
    compiled = lowered.compile()
    ProgramStore(folder).save(key_of(lowered), compiled, FACTS, tuned=True)
    [warning] = warnings_of(caplog)
    assert "a program cannot be stored" in warning
    assert not folder.exists()


def test_nothing_is_stored_beside_the_cache_of_jax(folder, key, compiled, caplog, tmp_path):
    """What that cache returns can be serialised and loaded, and then fails when it is called."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    try:
        [warning] = saves_twice(ProgramStore(folder), key, compiled, caplog)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert "JAX_COMPILATION_CACHE_DIR" in warning
    assert not folder.exists()


def test_two_processes_that_save_one_program_leave_one_good_entry(folder, key, tmp_path):
    """Both start saving at the same moment; a third process reads all the while."""
    script = f"""
        import time, test_store
        from pathlib import Path
        lowered = test_store.lower()
        key, compiled = test_store.key_of(lowered), lowered.compile(test_store.OPTIONS)
        store, go = ProgramStore(Path({str(folder)!r})), Path({str(tmp_path / "go")!r})
        print("ready", flush=True)
        while not go.exists():
            time.sleep(0.001)
        for _ in range(40):
            store.save(key, compiled, test_store.FACTS, tuned=True)
        """
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    head = "from duetjax.runtime.store import ProgramStore\n"
    command = [sys.executable, "-c", here + head + textwrap.dedent(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n", writer.communicate()
    (tmp_path / "go").touch()
    found = 0
    while any(writer.poll() is None for writer in writers):
        found += ProgramStore(folder).load(key) is not None
    for writer in writers:
        _, errors = writer.communicate()
        assert (writer.returncode, errors) == (0, "")
    assert found
    assert [path.name for path in folder.iterdir()] == [f"{key}.program"]
    assert ProgramStore(folder).load(key).facts == FACTS


# The bound


def keys(count):
    return [f"{index:064x}" for index in range(count)]


def age(folder, key, seconds):
    then = time.time() - seconds
    os.utime(folder / f"{key}.program", (then, then))


def names(folder):
    return {path.name.removesuffix(".program") for path in folder.iterdir()}


def test_the_entries_unused_for_longest_go_first(folder, entry, compiled, key):
    size = entry.stat().st_size
    entry.unlink()
    programs = ProgramStore(folder, max_bytes=3 * size)
    first, second, third, fourth = keys(4)
    for index, each in enumerate((first, second, third)):
        programs.save(each, compiled, FACTS, tuned=True)
        age(folder, each, 100 - index)
    assert names(folder) == {first, second, third}
    assert programs.load(first) is not None  # used: now the second is the oldest
    programs.save(fourth, compiled, FACTS, tuned=True)
    assert names(folder) == {first, third, fourth}


def test_the_entry_just_written_stays_however_small_the_bound(folder, compiled):
    programs = ProgramStore(folder, max_bytes=1)
    first, second = keys(2)
    programs.save(first, compiled, FACTS, tuned=True)
    age(folder, first, -1000)  # from a machine whose clock is ahead
    programs.save(second, compiled, FACTS, tuned=True)
    assert names(folder) == {second}


def test_files_of_others_are_neither_counted_nor_removed(folder, entry, compiled, key):
    size = entry.stat().st_size
    others = ["notes.txt", f"{key}.txt", f"{key[:-1]}.program", f"x{key}.program", "y.tmp"]
    for name in others:
        (folder / name).write_bytes(b"\0" * size)
        os.utime(folder / name, (0, 0))
    (folder / f"{OTHER_KEY}.program").mkdir()
    ProgramStore(folder, max_bytes=size).save(key, compiled, FACTS, tuned=True)
    assert {path.name for path in folder.iterdir()} == {
        *others,
        entry.name,
        f"{OTHER_KEY}.program",
    }


def test_what_a_killed_process_left_unfinished_is_cleared_after_an_hour(
    programs, folder, entry, compiled, key
):
    old, new = folder / f"{key}.ab12cd_3.tmp", folder / f"{key}.zzzzzzzz.tmp"
    for path in (old, new):
        path.write_bytes(b"half an entry")
    then = time.time() - 4000
    os.utime(old, (then, then))
    programs.save(key, compiled, FACTS, tuned=True)
    assert set(folder.iterdir()) == {entry, new}
