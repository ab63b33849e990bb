"""XLA on the double of libcuda: arrays in its memory, executables that are its kernels.

An executable here is a function of numpy arrays; running it enqueues one kernel that reads its
arguments from device memory, calls the function and writes what it returns. As XLA does, it takes
memory for outputs and temporaries when it is run, gives the latter back at once, updates donated
arguments in place, and lets the launcher record what it enqueues if that is armed.
"""

import ctypes
from contextlib import contextmanager
from ctypes import c_size_t, c_uint, c_uint64, c_void_p

import jax
import numpy as np
from fake_cuda import Callback, LaunchConfig

import duetjax._launcher as _launcher

MARKER = 0
MARK = np.uint8(0xA5)  # what a kernel's scratch is full of until it has ended


class FakeMemory:
    """Implements `recorder.Memory`. wasted: bytes that a hold is taken short of."""

    def __init__(self, cuda, *, wasted=0):
        self.cuda, self.wasted = cuda, wasted

    def array(self, shape, dtype):
        return FakeArray(self.cuda, shape, np.dtype(dtype))

    def put(self, values):
        values = np.asarray(values)
        array = self.array(values.shape, values.dtype)
        array.view()[...] = values
        return array

    def holder(self, num_bytes):
        return lambda: self.array((num_bytes - self.wasted,), np.uint8)


class Buffer:
    """Device memory, given back with its last owner."""

    def __init__(self, cuda, num_bytes):
        self._cuda, self.bytes = cuda, num_bytes
        self.address = cuda.memory(max(num_bytes, 1))

    def __del__(self):
        self._cuda.library.cuMemFree_v2(c_uint64(self.address))


class FakeArray:
    """What the recorder asks of a jax.Array."""

    def __init__(self, cuda, shape, dtype, buffer=None):
        self.cuda, self.shape, self.dtype = cuda, shape, dtype
        self.nbytes = int(np.prod(shape)) * dtype.itemsize
        self.buffer = buffer or Buffer(cuda, self.nbytes)

    def unsafe_buffer_pointer(self):
        return self.buffer.address

    def view(self):
        """Its content, as it is."""
        return view(self.cuda, self.buffer.address, self.shape, self.dtype)

    def __array__(self, dtype=None, copy=None):
        return self.view().copy()


def view(cuda, address, shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (ctypes.c_uint8 * max(size, 1)).from_address(cuda.host(address))
    return np.frombuffer(raw, dtype, count=size // np.dtype(dtype).itemsize).reshape(shape)


class Clashes:
    """Kernels that were in the same memory at the same time."""

    def __init__(self):
        self.found = []


class FakeExecutable:
    """run: from arguments to outputs, both flat lists of numpy arrays. kept: how many of the first
    outputs are written over arguments, from which argument on. temp_bytes: of temporaries.
    """

    def __init__(self, memory, run, result, *, first_donated, num_donated, temp_bytes, clashes):
        self._memory, self._cuda, self._run, self._result = memory, memory.cuda, run, result
        self._first, self._count, self._temp = first_donated, num_donated, temp_bytes
        self._clashes, self._callbacks = clashes, []

    def __call__(self, *arguments):
        given = jax.tree.leaves(arguments)
        shapes, tree = jax.tree.flatten(self._result)
        donated = given[self._first : self._first + self._count]
        outputs = [
            FakeArray(self._cuda, shape.shape, np.dtype(shape.dtype), old.buffer)
            for shape, old in zip(shapes, donated, strict=False)
        ]
        outputs += [self._memory.array(each.shape, each.dtype) for each in shapes[self._count :]]
        scratch = self._memory.array((self._temp,), np.uint8)  # XLA's own again on return
        with self._marked([each.unsafe_buffer_pointer() for each in outputs]):
            self._enqueue(given, outputs, scratch)
        self._cuda.call("cuStreamSynchronize", self._cuda.stream)
        return jax.tree.unflatten(tree, outputs)

    @contextmanager
    def _marked(self, addresses):
        _launcher.begin_capture(MARKER, self._cuda.stream.value, addresses)
        try:
            yield
        finally:
            _launcher.end_capture(MARKER)

    def _enqueue(self, given, outputs, scratch):
        described = [(each.shape, each.dtype) for each in (*given, *outputs)]
        count = len(given)

        def work(addresses):
            views = [
                view(self._cuda, address, *each)
                for address, each in zip(addresses, described, strict=False)
            ]
            temporary = view(self._cuda, addresses[-1], (self._temp,), np.uint8)
            temporary[:] = MARK
            before = [each.copy() for each in views[:count]]
            values = self._run([each.copy() for each in before])
            if not (temporary == MARK).all():
                self._clashes.found.append("temporaries")
            temporary[:] = 0
            for i, (place, value) in enumerate(zip(views[count:], values, strict=True)):
                if i < self._count:  # elsewhere another kernel may be writing
                    changed = value != before[self._first + i]
                    place[changed] = value[changed]
                else:
                    place[...] = value

        kernel = self._kernel(work, len(described) + 1)
        pointers = [each.unsafe_buffer_pointer() for each in (*given, *outputs, scratch)]
        values = [c_uint64(pointer) for pointer in pointers]
        params = (c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        config = LaunchConfig(
            (c_uint * 3)(1, 1, 1), (c_uint * 3)(1, 1, 1), 0, self._cuda.stream, None, 0
        )
        self._cuda.call("cuLaunchKernelEx", ctypes.byref(config), kernel, params, None)

    def _kernel(self, work, count):
        def callback(given, _user):
            params = given.contents.params
            work([c_uint64.from_address(params[i]).value for i in range(count)])

        self._callbacks.append(Callback(callback))
        sizes = (c_size_t * count)(*([8] * count))
        function = self._cuda.library.fake_function
        return c_void_p(function(b"xla", sizes, c_size_t(count), 0, self._callbacks[-1], None))
