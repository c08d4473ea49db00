#include "cores.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;

// The first words of a file that are numbers; none if it is missing, or says "max".
std::vector<double> read_numbers(const fs::path& path) {
  std::ifstream file(path);
  std::vector<double> numbers;
  for (double number; file >> number;) numbers.push_back(number);
  return numbers;
}

// The cores that one control group allows, of version 2 or 1; infinite without a limit.
double quota_of(const fs::path& group) {
  std::vector<double> numbers = read_numbers(group / "cpu.max");
  if (numbers.empty()) {
    for (const char* const name : {"cpu.cfs_quota_us", "cpu.cfs_period_us"})  // a quota of -1 is no limit
      for (const double number : read_numbers(group / name)) numbers.push_back(number);
  }
  return numbers.size() == 2 && numbers[0] > 0 && numbers[1] > 0 ? numbers[0] / numbers[1] : HUGE_VAL;
}

// The least quota of a group and of those above it.
double quota_up_to(const fs::path& top, const std::string& path) {
  double quota = quota_of(top);
  fs::path group = top;
  for (const auto& part : fs::path(path).relative_path()) quota = std::min(quota, quota_of(group /= part));
  return quota;
}

// A container may see the path that its group has outside of it, while its own group is at the top: each is tried.
double quota(const fs::path& root) {
  const fs::path mount = root / "sys/fs/cgroup";
  double least = std::min(quota_of(mount), quota_of(mount / "cpu"));
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // 0::/path, or 4:cpu,cpuacct:/path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") least = std::min(least, quota_up_to(mount, path));
    if (controllers.find(",cpu,") != std::string::npos) least = std::min(least, quota_up_to(mount / "cpu", path));
  }
  return least;
}

}  // namespace

int core_count(const fs::path& root) {
  cpu_set_t own;
  const int cores = sched_getaffinity(0, sizeof(own), &own) == 0 ? CPU_COUNT(&own) : 1;
  return static_cast<int>(std::ceil(std::min<double>(cores, quota(root))));
}
