//! Owns the thread that asks NVIDIA's management library how the GPU is.
//!
//! Invariant: without the library, or where it does not know the device, the server runs as it would otherwise. A call
//! that hangs, as with a sick device, holds up this thread alone.

use std::ffi::OsStr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, EventSet, Nvml};

use crate::metrics::{GpuMetrics, GpuSample, Metrics};

/// The driver's library; the name without a version comes with development packages only.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// How often the device is asked.
const PERIOD: Duration = Duration::from_secs(2);
/// What holds the clock down and is no setting of the operator's.
const REASONS: [(&str, ThrottleReasons); 5] = [
    ("sw_power_cap", ThrottleReasons::SW_POWER_CAP),
    ("hw_slowdown", ThrottleReasons::HW_SLOWDOWN),
    ("sw_thermal", ThrottleReasons::SW_THERMAL_SLOWDOWN),
    ("hw_thermal", ThrottleReasons::HW_THERMAL_SLOWDOWN),
    ("hw_power_brake", ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN),
];

/// Reports the GPU with this UUID for as long as the metrics live.
pub(crate) fn watch(uuid: &str, metrics: &Arc<Metrics>) {
    let (uuid, metrics) = (uuid.to_owned(), Arc::downgrade(metrics));
    let body = move || {
        if let Err(error) = run(&uuid, &metrics) {
            tracing::info!(%error, "NVIDIA's management library tells nothing: there are no metrics of the GPU");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("gpu-watch".into()).spawn(body) {
        tracing::warn!(%error, "cannot start the thread that reports the GPU");
    }
}

fn run(uuid: &str, metrics: &Weak<Metrics>) -> Result<(), NvmlError> {
    let nvml = Nvml::builder().lib_path(OsStr::new(LIBRARY)).init()?;
    // To CUDA a part of a GPU is a GPU; the library names it otherwise.
    let part = uuid.replacen("GPU-", "MIG-", 1);
    let device = nvml.device_by_uuid(uuid).or_else(|_| nvml.device_by_uuid(part))?;
    let registered = metrics.upgrade().map(|metrics| metrics.gpu(uuid, &device.name().unwrap_or_default()));
    let gpu = match registered {
        Some(Ok(gpu)) => gpu,
        Some(Err(error)) => {
            tracing::error!(%error, "the metrics of the GPU cannot be registered");
            return Ok(());
        }
        None => return Ok(()),
    };
    let events = events(&nvml, &device);
    while metrics.strong_count() > 0 {
        gpu.set(&sample(&device));
        wait(events.as_ref(), &gpu);
    }
    Ok(())
}

/// Hears of errors, where the device reports them.
fn events<'nvml>(nvml: &'nvml Nvml, device: &Device<'nvml>) -> Option<EventSet<'nvml>> {
    let set = nvml.create_event_set().ok()?;
    device.register_events(EventTypes::CRITICAL_XID_ERROR, set).ok()
}

/// Lets the period pass, or less of it if there was an error.
fn wait(events: Option<&EventSet<'_>>, gpu: &GpuMetrics) {
    match events.map(|events| events.wait(PERIOD.as_millis() as u32)) {
        Some(Ok(event)) => {
            if let Some(XidError::Value(number)) = event.event_data {
                gpu.xid(number);
                tracing::error!(xid = number, "the driver reported an error of the GPU");
            }
        }
        Some(Err(NvmlError::Timeout)) => {}
        _ => std::thread::sleep(PERIOD),
    }
}

fn sample(device: &Device<'_>) -> GpuSample {
    let memory = device.memory_info().ok();
    let reasons = device.current_throttle_reasons().ok();
    GpuSample {
        memory_used: memory.as_ref().map(|memory| memory.used),
        memory_total: memory.as_ref().map(|memory| memory.total),
        utilization: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
        power: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1e3),
        temperature: device.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
        clock: device.clock_info(Clock::SM).ok().map(|megahertz| f64::from(megahertz) * 1e6),
        throttling: reasons.map_or_else(Vec::new, |found| {
            REASONS.into_iter().map(|(name, reason)| (name, found.contains(reason))).collect()
        }),
        ecc_errors: device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).ok(),
    }
}
