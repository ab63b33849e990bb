/* duetjax._launcher: the one file that knows Python.
 *
 * Within the limited API of Python 3.12. Everything that takes a lock or calls the driver does so
 * without the GIL. A program holds its device and whatever it is told to keep; a device holds no
 * Python object. Statuses become exceptions; what a call needs is checked in the core. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

#include "launcher.h"
#include "marker.h"
#include "pool_module.h"

typedef struct {
    PyTypeObject *device_type, *program_type;
    PyObject *error, *busy, *unsafe, *dead, *no_driver;
} module_state;

typedef struct {
    PyObject_HEAD
    duet_device *device;
} device_object;

typedef struct {
    PyObject_HEAD
    duet_program *program; /* NULL once the garbage collector has cleared it */
    PyObject *device, *kept;
} program_object;

static duet_device *device_of(PyObject *self) {
    return ((device_object *)self)->device;
}

static duet_program *program_of(PyObject *self) {
    duet_program *program = ((program_object *)self)->program;
    if (program == NULL)
        PyErr_SetString(PyExc_RuntimeError, "the program has been freed");
    return program;
}

/* The exception that a status means; NULL. */
static PyObject *raise(module_state *state, int status) {
    PyObject *type = state->error;
    if (status == DUET_BUSY)
        type = state->busy;
    else if (status == DUET_UNSAFE)
        type = state->unsafe;
    else if (status == DUET_DEAD)
        type = state->dead;
    else if (status == DUET_NO_DRIVER)
        type = state->no_driver;
    else if (status == DUET_INVALID)
        type = PyExc_ValueError;
    else if (status == DUET_NO_MEMORY)
        type = PyExc_MemoryError;
    PyErr_SetString(type, duet_last_error());
    return NULL;
}

static PyObject *none_or_raise(PyObject *self, int status) {
    if (status != DUET_OK)
        return raise(PyType_GetModuleState(Py_TYPE(self)), status);
    return Py_NewRef(Py_None);
}

/* Calls the core without the GIL. duet_last_error is the thread's own, so it may be read after. */
#define UNLOCKED(call)                                                                             \
    Py_BEGIN_ALLOW_THREADS                                                                         \
    call;                                                                                          \
    Py_END_ALLOW_THREADS

/* A sequence's items, each as `parse` makes it, in memory that the caller frees; NULL on error. */
static void *parse_sequence(PyObject *sequence, size_t item_size, size_t *count,
                            int (*parse)(PyObject *, void *)) {
    Py_ssize_t size = PySequence_Size(sequence);
    if (size < 0)
        return NULL;
    char *items = PyMem_Calloc((size_t)size + 1, item_size);
    if (items == NULL)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < size; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        int failed = item == NULL || parse(item, items + (size_t)i * item_size) != 0;
        Py_XDECREF(item);
        if (failed) {
            PyMem_Free(items);
            return NULL;
        }
    }
    *count = (size_t)size;
    return items;
}

static int parse_count(PyObject *item, void *into) {
    unsigned long value = PyLong_AsUnsignedLong(item);
    if (PyErr_Occurred())
        return -1;
    if (value > UINT32_MAX) {
        PyErr_Format(PyExc_ValueError, "a split of %lu SMs", value);
        return -1;
    }
    *(unsigned *)into = (unsigned)value;
    return 0;
}

static int parse_range(PyObject *item, void *into) {
    unsigned long long start;
    Py_ssize_t bytes;
    int shared;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "a range is a tuple (start, bytes, shared)");
        return -1;
    }
    if (!PyArg_ParseTuple(item, "Knp", &start, &bytes, &shared))
        return -1;
    *(struct duet_range *)into = (struct duet_range){start, (size_t)bytes, shared};
    return 0;
}

