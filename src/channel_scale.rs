//! How far the weights of each channel reach, and weights with their channels scaled.
//!
//! ```text
//! range[g*O+o]    = max over s,i of |W[s,i,g,o]| * factor[g*I+i]        of input channels likewise; no factors are 1
//! scaled[s,i,g,o] = (W[s,i,g,o] * output_factor[g*O+o]) * input_factor[g*I+i]
//! ```
//!
//! `W` in any axis order and stride, f32 or f64; factors f64, for ranges at least 0. Ranges are f64; scaled weights are computed in f64,
//! rounded once, and contiguous. The greatest of numbers does not depend on their order, so neither result depends on how the
//! work is cut. Magnitudes are compared by their bits as integers: these are in the order of the numbers, nan above all.
//! Each weight is read once, in memory order where it is read for ranges, and in C order where it is scaled.
//!
//! Source: arXiv 1906.04721, section 4.1.

use std::iter::repeat_n;

use crate::error::Error;
use crate::fake_quantize::Real;
use crate::layout::{Axis, Elements, Nest};
use crate::parallel;
use crate::simd::{Tier, tiered};
use crate::weights::{Channels, Tensor};

/// A real number whose magnitude has the order of integers.
pub trait Magnitude: Real {
    /// The bits without the sign.
    type Bits: Copy + Default + Ord;
    /// Of the absolute value.
    fn magnitude(self) -> Self::Bits;
    /// The absolute value again, exactly.
    fn of_magnitude(bits: Self::Bits) -> f64;
}

impl Magnitude for f32 {
    type Bits = i32;
    #[inline(always)]
    fn magnitude(self) -> i32 {
        self.abs().to_bits() as i32
    }
    #[inline(always)]
    fn of_magnitude(bits: i32) -> f64 {
        f64::from(f32::from_bits(bits as u32))
    }
}

impl Magnitude for f64 {
    type Bits = i64;
    #[inline(always)]
    fn magnitude(self) -> i64 {
        self.abs().to_bits() as i64
    }
    #[inline(always)]
    fn of_magnitude(bits: i64) -> f64 {
        f64::from_bits(bits as u64)
    }
}

/// What weights are multiplied by before their magnitudes are compared.
trait Multiplier<T>: Copy {
    /// Magnitudes of the products.
    type Bits: Copy + Default + Ord;
    fn new(factor: f64) -> Self;
    fn times(self, w: T) -> Self::Bits;
    fn widened(bits: Self::Bits) -> f64;
}

impl<T: Magnitude> Multiplier<T> for f64 {
    type Bits = i64;
    #[inline(always)]
    fn new(factor: f64) -> f64 {
        factor
    }
    #[inline(always)]
    fn times(self, w: T) -> i64 {
        (w.widen() * self).magnitude()
    }
    #[inline(always)]
    fn widened(bits: i64) -> f64 {
        f64::of_magnitude(bits)
    }
}

/// The multiplier where there are no factors: magnitudes are as wide as weights.
#[derive(Clone, Copy)]
struct One;

impl<T: Magnitude> Multiplier<T> for One {
    type Bits = T::Bits;
    #[inline(always)]
    fn new(_: f64) -> One {
        One
    }
    #[inline(always)]
    fn times(self, w: T) -> T::Bits {
        w.magnitude()
    }
    #[inline(always)]
    fn widened(bits: T::Bits) -> f64 {
        T::of_magnitude(bits)
    }
}

#[inline(always)]
fn greatest_body<T: Magnitude>(_: Tier, w: &[T]) -> f64 {
    T::of_magnitude(w.iter().fold(T::Bits::default(), |most, w| most.max(w.magnitude())))
}

/// Of each row times factors that the rows share.
#[inline(always)]
fn greatest_products_body<T: Magnitude>(_: Tier, rows: &[&[T]], factors: &[f64], greatest: &mut [f64]) {
    if let (Ok(rows), Ok(greatest)) = (<[&[T]; ROWS]>::try_from(rows), <&mut [f64; ROWS]>::try_from(&mut *greatest)) {
        *greatest = products_together(rows, factors);
        return;
    }
    for (row, most) in rows.iter().zip(greatest) {
        [*most] = products_together([*row], factors);
    }
}

