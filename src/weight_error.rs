//! The shift of each output channel: weight error times mean input.
//!
//! ```text
//! shift[g,o] = sum over s,i of (W[s,i,g,o] - Wq[s,i,g,o]) * mean[(s,)g*I+i]
//! ```
//!
//! `W` in any axis order and stride, f32 or f64; the mean f64 of shape (G*I,) or (*K, G*I). `Wq` is given, in any strides of its
//! own, or is computed a cache-sized slab at a time from the grid of a quantizer: with the same bits as if it had been given.
//! Differences have the type of `W`: between half and twice `W` they are exact (Sterbenz), as they are wherever rounding to a grid
//! leaves `Wq`; elsewhere they are rounded once. Products and sums are f64, in an order given by shape and strides of `W` alone.
//! `W` and a given `Wq` are read once, in the memory order of `W`.

use std::borrow::Cow;
use std::cmp::Reverse;

use crate::error::Error;
use crate::fake_quantize::{Grids, Real};
use crate::layout::{Axis, Elements, Nest};
use crate::memory;
use crate::parallel;
use crate::simd::{Tier, tiered};
use crate::weights::{Channels, Loop, Role, Tensor};

/// The mean input of a layer: per channel, (G*I,), or per tap and channel, (*K, G*I). Values in C order.
#[derive(Clone, Debug)]
pub struct Mean<'a> {
    /// The values.
    pub values: &'a [f64],
    /// Their shape.
    pub shape: Vec<usize>,
}

/// What the weights become.
#[derive(Clone, Copy)]
pub enum FakeQuantized<'a, T> {
    /// The tensor itself.
    Given(Tensor<'a, T>),
    /// The grids of a quantizer, and which of them each element meets.
    Computed(&'a Grids, GridAxes<'a>),
}

/// How a position in the weights counts grids.
#[derive(Clone, Copy, Debug)]
pub enum GridAxes<'a> {
    /// A grid for each output channel g*O+o.
    OutputChannels,
    /// Grids per step along each axis of the weights.
    Strides(&'a [isize]),
    /// The same for an axis whose steps are blocks of so many elements.
    Blocks(&'a [isize], usize, usize),
}

impl GridAxes<'_> {
    /// Fails where some position in weights of this shape has none of so many grids.
    fn check(&self, found: usize, shape: &[usize]) -> Result<(), Error> {
        let (strides, blocks) = match *self {
            GridAxes::OutputChannels => return Ok(()),
            GridAxes::Strides(strides) => (strides, None),
            GridAxes::Blocks(strides, axis, size) => (strides, Some((axis, size))),
        };
        let steps = |axis: usize, len: usize| match blocks {
            Some((blocked, size)) if axis == blocked => len / size,
            _ => len,
        };
        let divides = blocks.is_none_or(|(axis, size)| size > 0 && shape.get(axis).is_some_and(|len| len % size == 0));
        let fits = divides && strides.len() == shape.len() && strides.iter().all(|&stride| stride >= 0) && {
            let reach = |(axis, (&len, &stride)): (usize, (&usize, &isize))| {
                steps(axis, len).saturating_sub(1).saturating_mul(stride.unsigned_abs())
            };
            shape.iter().zip(strides).enumerate().map(reach).fold(0, usize::saturating_add) < found
        };
        let error = || Error::GridStrides { found, strides: strides.to_vec(), shape: shape.to_vec() };
        if fits { Ok(()) } else { Err(error()) }
    }
}

impl<T> FakeQuantized<'_, T> {
    /// Elements or grids per step along an axis, and how many elements are a step; None where it is the stride of the shift.
    fn stride(&self, axis: usize) -> Option<(isize, usize)> {
        match self {
            FakeQuantized::Given(tensor) => Some((tensor.strides[axis], 1)),
            FakeQuantized::Computed(_, GridAxes::OutputChannels) => None,
            FakeQuantized::Computed(_, GridAxes::Strides(strides)) => Some((strides[axis], 1)),
            FakeQuantized::Computed(_, GridAxes::Blocks(strides, blocked, size)) => {
                Some((strides[axis], if axis == *blocked { *size } else { 1 }))
            }
        }
    }
}

