// Runs a portable kernel (csrc/kernels/README.md) on the GPU that this machine has.
#pragma once

#include <array>
#include <functional>
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

// Computes the outputs of a launch in place of a GPU.
using Simulator = std::function<std::vector<mlx::core::array>(const KernelSource&, const KernelLaunch&)>;

// From now on ops on CPU streams take the way that they take on an NVIDIA GPU, until the simulator is an empty one. For
// tests, as `set_batch_invariant`.
void simulate_gpu(Simulator simulator);

// Whether ops on the stream launch kernels.
bool is_gpu(mlx::core::Stream s);

// Whether the GPU is NVIDIA's.
bool is_cuda();

// Whether the GPU has what kernels' MATRIX_… need: on Metal always, on CUDA from compute capability 8 on.
bool has_matrix_units();

// The kernel's outputs. s is one of a GPU, as `is_gpu` says.
std::vector<mlx::core::array> launch(const KernelSource& source, const KernelLaunch& launch, mlx::core::Stream s);

}  // namespace mlx_server
