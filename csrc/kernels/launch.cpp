#include "kernels/launch.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <sstream>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <mlx/backend/cuda/cuda.h>
#include <mlx/backend/metal/metal.h>

#include "kernel_sources.h"
#include "kernels/kernel_use.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr std::size_t kMaxForms = 1024;

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

// Whether MLX puts an input into Metal's constant memory.
bool is_constant(const mx::array& input) { return input.size() < 8 && mx::metal::is_available(); }

// MLX keeps compiled kernels by name, so one name stands for one text: it depends on the types of arrays, and on Metal
// on which inputs are in constant memory.
std::string unique_name(const KernelSource& source, const KernelLaunch& launch) {
  std::ostringstream name;
  name << source.name;
  for (const mx::array& input : launch.inputs) {
    name << '_' << static_cast<int>(input.dtype().val()) << (is_constant(input) ? "c" : "");
  }
  for (const mx::Dtype& dtype : launch.output_dtypes) {
    name << "_o" << static_cast<int>(dtype.val());
  }
  return name.str();
}

// Without comments and indents.
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

// A line that includes the text from a file in memory, where the system has such files; else the text itself. MLX
// hashes a kernel's text whenever it is launched on CUDA, which takes as long as the rest of a launch. The line has a
// hash of the text, as MLX may keep by it what it has compiled.
std::string include_line(const KernelSource& source) {
  std::string code = code_of(source.text);
#ifdef __linux__
  const int file = memfd_create(source.name, MFD_CLOEXEC);  // open as long as the process lives
  if (file >= 0 && write(file, code.data(), code.size()) == static_cast<ssize_t>(code.size())) {
    std::ostringstream line;
    line << "#include \"/proc/self/fd/" << file << "\" // " << std::hash<std::string>{}(code) << '\n';
    return line.str();
  }
#endif
  return code;
}

// One file for each source.
const std::string& cuda_text(const KernelSource& source) {
  static thread_local std::unordered_map<const char*, std::string> lines;
  const auto known = lines.find(source.name);
  return known != lines.end() ? known->second : lines.emplace(source.name, include_line(source)).first->second;
}

mx::fast::CustomKernelFunction make_kernel(const std::string& name, const KernelSource& source) {
  const auto inputs = declared_names(source.text, "inputs"), outputs = declared_names(source.text, "outputs");
  if (mx::metal::is_available()) {
    return mx::fast::metal_kernel(name, inputs, outputs, kMetalAttributes + code_of(source.text),
                                  code_of(kernel_sources::metal.text));
  }
  // MLX gives a kernel those shapes that its text mentions.
  std::string shapes = "//";
  for (const std::string& input : inputs) {
    const std::string shape = input + "_shape";
    shapes += std::string_view(source.text).find(shape) != std::string_view::npos ? ' ' + shape : "";
  }
  return mx::fast::cuda_kernel(name, inputs, outputs, shapes + '\n' + cuda_text(source),
                               cuda_text(kernel_sources::cuda));
}

const mx::fast::CustomKernelFunction& kernel_of(const KernelSource& source, const KernelLaunch& launch) {
  static thread_local std::unordered_map<std::string, mx::fast::CustomKernelFunction> kernels;
  const std::string name = unique_name(source, launch);
  const auto known = kernels.find(name);
  return known != kernels.end() ? known->second : kernels.emplace(name, make_kernel(name, source)).first->second;
}

// All that MLX makes a primitive of: launches alike in it can share one, whose text is written once.
std::string form_of(const KernelSource& source, const KernelLaunch& launch, mx::Stream s) {
  std::string form;
  form.reserve(256);
  const auto add = [&form](auto value) { form.append(reinterpret_cast<const char*>(&value), sizeof(value)); };
  add(source.name);
  add(s.index);
  for (const mx::array& input : launch.inputs) {
    add(input.dtype().val());
    add(is_constant(input));
  }
  for (const mx::Dtype& dtype : launch.output_dtypes) {
    add(dtype.val());
  }
  for (const auto& [name, value] : launch.constants) {
    const auto* dtype = std::get_if<mx::Dtype>(&value);
    add(dtype ? static_cast<int>(dtype->val()) : std::get<int>(value));
  }
  add(launch.groups);
  add(launch.threads);
  return form;
}

Simulator& simulator() {
  static Simulator simulator;
  return simulator;
}

}  // namespace

void simulate_gpu(Simulator new_simulator) { simulator() = std::move(new_simulator); }

bool is_gpu(mx::Stream s) { return s.device == mx::Device::gpu || simulator(); }

bool is_cuda() { return mx::cu::is_available() || simulator(); }

bool has_matrix_units() {
  if (!mx::cu::is_available()) {
    return true;
  }
  static const bool has_units = [] {  // the driver takes its time to answer
    return std::get<std::size_t>(mx::device_info(mx::Device::gpu).at("compute_capability_major")) >= 8;
  }();
  return has_units;
}

std::vector<mx::array> launch(const KernelSource& source, const KernelLaunch& launch, mx::Stream s) {
  static thread_local std::unordered_map<std::string, std::shared_ptr<mx::Primitive>> primitives;
  note_launch(source.name);
  if (simulator()) {
    return simulator()(source, launch);
  }
  std::string form = form_of(source, launch, s);
  const auto known = primitives.find(form);
  if (known != primitives.end()) {
    return mx::array::make_arrays(launch.output_shapes, launch.output_dtypes, known->second, launch.inputs);
  }
  auto constants = launch.constants;
  constants.emplace_back("THREADS", launch.threads);
  const auto& groups = launch.groups;
  auto outputs = kernel_of(source, launch)(launch.inputs, launch.output_shapes, launch.output_dtypes,
                                           {groups[0] * launch.threads, groups[1], groups[2]}, {launch.threads, 1, 1},
                                           constants, std::nullopt, /*verbose=*/false, s);
  if (primitives.size() == kMaxForms) {
    primitives.clear();
  }
  primitives.emplace(std::move(form), outputs[0].primitive_ptr());
  return outputs;
}

}  // namespace mlx_server