/// Where each axis moves, outermost first, and the length of the shift. Operands: weights, mean, shift, what they become.
struct Plan {
    nest: Nest<4>,
    shift_len: usize,
}

fn plan<T>(
    weights: &Tensor<T>, fake_quantized: &FakeQuantized<T>, mean: &Mean, groups: usize, layout: &str,
) -> Result<Plan, Error> {
    let channels = Channels::new(weights.shape, groups, layout)?;
    let mut tap_strides = mean_strides(&channels, mean)?.into_iter();
    let mut axes = Vec::with_capacity(channels.loops.len() + 1);
    for &Loop { axis, role, len, step, input, output } in &channels.loops {
        let mean = if role == Role::Space { tap_strides.next().unwrap_or(0) } else { input };
        let steps = step as isize;
        let w = weights.strides[axis] * steps;
        let (source, block) = fake_quantized.stride(axis).map_or((output, 1), |(grid, block)| (grid * steps, block));
        axes.push((Axis { len, strides: [w, mean, output, source] }, block));
    }
    // Whole axes are sorted, so that blocks change no order, not even where weights overlap.
    axes.sort_by_key(|(axis, _)| Reverse(axis.strides[0].unsigned_abs()));
    let axes = axes.into_iter().flat_map(|(axis, block)| in_blocks(axis, block)).collect();
    Ok(Plan { nest: Nest::new(axes).forward(), shift_len: channels.outputs })
}

/// The loops over the blocks of an axis and over what is in a block, which shares its source.
fn in_blocks(axis: Axis<4>, block: usize) -> [Axis<4>; 2] {
    let [w, mean, shift, source] = axis.strides;
    let outer = [w, mean, shift].map(|stride| stride * block as isize);
    [
        Axis { len: axis.len / block, strides: [outer[0], outer[1], outer[2], source] },
        Axis { len: block, strides: [w, mean, shift, 0] },
    ]
}

/// The mean's stride along each spatial axis; none where it is per channel.
fn mean_strides(channels: &Channels, mean: &Mean) -> Result<Vec<isize>, Error> {
    if mean.shape == [channels.inputs] {
        return Ok(Vec::new());
    }
    let taps = channels.loops.iter().filter(|l| l.role == Role::Space).map(|l| l.len);
    let per_tap: Vec<usize> = taps.chain([channels.inputs]).collect();
    if mean.shape != per_tap {
        return Err(Error::MeanShape { found: mean.shape.clone(), per_channel: vec![channels.inputs], per_tap });
    }
    Ok((1..per_tap.len()).map(|k| per_tap[k..].iter().product::<usize>() as isize).collect())
}

/// Accumulators of a dot product. Fixed: they decide the order of the sum.
const LANES: usize = 8;

/// Rows of weights that share one pass over their mean or shift, so that this costs a fraction of the traffic.
const ROWS: usize = 4;

/// Up to this length the mean or shift of a row stays in the L1 cache (8 KB), so that rows need not share a pass: one row after
/// the other is what hardware prefetchers like best (measured: twice as fast at 512).
const SHORT_ROW: usize = 1024;

/// Rows of up to this length are added in stripes of [`STRIPE`] columns, whose sums stay in registers.
const NARROW_ROW: usize = 64;

/// Columns of a stripe: a cache line of f32.
const STRIPE: usize = 16;

/// Elements of narrow rows that stay in the L1 cache while stripe after stripe is added.
const CACHED: usize = 2048;

/// Output channels that are fewer than this make rows too short to be worth a mean each: the mean is repeated for them.
const FEW_OUTPUTS: usize = 16;

/// A longer run is cut into blocks, so that its mean or shift stays in the L2 cache. Up to there runs are read whole: leaping
/// from block to block halves what memory delivers.
const RUN_BLOCK: usize = 16384;

/// Elements that are computed or copied at a time, at most, where a row is no longer: 64 KB of f32.
const BUFFER: usize = 16384;

/// A contraction is cut into no more parts than these, which bounds the memory of their partial shifts.
const MAX_PARTS: usize = 16;

