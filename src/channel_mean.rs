//! Sums of samples per channel, and per kernel tap and channel.
//!
//! ```text
//! channel_sums(x)[c] = sum over every position p of x[p, c]
//! tap_sums(x)[k, c]  = sum over n and output positions o of x[n, o * stride + k * dilation - pad, c]   (0 outside x)
//! ```
//!
//! Integers are summed exactly: in 32 or 64 bits inside a block, in 128 bits between blocks. Real numbers are summed in f64
//! inside a block and in double-double between blocks (f64 samples in double-double throughout), in an order given by
//! shape and strides alone. Each element is read once, whatever the number of taps: positions of an axis that are seen by
//! the same taps form a class, the sum of each class is taken, and a tap's sum is the sum of its classes.

use half::{bf16, f16};

use crate::error::Error;
use crate::layout::{Axis, Elements, Nest};
use crate::parallel;
use crate::simd::tiered;

/// What an element type is summed in.
pub trait Element: Copy + Send + Sync + 'static {
    /// The accumulator inside a block of [`BLOCK_ROWS`] additions; it cannot overflow there.
    type Partial: Partial;
    /// Adds this element to the accumulator.
    fn add_to(self, partial: &mut Self::Partial);
}

/// An accumulator inside a block.
pub trait Partial: Copy + Default + Send + Sync {
    /// The accumulator between blocks.
    type Total: Total;
    /// Carries the block's sum over.
    fn total(self) -> Self::Total;
}

/// An accumulator between blocks.
pub trait Total: Copy + Default + Send + Sync + std::fmt::Debug {
    /// Adds another sum.
    fn merge(&mut self, other: Self);
    /// The sum, rounded to f64.
    fn value(self) -> f64;
}

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

impl Total for Compensated {
    #[inline(always)]
    fn merge(&mut self, other: Self) {
        let sum = self.sum + other.sum;
        let other_rounded = sum - self.sum;
        let error = (self.sum - (sum - other_rounded)) + (other.sum - other_rounded);
        *self = Compensated { sum, error: self.error + other.error + error };
    }

    fn value(self) -> f64 {
        if self.sum.is_finite() { self.sum + self.error } else { self.sum }
    }
}

impl Total for i128 {
    #[inline(always)]
    fn merge(&mut self, other: Self) {
        *self += other;
    }

    fn value(self) -> f64 {
        self as f64
    }
}

impl Partial for Compensated {
    type Total = Compensated;
    #[inline(always)]
    fn total(self) -> Compensated {
        self
    }
}

impl Partial for f64 {
    type Total = Compensated;
    #[inline(always)]
    fn total(self) -> Compensated {
        Compensated { sum: self, error: 0.0 }
    }
}

macro_rules! integer_partial {
    ($($partial:ty),*) => {$(
        impl Partial for $partial {
            type Total = i128;
            #[inline(always)]
            fn total(self) -> i128 {
                i128::from(self)
            }
        }
    )*};
}
integer_partial!(i32, i64, i128);

macro_rules! element {
    ($($element:ty => $partial:ty, $widen:expr;)*) => {$(
        impl Element for $element {
            type Partial = $partial;
            #[inline(always)]
            fn add_to(self, partial: &mut $partial) {
                let widen: fn($element) -> $partial = $widen;
                *partial += widen(self);
            }
        }
    )*};
}
element! {
    i8 => i32, |x| i32::from(x);
    u8 => i32, |x| i32::from(x);
    i16 => i32, |x| i32::from(x);
    u16 => i32, |x| i32::from(x);
    i32 => i64, |x| i64::from(x);
    u32 => i64, |x| i64::from(x);
    i64 => i128, |x| i128::from(x);
    u64 => i128, |x| i128::from(x);
    f16 => f64, |x| f64::from(f32_from_f16_bits(x.to_bits()));
    bf16 => f64, |x| f64::from(f32::from_bits(u32::from(x.to_bits()) << 16));
    f32 => f64, |x| f64::from(x);
}

