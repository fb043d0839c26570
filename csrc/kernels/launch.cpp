#include "kernels/launch.h"

#include <algorithm>
#include <sstream>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>

#include <mlx/backend/cuda/cuda.h>
#include <mlx/backend/metal/metal.h>

#include "kernel_sources.h"
#include "kernels/kernel_use.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

// MLX declares those attributes of Metal that a kernel's text mentions.
constexpr char kMetalAttributes[] =
    "// thread_index_in_threadgroup thread_index_in_simdgroup simdgroup_index_in_threadgroup "
    "threadgroup_position_in_grid\n";

// The names in the line "// <label>: type name, type name …" of a kernel.
std::vector<std::string> declared_names(std::string_view text, std::string_view label) {
  const std::string start = "// " + std::string(label) + ": ";
  const std::size_t begin = text.find(start) + start.size();
  std::istringstream line(std::string(text.substr(begin, text.find('\n', begin) - begin)));
  std::vector<std::string> names;
  for (std::string declaration; std::getline(line, declaration, ',');) {
    names.push_back(declaration.substr(declaration.rfind(' ') + 1));
  }
  return names;
}

// MLX keeps compiled kernels by name, so one name stands for one text: it depends on the types of arrays, and on Metal
// on which inputs MLX puts into constant memory, those with fewer than 8 elements.
std::string unique_name(const KernelSource& source, const KernelLaunch& launch) {
  std::ostringstream name;
  name << source.name;
  for (const mx::array& input : launch.inputs) {
    name << '_' << static_cast<int>(input.dtype().val()) << (input.size() < 8 && mx::metal::is_available() ? "c" : "");
  }
  for (const mx::Dtype& dtype : launch.output_dtypes) {
    name << "_o" << static_cast<int>(dtype.val());
  }
  return name.str();
}

// MLX copies and hashes a kernel's text each time that it is launched: without comments and indents that takes half.
std::string code_of(std::string_view text) {
  std::istringstream lines{std::string(text)};
  std::string code;
  for (std::string line; std::getline(lines, line);) {
    line.resize(std::min(line.find("//"), line.size()));
    const std::size_t begin = line.find_first_not_of(' '), end = line.find_last_not_of(' ');
    if (begin != std::string::npos) {
      code.append(line, begin, end + 1 - begin).push_back('\n');
    }
  }
  return code;
}

mx::fast::CustomKernelFunction make_kernel(const std::string& name, const KernelSource& source) {
  const auto inputs = declared_names(source.text, "inputs"), outputs = declared_names(source.text, "outputs");
  if (mx::metal::is_available()) {
    return mx::fast::metal_kernel(name, inputs, outputs, kMetalAttributes + code_of(source.text),
                                  code_of(kernel_sources::metal.text));
  }
  return mx::fast::cuda_kernel(name, inputs, outputs, code_of(source.text), code_of(kernel_sources::cuda.text));
}

Simulator& simulator() {
  static Simulator simulator;
  return simulator;
}

}  // namespace

void simulate_gpu(Simulator new_simulator) { simulator() = std::move(new_simulator); }

bool is_gpu(mx::Stream s) { return s.device == mx::Device::gpu || simulator(); }

bool is_cuda() { return mx::cu::is_available() || simulator(); }

bool has_matrix_units(mx::Device device) {
  const auto& info = mx::device_info(device);
  const auto major = info.find("compute_capability_major");
  return major == info.end() || std::get<std::size_t>(major->second) >= 8;
}

std::vector<mx::array> launch(const KernelSource& source, const KernelLaunch& launch, mx::Stream s) {
  static thread_local std::unordered_map<std::string, mx::fast::CustomKernelFunction> kernels;
  note_launch(source.name);
  if (simulator()) {
    return simulator()(source, launch);
  }
  const std::string name = unique_name(source, launch);
  auto kernel = kernels.find(name);
  if (kernel == kernels.end()) {
    kernel = kernels.emplace(name, make_kernel(name, source)).first;
  }
  auto constants = launch.constants;
  constants.emplace_back("THREADS", launch.threads);
  const auto& groups = launch.groups;
  return kernel->second(launch.inputs, launch.output_shapes, launch.output_dtypes,
                        {groups[0] * launch.threads, groups[1], groups[2]}, {launch.threads, 1, 1}, constants,
                        std::nullopt, /*verbose=*/false, s);
}

}  // namespace mlx_server
