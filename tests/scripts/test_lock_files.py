import re
from pathlib import Path

import pytest

from helpers import ROOT

EXTRAS = [f"deploy/{name}" for name in ("milvus", "onnx", "openvino", "serving")]


def pins(path: Path) -> dict[tuple[str, str], str]:
    """(name, marker) -> version, of every pin in a requirements or lock file."""
    lines = re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^\s;\\]+) *(?:; *([^\\#\n]*))?", path.read_text())
    return {(name.replace("_", "-").lower(), (marker or "").strip()): version for name, version, marker in lines}


@pytest.mark.parametrize("folder", [".", "tests", "benchmarks", *EXTRAS])
def test_lock_holds_every_direct_pin(folder: str) -> None:
    requirements = ROOT / folder / "requirements.txt"
    direct, lock = pins(requirements), pins(requirements.with_suffix(".lock"))
    lines = [line for line in requirements.read_text().splitlines() if line and not line.startswith("#")]
    assert len(direct) == len(lines) > 0
    assert {name: version for name, version in direct.items() if lock.get(name) != version} == (
        {("torch", ""): "2.13.0+cpu"} if folder == "benchmarks" else {}
    )


@pytest.mark.parametrize("folder", [".", "tests", "benchmarks", *EXTRAS])
def test_lock_names_no_place(folder: str) -> None:
    lines = (ROOT / folder / "requirements.lock").read_text().splitlines()
    entries = [line for line in lines if not line.lstrip().startswith("#")]
    assert all(re.match(r"[A-Za-z0-9._-]+==[^/]*$|    --hash=sha256:[0-9a-f]{64}", line) for line in entries if line)
    assert not [line for line in lines if "file:" in line or "--find-links" in line]


@pytest.mark.parametrize("folder", ["tests", *EXTRAS])
def test_extra_locks_agree_with_the_main_lock(folder: str) -> None:
    main, extra = pins(ROOT / "requirements.lock"), pins(ROOT / folder / "requirements.lock")
    shared = {name for name, _ in main} & {name for name, _ in extra}
    assert shared
    versions = {name: {version for (other, _), version in main.items() if other == name} for name in shared}
    assert [pin for pin, version in extra.items() if pin[0] in shared and version not in versions[pin[0]]] == []