/* device */

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"splits", "libcuda", "ordinal", "result_bytes", "result_slots",
                            "staging_bytes", "replay_lists", NULL};
    PyObject *sequence;
    int replay_lists = 0, status;
    Py_ssize_t result_bytes = 1 << 16, staging_bytes = 1 << 20;
    struct duet_options options = {.result_slots = 64};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|$zinInp:Device", names, &sequence,
                                     &options.libcuda, &options.ordinal, &result_bytes,
                                     &options.result_slots, &staging_bytes, &replay_lists))
        return NULL;
    if (result_bytes < 0 || staging_bytes < 0)
        return PyErr_Format(PyExc_ValueError, "sizes must be positive, not %zd and %zd",
                            result_bytes, staging_bytes);
    options.result_bytes = (size_t)result_bytes, options.staging_bytes = (size_t)staging_bytes;
    options.replay_lists = replay_lists;
    unsigned *splits = parse_sequence(sequence, sizeof *splits, &options.num_splits, parse_count);
    if (splits == NULL)
        return NULL;
    options.decode_sms = splits;
    PyObject *self = PyType_GenericAlloc(type, 0);
    if (self == NULL) {
        PyMem_Free(splits);
        return NULL;
    }
    UNLOCKED(status = duet_open(&options, &((device_object *)self)->device))
    PyMem_Free(splits);
    if (status != DUET_OK) {
        raise(PyType_GetModuleState(type), status);
        Py_CLEAR(self);
    }
    return self;
}

static void device_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (device_of(self) != NULL)
        UNLOCKED(duet_free(device_of(self)))
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *device_close(PyObject *self, PyObject *unused) {
    (void)unused;
    UNLOCKED(duet_close(device_of(self)))
    return Py_NewRef(Py_None);
}

static PyObject *device_enter(PyObject *self, PyObject *unused) {
    (void)unused;
    return Py_NewRef(self);
}

static PyObject *device_splits(PyObject *self, void *unused) {
    (void)unused;
    size_t count = duet_num_splits(device_of(self));
    PyObject *splits = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; splits != NULL && i < count; i++) {
        struct duet_split split = {0};
        duet_get_split(device_of(self), i, &split);
        PyObject *row = Py_BuildValue("(III)", split.wanted, split.decode_sms, split.prefill_sms);
        if (row == NULL || PyTuple_SetItem(splits, (Py_ssize_t)i, row) != 0)
            Py_CLEAR(splits);
    }
    return splits;
}

static PyObject *device_arm(PyObject *self, PyObject *args) {
    long long id;
    int status;
    if (!PyArg_ParseTuple(args, "L:arm", &id))
        return NULL;
    UNLOCKED(status = duet_capture_arm(device_of(self), id))
    return none_or_raise(self, status);
}

static PyObject *device_abort(PyObject *self, PyObject *unused) {
    (void)unused;
    int status;
    UNLOCKED(status = duet_capture_abort(device_of(self)))
    return none_or_raise(self, status);
}

static PyObject *device_take(PyObject *self, PyObject *args) {
    long long id;
    int status;
    PyObject *kept = Py_None;
    if (!PyArg_ParseTuple(args, "L|O:take", &id, &kept))
        return NULL;
    module_state *state = PyType_GetModuleState(Py_TYPE(self));
    PyObject *made = PyType_GenericAlloc(state->program_type, 0);
    if (made == NULL)
        return NULL;
    program_object *program = (program_object *)made;
    program->device = Py_NewRef(self);
    program->kept = Py_NewRef(kept);
    UNLOCKED(status = duet_capture_take(device_of(self), id, &program->program))
    if (status != DUET_OK) {
        raise(state, status);
        Py_CLEAR(made);
    }
    return made;
}

static PyObject *device_copy_in(PyObject *self, PyObject *args) {
    int lane, status;
    Py_ssize_t split;
    unsigned long long dst;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "inKy*:copy_in", &lane, &split, &dst, &data))
        return NULL;
    UNLOCKED(status = duet_copy_in(device_of(self), (enum duet_lane)lane, (size_t)split, dst,
                                   data.buf, (size_t)data.len))
    PyBuffer_Release(&data);
    return none_or_raise(self, status);
}

static PyObject *device_copy(PyObject *self, PyObject *args) {
    int lane, status;
    Py_ssize_t split, bytes;
    unsigned long long dst, src;
    if (!PyArg_ParseTuple(args, "inKKn:copy", &lane, &split, &dst, &src, &bytes))
        return NULL;
    UNLOCKED(status = duet_copy(device_of(self), (enum duet_lane)lane, (size_t)split, dst, src,
                                (size_t)bytes))
    return none_or_raise(self, status);
}