impl Element for f64 {
    type Partial = Compensated;
    #[inline(always)]
    fn add_to(self, partial: &mut Compensated) {
        partial.merge(Compensated { sum: self, error: 0.0 });
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

/// Additions to one accumulator before it is carried over: i16 in i32 could overflow after 2^16.
const BLOCK_ROWS: usize = 4096;

/// Accumulators that a contiguous slab is spread over, so that few channels still fill wide registers. Fixed: it decides the
/// order of float sums.
const LANES: usize = 64;

/// Four rows are added together, so that each accumulator is loaded and stored once for all of them, where they are no more
/// than these: leaping to and fro over more defeats the hardware prefetcher (measured: f32 at 256 channels halves).
const GROUP_BYTES: usize = 1 << 10;

/// They are added together too where the accumulators are more than these, and so leave the L1 cache with every row.
const CACHED_BYTES: usize = 8 << 10;

/// A sample is cut into tiles of about this size (half of a common L2 cache) ...
const TILE_BYTES: usize = 512 << 10;

/// ... but into no more than these, which bounds the memory that the tiles' sums take.
const MAX_TILES: usize = 64;

/// Channels that are worth a tile of their own: 1024 f64 fill two pages.
const MANY_CHANNELS: usize = 1024;

tiered! {
    /// Adds row after row of `acc.len()` elements to `acc`; the last row may be shorter.
    fn add_rows<T: Element>(rows: &[T], acc: &mut [T::Partial]) = add_rows_body
}

#[inline(always)]
fn add_rows_body<T: Element>(rows: &[T], acc: &mut [T::Partial]) {
    let width = acc.len();
    if let Ok(acc) = <&mut [T::Partial; LANES]>::try_from(&mut *acc) {
        return add_lanes(rows, acc);
    }
    let four_rows = 4 * width;
    let together = size_of::<T>() * four_rows <= GROUP_BYTES || size_of_val(acc) > CACHED_BYTES;
    let (groups, rest) = rows.split_at(if together { rows.len() / four_rows * four_rows } else { 0 });
    for group in groups.chunks_exact(four_rows) {
        let [a, b, c, d] = std::array::from_fn(|k| &group[k * width..(k + 1) * width]);
        for ((((partial, a), b), c), d) in acc.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            for x in [a, b, c, d] {
                x.add_to(partial);
            }
        }
    }
    rest.chunks(width).for_each(|row| add_row(row, acc));
}

/// A fixed width lets the accumulators stay in registers.
#[inline(always)]
fn add_lanes<T: Element>(rows: &[T], acc: &mut [T::Partial; LANES]) {
    let mut lanes = *acc;
    let (whole, rest) = rows.as_chunks::<LANES>();
    whole.iter().for_each(|row| add_row(row, &mut lanes));
    add_row(rest, &mut lanes);
    *acc = lanes;
}

#[inline(always)]
fn add_row<T: Element>(row: &[T], acc: &mut [T::Partial]) {
    for (partial, &x) in acc.iter_mut().zip(row) {
        x.add_to(partial);
    }
}

/// Accumulators of a block, and the totals they are carried over to: lane `j` belongs to total `j % totals.len()`.
struct Block<T: Element> {
    lanes: Vec<T::Partial>,
    rows: usize,
    totals: Vec<<T::Partial as Partial>::Total>,
}

impl<T: Element> Block<T> {
    fn new(lanes: usize, totals: usize) -> Self {
        Block { lanes: vec![T::Partial::default(); lanes], rows: 0, totals: vec![Default::default(); totals] }
    }

    /// Rows of `lanes.len()` elements, one after the other.
    fn add_slab(&mut self, slab: &[T]) {
        let width = self.lanes.len();
        for rows in slab.chunks(width * BLOCK_ROWS) {
            self.make_room(rows.len().div_ceil(width));
            add_rows(rows, &mut self.lanes);
        }
    }

    /// One row into the lanes from `lane` on.
    fn add_row(&mut self, lane: usize, row: &[T]) {
        self.make_room(1);
        add_rows(row, &mut self.lanes[lane..lane + row.len()]);
    }

    fn add_strided(&mut self, lane: usize, row: impl Iterator<Item = T>) {
        self.make_room(1);
        for (partial, x) in self.lanes[lane..].iter_mut().zip(row) {
            x.add_to(partial);
        }
    }

    fn make_room(&mut self, rows: usize) {
        if self.rows + rows > BLOCK_ROWS {
            self.carry_over();
        }
        self.rows += rows;
    }

    fn carry_over(&mut self) {
        for lanes in self.lanes.chunks_mut(self.totals.len()) {
            for (total, partial) in self.totals.iter_mut().zip(lanes) {
                total.merge(std::mem::take(partial).total());
            }
        }
        self.rows = 0;
    }

