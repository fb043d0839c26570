#include "common/cpu_info.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mlx_server {

#if defined(__linux__)
namespace {

// Cores of one SMT pair count once: two hyperthreads share the FMA units that the kernels saturate.
int cores_in_affinity_mask() {
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) {
    return static_cast<int>(std::thread::hardware_concurrency());
  }
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &mask)) {
      std::string core = std::to_string(cpu);
      std::ifstream("/sys/devices/system/cpu/cpu" + core + "/topology/thread_siblings_list") >> core;
      cores.insert(core);
    }
  }
  return static_cast<int>(cores.size());
}

// CPUs' worth of time that the cgroup and its ancestors grant, or infinity.
double cgroup_quota() {
  double quota = INFINITY;
  std::string path;
  std::ifstream memberships("/proc/self/cgroup");
  for (std::string line; std::getline(memberships, line);) {
    if (line.starts_with("0::")) {
      path = line.substr(3);
    }
  }
  const auto limit = [&quota](const std::string& allowed, double period) {
    if (!allowed.empty() && allowed != "max" && allowed != "-1" && period > 0) {
      quota = std::min(quota, std::stod(allowed) / period);
    }
  };
  for (;; path.resize(path.rfind('/'))) {
    std::string allowed;
    double period = 0;
    std::ifstream("/sys/fs/cgroup" + path + "/cpu.max") >> allowed >> period;
    limit(allowed, period);
    if (path.find('/') == std::string::npos) {
      break;
    }
  }
  std::string allowed;  // cgroup v1, as seen from inside a container
  double period = 0;
  std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> allowed;
  std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  limit(allowed, period);
  return quota;
}

}  // namespace

int available_cores() {
  const double cores = std::min<double>(cores_in_affinity_mask(), std::ceil(cgroup_quota()));
  return std::max(1, static_cast<int>(cores));
}

#elif defined(__APPLE__)

// Performance cores only: an efficiency core would be the last to finish each parallel section.
int available_cores() {
  int cores = 0;
  size_t size = sizeof(cores);
  if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, nullptr, 0) != 0) {
    cores = static_cast<int>(std::thread::hardware_concurrency());
  }
  return std::max(1, cores);
}

#else

int available_cores() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

#endif

#if defined(__x86_64__)

bool cpu_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#else

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }

#endif

}  // namespace mlx_server
