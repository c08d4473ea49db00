// Prints the number of cores to compute with: test_cpp_build.py runs it.

#include <iostream>

#include "cores.h"

int main(int, char** argv) { std::cout << core_count(argv[1]) << std::endl; }