    fn finish(mut self) -> Vec<<T::Partial as Partial>::Total> {
        self.carry_over();
        self.totals
    }
}

/// The sums of a type between blocks.
pub type TotalOf<T> = <<T as Element>::Partial as Partial>::Total;

/// A sample: its elements, its shape, its strides in elements.
#[derive(Clone, Copy)]
pub struct Sample<'a, T> {
    /// What the strides reach.
    pub elements: Elements<'a, T>,
    /// Length of each axis, none of them 0.
    pub shape: &'a [usize],
    /// Elements per step along each axis.
    pub strides: &'a [isize],
    /// The axis that is not summed over.
    pub channel_axis: usize,
}

/// A part of one sample, walked in memory order. Operand 0 is the sample, operand 1 the channel.
struct Tile<'a, T> {
    sample: usize,
    elements: Elements<'a, T>,
    nest: Nest<2>,
}

/// Adds the sums per channel of each sample to `totals`, sample by sample in order.
///
/// Reads each element once. Takes at most [`MAX_TILES`] times the memory of `totals` beside it, and no more than twice where
/// there are many channels.
pub fn channel_sums<T: Element>(samples: &[Sample<T>], totals: &mut [TotalOf<T>]) -> Result<(), Error> {
    let mut waiting = Vec::new();
    for (index, sample) in samples.iter().enumerate() {
        waiting.extend(tiles(index, sample));
        if waiting.len() >= MAX_TILES || index + 1 == samples.len() {
            fold_tiles(std::mem::take(&mut waiting), totals)?;
        }
    }
    Ok(())
}

fn tiles<'a, T>(index: usize, sample: &Sample<'a, T>) -> Vec<Tile<'a, T>> {
    let axes = sample.shape.iter().zip(sample.strides).enumerate();
    let axes = axes.map(|(k, (&len, &stride))| Axis { len, strides: [stride, isize::from(k == sample.channel_axis)] });
    let nest = Nest::new(axes.collect()).normalized();
    let parts = (nest.len() * size_of::<T>() / TILE_BYTES).clamp(1, MAX_TILES);
    let pieces = nest.split(axis_to_cut(&nest, parts), parts);
    pieces.into_iter().map(|nest| Tile { sample: index, elements: sample.elements, nest }).collect()
}

/// The channel axis where each part keeps many channels, so that tiles share none; else the longest other axis.
fn axis_to_cut(nest: &Nest<2>, parts: usize) -> usize {
    let worth = |k: &usize| {
        let axis = nest.axes[*k];
        let channels = axis.strides[1] != 0;
        (channels && axis.len >= parts * MANY_CHANNELS, !channels, axis.len)
    };
    (0..nest.axes.len()).max_by_key(worth).unwrap_or(0)
}

fn fold_tiles<T: Element>(tiles: Vec<Tile<T>>, totals: &mut [TotalOf<T>]) -> Result<(), Error> {
    let bytes = tiles.iter().map(|tile| tile.nest.len() * size_of::<T>()).sum();
    let sums = parallel::map(tiles, bytes, |tile| (tile.sample, tile.channels().start, tile.sums()))?;
    for sample in sums.chunk_by(|a, b| a.0 == b.0) {
        let mut sum = vec![TotalOf::<T>::default(); totals.len()];
        for (_, start, tile) in sample {
            merge(&mut sum[*start..], tile);
        }
        merge(totals, &sum);
    }
    Ok(())
}

fn merge<A: Total>(totals: &mut [A], others: &[A]) {
    for (total, &other) in totals.iter_mut().zip(others) {
        total.merge(other);
    }
}

/// Rows of `channels` that make up one row of lanes: enough to fill registers evenly, few enough to be worth folding.
fn virtual_rows(channels: usize, rows: usize) -> usize {
    match channels {
        LANES.. => 1,
        _ if LANES.is_multiple_of(channels) => (LANES / channels).min(rows / 8).max(1),
        _ => LANES.min(rows / 8).max(1),
    }
}

