//! Accumulators: what each element type is summed in, and the loops that add rows of elements to rows of accumulators.
//!
//! ```text
//! lanes[j] += row[j]        for each row of a block; a lane cannot overflow there
//! totals[j] += lanes[j]     between blocks
//! ```
//!
//! | elements | lane | rows of a block | total | sum of a sample |
//! |---|---|---|---|---|
//! | i8, u8 | i16, u16 | 256 | i64 | i128 |
//! | i16, u16 | i32 | 2^15 | i64 | i128 |
//! | i32, u32 | i64 | 2^20 | i128 | i128 |
//! | i64, u64 | i128 | 2^20 | i128 | i128 |
//! | int4, uint4, one in a byte | i16, u16 | 4096 | i64 | i128 |
//! | f16, bf16, f32 | f64 | 4096 | double-double | double-double |
//! | f64 | double-double | 4096 | double-double | double-double |
//!
//! Each element is read once. Lanes of real numbers add up in the order of the rows, whatever the tier.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64;

use half::{bf16, f16};

use crate::sealed::Sealed;
use crate::simd::{Isa, Tier, tiered};

/// What an element type is summed in. Of each, any bits are a value.
pub trait Element: Sealed + Copy + Send + Sync + 'static {
    /// The accumulator inside a block.
    type Lane: Lane;
    /// Additions to one lane before it is carried over.
    const BLOCK_ROWS: usize;
    /// Adds this element to a lane.
    fn add_to(self, lane: &mut Self::Lane);
    /// Adds a row to the lanes, one each.
    #[inline(always)]
    fn add_row(row: &[Self], lanes: &mut [Self::Lane], _tier: Tier) {
        for (lane, &x) in lanes.iter_mut().zip(row) {
            x.add_to(lane);
        }
    }
    /// Adds rows of as many elements as lanes stay in registers.
    #[inline(always)]
    fn add_to_registers(rows: &[[Self; LANES]], lanes: &mut [Self::Lane; LANES], tier: Tier) {
        let mut sums = *lanes;
        for row in rows {
            Self::add_row(row, &mut sums, tier);
        }
        *lanes = sums;
    }
}

/// An accumulator inside a block.
pub trait Lane: Sealed + Copy + Default + Send + Sync {
    /// The accumulator between blocks.
    type Total: Total;
    /// Carries the lane over.
    fn total(self) -> Self::Total;
    /// Carries the sum of up to 2^16 lanes over, added in an order given by their number.
    fn fold(lanes: &[Self]) -> Self::Total;
}

/// An accumulator between blocks.
pub trait Total: Sealed + Copy + Default + Send + Sync {
    /// The accumulator between samples.
    type Sum: Total<Sum = Self::Sum> + std::fmt::Debug;
    /// Whether sums are the same in any order.
    const EXACT: bool;
    /// Adds another total.
    fn merge(&mut self, other: Self);
    /// Carries the total over.
    fn sum(self) -> Self::Sum;
}

/// The sums of an element type between samples.
pub type SumOf<T> = <TotalOf<T> as Total>::Sum;

/// The sums of an element type between blocks.
pub type TotalOf<T> = <<T as Element>::Lane as Lane>::Total;

/// The unevaluated sum of two f64 (double-double): the rounding error of every addition is kept.
///
/// Source: Knuth, TAOCP vol. 2, 4.2.2, theorem B (TwoSum).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Compensated {
    /// The sum as plain f64 addition gives it.
    pub sum: f64,
    /// What rounding took from it; meaningless where `sum` is not finite.
    pub error: f64,
}

impl Sealed for Compensated {}

impl Compensated {
    /// Rounded to f64.
    pub fn value(self) -> f64 {
        if self.sum.is_finite() { self.sum + self.error } else { self.sum }
    }

    /// The quotient, of which rounding takes little more than half a unit in the last place.
    pub fn divided_by(self, divisor: f64) -> f64 {
        let rounded = self.sum / divisor;
        let rest = (-rounded).mul_add(divisor, self.sum) + self.error; // exact but for the last addition, on every CPU
        let quotient = rounded + rest / divisor;
        if quotient.is_finite() { quotient } else { rounded }
    }
}

