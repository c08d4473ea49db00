"""From a checkpoint or an exported model to vectors: dygraph, Paddle Inference and ONNX Runtime."""
