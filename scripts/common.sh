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

# on_gpus LIST SCRIPT OPTIONS...: runs SCRIPT on the device; on GPUs, under the launcher.
on_gpus() {
    gpus=${GPUS:-$1}
    shift
    if [ "$device" = gpu ]; then
        "$python" -W ignore -c 'import paddle; raise SystemExit(paddle.device.cuda.device_count() == 0)' || {
            echo "error: Paddle finds no GPU; use the CPU: sh $0 cpu, or set up with sh scripts/setup.sh --gpu" >&2
            exit 2
        }
        "$python" -u -m paddle.distributed.launch --gpus "$gpus" "$@" --device gpu
    else
        "$python" -u "$@" --device cpu
    fi
}