/// Bytes for a part: its loops, twice while it is cut, and where its shifts are.
const OF_PART: usize = 1024;

/// Weights of one part, about: 512 KB of f32.
const PART: usize = 128 << 10;

/// Contiguous rows of `len` weights, and what they become.
#[derive(Clone, Copy)]
struct Slab<'a, T> {
    w: &'a [T],
    q: &'a [T],
    len: usize,
}

impl<'a, T: Real> Slab<'a, T> {
    #[inline(always)]
    fn rows(&self) -> usize {
        self.w.len() / self.len
    }

    #[inline(always)]
    fn row(&self, row: usize) -> (&'a [T], &'a [T]) {
        let range = row * self.len..(row + 1) * self.len;
        (&self.w[range.clone()], &self.q[range])
    }

    #[inline(always)]
    fn group<const R: usize>(&self, first: usize) -> [(&'a [T], &'a [T]); R] {
        std::array::from_fn(|k| self.row(first + k))
    }
}

/// The dot product of each row with its mean: the same for all, or one after the other.
#[inline(always)]
fn error_dots_body<T: Real>(_: Tier, slab: &Slab<T>, mean: &[f64], dots: &mut [f64]) {
    let len = slab.len;
    let one_mean = mean.len() == len;
    let mut done = 0;
    if one_mean && len > SHORT_ROW {
        done = dots.len() / ROWS * ROWS;
        for first in (0..done).step_by(ROWS) {
            let sums = dots_together::<T, ROWS>(slab.group(first), mean);
            dots[first..first + ROWS].copy_from_slice(&sums);
        }
    }
    for row in done..dots.len() {
        let mean = if one_mean { mean } else { &mean[row * len..(row + 1) * len] };
        [dots[row]] = dots_together::<T, 1>(slab.group(row), mean);
    }
}

#[inline(always)]
fn dots_together<T: Real, const R: usize>(rows: [(&[T], &[T]); R], mean: &[f64]) -> [f64; R] {
    let whole = mean.len() / LANES;
    let chunks = rows.map(|(w, q)| (&w.as_chunks::<LANES>().0[..whole], &q.as_chunks::<LANES>().0[..whole]));
    let mut lanes = [[0.0; LANES]; R];
    for (k, mean) in mean.as_chunks::<LANES>().0.iter().enumerate() {
        for (lanes, (w, q)) in lanes.iter_mut().zip(&chunks) {
            add_errors_of(&w[k], &q[k], mean, lanes);
        }
    }
    std::array::from_fn(|r| finished(rows[r], mean, lanes[r]))
}

#[inline(always)]
fn add_errors_of<T: Real>(w: &[T; LANES], q: &[T; LANES], mean: &[f64; LANES], lanes: &mut [f64; LANES]) {
    for k in 0..LANES {
        lanes[k] += (w[k] - q[k]).widen() * mean[k];
    }
}

/// Adds the rest of a row that fills no chunk, then the lanes pair by pair.
#[inline(always)]
fn finished<T: Real>((w, q): (&[T], &[T]), mean: &[f64], mut lanes: [f64; LANES]) -> f64 {
    let start = mean.len() / LANES * LANES;
    for (k, lane) in lanes.iter_mut().enumerate().take(mean.len() - start) {
        *lane += (w[start + k] - q[start + k]).widen() * mean[start + k];
    }
    for half in [4, 2, 1] {
        for k in 0..half {
            lanes[k] += lanes[k + half];
        }
    }
    lanes[0]
}

/// Adds each row times a number to one shift, in the order of the rows.
#[inline(always)]
fn add_rows_body<T: Real>(_: Tier, slab: &Slab<T>, means: &[f64], shift: &mut [f64]) {
    if slab.len <= NARROW_ROW {
        return add_narrow_rows(slab, means, shift);
    }
    let rows = slab.rows();
    let done = if slab.len > SHORT_ROW { rows / ROWS * ROWS } else { 0 };
    for first in (0..done).step_by(ROWS) {
        add_rows_together::<T, ROWS>(slab.group(first), &means[first..], shift);
    }
    for row in done..rows {
        add_rows_together::<T, 1>(slab.group(row), &means[row..], shift);
    }
}

