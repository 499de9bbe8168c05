//! Owns the operators that this engine adds to ONNX Runtime's CPU provider.
