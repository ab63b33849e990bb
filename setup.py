"""The launcher's C extension; everything else is in pyproject.toml.

Optional: without a compiler the rest installs, and `duetjax doctor` says what is missing.
"""

from glob import glob

from setuptools import Extension, setup

LAUNCHER = Extension(
    "duetjax._launcher",
    sorted(glob("launcher/csrc/*.c")),
    depends=sorted(glob("launcher/csrc/*.h")),
    define_macros=[("Py_LIMITED_API", "0x030c0000"), ("_GNU_SOURCE", None)],
    extra_compile_args=[
        *("-std=c11", "-O3", "-ffp-contract=fast", "-fvisibility=hidden"),
        "-Wno-psabi",  # GCC's note on vectors as arguments, of which none are left
    ],
    libraries=["pthread", "dl", "m"],
    py_limited_api=True,
    optional=True,
)

setup(ext_modules=[LAUNCHER], options={"bdist_wheel": {"py_limited_api": "cp312"}})
