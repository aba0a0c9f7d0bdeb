//! Axes and strides: any strided arrays, walked together, become runs that the kernels can read.
//!
//! A [`Nest`] is a loop nest over N operands: each axis has one length and one stride per operand, 0 where the operand does
//! not depend on the axis. Order of the axes is free, because every kernel here reduces or maps: normalizing sorts them by
//! the memory order of the first operand, turns negative strides around and merges what is contiguous, so that
//! channels-last, channels-first, Fortran, sliced and reversed arrays all meet the same few leaf loops.

use std::marker::PhantomData;

/// The elements that a strided array can reach, addressed by element offset from its first element.
pub struct Elements<'a, T> {
    base: *const T,
    lowest: isize,
    highest: isize,
    lifetime: PhantomData<&'a [T]>,
}

#[expect(unsafe_code, reason = "a shared view of plain values may cross threads like the slice it stands for")]
// SAFETY: `Elements` is a `&[T]` with an origin; the pointer is only ever read.
unsafe impl<T: Sync> Send for Elements<'_, T> {}
#[expect(unsafe_code, reason = "as above")]
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Elements<'_, T> {}

impl<T> Clone for Elements<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Elements<'_, T> {}

impl<'a, T> Elements<'a, T> {
    /// The elements of a slice, its first at offset 0.
    pub fn from_slice(slice: &'a [T]) -> Self {
        Elements { base: slice.as_ptr(), lowest: 0, highest: slice.len() as isize, lifetime: PhantomData }
    }

    /// The elements of a strided array whose first element is at `base`.
    ///
    /// # Safety
    /// Every element of the array is aligned, initialized and unchanged during `'a`.
    #[expect(unsafe_code, reason = "the one door for memory that Rust does not own")]
    pub unsafe fn from_raw(base: *const T, shape: &[usize], strides: &[isize]) -> Self {
        if shape.contains(&0) {
            return Elements { base, lowest: 0, highest: 0, lifetime: PhantomData };
        }
        let (mut lowest, mut highest) = (0, 1);
        for (&len, &stride) in shape.iter().zip(strides) {
            let reach = (len - 1) as isize * stride;
            if reach < 0 { lowest += reach } else { highest += reach }
        }
        Elements { base, lowest, highest, lifetime: PhantomData }
    }

    /// `len` elements from `offset` on. The offset comes from a nest over this array whose innermost stride is 1.
    #[inline]
    pub fn run(&self, offset: isize, len: usize) -> &'a [T] {
        assert!(offset >= self.lowest && offset + len as isize <= self.highest, "run outside the array");
        #[expect(unsafe_code, reason = "a strided array has no slice to index")]
        // SAFETY: the range is within the array, as just checked; the elements live and stay as they are during 'a.
        unsafe {
            std::slice::from_raw_parts(self.base.offset(offset), len)
        }
    }

    /// `len` elements from `offset` on, `stride` apart: where they are if that is 1, else copied into the buffer.
    pub fn gathered<'b>(&self, offset: isize, len: usize, stride: isize, buffer: &'b mut Vec<T>) -> &'b [T]
    where
        T: Copy,
        'a: 'b,
    {
        if stride == 1 {
            return self.run(offset, len);
        }
        buffer.clear();
        buffer.extend((0..len as isize).map(|step| self.get(offset + step * stride)));
        buffer
    }

    /// The element at `offset`.
    #[inline]
    pub fn get(&self, offset: isize) -> T
    where
        T: Copy,
    {
        self.run(offset, 1)[0]
    }
}

/// One loop of a nest: its length and how far each operand moves per step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis<const N: usize> {
    /// Number of steps.
    pub len: usize,
    /// Elements per step, for each operand.
    pub strides: [isize; N],
}

/// Loops over N operands, outermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nest<const N: usize> {
    /// The loops.
    pub axes: Vec<Axis<N>>,
    /// Offset of each operand where every loop is at 0.
    pub origin: [isize; N],
}

impl<const N: usize> Nest<N> {
    /// The loops in any order, as given.
    pub fn new(axes: Vec<Axis<N>>) -> Self {
        Nest { axes, origin: [0; N] }
    }

    /// The same elements: axes of one step dropped, strides of operand 0 made positive.
    pub fn forward(mut self) -> Self {
        self.axes.retain(|axis| axis.len != 1);
        for axis in self.axes.iter_mut().filter(|axis| axis.strides[0] < 0) {
            for (origin, stride) in self.origin.iter_mut().zip(&mut axis.strides) {
                *origin += (axis.len as isize - 1) * *stride;
                *stride = -*stride;
            }
        }
        self
    }