#[inline(always)]
fn products_together<T: Magnitude, const R: usize>(rows: [&[T]; R], factors: &[f64]) -> [f64; R] {
    let rows = rows.map(|row| &row[..factors.len()]);
    let mut greatest = [0; R];
    for (k, factor) in factors.iter().enumerate() {
        for r in 0..R {
            greatest[r] = greatest[r].max((rows[r][k].widen() * factor).magnitude());
        }
    }
    greatest.map(f64::of_magnitude)
}

/// Rows of weights that share one pass over their factors or the greatest magnitudes so far, which are twice as wide as f32.
const ROWS: usize = 4;

/// Up to this length the numbers that rows share stay in the L1 cache (8 KB), and rows are read one after the other, as
/// hardware prefetchers like best.
const SHORT_ROW: usize = 1024;

/// Raises the greatest magnitudes so far to those of rows times a factor each.
#[inline(always)]
fn raise_body<T: Magnitude, M: Multiplier<T>>(_: Tier, rows: &[&[T]], factors: &[M], greatest: &mut [M::Bits]) {
    if let (Ok(rows), Ok(factors)) = (<[&[T]; ROWS]>::try_from(rows), <[M; ROWS]>::try_from(factors))
        && (greatest.len() > SHORT_ROW || greatest.len() < NARROW_ROW)
    {
        return raise_together(rows, factors, greatest);
    }
    for (row, &factor) in rows.iter().zip(factors) {
        raise_together([*row], [factor], greatest);
    }
}

#[inline(always)]
fn raise_together<T: Magnitude, M: Multiplier<T>, const R: usize>(
    rows: [&[T]; R], factors: [M; R], greatest: &mut [M::Bits],
) {
    let len = greatest.len();
    let rows = rows.map(|row| &row[..len]);
    for k in 0..len {
        let mut most = greatest[k];
        for r in 0..R {
            most = most.max(factors[r].times(rows[r][k]));
        }
        greatest[k] = most;
    }
}

/// The same for one row with a factor for each weight.
#[inline(always)]
fn raise_each_body<T: Magnitude, M: Multiplier<T>>(_: Tier, row: &[T], factors: &[f64], greatest: &mut [M::Bits]) {
    for ((most, &w), &factor) in greatest.iter_mut().zip(row).zip(factors) {
        *most = (*most).max(M::new(factor).times(w));
    }
}

#[inline(always)]
fn scale_body<T: Real>(_: Tier, w: &[T], output: Factor, input: Factor, scaled: &mut [T]) {
    let product = |w: &T, output: f64, input: f64| T::narrow((w.widen() * output) * input);
    let pairs = scaled.iter_mut().zip(w);
    match (output, input) {
        (Factor::One(output), Factor::One(input)) => pairs.for_each(|(y, w)| *y = product(w, output, input)),
        (Factor::One(output), Factor::Each(inputs)) => {
            pairs.zip(inputs).for_each(|((y, w), &input)| *y = product(w, output, input));
        }
        (Factor::Each(outputs), Factor::One(input)) => {
            pairs.zip(outputs).for_each(|((y, w), &output)| *y = product(w, output, input));
        }
        (Factor::Each(outputs), Factor::Each(inputs)) => {
            pairs.zip(outputs).zip(inputs).for_each(|(((y, w), &output), &input)| *y = product(w, output, input));
        }
    }
}

