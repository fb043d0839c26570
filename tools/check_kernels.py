"""Compiles every portable kernel as a Mac and as a machine with an NVIDIA GPU would, without either.

    python tools/check_kernels.py

For Metal by clang, whose address spaces stand in for Metal's: a pointer without its qualifier is an error here as
there. For CUDA by NVRTC, as MLX does, and no register may spill; it has no package for machines other than Linux on
x86-64, and is left out there.
The signature around a kernel's body is written as MLX writes it, from the lines "inputs:", "outputs:" and "constants:"
of the file.
"""

import ctypes
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TYPES = ["float", "float16_t", "bfloat16_t"]
METAL = """
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
// Metal's keywords that C++ would take for names.
#define half _Float16
#define kernel
#define vertex
#define fragment
using size_t = decltype(sizeof(0));
using uint = unsigned int;
using ushort = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
using uint8_t = unsigned char;
using int8_t = signed char;
using float16_t = _Float16;
using bfloat16_t = __bf16;
struct uint3 { uint x, y, z; };
typedef float float4 __attribute__((ext_vector_type(4)));
namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
float simd_sum(float);
float simd_max(float);
float simd_shuffle_xor(float, ushort);
int simd_shuffle_xor(int, ushort);
float simd_broadcast(float, ushort);
int simd_broadcast(int, ushort);
float exp(float);
float log(float);
float rsqrt(float);
namespace precise {
float tanh(float);
float cos(float);
float sin(float);
}
float abs(float);
int abs(int);
float max(float, float);
int max(int, int);
float min(float, float);
int min(int, int);
}  // namespace metal
using namespace metal;
float log1p(float);
template <typename T, int, int>
struct simdgroup_matrix {
  T elements[2];
  T* thread_elements() { return elements; }
};
template <typename M>
void simdgroup_multiply_accumulate(M&, M&, M&, M&);
template <typename To, typename From>
To as_type(From bits) {
  return __builtin_bit_cast(To, bits);
}
enum atomic_uint : uint {};  // a class can't be made in another address space
enum memory_order { memory_order_relaxed };
uint atomic_fetch_add_explicit(threadgroup atomic_uint*, uint, memory_order);
uint atomic_fetch_max_explicit(threadgroup atomic_uint*, uint, memory_order);
uint atomic_load_explicit(threadgroup atomic_uint*, memory_order);
void atomic_store_explicit(threadgroup atomic_uint*, uint, memory_order);
"""
# A variable of a function can't lie in another address space for clang, a static one can.
SHARED = "#undef SHARED\n#define SHARED static threadgroup\n"
ATTRIBUTES = """  uint thread_index_in_threadgroup,
  uint thread_index_in_simdgroup,
  uint simdgroup_index_in_threadgroup,
  uint3 threadgroup_position_in_grid"""


CUDA = """
using int8_t = signed char;
using uint8_t = unsigned char;
using int32_t = int;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using float16_t = __half;
using bfloat16_t = __nv_bfloat16;
struct Shape {
  int sizes[8];
  __device__ int operator[](int axis) const { return sizes[axis]; }
};
"""
CUDA_ARCHITECTURE = "sm_80"  # the oldest with the matrix units that kernels use


def declared(text: str, label: str) -> list[list[str]]:
    """The words of each declaration in the lines "// <label>: …"."""
    lines = re.findall(rf"^// {label}: (.*)$", text, re.MULTILINE)
    if not lines:
        raise ValueError(f'there is no line "// {label}: …"')
    return [declaration.split() for line in lines for declaration in line.split(",")]


def constants_text(kernel: str, element_type: str) -> str:
    return "".join(
        f"using {name} = {element_type};\n" if value in TYPES else f"constexpr int {name} = {value};\n"
        for name, _, value in declared(kernel, "constants")
    )


def metal_text(kernel: str, element_type: str, input_space: str) -> str:
    """A translation unit with the kernel as a function; its inputs lie in input_space."""
    parameters = []
    for *marks, kind, name in declared(kernel, "inputs"):
        parameters.append(f"  const {'device' if marks == ['large'] else input_space} {kind}* {name}")
        if f"{name}_shape" in kernel:
            parameters.append(f"  const constant int* {name}_shape")
    parameters += [f"  device {kind}* {name}" for kind, name in declared(kernel, "outputs")]
    prologue = (ROOT / "csrc/kernels/metal.prologue").read_text()
    signature = "void kernel_function(\n" + ",\n".join([*parameters, ATTRIBUTES]) + ") {\n"
    constants = constants_text(kernel, element_type)
    return METAL + prologue + SHARED + constants + signature + "#line 1\n" + kernel + "\n}\n"


