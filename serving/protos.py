"""Protobuf's message classes for deploy/C++/server/*.proto.

They come from messages.binpb, which protoc wrote:

protoc -I deploy/C++/server --descriptor_set_out=serving/messages.binpb deploy/C++/server/*.proto
"""

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, message_factory

_FILES = descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("messages.binpb").read_bytes()).file
# GetMessages has a descriptor pool of its own. The modules that protoc --python_out writes would use the default pool,
# in which Paddle Serving's packages register a file and messages of the same names: protobuf's C++ implementation
# refuses the second of two such files, and its Python implementation ignores it.
_MESSAGES: dict[str, Any] = message_factory.GetMessages(_FILES)

GeneralModelConfig = _MESSAGES["model_config.GeneralModelConfig"]
Request = _MESSAGES["baidu.paddle_serving.predictor.general_model.Request"]
Response = _MESSAGES["baidu.paddle_serving.predictor.general_model.Response"]
RpcMeta = _MESSAGES["baidu_std.RpcMeta"]