impl<T: Element> Tile<'_, T> {
    /// The channels that this tile has a part of.
    fn channels(&self) -> std::ops::Range<usize> {
        let moving = self.nest.axes.iter().find(|axis| axis.strides[1] != 0);
        let (len, stride) = moving.map_or((1, 1), |axis| (axis.len, axis.strides[1]));
        let (first, last) = (self.nest.origin[1], self.nest.origin[1] + (len - 1) as isize * stride);
        first.min(last) as usize..first.max(last) as usize + 1
    }

    /// The sums of those channels.
    fn sums(&self) -> Vec<TotalOf<T>> {
        let inner = self.nest.axes[self.nest.axes.len() - 1];
        if inner.strides[1] == 0 { self.run_sums(inner) } else { self.row_sums(inner) }
    }

    /// The channel axis is innermost: rows of channels, or slabs of rows where they follow each other.
    fn row_sums(&self, inner: Axis<2>) -> Vec<TotalOf<T>> {
        let Tile { elements, nest, .. } = self;
        let depth = nest.axes.len() - 1;
        let rows = if depth > 0 { nest.axes[depth - 1] } else { Axis { len: 1, strides: [0, 0] } };
        let slab = inner.strides[0] == 1 && rows.strides[0] == inner.len as isize;
        let fold = if slab { virtual_rows(inner.len, rows.len) } else { 1 };
        let mut block = Block::<T>::new(inner.len * fold, inner.len);
        if slab {
            nest.walk(depth - 1, |[x, _]| block.add_slab(elements.run(x, inner.len * rows.len)));
        } else if inner.strides[0] == 1 {
            nest.walk(depth, |[x, _]| block.add_row(0, elements.run(x, inner.len)));
        } else {
            nest.walk(depth, |[x, _]| block.add_strided(0, strided(*elements, x, inner)));
        }
        let mut sums = block.finish();
        if inner.strides[1] < 0 {
            sums.reverse();
        }
        sums
    }

    /// The innermost axis is summed over: runs of one channel.
    fn run_sums(&self, inner: Axis<2>) -> Vec<TotalOf<T>> {
        let Tile { elements, nest, .. } = self;
        let channels = self.channels();
        let mut sums: Vec<TotalOf<T>> = vec![Default::default(); channels.len()];
        // Short runs get few lanes: each lane has to be cleared and folded.
        let lanes = if inner.len >= 4 * LANES { LANES } else { 8 };
        let mut block = Block::<T>::new(lanes, 1);
        nest.walk(nest.axes.len() - 1, |[x, channel]| {
            if inner.strides[0] == 1 {
                block.add_slab(elements.run(x, inner.len));
            } else {
                strided(*elements, x, inner).for_each(|x| block.add_strided(0, std::iter::once(x)));
            }
            block.carry_over();
            sums[channel as usize - channels.start].merge(std::mem::take(&mut block.totals[0]));
        });
        sums
    }
}

fn strided<T: Copy, const N: usize>(elements: Elements<'_, T>, start: isize, axis: Axis<N>) -> impl Iterator<Item = T> {
    (0..axis.len as isize).map(move |step| elements.get(start + step * axis.strides[0]))
}

/// How a kernel moves along one spatial axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AxisWindow {
    /// Taps of the kernel.
    pub taps: usize,
    /// Input positions between neighbouring output positions.
    pub stride: usize,
    /// Input positions between neighbouring taps.
    pub dilation: usize,
    /// Zeros before the first input position; negative where the input is cropped.
    pub pad: isize,
    /// Output positions.
    pub outputs: usize,
}

/// Positions of one spatial axis by the set of taps that see them.
struct Classes {
    /// Class of each position; None where no tap sees it.
    of_position: Vec<Option<usize>>,
    /// Taps of each class.
    taps: Vec<Vec<usize>>,
}

impl Classes {
    fn new(len: usize, window: &AxisWindow) -> Self {
        let mut taps = Vec::new();
        let of_position = (0..len as isize).map(|position| class_of(&mut taps, taps_at(window, position))).collect();
        Classes { of_position, taps }
    }
}

fn taps_at(window: &AxisWindow, position: isize) -> Vec<usize> {
    let sees = |&tap: &usize| {
        let distance = position + window.pad - (tap * window.dilation) as isize;
        let stride = window.stride as isize;
        distance >= 0 && distance % stride == 0 && distance / stride < window.outputs as isize
    };
    (0..window.taps).filter(sees).collect()
}

fn class_of(classes: &mut Vec<Vec<usize>>, taps: Vec<usize>) -> Option<usize> {
    if taps.is_empty() {
        return None;
    }
    let known = classes.iter().position(|class| *class == taps);
    Some(known.unwrap_or_else(|| {
        classes.push(taps);
        classes.len() - 1
    }))
}

/// Channels that one task of [`tap_sums`] takes: 64 int8 channels fill a cache line.
const CHANNELS_PER_TASK: usize = 64;

