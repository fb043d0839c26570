"""A GPU made of threads: the ops' own code launches kernels, and these run as plain C++ (csrc/kernels/README.md).

So it is tested without a GPU what a launch gives a kernel: inputs, shapes, dtypes, constants, groups.
"""

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_server import _ext

CSRC = Path(__file__).parents[1] / "csrc"
C_TYPES = {
    mx.float32: "float",
    mx.float16: "_Float16",
    mx.bfloat16: "mlx_server::HostBfloat16",
    mx.int32: "int",
    mx.uint32: "std::uint32_t",
    mx.int8: "signed char",
    mx.uint8: "unsigned char",
    mx.uint64: "std::uint64_t",
}
ALIGNMENT = 256  # of what a GPU's memory begins at


class Simulator:
    """Compiles each kernel for its types and constants, once, into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.launched: set[str] = set()  # kernels, by name
        self._folder = folder
        self._libraries: dict[str, ctypes.CDLL] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ops take the way of an NVIDIA GPU's."""
        _ext.simulate_gpu(self._launch)
        try:
            yield
        finally:
            _ext.simulate_gpu(None)

    def _launch(
        self,
        name: str,
        text: str,
        inputs: list[mx.array],
        output_shapes: list[list[int]],
        output_dtypes: list[mx.Dtype],
        constants: dict[str, Any],
        groups: Sequence[int],
        threads: int,
    ) -> list[mx.array]:
        self.launched.add(name)
        arrays = [mx.contiguous(array) for array in inputs]
        outputs = [mx.full(shape, 77, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        mx.eval(arrays, outputs)
        buffers = [aligned(bytes_of(array)) for array in [*arrays, *outputs]]
        shapes = [(ctypes.c_int * max(array.ndim, 1))(*array.shape) for array in arrays]
        source = program(text, arrays, outputs, constants, threads)
        self._library(name, source).run(
            (ctypes.c_void_p * len(buffers))(*(buffer.ctypes.data for buffer in buffers)),
            (ctypes.c_void_p * len(shapes))(*map(ctypes.addressof, shapes)),
            (ctypes.c_int * 3)(*groups),
        )
        written = {names(text, "inputs").index(found) for found in re.findall(r"WRITABLE\(\w+, (\w+)\)", text)}
        for i, (array, buffer) in enumerate(zip([*arrays, *outputs], buffers, strict=True)):
            if i in written or i >= len(arrays):
                bytes_of(array)[:] = buffer
        return outputs

    def _library(self, name: str, source: str) -> ctypes.CDLL:
        if source not in self._libraries:
            path = self._folder / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"
            command = ["c++", "-x", "c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-I", str(CSRC)]
            subprocess.run([*command, "-o", str(path), "-"], input=source, text=True, check=True)
            self._libraries[source] = ctypes.CDLL(str(path))
        return self._libraries[source]


def program(text: str, inputs: list[mx.array], outputs: list[mx.array], constants: dict[str, Any], threads: int) -> str:
    """A library with the kernel and what runs it; `inputs` and `outputs` as the text declares them."""
    parameters, arguments = [], []
    for i, (name, array) in enumerate(zip(names(text, "inputs"), inputs, strict=True)):
        parameters += [f"const {C_TYPES[array.dtype]}* {name}", f"const int* {name}_shape"]
        arguments += [f"static_cast<const {C_TYPES[array.dtype]}*>(arrays[{i}])", f"shapes[{i}]"]
    for i, (name, array) in enumerate(zip(names(text, "outputs"), outputs, strict=True), len(inputs)):
        parameters.append(f"{C_TYPES[array.dtype]}* {name}")
        arguments.append(f"static_cast<{C_TYPES[array.dtype]}*>(arrays[{i}])")
    known = "".join(
        f"using {name} = {C_TYPES[value]};\n" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {value};\n"
        for name, value in {**constants, "THREADS": threads}.items()
    )
    return f"""
#include <cstddef>
#include <cstdint>
#include "kernels/host.h"
using std::uint32_t, std::uint64_t, std::uint8_t, std::int8_t, std::size_t;
{known}
static void kernel({", ".join(parameters)}) {{
{text}
}}
extern "C" void run(void** arrays, const int** shapes, const int* groups) {{
  mlx_server::host_launch({{groups[0], groups[1], groups[2]}}, THREADS, [&] {{ kernel({", ".join(arguments)}); }});
}}
"""


def names(text: str, label: str) -> list[str]:
    """Of the line `// inputs: …` or `// outputs: …`."""
    found = re.search(rf"^// {label}: (.*)$", text, re.MULTILINE)
    assert found is not None, text
    return [declaration.split()[-1] for declaration in found[1].split(",")]


def bytes_of(array: mx.array) -> npt.NDArray[np.uint8]:
    """The memory of an array that is computed and contiguous."""
    return np.array(array.reshape(-1).view(mx.uint8), copy=False)


def aligned(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A copy that begins as a GPU's memory does."""
    room = np.empty(data.size + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    copy = room[begin : begin + data.size]
    copy[:] = data
    return copy
