"""Encoding texts with a checkpoint or an exported model, in dygraph, Paddle Inference or ONNX Runtime; exporting it."""
