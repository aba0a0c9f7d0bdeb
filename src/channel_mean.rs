//! Sums of samples per channel, and per kernel tap and channel.
//!
//! ```text
//! channel_sums(x)[c] = sum over every position p of x[p, c]
//! tap_sums(x)[k, c]  = sum over n and output positions o of x[n, o * stride + k * dilation - pad, c]   (0 outside x)
//! ```
//!
//! Accumulators are those of [`crate::accumulate`]: integers are summed exactly, real numbers in f64 inside a block and in
//! double-double between blocks, in an order given by shape and strides alone. Each element is read once, whatever the number
//! of taps: positions of an axis that are seen by the same taps form a class, the sum of each class is taken, and a tap's sum
//! is the sum of its classes.

use crate::accumulate::{Block, Element, LANES, Runs, SumOf, Total, TotalOf, run_totals};
use crate::error::Error;
use crate::layout::{Axis, Elements, Nest};
use crate::{memory, parallel};

/// A sample is cut into tiles of about this size (half of a common L2 cache) ...
const TILE_BYTES: usize = 512 << 10;

/// ... but into no more than these, which bounds the memory that the tiles' sums take.
const MAX_TILES: usize = 64;

/// A real sample that lies in memory in the order of its axes is summed in pieces, and these in order, so that parts of it that are
/// elsewhere come to the same bits. A piece has as many steps of the first axis as take so many bytes ...
const PIECE_BYTES: usize = 1 << 20;

/// ... and at least so many positions, so that it takes little to add its sums.
const PIECE_POSITIONS: usize = 1 << 12;

/// Sums of pieces that may wait to be added, 1 MB of them: threads wait for each other less often.
const WAITING_SUMS: usize = 1 << 16;

/// Channels that are worth a tile of their own: 1024 f64 fill two pages.
const MANY_CHANNELS: usize = 1024;

/// Runs of one channel up to this length are not summed one by one, but position by position over many of them: the sum of a
/// run has to be folded from its lanes (measured: at 512 elements either way takes as long).
const LONG_RUN: usize = 512;

/// Rows that make it worth to fold a lane per position.
const MANY_ROWS: usize = 4;

/// Lanes side by side, at most: f64 ones fill an eighth of a common L2 cache.
const COLUMNS: usize = 16384;

/// Rows that are gathered for one call of a leaf; no more than any block has.
const GATHERED: usize = 64;

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

/// A part of samples that lie in memory alike, walked in memory order. Operands: element, channel, sample.
struct Tile<'a, T> {
    group: usize,
    samples: &'a [Sample<'a, T>],
    nest: Nest<3>,
}

/// Adds the sums per channel of each sample to `totals`, sample by sample in order.
///
/// Reads each element once. Neighbours that lie in memory alike are summed together, position by position, where sums are exact: so
/// what a sample has to be folded from counts once for all. Takes at most [`MAX_TILES`] times the memory of `totals` beside it, and
/// no more than twice where there are many channels.
pub fn channel_sums<T: Element>(samples: &[Sample<T>], totals: &mut [SumOf<T>]) -> Result<(), Error> {
    let alike = |a: &Sample<T>, b: &Sample<T>| {
        SumOf::<T>::EXACT && (a.shape, a.strides, a.channel_axis) == (b.shape, b.strides, b.channel_axis)
    };
    let mut waiting = Vec::new();
    for (group, samples) in samples.chunk_by(alike).enumerate() {
        let Some(piece) = samples.first().and_then(piece_len).filter(|_| !SumOf::<T>::EXACT) else {
            add_tiles(group, samples, nest_of(samples), &mut waiting);
            if waiting.len() >= MAX_TILES {
                fold_tiles(std::mem::take(&mut waiting), totals)?;
            }
            continue;
        };
        fold_tiles(std::mem::take(&mut waiting), totals)?;
        merge(totals, &piecewise_sums(samples, piece, totals.len())?);
    }
    fold_tiles(waiting, totals)
}