    /// The same, in the memory order of operand 0.
    pub fn in_memory_order(self) -> Self {
        let mut nest = self.forward();
        nest.axes.sort_by_key(|axis| std::cmp::Reverse(axis.strides[0]));
        nest
    }

    /// The same loops with neighbours merged where every operand allows it. At least one axis remains.
    pub fn merged(mut self) -> Self {
        self.axes.dedup_by(|inner, outer| {
            let merges = (0..N).all(|k| outer.strides[k] == inner.strides[k] * inner.len as isize);
            if merges {
                *outer = Axis { len: outer.len * inner.len, strides: inner.strides };
            }
            merges
        });
        if self.axes.is_empty() {
            self.axes.push(Axis { len: 1, strides: [1; N] });
        }
        self
    }

    /// In memory order and merged.
    pub fn normalized(self) -> Self {
        self.in_memory_order().merged()
    }

    /// Steps of all loops together.
    pub fn len(&self) -> usize {
        self.axes.iter().map(|axis| axis.len).product()
    }

    /// Whether some loop has no steps.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// At most `parts` nests that make up this one, cut along `axis`.
    pub fn split(&self, axis: usize, parts: usize) -> Vec<Self> {
        let len = self.axes[axis].len;
        let part = len.div_ceil(parts.clamp(1, len.max(1)));
        (0..len)
            .step_by(part.max(1))
            .map(|start| {
                let mut piece = self.clone();
                piece.axes[axis].len = part.min(len - start);
                for (origin, stride) in piece.origin.iter_mut().zip(self.axes[axis].strides) {
                    *origin += start as isize * stride;
                }
                piece
            })
            .collect()
    }

    /// Calls `f` with the offsets of each step of the outer `depth` loops, in order.
    pub fn walk(&self, depth: usize, mut f: impl FnMut([isize; N])) {
        walk_axes(&self.axes[..depth], self.origin, &mut f);
    }
}

fn walk_axes<const N: usize>(axes: &[Axis<N>], mut offsets: [isize; N], f: &mut impl FnMut([isize; N])) {
    let Some((axis, inner)) = axes.split_first() else { return f(offsets) };
    for _ in 0..axis.len {
        if inner.is_empty() {
            f(offsets);
        } else {
            walk_axes(inner, offsets, f);
        }
        for (offset, stride) in offsets.iter_mut().zip(axis.strides) {
            *offset += stride;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nest(axes: &[(usize, isize)]) -> Nest<1> {
        Nest::new(axes.iter().map(|&(len, stride)| Axis { len, strides: [stride] }).collect())
    }

    fn offsets(nest: &Nest<1>) -> Vec<isize> {
        let mut all = Vec::new();
        nest.walk(nest.axes.len(), |[offset]| all.push(offset));
        all.sort_unstable();
        all
    }

    #[test]
    fn contiguous_axes_merge_into_one() {
        assert_eq!(nest(&[(2, 12), (3, 4), (4, 1)]).normalized().axes, [Axis { len: 24, strides: [1] }]);
        assert_eq!(nest(&[(4, 1), (3, 4), (2, 12)]).normalized().axes, [Axis { len: 24, strides: [1] }]);
    }

    #[test]
    fn an_axis_of_another_operand_keeps_its_place() {
        let two = Nest::new(vec![Axis { len: 5, strides: [3, 0] }, Axis { len: 3, strides: [1, 1] }]);
        assert_eq!(two.clone().normalized(), two);
    }

    #[test]
    fn a_reversed_axis_starts_at_its_end() {
        let reversed = nest(&[(4, -1)]).normalized();
        assert_eq!((reversed.origin, reversed.axes), ([-3], vec![Axis { len: 4, strides: [1] }]));
    }

    #[test]
    fn normalizing_and_splitting_visit_the_same_elements() {
        let original = nest(&[(3, -40), (1, 7), (5, 2), (2, 100)]);
        let normalized = original.clone().normalized();
        assert_eq!(offsets(&original), offsets(&normalized));
        for axis in 0..normalized.axes.len() {
            let mut parts: Vec<isize> = normalized.split(axis, 2).iter().flat_map(offsets).collect();
            parts.sort_unstable();
            assert_eq!(parts, offsets(&original));
        }
    }

    #[test]
    fn a_reversed_axis_without_elements_has_none() {
        assert!(nest(&[(0, -1), (3, 4)]).normalized().is_empty());
    }

    #[test]
    fn a_single_element_still_has_an_axis() {
        assert_eq!(nest(&[]).normalized().axes, [Axis { len: 1, strides: [1] }]);
    }
}
