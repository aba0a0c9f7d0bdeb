//! The shift of each output channel: weight error times mean input.
//!
//! ```text
//! shift[g,o] = sum over s,i of (W[s,i,g,o] - Wq[s,i,g,o]) * mean[(s,)g*I+i]
//! ```
//!
//! `W`, `Wq` in any axis order and stride, f32 or f64; the mean f64 of shape (G*I,) or (*K, G*I). Differences, products and
//! sums are f64, in an order given by shape and strides alone. Both weight tensors are read once, in the memory order of
//! `W`.

use crate::error::Error;
use crate::fake_quantize::Real;
use crate::layout::{Axis, Elements, Nest};
use crate::parallel;
use crate::simd::{Tier, tiered};

/// A strided tensor: its elements, its shape, its strides in elements.
#[derive(Clone, Copy)]
pub struct Tensor<'a, T> {
    /// What the strides reach.
    pub elements: Elements<'a, T>,
    /// Length of each axis.
    pub shape: &'a [usize],
    /// Elements per step along each axis.
    pub strides: &'a [isize],
}

impl<T> Tensor<'_, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether some axis has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The mean input of a layer: per channel, (G*I,), or per tap and channel, (*K, G*I). Values in C order.
#[derive(Clone, Debug)]
pub struct Mean<'a> {
    /// The values.
    pub values: &'a [f64],
    /// Their shape.
    pub shape: Vec<usize>,
}

/// What an axis of a weight tensor counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Space,
    Input,
    Group,
    Output,
}

fn role(letter: char) -> Option<Role> {
    match letter {
        'D' | 'H' | 'W' => Some(Role::Space),
        'I' => Some(Role::Input),
        'G' | 'C' => Some(Role::Group),
        'O' | 'M' => Some(Role::Output),
        _ => None,
    }
}

fn roles(layout: &str) -> Result<Vec<Role>, Error> {
    let error = || Error::Layout { layout: layout.to_owned() };
    let roles: Vec<Role> = layout.chars().map(|letter| role(letter).ok_or_else(error)).collect::<Result<_, _>>()?;
    let once = |wanted| roles.iter().filter(|&&role| role == wanted).count();
    let repeated = layout.chars().enumerate().any(|(k, letter)| layout.chars().take(k).any(|l| l == letter));
    if repeated || once(Role::Output) != 1 || once(Role::Group) > 1 || once(Role::Input) > 1 {
        return Err(error());
    }
    Ok(roles)
}

/// Where each axis moves: strides of the mean, of the shift, and the length of both.
struct Plan {
    /// Operands: weights, fake-quantized weights, mean, shift.
    nest: Nest<4>,
    shift_len: usize,
}

fn plan(shape: &[usize], strides: [&[isize]; 2], mean: &Mean, groups: usize, layout: &str) -> Result<Plan, Error> {
    let roles = roles(layout)?;
    if roles.len() != shape.len() {
        let layout = layout.to_owned();
        return Err(Error::LayoutRank { found: shape.len(), expected: roles.len(), layout });
    }
    // The axis that counts all groups: O, or I where it comes first (transposed convolution).
    let shared = if roles[0] == Role::Input { Role::Input } else { Role::Output };
    let length_of = |wanted| roles.iter().position(|&role| role == wanted).map(|k| shape[k]);
    let (axis_groups, shared_len) = (length_of(Role::Group), length_of(shared).unwrap_or(1));
    let fits = if axis_groups.is_some() {
        groups == 1
    } else {
        (1..=shared_len.max(1)).contains(&groups) && shared_len % groups == 0
    };
    if !fits {
        return Err(Error::Groups { groups, shape: shape.to_vec(), layout: layout.to_owned() });
    }
    let per_group = |wanted| length_of(wanted).map_or(1, |len| if wanted == shared { len / groups } else { len });
    let all_groups = axis_groups.unwrap_or(groups);
    let (inputs, outputs) = (per_group(Role::Input), per_group(Role::Output));
    let mut tap_strides = mean_strides(shape, &roles, mean, inputs * all_groups)?.into_iter();
    let mut axes = Vec::with_capacity(shape.len() + 1);
    for (k, &role) in roles.iter().enumerate() {
        let mut len = shape[k];
        let [w, q] = strides.map(|strides| strides[k]);
        if role == shared && groups > 1 {
            len /= groups;
            let step = len as isize;
            axes.push(Axis { len: groups, strides: [w * step, q * step, inputs as isize, outputs as isize] });
        }
        let (mean, shift) = match role {
            Role::Space => (tap_strides.next().unwrap_or(0), 0),
            Role::Input => (1, 0),
            Role::Group => (inputs as isize, outputs as isize),
            Role::Output => (0, 1),
        };
        axes.push(Axis { len, strides: [w, q, mean, shift] });
    }
    Ok(Plan { nest: Nest::new(axes).normalized(), shift_len: outputs * all_groups })
}