tiered! { fn greatest<T: Magnitude>(w: &[T]) -> f64 = greatest_body }
tiered! { fn greatest_products<T: Magnitude>(rows: &[&[T]], factors: &[f64], most: &mut [f64]) = greatest_products_body }
tiered! {
    fn raise<T: Magnitude, M: Multiplier<T>>(rows: &[&[T]], factors: &[M], greatest: &mut [M::Bits]) = raise_body
}
tiered! {
    fn raise_each<T: Magnitude, M: Multiplier<T>>(row: &[T], factors: &[f64], greatest: &mut [M::Bits]) =
        raise_each_body::<T, M>
}
tiered! { fn scale<T: Real>(w: &[T], output: Factor, input: Factor, scaled: &mut [T]) = scale_body }

/// Rows that are shorter share a pass too: a call for each would cost more than it does.
const NARROW_ROW: usize = 256;

/// A shorter run takes the loop around it in, until it is as long: what a run costs beside its elements then hardly counts.
const SHORT_RUN: usize = 32;

/// Elements of a run of several loops, about, where the outer of them meets no other channels.
const SHORT_LOOPS: usize = 256;

/// No run is longer, so that what it needs beside its weights stays in the L2 cache: 128 KB of f64.
const LONG_RUN: usize = 16 << 10;

/// Weights of one part, at least: 512 KB of f32.
const PART: usize = 128 << 10;

/// Weights whose ranges are asked for are cut into no more parts, which bounds the memory of their partial ranges.
const MAX_PARTS: usize = 16;

/// A loop with fewer steps is cut where no other will do: its parts would leave threads without work.
const FEW_PARTS: usize = 8;

/// Ranges are found so many times faster than the sums that the least work for threads was measured with, about.
const READ_SPEED: usize = 4;

/// Loops cut in two: the outer ones, and the inner ones whose elements are taken together as a run. The last two operands count
/// channels.
struct Runs<const N: usize> {
    outer: Nest<N>,
    run: Nest<N>,
}

impl<const N: usize> Runs<N> {
    /// The runs of a nest; where one loop does not divide into them, another kind for the rest.
    fn of(mut nest: Nest<N>) -> Vec<Self> {
        nest.axes.retain(|axis| axis.len != 1);
        let nest = nest.merged();
        let inner = nest.axes.len() - 1;
        let (mut first, mut within) = (inner, 1);
        while first > 0 && within * nest.axes[first].len < SHORT_RUN && Self::joins(&nest.axes, first - 1) {
            within *= nest.axes[first].len;
            first -= 1;
        }
        let Axis { len, strides } = nest.axes[first];
        let changes = first == inner || strides[N - 2..] != [0, 0];
        let limit = if changes { LONG_RUN } else { SHORT_LOOPS };
        let most = (limit / within).clamp(1, len);
        let piece = |start: usize, steps: usize, len: usize| {
            let mut outer = Nest { axes: nest.axes[..first].to_vec(), origin: nest.origin };
            if steps > 1 {
                outer.axes.push(Axis { len: steps, strides: strides.map(|stride| stride * len as isize) });
            }
            outer.origin.iter_mut().zip(strides).for_each(|(origin, stride)| *origin += start as isize * stride);
            let run = Nest::new([&[Axis { len, strides }], &nest.axes[first + 1..]].concat());
            Runs { outer, run }.with_changing_channels_outside()
        };
        let whole = piece(0, len / most, most);
        if len % most == 0 { vec![whole] } else { vec![whole, piece(len / most * most, 1, len % most)] }
    }

    /// Whether a run may take in the loop at `k`: where that changes channels, a loop around it has to meet these again.
    fn joins(axes: &[Axis<N>], k: usize) -> bool {
        let changes = |axis: &Axis<N>| [N - 2, N - 1].map(|operand| axis.strides[operand] != 0);
        let [first, second] = changes(&axes[k]);
        let meets_again = |axis| !matches!((changes(axis), first, second), ([true, _], true, _) | ([_, true], _, true));
        !(first || second) || axes[..k].iter().any(meets_again)
    }

    /// Outer loops that change which channels a run meets come first: what is made for these serves many runs.
    fn with_changing_channels_outside(mut self) -> Self {
        let met = [N - 2, N - 1].map(|operand| self.meets(operand));
        self.outer.axes.sort_by_key(|axis| !(0..2).any(|k| met[k] && axis.strides[N - 2 + k] != 0));
        self
    }

