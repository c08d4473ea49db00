#!/bin/sh
# Makes .venv and installs requirements.lock into it; see --help.
#
# .venv/setup/ holds a stamp for each part that is completely installed. The stamp `base` is missing while anything
# changes, so that the next run starts over after an interrupted set-up.
set -eu

cd "$(dirname -- "$0")/.."
export PIP_PROGRESS_BAR=off PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
without_wheels='jieba seqeval' # and hnswlib, which needs a compiler
all_extras='milvus onnx openvino serving tests'
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_REQUIRE_HASHES # with these pip installs elsewhere, or fails

usage() {
    cat <<'EOF'
usage: sh scripts/setup.sh [--cpu | --gpu [CUDA]] [--milvus] [--onnx] [--openvino] [--serving]
                           [--tests | --fast-tests] [--benchmarks]

Creates .venv in the repository root and installs requirements.lock into it. If there is nothing to do, it returns at
once; after an interruption it starts over. .venv belongs to this script: packages that you add to it may be lost.

  --gpu [CUDA]   Paddle's GPU build instead of the CPU build; CUDA is cu118, cu126 (the default), cu129, ...
  --cpu          back to the CPU build (by default .venv keeps its build; a new .venv has the CPU build)
  --milvus       also what recall.py --ann milvus needs: a client, and Milvus Lite for an embedded one
  --onnx         also what export_model.py --format onnx needs
  --openvino     also what --engine openvino and --precision int8 need
  --serving      also Paddle Serving, which deploy/python/web_service.py needs
  --tests        also what the tests need, including the four above; as root also Debian's or Ubuntu's Chromium
  --fast-tests   also what sh scripts/test.sh --fast needs
  --benchmarks   also .venv-benchmarks, with PyTorch, sentence-transformers and others for the benchmarks; needs Python
                 3.11 or 3.12 and another 3 GB
  -h, --help     this text

Environment: PYTHON is the Python to use; by default the first of python3.11, python3.12, python3.10 and python3 that is
3.10, 3.11 or 3.12. pip's own settings apply (PIP_INDEX_URL, HTTPS_PROXY, pip.conf, ...).
EOF
}

say() { echo "setup: $*"; }

fail() {
    echo "setup: error: $*" >&2
    exit 2
}

# Sets python and version to a Python that can create environments; if .venv itself is active, its base Python.
find_python() {
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.11 python3.12 python3.10 python3; fi
    found=
    for python; do
        probe='import sys; print("%d.%d.%d %s" % (sys.version_info[:3] + (getattr(sys, "_base_executable", sys.executable),)))'
        version=$("$python" -c "$probe" 2>/dev/null) || continue
        python=${version#* }
        version=${version%% *}
        case $version in
        3.10.* | 3.11.* | 3.12.*)
            "$python" -c 'import ensurepip, venv' 2>/dev/null ||
                fail "Python $version ($python) has no venv module; Debian, Ubuntu: sudo apt-get install python${version%.*}-venv"
            return
            ;;
        esac
        found="found Python $version ($python)"
    done
    fail "${found:-found no Python${PYTHON:+ at $PYTHON}}; this needs 3.10, 3.11 or 3.12: install one" \
        "(with apt-get, conda or pyenv) and name it, as in PYTHON=/path/to/python3.11 sh scripts/setup.sh"
}

# Waits for another run of this script on $env, and makes further runs wait.
lock_env() {
    command -v flock >/dev/null || return 0
    exec 9>"$env/setup/lock"
    flock -n 9 || { say "waiting for another run of this script" && flock 9; }
}

# Creates the environment $env, which will take $1 GB.
make_env() {
    [ ! -h "$env" ] || fail "$env is a link to an environment of other packages; remove the link and run this again"
    say "making $env with Python $version ($python)"
    rm -f "$env/setup/base" "$env/setup/hnswlib"
    for extra in $all_extras; do rm -f "$env/setup/$extra"; done
    rm -rf "$env/bin" "$env/lib" "$env/lib64" "$env/include" "$env/share" "$env/pyvenv.cfg"
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1000000) }')
    [ "$free" -ge "$1" ] || fail "$env needs about $1 GB of disk space, and $PWD has $free GB left; make room and run this again"
    log_start=1
    "$python" -m venv "$env" >"$env/setup.log" 2>&1 || install_failed
}

