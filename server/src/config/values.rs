//! Owns how values on the command line are read.

/// Bytes of a MiB.
pub(super) const MIB: usize = 1 << 20;

pub(super) fn up_to<const MAX: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (1..=MAX).contains(&number) => Ok(number),
        _ => Err(format!("must be a whole number from 1 to {MAX}")),
    }
}

pub(super) fn part(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(part) if (0.01..=1.0).contains(&part) => Ok(part),
        _ => Err("must be a number from 0.01 to 1".into()),
    }
}

pub(super) fn port(text: &str) -> Result<u16, String> {
    if text.starts_with("tcp://") {
        return Err(
            "Kubernetes puts this into GLMSERVE_PORT for a Service named glmserve: set `enableServiceLinks: false` \
             in the pod, give the Service another name, or pass --port"
                .into(),
        );
    }
    text.parse().map_err(|_| "must be a number from 0 to 65535".into())
}
