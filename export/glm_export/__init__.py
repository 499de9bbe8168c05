"""Exports ChatGLM3-family checkpoints to the ONNX graph and manifest that glmserve runs.

A module uses those of its own line and of lines below it, and no modules use one another in a circle; a
folder stands for what is in it. export/tests/test_layers.py reads this list:

    cli
    dev default_model
    calibration kv_scales
    verify
    graph
    read checkpoint_writer
    quantise models
    progress output_folder
    error

Meets the Rust side only through those two: nothing here imports it or is imported by it.
"""

__version__ = "0.1.0"