find_site_packages() { "$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# Paddle's launcher imports Paddle before any code of ours runs, so irrelevant warnings of third parties are turned off
# in the environment itself.
quiet_third_parties() {
    site_packages=$(find_site_packages)
    for warning in "No ccache found" "Setuptools is replacing distutils"; do
        echo "import warnings; warnings.filterwarnings('ignore', '$warning')"
    done >"$site_packages/quiet_third_parties.pth"
}

# pip install into $env; its output goes to the log, in which that of this call starts at line $log_start.
install() {
    log_start=$(($(wc -l <"$env/setup.log") + 1))
    "$env/bin/python" -m pip install "$@" >>"$env/setup.log" 2>&1
}

# Installs exactly what a lock file says. Packages without wheels are built with the setuptools in .venv.
install_locked() { install --no-deps --require-hashes --no-build-isolation --use-pep517 "$@"; }

log_tail() { tail -n "+$log_start" "$env/setup.log"; }

network_failed() {
    log_tail | grep -qE 'NewConnectionError|NameResolutionError|Timeout|ProxyError|SSLError|ProtocolError|IncompleteRead|ConnectionResetError'
}

install_failed() {
    if log_tail | grep -q 'No space left on device'; then
        fail "the disk is full; free some space and run this again (details: $env/setup.log)"
    elif network_failed; then
        fail "no network: pip could not reach its package index. Check the connection or the proxy (HTTPS_PROXY), or" \
            "name a mirror, as in PIP_INDEX_URL=https://pypi.tuna.tsinghua.edu.cn/simple sh scripts/setup.sh" \
            "(details: $env/setup.log)"
    fi
    reason=$(log_tail | grep -i error | tail -n 1 || true)
    fail "${reason:-the installation stopped without a message} (details: $env/setup.log)"
}

# Writes the entries of the lock file $3 (by default requirements.lock) for the packages $2 ($1 = 1), or for all others
# ($1 = 0), to part.txt.
lock_part() {
    awk -v keep="$1" -v names="$2" '
        BEGIN { for (i = split(names, list, " "); i > 0; i--) named[list[i]] = 1 }
        /^[A-Za-z0-9]/ { split($0, line, "=="); chosen = (line[1] in named) == keep }
        chosen' "${3:-requirements.lock}" >"$env/setup/part.txt"
}

install_base() {
    find_python
    for extra in $all_extras; do # a new environment has what the old one had
        [ ! -e "$env/setup/$extra" ] || extras="$extras $extra"
    done
    echo "$device" >"$env/setup/device"
    case $device in cpu) make_env 3 ;; *) make_env 12 ;; esac
    say "installing requirements.lock (minutes; details: $env/setup.log)"
    paddle=
    [ "$device" = cpu ] || paddle=paddlepaddle
    lock_part 0 "$without_wheels hnswlib $paddle"
    install_locked -r "$env/setup/part.txt" || install_failed
    [ "$device" = cpu ] || install_paddle_gpu || install_failed
    lock_part 1 "$without_wheels"
    install_locked -r "$env/setup/part.txt" || install_failed
    install_hnswlib
    quiet_third_parties
    say "starting Paddle and PaddleNLP once"
    log_start=$(($(wc -l <"$env/setup.log") + 1))
    "$env/bin/python" -c 'import paddle, paddlenlp' >>"$env/setup.log" 2>&1 || install_failed
    echo "$base" >"$env/setup/base"
}

# Paddle's own index has the GPU builds, which bring the CUDA libraries; everything else keeps the lock's versions.
install_paddle_gpu() {
    say "installing Paddle for $device (gigabytes)"
    sed -n 's/^\([A-Za-z0-9][^\\]*\).*/\1/p' "$env/setup/part.txt" >"$env/setup/constraints.txt"
    install -c "$env/setup/constraints.txt" \
        --extra-index-url "https://www.paddlepaddle.org.cn/packages/stable/$device/" \
        "paddlepaddle-gpu==$(sed -n 's/^paddlepaddle==\([^ ;]*\).*/\1/p' requirements.lock)"
}

# Prints what is missing for compiling hnswlib, or nothing.
hnswlib_lacks() {
    "$env/bin/python" - <<'EOF'
import os, shutil, sys, sysconfig

compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
if not shutil.which(compiler.split()[0]):
    print("a C++ compiler (Debian, Ubuntu: sudo apt-get install g++)")
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("Python's headers (Debian, Ubuntu: sudo apt-get install python%d.%d-dev)" % sys.version_info[:2])
EOF
}

# hnswlib has no wheels. It is built for this machine's processor: a wheel cached on another machine could crash here.
install_hnswlib() {
    lacks=$(hnswlib_lacks)
    if [ -z "$lacks" ]; then
        say "compiling hnswlib"
        lock_part 1 hnswlib
        if install_locked --no-cache-dir --force-reinstall -r "$env/setup/part.txt"; then
            : >"$env/setup/hnswlib"
            return
        fi
        if network_failed; then install_failed; fi
        lacks="a build of hnswlib that works (details: $env/setup.log)"
    fi
    say "note: the HNSW index (--ann hnswlib) lacks $lacks;" \
        "all else works, with --ann exact. Then run sh scripts/setup.sh again to add it."
}

# The lock file of an extra; a stamp with the name of the extra says that it is installed.
extra_lock() { case $1 in tests) echo tests/requirements.lock ;; *) echo "deploy/$1/requirements.lock" ;; esac }

extra_is_current() { [ "$(stamp "$1")" = "$(cksum <"$(extra_lock "$1")")" ]; }

