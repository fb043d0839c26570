"""Loads the C++ extension and proves that it and mlx.core see each other's arrays."""

import ctypes

import mlx.core as mx  # first: it brings libmlx into the process, wherever mlx is installed

_REINSTALL = "run `pip install --force-reinstall --no-cache-dir mlx-server`"


def check_extension() -> None:
    """Raises ImportError, one sentence that says what to install, unless `_ext` loads and takes an `mx.array`."""
    try:
        from mlx_server import _ext  # noqa: PLC0415 - the fault to report is this import's
    except ImportError as error:
        raise ImportError(
            f"mlx-server's C++ extension does not load ({error}): {_REINSTALL}.", name="mlx_server._ext"
        ) from error
    domains = [key for key in _interpreter_keys() if "__nb_internals_" in key and key.endswith("_mlx__")]
    try:
        size = _ext.array_size(mx.array(0))
    except TypeError:
        size = None
    if size != 1 or len(domains) != 1:
        raise ImportError(
            f"mlx-server's C++ extension and mlx.core do not share one nanobind (found {len(domains)}): {_REINSTALL}.",
            name="mlx_server._ext",
        )


def _interpreter_keys() -> list[str]:
    """Where nanobind registers its internals, one key per ABI and domain: extensions that share a key share types."""
    api = ctypes.pythonapi
    api.PyInterpreterState_Get.restype = ctypes.c_void_p
    api.PyInterpreterState_GetDict.argtypes = [ctypes.c_void_p]
    api.PyInterpreterState_GetDict.restype = ctypes.c_void_p  # borrowed: as py_object it would lose a reference
    registry = ctypes.cast(api.PyInterpreterState_GetDict(api.PyInterpreterState_Get()), ctypes.py_object).value
    return [str(key) for key in registry]
