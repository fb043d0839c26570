"""Compiles every portable kernel as a Mac would, without a Mac.

    python tools/check_kernels.py

clang's address spaces stand in for Metal's: a pointer without its qualifier is an error here as there. The signature
around a kernel's body is written as MLX writes it, from the lines "inputs:", "outputs:" and "constants:" of the file.
"""

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


def declared(text: str, label: str) -> list[list[str]]:
    """The words of each declaration in the lines "// <label>: …"."""
    lines = re.findall(rf"^// {label}: (.*)$", text, re.MULTILINE)
    if not lines:
        raise ValueError(f'there is no line "// {label}: …"')
    return [declaration.split() for line in lines for declaration in line.split(",")]


def metal_text(kernel: str, element_type: str, input_space: str) -> str:
    """A translation unit with the kernel as a function; its inputs lie in input_space."""
    constants = "".join(
        f"using {name} = {element_type};\n" if value in TYPES else f"constexpr int {name} = {value};\n"
        for name, _, value in declared(kernel, "constants")
    )
    parameters = []
    for *marks, kind, name in declared(kernel, "inputs"):
        parameters.append(f"  const {'device' if marks == ['large'] else input_space} {kind}* {name}")
        if f"{name}_shape" in kernel:
            parameters.append(f"  const constant int* {name}_shape")
    parameters += [f"  device {kind}* {name}" for kind, name in declared(kernel, "outputs")]
    prologue = (ROOT / "csrc/kernels/metal.prologue").read_text()
    signature = "void kernel_function(\n" + ",\n".join([*parameters, ATTRIBUTES]) + ") {\n"
    return METAL + prologue + SHARED + constants + signature + "#line 1\n" + kernel + "\n}\n"


def compile_error(text: str) -> str:
    """What clang says, or nothing."""
    options = ["-x", "c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unused-variable"]
    options += ["-I", str(ROOT / "csrc")]
    command = [sys.executable, "-m", "ziglang", "clang", "--target=aarch64-linux-gnu", *options, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stderr


def faults(kernel: str) -> list[str]:
    return [
        f"T = {element_type}, inputs in {space} memory:\n{error}"
        for element_type in (TYPES if "T = float" in kernel else TYPES[:1])
        for space in ("device", "constant")
        if (error := compile_error(metal_text(kernel, element_type, space)))
    ]


def main() -> int:
    files = sorted(ROOT.glob("csrc/**/*.kernel"))
    failed = False
    for file in files:
        for fault in faults(file.read_text()):
            print(f"{file.relative_to(ROOT)}: {fault}")
            failed = True
    print("Some kernels don't compile." if failed else f"All {len(files)} kernels compile as Metal's C++.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
