//! libFuzzer over the kernels: `make fuzz TARGET=kernels`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| biascorr_fuzz::run(data));
