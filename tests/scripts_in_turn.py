"""Runs all scripts in turn in one process: `python tests/scripts_in_turn.py WORK < JSON`, for tests of the environment.

The JSON is a list of [name, file, options]. Prints one: name -> exit code, stdout and stderr, or the traceback.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run


def run_script(file: str, options: list[str]) -> dict[str, Any]:
    """What the script does with the options, as if it were the process's only one."""
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            run(lambda: module.main(options))
        except SystemExit as ended:
            code = ended.code
        except Exception:
            traceback.print_exc()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    os._exit = sys.exit  # `run` ends a rank with it
    print(json.dumps({name: run_script(file, options) for name, file, options in json.load(sys.stdin)}))