/// The mean's stride along each spatial axis: 0 where it is per channel.
fn mean_strides(shape: &[usize], roles: &[Role], mean: &Mean, channels: usize) -> Result<Vec<isize>, Error> {
    let taps: Vec<usize> = shape.iter().zip(roles).filter(|(_, r)| **r == Role::Space).map(|(&len, _)| len).collect();
    let per_tap: Vec<usize> = taps.iter().copied().chain([channels]).collect();
    if mean.shape == [channels] {
        return Ok(vec![0; taps.len()]);
    }
    if mean.shape != per_tap {
        return Err(Error::MeanShape { found: mean.shape.clone(), per_channel: vec![channels], per_tap });
    }
    Ok((1..per_tap.len()).map(|k| per_tap[k..].iter().product::<usize>() as isize).collect())
}

/// Accumulators of a dot product. Fixed: they decide the order of the sum.
const LANES: usize = 8;

/// Rows of weights that share one pass over their means or shifts, so that these cost a quarter of the traffic. More rows than
/// four of each tensor would fall into the same sets of the L1 cache where a row is a power of two long.
const ROWS: usize = 4;

/// Up to this length the means or shifts of a row stay in the L1 cache (8 KB), so that rows need not share a pass: one row after
/// the other is what hardware prefetchers like best (measured: twice as fast at 512).
const SHORT_ROW: usize = 1024;

/// Rows that are gathered for one call of a leaf.
const GATHERED: usize = 64;

/// A longer output axis is cut into blocks, so that their accumulators stay in the L2 cache. Up to there rows are read whole:
/// leaping from block to block halves what memory delivers.
const OUTPUT_BLOCK: usize = 16384;

/// A contraction is cut into no more parts than these, which bounds the memory of their partial shifts.
const MAX_PARTS: usize = 16;

/// Weights of one part, about: 512 KB of f32.
const PART: usize = 128 << 10;

/// A row of both tensors.
#[derive(Clone, Copy)]
struct Row<'a, T> {
    w: &'a [T],
    q: &'a [T],
}

/// The dot product of each row with one mean.
#[inline(always)]
fn error_dots_body<T: Real>(_: Tier, rows: &[Row<T>], mean: &[f64], dots: &mut [f64]) {
    let (fours, rest) = in_fours(rows, mean.len());
    let (dots_of_fours, dots_of_rest) = dots.split_at_mut(fours.len() * ROWS);
    for (rows, dots) in fours.iter().zip(dots_of_fours.as_chunks_mut::<ROWS>().0) {
        *dots = four_dots(rows, mean);
    }
    for (row, dot) in rest.iter().zip(dots_of_rest) {
        *dot = one_dot(row, mean);
    }
}

#[inline(always)]
fn four_dots<T: Real>(rows: &[Row<T>; ROWS], mean: &[f64]) -> [f64; ROWS] {
    let whole = mean.len() / LANES;
    let chunks = rows.map(|row| (&row.w.as_chunks::<LANES>().0[..whole], &row.q.as_chunks::<LANES>().0[..whole]));
    let mut lanes = [[0.0; LANES]; ROWS];
    for (k, mean) in mean.as_chunks::<LANES>().0.iter().enumerate() {
        for (lanes, (w, q)) in lanes.iter_mut().zip(&chunks) {
            add_errors_of(&w[k], &q[k], mean, lanes);
        }
    }
    std::array::from_fn(|r| finished(&rows[r], mean, lanes[r]))
}

#[inline(always)]
fn one_dot<T: Real>(row: &Row<T>, mean: &[f64]) -> f64 {
    let mut lanes = [0.0; LANES];
    let chunks = row.w.as_chunks::<LANES>().0.iter().zip(row.q.as_chunks::<LANES>().0);
    for ((w, q), mean) in chunks.zip(mean.as_chunks::<LANES>().0) {
        add_errors_of(w, q, mean, &mut lanes);
    }
    finished(row, mean, lanes)
}

#[inline(always)]
fn add_errors_of<T: Real>(w: &[T; LANES], q: &[T; LANES], mean: &[f64; LANES], lanes: &mut [f64; LANES]) {
    for k in 0..LANES {
        lanes[k] += (w[k].widen() - q[k].widen()) * mean[k];
    }
}

