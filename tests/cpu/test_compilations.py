"""The counter of compilations sees every one, of whichever thread, and nothing else."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable

from duetjax.runtime import compilations


def compiled_by(action):
    compilations.install()
    before = compilations.count()
    action()
    return compilations.count() - before


def lower(scale):
    return jax.jit(lambda x: x * scale).lower(jax.ShapeDtypeStruct((5,), jnp.float32))


def test_a_single_operation_counts_as_one_compilation():
    jnp.zeros((3,))  # the first of any shape also converts its fill value
    assert compiled_by(lambda: jnp.zeros((7, 11))) == 1
    assert compiled_by(lambda: jnp.zeros((7, 11))) == 0


def test_a_jitted_function_counts_once_for_each_shape():
    double = jax.jit(lambda x: x * 2)
    assert compiled_by(lambda: double(np.ones(4, np.float32))) == 1
    assert compiled_by(lambda: double(np.ones(4, np.float32))) == 0
    assert compiled_by(lambda: double(np.ones(5, np.float32))) == 1


def test_compiling_ahead_of_time_counts_and_tracing_does_not():
    assert compiled_by(lambda: lower(3.0)) == 0
    assert compiled_by(lower(4.0).compile) == 1


def test_loading_and_calling_a_serialised_program_counts_nothing():
    saved = serialize_executable.serialize(lower(5.0).compile())

    def load_and_call():
        loaded = serialize_executable.deserialize_and_load(*saved)
        assert np.asarray(loaded(np.ones(5, np.float32))).tolist() == [5.0] * 5

    assert compiled_by(load_and_call) == 0


def test_installing_twice_counts_nothing_twice():
    compilations.install()
    assert compiled_by(lower(6.0).compile) == 1


def test_compilations_of_other_threads_count():
    programs = [lower(float(10 + index)) for index in range(4)]

    def compile_all():
        threads = [threading.Thread(target=program.compile) for program in programs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert compiled_by(compile_all) == 4
