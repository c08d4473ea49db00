# Sourced by the scripts in this folder: goes to the repository's root and chooses Python and the device.
#
# The first argument may be `gpu` (the default) or `cpu`; all others go to the Python script, in which the last one wins
# if an option is given twice. GPUS names the GPUs.

cd "$(dirname -- "$0")/.."
device=gpu
case ${1-} in
cpu | gpu)
    device=$1
    shift
    ;;
esac
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python

# Paddle's launcher imports Paddle, which makes a folder in HOME, before our own code can see to it.
writable_home() {
    ! mkdir -p "${HOME:-/dev/null}/.cache/paddle/dataset" 2>/dev/null || return 0
    [ -z "${HOME:-}" ] || export PPNLP_HOME="${PPNLP_HOME:-$HOME/.paddlenlp}"
    HOME=$(mktemp -d) || {
        echo "error: no temporary folder can be written; set TMPDIR to a folder that can" >&2
        exit 2
    }
    export HOME
    trap 'rm -rf "$HOME"' EXIT
}

# on_gpus LIST SCRIPT OPTIONS...: runs SCRIPT on the device; on GPUs, under the launcher.
on_gpus() {
    gpus=${GPUS:-$1}
    shift
    if [ "$device" = gpu ]; then
        writable_home
        "$python" -W ignore -c 'import paddle; raise SystemExit(paddle.device.cuda.device_count() == 0)' || {
            echo "error: Paddle finds no GPU; use the CPU: sh $0 cpu, or set up with sh scripts/setup.sh --gpu" >&2
            exit 2
        }
        "$python" -u -m paddle.distributed.launch --gpus "$gpus" "$@" --device gpu
    else
        "$python" -u "$@" --device cpu
    fi
}
