"""Turns lowered programs into executables, by way of the store: a second start compiles nothing."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax

from duetjax.runtime.store import ProgramStore, StoredProgram, facts_of
from duetjax.runtime.target import Target

_log = logging.getLogger(__name__)


class Compiler:
    """Compiles for one target, or finds in the store what was compiled for it before.

    num_compiled: programs that were not found.
    """

    def __init__(self, target: Target, store: ProgramStore) -> None:
        self._target = target
        self._store = store
        self.num_compiled = 0

    def compile[K](
        self, programs: Iterable[tuple[K, Callable[[], jax.stages.Lowered]]]
    ) -> Iterator[tuple[K, StoredProgram]]:
        """Yields each program as it is ready, in order.

        Compiling takes seconds each and does not hold the GIL, so several are compiled at once,
        while later ones are still being traced.
        """
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            pending = [(key, pool.submit(self._obtain, lower())) for key, lower in programs]
            for key, future in pending:
                yield key, future.result()

    def _obtain(self, lowered: jax.stages.Lowered) -> StoredProgram:
        options = self._target.compiler_options
        key = self._store.key(lowered, options, self._target.identity)
        found = self._store.load(key)
        if found is not None:
            return found
        started = time.perf_counter()
        compiled = self._target.compile(lowered)
        self.num_compiled += 1
        facts = facts_of(compiled, time.perf_counter() - started)
        tuned = self._target.mesh is None  # an absent device times no kernels
        self._store.save(key, compiled, facts, tuned)
        return StoredProgram(compiled, facts, tuned, is_new=True)