/// Sums per tap and channel of one sample (N, C, *S) or (N, *S, C), as (*K, C) in C order.
///
/// `windows` has one entry per spatial axis: every axis but the first and the channel axis.
pub fn tap_sums<T: Element>(sample: &Sample<T>, windows: &[AxisWindow]) -> Result<Vec<TotalOf<T>>, Error> {
    let axis = |k: usize| Axis { len: sample.shape[k], strides: [sample.strides[k]] };
    let spatial: Vec<usize> = (1..sample.shape.len()).filter(|&k| k != sample.channel_axis).collect();
    let classes: Vec<Classes> = spatial.iter().zip(windows).map(|(&k, w)| Classes::new(axis(k).len, w)).collect();
    let plane = Plane { elements: sample.elements, batch: axis(0), space: spatial.into_iter().map(axis).collect() };
    let channels = axis(sample.channel_axis);
    let taps: usize = windows.iter().map(|window| window.taps).product();
    let mut totals = vec![TotalOf::<T>::default(); taps * channels.len];
    if classes.iter().any(|axis| axis.taps.is_empty()) {
        return Ok(totals); // no tap sees anything
    }
    let starts: Vec<usize> = (0..channels.len).step_by(CHANNELS_PER_TASK).collect();
    let bytes = sample.shape.iter().product::<usize>() * size_of::<T>();
    let parts = parallel::map(starts.clone(), bytes, |start| {
        let len = CHANNELS_PER_TASK.min(channels.len - start);
        let offset = start as isize * channels.strides[0];
        plane.class_sums(offset, Axis { len, ..channels }, &classes)
    })?;
    for (start, part) in starts.into_iter().zip(parts) {
        scatter(&part, &classes, windows, &mut totals, start, channels.len);
    }
    Ok(totals)
}

/// All axes of a sample but the channel axis.
struct Plane<'a, T> {
    elements: Elements<'a, T>,
    batch: Axis<1>,
    space: Vec<Axis<1>>,
}

impl<T: Element> Plane<'_, T> {
    /// Sums of each combination of classes for a range of channels, as (channels, *classes).
    fn class_sums(&self, offset: isize, channels: Axis<1>, classes: &[Classes]) -> Vec<TotalOf<T>> {
        let combinations: usize = classes.iter().map(|c| c.taps.len()).product();
        if channels.strides[0].abs() <= self.space.last().map_or(isize::MAX, |axis| axis.strides[0].abs()) {
            let rows = self.row_sums(offset, channels, &self.space, classes);
            return transposed(&rows, combinations, channels.len);
        }
        let (Some((&inner, outer)), Some((inner_classes, outer_classes))) =
            (self.space.split_last(), classes.split_last())
        else {
            return Vec::new();
        };
        let per_channel = |channel: usize| {
            let rows = self.row_sums(offset + channel as isize * channels.strides[0], inner, outer, outer_classes);
            rows.chunks(inner.len).flat_map(|row| fold_row(row, inner_classes)).collect::<Vec<_>>()
        };
        (0..channels.len).flat_map(per_channel).collect()
    }

    /// Sums, as (*classes of `outer`, inner), of rows along `inner`.
    fn row_sums(&self, offset: isize, inner: Axis<1>, outer: &[Axis<1>], classes: &[Classes]) -> Vec<TotalOf<T>> {
        let combinations: usize = classes.iter().map(|c| c.taps.len()).product();
        let lanes = combinations * inner.len;
        let mut block = Block::<T>::new(lanes, lanes);
        for n in 0..self.batch.len as isize {
            visit(outer, classes, offset + n * self.batch.strides[0], 0, &mut |start, class| {
                if inner.strides[0] == 1 {
                    block.add_row(class * inner.len, self.elements.run(start, inner.len));
                } else {
                    block.add_strided(class * inner.len, strided(self.elements, start, inner));
                }
            });
        }
        block.finish()
    }
}

/// Calls `f` with the offset and the combined class of each position that some tap sees.
fn visit(axes: &[Axis<1>], classes: &[Classes], offset: isize, class: usize, f: &mut impl FnMut(isize, usize)) {
    let (Some((axis, axes)), Some((first, rest))) = (axes.split_first(), classes.split_first()) else {
        return f(offset, class);
    };
    for (position, own) in first.of_position.iter().enumerate() {
        if let Some(own) = own {
            let offset = offset + position as isize * axis.strides[0];
            visit(axes, rest, offset, class * first.taps.len() + own, f);
        }
    }
}