impl From<i128> for Compensated {
    fn from(integer: i128) -> Self {
        /// Up to here f64 has every integer.
        const EXACT: u64 = 1 << f64::MANTISSA_DIGITS;
        match i64::try_from(integer) {
            // From i64 it is one instruction, from i128 a call.
            Ok(narrow) if narrow.unsigned_abs() <= EXACT => Compensated { sum: narrow as f64, error: 0.0 },
            _ => Compensated { sum: integer as f64, error: (integer - integer as f64 as i128) as f64 },
        }
    }
}

impl Total for Compensated {
    type Sum = Compensated;
    const EXACT: bool = false;
    #[inline(always)]
    fn merge(&mut self, other: Self) {
        let sum = self.sum + other.sum;
        let other_rounded = sum - self.sum;
        let error = (self.sum - (sum - other_rounded)) + (other.sum - other_rounded);
        *self = Compensated { sum, error: self.error + other.error + error };
    }
    #[inline(always)]
    fn sum(self) -> Compensated {
        self
    }
}

macro_rules! integer_total {
    ($($total:ty => $sum:ty),*) => {$(
        impl Total for $total {
            type Sum = $sum;
            const EXACT: bool = true;
            #[inline(always)]
            fn merge(&mut self, other: Self) {
                *self += other;
            }
            #[inline(always)]
            fn sum(self) -> $sum {
                self.into()
            }
        }
    )*};
}
integer_total!(i64 => i128, i128 => i128);

macro_rules! integer_lane {
    ($($lane:ty => $folded:ty => $total:ty),*) => {$(
        impl Lane for $lane {
            type Total = $total;
            #[inline(always)]
            fn total(self) -> $total {
                self.into()
            }
            #[inline(always)]
            fn fold(lanes: &[Self]) -> $total {
                <$total>::from(lanes.iter().map(|&lane| <$folded>::from(lane)).sum::<$folded>())
            }
        }
    )*};
}
integer_lane!(i16 => i32 => i64, u16 => u32 => i64, i32 => i64 => i64, i64 => i128 => i128, i128 => i128 => i128);

impl Lane for Compensated {
    type Total = Compensated;
    #[inline(always)]
    fn total(self) -> Compensated {
        self
    }
    #[inline(always)]
    fn fold(lanes: &[Self]) -> Compensated {
        fold_all(lanes)
    }
}

impl Lane for f64 {
    type Total = Compensated;
    #[inline(always)]
    fn total(self) -> Compensated {
        Compensated { sum: self, error: 0.0 }
    }
    /// Eight sums side by side, then pair by pair.
    #[inline(always)]
    fn fold(lanes: &[Self]) -> Compensated {
        let (eights, rest) = lanes.as_chunks::<8>();
        let mut sums = [0.0; 8];
        for eight in eights {
            for k in 0..8 {
                sums[k] += eight[k];
            }
        }
        sums.iter_mut().zip(rest).for_each(|(sum, lane)| *sum += lane);
        for half in [4, 2, 1] {
            for k in 0..half {
                sums[k] += sums[k + half];
            }
        }
        sums[0].total()
    }
}

macro_rules! element {
    ($($element:ty => $lane:ty, $block_rows:expr, $widen:expr;)*) => {$(
        impl Element for $element {
            type Lane = $lane;
            const BLOCK_ROWS: usize = $block_rows;
            #[inline(always)]
            fn add_to(self, lane: &mut $lane) {
                let widen: fn($element) -> $lane = $widen;
                *lane += widen(self);
            }
        }
    )*};
}
element! {
    i8 => i16, 1 << 8, |x| x.into();
    u8 => u16, 1 << 8, |x| x.into();
    i16 => i32, 1 << 15, |x| x.into();
    u16 => i32, 1 << 15, |x| x.into();
    i32 => i64, 1 << 20, |x| x.into();
    u32 => i64, 1 << 20, |x| x.into();
    i64 => i128, 1 << 20, |x| x.into();
    u64 => i128, 1 << 20, |x| x.into();
    f32 => f64, REAL_ROWS, |x| x.into();
}

/// A 4-bit integer in the low half of a byte, whatever is in the other.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Int4(pub u8);

