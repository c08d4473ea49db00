// How many cores there are to compute with.
#pragma once

#include <filesystem>

// Those that taskset or a container gives, and no more than the quota of the control group; a part of a core counts as
// one. root: the folder of proc and sys.
int core_count(const std::filesystem::path& root = "/");