def cuda_text(kernel: str, element_type: str) -> str:
    parameters = []
    for *_, kind, name in declared(kernel, "inputs"):
        parameters.append(f"  const {kind}* {name}")
        if f"{name}_shape" in kernel:
            parameters.append(f"  const __grid_constant__ Shape {name}_shape")
    parameters += [f"  {kind}* {name}" for kind, name in declared(kernel, "outputs")]
    prologue = (ROOT / "csrc/kernels/cuda.prologue").read_text()
    signature = 'extern "C" __global__ void kernel_function(\n' + ",\n".join(parameters) + ") {\n"
    return (
        CUDA
        + prologue
        + constants_text(kernel, element_type)
        + signature
        + "#line 1\n"
        + with_includes(kernel)
        + "\n}\n"
    )


def with_includes(kernel: str) -> str:
    """The kernel as it is embedded, see csrc/CMakeLists.txt."""
    return re.sub('#include "(.*)"\n', lambda match: (ROOT / "csrc" / match[1]).read_text(), kernel)


def compile_error(text: str) -> str:
    """What clang says, or nothing."""
    options = ["-x", "c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unused-variable"]
    options += ["-I", str(ROOT / "csrc")]
    command = [sys.executable, "-m", "ziglang", "clang", "--target=aarch64-linux-gnu", *options, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stderr


class Nvrtc:
    """NVIDIA's run-time compiler, which needs no GPU."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(next(folder.glob("lib/libnvrtc.so.*"))))
        self._options = [f"--gpu-architecture={CUDA_ARCHITECTURE}", "-std=c++20", f"-I{folder / 'include'}"]
        self._options.append("--ptxas-options=-v")  # says what spills

    def compile_error(self, text: str) -> str:
        """What it says if it fails or registers spill, or nothing."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._call("CreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
        options = (ctypes.c_char_p * len(self._options))(*(option.encode() for option in self._options))
        compiled = self._library.nvrtcCompileProgram(program, len(options), options) == 0
        self._call("GetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self._call("GetProgramLog", program, log)
        self._call("DestroyProgram", ctypes.byref(program))
        text = log.value.decode()
        return "" if compiled and not re.search("[1-9][0-9]* bytes spill", text) else text

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, f"nvrtc{function}")(*arguments)
        if status:
            raise RuntimeError(f"nvrtc{function} fails with {status}")


def find_nvrtc() -> Nvrtc | None:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / "cu13" for folder in (spec and spec.submodule_search_locations) or []]
    return next((Nvrtc(folder) for folder in folders if list(folder.glob("lib/libnvrtc.so.*"))), None)


def metal_faults(kernel: str) -> list[str]:
    return [
        f"T = {element_type}, inputs in {space} memory:\n{error}"
        for element_type in element_types(kernel)
        for space in ("device", "constant")
        if (error := compile_error(metal_text(kernel, element_type, space)))
    ]


def cuda_faults(nvrtc: Nvrtc, kernel: str) -> list[str]:
    return [
        f"T = {element_type}:\n{error}"
        for element_type in element_types(kernel)
        if (error := nvrtc.compile_error(cuda_text(kernel, element_type)))
    ]


def element_types(kernel: str) -> list[str]:
    if "T = float" not in kernel:
        return TYPES[:1]
    return TYPES[1:] if "MATRIX_" in with_includes(kernel) else TYPES  # matrix units want 16 bits


def main() -> int:
    files = sorted(ROOT.glob("csrc/**/*.kernel"))
    nvrtc = find_nvrtc()
    failed = False
    for file in files:
        kernel = file.read_text()
        for fault in metal_faults(kernel) + (cuda_faults(nvrtc, kernel) if nvrtc else []):
            print(f"{file.relative_to(ROOT)}: {fault}")
            failed = True
    language = "Metal's C++ and as CUDA" if nvrtc else "Metal's C++; for CUDA there is no compiler here"
    print("Some kernels don't compile." if failed else f"All {len(files)} kernels compile as {language}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