    /// Whether elements of a run differ in what they meet of an operand.
    fn meets(&self, operand: usize) -> bool {
        self.run.axes.iter().any(|axis| axis.strides[operand] != 0)
    }

    /// Distance of the elements of a run, if there is one.
    fn stride(&self, operand: usize) -> Option<isize> {
        let follow = |pair: &[Axis<N>]| pair[0].strides[operand] == pair[1].strides[operand] * pair[1].len as isize;
        let inner = self.run.axes.last()?;
        self.run.axes.windows(2).all(follow).then_some(inner.strides[operand])
    }

    /// Calls `f` with the offset of each inner loop of a run, its length and its stride.
    fn walk_run(&self, operand: usize, start: isize, mut f: impl FnMut(isize, usize, isize)) {
        let depth = self.run.axes.len() - 1;
        let Axis { len, strides } = self.run.axes[depth];
        self.run.walk(depth, |offsets| f(start + offsets[operand], len, strides[operand]));
    }
}

/// The weights of runs: where they lie, or copied where they are apart.
struct Source<'a, T> {
    elements: Elements<'a, T>,
    operand: usize,
    stride: Option<isize>,
    buffer: Vec<T>,
}

impl<'a, T: Copy> Source<'a, T> {
    fn new<const N: usize>(elements: Elements<'a, T>, operand: usize, runs: &Runs<N>) -> Self {
        Source { elements, operand, stride: runs.stride(operand), buffer: Vec::new() }
    }

    fn run<const N: usize>(&mut self, runs: &Runs<N>, start: isize) -> &[T] {
        if let Some(stride) = self.stride {
            return self.elements.gathered(start, runs.run.len(), stride, &mut self.buffer);
        }
        self.buffer.clear();
        runs.walk_run(self.operand, start, |at, len, stride| {
            self.buffer.extend((0..len as isize).map(|k| self.elements.get(at + k * stride)));
        });
        &self.buffer
    }
}

/// The factors of a run: one for all its elements, or one for each.
#[derive(Clone, Copy)]
enum Factor<'a> {
    One(f64),
    Each(&'a [f64]),
}

/// The factors of channels, and those of a run: where they lie, or repeated as often as the run meets them.
struct Factors<'a> {
    values: Option<&'a [f64]>,
    operand: usize,
    meets: bool,
    stride: Option<isize>,
    repeated: Vec<f64>,
    start: Option<isize>,
}

impl<'a> Factors<'a> {
    fn new<const N: usize>(values: Option<&'a [f64]>, operand: usize, runs: &Runs<N>) -> Self {
        let (meets, stride) = (runs.meets(operand), runs.stride(operand));
        Factors { values, operand, meets, stride, repeated: Vec::new(), start: None }
    }

    fn run<const N: usize>(&mut self, runs: &Runs<N>, start: isize) -> Factor<'_> {
        let Some(values) = self.values.filter(|_| self.meets) else { return Factor::One(self.one(start)) };
        if self.stride == Some(1) {
            return Factor::Each(&values[start as usize..start as usize + runs.run.len()]);
        }
        if self.start != Some(start) {
            self.start = Some(start);
            self.repeated.clear();
            runs.walk_run(self.operand, start, |at, len, stride| match stride {
                0 => self.repeated.extend(repeat_n(values[at as usize], len)),
                _ => self.repeated.extend((0..len as isize).map(|k| values[(at + k * stride) as usize])),
            });
        }
        Factor::Each(&self.repeated)
    }

    /// The factor of a run whose elements meet one.
    fn one(&self, start: isize) -> f64 {
        self.values.map_or(1.0, |values| values[start as usize])
    }
}