/// Steps of the first axis that make up a piece; None where there is one piece, or the order in memory is another one.
fn piece_len<T>(sample: &Sample<T>) -> Option<usize> {
    if sample.channel_axis == 0 {
        return None;
    }
    let mut row = 1;
    for (&len, &stride) in sample.shape.iter().zip(sample.strides).skip(1).rev() {
        if len != 1 && stride != row as isize {
            return None;
        }
        row *= len;
    }
    let positions = row / sample.shape[sample.channel_axis];
    let piece = (PIECE_BYTES / (row * size_of::<T>())).max(PIECE_POSITIONS.div_ceil(positions));
    (sample.strides[0] == row as isize && sample.shape[0] > piece).then_some(piece)
}

/// The sums of one sample, of each piece and then of all in order.
fn piecewise_sums<T: Element>(samples: &[Sample<T>], piece: usize, channels: usize) -> Result<Vec<SumOf<T>>, Error> {
    let mut sums = vec![SumOf::<T>::default(); channels];
    let mut waiting = Vec::new();
    let whole = nest_of(samples);
    let Axis { len, strides } = whole.axes[0];
    for (group, start) in (0..len).step_by(piece).enumerate() {
        let mut nest = whole.clone();
        nest.axes[0].len = piece.min(len - start);
        nest.origin[0] = start as isize * strides[0];
        add_tiles(group, samples, nest, &mut waiting);
        if waiting.len() >= MAX_TILES.max(WAITING_SUMS / channels) {
            fold_tiles(std::mem::take(&mut waiting), &mut sums)?;
        }
    }
    fold_tiles(waiting, &mut sums)?;
    Ok(sums)
}

/// The axes of the first sample as they are given.
fn nest_of<T>(samples: &[Sample<T>]) -> Nest<3> {
    let axes = samples.iter().take(1).flat_map(|sample| {
        let channel = |k: usize| isize::from(k == sample.channel_axis);
        let axes = sample.shape.iter().zip(sample.strides).enumerate();
        axes.map(move |(k, (&len, &stride))| Axis { len, strides: [stride, channel(k), 0] })
    });
    Nest::new(axes.collect())
}

fn add_tiles<'a, T>(group: usize, samples: &'a [Sample<'a, T>], nest: Nest<3>, tiles: &mut Vec<Tile<'a, T>>) {
    let mut nest = nest.normalized();
    if samples.len() > 1 {
        nest.axes.insert(0, Axis { len: samples.len(), strides: [0, 0, 1] });
    }
    let parts = (nest.len() * size_of::<T>() / TILE_BYTES).clamp(1, MAX_TILES);
    tiles.extend(cut(nest, parts).into_iter().map(|nest| Tile { group, samples, nest }));
}

/// At most so many parts. Short runs are cut between channels as far as that leaves long rows of them: it costs no folding.
fn cut(nest: Nest<3>, parts: usize) -> Vec<Nest<3>> {
    if parts == 1 {
        return vec![nest];
    }
    let stretches = if is_worth_lanes(&nest) { (row_len(&nest, 2) / COLUMNS).clamp(1, parts) } else { 1 };
    let pieces = if stretches > 1 { nest.split(nest.axes.len() - 2, stretches) } else { vec![nest] };
    let parts = parts / stretches;
    pieces.into_iter().flat_map(|piece| piece.split(axis_to_cut(&piece, parts), parts)).collect()
}

/// Whether the inner axes are channels of short contiguous runs that follow each other, in many rows.
fn is_worth_lanes(nest: &Nest<3>) -> bool {
    let [.., channels, run] = *nest.axes.as_slice() else { return false };
    let contiguous = run.strides[0] == 1 && channels.strides[0] == run.len as isize && channels.strides[1] != 0;
    contiguous && run.strides[1] == 0 && run.len < LONG_RUN && nest.len() >= MANY_ROWS * run.len * channels.len
}

/// Elements of a row of the innermost axes.
fn row_len(nest: &Nest<3>, axes: usize) -> usize {
    nest.axes[nest.axes.len() - axes..].iter().map(|axis| axis.len).product()
}

