"""What happens before Paddle and PaddleNLP are imported: threads, CPU dispatch, and PaddleNLP's deferred parts."""

import json
import os
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest

from common.cpu import cpu_count
from common.paddle_setup import cpu_environment
from helpers import ROOT, V1

AVX512 = "avx512f avx512bw avx512dq avx512vl"
AMD_AVX512 = f"vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2 {AVX512}\n"
AMD_AVX2 = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2\n"
INTEL = f"vendor_id\t: GenuineIntel\nflags\t\t: fpu avx avx2 {AVX512}\n"

# ---------------------------------------------------------------------------------------------------------------------
# Threads and CPU dispatch


@pytest.mark.parametrize(
    ("cpuinfo", "mkl"),
    [
        (AMD_AVX512, "7"),
        (AMD_AVX2, "5"),
        (AMD_AVX512.replace(" avx512vl", ""), "5"),
        (AMD_AVX512.replace("flags", "bugs"), None),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx\n", None),
        (INTEL, None),
        ("", None),
    ],
    ids=["AVX-512", "AVX2", "part of AVX-512", "no flags", "neither", "Intel", "no cpuinfo"],
)
def test_mkl_gets_the_fastest_path_that_an_amd_cpu_has(cpuinfo: str, mkl: str | None) -> None:
    assert cpu_environment({}, cpuinfo, 8).get("MKL_DEBUG_CPU_TYPE") == mkl


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, "8"),
        ({"PADDLE_TRAINER_ID": "0", "PADDLE_LOCAL_SIZE": "2"}, "4"),
        ({"PADDLE_TRAINER_ID": "1", "PADDLE_LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}, "4"),
        ({"PADDLE_TRAINER_ID": "1", "PADDLE_LOCAL_SIZE": "3", "OMP_NUM_THREADS": "1"}, "2"),
        ({"PADDLE_TRAINER_ID": "0", "PADDLE_LOCAL_SIZE": "16"}, "1"),
        ({"PADDLE_TRAINER_ID": "0", "OMP_NUM_THREADS": "1"}, "8"),
        ({"OMP_NUM_THREADS": ""}, "8"),
        ({"OMP_NUM_THREADS": "4,2"}, "4"),
    ],
)
def test_threads_take_all_cores_and_ranks_share_them(environ: dict[str, str], threads: str) -> None:
    assert cpu_environment(environ, INTEL, 8) == {"OMP_NUM_THREADS": threads}