/// Cuts a nest along its outermost loops, by its size alone, into parts that each are one after the other in operand 0.
fn parts<const N: usize>(nest: Nest<N>, most: usize) -> Vec<Nest<N>> {
    match nest.axes.iter().position(|axis| axis.len > 1) {
        Some(axis) if nest.len() > most => {
            let pieces = nest.split(axis, nest.len().div_ceil(most));
            pieces.into_iter().flat_map(|piece| parts(piece, most)).collect()
        }
        _ => vec![nest],
    }
}

/// A side of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its output channels.
    Output,
    /// Its input channels.
    Input,
}

/// Checks that there is a factor for each channel.
fn checked_count(name: &'static str, factors: Option<&[f64]>, channels: usize) -> Result<(), Error> {
    match factors {
        Some(factors) if factors.len() != channels => {
            Err(Error::FactorCount { name, found: factors.len(), expected: channels })
        }
        _ => Ok(()),
    }
}

/// Checks that there is a factor of at least 0 for each channel.
fn checked_factors(name: &'static str, factors: Option<&[f64]>, channels: usize) -> Result<(), Error> {
    checked_count(name, factors, channels)?;
    let Some(factors) = factors else { return Ok(()) };
    match factors.iter().position(|factor| !(0.0..f64::INFINITY).contains(factor)) {
        Some(index) => Err(Error::Factor { name, index, found: factors[index].to_string() }),
        None => Ok(()),
    }
}

/// The greatest magnitude of the weights of each channel on one side, times the factors of the channels on the other.
pub fn channel_ranges<T: Magnitude>(
    weights: &Tensor<T>, layout: &str, side: Side, groups: usize, factors: Option<&[f64]>,
) -> Result<Vec<f64>, Error> {
    let channels = Channels::new(weights.shape, groups, layout)?;
    let (count, others) = match side {
        Side::Output => (channels.outputs, channels.inputs),
        Side::Input => (channels.inputs, channels.outputs),
    };
    checked_factors("factors", factors, others)?;
    let axes = channels.loops.iter().map(|l| {
        let (range, factor) = if side == Side::Output { (l.output, l.input) } else { (l.input, l.output) };
        let factor = if factors.is_some() { factor } else { 0 };
        Axis { len: l.len, strides: [weights.strides[l.axis] * l.step as isize, range, factor] }
    });
    let nest = Nest::new(axes.collect()).in_memory_order().merged();
    let mut ranges = vec![0; count];
    if nest.is_empty() {
        return Ok(vec![0.0; count]);
    }
    let (parts, work) = (parts_of_ranges(nest), size_of::<T>() * weights.len() / READ_SPEED);
    for (start, part) in parallel::map(parts, work, |part| ranges_of(weights.elements, factors, part))? {
        ranges[start..].iter_mut().zip(part).for_each(|(range, part): (&mut i64, i64)| *range = part.max(*range));
    }
    Ok(ranges.into_iter().map(f64::of_magnitude).collect())
}

/// Cuts a nest by its size alone: along the outermost loop that leaves the parts few ranges beside their weights.
fn parts_of_ranges(nest: Nest<3>) -> Vec<Nest<3>> {
    let count = (nest.len() / PART).clamp(1, MAX_PARTS);
    let reach = |axis: &Axis<3>| (axis.len - 1) * axis.strides[1].unsigned_abs();
    let all: usize = nest.axes.iter().map(reach).sum();
    let ranges_of_parts = |&k: &usize| {
        let parts = count.min(nest.axes[k].len);
        parts * (1 + all - reach(&nest.axes[k])) + reach(&nest.axes[k])
    };
    let few = |k: &usize| nest.axes[*k].len >= count.min(FEW_PARTS) && ranges_of_parts(k) <= nest.len() / MAX_PARTS;
    let loops = 0..nest.axes.len();
    let axis = loops.clone().find(few).or_else(|| loops.min_by_key(ranges_of_parts)).unwrap_or(0);
    nest.split(axis, count)
}