static PyObject *device_lane_wait(PyObject *self, PyObject *args) {
    int lane, status;
    Py_ssize_t split;
    if (!PyArg_ParseTuple(args, "in:lane_wait", &lane, &split))
        return NULL;
    UNLOCKED(status = duet_lane_wait(device_of(self), (enum duet_lane)lane, (size_t)split))
    return none_or_raise(self, status);
}

static PyObject *device_fence(PyObject *self, PyObject *args) {
    int lane, status;
    Py_ssize_t split;
    uint64_t step;
    if (!PyArg_ParseTuple(args, "in:fence", &lane, &split))
        return NULL;
    UNLOCKED(status = duet_fence(device_of(self), (enum duet_lane)lane, (size_t)split, &step))
    return status == DUET_OK ? PyLong_FromUnsignedLongLong(step) : none_or_raise(self, status);
}

static PyObject *device_completed(PyObject *self, PyObject *args) {
    int lane;
    uint64_t step;
    if (!PyArg_ParseTuple(args, "i:completed", &lane))
        return NULL;
    int status = duet_completed(device_of(self), (enum duet_lane)lane, &step);
    return status == DUET_OK ? PyLong_FromUnsignedLongLong(step) : none_or_raise(self, status);
}

static PyObject *device_wait(PyObject *self, PyObject *args) {
    int lane, status;
    unsigned long long step;
    double seconds;
    if (!PyArg_ParseTuple(args, "iKd:wait", &lane, &step, &seconds))
        return NULL;
    int64_t timeout_ns = seconds >= 1e9 ? INT64_MAX : seconds > 0 ? (int64_t)(seconds * 1e9) : 0;
    UNLOCKED(status = duet_wait(device_of(self), (enum duet_lane)lane, step, timeout_ns))
    return status >= 0 ? PyBool_FromLong(status == DUET_OK) : none_or_raise(self, status);
}

static PyObject *device_result(PyObject *self, PyObject *args) {
    int lane;
    unsigned long long step;
    const void *data;
    size_t bytes;
    if (!PyArg_ParseTuple(args, "iK:result", &lane, &step))
        return NULL;
    int status = duet_result(device_of(self), (enum duet_lane)lane, step, &data, &bytes);
    if (status != DUET_OK)
        return none_or_raise(self, status);
    return PyBytes_FromStringAndSize(data, (Py_ssize_t)bytes);
}

static PyObject *device_release(PyObject *self, PyObject *args) {
    int lane, status;
    unsigned long long step;
    if (!PyArg_ParseTuple(args, "iK:release", &lane, &step))
        return NULL;
    UNLOCKED(status = duet_release(device_of(self), (enum duet_lane)lane, step))
    return none_or_raise(self, status);
}

static PyObject *device_fileno(PyObject *self, PyObject *unused) {
    (void)unused;
    return PyLong_FromLong(duet_descriptor(device_of(self)));
}

static PyObject *device_clear(PyObject *self, PyObject *unused) {
    (void)unused;
    duet_clear(device_of(self));
    return Py_NewRef(Py_None);
}