/// Adds the rest of a row that fills no chunk, then the lanes pair by pair.
#[inline(always)]
fn finished<T: Real>(row: &Row<T>, mean: &[f64], mut lanes: [f64; LANES]) -> f64 {
    let start = mean.len() / LANES * LANES;
    for (k, lane) in lanes.iter_mut().enumerate().take(mean.len() - start) {
        *lane += (row.w[start + k].widen() - row.q[start + k].widen()) * mean[start + k];
    }
    for half in [4, 2, 1] {
        for k in 0..half {
            lanes[k] += lanes[k + half];
        }
    }
    lanes[0]
}

/// Adds the errors of each row times a mean each, one row after the other.
#[inline(always)]
fn add_errors_body<T: Real>(_: Tier, rows: &[Row<T>], means: &[f64], shift: &mut [f64]) {
    let (fours, rest) = in_fours(rows, shift.len());
    let (means_of_fours, means_of_rest) = means.split_at(fours.len() * ROWS);
    for (rows, means) in fours.iter().zip(means_of_fours.as_chunks::<ROWS>().0) {
        add_four(rows, means, shift);
    }
    for (Row { w, q }, mean) in rest.iter().zip(means_of_rest) {
        for ((shift, w), q) in shift.iter_mut().zip(*w).zip(*q) {
            *shift += (w.widen() - q.widen()) * mean;
        }
    }
}

#[inline(always)]
fn add_four<T: Real>(rows: &[Row<T>; ROWS], means: &[f64; ROWS], shift: &mut [f64]) {
    let len = shift.len();
    let (w, q) = (rows.map(|row| &row.w[..len]), rows.map(|row| &row.q[..len]));
    for k in 0..len {
        let mut sum = shift[k];
        for r in 0..ROWS {
            sum += (w[r][k].widen() - q[r][k].widen()) * means[r];
        }
        shift[k] = sum;
    }
}

/// Rows that share a pass, and those that go one by one.
#[inline(always)]
fn in_fours<'a, 'b, T>(rows: &'b [Row<'a, T>], len: usize) -> (&'b [[Row<'a, T>; ROWS]], &'b [Row<'a, T>]) {
    if len > SHORT_ROW { rows.as_chunks() } else { (&[], rows) }
}

tiered! { fn error_dots<T: Real>(rows: &[Row<T>], mean: &[f64], dots: &mut [f64]) = error_dots_body }
tiered! { fn add_errors<T: Real>(rows: &[Row<T>], means: &[f64], shift: &mut [f64]) = add_errors_body }

/// The shift of each output channel, (G*O,), group by group.
///
/// `layout` names the axes of both weight tensors; `groups` is 1 where it has a group axis.
pub fn weight_error<T: Real>(
    weights: &Tensor<T>, fake_quantized: &Tensor<T>, mean: &Mean, groups: usize, layout: &str,
) -> Result<Vec<f64>, Error> {
    if weights.shape != fake_quantized.shape {
        let (found, expected) = (fake_quantized.shape.to_vec(), weights.shape.to_vec());
        return Err(Error::WeightShape { found, expected });
    }
    let plan = plan(weights.shape, [weights.strides, fake_quantized.strides], mean, groups, layout)?;
    if plan.nest.is_empty() {
        return Ok(vec![0.0; plan.shift_len]);
    }
    let (nest, expanded) = mean_in_memory_order(plan.nest, mean.values);
    let operands = Operands { w: weights.elements, q: fake_quantized.elements, mean: Elements::from_slice(&expanded) };
    let parts = parts(&nest);
    let bytes = 2 * nest.len() * size_of::<T>();
    let mut shift = vec![0.0; plan.shift_len];
    for part in parallel::map(parts, bytes, |part| operands.contract(&part, plan.shift_len))? {
        shift.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    Ok(shift)
}

/// The mean repeated along the reduced axes in the memory order of the weights, so that they merge into long runs.
fn mean_in_memory_order(mut nest: Nest<4>, mean: &[f64]) -> (Nest<4>, Vec<f64>) {
    let depends = |axis: &Axis<4>| axis.strides[3] == 0 || axis.strides[2] != 0;
    let axes = nest.axes.iter().copied().filter(depends).collect();
    let source = Nest { axes, origin: nest.origin };
    let mut expanded = Vec::with_capacity(source.len());
    source.walk(source.axes.len(), |[_, _, m, _]| expanded.push(mean[m as usize]));
    let mut stride = 1;
    for axis in nest.axes.iter_mut().rev().filter(|axis| depends(axis)) {
        axis.strides[2] = stride;
        stride *= axis.len as isize;
    }
    nest.origin[2] = 0;
    (nest.normalized(), expanded)
}

/// Cuts a contraction by its size alone: along its longest axis but the innermost, whose runs stay whole up to [`OUTPUT_BLOCK`].
fn parts(nest: &Nest<4>) -> Vec<Nest<4>> {
    let inner = nest.axes.len() - 1;
    let blocks = if nest.axes[inner].strides[3] == 0 { 1 } else { nest.axes[inner].len.div_ceil(OUTPUT_BLOCK) };
    let count = (nest.len() / PART).clamp(1, MAX_PARTS);
    if blocks >= count {
        return nest.split(inner, blocks);
    }
    let longest = (0..=inner).max_by_key(|&k| (k != inner, nest.axes[k].len));
    let pieces = nest.split(longest.unwrap_or(0), count);
    pieces.into_iter().flat_map(|piece| piece.split(inner, blocks)).collect()
}

struct Operands<'a, T> {
    w: Elements<'a, T>,
    q: Elements<'a, T>,
    mean: Elements<'a, f64>,
}

