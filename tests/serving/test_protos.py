import subprocess
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from helpers import ROOT
from serving.protos import GeneralModelConfig, Request


@pytest.mark.cpp
def test_messages_are_those_of_the_proto_files(tmp_path: Path) -> None:
    """If this fails, run the command in serving/protos.py."""
    files = sorted((ROOT / "deploy" / "C++" / "server").glob("*.proto"))
    fresh = tmp_path / "messages.binpb"
    subprocess.run(["protoc", "-I", files[0].parent, f"--descriptor_set_out={fresh}", *files], check=True)
    committed = ROOT / "serving" / "messages.binpb"
    assert FileDescriptorSet.FromString(committed.read_bytes()) == FileDescriptorSet.FromString(fresh.read_bytes())


def test_paddle_serving_reads_our_messages() -> None:
    """In a process that also has its own messages, which have the same names."""
    from paddle_serving_server.proto import general_model_config_pb2, general_model_service_pb2

    request = Request(log_id=7)
    request.tensor.add(name="input_ids", elem_type=0, shape=[1, 2], tensor_content=b"0123456789abcdef")
    config = GeneralModelConfig()
    config.feed_var.add(name="input_ids", alias_name="ids", is_lod_tensor=False, feed_type=0, shape=[-1])
    config.fetch_var.add(name="vector", fetch_type=1)
    for message, theirs in (
        (request, general_model_service_pb2.Request),
        (config, general_model_config_pb2.GeneralModelConfig),
    ):
        assert str(theirs.FromString(message.SerializeToString())) == str(message)
