from pathlib import Path

import pytest

import export_to_serving


@pytest.fixture(scope="session")
def serving_folder(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where export_to_serving.py wrote serving_server and serving_client."""
    folder = tmp_path_factory.mktemp("serving")
    paths = ["--server_path", str(folder / "serving_server"), "--client_path", str(folder / "serving_client")]
    export_to_serving.main(["--dirname", str(exported), *paths, "--fetch_alias_names", "output_embedding"])
    return folder


@pytest.fixture(scope="session")
def serving_server(serving_folder: Path) -> Path:
    """What the server loads."""
    return serving_folder / "serving_server"
