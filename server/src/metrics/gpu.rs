//! Owns the metrics of a GPU, which are there only if NVIDIA's management library tells them.

use prometheus::{Gauge, GaugeVec, IntCounterVec, Opts, Registry};

use super::register::add;

/// What one look at a GPU finds. What the device does not tell is `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct GpuSample {
    /// Bytes of memory in use, by all processes.
    pub(crate) memory_used: Option<u64>,
    /// Bytes of memory.
    pub(crate) memory_total: Option<u64>,
    /// Part of the last second in which a kernel ran, from 0 to 1.
    pub(crate) utilization: Option<f64>,
    /// Watts.
    pub(crate) power: Option<f64>,
    /// Degrees Celsius.
    pub(crate) temperature: Option<f64>,
    /// Hertz of the multiprocessors' clock.
    pub(crate) clock: Option<f64>,
    /// Reasons for which the clock may be held down, and whether each applies.
    pub(crate) throttling: Vec<(&'static str, bool)>,
    /// Errors of memory that were not corrected, since the driver was loaded.
    pub(crate) ecc_errors: Option<u64>,
}

/// The metrics of one GPU.
#[derive(Debug)]
pub(crate) struct GpuMetrics {
    memory_used: Gauge,
    memory_total: Gauge,
    utilization: Gauge,
    power: Gauge,
    temperature: Gauge,
    clock: Gauge,
    throttled: GaugeVec,
    ecc_errors: Gauge,
    xid_errors: IntCounterVec,
}

impl GpuMetrics {
    pub(super) fn register(registry: &Registry, uuid: &str, name: &str) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| add(registry, Gauge::new(name, help)?);
        let info = Opts::new("glmserve_gpu_info", "The GPU that computes; always 1.");
        let info = add(registry, GaugeVec::new(info, &["uuid", "name"])?)?;
        info.with_label_values(&[uuid, name]).set(1.0);
        let throttled =
            Opts::new("glmserve_gpu_throttled", "Whether the clock is held down, by reason: 0 or 1.");
        let xid =
            Opts::new("glmserve_gpu_xid_errors_total", "Errors that the driver reported, by their number.");
        Ok(Self {
            memory_used: gauge("glmserve_gpu_memory_used_bytes", "Memory in use, by all processes.")?,
            memory_total: gauge("glmserve_gpu_memory_total_bytes", "Memory of the GPU.")?,
            utilization: gauge(
                "glmserve_gpu_utilization_ratio",
                "Part of the time in which a kernel ran, from 0 to 1.",
            )?,
            power: gauge("glmserve_gpu_power_watts", "Power that is drawn.")?,
            temperature: gauge("glmserve_gpu_temperature_celsius", "Temperature of the chip.")?,
            clock: gauge("glmserve_gpu_sm_clock_hertz", "Clock of the multiprocessors.")?,
            throttled: add(registry, GaugeVec::new(throttled, &["reason"])?)?,
            ecc_errors: gauge(
                "glmserve_gpu_uncorrected_ecc_errors",
                "Errors of memory that were not corrected, since the driver was loaded.",
            )?,
            xid_errors: add(registry, IntCounterVec::new(xid, &["xid"])?)?,
        })
    }

    /// Takes what was found; what was not keeps its value.
    pub(crate) fn set(&self, sample: &GpuSample) {
        let as_float = |value: Option<u64>| value.map(|value| value as f64);
        for (gauge, value) in [
            (&self.memory_used, as_float(sample.memory_used)),
            (&self.memory_total, as_float(sample.memory_total)),
            (&self.utilization, sample.utilization),
            (&self.power, sample.power),
            (&self.temperature, sample.temperature),
            (&self.clock, sample.clock),
            (&self.ecc_errors, as_float(sample.ecc_errors)),
        ] {
            value.into_iter().for_each(|value| gauge.set(value));
        }
        for (reason, applies) in &sample.throttling {
            self.throttled.with_label_values(&[reason]).set(f64::from(u8::from(*applies)));
        }
    }

    /// The driver reported an error.
    pub(crate) fn xid(&self, number: u64) {
        self.xid_errors.with_label_values(&[&number.to_string()]).inc();
    }
}