@pytest.mark.parametrize(
    "environ",
    [
        {"OMP_NUM_THREADS": "3", "MKL_DEBUG_CPU_TYPE": "4"},
        {"OMP_NUM_THREADS": "1", "MKL_DEBUG_CPU_TYPE": ""},
        {"OMP_NUM_THREADS": "3", "MKL_DEBUG_CPU_TYPE": "4", "PADDLE_TRAINER_ID": "0", "PADDLE_LOCAL_SIZE": "2"},
    ],
)
def test_the_user_s_own_settings_stay(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert cpu_environment(environ, AMD_AVX512, 8) == {}
    assert environ == before


@pytest.mark.process
def test_set_up_paddle_sets_this_process_s_environment() -> None:
    command = (
        "import gc, os; from common.cpu import cpu_count; from common.paddle_setup import set_up_paddle; "
        "set_up_paddle(); print(os.environ['OMP_NUM_THREADS'], cpu_count(), gc.isenabled())"
    )
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env={}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    threads, cores, collects_garbage = result.stdout.split()
    assert threads == cores == str(cpu_count())
    assert collects_garbage == "True"


@pytest.mark.process
@pytest.mark.parametrize("way", ["", "signal.signal(signal.SIGTERM, lambda *_: sys.exit('ours')); "])
def test_sigterm_has_its_default_or_the_callers_handler_afterwards(way: str) -> None:
    """Paddle's own one prints a native stack."""
    program = f"import os, signal, sys; from common.paddle_setup import set_up_paddle; {way}set_up_paddle(); "
    command = [sys.executable, "-c", f"{program}os.kill(os.getpid(), signal.SIGTERM)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    expected = (1, "", "ours\n") if way else (-signal.SIGTERM, "", "")
    assert (done.returncode, done.stdout, done.stderr) == expected


# ---------------------------------------------------------------------------------------------------------------------
# PaddleNLP without its taskflow, data sets and augmentation

CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoTokenizer",
    "BertModel",
    "BertTokenizer",
    "ErnieModel",
    "ErnieTokenizer",
    "PretrainedModel",
    "RobertaModel",
)
SKIPPED_PACKAGES = ("datasets", "pandas", "pyarrow", "sklearn")
SKIPPED_MODULES = ("paddlenlp.taskflow", "paddlenlp.datasets", "paddlenlp.dataaug")
IMPORTING = f"""
import json, sys
import numpy as np

if sys.argv[1] == "full":
    import paddlenlp
from common.paddle_setup import set_up_paddle

set_up_paddle()
import paddle
from encoding.encoder import load_encoder
from paddlenlp import transformers

classes = {{name: getattr(transformers, name) for name in {CLASSES}}}
modules = {{name: [each.__module__, sys.modules[each.__module__].__file__] for name, each in classes.items()}}
texts = ["水稻的产量", "论糖尿病影响因素研究", "[UNK] x"]
arrays = {{"encoder": load_encoder(sys.argv[2], engine="dygraph").encode(texts)}}
config = {{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}}
for name in ("ErnieModel", "BertModel"):
    paddle.seed(3)
    model = classes[name](classes[name].config_class(**config))
    model.eval()
    ids = paddle.arange(12).reshape([2, 6])
    arrays[name + " sequence"], arrays[name + " pooled"] = (each.numpy() for each in model(ids, ids * 0))
np.savez(sys.argv[3], **arrays)
loaded = sorted(set({(*SKIPPED_PACKAGES, *SKIPPED_MODULES)}) & set(sys.modules))

from paddlenlp import Taskflow
import paddlenlp

assert all(getattr(paddlenlp.transformers, name) is each for name, each in classes.items())
print(json.dumps({{
    "modules": modules,
    "loaded": loaded,
    "taskflow": Taskflow.__module__,
    "version": paddlenlp.__version__,
    "file": paddlenlp.__file__,
    "names": sorted(name for name in vars(paddlenlp) if not name.startswith("__")),
    "finally loaded": sorted(set({SKIPPED_PACKAGES}) & set(sys.modules)),
}}))
"""


class Imported(NamedTuple):
    """What a process reports that imported PaddleNLP in one of the two ways."""

    said: dict[str, Any]
    vectors: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Imported]:
    """Both ways: "deferred", as modeling/backbone.py has it, and "full", after a plain `import paddlenlp`."""
    found = {}
    for way in ("deferred", "full"):
        file = tmp_path_factory.mktemp("vectors") / f"{way}.npz"
        command = [sys.executable, "-c", IMPORTING, way, str(V1 / "run" / "model_4"), str(file)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[way] = Imported(json.loads(done.stdout.splitlines()[-1]), dict(np.load(file)))
    return found


@pytest.mark.process
def test_a_deferred_import_skips_what_no_script_uses(imported: dict[str, Imported]) -> None:
    assert imported["deferred"].said["loaded"] == []
    assert imported["full"].said["loaded"] == sorted((*SKIPPED_PACKAGES, *SKIPPED_MODULES))  # the check can fail


@pytest.mark.process
def test_a_deferred_import_gives_the_same_classes_and_vectors(imported: dict[str, Imported]) -> None:
    deferred, full = imported["deferred"], imported["full"]
    assert deferred.said["modules"] == full.said["modules"]
    assert deferred.said["version"] == full.said["version"]
    assert deferred.said["file"] == full.said["file"]
    assert deferred.vectors.keys() == full.vectors.keys()
    for name, expected in full.vectors.items():
        np.testing.assert_array_equal(deferred.vectors[name], expected, err_msg=name)
        assert np.ptp(expected) > 0.1


@pytest.mark.process
def test_a_deferred_import_loads_the_rest_on_demand(imported: dict[str, Imported]) -> None:
    deferred, full = imported["deferred"], imported["full"]
    assert deferred.said["taskflow"] == full.said["taskflow"] == "paddlenlp.taskflow.taskflow"
    assert deferred.said["names"] == full.said["names"]
    assert deferred.said["finally loaded"] == list(SKIPPED_PACKAGES)


@pytest.mark.process
def test_the_rest_can_be_asked_for_first() -> None:
    program = """
from common.paddle_setup import set_up_paddle
set_up_paddle()
import modeling.backbone, paddlenlp, sys
assert not hasattr(paddlenlp, "__wrapped__")  # as the import system and inspect ask
assert "paddlenlp.taskflow" not in sys.modules
print(paddlenlp.Taskflow.__module__)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "paddlenlp.taskflow.taskflow\n"), done.stderr


@pytest.mark.process
def test_a_program_may_import_paddlenlp_first() -> None:
    program = """
from common.paddle_setup import set_up_paddle
set_up_paddle()
from paddlenlp.transformers import ErnieTokenizer
from modeling.backbone import AutoModel
print(ErnieTokenizer.__name__, AutoModel.__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ErnieTokenizer AutoModel\n"), done.stderr
