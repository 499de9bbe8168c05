//! Owns what is known of a GPU before anything is loaded onto it, and whether the library's kernels run there.

use std::fmt;

const MIB: usize = 1 << 20;
/// The runtime that the library is built for, as CUDA writes versions.
const RUNTIME: i32 = 13_000;
/// What onnxruntime-gpu 1.31.1 has machine code for. Code of one minor version runs on the later ones of its major
/// version, but for what is made for one architecture alone (9.0, 12.0); there is no code that a driver could compile.
const SUPPORTED: &str = "7.5, 8.x, 9.0 and 12.0";

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::runner::ort) struct DeviceMemory {
    pub(in crate::runner::ort) free: usize,
    pub(in crate::runner::ort) total: usize,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::runner::ort) struct DeviceFacts {
    pub(in crate::runner::ort) name: String,
    pub(in crate::runner::ort) uuid: [u8; 16],
    /// Compute capability: major and minor version.
    pub(in crate::runner::ort) capability: (i32, i32),
    /// The CUDA version that the driver is for: 1,000 times the major and 10 times the minor version.
    pub(in crate::runner::ort) driver: i32,
    pub(in crate::runner::ort) memory: DeviceMemory,
}

impl DeviceFacts {
    /// Whether the library runs there.
    ///
    /// # Errors
    /// Why it does not, for an operator.
    pub(in crate::runner::ort) fn check(&self) -> Result<(), String> {
        if self.driver < RUNTIME {
            return Err(format!(
                "the NVIDIA driver is for CUDA {}, and CUDA 13 needs a driver of version 580 or later ({self})",
                version(self.driver)
            ));
        }
        let (major, minor) = self.capability;
        match self.capability {
            (7, 5..) | (8, _) | (9, 0) | (12, 0) => Ok(()),
            _ => Err(format!(
                "onnxruntime-gpu 1.31.1 has no code for compute capability {major}.{minor}, only for {SUPPORTED} ({self})"
            )),
        }
    }
}

impl DeviceFacts {
    /// As NVIDIA's tools write it.
    pub(in crate::runner::ort) fn uuid(&self) -> String {
        let byte = |(index, byte): (usize, &u8)| {
            let dash = if [4, 6, 8, 10].contains(&index) { "-" } else { "" };
            format!("{dash}{byte:02x}")
        };
        format!("GPU-{}", self.uuid.iter().enumerate().map(byte).collect::<String>())
    }
}

impl fmt::Display for DeviceFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, capability: (major, minor), driver, memory, .. } = self;
        write!(
            f,
            "{name}, {}, compute capability {major}.{minor}, driver for CUDA {}, {} of {} MiB free",
            self.uuid(),
            version(*driver),
            memory.free / MIB,
            memory.total / MIB
        )
    }
}

fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(capability: (i32, i32), driver: i32) -> DeviceFacts {
        let memory = DeviceMemory { free: 140_000 * MIB, total: 143_000 * MIB };
        let uuid = std::array::from_fn(|index| index as u8 * 17);
        DeviceFacts { name: "NVIDIA H200".into(), uuid, capability, driver, memory }
    }

    #[test]
    fn a_gpu_is_named_as_nvidias_tools_name_it() {
        assert_eq!(
            facts((9, 0), 13_010).to_string(),
            "NVIDIA H200, GPU-00112233-4455-6677-8899-aabbccddeeff, compute capability 9.0, driver for CUDA 13.1, \
             140000 of 143000 MiB free"
        );
    }

    #[test]
    fn what_the_library_does_not_run_on_is_refused_in_clear_words() {
        for capability in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)] {
            assert_eq!(facts(capability, 13_000).check(), Ok(()));
        }
        for (capability, driver, words) in [
            ((7, 0), 13_000, "no code for compute capability 7.0, only for 7.5, 8.x, 9.0 and 12.0"),
            ((10, 0), 13_000, "no code for compute capability 10.0"),
            ((12, 1), 13_000, "no code for compute capability 12.1"),
            ((9, 0), 12_080, "the NVIDIA driver is for CUDA 12.8, and CUDA 13 needs a driver of version 580"),
        ] {
            let error = facts(capability, driver).check().unwrap_err();
            assert!(error.contains(words) && error.contains("NVIDIA H200"), "{error}");
        }
    }
}