#[inline(always)]
fn add_rows_together<T: Real, const R: usize>(rows: [(&[T], &[T]); R], means: &[f64], shift: &mut [f64]) {
    let len = shift.len();
    let (w, q) = (rows.map(|(w, _)| &w[..len]), rows.map(|(_, q)| &q[..len]));
    let means: [f64; R] = std::array::from_fn(|r| means[r]);
    for k in 0..len {
        let mut sum = shift[k];
        for r in 0..R {
            sum += (w[r][k] - q[r][k]).widen() * means[r];
        }
        shift[k] = sum;
    }
}

#[inline(always)]
fn add_narrow_rows<T: Real>(slab: &Slab<T>, means: &[f64], shift: &mut [f64]) {
    let len = slab.len;
    let rows = (CACHED / len).max(1);
    let (stripes, rest) = shift.as_chunks_mut::<STRIPE>();
    let start = STRIPE * stripes.len();
    for ((w, q), means) in slab.w.chunks(rows * len).zip(slab.q.chunks(rows * len)).zip(means.chunks(rows)) {
        for (k, stripe) in stripes.iter_mut().enumerate() {
            let mut sums = *stripe;
            for ((w, q), mean) in w.chunks_exact(len).zip(q.chunks_exact(len)).zip(means) {
                let (w, q) = (&w.as_chunks::<STRIPE>().0[k], &q.as_chunks::<STRIPE>().0[k]);
                for j in 0..STRIPE {
                    sums[j] += (w[j] - q[j]).widen() * mean;
                }
            }
            *stripe = sums;
        }
        for ((w, q), mean) in w.chunks_exact(len).zip(q.chunks_exact(len)).zip(means) {
            for ((shift, w), q) in rest.iter_mut().zip(&w[start..]).zip(&q[start..]) {
                *shift += (*w - *q).widen() * mean;
            }
        }
    }
}

/// Adds a row times its mean, element by element.
#[inline(always)]
fn add_products_body<T: Real>(_: Tier, w: &[T], q: &[T], mean: &[f64], shift: &mut [f64]) {
    for (((shift, w), q), mean) in shift.iter_mut().zip(w).zip(q).zip(mean) {
        *shift += (*w - *q).widen() * mean;
    }
}

tiered! { fn error_dots<T: Real>(slab: &Slab<T>, mean: &[f64], dots: &mut [f64]) = error_dots_body }
tiered! { fn add_rows<T: Real>(slab: &Slab<T>, means: &[f64], shift: &mut [f64]) = add_rows_body }
tiered! { fn add_products<T: Real>(w: &[T], q: &[T], mean: &[f64], shift: &mut [f64]) = add_products_body }

