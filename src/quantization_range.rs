//! Weights to the range that their quantizer spans.
//!
//! ```text
//! observed range   [min(W, 0), max(W, 0)]
//! cost of a range  sum over buckets of count * (centre - q)^2 * (3 if centre is outside the range, else 1)
//! ```
//!
//! `q` is the point of the range's grid that is nearest to the centre, so outside it is an end of the range. The buckets are
//! 512, equally wide, from the least weight to the greatest. A symmetric grid reaches as far as the observed range, or k/100 of
//! it; one that is not is the observed range itself, or is k/16 as wide with 0 at j/20 of its width, clamped into the observed
//! range. k = 0 leaves no grid. Of ranges with equal costs the first wins, widest first.
//!
//! Weights are contiguous, (C, M); each channel has a range of its own. All arithmetic is f64; costs are summed in eight lanes
//! over the buckets that are not empty, then pair by pair. Each weight is read once, or twice for a search.

use crate::error::Error;
use crate::fake_quantize::{Real, round_half_even};
use crate::memory;
use crate::parallel;
use crate::simd::{Tier, tiered};

/// Buckets of a histogram.
const BUCKETS: usize = 512;

/// Cost of a squared unit outside a range, in squared units inside.
const SATURATION_COST: f64 = 3.0;

/// Candidates of a symmetric search reach multiples of 1/100 of the observed range.
const REACHES: u32 = 100;

/// Widths and positions of 0 that a search of asymmetric ranges tries.
const WIDTHS: u32 = 16;
const POSITIONS: u32 = 20;

/// Bytes of weights whose reading takes about as long as a search of a channel, some 0.1 ms.
const SEARCH_BYTES: usize = 128 << 10;

const LANES: usize = 8;

/// The least and the greatest value that a grid has to have.
pub type Range = [f64; 2];

/// What is asked of a range.
#[derive(Clone, Copy, Debug)]
pub struct Quantizer {
    /// Bits of its grid.
    pub bits: u32,
    /// Whether 0 may be anywhere on the grid; else it is in the middle.
    pub asymmetric: bool,
    /// Whether the range of least cost is searched; else it is the observed one.
    pub search: bool,
}

/// The points `first * step ..= last * step`.
#[derive(Clone, Copy, Debug)]
struct Grid {
    scale: f64,
    step: f64,
    first: f64,
    last: f64,
}

impl Grid {
    /// None where the range is too narrow to have one.
    fn new([low, high]: Range, quantizer: Quantizer) -> Option<Grid> {
        let half = 2f64.powi(quantizer.bits as i32 - 1);
        let (steps, span) =
            if quantizer.asymmetric { (2.0 * half - 1.0, high - low) } else { (half - 1.0, high.max(-low)) };
        let scale = steps / span;
        let first = if quantizer.asymmetric { (low * scale).round_ties_even() } else { -half };
        let grid = Grid { scale, step: 1.0 / scale, first, last: first + (2.0 * half - 1.0) };
        scale.is_finite().then_some(grid)
    }
}

/// The buckets of a histogram that are not empty, and empty ones up to the next multiple of [`LANES`].
struct Histogram {
    centres: Vec<f64>,
    counts: Vec<f64>,
}

impl Histogram {
    /// None where all weights are equal, there are none, or f64 has no number for their distance.
    fn new<T: Real>(weights: &[T], [least, greatest]: Range) -> Option<Histogram> {
        let width = (greatest - least) / BUCKETS as f64;
        let per_unit = 1.0 / width;
        if !(per_unit > 0.0 && per_unit.is_finite()) {
            return None;
        }
        let mut counts = [0u64; BUCKETS];
        for weight in weights {
            counts[(((weight.widen() - least) * per_unit) as usize).min(BUCKETS - 1)] += 1;
        }
        let filled = counts.into_iter().enumerate().filter(|&(_, count)| count > 0);
        let (mut centres, mut counts): (Vec<f64>, Vec<f64>) =
            filled.map(|(bucket, count)| (least + (bucket as f64 + 0.5) * width, count as f64)).unzip();
        let padded = centres.len().next_multiple_of(LANES);
        centres.resize(padded, 0.0);
        counts.resize(padded, 0.0);
        Some(Histogram { centres, counts })
    }
}