impl<T: Real> Operands<'_, T> {
    fn contract(&self, nest: &Nest<4>, shift_len: usize) -> Vec<f64> {
        let mut shift = vec![0.0; shift_len];
        match nest.axes[nest.axes.len() - 1].strides {
            [1, 1, 1, 0] => self.dots(nest, &mut shift),
            [1, 1, 0, 1] => self.rows(nest, &mut shift),
            _ => self.elements(nest, &mut shift),
        }
        shift
    }

    /// The innermost axis is reduced: dot products, of rows gathered as long as they meet the same mean.
    fn dots(&self, nest: &Nest<4>, shift: &mut [f64]) {
        let depth = nest.axes.len() - 1;
        let len = nest.axes[depth].len;
        let mut dots = [0.0; GATHERED];
        let (mut rows, mut places, mut mean) =
            (Vec::with_capacity(GATHERED), Vec::with_capacity(GATHERED), nest.origin[2]);
        let mut finish = |rows: &mut Vec<Row<T>>, places: &mut Vec<isize>, mean: isize| {
            error_dots(rows, self.mean.run(mean, len), &mut dots[..rows.len()]);
            places.drain(..).zip(dots).for_each(|(place, dot)| shift[place as usize] += dot);
            rows.clear();
        };
        nest.walk(depth, |[w, q, m, s]| {
            if rows.len() == GATHERED || mean != m {
                finish(&mut rows, &mut places, mean);
            }
            mean = m;
            places.push(s);
            rows.push(Row { w: self.w.run(w, len), q: self.q.run(q, len) });
        });
        finish(&mut rows, &mut places, mean);
    }

    /// The innermost axis is the output: rows, gathered as long as they go to the same place.
    fn rows(&self, nest: &Nest<4>, shift: &mut [f64]) {
        let depth = nest.axes.len() - 1;
        let len = nest.axes[depth].len;
        let (mut rows, mut means, mut place) =
            (Vec::with_capacity(GATHERED), Vec::with_capacity(GATHERED), nest.origin[3]);
        let mut finish = |rows: &mut Vec<Row<T>>, means: &mut Vec<f64>, place: isize| {
            add_errors(rows, means, &mut shift[place as usize..place as usize + len]);
            rows.clear();
            means.clear();
        };
        nest.walk(depth, |[w, q, m, s]| {
            if rows.len() == GATHERED || place != s {
                finish(&mut rows, &mut means, place);
            }
            place = s;
            means.push(self.mean.get(m));
            rows.push(Row { w: self.w.run(w, len), q: self.q.run(q, len) });
        });
        finish(&mut rows, &mut means, place);
    }

    /// Any strides, element by element.
    fn elements(&self, nest: &Nest<4>, shift: &mut [f64]) {
        nest.walk(nest.axes.len(), |[w, q, m, s]| {
            shift[s as usize] += (self.w.get(w).widen() - self.q.get(q).widen()) * self.mean.get(m);
        });
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
        weight_error(&tensor(w), &tensor(q), &Mean { values: mean.0, shape: mean.1.to_vec() }, groups, layout)
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
        for strides in [[[4096, 4096, 1, 0], [1, 1, 0, 1]], [[4096, 4096, 0, 1], [1, 1, 1, 0]]] {
            let parts = parts(&Nest::new(axes(strides).to_vec()));
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
