"""The programs in deploy/ answer before Paddle is imported."""

from pathlib import Path

import pytest

from common import __version__
from helpers import ROOT, run_without_paddle

pytestmark = pytest.mark.process
PYTHON, CPP = ROOT / "deploy" / "python", ROOT / "deploy" / "C++"
SCRIPTS = [PYTHON / "predict.py", PYTHON / "web_service.py", PYTHON / "rpc_client.py"]
SCRIPTS += [CPP / "rpc_client.py", CPP / "http_client.py"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_help_and_version_are_shown_without_paddle(script: Path) -> None:
    assert run_without_paddle(script, "--version") == (0, f"{__version__}\n", "")
    code, out, err = run_without_paddle(script, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: {script.name} [-h]")


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (PYTHON / "predict.py", ["--model_dir"]),
        (PYTHON / "web_service.py", ["--rpc_port", "0", "--http_port", "0", "--model_dir"]),
        (CPP / "rpc_client.py", ["--model_dir"]),
        (CPP / "http_client.py", ["--model_dir"]),
    ],
    ids=lambda value: "/".join(value.parts[-2:]) if isinstance(value, Path) else "",
)
def test_a_missing_model_is_refused_without_paddle(script: Path, options: list[str], tmp_path: Path) -> None:
    code, out, err = run_without_paddle(script, *options, tmp_path / "missing")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert f"{tmp_path / 'missing'}: no such " in err
