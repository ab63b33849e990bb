"""What a machine with a GPU has to have, and no more: for the tests of what is run there."""

import os
from pathlib import Path

_SITE = '''\
"""jax, flax and what comes with them, numpy, safetensors, tokenizers; this project uninstalled."""

import sys
import sysconfig
from importlib.machinery import PathFinder

ALLOWED = {
    *("jax", "jaxlib", "jax_plugins", "flax", "numpy", "ml_dtypes", "safetensors", "tokenizers"),
    *("absl", "etils", "msgpack", "opt_einsum", "optax", "scipy", "treescope"),  # theirs
    *("rich", "pygments", "markdown_it", "mdurl", "yaml", "_yaml", "typing_extensions"),
    *("filelock", "markupsafe", "importlib_resources", "fsspec", "zipp", "attr", "chex"),
}
PURELIB = sysconfig.get_path("purelib")


class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        ours = top.startswith(("jax_cuda", "_distutils_hack", "nvidia"))
        if path is None and not ours and top not in ALLOWED:
            if PathFinder.find_spec(name, [PURELIB]) is not None:
                raise ModuleNotFoundError(f"{name} is not on a GPU machine", name=name)


kept = [each for each in sys.meta_path if not each.__module__.startswith("__editable__")]
sys.meta_path[:] = [Blocked, *kept]
'''


def bare_environment(folder: Path, **more: str) -> dict[str, str]:
    """An environment in which Python finds nothing else installed, in processes it starts too.

    folder: for what sees to that. No path is on PYTHONPATH: a program finds the project itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITE, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(folder), **more}