/// The channel axis where each part keeps many channels, so that tiles share none; else an outer axis, so that runs stay whole.
fn axis_to_cut(nest: &Nest<3>, parts: usize) -> usize {
    let worth = |k: &usize| {
        let axis = nest.axes[*k];
        let channels = axis.strides[1] != 0;
        let inner = k + 1 == nest.axes.len();
        let size = (axis.strides[2], axis.len); // samples first
        (channels && axis.len >= parts * MANY_CHANNELS, 4 * axis.len >= parts, !inner, !channels, size)
    };
    (0..nest.axes.len()).max_by_key(worth).unwrap_or(0)
}

fn fold_tiles<T: Element>(tiles: Vec<Tile<T>>, totals: &mut [SumOf<T>]) -> Result<(), Error> {
    memory::check(tiles.iter().map(|tile| tile.channels().len()).sum::<usize>() + totals.len(), OF_SUM)?;
    let bytes = tiles.iter().map(|tile| tile.nest.len() * size_of::<T>()).sum();
    let sums = parallel::map(tiles, bytes, |tile| (tile.group, tile.channels().start, tile.sums()))?;
    for group in sums.chunk_by(|a, b| a.0 == b.0) {
        if let [(_, start, only)] = group {
            merge(&mut totals[*start..], only);
            continue;
        }
        let mut sum = vec![SumOf::<T>::default(); totals.len()];
        for (_, start, tile) in group {
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
    fn sums(&self) -> Vec<SumOf<T>> {
        match *self.nest.axes.as_slice() {
            [.., inner] if inner.strides[1] != 0 => self.row_sums(self.nest.axes.len() - 1, 1),
            [.., inner] if is_worth_lanes(&self.nest) => self.row_sums(self.nest.axes.len() - 2, inner.len),
            _ => self.run_sums(),
        }
    }

    /// The axes from `depth` on are rows of lanes, `group` next to each other for each channel.
    fn row_sums(&self, depth: usize, group: usize) -> Vec<SumOf<T>> {
        let Tile { samples, nest, .. } = self;
        let width: usize = nest.axes[depth..].iter().map(|axis| axis.len).product();
        let inner = nest.axes[nest.axes.len() - 1];
        let columns = (COLUMNS / group).max(1) * group;
        let slab = depth > 0 && inner.strides[0] == 1 && nest.axes[depth - 1].strides[0] == width as isize;
        let mut sums = if slab && width <= columns {
            self.slab_sums(depth - 1, width, group)
        } else if inner.strides[0] == 1 {
            let stretch = |start| self.stretch_sums(depth, start, columns.min(width - start), group);
            (0..width).step_by(columns).flat_map(stretch).collect()
        } else {
            let mut block = Block::<T>::new(width, width);
            let mut row = Vec::with_capacity(width);
            nest.walk(depth, |[x, _, k]| {
                block.add_rows(0, &[samples[k as usize].elements.gathered(x, inner.len, inner.strides[0], &mut row)])
            });
            block.finish(width)
        };
        if nest.axes[depth].strides[1] < 0 {
            sums.reverse();
        }
        sums
    }

    /// Rows that follow each other without a gap.
    fn slab_sums(&self, depth: usize, width: usize, group: usize) -> Vec<SumOf<T>> {
        let rows = self.nest.axes[depth].len;
        let fold = if group == 1 { virtual_rows(width, rows) } else { 1 };
        let mut block = Block::<T>::new(width * fold, width * fold / group);
        self.nest.walk(depth, |[x, _, k]| block.add_slab(self.samples[k as usize].elements.run(x, width * rows)));
        block.finish(width / group)
    }

    /// A stretch of contiguous rows that are anywhere.
    fn stretch_sums(&self, depth: usize, start: usize, len: usize, group: usize) -> Vec<SumOf<T>> {
        let mut block = Block::<T>::new(len, len / group);
        let mut rows = Vec::with_capacity(GATHERED);
        self.nest.walk(depth, |[x, _, k]| {
            rows.push(self.samples[k as usize].elements.run(x + start as isize, len));
            if rows.len() == GATHERED {
                block.add_rows(0, &rows);
                rows.clear();
            }
        });
        block.add_rows(0, &rows);
        block.finish(len / group)
    }

    /// The innermost axis is summed over: runs of one channel. Those along the next axis are taken together.
    fn run_sums(&self) -> Vec<SumOf<T>> {
        let Tile { samples, nest, .. } = self;
        let channels = self.channels();
        let mut sums: Vec<SumOf<T>> = vec![Default::default(); channels.len()];
        let last = nest.axes.len() - 1;
        let inner = nest.axes[last];
        let together = last > 0 && inner.strides[0] == 1 && nest.axes[last - 1].strides[2] == 0;
        let (depth, outer) =
            if together { (last - 1, nest.axes[last - 1]) } else { (last, Axis { len: 1, strides: [0; 3] }) };
        let (len, stride) = (inner.len, outer.strides[0] as usize);
        let mut totals: Vec<TotalOf<T>> = vec![Default::default(); outer.len];
        let mut buffer = Vec::new();
        nest.walk(depth, |[x, channel, k]| {
            let elements =
                samples[k as usize].elements.gathered(x, (outer.len - 1) * stride + len, inner.strides[0], &mut buffer);
            run_totals(&Runs { elements, len, stride }, &mut totals);
            for (k, total) in totals.iter().enumerate() {
                sums[(channel + k as isize * outer.strides[1]) as usize - channels.start].merge(total.sum());
            }
        });
        sums
    }
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

    /// The classes of the positions of several axes, in C order; taps are not combined.
    fn product(axes: &[Classes]) -> Self {
        let one = Classes { of_position: vec![Some(0)], taps: vec![Vec::new()] };
        axes.iter().fold(one, |outer, inner| {
            let count = inner.taps.len();
            let with = |class: &Option<usize>| {
                let outer = *class;
                inner.of_position.iter().map(move |class| Some(outer? * count + (*class)?)).collect::<Vec<_>>()
            };
            Classes {
                of_position: outer.of_position.iter().flat_map(with).collect(),
                taps: vec![Vec::new(); outer.taps.len() * count],
            }
        })
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

/// Planes of up to so many positions are summed over the batch position by position, where it has [`MANY_ROWS`]: their own rows
/// are too short to be summed one by one.
const SMALL_PLANE: usize = 4096;

/// Parts of a batch that is summed position by position: each has a lane per position to fold.
const BATCH_PARTS: usize = 4;

/// Bytes for each position along an axis: its class, and a lane and its total for each row of classes outside of it.
const OF_POSITION: usize = 64;

/// Bytes for each channel of a tile, and for each class and channel: its sum, twice while they are transposed, a lane and a total.
const OF_SUM: usize = 64;

/// Sums per tap and channel of one sample (N, C, *S) or (N, *S, C), as (*K, C) in C order.
///
/// `windows` has one entry per spatial axis: every axis but the first and the channel axis.
pub fn tap_sums<T: Element>(sample: &Sample<T>, windows: &[AxisWindow]) -> Result<Vec<SumOf<T>>, Error> {
    let axis = |k: usize| Axis { len: sample.shape[k], strides: [sample.strides[k]] };
    let spatial: Vec<usize> = (1..sample.shape.len()).filter(|&k| k != sample.channel_axis).collect();
    memory::check(spatial.iter().map(|&k| sample.shape[k]).max().unwrap_or(0), OF_POSITION)?;
    let classes: Vec<Classes> = spatial.iter().zip(windows).map(|(&k, w)| Classes::new(axis(k).len, w)).collect();
    let channels = axis(sample.channel_axis);
    let taps: usize = windows.iter().map(|window| window.taps).product();
    let mut totals = vec![SumOf::<T>::default(); taps * channels.len];
    if classes.iter().any(|axis| axis.taps.is_empty()) {
        return Ok(totals); // no tap sees anything
    }
    let space = spatial.into_iter().map(axis).collect();
    let plane = Plane { elements: sample.elements, offset: 0, batch: axis(0), channels, space, classes: &classes };
    let bytes = memory::product(sample.shape.iter().copied()).saturating_mul(size_of::<T>());
    let pieces = plane.pieces((bytes / TILE_BYTES).clamp(1, MAX_TILES));
    memory::check(memory::product([pieces.len(), count_of(&classes), channels.len]), OF_SUM)?;
    for (start, sums) in parallel::map(pieces, bytes, |(start, piece)| (start, piece.class_sums()))? {
        scatter(&sums, &classes, windows, &mut totals, start, channels.len);
    }
    Ok(totals)
}

/// A sample whose taps are summed, or a part of its batch or channels.
#[derive(Clone)]
struct Plane<'a, T> {
    elements: Elements<'a, T>,
    /// Of its first element.
    offset: isize,
    batch: Axis<1>,
    channels: Axis<1>,
    space: Vec<Axis<1>>,
    classes: &'a [Classes],
}

impl<T: Element> Plane<'_, T> {
    /// Pieces that can be summed apart, each with its first channel: of the batch where channels are innermost, else of channels,
    /// as many as make long rows where planes are small.
    fn pieces(&self, parts: usize) -> Vec<(usize, Self)> {
        if self.channels_are_inner() {
            return self.cut_batch(parts).into_iter().map(|piece| (0, piece)).collect();
        }
        let Some(columns) = self.columns() else { return self.cut_channels(self.channels.len.div_ceil(parts)) };
        let pieces = self.cut_channels((COLUMNS / columns.plane).max(1)).into_iter();
        pieces
            .flat_map(|(start, piece)| piece.cut_batch(parts.min(BATCH_PARTS)).into_iter().map(move |p| (start, p)))
            .collect()
    }

    fn cut_batch(&self, parts: usize) -> Vec<Self> {
        let len = self.batch.len.div_ceil(parts).max(MANY_ROWS);
        let piece = |start: usize| Plane {
            offset: self.offset + start as isize * self.batch.strides[0],
            batch: Axis { len: len.min(self.batch.len - start), ..self.batch },
            ..self.clone()
        };
        (0..self.batch.len).step_by(len).map(piece).collect()
    }

    fn cut_channels(&self, len: usize) -> Vec<(usize, Self)> {
        let piece = |start: usize| Plane {
            offset: self.offset + start as isize * self.channels.strides[0],
            channels: Axis { len: len.min(self.channels.len - start), ..self.channels },
            ..self.clone()
        };
        (0..self.channels.len).step_by(len.max(1)).map(|start| (start, piece(start))).collect()
    }

    /// All positions of all channels as one row, where that is worth it.
    fn columns(&self) -> Option<Columns> {
        let one = Axis { len: 1, strides: [1] };
        let plane = self.space.iter().rev().try_fold(one, |plane, &axis| merged(axis, plane))?;
        let row = merged(self.channels, plane)?;
        (plane.len <= SMALL_PLANE && self.batch.len >= MANY_ROWS).then_some(Columns { row, plane: plane.len })
    }

    fn channels_are_inner(&self) -> bool {
        self.space.last().is_none_or(|axis| self.channels.strides[0].abs() <= axis.strides[0].abs())
    }

    /// Sums of each combination of classes, as (channels, *classes).
    fn class_sums(&self) -> Vec<SumOf<T>> {
        let Some((&inner, outer)) = self.space.split_last() else { return Vec::new() };
        let (inner_classes, outer_classes) = (&self.classes[outer.len()], &self.classes[..outer.len()]);
        let channels = self.channels;
        if self.channels_are_inner() {
            let combinations = count_of(self.classes);
            let rows = match merged(inner, channels) {
                Some(row) if count_of(outer_classes) * row.len <= COLUMNS => {
                    let rows = self.row_sums(self.offset, row, outer, outer_classes);
                    rows.chunks(row.len).flat_map(|row| folded(row, channels.len, inner_classes)).collect()
                }
                _ => self.row_sums(self.offset, channels, &self.space, self.classes),
            };
            return transposed(&rows, combinations, channels.len);
        }
        if let Some(Columns { row, plane }) = self.columns() {
            let classes = Classes::product(self.classes);
            let rows = self.row_sums(self.offset, row, &[], &[]);
            return rows.chunks(plane).flat_map(|plane| folded(plane, 1, &classes)).collect();
        }
        let per_channel = |channel: usize| {
            let offset = self.offset + channel as isize * channels.strides[0];
            let rows = self.row_sums(offset, inner, outer, outer_classes);
            rows.chunks(inner.len).flat_map(|row| folded(row, 1, inner_classes)).collect::<Vec<_>>()
        };
        (0..channels.len).flat_map(per_channel).collect()
    }

    /// Sums, as (*classes of `outer`, inner), of rows along `inner`.
    fn row_sums(&self, offset: isize, inner: Axis<1>, outer: &[Axis<1>], classes: &[Classes]) -> Vec<SumOf<T>> {
        let lanes = count_of(classes) * inner.len;
        let mut block = Block::<T>::new(lanes, lanes);
        let (mut rows, mut class_of_rows, mut buffer) = (Vec::with_capacity(GATHERED), 0, Vec::new());
        for n in 0..self.batch.len as isize {
            visit(outer, classes, offset + n * self.batch.strides[0], 0, &mut |start, class| {
                if inner.strides[0] != 1 {
                    let row = self.elements.gathered(start, inner.len, inner.strides[0], &mut buffer);
                    return block.add_rows(class * inner.len, &[row]);
                }
                if class != class_of_rows || rows.len() == GATHERED {
                    block.add_rows(class_of_rows * inner.len, &rows);
                    rows.clear();
                }
                class_of_rows = class;
                rows.push(self.elements.run(start, inner.len));
            });
        }
        block.add_rows(class_of_rows * inner.len, &rows);
        block.finish(lanes)
    }
}

/// A row of channels, each a plane of positions.
struct Columns {
    row: Axis<1>,
    plane: usize,
}

/// Two axes as one, where each step of the outer is as far as the inner reaches.
fn merged(outer: Axis<1>, inner: Axis<1>) -> Option<Axis<1>> {
    let merges = outer.len == 1 || outer.strides[0] == inner.strides[0] * inner.len as isize;
    merges.then_some(Axis { len: outer.len * inner.len, ..inner })
}

/// Combinations of the classes of several axes.
fn count_of(classes: &[Classes]) -> usize {
    classes.iter().map(|axis| axis.taps.len()).product()
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

/// Positions, of `width` elements each, summed by their class: (classes, width).
fn folded<A: Total>(positions: &[A], width: usize, classes: &Classes) -> Vec<A> {
    let mut sums = vec![A::default(); classes.taps.len() * width];
    for (position, class) in positions.chunks(width).zip(&classes.of_position) {
        if let Some(class) = class {
            merge(&mut sums[class * width..], position);
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
    use crate::accumulate::Compensated;

    fn strides_of(shape: &[usize]) -> Vec<isize> {
        let mut strides = vec![1; shape.len()];
        for k in (1..shape.len()).rev() {
            strides[k - 1] = strides[k] * shape[k] as isize;
        }
        strides
    }

    fn sums<T: Element>(x: &[T], shape: &[usize], channel_axis: usize) -> Vec<SumOf<T>> {
        let mut totals = vec![Default::default(); shape[channel_axis]];
        let sample = Sample { elements: Elements::from_slice(x), shape, strides: &strides_of(shape), channel_axis };
        channel_sums(&[sample], &mut totals).unwrap();
        totals
    }

    #[test]
    fn extreme_integers_do_not_overflow() {
        let n = (3 << 15) * LANES + 5;
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
    fn a_sample_has_the_sums_of_its_pieces_in_order() {
        let shape = [300, 64, 32];
        let x: Vec<f32> = (0..300 * 64 * 32).map(|i| (1.37 * i as f32).sin() * 2f32.powi(i % 41)).collect();
        let piece = 128; // of 1 MB; 64 would have 4096 positions
        let mut expected = [Compensated::default(); 32];
        for piece in x.chunks(piece * 64 * 32) {
            merge(&mut expected, &sums(piece, &[piece.len() / (64 * 32), 64, 32], 2));
        }
        assert_eq!(sums(&x, &shape, 2), expected);
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
