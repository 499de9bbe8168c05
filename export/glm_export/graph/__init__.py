"""The ONNX graph, its weights and its manifest: written, and read again."""