/// The magnitudes that a part of the weights reaches, and the channel of the first of them.
fn ranges_of<T: Magnitude>(elements: Elements<T>, factors: Option<&[f64]>, mut part: Nest<3>) -> (usize, Vec<i64>) {
    let reach = |axis: &Axis<3>| (axis.len - 1) as isize * axis.strides[1];
    let start = part.origin[1] + part.axes.iter().map(|axis| reach(axis).min(0)).sum::<isize>();
    let mut ranges = vec![0; part.axes.iter().map(|axis| reach(axis).unsigned_abs()).sum::<usize>() + 1];
    part.origin[1] -= start;
    for runs in Runs::of(part) {
        let factors = Factors::new(factors, 2, &runs);
        let source = Source::new(elements, 0, &runs);
        match (runs.meets(1), factors.values) {
            (false, _) => raise_one_range_each(&runs, source, factors, &mut ranges),
            (true, None) => raise_ranges::<T, One>(&runs, source, factors, &mut ranges),
            (true, Some(_)) => raise_ranges::<T, f64>(&runs, source, factors, &mut ranges),
        }
    }
    (start as usize, ranges)
}

/// Of runs that belong to one channel each.
fn raise_one_range_each<T: Magnitude>(runs: &Runs<3>, mut source: Source<T>, mut factors: Factors, ranges: &mut [i64]) {
    let mut outer = runs.outer.clone();
    let share = factors.meets && source.stride == Some(1) && runs.run.len() > SHORT_ROW;
    let rows = outer.axes.pop_if(|axis| share && axis.strides[2] == 0).unwrap_or(Axis { len: 1, strides: [0; 3] });
    outer.walk(outer.axes.len(), |[w, range, factor]| {
        for first in (0..rows.len).step_by(ROWS) {
            let mut most = [0.0; ROWS];
            let count = ROWS.min(rows.len - first);
            let at = |start: isize, k: usize, operand: usize| start + (first + k) as isize * rows.strides[operand];
            match factors.run(runs, factor) {
                Factor::One(factor) => most[0] = greatest(source.run(runs, w)) * factor,
                Factor::Each(factors) if count == 1 => {
                    greatest_products(&[source.run(runs, at(w, 0, 0))], factors, &mut most[..1]);
                }
                Factor::Each(factors) => {
                    let row = |k: usize| source.elements.run(at(w, k.min(count - 1), 0), factors.len());
                    let together: [&[T]; ROWS] = std::array::from_fn(row);
                    greatest_products(&together[..count], factors, &mut most[..count]);
                }
            }
            for (k, most) in most[..count].iter().enumerate() {
                let range = &mut ranges[at(range, k, 1) as usize];
                *range = most.magnitude().max(*range);
            }
        }
    });
}

/// Of runs of many channels: the greatest magnitude at each position first, then of each channel.
fn raise_ranges<T: Magnitude, M: Multiplier<T>>(
    runs: &Runs<3>, mut source: Source<T>, mut factors: Factors, ranges: &mut [i64],
) {
    let mut greatest = vec![M::Bits::default(); runs.run.len()];
    let mut outer = runs.outer.clone();
    let rows = outer.axes.pop_if(|axis| axis.strides[1] == 0).unwrap_or(Axis { len: 1, strides: [0; 3] });
    let mut met = outer.origin[1];
    outer.walk(outer.axes.len(), |[w, range, factor]| {
        if range != met {
            join::<T, M>(runs, met, &greatest, ranges);
            greatest.fill(M::Bits::default());
            met = range;
        }
        let row = |k: usize| [w + k as isize * rows.strides[0], factor + k as isize * rows.strides[2]];
        raise_rows::<T, M>((0..rows.len).map(row), runs, &mut source, &mut factors, &mut greatest);
    });
    join::<T, M>(runs, met, &greatest, ranges);
}

