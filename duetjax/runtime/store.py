"""The store of compiled programs: one file each, so that a second start compiles nothing.

    sha256 of the rest | header's length, 8 bytes | header, JSON | payload, a pickle

An entry is native code and a pickle: whoever can write to the folder can run code in the server.
The digest finds damage, not malice, so the store makes its folder 0700 and its files 0600. What a
load refuses is compiled again and written over; no fault of the disk stops a server.

What must not be stored, since loading it does not give back what was saved: a program that was
loaded itself, by the store or by JAX's own cache (it fails only when called), and on CPU one that
calls LAPACK through jax.numpy.linalg (a new process crashes).
"""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

from duetjax.runtime.code_generation import code_generation, host_target

_log = logging.getLogger(__name__)
