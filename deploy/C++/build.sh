#!/bin/sh
# Builds the C++ server against the installed Paddle wheel: sh deploy/C++/build.sh [OPTIONS]
#
#   --install-packages  install the Debian or Ubuntu packages that are missing (as root), and build nothing
#   --build-dir FOLDER  build there instead of in deploy/C++/build
#   --sanitize          with AddressSanitizer
#   --fuzz              the fuzzer of the parsers instead of the server (with clang 14, that of Debian 12)
#   --python PYTHON     the Python with Paddle, by default .venv/bin/python, else python3
set -eu

fail() {
    echo "error: $*" >&2
    exit 2
}

here=$(cd -- "$(dirname -- "$0")" && pwd)
build=$here/build
packages="g++ cmake make libboost-dev libprotobuf-dev protobuf-compiler zlib1g-dev"
python=$here/../../.venv/bin/python
[ -x "$python" ] || python=python3
install_packages=
sanitize=OFF
fuzz=OFF
while [ $# -gt 0 ]; do
    case $1 in
    --install-packages) install_packages=1 ;;
    --build-dir) build=${2:?--build-dir needs a folder} && shift ;;
    --sanitize) sanitize=ON ;;
    --fuzz) fuzz=ON && packages="$packages clang libclang-rt-14-dev" ;;
    --python) python=${2:?--python needs a program} && shift ;;
    *) fail "unknown option '$1'; the head of $0 lists them" ;;
    esac
    shift
done

missing=
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing="$missing $package"
done
if [ -n "$missing" ] && [ -n "$install_packages" ]; then
    [ "$(id -u)" = 0 ] || fail "only root can install packages: sudo apt-get install$missing"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >&2 ||
        fail "apt-get could not install$missing"
elif [ -n "$missing" ]; then
    fail "these packages are missing: sudo apt-get install$missing"
fi
[ -z "$install_packages" ] || exit 0

settings=$("$python" - <<'PY'
import importlib.util, os, sys, sysconfig

paddle = importlib.util.find_spec("paddle")
if paddle is None:
    sys.exit(f"error: {sys.executable} has no Paddle; run sh scripts/setup.sh, or name another Python with --python")
folder = os.path.realpath(os.path.dirname(paddle.origin))
with open(os.path.join(folder, "version", "__init__.py")) as file:
    cpu = any(line.split("=")[0].strip() == "cuda_version" and "False" in line for line in file)
libraries = sysconfig.get_config_var("LIBDIR")
library = os.path.join(libraries, sysconfig.get_config_var("INSTSONAME") or "")
if not os.path.isfile(library):
    version = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"error: {library} is missing: sudo apt-get install libpython{version}")
print(f"-DPADDLE_FOLDER={folder}", f"-DPADDLE_WITHOUT_GPU={'ON' if cpu else 'OFF'}", sep="\n")
print(f"-DPYTHON_LIBRARY={library}", f"-DPYTHON_LIBRARY_FOLDER={libraries}", sep="\n")
PY
) || exit 2

# Two concurrent builds in one folder would damage each other's files.
mkdir -p -- "$build"
if command -v flock >/dev/null; then
    exec 9>"$build/lock"
    flock 9
fi

# CMake refuses its cache after the repository was moved or copied.
cached=$(sed -n 's/^CMAKE_CACHEFILE_DIR:INTERNAL=//p' "$build/CMakeCache.txt" 2>/dev/null || true)
[ -z "$cached" ] || [ "$cached" -ef "$build" ] || rm -rf "$build/CMakeCache.txt" "$build/CMakeFiles"

set -f  # the settings are lines, which may hold spaces and asterisks
IFS='
'
compiler=
[ "$fuzz" = OFF ] || compiler=-DCMAKE_CXX_COMPILER=clang++
cmake -S "$here/server" -B "$build" -DCMAKE_BUILD_TYPE=$([ $sanitize = ON ] && echo None || echo Release) -DSANITIZE=$sanitize -DFUZZ=$fuzz \
    $compiler $settings >"$build.log" 2>&1 && cmake --build "$build" -j "$(nproc)" >>"$build.log" 2>&1 || {
    grep -aE 'error|Error' "$build.log" | head -n 5 >&2 || true
    fail "the build failed (details: $build.log)"
}
if [ "$fuzz" = ON ]; then echo "$build/fuzz"; else echo "$build/serving"; fi