/// The least and the greatest weight that lanes have seen, and 0, or nan where one was not finite.
#[derive(Clone, Copy)]
struct Extremes {
    least: [f64; LANES],
    greatest: [f64; LANES],
    zero: [f64; LANES],
}

impl Extremes {
    #[inline(always)]
    fn add<T: Real>(mut self, row: &[T; LANES]) -> Self {
        let row = row.map(T::widen);
        for (least, &x) in self.least.iter_mut().zip(&row) {
            *least = if x < *least { x } else { *least };
        }
        for (greatest, &x) in self.greatest.iter_mut().zip(&row) {
            *greatest = if x > *greatest { x } else { *greatest };
        }
        for (zero, &x) in self.zero.iter_mut().zip(&row) {
            *zero += x * 0.0;
        }
        self
    }
}

/// The least and the greatest weight; nan where some are not finite.
#[inline(always)]
fn extremes_body<T: Real>(_: Tier, weights: &[T]) -> Range {
    let mut lanes =
        Extremes { least: [f64::INFINITY; LANES], greatest: [f64::NEG_INFINITY; LANES], zero: [0.0; LANES] };
    let (rows, rest) = weights.as_chunks::<LANES>();
    for row in rows {
        lanes = lanes.add(row);
    }
    for &weight in rest {
        lanes = lanes.add(&[weight; LANES]);
    }
    let zero: f64 = lanes.zero.into_iter().sum();
    let least = lanes.least.into_iter().fold(f64::INFINITY, f64::min);
    [least + zero, lanes.greatest.into_iter().fold(f64::NEG_INFINITY, f64::max) + zero]
}

#[inline(always)]
fn cost_of(x: f64, count: f64, grid: Grid) -> f64 {
    let error = x - round_half_even(x * grid.scale).clamp(grid.first, grid.last) * grid.step;
    let outside = (x < grid.first * grid.step) | (x > grid.last * grid.step);
    count * if outside { SATURATION_COST } else { 1.0 } * (error * error)
}

/// The cost of a grid. What each bucket costs goes to a buffer first, in a loop that vectorizes.
#[inline(always)]
fn cost_body(_: Tier, histogram: &Histogram, grid: Grid, costs: &mut [f64]) -> f64 {
    for ((cost, &x), &count) in costs.iter_mut().zip(&histogram.centres).zip(&histogram.counts) {
        *cost = cost_of(x, count, grid);
    }
    let mut sums = [0.0; LANES];
    for row in costs.as_chunks::<LANES>().0 {
        sums.iter_mut().zip(row).for_each(|(sum, cost)| *sum += cost);
    }
    for half in [4, 2, 1] {
        for k in 0..half {
            sums[k] += sums[k + half];
        }
    }
    sums[0]
}

tiered! { fn extremes<T: Real>(weights: &[T]) -> Range = extremes_body }
tiered! { fn cost<>(histogram: &Histogram, grid: Grid, costs: &mut [f64]) -> f64 = cost_body }

/// Ranges narrower than the observed one, widest first.
fn candidates([low, high]: Range, asymmetric: bool) -> Vec<Range> {
    if !asymmetric {
        let reach = high.max(-low);
        let reaches = (1..REACHES).rev().map(|k| reach * (f64::from(k) / f64::from(REACHES)));
        return reaches.map(|reach| [-reach, reach]).collect();
    }
    let widths = (1..=WIDTHS).rev().map(|k| (high - low) * (f64::from(k) / f64::from(WIDTHS)));
    let ranges = |width: f64| {
        (0..=POSITIONS).map(move |j| {
            let below = width * (f64::from(j) / f64::from(POSITIONS));
            [low.max(-below), high.min(width - below)]
        })
    };
    widths.flat_map(ranges).collect()
}