install_extra_lock() {
    client=paddle-serving-client # has wheels for Python 3.9 and older alone; its Python part runs on later ones
    lock_part 0 "$client" "$(extra_lock "$1")"
    install_locked -r "$env/setup/part.txt" || return
    [ "$1" = serving ] || return 0
    lock_part 1 "$client" "$(extra_lock "$1")"
    site_packages=$(find_site_packages)
    install --no-deps --require-hashes --upgrade --python-version 3.9 --implementation cp --only-binary=:all: \
        --target "$site_packages" -r "$env/setup/part.txt"
}

# At its end Paddle Serving starts the server in a shell, waits for it, and ignores its exit code; SIGTERM would end only
# the waiting process. This makes the server replace that process, and passes --use_trt on, also without a GPU.
patch_serving() {
    server=$(find_site_packages)/paddle_serving_server/server.py
    command='command + "-use_trt " * ("--use_trt" in sys.argv)'
    ! grep -q 'os\.system(command)' "$server" ||
        sed -i "s/^\( *\).*os\.system(command).*/\1sys.stdout.flush(); os.execvp('sh', ['sh', '-c', $command])/" "$server"
}

install_extra() {
    say "installing $(extra_lock "$1")"
    rm -f "$env/setup/base"
    if install_extra_lock "$1"; then
        cksum <"$(extra_lock "$1")" >"$env/setup/$1"
    elif network_failed; then # pip downloads everything before it changes anything
        echo "$base" >"$env/setup/base"
        install_failed
    else
        install_failed
    fi
    echo "$base" >"$env/setup/base"
}

# PyTorch's CPU builds are on its own index, so they can't be in the lock.
install_benchmarks() {
    find_python
    case $version in 3.10.*) fail "the benchmarks need Python 3.11 or 3.12, this is $version ($python); name one with PYTHON" ;; esac
    make_env 3
    say "installing benchmarks/requirements.lock (minutes; details: $env/setup.log)"
    install --no-deps --require-hashes -r benchmarks/requirements.lock || install_failed
    install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu \
        "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' benchmarks/requirements.txt)" || install_failed
    echo "$base" >"$env/setup/base"
}

# The tests of the search page drive Chromium; without it scripts/test.sh leaves them out.
install_browser() {
    ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null || return 0
    packages='chromium chromium-driver'
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $packages"
        if apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $packages; then
            return
        fi
    fi >>"$env/setup.log" 2>&1
    say "note: the tests of the search page need these packages: sudo apt-get install $packages"
}

stamp() { cat "$env/setup/$1" 2>/dev/null || true; }

# Whether $env is complete, works, and has the Python that PYTHON names, if it is set.
is_current() {
    [ "$(stamp base)" = "$base" ] && [ -x "$env/bin/python" ] || return 1
    [ -z "${PYTHON:-}" ] || { find_python && grep -q "^version = $version" "$env/pyvenv.cfg"; }
}

# Fails if $env was not created by this script; otherwise locks it.
claim_env() {
    [ ! -e "$env" ] || [ -d "$env/setup" ] ||
        fail "$PWD/$env was not made by this script; move it away or delete it, then run this again"
    mkdir -p "$env/setup"
    lock_env
}

device=
extras=
browser=
benchmarks=
while [ $# -gt 0 ]; do
    case $1 in
    --cpu) device=cpu ;;
    --gpu)
        device=cu126
        case ${2:-} in cu*) device=$2 && shift ;; esac
        ;;
    --gpu=*) device=${1#--gpu=} ;;
    --milvus | --onnx | --openvino | --serving) extras="$extras ${1#--}" ;;
    --tests) extras=$all_extras browser=1 ;;
    --fast-tests) extras="$extras tests" ;;
    --benchmarks) benchmarks=1 ;;
    -h | --help) usage && exit ;;
    *) fail "unknown option '$1'; sh scripts/setup.sh --help lists them" ;;
    esac
    shift
done
case $device in
'' | cpu | cu[0-9][0-9][0-9]) ;;
*) fail "--gpu takes a CUDA version such as cu118, cu126 or cu129, not '$device'" ;;
esac

env=.venv
device=${device:-$(stamp device)}
device=${device:-cpu}
base="$(cksum <requirements.lock) $device"
if ! is_current; then
    claim_env
    is_current || install_base
elif [ ! -e "$env/setup/hnswlib" ]; then
    install_hnswlib
fi
for extra in $extras; do
    if ! extra_is_current "$extra"; then
        claim_env
        extra_is_current "$extra" || install_extra "$extra"
    fi
    [ "$extra" != serving ] || patch_serving
done
[ -z "$browser" ] || install_browser
say "$env is ready"

if [ -n "$benchmarks" ]; then
    env=.venv-benchmarks
    base=$(cat benchmarks/requirements.txt benchmarks/requirements.lock | cksum)
    if ! is_current; then
        claim_env
        is_current || install_benchmarks
    fi
    say "$env is ready"
fi
