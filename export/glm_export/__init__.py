"""Exports ChatGLM3-family checkpoints to the ONNX graph and manifest that glmserve runs.

Meets the Rust side only through those two: nothing here imports it or is imported by it.
"""

__version__ = "0.1.0"