fn least_cost(observed: Range, histogram: &Histogram, quantizer: Quantizer) -> Range {
    let mut costs = vec![0.0; histogram.counts.len()];
    let mut best = (f64::INFINITY, observed);
    for range in std::iter::once(observed).chain(candidates(observed, quantizer.asymmetric)) {
        if let Some(grid) = Grid::new(range, quantizer) {
            let cost = cost(histogram, grid, &mut costs);
            best = if cost < best.0 { (cost, range) } else { best };
        }
    }
    best.1
}

/// None where some weights are not finite.
fn range_of<T: Real>(weights: &[T], quantizer: Quantizer) -> Option<Range> {
    let [least, greatest] = extremes(weights);
    if least.is_nan() {
        return None;
    }
    let observed = [least.min(0.0), greatest.max(0.0)];
    if !quantizer.search {
        return Some(observed);
    }
    let histogram = Histogram::new(weights, [least, greatest]);
    Some(histogram.map_or(observed, |histogram| least_cost(observed, &histogram, quantizer)))
}

/// Bytes for each channel: its weights, and its range while it is found.
const OF_CHANNEL: usize = 64;

/// The range of each channel of (C, M) weights: C is the number of `ranges`. Without weights it is 0 to 0.
pub fn quantization_range<T: Real>(weights: &[T], quantizer: Quantizer, ranges: &mut [Range]) -> Result<(), Error> {
    memory::check(ranges.len(), OF_CHANNEL)?;
    let len = weights.len() / ranges.len().max(1);
    let rows = (0..ranges.len()).map(|c| &weights[c * len..(c + 1) * len]).collect();
    let found =
        parallel::map(rows, work(size_of_val(weights), ranges.len(), quantizer), |row| range_of(row, quantizer))?;
    for (range, found) in ranges.iter_mut().zip(found) {
        *range = found.ok_or(Error::NotFinite)?;
    }
    Ok(())
}

/// How much there is to do, in bytes of weights.
pub fn work(bytes: usize, channels: usize, quantizer: Quantizer) -> usize {
    if quantizer.search { bytes + channels * SEARCH_BYTES } else { bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEARCH: Quantizer = Quantizer { bits: 4, asymmetric: true, search: true };

    fn range(weights: &[f64], quantizer: Quantizer) -> Result<Range, Error> {
        let mut ranges = [[0.0; 2]];
        quantization_range(weights, quantizer, &mut ranges).map(|()| ranges[0])
    }

    #[test]
    fn the_observed_range_contains_zero() {
        let quantizer = Quantizer { search: false, ..SEARCH };
        assert_eq!(range(&[1.0, 2.0], quantizer), Ok([0.0, 2.0]));
        assert_eq!(range(&[-2.0, -1.0], quantizer), Ok([-2.0, 0.0]));
        assert_eq!(range(&[], quantizer), Ok([0.0, 0.0]));
    }

    #[test]
    fn what_has_no_histogram_keeps_its_range() {
        for asymmetric in [false, true] {
            let quantizer = Quantizer { asymmetric, ..SEARCH };
            for (weights, expected) in [
                (vec![], [0.0, 0.0]),
                (vec![0.0; 9], [0.0, 0.0]),
                (vec![3.0; 9], [0.0, 3.0]),
                (vec![-3.0], [-3.0, 0.0]),
            ] {
                assert_eq!(range(&weights, quantizer), Ok(expected));
            }
            assert_eq!(range(&[-1e308, 1e308], quantizer), Ok([-1e308, 1e308]));
            assert_eq!(range(&[0.0, 1e-320], quantizer), Ok([0.0, 1e-320]));
        }
    }

    #[test]
    fn nan_and_infinities_anywhere_are_an_error() {
        for wrong in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for at in 0..20 {
                let mut weights = [1.0; 20];
                weights[at] = wrong;
                assert_eq!(range(&weights, SEARCH), Err(Error::NotFinite));
            }
        }
    }

    #[test]
    fn each_channel_has_its_own_range() {
        let mut ranges = [[0.0; 2]; 3];
        quantization_range(&[1f32, 2.0, -3.0, 4.0, -5.0, -6.0], Quantizer { search: false, ..SEARCH }, &mut ranges)
            .unwrap();
        assert_eq!(ranges, [[0.0, 2.0], [-3.0, 4.0], [-6.0, 0.0]]);
    }
}
