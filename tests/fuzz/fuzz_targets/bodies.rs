#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (glmserve_tests::fuzz::target("bodies").run)(bytes));
