// Runs a portable kernel (csrc/kernels/README.md) on the GPU that this machine has.
#pragma once

#include <array>
#include <string>
#include <utility>
#include <vector>

#include <mlx/array.h>
#include <mlx/device.h>
#include <mlx/fast.h>
#include <mlx/utils.h>

namespace mlx_server {

// A *.kernel file, as kernel_sources.h embeds it.
struct KernelSource {
  const char* name;
  const char* text;
};

struct KernelLaunch {
  std::vector<mlx::core::array> inputs;  // in the order of the file's "inputs:", made row contiguous
  std::vector<mlx::core::Shape> output_shapes;
  std::vector<mlx::core::Dtype> output_dtypes;
  std::vector<std::pair<std::string, mlx::core::fast::TemplateArg>> constants;  // known at compile time
  std::array<int, 3> groups;
  int threads;  // of a group, a multiple of 32; the kernel knows it as THREADS
};

// Whether the GPU has what kernels' MATRIX_… need: on Metal always, on CUDA from compute capability 8 on.
bool has_matrix_units(mlx::core::Device device);

// The kernel's outputs. s is a GPU stream.
std::vector<mlx::core::array> launch(const KernelSource& source, const KernelLaunch& launch, mlx::core::Stream s);

}  // namespace mlx_server
