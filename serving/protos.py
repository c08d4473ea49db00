"""Protobuf's message classes from .proto files, without protoc and what it generates."""

import re
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def read_proto(path: Path) -> dict[str, Any]:
    """The message classes of a .proto file by name.

    It reads what this project's files hold: messages whose fields stand on a line each, scalars and messages of the
    same file.
    """
    text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    (package,) = re.findall(r"^package ([\w.]+);", text, re.MULTILINE)
    (syntax,) = re.findall(r'^syntax = "(\w+)";', text, re.MULTILINE)
    file = descriptor_pb2.FileDescriptorProto(name=path.name, package=package, syntax=syntax)
    field = descriptor_pb2.FieldDescriptorProto  # its constants are the scalar types and the labels
    for name, body in re.findall(r"^message (\w+) \{(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        message = file.message_type.add(name=name)
        for label, kind, field_name, number in re.findall(r"^ *(?:(\w+) )??(\w+) (\w+) = (\d+);", body, re.MULTILINE):
            scalar = getattr(field, f"TYPE_{kind.upper()}", None)
            message.field.add(
                name=field_name,
                number=int(number),
                label=getattr(field, f"LABEL_{(label or 'optional').upper()}"),
                type=scalar or field.TYPE_MESSAGE,
                type_name=None if scalar else f".{package}.{kind}",
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    factory = message_factory.MessageFactory(pool)
    return {
        message.name: factory.GetPrototype(pool.FindMessageTypeByName(f"{package}.{message.name}"))
        for message in file.message_type
    }
