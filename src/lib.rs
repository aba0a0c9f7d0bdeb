//! Kernels of bias correction for quantized neural networks.
//!
//! ```text
//! fake-quantized weight    Wq = dequantize(quantize(W))
//! weight error             D  = W - Wq
//! shift of output channel  shift[g,o] = sum over s,i of D[s,i,g,o] * E[x][g,i]
//! ```
//!
//! The data flows top to bottom through four steps, one module each:
//!
//! 1. [`channel_mean`]: samples -> sums per channel and per kernel tap
//! 2. [`quantization_range`]: weights -> the range that their quantizer spans
//! 3. [`fake_quantize`]: weights -> quantized, dequantized
//! 4. [`weight_error`]: weights, fake-quantized weights, means -> shift
//!
//! They stand on [`accumulate`] (what each dtype is summed in), [`layout`] (any strided array as runs), [`weights`] (which axes
//! count channels), [`parallel`] (the thread pool), [`memory`] (whether there is enough), [`simd`] (CPU tiers) and [`error`]. Only the `python` module knows Python;
//! everything else compiles and tests without it.

pub mod accumulate;
pub mod channel_mean;
pub mod error;
pub mod fake_quantize;
pub mod layout;
pub mod memory;
pub mod parallel;
pub mod quantization_range;
pub mod simd;
pub mod weight_error;
pub mod weights;

/// What traits of dtypes ask for: kernels rely on what these say, so nobody else adds to them.
mod sealed {
    pub trait Sealed {}

    macro_rules! sealed {
        ($($type:ty),*) => {$(impl Sealed for $type {})*};
    }
    sealed!(i8, u8, i16, u16, i32, u32, i64, u64, i128, f32, f64, half::f16, half::bf16);
}

#[cfg(feature = "python")]
mod python;