fn fold_row<A: Total>(row: &[A], classes: &Classes) -> Vec<A> {
    let mut sums = vec![A::default(); classes.taps.len()];
    for (&x, class) in row.iter().zip(&classes.of_position) {
        if let Some(class) = class {
            sums[*class].merge(x);
        }
    }
    sums
}

fn transposed<A: Copy>(rows: &[A], count: usize, width: usize) -> Vec<A> {
    (0..width).flat_map(|column| (0..count).map(move |row| rows[row * width + column])).collect()
}

/// Adds the sums of classes, (channels, *classes), to the taps that see them: `totals` is (*K, C), channels from `start` on.
fn scatter<A: Total>(
    sums: &[A], classes: &[Classes], windows: &[AxisWindow], totals: &mut [A], start: usize, channels: usize,
) {
    let mut taps_of = vec![vec![0]];
    for (axis, window) in classes.iter().zip(windows) {
        let combine = |outer: &Vec<usize>| {
            let with = |inner: &Vec<usize>| {
                outer.iter().flat_map(|o| inner.iter().map(move |i| o * window.taps + i)).collect::<Vec<_>>()
            };
            axis.taps.iter().map(with).collect::<Vec<_>>()
        };
        taps_of = taps_of.iter().flat_map(combine).collect();
    }
    for (channel, sums) in sums.chunks(taps_of.len()).enumerate() {
        for (taps, &sum) in taps_of.iter().zip(sums) {
            for tap in taps {
                totals[tap * channels + start + channel].merge(sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strides_of(shape: &[usize]) -> Vec<isize> {
        let mut strides = vec![1; shape.len()];
        for k in (1..shape.len()).rev() {
            strides[k - 1] = strides[k] * shape[k] as isize;
        }
        strides
    }

    fn sums<T: Element>(x: &[T], shape: &[usize], channel_axis: usize) -> Vec<TotalOf<T>> {
        let mut totals = vec![Default::default(); shape[channel_axis]];
        let sample = Sample { elements: Elements::from_slice(x), shape, strides: &strides_of(shape), channel_axis };
        channel_sums(&[sample], &mut totals).unwrap();
        totals
    }

    #[test]
    fn f16_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f32_from_f16_bits(bits), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#x}");
        }
    }

    #[test]
    fn extreme_integers_do_not_overflow() {
        let n = 3 * BLOCK_ROWS * LANES + 5;
        assert_eq!(sums(&vec![u16::MAX; n], &[n, 1], 1), [n as i128 * 65535]);
        assert_eq!(sums(&vec![i64::MIN; 1000], &[1000, 1], 1), [1000 * i128::from(i64::MIN)]);
        assert_eq!(sums(&vec![u64::MAX; 1000], &[1, 1000], 0), [1000 * i128::from(u64::MAX)]);
    }

    #[test]
    fn both_memory_orders_give_the_same_sums() {
        for channels in [1, 3, 4, 7, 64, 65, 300] {
            let n = 517;
            let last: Vec<i8> = (0..n * channels).map(|i| (i * i % 251) as i8).collect();
            let first: Vec<i8> = transposed(&last, n, channels);
            assert_eq!(sums(&last, &[n, channels], 1), sums(&first, &[channels, n], 0));
        }
    }

    #[test]
    fn cancellation_keeps_every_bit_of_f64() {
        assert_eq!(sums(&[1e300, 1.0, -1e300], &[3, 1], 1)[0], Compensated { sum: 0.0, error: 1.0 });
    }

    #[test]
    fn taps_are_counted_by_hand() {
        // x = 1 2 3 4, kernel 3, padding 1: tap 0 misses the last, tap 2 the first.
        let window = AxisWindow { taps: 3, stride: 1, dilation: 1, pad: 1, outputs: 4 };
        let (x, shape) = ([1i8, 2, 3, 4], [1, 1, 4]);
        let sample =
            Sample { elements: Elements::from_slice(&x), shape: &shape, strides: &strides_of(&shape), channel_axis: 1 };
        assert_eq!(tap_sums(&sample, &[window]).unwrap(), [6, 10, 9]);
        let strided = AxisWindow { stride: 2, outputs: 2, ..window };
        assert_eq!(tap_sums(&sample, &[strided]).unwrap(), [2, 4, 6]);
        let nothing = AxisWindow { outputs: 0, ..window };
        assert_eq!(tap_sums(&sample, &[nothing]).unwrap(), [0, 0, 0]);
    }
}
