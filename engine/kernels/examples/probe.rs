//! What this machine can do at most, as a line of JSON: read bandwidth, and fp32 and int8 arithmetic in registers.
//!
//!     cargo run --release -p glm-kernels --example probe -- [THREADS]
//!
//! Benches run it beside each round: a machine whose figures moved is another machine.

mod limits;

fn main() {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let num_threads = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(processors).max(1);
    let text = |value: Option<f64>| value.map_or("null".to_owned(), |value| format!("{value:.1}"));
    println!(
        "{{\"threads\":{num_threads},\"read_gb_per_s\":{:.2},\"fp32_gflops\":{},\"int8_vnni_gops\":{},\"int8_amx_gops\":{}}}",
        limits::read_gb_per_s(num_threads),
        text(limits::fp32_gflops(num_threads)),
        text(limits::int8_vnni_gops(num_threads)),
        text(limits::int8_amx_gops(num_threads))
    );
}
