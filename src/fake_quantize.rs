//! Real numbers to the grid of a quantizer, and back.
//!
//! ```text
//! q = clip(round(r * scale) + zero_point, qmin, qmax)          r = (q - zero_point) / scale
//! ```
//!
//! `scale` is in steps per unit. Arrays are contiguous; channel `c` of an element is `index / inner % channels`, where
//! `inner` is the number of elements per step of the channel axis. All arithmetic is f64, rounded to the output type once;
//! `round` is half to even. Each element is read once and written once.

use std::ops::Sub;

use crate::error::Error;
use crate::memory;
use crate::parallel;
use crate::sealed::Sealed;
use crate::simd::{Tier, tiered};

/// A real number type that kernels take: f32 or f64.
pub trait Real: Sealed + Copy + Default + Send + Sync + Sub<Output = Self> + 'static {
    /// Exact.
    fn widen(self) -> f64;
    /// Rounded to nearest.
    fn narrow(x: f64) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn widen(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn narrow(x: f64) -> f32 {
        x as f32
    }
}

impl Real for f64 {
    #[inline(always)]
    fn widen(self) -> f64 {
        self
    }
    #[inline(always)]
    fn narrow(x: f64) -> f64 {
        x
    }
}

/// An integer type that quantized values are held in.
pub trait Quantized: Sealed + Copy + Default + Send + Sync + 'static {
    /// Exact for the 32 bits and fewer that a quantizer has.
    fn widen(self) -> f64;
    /// Of an integer within range.
    fn narrow(x: f64) -> Self;
}

macro_rules! quantized {
    ($($int:ty),*) => {$(
        impl Quantized for $int {
            #[inline(always)]
            fn widen(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn narrow(x: f64) -> $int {
                x as $int
            }
        }
    )*};
}
quantized!(i8, u8, i16, u16, i32, u32);

/// The least and the greatest quantized value.
#[derive(Clone, Copy, Debug)]
struct Range {
    qmin: f64,
    qmax: f64,
}

/// nan stays nan.
#[inline(always)]
fn quantized(x: f64, scale: f64, zero_point: f64, range: Range) -> f64 {
    (round_half_even(x * scale) + zero_point).clamp(range.qmin, range.qmax)
}

#[inline(always)]
fn dequantized(q: f64, scale: f64, zero_point: f64) -> f64 {
    (q - zero_point) / scale
}

/// Adding 1.5 * 2^52 leaves no room for a fraction, in any CPU tier. Beyond 2^51 it may round to even numbers, which no grid of
/// 32 bits can tell apart.
#[inline(always)]
pub fn round_half_even(x: f64) -> f64 {
    const INTEGERS_ONLY: f64 = 6_755_399_441_055_744.0;
    (x + INTEGERS_ONLY) - INTEGERS_ONLY
}

/// The grids of all channels of an array.
#[derive(Clone, Debug)]
pub struct Grids {
    scale: Vec<f64>,
    zero_point: Vec<f64>,
    range: Range,
    inner: usize,
}

/// The grids of a run: one for all its elements, or one for each.
#[derive(Clone, Copy)]
struct GridRun<'a> {
    scale: &'a [f64],
    zero_point: &'a [f64],
    range: Range,
}

impl Grids {
    /// `scale` and `zero_point` have one value, or one per channel; signed range of `bits`.
    pub fn new(scale: &[f64], zero_point: &[f64], bits: u32, channels: usize, inner: usize) -> Result<Self, Error> {
        for (name, found) in [("scale", scale.len()), ("zero_point", zero_point.len())] {
            if found != 1 && found != channels {
                return Err(Error::PerChannel { name, found, expected: channels });
            }
        }
        let half = 2f64.powi(bits as i32 - 1);
        let count = if scale.len() == 1 && zero_point.len() == 1 { 1 } else { channels };
        let repeated = |values: &[f64]| values.iter().copied().cycle().take(count).collect();
        let range = Range { qmin: -half, qmax: half - 1.0 };
        Ok(Grids { scale: repeated(scale), zero_point: repeated(zero_point), range, inner: inner.max(1) })
    }

