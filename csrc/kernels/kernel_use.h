// Which kernels the ops may use, by the name of a kernel's file without its ending, and what is asked of them. Of the
// whole process and without a lock: ops are called from one thread.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

namespace mlx_server {

// From now on ops take their next best way instead of this kernel: another one, or the fallback graph.
void disable_kernel(const std::string& name);

bool are_enabled(std::initializer_list<std::string_view> names);

// The first that is enabled, where an op names them from the best on; empty if none is.
std::string_view first_enabled(std::initializer_list<std::string_view> names);

// Whether a row's result must be the same to the last bit in any batch, and however its prompt is cut: ops then compute
// many rows as they compute one, by kernels of ours, and throw where there is none.
void set_batch_invariant(bool wanted);
bool is_batch_invariant();

void note_launch(std::string_view name);

// What has been launched since the last call, in the order of names.
std::vector<std::string> take_launched_kernels();

}  // namespace mlx_server