/// The same, unsigned.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct UInt4(pub u8);

impl Sealed for Int4 {}
impl Sealed for UInt4 {}

element! {
    Int4 => i16, 1 << 12, |x| i16::from((x.0 << 4) as i8 >> 4);
    UInt4 => u16, 1 << 12, |x| u16::from(x.0 & 15);
}

/// Rows of a block of real numbers. Fixed: it decides the order of the sum.
const REAL_ROWS: usize = 4096;

impl Element for f64 {
    type Lane = Compensated;
    const BLOCK_ROWS: usize = REAL_ROWS;
    #[inline(always)]
    fn add_to(self, lane: &mut Compensated) {
        lane.merge(Compensated { sum: self, error: 0.0 });
    }
}

/// Numbers of 16 bits go eight at a time through instructions that the compiler does not find by itself (measured: two to three
/// times as fast).
macro_rules! half_element {
    ($half:ty, $widen:expr, $add_eight:ident, $widen_avx2:path) => {
        impl Element for $half {
            type Lane = f64;
            const BLOCK_ROWS: usize = REAL_ROWS;
            #[inline(always)]
            fn add_to(self, lane: &mut f64) {
                let widen: fn($half) -> f32 = $widen;
                *lane += f64::from(widen(self));
            }
            #[inline(always)]
            fn add_row(row: &[$half], lanes: &mut [f64], tier: Tier) {
                let (eights, rest) = row.as_chunks::<8>();
                let (lane_eights, lane_rest) = lanes.split_at_mut(8 * eights.len());
                for (lanes, eight) in lane_eights.as_chunks_mut::<8>().0.iter_mut().zip(eights) {
                    $add_eight(eight, lanes, tier);
                }
                for (x, lane) in rest.iter().zip(lane_rest) {
                    x.add_to(lane);
                }
            }
            #[inline(always)]
            fn add_to_registers(rows: &[[$half; LANES]], lanes: &mut [f64; LANES], tier: Tier) {
                let mut sums = [[0.0; 8]; LANES / 8];
                sums.as_flattened_mut().copy_from_slice(lanes);
                for row in rows {
                    let eights = row.as_chunks::<8>().0;
                    for k in 0..LANES / 8 {
                        $add_eight(&eights[k], &mut sums[k], tier);
                    }
                }
                lanes.copy_from_slice(sums.as_flattened());
            }
        }

        #[inline(always)]
        fn $add_eight(eight: &[$half; 8], lanes: &mut [f64; 8], #[allow(unused)] tier: Tier) {
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "calls leaves that need CPU features")]
            match tier.isa() {
                // SAFETY: the tier proves that the CPU has what the leaves need.
                Isa::Avx512 => return unsafe { add_f32s_avx512($widen_avx2(eight), lanes) },
                // SAFETY: as above.
                Isa::Avx2 => return unsafe { add_f32s_avx2($widen_avx2(eight), lanes) },
                _ => {}
            }
            for (x, lane) in eight.iter().zip(lanes) {
                x.add_to(lane);
            }
        }
    };
}
half_element!(f16, |x| f32_from_f16_bits(x.to_bits()), add_eight_f16s, f32s_from_f16s_avx2);
half_element!(bf16, |x| f32::from_bits(u32::from(x.to_bits()) << 16), add_eight_bf16s, f32s_from_bf16s_avx2);

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn f32s_from_f16s_avx2(halves: &[f16; 8]) -> x86_64::__m256 {
    #[expect(unsafe_code, reason = "an unaligned load")]
    // SAFETY: 16 bytes are there to load.
    let bits = unsafe { x86_64::_mm_loadu_si128(halves.as_ptr().cast()) };
    x86_64::_mm256_cvtph_ps(bits)
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn f32s_from_bf16s_avx2(halves: &[bf16; 8]) -> x86_64::__m256 {
    #[expect(unsafe_code, reason = "an unaligned load")]
    // SAFETY: 16 bytes are there to load.
    let bits = unsafe { x86_64::_mm_loadu_si128(halves.as_ptr().cast()) };
    x86_64::_mm256_castsi256_ps(x86_64::_mm256_slli_epi32::<16>(x86_64::_mm256_cvtepu16_epi32(bits)))
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
#[expect(unsafe_code, reason = "an unaligned load and store")]
fn add_f32s_avx512(wide: x86_64::__m256, lanes: &mut [f64; 8]) {
    // SAFETY: the lanes are there to load and store.
    unsafe {
        let sums = x86_64::_mm512_add_pd(x86_64::_mm512_loadu_pd(lanes.as_ptr()), x86_64::_mm512_cvtps_pd(wide));
        x86_64::_mm512_storeu_pd(lanes.as_mut_ptr(), sums);
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
#[expect(unsafe_code, reason = "unaligned loads and stores")]
fn add_f32s_avx2(wide: x86_64::__m256, lanes: &mut [f64; 8]) {
    let (low, high) = (x86_64::_mm256_castps256_ps128(wide), x86_64::_mm256_extractf128_ps::<1>(wide));
    for (lanes, wide) in lanes.as_chunks_mut::<4>().0.iter_mut().zip([low, high]) {
        // SAFETY: as above.
        unsafe {
            let sums = x86_64::_mm256_add_pd(x86_64::_mm256_loadu_pd(lanes.as_ptr()), x86_64::_mm256_cvtps_pd(wide));
            x86_64::_mm256_storeu_pd(lanes.as_mut_ptr(), sums);
        }
    }
}

/// Without branches, so that it vectorizes: the exponent is re-biased by a product, which is exact for subnormals too.
#[inline(always)]
fn f32_from_f16_bits(bits: u16) -> f32 {
    const REBIAS: f32 = f32::from_bits((127 + 127 - 15) << 23);
    const EXPONENT: u32 = 0x7f80_0000;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let sign = u32::from(bits & 0x8000) << 16;
    let finite = (f32::from_bits(magnitude) * REBIAS).to_bits();
    let special = magnitude | EXPONENT;
    f32::from_bits(sign | if magnitude >= 0x0f80_0000 { special } else { finite })
}

/// Accumulators that a contiguous run is spread over, so that few channels still fill wide registers. Fixed: it decides the
/// order of sums of real numbers.
pub const LANES: usize = 64;

/// Runs shorter than this are spread over few lanes only, 32 or 64 bytes of them: each lane has to be cleared and folded.
const SHORT_RUN: usize = 4 * LANES;

/// Four rows of up to this many bytes are added together, so that each lane is loaded and stored once for all of them. With
/// longer rows, leaping to and fro defeats the hardware prefetcher (measured: f32 at 256 channels halves) ...
const SHORT_ROW_BYTES: usize = 256;

/// ... unless the lanes take so much, half of a common L1 cache, that they would leave it with every row: then eight rows
/// are added together (measured: f32 at 8192 channels doubles).
const CACHED_BYTES: usize = 16 << 10;

tiered! { fn add_slab<T: Element>(slab: &[T], lanes: &mut [T::Lane]) = add_slab_body }
tiered! { fn add_rows<T: Element>(rows: &[&[T]], lanes: &mut [T::Lane]) = add_rows_body }
tiered! {
    /// The sum of each run; as many as there are totals.
    pub fn run_totals<T: Element>(runs: &Runs<T>, totals: &mut [TotalOf<T>]) = run_totals_body
}
tiered! { fn carry_over<L: Lane>(lanes: &mut [L], totals: &mut [L::Total]) = carry_over_body }

/// Adds row after row of `lanes.len()` elements; the last may be shorter.
#[inline(always)]
fn add_slab_body<T: Element>(tier: Tier, slab: &[T], lanes: &mut [T::Lane]) {
    let width = lanes.len();
    if let Ok(lanes) = <&mut [T::Lane; LANES]>::try_from(&mut *lanes) {
        let (rows, rest) = slab.as_chunks::<LANES>();
        T::add_to_registers(rows, lanes, tier);
        return T::add_row(rest, lanes, tier);
    }
    let rows = slab.len() / width;
    add_each(tier, rows, |row| &slab[row * width..][..width], lanes);
    T::add_row(&slab[rows * width..], lanes, tier);
}

/// Adds rows of `lanes.len()` elements each.
#[inline(always)]
fn add_rows_body<T: Element>(tier: Tier, rows: &[&[T]], lanes: &mut [T::Lane]) {
    add_each(tier, rows.len(), |row| rows[row], lanes);
}

#[inline(always)]
fn add_each<'a, T: Element>(tier: Tier, rows: usize, row: impl Fn(usize) -> &'a [T], lanes: &mut [T::Lane]) {
    let mut done = 0;
    if size_of_val(lanes) >= CACHED_BYTES {
        done = add_together::<T, 8>(tier, 0..rows, &row, lanes);
        done = add_together::<T, 4>(tier, done..rows, &row, lanes);
    } else if size_of::<T>() * lanes.len() <= SHORT_ROW_BYTES {
        done = add_together::<T, 4>(tier, 0..rows, &row, lanes);
    }
    for k in done..rows {
        T::add_row(row(k), lanes, tier);
    }
}

/// Adds groups of R rows, as many as there are, one stretch of lanes after the other. Returns the first row that is left.
#[inline(always)]
fn add_together<'a, T: Element, const R: usize>(
    tier: Tier, rows: std::ops::Range<usize>, row: impl Fn(usize) -> &'a [T], lanes: &mut [T::Lane],
) -> usize {
    let (stretches, rest) = lanes.as_chunks_mut::<STRETCH>();
    let start = STRETCH * stretches.len();
    let end = rows.start + rows.len() / R * R;
    for first in (rows.start..end).step_by(R) {
        let group: [&[T]; R] = std::array::from_fn(|k| row(first + k));
        let whole = group.map(|row| &row.as_chunks::<STRETCH>().0[..stretches.len()]);
        for (k, stretch) in stretches.iter_mut().enumerate() {
            let mut sums = *stretch;
            for row in &whole {
                T::add_row(&row[k], &mut sums, tier);
            }
            *stretch = sums;
        }
        for row in group {
            T::add_row(&row[start..], rest, tier);
        }
    }
    end
}

/// Lanes that stay in registers while a group of rows is added.
const STRETCH: usize = 32;

/// Runs of `len` elements, `stride` apart.
pub struct Runs<'a, T> {
    /// From the first element of the first to the last of the last.
    pub elements: &'a [T],
    /// Elements of a run.
    pub len: usize,
    /// Elements from the start of a run to that of the next.
    pub stride: usize,
}

#[inline(always)]
fn run_totals_body<T: Element>(tier: Tier, runs: &Runs<T>, totals: &mut [TotalOf<T>]) {
    for (k, total) in totals.iter_mut().enumerate() {
        *total = run_total(tier, &runs.elements[k * runs.stride..][..runs.len]);
    }
}

/// The sum of a run, over [`LANES`] lanes.
#[inline(always)]
fn run_total<T: Element>(tier: Tier, run: &[T]) -> TotalOf<T> {
    if run.len() < SHORT_RUN {
        let wide = size_of::<T::Lane>() > 4;
        return if wide { total_in_lanes::<T, 8>(tier, run) } else { total_in_lanes::<T, 16>(tier, run) };
    }
    let mut total = TotalOf::<T>::default();
    for block in run.chunks(LANES * T::BLOCK_ROWS) {
        let mut lanes = [T::Lane::default(); LANES];
        add_slab_body(tier, block, &mut lanes);
        total.merge(T::Lane::fold(&lanes));
    }
    total
}

/// The sum of a short run, over N lanes and one for what fills no row of them: lanes that are found by a variable would leave
/// their registers.
#[inline(always)]
fn total_in_lanes<T: Element, const N: usize>(tier: Tier, run: &[T]) -> TotalOf<T> {
    let (rows, rest) = run.as_chunks::<N>();
    let (mut lanes, mut last) = ([T::Lane::default(); N], T::Lane::default());
    for row in rows {
        T::add_row(row, &mut lanes, tier);
    }
    rest.iter().for_each(|x| x.add_to(&mut last));
    let mut total = T::Lane::fold(&lanes);
    total.merge(last.total());
    total
}

#[inline(always)]
fn carry_over_body<L: Lane>(_: Tier, lanes: &mut [L], totals: &mut [L::Total]) {
    if lanes.len() == totals.len() {
        for (total, lane) in totals.iter_mut().zip(lanes) {
            total.merge(std::mem::take(lane).total());
        }
        return;
    }
    let per_total = lanes.len() / totals.len();
    for (total, lanes) in totals.iter_mut().zip(lanes.chunks_mut(per_total)) {
        total.merge(L::fold(lanes));
        lanes.fill(L::default());
    }
}

/// The sum of totals: eight sums side by side, then one after the other.
#[inline(always)]
fn fold_all<A: Total>(totals: &[A]) -> A {
    let mut sums = [A::default(); 8];
    for eight in totals.chunks(8) {
        sums.iter_mut().zip(eight).for_each(|(sum, &total)| sum.merge(total));
    }
    let [mut sum, rest @ ..] = sums;
    rest.into_iter().for_each(|other| sum.merge(other));
    sum
}

/// The lanes of a block, and the totals they are carried over to: each has as many lanes, next to each other.
pub struct Block<T: Element> {
    lanes: Vec<T::Lane>,
    rows: usize,
    totals: Vec<TotalOf<T>>,
}

impl<T: Element> Block<T> {
    /// `lanes` is a multiple of `totals`.
    pub fn new(lanes: usize, totals: usize) -> Self {
        Block { lanes: vec![T::Lane::default(); lanes], rows: 0, totals: vec![Default::default(); totals] }
    }

    /// Adds contiguous rows, one element per lane.
    pub fn add_slab(&mut self, slab: &[T]) {
        let width = self.lanes.len();
        for rows in slab.chunks(width * T::BLOCK_ROWS) {
            self.make_room(rows.len().div_ceil(width));
            add_slab(rows, &mut self.lanes);
        }
    }

    /// Adds rows, no more than a block has, to the lanes from `lane` on.
    pub fn add_rows(&mut self, lane: usize, rows: &[&[T]]) {
        let Some(row) = rows.first() else { return };
        self.make_room(rows.len());
        add_rows(rows, &mut self.lanes[lane..lane + row.len()]);
    }

    fn make_room(&mut self, rows: usize) {
        if self.rows + rows > T::BLOCK_ROWS {
            self.carry_over();
        }
        self.rows += rows;
    }

    fn carry_over(&mut self) {
        carry_over(&mut self.lanes, &mut self.totals);
        self.rows = 0;
    }

    /// The sums. Sum `j` takes every total `j + k * sums`.
    pub fn finish(mut self, sums: usize) -> Vec<SumOf<T>> {
        self.carry_over();
        let (first, others) = self.totals.split_at_mut(sums);
        for totals in others.chunks(sums) {
            first.iter_mut().zip(totals).for_each(|(sum, &total)| sum.merge(total));
        }
        first.iter().map(|total| total.sum()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f32_from_f16_bits(bits), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#x}");
        }
    }

    #[test]
    fn quotients_are_rounded_once() {
        for (integer, divisor) in
            [((1i128 << 60) + 1, 3.0), (i128::from(i64::MIN) - 7, 10.0), ((1 << 50) + 3, 49.0), (-(1 << 53) - 1, 7.0)]
        {
            let exact = integer as f64 / divisor;
            let found = Compensated::from(integer).divided_by(divisor);
            // 40 more bits than the quotient has tell which neighbour is nearer.
            let nearest = ((integer << 40) / divisor as i128) as f64 / (1u64 << 40) as f64;
            assert_eq!(found, nearest, "{integer} / {divisor}, about {exact}");
        }
        for sum in [f64::INFINITY, f64::NEG_INFINITY, f64::MAX, -0.0] {
            assert_eq!(Compensated { sum, error: 0.0 }.divided_by(2.0), sum / 2.0);
        }
        assert!(Compensated { sum: f64::NAN, error: 0.0 }.divided_by(2.0).is_nan());
    }

    #[test]
    fn f16_rows_are_the_same_in_every_tier() {
        let row: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()).collect();
        let one_by_one: Vec<f64> = row.iter().map(|x| f64::from(f32_from_f16_bits(x.to_bits()))).collect();
        let mut lanes = vec![0.0; row.len()];
        f16::add_row(&row, &mut lanes, crate::simd::tier());
        assert_eq!(lanes, one_by_one);
    }
}