    /// Number of grids.
    #[expect(clippy::len_without_is_empty, reason = "it is no collection")]
    pub fn len(&self) -> usize {
        self.scale.len()
    }

    fn run(&self, start: usize, len: usize) -> GridRun<'_> {
        let range = start..start + len;
        GridRun { scale: &self.scale[range.clone()], zero_point: &self.zero_point[range], range: self.range }
    }

    /// Calls `f` with each piece of `start..start + len` that has one grid per element or one for all: the grids, the piece.
    fn pieces(&self, start: usize, len: usize, mut f: impl FnMut(GridRun, std::ops::Range<usize>)) {
        let count = self.scale.len();
        if count == 1 {
            return f(self.run(0, 1), 0..len);
        }
        let mut at = 0;
        while at < len {
            let index = start + at;
            let channel = index / self.inner % count;
            let piece = if self.inner == 1 { count - channel } else { self.inner - index % self.inner };
            let piece = piece.min(len - at);
            f(self.run(channel, if self.inner == 1 { piece } else { 1 }), at..at + piece);
            at += piece;
        }
    }

    /// Moves each element to its grid: the first meets grid `start`, the others one `stride` grids on each.
    pub fn fake_quantize_along<T: Real>(&self, xs: &[T], start: isize, stride: isize, ys: &mut [T]) {
        match stride {
            0 => fake_quantize_run(xs, self.run(start as usize, 1), ys),
            1 => fake_quantize_run(xs, self.run(start as usize, xs.len()), ys),
            _ => {
                for (k, (x, y)) in xs.chunks(1).zip(ys.chunks_mut(1)).enumerate() {
                    fake_quantize_run(x, self.run((start + k as isize * stride) as usize, 1), y);
                }
            }
        }
    }
}

/// Applies `f` to each element of a run and its scale and zero point.
#[inline(always)]
fn map_run<X: Copy, Y>(xs: &[X], grids: GridRun, ys: &mut [Y], f: impl Fn(X, f64, f64) -> Y) {
    if let ([scale], [zero_point]) = (grids.scale, grids.zero_point) {
        for (y, &x) in ys.iter_mut().zip(xs) {
            *y = f(x, *scale, *zero_point);
        }
    } else {
        for (((y, &x), scale), zero_point) in ys.iter_mut().zip(xs).zip(grids.scale).zip(grids.zero_point) {
            *y = f(x, *scale, *zero_point);
        }
    }
}

#[inline(always)]
fn quantize_body<T: Real, Q: Quantized>(_: Tier, xs: &[T], grids: GridRun, qs: &mut [Q]) -> bool {
    map_run(xs, grids, qs, |x, scale, zero_point| Q::narrow(quantized(x.widen(), scale, zero_point, grids.range)));
    xs.iter().fold(false, |nan, x| nan | x.widen().is_nan())
}

#[inline(always)]
fn dequantize_body<Q: Quantized, T: Real>(_: Tier, qs: &[Q], grids: GridRun, xs: &mut [T]) {
    map_run(qs, grids, xs, |q, scale, zero_point| T::narrow(dequantized(q.widen(), scale, zero_point)));
}

#[inline(always)]
fn fake_quantize_body<T: Real>(_: Tier, xs: &[T], grids: GridRun, ys: &mut [T]) {
    let fake_quantized = |x: T, scale, zero_point| {
        T::narrow(dequantized(quantized(x.widen(), scale, zero_point, grids.range), scale, zero_point))
    };
    map_run(xs, grids, ys, fake_quantized);
}

tiered! { fn quantize_run<T: Real, Q: Quantized>(xs: &[T], grids: GridRun, qs: &mut [Q]) -> bool = quantize_body }
tiered! { fn dequantize_run<Q: Quantized, T: Real>(qs: &[Q], grids: GridRun, xs: &mut [T]) = dequantize_body }
tiered! { fn fake_quantize_run<T: Real>(xs: &[T], grids: GridRun, ys: &mut [T]) = fake_quantize_body }

/// Elements that one task maps.
const CHUNK: usize = 64 << 10;

/// Bytes for each task: its slices, and what it found.
const OF_CHUNK: usize = 64;

