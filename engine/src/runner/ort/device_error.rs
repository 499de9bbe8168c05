//! Owns the recognition of device errors that never heal in ONNX Runtime's words.
//!
//! The library reports a failed call as `CUDA failure 700: an illegal memory access was encountered ;
//! GPU=0 ; …`, and hands the code on in no other way. Kernels from elsewhere that it contains use CUDA's
//! name or words for the error alone.

use crate::error::{LoadError, RunError, RunErrorKind};

/// What stands before the number in the library's own reports.
const REPORT: &str = "CUDA failure ";

/// Errors of the CUDA runtime (13) after which every later call of the process fails: code, name, and the
/// words where nothing else is called so. Most destroy the context; of the others (46, 214, 220, 999) the
/// driver or the hardware does not come back while the process holds the device.
const PERMANENT: [(u32, &str, Option<&str>); 16] = [
    (46, "cudaErrorDevicesUnavailable", Some("CUDA-capable device(s) is/are busy or unavailable")),
    (214, "cudaErrorECCUncorrectable", Some("uncorrectable ECC error encountered")),
    (220, "cudaErrorNvlinkUncorrectable", Some("uncorrectable NVLink error detected")),
    (226, "cudaErrorContained", None),
    (700, "cudaErrorIllegalAddress", Some("an illegal memory access was encountered")),
    (702, "cudaErrorLaunchTimeout", Some("the launch timed out and was terminated")),
    (709, "cudaErrorContextIsDestroyed", Some("context is destroyed")),
    (710, "cudaErrorAssert", Some("device-side assert triggered")),
    (714, "cudaErrorHardwareStackError", Some("hardware stack error")),
    (715, "cudaErrorIllegalInstruction", Some("an illegal instruction was encountered")),
    (716, "cudaErrorMisalignedAddress", Some("misaligned address")),
    (717, "cudaErrorInvalidAddressSpace", Some("operation not supported on global/shared address space")),
    (718, "cudaErrorInvalidPc", Some("invalid program counter")),
    (719, "cudaErrorLaunchFailure", Some("unspecified launch failure")),
    (721, "cudaErrorTensorMemoryLeak", None),
    (999, "cudaErrorUnknown", None),
];

/// Whether the library's `text` about a failed run says that every later run will fail as well.
pub(super) fn is_permanent(text: &str) -> bool {
    let number = |report: &str| -> Option<u32> {
        let end = report.find(|c: char| !c.is_ascii_digit()).unwrap_or(report.len());
        report[..end].parse().ok()
    };
    let numbers: Vec<u32> = text.split(REPORT).skip(1).filter_map(number).collect();
    PERMANENT.iter().any(|(code, name, words)| {
        let is_word = |at: usize| !text[at + name.len()..].starts_with(|c: char| c.is_ascii_alphanumeric());
        numbers.contains(code)
            || text.match_indices(name).any(|(at, _)| is_word(at))
            || words.is_some_and(|words| text.contains(words))
    })
}

/// Whether the library's `text` says that there was no memory for what a run needed.
pub(super) fn is_out_of_memory(text: &str) -> bool {
    text.contains("CUDA failure 2:")
        || text.contains("Failed to allocate memory")
        || text.contains("out of memory")
}

/// The library's words about a run, and what they mean for the next one.
pub(super) fn failed(error: ort::Error) -> RunError {
    failure(error.to_string())
}

fn failure(message: String) -> RunError {
    let kind = match message.as_str() {
        text if is_permanent(text) => RunErrorKind::DeviceLost,
        text if is_out_of_memory(text) => RunErrorKind::OutOfMemory,
        _ => RunErrorKind::Step,
    };
    RunError { message, kind }
}

/// What ONNX Runtime says against a folder.
pub(super) fn runtime(error: impl std::fmt::Display) -> LoadError {
    LoadError::Runtime(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_destroy_the_context_are_recognised_in_the_librarys_words() {
        for text in [
            "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=a ; \
             file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_stream_handle.cc ; line=61 ; \
             expr=cudaStreamSynchronize(static_cast<cudaStream_t>(GetHandle())); ",
            "Non-zero status code returned while running MatMulNBits node. Name:'/lm_head' Status Message: \
             CUDA failure 719: some words of a newer library",
            "CUDA failure 2: out of memory ; CUDA failure 214: x",
            "CUDA failure 999",
            "CUDA error cudaErrorMisalignedAddress: x",
            "[FusedKernel] CUDA runtime error in launch: device-side assert triggered",
        ] {
            assert!(is_permanent(text), "{text}");
        }
    }

    #[test]
    fn errors_after_which_the_next_step_may_succeed_are_not() {
        for text in [
            "CUDA failure 2: out of memory ; GPU=0 ; hostname=b700 ; expr=cudaMalloc((void**)&p, size); ",
            "CUDA failure 701: too many resources requested for launch ; GPU=0",
            "CUDA failure 7000: no such number",
            "CUDA failure : 700",
            "CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR ; GPU=0",
            "cudaErrorLaunchFailureOfAnotherKind",
            "Failed to allocate memory for requested buffer of size 700",
            "",
        ] {
            assert!(!is_permanent(text), "{text}");
        }
    }

    #[test]
    fn a_lack_of_memory_is_told_from_other_failures() {
        for (text, kind) in [
            (
                "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size); ",
                RunErrorKind::OutOfMemory,
            ),
            ("Failed to allocate memory for requested buffer of size 700", RunErrorKind::OutOfMemory),
            ("CUDA failure 2: out of memory ; CUDA failure 700: x", RunErrorKind::DeviceLost),
            ("CUDA failure 701: too many resources requested for launch ; GPU=0", RunErrorKind::Step),
        ] {
            assert_eq!(failure(text.into()).kind, kind, "{text}");
        }
    }
}
