/* The pool of KV pages and its handlers in Python. */
#ifndef DUET_POOL_MODULE_H
#define DUET_POOL_MODULE_H

#include <Python.h>

/* Adds the type KVPool and the handlers' capsules; -1 with a Python error. */
int duet_add_pool(PyObject *module);

#endif