/// `rows` are where rows of weights and their factors start.
fn raise_rows<T: Magnitude, M: Multiplier<T>>(
    mut rows: impl Iterator<Item = [isize; 2]>, runs: &Runs<3>, source: &mut Source<T>, factors: &mut Factors,
    greatest: &mut [M::Bits],
) {
    while let Some([w, factor]) = rows.next() {
        let one = match factors.run(runs, factor) {
            Factor::Each(factors) => {
                raise_each::<T, M>(source.run(runs, w), factors, greatest);
                continue;
            }
            Factor::One(factor) => M::new(factor),
        };
        if source.stride != Some(1) {
            raise(&[source.run(runs, w)], &[one], greatest);
            continue;
        }
        let len = greatest.len();
        let (mut together, mut ones, mut count) = ([source.elements.run(w, len); ROWS], [one; ROWS], 1);
        for [w, factor] in rows.by_ref().take(ROWS - 1) {
            together[count] = source.elements.run(w, len);
            ones[count] = M::new(factors.one(factor));
            count += 1;
        }
        raise(&together[..count], &ones[..count], greatest);
    }
}

/// Raises ranges to the greatest magnitudes of a run that starts at channel `start`.
fn join<T, M: Multiplier<T>>(runs: &Runs<3>, start: isize, greatest: &[M::Bits], ranges: &mut [i64]) {
    let mut rest = greatest;
    let mut raise = |channel: isize, bits| {
        let range = &mut ranges[channel as usize];
        *range = M::widened(bits).magnitude().max(*range);
    };
    runs.walk_run(1, start, |at, len, stride| {
        let (each, after) = rest.split_at(len);
        rest = after;
        match stride {
            0 => raise(at, each.iter().fold(M::Bits::default(), |most, &bits| most.max(bits))),
            _ => each.iter().enumerate().for_each(|(k, &bits)| raise(at + k as isize * stride, bits)),
        }
    });
}

/// Weights times the factors of their output channels, then times those of their input channels, in C order.
pub fn scaled_channels<T: Real>(
    weights: &Tensor<T>, layout: &str, groups: usize, [outputs, inputs]: [Option<&[f64]>; 2], scaled: &mut [T],
) -> Result<(), Error> {
    let channels = Channels::new(weights.shape, groups, layout)?;
    checked_count("output_factors", outputs, channels.outputs)?;
    checked_count("input_factors", inputs, channels.inputs)?;
    let mut at = weights.len() as isize;
    let axes = channels.loops.iter().map(|l| {
        at /= l.len.max(1) as isize;
        let moves = |factors: Option<&[f64]>, stride| if factors.is_some() { stride } else { 0 };
        let w = weights.strides[l.axis] * l.step as isize;
        Axis { len: l.len, strides: [at, w, moves(outputs, l.output), moves(inputs, l.input)] }
    });
    let nest = Nest::new(axes.collect()).in_memory_order().merged();
    if nest.is_empty() {
        return Ok(());
    }
    let mut rest = scaled;
    let cut = parts(nest, PART).into_iter().map(|part| {
        let (piece, after) = std::mem::take(&mut rest).split_at_mut(part.len());
        rest = after;
        (part, piece)
    });
    let cut = cut.collect();
    let bytes = 2 * size_of::<T>() * weights.len();
    parallel::map(cut, bytes, |(part, piece)| scale_part(weights.elements, [outputs, inputs], part, piece)).map(drop)
}