/// The shift of each output channel, (G*O,), group by group.
///
/// `layout` names the axes of the weights; `groups` is 1 where it has a group axis.
pub fn weight_error<T: Real>(
    weights: &Tensor<T>, fake_quantized: &FakeQuantized<T>, mean: &Mean, groups: usize, layout: &str,
) -> Result<Vec<f64>, Error> {
    if let FakeQuantized::Given(tensor) = fake_quantized
        && weights.shape != tensor.shape
    {
        let (found, expected) = (tensor.shape.to_vec(), weights.shape.to_vec());
        return Err(Error::WeightShape { found, expected });
    }
    if let FakeQuantized::Computed(grids, axes) = fake_quantized {
        axes.check(grids.len(), weights.shape)?;
    }
    let Plan { nest, shift_len } = plan(weights, fake_quantized, mean, groups, layout)?;
    if let FakeQuantized::Computed(grids, GridAxes::OutputChannels) = fake_quantized
        && grids.len() != shift_len
    {
        return Err(Error::PerChannel { name: "scale, zero_point", found: grids.len(), expected: shift_len });
    }
    if nest.is_empty() {
        memory::check(shift_len, 3 * size_of::<f64>())?;
        return Ok(vec![0.0; shift_len]);
    }
    let source = Source::new(&nest, fake_quantized);
    let (nest, expanded) = contraction(&nest, mean.values)?;
    let operands = Operands { w: weights.elements, source, mean: &expanded };
    let bytes = memory::product([2, nest.len(), size_of::<T>()]);
    memory::check(nest.len() / RUN_BLOCK, OF_PART)?;
    let parts = parts(nest);
    let partial = parts.iter().map(|part| reached(part).1).fold(2 * shift_len, usize::saturating_add);
    memory::check(partial, size_of::<f64>())?;
    let mut parts = parallel::map(parts, bytes, |part| operands.contract(part))?;
    if let [(0, whole)] = parts.as_mut_slice()
        && whole.len() == shift_len
    {
        return Ok(std::mem::take(whole));
    }
    let mut shift = vec![0.0; shift_len];
    for (start, part) in parts {
        shift[start..].iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    Ok(shift)
}

/// Each axis, and positions in the order of the loops per step along it.
fn with_positions(nest: &Nest<4>) -> impl Iterator<Item = (Axis<4>, isize)> {
    nest.axes.iter().scan(nest.len() as isize, |step, &axis| {
        *step /= axis.len as isize;
        Some((axis, *step))
    })
}

/// What the weights become, by position in the memory order of the weights.
struct Source<'a, T> {
    fake_quantized: FakeQuantized<'a, T>,
    /// Operands: position, element or grid.
    nest: Nest<2>,
}

impl<'a, T: Real> Source<'a, T> {
    fn new(nest: &Nest<4>, fake_quantized: &FakeQuantized<'a, T>) -> Self {
        let axes = with_positions(nest).map(|(axis, step)| Axis { len: axis.len, strides: [step, axis.strides[3]] });
        let nest = Nest { axes: axes.collect(), origin: [0, nest.origin[3]] }.merged();
        Source { fake_quantized: *fake_quantized, nest }
    }

    /// What `w`, found from `position` on, becomes; in the buffer unless it lies in memory as `w` does.
    fn slab<'b>(&self, w: &[T], position: usize, buffer: &'b mut Vec<T>) -> &'b [T]
    where
        'a: 'b,
    {
        if let FakeQuantized::Given(tensor) = self.fake_quantized
            && let (offset, 1, len) = self.piece(position)
            && len >= w.len()
        {
            return tensor.elements.run(offset, w.len());
        }
        buffer.resize(w.len(), T::default());
        let mut at = 0;
        while at < w.len() {
            let (offset, stride, len) = self.piece(position + at);
            let range = at..w.len().min(at + len);
            at = range.end;
            match self.fake_quantized {
                FakeQuantized::Given(tensor) => {
                    let elements = (0..range.len() as isize).map(|k| tensor.elements.get(offset + k * stride));
                    buffer[range].iter_mut().zip(elements).for_each(|(q, x)| *q = x);
                }
                FakeQuantized::Computed(grids, _) => {
                    grids.fake_quantize_along(&w[range.clone()], offset, stride, &mut buffer[range])
                }
            }
        }
        buffer
    }

    /// Whether slabs of so many elements lie in memory as the weights do.
    fn is_in_memory(&self, len: usize) -> bool {
        let inner = self.nest.axes.last();
        matches!(self.fake_quantized, FakeQuantized::Given(_))
            && inner.is_some_and(|inner| inner.strides[1] == 1 && inner.len.is_multiple_of(len))
    }

    /// Offset and stride of the element or grid at a position, and for how many positions the stride holds.
    fn piece(&self, position: usize) -> (isize, isize, usize) {
        let Some((inner, outer)) = self.nest.axes.split_last() else { return (self.nest.origin[1], 0, 1) };
        let within = position % inner.len;
        let mut rest = position / inner.len;
        let mut offset = self.nest.origin[1] + within as isize * inner.strides[1];
        for axis in outer.iter().rev() {
            offset += (rest % axis.len) as isize * axis.strides[1];
            rest /= axis.len;
        }
        (offset, inner.strides[1], inner.len - within)
    }
}