/// Maps `xs` to `ys` chunk by chunk; `leaf` gets a run, its grids and its output. Returns whether any leaf says so.
fn map_chunks<X: Sync, Y: Send>(
    xs: &[X], grids: &Grids, ys: &mut [Y], leaf: impl Fn(&[X], GridRun, &mut [Y]) -> bool + Sync + Send,
) -> Result<bool, Error> {
    memory::check(xs.len() / CHUNK, OF_CHUNK)?;
    let chunks = xs.chunks(CHUNK).zip(ys.chunks_mut(CHUNK)).enumerate().collect();
    let found = parallel::map(chunks, size_of_val(xs), |(k, (xs, ys))| {
        let mut any = false;
        grids.pieces(k * CHUNK, xs.len(), |grids, piece| any |= leaf(&xs[piece.clone()], grids, &mut ys[piece]));
        any
    })?;
    Ok(found.contains(&true))
}

/// A leaf to which nothing is wrong.
fn without_nan<X, Y>(leaf: impl Fn(&[X], GridRun, &mut [Y])) -> impl Fn(&[X], GridRun, &mut [Y]) -> bool {
    move |xs, grids, ys| {
        leaf(xs, grids, ys);
        false
    }
}

/// Real numbers to integers, saturating. nan has none: [`Error::Nan`].
pub fn quantize<T: Real, Q: Quantized>(xs: &[T], grids: &Grids, qs: &mut [Q]) -> Result<(), Error> {
    if map_chunks(xs, grids, qs, quantize_run)? { Err(Error::Nan) } else { Ok(()) }
}

/// Integers to the real numbers they stand for.
pub fn dequantize<Q: Quantized, T: Real>(qs: &[Q], grids: &Grids, xs: &mut [T]) -> Result<(), Error> {
    map_chunks(qs, grids, xs, without_nan(dequantize_run)).map(drop)
}

/// Real numbers to the nearest ones of the grid. nan stays nan.
pub fn fake_quantize<T: Real>(xs: &[T], grids: &Grids, ys: &mut [T]) -> Result<(), Error> {
    map_chunks(xs, grids, ys, without_nan(fake_quantize_run)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_half_to_even() {
        for x in [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.499_999_999_999_999_94, 3.7, -3.2, 2_147_483_647.5] {
            assert_eq!(round_half_even(x), f64::round_ties_even(x), "{x}");
        }
    }

    #[test]
    fn infinities_saturate_and_nan_is_an_error() {
        let grids = Grids::new(&[1.0], &[0.0], 8, 1, 1).unwrap();
        let mut q = [0i8; 4];
        quantize(&[f64::INFINITY, f64::NEG_INFINITY, 1e300, 0.4], &grids, &mut q).unwrap();
        assert_eq!(q, [127, -128, 127, 0]);
        assert_eq!(quantize(&[0.0, f64::NAN], &grids, &mut q), Err(Error::Nan));
    }

    #[test]
    fn no_channels_have_no_grids() {
        for (scale, zero_point) in [(&[][..], &[0.0][..]), (&[1.0], &[]), (&[], &[])] {
            let grids = Grids::new(scale, zero_point, 8, 0, 1).unwrap();
            assert_eq!(grids.len(), 0);
            fake_quantize::<f64>(&[], &grids, &mut []).unwrap();
        }
    }

    #[test]
    fn every_element_meets_the_grid_of_its_channel() {
        // (2, 3, 5) with a scale per middle index, and (10, 3) with one per last index, across chunk borders.
        let scales = [1.0, 2.0, 4.0];
        for inner in [1, 5] {
            let n = 3 * inner * (CHUNK / 7);
            let xs: Vec<f64> = (0..n).map(|i| (i % 17) as f64 / 8.0).collect();
            let mut ys = vec![0.0; n];
            fake_quantize(&xs, &Grids::new(&scales, &[0.0], 8, 3, inner).unwrap(), &mut ys).unwrap();
            for (i, (x, y)) in xs.iter().zip(&ys).enumerate() {
                let scale = scales[i / inner % 3];
                assert_eq!(*y, (x * scale).round_ties_even() / scale);
            }
        }
    }
}