static PyMethodDef device_methods[] = {
    {"arm", device_arm, METH_VARARGS,
     "arm(program): the next run of the executable with this marker attribute is recorded."},
    {"take", device_take, METH_VARARGS,
     "take(program, kept=None) -> Program: the recording, which keeps `kept` alive."},
    {"abort", device_abort, METH_NOARGS,
     "Forgets a capture, ending it where a failed run has left it open."},
    {"copy_in", device_copy_in, METH_VARARGS,
     "copy_in(lane, split, address, data): a copy from the host before the lane's next launch."},
    {"copy", device_copy, METH_VARARGS,
     "copy(lane, split, dst, src, bytes): a copy on the device before the lane's next launch."},
    {"lane_wait", device_lane_wait, METH_VARARGS,
     "lane_wait(lane, split): the lane's next work waits for what the other one has been given."},
    {"fence", device_fence, METH_VARARGS,
     "fence(lane, split) -> number of a step that completes with whatever came before it."},
    {"completed", device_completed, METH_VARARGS,
     "completed(lane) -> number of the last step that has completed; 0 before the first."},
    {"wait", device_wait, METH_VARARGS,
     "wait(lane, step, seconds) -> bool: whether the step has completed in that time."},
    {"result", device_result, METH_VARARGS,
     "result(lane, step) -> bytes of a completed step that has not been released."},
    {"release", device_release, METH_VARARGS,
     "release(lane, step): the results of this step and those before it are no longer needed."},
    {"fileno", device_fileno, METH_NOARGS,
     "A descriptor that is readable once a step has completed or the device has failed."},
    {"clear", device_clear, METH_NOARGS, "Makes the descriptor unreadable again."},
    {"close", device_close, METH_NOARGS,
     "Lets lanes finish (5 s at most) and gives everything back; closing twice does no harm."},
    {"__enter__", device_enter, METH_NOARGS, NULL},
    {"__exit__", device_close, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef device_attributes[] = {
    {"splits", device_splits, NULL,
     "(wanted, decode, prefill) SMs of every split; split 0 is the whole device for both.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot device_slots[] = {
    {Py_tp_doc, "Device(splits, *, libcuda=None, ordinal=0, result_bytes=65536, result_slots=64,"
                " staging_bytes=1048576, replay_lists=False)\n\nA GPU with a prefill lane (0) and"
                " a decode lane (1) on every split. splits: SMs that decode asks for."},
    {Py_tp_new, device_new},
    {Py_tp_dealloc, device_dealloc},
    {Py_tp_methods, device_methods},
    {Py_tp_getset, device_attributes},
    {0, NULL},
};

static PyType_Spec device_spec = {"duetjax._launcher.Device", sizeof(device_object), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, device_slots};

/* program */

static int program_traverse(PyObject *self, visitproc visit, void *arg) {
    program_object *program = (program_object *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(program->device);
    Py_VISIT(program->kept);
    return 0;
}

/* The recording goes before what it keeps alive. */
static int program_clear(PyObject *self) {
    program_object *program = (program_object *)self;
    duet_program *recording = program->program;
    program->program = NULL;
    if (recording != NULL)
        UNLOCKED(duet_program_free(recording))
    Py_CLEAR(program->kept);
    Py_CLEAR(program->device);
    return 0;
}

static void program_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    program_clear(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyObject *program_census(PyObject *self, void *unused) {
    (void)unused;
    duet_program *program = program_of(self);
    if (program == NULL)
        return NULL;
    struct duet_census census = duet_program_census(program);
    return Py_BuildValue("{sIsIsIsIsIsIsIsI}", "kernels", census.kernels, "copies", census.copies,
                         "fills", census.fills, "empties", census.empties, "clusters",
                         census.clusters, "cooperative", census.cooperative, "programmatic_edges",
                         census.programmatic_edges, "branches", census.branches);
}

static PyObject *program_outputs(PyObject *self, void *unused) {
    (void)unused;
    size_t count;
    duet_program *program = program_of(self);
    if (program == NULL)
        return NULL;
    const duet_address *outputs = duet_program_outputs(program, &count);
    PyObject *addresses = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; addresses != NULL && i < count; i++) {
        PyObject *address = PyLong_FromUnsignedLongLong(outputs[i]);
        if (address == NULL || PyTuple_SetItem(addresses, (Py_ssize_t)i, address) != 0)
            Py_CLEAR(addresses);
    }
    return addresses;
}

static PyObject *program_add_copy(PyObject *self, PyObject *args) {
    unsigned long long dst, src;
    Py_ssize_t bytes;
    int status;
    duet_program *program = program_of(self);
    if (program == NULL || !PyArg_ParseTuple(args, "KKn:add_copy", &dst, &src, &bytes))
        return NULL;
    UNLOCKED(status = duet_program_add_copy(program, dst, src, (size_t)bytes))
    return none_or_raise(self, status);
}

static PyObject *program_add_result(PyObject *self, PyObject *args) {
    unsigned long long src;
    Py_ssize_t bytes;
    int status;
    duet_program *program = program_of(self);
    if (program == NULL || !PyArg_ParseTuple(args, "Kn:add_result", &src, &bytes))
        return NULL;
    UNLOCKED(status = duet_program_add_result(program, src, (size_t)bytes))
    return none_or_raise(self, status);
}

static PyObject *program_check(PyObject *self, PyObject *args) {
    PyObject *sequence;
    size_t count = 0;
    int status;
    duet_program *program = program_of(self);
    if (program == NULL || !PyArg_ParseTuple(args, "O:check", &sequence))
        return NULL;
    struct duet_range *ranges = parse_sequence(sequence, sizeof *ranges, &count, parse_range);
    if (ranges == NULL)
        return NULL;
    UNLOCKED(status = duet_program_check(program, ranges, count))
    PyMem_Free(ranges);
    return none_or_raise(self, status);
}

static PyObject *program_check_apart(PyObject *self, PyObject *args) {
    module_state *state = PyType_GetModuleState(Py_TYPE(self));
    PyObject *other;
    if (!PyArg_ParseTuple(args, "O!:check_apart", state->program_type, &other))
        return NULL;
    duet_program *one = program_of(self), *two = program_of(other);
    return one && two ? none_or_raise(self, duet_program_check_apart(one, two)) : NULL;
}

static PyObject *program_build(PyObject *self, PyObject *args) {
    int lane, status;
    Py_ssize_t split;
    duet_program *program = program_of(self);
    if (program == NULL || !PyArg_ParseTuple(args, "in:build", &lane, &split))
        return NULL;
    UNLOCKED(status = duet_program_build(program, (enum duet_lane)lane, (size_t)split))
    return none_or_raise(self, status);
}

static PyObject *program_is_built(PyObject *self, PyObject *args) {
    int lane;
    bool is_built;
    Py_ssize_t split;
    duet_program *program = program_of(self);
    if (program == NULL || !PyArg_ParseTuple(args, "in:is_built", &lane, &split))
        return NULL;
    UNLOCKED(is_built = duet_program_is_built(program, (enum duet_lane)lane, (size_t)split))
    return PyBool_FromLong(is_built);
}

static PyObject *program_launch(PyObject *self, PyObject *args) {
    int lane, status;
    Py_ssize_t split;
    unsigned steps, num_results;
    uint64_t last = 0;
    duet_program *program = program_of(self);
    if (program == NULL ||
        !PyArg_ParseTuple(args, "inII:launch", &lane, &split, &steps, &num_results))
        return NULL;
    UNLOCKED(status = duet_launch(program, (enum duet_lane)lane, (size_t)split, steps, num_results,
                                  &last))
    return status == DUET_OK ? PyLong_FromUnsignedLongLong(last) : none_or_raise(self, status);
}

static PyMethodDef program_methods[] = {
    {"add_copy", program_add_copy, METH_VARARGS,
     "add_copy(dst, src, bytes): a copy on the device after each step."},
    {"add_result", program_add_result, METH_VARARGS,
     "add_result(src, bytes): a part of each step's result."},
    {"check", program_check, METH_VARARGS,
     "check([(start, bytes, shared)]): refuses a program that uses any other memory."},
    {"check_apart", program_check_apart, METH_VARARGS,
     "check_apart(program): refuses two that use the same memory, unless it is shared."},
    {"build", program_build, METH_VARARGS,
     "build(lane, split): records it anew where it is to run."},
    {"is_built", program_is_built, METH_VARARGS, "is_built(lane, split) -> bool"},
    {"launch", program_launch, METH_VARARGS,
     "launch(lane, split, steps, num_results) -> number of the last step; does not wait."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef program_attributes[] = {
    {"census", program_census, NULL, "How many nodes there are, by kind.", NULL},
    {"outputs", program_outputs, NULL, "Addresses of the executable's outputs.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot program_slots[] = {
    {Py_tp_doc, "A recorded executable; made by Device.take."},
    {Py_tp_dealloc, program_dealloc},
    {Py_tp_traverse, program_traverse},
    {Py_tp_clear, program_clear},
    {Py_tp_methods, program_methods},
    {Py_tp_getset, program_attributes},
    {0, NULL},
};

static PyType_Spec program_spec = {"duetjax._launcher.Program", sizeof(program_object), 0,
                                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
                                       Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                   program_slots};

/* module */

static int parse_address(PyObject *item, void *into) {
    *(duet_address *)into = PyLong_AsUnsignedLongLong(item);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *begin_capture(PyObject *module, PyObject *args) {
    long long id;
    unsigned long long stream;
    PyObject *sequence = NULL;
    size_t count = 0;
    int status;
    if (!PyArg_ParseTuple(args, "LK|O:begin_capture", &id, &stream, &sequence))
        return NULL;
    duet_address *outputs = NULL;
    if (sequence != NULL) {
        outputs = parse_sequence(sequence, sizeof *outputs, &count, parse_address);
        if (outputs == NULL)
            return NULL;
    }
    UNLOCKED(status = duet_capture_begin(id, (void *)(uintptr_t)stream, outputs, count))
    PyMem_Free(outputs);
    return status == DUET_OK ? Py_NewRef(Py_None) : raise(PyModule_GetState(module), status);
}

static PyObject *end_capture(PyObject *module, PyObject *args) {
    long long id;
    int status;
    if (!PyArg_ParseTuple(args, "L:end_capture", &id))
        return NULL;
    UNLOCKED(status = duet_capture_end(id))
    return status == DUET_OK ? Py_NewRef(Py_None) : raise(PyModule_GetState(module), status);
}

static PyMethodDef functions[] = {
    {"begin_capture", begin_capture, METH_VARARGS,
     "begin_capture(program, stream, outputs=()): what the marker does, for kernels launched by"
     " hand. outputs: addresses."},
    {"end_capture", end_capture, METH_VARARGS, "end_capture(program): ends such a capture."},
    {NULL, NULL, 0, NULL},
};

static PyObject *add_exception(PyObject *module, const char *full_name, const char *text,
                               PyObject *base) {
    PyObject *exception = PyErr_NewExceptionWithDoc(full_name, text, base, NULL);
    const char *name = strrchr(full_name, '.') + 1;
    if (exception != NULL && PyModule_AddObjectRef(module, name, exception) != 0)
        Py_CLEAR(exception);
    return exception;
}

static int add_exceptions(PyObject *module, module_state *state) {
    PyObject *base = add_exception(module, "duetjax._launcher.LauncherError",
                                   "The launcher refused a call.", PyExc_RuntimeError);
    if (base == NULL)
        return -1;
    state->error = base;
    state->busy = add_exception(module, "duetjax._launcher.Busy",
                                "A ring is full: release results, then try again.", base);
    state->unsafe = add_exception(module, "duetjax._launcher.Unsafe",
                                  "Replaying the program would not be what XLA ran.", base);
    state->dead = add_exception(module, "duetjax._launcher.DeviceDead",
                                "The device has failed for good.", base);
    state->no_driver = add_exception(module, "duetjax._launcher.NoDriver",
                                     "There is no usable libcuda.", base);
    return state->busy && state->unsafe && state->dead && state->no_driver ? 0 : -1;
}

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec) {
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type != NULL && PyModule_AddType(module, type) != 0) {
        Py_DECREF((PyObject *)type);
        return NULL;
    }
    return type;
}

static int execute(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    PyObject *marker = PyCapsule_New((void *)duet_marker, NULL, NULL);
    int failed = marker == NULL || PyModule_AddObjectRef(module, "marker", marker) != 0;
    Py_XDECREF(marker);
    if (failed || PyModule_AddIntConstant(module, "PREFILL", DUET_PREFILL) != 0 ||
        PyModule_AddIntConstant(module, "DECODE", DUET_DECODE) != 0)
        return -1;
    if (duet_add_pool(module) != 0)
        return -1;
    state->device_type = add_type(module, &device_spec);
    state->program_type = add_type(module, &program_spec);
    if (state->device_type == NULL || state->program_type == NULL)
        return -1;
    return add_exceptions(module, state);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = PyModule_GetState(module);
    Py_VISIT((PyObject *)state->device_type);
    Py_VISIT((PyObject *)state->program_type);
    Py_VISIT(state->error);
    Py_VISIT(state->busy);
    Py_VISIT(state->unsafe);
    Py_VISIT(state->dead);
    Py_VISIT(state->no_driver);
    return 0;
}

static int module_clear(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->device_type);
    Py_CLEAR(state->program_type);
    Py_CLEAR(state->error);
    Py_CLEAR(state->busy);
    Py_CLEAR(state->unsafe);
    Py_CLEAR(state->dead);
    Py_CLEAR(state->no_driver);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* one capture */
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "duetjax._launcher",
    "Runs recorded XLA executables on parts of a GPU's SMs; see launcher/DESIGN.md.",
    sizeof(module_state),
    functions,
    slots,
    module_traverse,
    module_clear,
    NULL,
};

PyMODINIT_FUNC PyInit__launcher(void) {
    return PyModuleDef_Init(&definition);
}