/// The loops over weights, mean, shift and position, with the mean repeated where that lets runs merge.
fn contraction<'a>(nest: &Nest<4>, mean: &'a [f64]) -> Result<(Nest<4>, Cow<'a, [f64]>), Error> {
    let axes = with_positions(nest).map(|(axis, step)| {
        let [w, mean, shift, _] = axis.strides;
        Axis { len: axis.len, strides: [w, mean, shift, step] }
    });
    let [w, m, s, _] = nest.origin;
    let mut nest = Nest { axes: axes.collect(), origin: [w, m, s, 0] }.merged();
    let depends = repeated(&nest.axes);
    if !depends.contains(&true) {
        return Ok((nest, mean.into()));
    }
    let axes = nest.axes.iter().zip(&depends).filter(|(_, depends)| **depends).map(|(axis, _)| *axis).collect();
    let source = Nest { axes, origin: nest.origin };
    memory::check(source.len(), size_of::<f64>())?;
    let mut expanded = Vec::with_capacity(source.len());
    let depth = source.axes.len() - 1;
    let inner = source.axes[depth];
    source.walk(depth, |[_, m, ..]| {
        expanded.extend((0..inner.len as isize).map(|k| mean[(m + k * inner.strides[1]) as usize]));
    });
    let mut stride = 1;
    for (axis, _) in nest.axes.iter_mut().zip(&depends).rev().filter(|(_, depends)| **depends) {
        axis.strides[1] = stride;
        stride *= axis.len as isize;
    }
    nest.origin[1] = 0;
    Ok((nest.merged(), expanded.into()))
}

/// The axes that the mean is repeated along: those that it depends on, the reduced ones, and the innermost where it is a few
/// outputs of each group. None where rows of outputs meet the mean as it is.
fn repeated(axes: &[Axis<4>]) -> Vec<bool> {
    let [outer @ .., inner] = axes else { return Vec::new() };
    let [w, mean, shift, _] = inner.strides;
    let joins = |outer: &Axis<4>| [outer.strides[0], outer.strides[2]] == [w, shift].map(|s| s * inner.len as isize);
    let few = shift != 0 && mean == 0 && inner.len < FEW_OUTPUTS && outer.last().is_some_and(joins);
    let one_each = few || (shift != 0 && mean != 0); // each output of a row meets a mean of its own
    let reduced = |axis: &Axis<4>| axis.strides[2] == 0;
    if shift != 0 && !one_each && !outer.iter().any(|axis| reduced(axis) && axis.strides[1] == 0) {
        return vec![false; axes.len()];
    }
    let along = |(k, axis): (usize, &Axis<4>)| {
        axis.strides[1] != 0 || (reduced(axis) && !one_each) || (few && k == outer.len())
    };
    axes.iter().enumerate().map(along).collect()
}

/// Cuts a contraction by its size alone: along its longest axis but the innermost, whose runs stay whole up to [`RUN_BLOCK`].
fn parts(nest: Nest<4>) -> Vec<Nest<4>> {
    let inner = nest.axes.len() - 1;
    let blocks = nest.axes[inner].len.div_ceil(RUN_BLOCK);
    let count = (nest.len() / PART).clamp(1, MAX_PARTS);
    let longest = (0..inner).max_by_key(|&k| nest.axes[k].len);
    let pieces = match longest {
        Some(longest) if count > blocks => nest.split(longest, count),
        _ => vec![nest],
    };
    if blocks == 1 { pieces } else { pieces.into_iter().flat_map(|piece| piece.split(inner, blocks)).collect() }
}

/// The first channel of the shift that a nest adds to, and how many there are up to the last.
fn reached(nest: &Nest<4>) -> (isize, usize) {
    let reach = |axis: &Axis<4>| (axis.len - 1) as isize * axis.strides[2];
    let start = nest.origin[2] + nest.axes.iter().map(|axis| reach(axis).min(0)).sum::<isize>();
    (start, nest.axes.iter().map(|axis| reach(axis).unsigned_abs()).sum::<usize>() + 1)
}

struct Operands<'a, T> {
    w: Elements<'a, T>,
    source: Source<'a, T>,
    mean: &'a [f64],
}

