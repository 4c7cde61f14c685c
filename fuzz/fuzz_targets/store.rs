#![no_main]
qvd_fuzz_targets::fuzz!("store");
