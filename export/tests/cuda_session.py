"""Owns running an exported folder on ONNX Runtime's CUDA provider, and counting what ran where.

Invariant: nothing may fall back to the CPU: the session is refused if a node has no CUDA kernel.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

# What the engine sets too, in engine/src/runner/ort/provider.rs.
OPTIONS = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
NO_FALLBACK = "session.disable_cpu_ep_fallback"


def open_session(model, options=OPTIONS, profile=None, fallback=False):
    """A session of a file or of bytes; `profile` is where its events go."""
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry(NO_FALLBACK, "0" if fallback else "1")
    settings.log_severity_level = 4
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, settings, providers=[("CUDAExecutionProvider", options)])


class CudaSession:
    """An exported folder with its caches in device memory."""

    def __init__(self, folder, num_blocks, options=OPTIONS, profile=None):
        path = folder / "model.onnx"
        self.session = open_session(path, options, profile)
        graph = onnx.load(path, load_external_data=False).graph
        self.outputs = [value.name for value in graph.output]
        self._binding = self.session.io_binding()
        self._caches = []
        self._fixed = []
        for value in graph.input:
            if "_cache." not in value.name:
                continue
            kind = value.type.tensor_type
            shape = [num_blocks, *(dim.dim_value for dim in kind.shape.dim[1:])]
            cache = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind.elem_type, "cuda", 0)
            self._caches.append(cache)
            self._binding.bind_input(value.name, "cuda", 0, kind.elem_type, shape, cache.data_ptr())

    def run(self, batch, outputs=None):
        """Runs a step; returns the named outputs, or all, by name."""
        for name, values in batch.feeds().items():
            self._binding.bind_cpu_input(name, values)
        wanted = outputs or self.outputs
        self._binding.clear_binding_outputs()
        for name in wanted:
            self._binding.bind_output(name)
        self.session.run_with_iobinding(self._binding)
        return dict(zip(wanted, self._binding.copy_outputs_to_cpu(), strict=True))

    def run_at_fixed_addresses(self, batch, times):
        """Runs a step again and again with every tensor where it was the first time."""
        if not self._fixed:
            for name, values in batch.feeds().items():
                device = "cpu" if name == "attention_metadata" else "cuda"
                self._fixed.append(onnxruntime.OrtValue.ortvalue_from_numpy(values, device, 0))
                self._binding.bind_ortvalue_input(name, self._fixed[-1])
            rows = len(batch.wanted)
            for value in self.session.get_outputs():
                dtype = np.int32 if value.type == "tensor(int32)" else np.float32
                shape = [rows, *value.shape[1:]]
                self._fixed.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0))
                self._binding.bind_ortvalue_output(value.name, self._fixed[-1])
        for _ in range(times):
            self.session.run_with_iobinding(self._binding)

    def placement(self):
        """How often each operator ran on each provider; ends the session's profile."""
        events = json.loads(Path(self.session.end_profiling()).read_text())
        nodes = [
            event["args"] for event in events if event.get("cat") == "Node" and "provider" in event["args"]
        ]
        # Kernel launches are events too; a node has one that ends in its run.
        return Counter((node["provider"], node["op_name"]) for node in nodes)