fn scale_part<T: Real>(
    elements: Elements<T>, [outputs, inputs]: [Option<&[f64]>; 2], mut part: Nest<4>, scaled: &mut [T],
) {
    part.origin[0] = 0;
    for runs in Runs::of(part) {
        let len = runs.run.len();
        let (mut outputs, mut inputs) = (Factors::new(outputs, 2, &runs), Factors::new(inputs, 3, &runs));
        let mut source = Source::new(elements, 1, &runs);
        runs.outer.walk(runs.outer.axes.len(), |[at, w, output, input]| {
            let scaled = &mut scaled[at as usize..at as usize + len];
            scale(source.run(&runs, w), outputs.run(&runs, output), inputs.run(&runs, input), scaled);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strides_of(shape: &[usize]) -> Vec<isize> {
        (0..shape.len()).map(|k| shape[k + 1..].iter().product::<usize>() as isize).collect()
    }

    /// 0, -1, 2, -3, ...
    fn alternating(len: usize) -> Vec<f32> {
        (0..len).map(|k| if k % 2 == 0 { k as f32 } else { -(k as f32) }).collect()
    }

    fn ranges(w: &[f32], shape: &[usize], layout: &str, side: Side, factors: Option<&[f64]>) -> Vec<f64> {
        let strides = strides_of(shape);
        let tensor = Tensor { elements: Elements::from_slice(w), shape, strides: &strides };
        channel_ranges(&tensor, layout, side, 1, factors).unwrap()
    }

    #[test]
    fn ranges_of_both_sides() {
        let w = alternating(6);
        assert_eq!(ranges(&w, &[2, 3], "OI", Side::Output, None), [2.0, 5.0]);
        assert_eq!(ranges(&w, &[2, 3], "OI", Side::Input, None), [3.0, 4.0, 5.0]);
        assert_eq!(ranges(&w, &[2, 3], "OI", Side::Output, Some(&[9.0, 4.0, 0.5])), [4.0, 27.0]);
        assert_eq!(ranges(&w, &[2, 3], "OI", Side::Input, Some(&[4.0, 0.5])), [1.5, 4.0, 8.0]);
    }

    #[test]
    fn every_way_to_cut_loops_visits_each_element_once() {
        let shapes: [&[usize]; 8] = [
            &[1],
            &[70, 3],
            &[3, 40],
            &[5, 7, 3, 3],
            &[2, 1000, 3],
            &[2, LONG_RUN + 5],
            &[LONG_RUN + 5, 2],
            &[3, 2000, 9],
        ];
        for shape in shapes {
            let strides = strides_of(shape);
            for channel in 0..shape.len() {
                let axes = shape.iter().zip(&strides).enumerate();
                let axes = axes.map(|(k, (&len, &at))| Axis { len, strides: [at, isize::from(k == channel), 0] });
                let nest = Nest::new(axes.collect()).normalized();
                let mut seen = vec![0; nest.len()];
                let cut = if channel % 2 == 0 { parts(nest, 5000) } else { parts_of_ranges(nest) };
                for runs in cut.into_iter().flat_map(Runs::of) {
                    runs.outer.walk(runs.outer.axes.len(), |[at, ..]| {
                        runs.walk_run(0, at, |at, len, stride| {
                            (0..len as isize).for_each(|k| seen[(at + k * stride) as usize] += 1);
                        });
                    });
                }
                assert!(seen.iter().all(|&times| times == 1), "{shape:?} {channel}");
            }
        }
    }

    #[test]
    fn nan_is_above_all() {
        for w in [[f32::NAN, f32::INFINITY], [-f32::NAN, 1.0]] {
            assert!(ranges(&w, &[1, 2], "OI", Side::Output, None)[0].is_nan());
            assert!(ranges(&w, &[1, 2], "OI", Side::Output, Some(&[2.0, 3.0]))[0].is_nan());
            assert!(ranges(&w, &[1, 2], "OI", Side::Input, Some(&[2.0]))[0].is_nan());
        }
        assert_eq!(ranges(&[f32::NEG_INFINITY, 1.0], &[1, 2], "OI", Side::Input, None), [f64::INFINITY, 1.0]);
    }

    #[test]
    fn factors_that_do_not_fit_are_named() {
        let w = [1.0f32; 6];
        let tensor = Tensor { elements: Elements::from_slice(&w), shape: &[2, 3], strides: &[3, 1] };
        let found = |factors: &[f64]| channel_ranges(&tensor, "OI", Side::Output, 1, Some(factors)).unwrap_err();
        assert_eq!(found(&[1.0; 2]), Error::FactorCount { name: "factors", found: 2, expected: 3 });
        for wrong in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(found(&[1.0, wrong, 1.0]), Error::Factor { name: "factors", index: 1, .. }));
        }
    }
}