impl<T: Real> Operands<'_, T> {
    /// The shifts that the nest reaches, and the channel of the first of them.
    fn contract(&self, mut nest: Nest<4>) -> (usize, Vec<f64>) {
        let (start, len) = reached(&nest);
        let mut shift = vec![0.0; len];
        nest.origin[2] -= start;
        let inner = nest.axes.len() - 1;
        let len = nest.axes[inner].len;
        // Rows that follow each other without a gap are taken together.
        let one = Axis { len: 1, strides: [0; 4] };
        let outer = if inner > 0 { nest.axes[inner - 1] } else { one };
        let slabs = nest.axes[inner].strides[0] == 1 && outer.strides[0] == len as isize;
        let (depth, outer) = if slabs { (inner - 1, outer) } else { (inner, one) };
        let rows = if self.source.is_in_memory(len * outer.len) { outer.len } else { (BUFFER / len).max(1) };
        let (mut weights, mut buffer, mut means) = (Vec::new(), Vec::new(), Vec::new());
        nest.walk(depth, |origin| {
            for first in (0..outer.len).step_by(rows) {
                let count = rows.min(outer.len - first);
                let [w, m, s, position] = std::array::from_fn(|k| origin[k] + first as isize * outer.strides[k]);
                let w = self.w.gathered(w, count * len, nest.axes[inner].strides[0], &mut weights);
                let slab = Slab { w, q: self.source.slab(w, position as usize, &mut buffer), len };
                self.add_slab(&slab, [m, s], [outer, nest.axes[inner]], &mut means, &mut shift);
            }
        });
        (start as usize, shift)
    }

    /// `m` and `s` are where the mean and the shift of the slab start, `outer` and `inner` how they move on.
    fn add_slab(
        &self, slab: &Slab<T>, [m, s]: [isize; 2], [outer, inner]: [Axis<4>; 2], buffer: &mut Vec<f64>,
        shift: &mut [f64],
    ) {
        let (rows, len) = (slab.rows() as isize, slab.len);
        let [_, mean_step, shift_step, _] = outer.strides;
        let mean_of = |row: isize| (m + row * mean_step) as usize;
        let place_of = |row: isize| (s + row * shift_step) as usize;
        match inner.strides {
            [_, 1, 0, _] => {
                buffer.resize(rows as usize, 0.0);
                let means = if mean_step == 0 { len } else { rows as usize * len };
                error_dots(slab, &self.mean[m as usize..m as usize + means], buffer);
                (0..rows).for_each(|row| shift[place_of(row)] += buffer[row as usize]);
            }
            [_, 0, 1, _] if shift_step == 0 => {
                buffer.clear();
                buffer.extend((0..rows).map(|row| self.mean[mean_of(row)]));
                add_rows(slab, buffer, &mut shift[s as usize..s as usize + len]);
            }
            _ => (0..rows).for_each(|row| {
                let (w, q) = slab.row(row as usize);
                self.add_row(w, q, [mean_of(row), place_of(row)], inner, shift);
            }),
        }
    }

    fn add_row(&self, w: &[T], q: &[T], [m, s]: [usize; 2], inner: Axis<4>, shift: &mut [f64]) {
        let len = w.len();
        match inner.strides {
            [_, 0, 1, _] => add_rows(&Slab { w, q, len }, &self.mean[m..=m], &mut shift[s..s + len]),
            [_, 1, 1, _] => add_products(w, q, &self.mean[m..m + len], &mut shift[s..s + len]),
            [_, mean, step, _] => {
                for (k, (w, q)) in w.iter().zip(q).enumerate() {
                    let at = |start: usize, stride: isize| (start as isize + k as isize * stride) as usize;
                    shift[at(s, step)] += (*w - *q).widen() * self.mean[at(m, mean)];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strides_of(shape: &[usize]) -> Vec<isize> {
        (0..shape.len()).map(|k| shape[k + 1..].iter().product::<usize>() as isize).collect()
    }

    fn shift(
        w: &[f64], q: &[f64], shape: &[usize], mean: (&[f64], &[usize]), groups: usize, layout: &str,
    ) -> Result<Vec<f64>, Error> {
        let strides = strides_of(shape);
        let tensor = |x| Tensor { elements: Elements::from_slice(x), shape, strides: &strides };
        let mean = Mean { values: mean.0, shape: mean.1.to_vec() };
        weight_error(&tensor(w), &FakeQuantized::Given(tensor(q)), &mean, groups, layout)
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        found.iter().zip(expected).for_each(|(f, e)| assert!((f - e).abs() < 1e-12, "{found:?} {expected:?}"));
    }

    #[test]
    fn the_golden_values_of_hwigo() {
        let w: Vec<f64> = (0..12).map(|i| f64::from(i) / 10.0).collect();
        let q = [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0, 1.0];
        close(&shift(&w, &q, &[1, 2, 3, 1, 2], (&[1.0, -2.0, 0.5], &[3]), 1, "HWIGO").unwrap(), &[0.05, 0.2]);
        let w: Vec<f64> = (0..8).map(|i| -0.35 + 0.1 * f64::from(i)).collect();
        let q = [-0.375, -0.25, -0.125, 0.0, 0.0, 0.125, 0.25, 0.375];
        let expected = [0.15, 0.05, 0.025, 0.075];
        close(&shift(&w, &q, &[2, 1, 1, 2, 2], (&[2.0, -1.0], &[2]), 1, "HWIGO").unwrap(), &expected);
        close(&shift(&w, &q, &[2, 1, 1, 4], (&[2.0, -1.0], &[2]), 2, "HWIO").unwrap(), &expected);
    }

    #[test]
    fn a_long_contraction_is_cut_and_joined() {
        let (inputs, outputs) = (300, 5000);
        let w: Vec<f64> = (0..inputs * outputs).map(|i| (i % 7) as f64).collect();
        let q = vec![1.0; w.len()];
        let mean: Vec<f64> = (0..inputs).map(|i| (i % 3) as f64).collect();
        let expected =
            |o: usize, wi: usize, wo: usize| -> f64 { (0..inputs).map(|i| (w[i * wi + o * wo] - 1.0) * mean[i]).sum() };
        let io: Vec<f64> = (0..outputs).map(|o| expected(o, outputs, 1)).collect();
        assert_eq!(shift(&w, &q, &[inputs, outputs], (&mean, &[inputs]), 1, "IO").unwrap(), io);
        let oi: Vec<f64> = (0..outputs).map(|o| expected(o, 1, inputs)).collect();
        assert_eq!(shift(&w, &q, &[outputs, inputs], (&mean, &[inputs]), 1, "OI").unwrap(), oi);
    }

    #[test]
    fn rows_stay_whole_where_a_contraction_is_cut() {
        let axes = |strides: [[isize; 4]; 2]| strides.map(|strides| Axis { len: 4096, strides });
        for strides in [[[4096, 1, 0, 4096], [1, 0, 1, 1]], [[4096, 0, 1, 4096], [1, 1, 0, 1]]] {
            let parts = parts(Nest::new(axes(strides).to_vec()));
            assert_eq!(parts.len(), MAX_PARTS);
            assert!(parts.iter().all(|part| part.axes[1].len == 4096));
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let mean: (&[f64], &[usize]) = (&[1.0; 2], &[2]);
        let found = |layout, groups| shift(&[0.0; 8], &[0.0; 8], &[2, 4], mean, groups, layout).unwrap_err();
        assert!(matches!(found("OX", 1), Error::Layout { .. }));
        assert!(matches!(found("OO", 1), Error::Layout { .. }));
        assert!(matches!(found("OM", 1), Error::Layout { .. }));
        assert!(matches!(found("HI", 1), Error::Layout { .. }));
        assert!(matches!(found("HIO", 1), Error::LayoutRank { found: 2, expected: 3, .. }));
        assert!(matches!(found("GO", 2), Error::Groups { .. }));
        assert!(matches!(found("IO", 4), Error::Groups { .. }));
        assert!(matches!(found("OI", 1), Error::MeanShape { .. }));
    }
}
