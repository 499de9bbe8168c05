//! Owns the operators that this engine adds to ONNX Runtime's CPU provider.

/// placeholder until the operator branch merges
pub fn domain() -> ort::Result<ort::operator::OperatorDomain> {
    ort::operator::OperatorDomain::new("com.microsoft")
}
