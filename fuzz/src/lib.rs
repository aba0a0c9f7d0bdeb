//! What the kernels do with anything that they can be given: bytes are shapes, strides, layouts, grids and values.
//!
//! An array lies in memory of just its size, so that a sanitizer sees a read beside it. What a kernel returns is compared with
//! the formula of its module, an element at a time, or with another kernel that promises the same bits.

use arbitrary::{Arbitrary, Result, Unstructured};
use biascorr::accumulate::{Compensated, Element, Int4, SumOf, UInt4};
use biascorr::channel_mean::{AxisWindow, Sample, channel_sums, tap_sums};
use biascorr::error::Error;
use biascorr::fake_quantize::{Grids, Quantized, Real, dequantize, fake_quantize, quantize, round_half_even};
use biascorr::layout::Elements;
use biascorr::quantization_range::{Quantizer, quantization_range};
use biascorr::weight_error::{FakeQuantized, GridAxes, Mean, weight_error};
use biascorr::weights::{Channels, Role, Tensor};
use half::{bf16, f16};

/// Elements of an array, at most: enough for several tiles, blocks and chunks.
const ELEMENTS: usize = 80_000;

/// Elements of most arrays, at most: so few that thousands are tried in a second.
const FEW: usize = 1000;

/// Runs the kernel that the first byte names; the others are what it is given.
pub fn run(data: &[u8]) {
    // Bytes that are too few are no input.
    let _ = any_kernel(&mut Unstructured::new(data));
}

fn any_kernel(u: &mut Unstructured) -> Result<()> {
    match u.int_in_range(0..=4)? {
        0 => sums_of_any_type(u),
        1 if u.arbitrary()? => weight_errors::<f32>(u),
        1 => weight_errors::<f64>(u),
        2 if u.arbitrary()? => ranges::<f32>(u),
        2 => ranges::<f64>(u),
        3 if u.arbitrary()? => maps_of_any_bits::<f32>(u),
        3 => maps_of_any_bits::<f64>(u),
        _ => channels(u),
    }
}

// Arrays

/// Where each element of an array is, in elements from its first.
struct Strided {
    shape: Vec<usize>,
    strides: Vec<isize>,
}

impl Strided {
    /// Any axes up to so many elements; `least` is how few an axis may have.
    fn any(u: &mut Unstructured, rank: usize, least: usize) -> Result<Strided> {
        let mut room = if u.ratio(1, 32)? { ELEMENTS } else { FEW };
        let mut shape = Vec::new();
        for _ in 0..rank {
            let len = if u.ratio(1, 4)? { u.int_in_range(0..=room)? } else { u.int_in_range(0..=9)? };
            shape.push(len.clamp(least, room.max(1)));
            room /= shape[shape.len() - 1].max(1);
        }
        Strided::of_shape(u, shape)
    }

    /// Any strides: of a transposed array, with gaps, backward, or such that elements are in several places.
    fn of_shape(u: &mut Unstructured, shape: Vec<usize>) -> Result<Strided> {
        let mut order: Vec<usize> = (0..shape.len()).collect();
        for k in (1..order.len()).rev() {
            order.swap(k, u.int_in_range(0..=k)?);
        }
        let mut strides = vec![0; shape.len()];
        let mut step = 1;
        for axis in order {
            step *= if u.ratio(1, 8)? { u.int_in_range(1..=3)? } else { 1 };
            strides[axis] = match u.int_in_range(0..=15)? {
                0 => 0,
                1 => u.int_in_range(-3..=3)?,
                2 | 3 => -step,
                _ => step,
            };
            step *= shape[axis].max(1) as isize;
        }
        Ok(Strided { shape, strides })
    }

    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The offsets of all elements, in C order.
    fn offsets(&self) -> Vec<isize> {
        let mut offsets = vec![0];
        for (&len, &stride) in self.shape.iter().zip(&self.strides) {
            let steps = |offset: isize| (0..len as isize).map(move |k| offset + k * stride);
            offsets = offsets.into_iter().flat_map(steps).collect();
        }
        offsets
    }
}

/// An array in memory of its own.
struct Array<T> {
    strided: Strided,
    offsets: Vec<isize>,
    memory: Vec<T>,
    first: usize,
}

impl<T: Copy> Array<T> {
    fn any(u: &mut Unstructured, strided: Strided, value: impl Fn(&mut Unstructured) -> Result<T>) -> Result<Array<T>> {
        let offsets = strided.offsets();
        let (lowest, highest) =
            (offsets.iter().min().copied().unwrap_or(0), offsets.iter().max().map_or(0, |last| last + 1));
        let memory = values(u, (highest - lowest) as usize, value)?;
        Ok(Array { strided, offsets, memory, first: -lowest as usize })
    }

    fn elements(&self) -> Elements<'_, T> {
        let base = self.memory[self.first.min(self.memory.len())..].as_ptr();
        // SAFETY: the memory has all that the strides reach, and lives as long as what is returned.
        unsafe { Elements::from_raw(base, &self.strided.shape, &self.strided.strides) }
    }

    fn tensor(&self) -> Tensor<'_, T> {
        Tensor { elements: self.elements(), shape: &self.strided.shape, strides: &self.strided.strides }
    }

    fn sample(&self, channel_axis: usize) -> Sample<'_, T> {
        let Strided { shape, strides } = &self.strided;
        Sample { elements: self.elements(), shape, strides, channel_axis }
    }

    /// The values in C order.
    fn values(&self) -> impl Iterator<Item = T> + '_ {
        self.offsets.iter().map(|offset| self.memory[(self.first as isize + offset) as usize])
    }
}

/// So many values: some, again and again.
fn values<T: Copy>(u: &mut Unstructured, len: usize, value: impl Fn(&mut Unstructured) -> Result<T>) -> Result<Vec<T>> {
    let some: Vec<T> = (0..u.int_in_range(1..=17)?).map(|_| value(u)).collect::<Result<_>>()?;
    Ok(some.into_iter().cycle().take(len).collect())
}

fn any_real<T: Real>(u: &mut Unstructured) -> Result<T> {
    Ok(match u.int_in_range(0..=7)? {
        0 => T::narrow(u.arbitrary()?), // nan, infinities, subnormal numbers
        1 => T::narrow(0.0),
        _ => T::narrow(f64::from(u.arbitrary::<i16>()?) / 64.0),
    })
}

fn is_close(found: f64, expected: f64, magnitude: f64) -> bool {
    let is_beyond = !magnitude.is_finite() || magnitude > 1e300; // order decides what is lost there
    is_beyond || (found - expected).abs() <= 1e-12 * magnitude || (found.is_nan() && expected.is_nan())
}

// Sums

/// A type of elements, as a test needs it.
trait Summed: Element {
    fn any(u: &mut Unstructured) -> Result<Self>;
    /// The exact sum, of integers.
    fn exact(_values: &[Self]) -> Option<SumOf<Self>> {
        None
    }
    fn real(self) -> f64;
    fn value_of(sum: SumOf<Self>) -> f64;
}

macro_rules! summed_integers {
    ($($type:ty, $any:expr, $wide:expr);* $(;)?) => {$(
        impl Summed for $type {
            fn any(u: &mut Unstructured) -> Result<Self> {
                u.arbitrary().map($any)
            }
            fn exact(values: &[Self]) -> Option<i128> {
                Some(values.iter().map(|&x| $wide(x)).sum())
            }
            fn real(self) -> f64 {
                $wide(self) as f64
            }
            fn value_of(sum: i128) -> f64 {
                sum as f64
            }
        }
    )*};
}
summed_integers! {
    i8, |x| x, i128::from; u8, |x| x, i128::from; i16, |x| x, i128::from; u16, |x| x, i128::from;
    i32, |x| x, i128::from; u32, |x| x, i128::from; i64, |x| x, i128::from; u64, |x| x, i128::from;
    Int4, Int4, |x: Int4| i128::from((x.0 << 4) as i8 >> 4);
    UInt4, UInt4, |x: UInt4| i128::from(x.0 & 15);
}

macro_rules! summed_reals {
    ($($type:ty, $any:expr);* $(;)?) => {$(
        impl Summed for $type {
            fn any(u: &mut Unstructured) -> Result<Self> {
                $any(u)
            }
            fn real(self) -> f64 {
                f64::from(self)
            }
            fn value_of(sum: Compensated) -> f64 {
                sum.value()
            }
        }
    )*};
}
summed_reals! {
    f16, |u: &mut Unstructured| u.arbitrary().map(f16::from_bits);
    bf16, |u: &mut Unstructured| u.arbitrary().map(bf16::from_bits);
    f32, any_real;
    f64, any_real;
}

fn sums_of_any_type(u: &mut Unstructured) -> Result<()> {
    match u.int_in_range(0..=13)? {
        0 => sums::<i8>(u),
        1 => sums::<u8>(u),
        2 => sums::<i16>(u),
        3 => sums::<u16>(u),
        4 => sums::<i32>(u),
        5 => sums::<u32>(u),
        6 => sums::<i64>(u),
        7 => sums::<u64>(u),
        8 => sums::<Int4>(u),
        9 => sums::<UInt4>(u),
        10 => sums::<f16>(u),
        11 => sums::<bf16>(u),
        12 => sums::<f32>(u),
        _ => sums::<f64>(u),
    }
}

fn sums<T: Summed>(u: &mut Unstructured) -> Result<()> {
    if u.arbitrary()? { channel_sums_of::<T>(u) } else { tap_sums_of::<T>(u) }
}

fn channel_sums_of<T: Summed>(u: &mut Unstructured) -> Result<()> {
    let rank = u.int_in_range(1..=5)?;
    let first = Strided::any(u, rank, 1)?;
    let channel_axis = u.int_in_range(0..=rank - 1)?;
    let channels = first.shape[channel_axis];
    let mut arrays = vec![Array::any(u, first, T::any)?];
    for _ in 0..u.int_in_range(0..=3)? {
        let mut shape = arrays[0].strided.shape.clone();
        if u.arbitrary()? {
            shape = (0..rank).map(|_| u.int_in_range(1..=7)).collect::<Result<_>>()?;
            shape[channel_axis] = channels;
        }
        let strided = if shape == arrays[0].strided.shape && u.arbitrary()? {
            Strided { shape, strides: arrays[0].strided.strides.clone() }
        } else if shape.iter().product::<usize>() <= ELEMENTS {
            Strided::of_shape(u, shape)?
        } else {
            break;
        };
        arrays.push(Array::any(u, strided, T::any)?);
    }
    let samples: Vec<_> = arrays.iter().map(|array| array.sample(channel_axis)).collect();
    let mut totals = vec![SumOf::<T>::default(); channels];
    channel_sums(&samples, &mut totals).expect("there is memory");
    let mut expected: Vec<Vec<T>> = vec![Vec::new(); channels];
    for array in &arrays {
        let inner: usize = array.strided.shape[channel_axis + 1..].iter().product();
        for (k, x) in array.values().enumerate() {
            expected[k / inner % channels].push(x);
        }
    }
    check_sums::<T>(&totals, &expected);
    Ok(())
}

fn check_sums<T: Summed>(found: &[SumOf<T>], expected: &[Vec<T>]) {
    assert_eq!(found.len(), expected.len());
    for (&found, values) in found.iter().zip(expected) {
        if let Some(exact) = T::exact(values) {
            assert_eq!(format!("{found:?}"), format!("{exact:?}"));
            continue;
        }
        let [sum, magnitude] = values.iter().fold([0.0, 0.0], |[s, m], x| [s + x.real(), m + x.real().abs()]);
        assert!(is_close(T::value_of(found), sum, magnitude * values.len() as f64), "{found:?}, expected {sum}");
    }
}

fn tap_sums_of<T: Summed>(u: &mut Unstructured) -> Result<()> {
    let rank = u.int_in_range(3..=5)?;
    let strided = Strided::any(u, rank, 1)?;
    let array = Array::any(u, strided, T::any)?;
    let shape = &array.strided.shape;
    let channel_axis = u.int_in_range(1..=rank - 1)?;
    let spatial: Vec<usize> = (1..rank).filter(|&axis| axis != channel_axis).collect();
    let windows: Vec<AxisWindow> = (0..spatial.len()).map(|_| any_window(u)).collect::<Result<_>>()?;
    let taps: usize = windows.iter().map(|window| window.taps).product();
    let found = tap_sums(&array.sample(channel_axis), &windows).expect("there is memory");
    // Of each spatial axis, the taps that see each position.
    let seen_by = |(&axis, window): (&usize, &AxisWindow)| -> Vec<Vec<usize>> {
        let mut taps = vec![Vec::new(); shape[axis]];
        for (tap, output) in (0..window.taps).flat_map(|tap| (0..window.outputs).map(move |output| (tap, output))) {
            let position = (output * window.stride + tap * window.dilation) as isize - window.pad;
            if let Some(taps) = usize::try_from(position).ok().and_then(|position| taps.get_mut(position)) {
                taps.push(tap);
            }
        }
        taps
    };
    let seen: Vec<_> = spatial.iter().zip(&windows).map(seen_by).collect();
    let mut expected: Vec<Vec<T>> = vec![Vec::new(); taps * shape[channel_axis]];
    for (x, index) in array.values().zip(indices(shape)) {
        let mut taps = vec![0];
        for ((&axis, window), seen) in spatial.iter().zip(&windows).zip(&seen) {
            let more = |at: usize| seen[index[axis]].iter().map(move |tap| at * window.taps + tap);
            taps = taps.into_iter().flat_map(more).collect();
        }
        taps.into_iter().for_each(|tap| expected[tap * shape[channel_axis] + index[channel_axis]].push(x));
    }
    check_sums::<T>(&found, &expected);
    Ok(())
}

/// The indices of all elements, in C order.
fn indices(shape: &[usize]) -> impl Iterator<Item = Vec<usize>> + '_ {
    (0..shape.iter().product()).map(move |k: usize| {
        let mut rest = k;
        let mut index = vec![0; shape.len()];
        for (index, len) in index.iter_mut().zip(shape).rev() {
            *index = rest % len;
            rest /= len;
        }
        index
    })
}

fn any_window(u: &mut Unstructured) -> Result<AxisWindow> {
    Ok(AxisWindow {
        taps: u.int_in_range(1..=5)?,
        stride: u.int_in_range(1..=4)?,
        dilation: u.int_in_range(1..=4)?,
        pad: u.int_in_range(-6..=6)?,
        outputs: u.int_in_range(0..=12)?,
    })
}

// Grids

/// Grids, and the scale and zero point of each channel.
struct Given {
    grids: Grids,
    each: Vec<(f64, f64)>,
    bits: u32,
}

impl Given {
    /// For so many channels; None for another number of them, which is an error.
    fn any(u: &mut Unstructured, bits: u32, channels: usize, inner: usize) -> Result<Option<Given>> {
        let [scales, zero_points] = [any_count(u, channels)?, any_count(u, channels)?];
        let scale = values(u, scales, any_scale)?;
        let zero_point = values(u, zero_points, |u| Ok(f64::from(u.int_in_range(-200i16..=200)?)))?;
        let found = Grids::new(&scale, &zero_point, bits, channels, inner);
        let is_wrong = [scales, zero_points].into_iter().any(|count| count != 1 && count != channels);
        assert_eq!(found.is_err(), is_wrong, "{found:?}");
        let at = |values: &[f64], channel: usize| values[if values.len() == 1 { 0 } else { channel }];
        let each = |grids| {
            let each = (0..channels).map(|channel| (at(&scale, channel), at(&zero_point, channel))).collect();
            Given { grids, each, bits }
        };
        Ok(found.ok().map(each))
    }

    fn quantized(&self, x: f64, channel: usize) -> f64 {
        let (scale, zero_point) = self.each[channel];
        let half = 2f64.powi(self.bits as i32 - 1);
        (round_half_even(x * scale) + zero_point).clamp(-half, half - 1.0)
    }

    fn dequantized(&self, q: f64, channel: usize) -> f64 {
        let (scale, zero_point) = self.each[channel];
        (q - zero_point) / scale
    }
}

fn any_count(u: &mut Unstructured, channels: usize) -> Result<usize> {
    Ok(if u.ratio(1, 16)? { u.int_in_range(0..=9)? } else { *u.choose(&[1, channels])? })
}

fn any_scale(u: &mut Unstructured) -> Result<f64> {
    Ok(match u.int_in_range(0..=9)? {
        0 => f64::from_bits(u.arbitrary()?),
        1 => 1.0,
        _ => f64::from(u.int_in_range(1u16..=9999)?) / 64.0,
    })
}

fn maps_of_any_bits<T: Real>(u: &mut Unstructured) -> Result<()> {
    match u.int_in_range(1..=32)? {
        bits @ ..=8 => maps::<T, i8>(u, bits),
        bits @ ..=16 => maps::<T, i16>(u, bits),
        bits => maps::<T, i32>(u, bits),
    }
}

fn maps<T: Real, Q: Quantized>(u: &mut Unstructured, bits: u32) -> Result<()> {
    let shape = Strided::any(u, 3, 0)?.shape;
    let len = shape.iter().product();
    let Some(given) = Given::any(u, bits, shape[1], shape[2])? else { return Ok(()) };
    let xs = values(u, len, any_real::<T>)?;
    let (mut qs, mut reals, mut fake) = (vec![Q::default(); len], vec![T::default(); len], vec![T::default(); len]);
    let quantized = quantize(&xs, &given.grids, &mut qs);
    assert_eq!(quantized, if xs.iter().any(|x| x.widen().is_nan()) { Err(Error::Nan) } else { Ok(()) });
    dequantize(&qs, &given.grids, &mut reals).expect("there is memory");
    fake_quantize(&xs, &given.grids, &mut fake).expect("there is memory");
    for k in 0..len {
        let channel = k / shape[2] % shape[1];
        let q = given.quantized(xs[k].widen(), channel);
        if quantized.is_ok() {
            assert_eq!(qs[k].widen(), if q.is_nan() { 0.0 } else { q });
        }
        for (found, q) in [(reals[k], qs[k].widen()), (fake[k], q)] {
            let expected = T::narrow(given.dequantized(q, channel));
            assert!(is_same(found, expected), "{}, expected {}", found.widen(), expected.widen());
        }
    }
    Ok(())
}

fn is_same<T: Real>(a: T, b: T) -> bool {
    a.widen().to_bits() == b.widen().to_bits() || (a.widen().is_nan() && b.widen().is_nan())
}

fn ranges<T: Real>(u: &mut Unstructured) -> Result<()> {
    let channels: usize = u.int_in_range(0..=5)?;
    let len = if u.ratio(1, 8)? { u.int_in_range(0..=20_000)? } else { u.int_in_range(0..=40)? };
    let weights = values(u, channels * len, any_real::<T>)?;
    let quantizer = Quantizer { bits: u.int_in_range(1..=32)?, asymmetric: u.arbitrary()?, search: u.arbitrary()? };
    let mut found = vec![[0.0; 2]; channels];
    let is_finite = weights.iter().all(|x| x.widen().is_finite());
    assert_eq!(
        quantization_range(&weights, quantizer, &mut found),
        if is_finite { Ok(()) } else { Err(Error::NotFinite) }
    );
    for (channel, [low, high]) in found.into_iter().enumerate().filter(|_| is_finite) {
        let row = || weights[channel * len..(channel + 1) * len].iter().map(|x| x.widen());
        let [least, greatest] = [row().fold(0.0, f64::min), row().fold(0.0, f64::max)];
        let reach = if quantizer.asymmetric || !quantizer.search {
            [least, greatest]
        } else {
            let reach = greatest.max(-least);
            [-reach, reach]
        };
        assert!(reach[0] <= low && low <= 0.0 && 0.0 <= high && high <= reach[1], "{low} to {high} of {reach:?}");
    }
    Ok(())
}

// Weights

const LAYOUTS: [&str; 10] = ["HWIO", "OIHW", "IOHW", "HWCM", "OI", "IO", "DHWIO", "GOI", "O", "WIGO"];

fn any_layout(u: &mut Unstructured) -> Result<String> {
    if u.ratio(1, 16)? {
        return (0..u.int_in_range(0..=6)?).map(|_| u.choose(&['O', 'M', 'I', 'G', 'C', 'D', 'H', 'W', 'é'])).collect();
    }
    Ok((*u.choose(&LAYOUTS)?).to_owned())
}

fn channels(u: &mut Unstructured) -> Result<()> {
    let shape: Vec<usize> = Arbitrary::arbitrary(u)?;
    let _ = Channels::new(&shape, u.arbitrary()?, &any_layout(u)?);
    Ok(())
}

fn weight_errors<T: Real>(u: &mut Unstructured) -> Result<()> {
    let layout = any_layout(u)?;
    let rank = layout.chars().count();
    let mut strided = Strided::any(u, rank, 0)?;
    let mut groups = 1;
    if u.ratio(1, 4)? {
        groups = u.int_in_range(0..=4)?;
        if let Some(axis) =
            layout.chars().position(|letter| letter == 'O').filter(|_| strided.len() * groups <= ELEMENTS)
        {
            strided.shape[axis] *= groups;
            strided = Strided::of_shape(u, strided.shape)?;
        }
    }
    let weights = Array::any(u, strided, any_real::<T>)?;
    let shape = &weights.strided.shape;
    let Ok(found) = Channels::new(shape, groups, &layout) else {
        let mean = Mean { values: &[0.0], shape: vec![1] };
        let given = FakeQuantized::Given(weights.tensor());
        assert!(weight_error(&weights.tensor(), &given, &mean, groups, &layout).is_err());
        return Ok(());
    };
    let taps = found.loops.iter().filter(|each| each.role == Role::Space).map(|each| each.len);
    let mean_shape: Vec<usize> = if u.arbitrary()? { taps.chain([found.inputs]).collect() } else { vec![found.inputs] };
    let mean = values(u, mean_shape.iter().product(), any_real::<f64>)?;
    let mean = Mean { values: &mean, shape: mean_shape };
    let bits = u.int_in_range(2..=8)?;
    let strides = vec![0; rank];
    let (given, axes) = if u.arbitrary()? {
        (Given::any(u, bits, found.outputs, 1)?, GridAxes::OutputChannels)
    } else {
        (Given::any(u, bits, 1, 1)?, GridAxes::Strides(&strides))
    };
    let Some(Given { grids, .. }) = given else { return Ok(()) };
    let computed = FakeQuantized::Computed(&grids, axes);
    let shift = weight_error(&weights.tensor(), &computed, &mean, groups, &layout);
    let is_one_each = matches!(axes, GridAxes::OutputChannels);
    if is_one_each && grids.len() != found.outputs {
        assert!(shift.is_err());
        return Ok(());
    }
    let shift = shift.expect("all is as it has to be");
    let quantized = moved(&weights, &found, &grids, is_one_each);
    let given = FakeQuantized::Given(quantized.tensor());
    let same = weight_error(&weights.tensor(), &given, &mean, groups, &layout).expect("as above");
    let bits_of =
        |shift: &[f64]| -> Vec<u64> { shift.iter().map(|x| if x.is_nan() { 0 } else { x.to_bits() }).collect() };
    assert_eq!(bits_of(&shift), bits_of(&same), "{shift:?} of grids, {same:?} of their values");
    check_shift(&weights, &quantized, &found, &mean, &shift);
    Ok(())
}

/// For each element of weights: its tap, input channel and output channel.
fn positions<'a>(shape: &'a [usize], channels: &'a Channels) -> impl Iterator<Item = [usize; 3]> + 'a {
    indices(shape).map(|index| {
        let mut at = [0; 3];
        for each in &channels.loops {
            let step = index[each.axis] / each.step % each.len;
            if each.role == Role::Space {
                at[0] = at[0] * each.len + step;
            }
            at[1] += step * each.input as usize;
            at[2] += step * each.output as usize;
        }
        at
    })
}

/// Weights on their grids, as an array in C order.
fn moved<T: Real>(weights: &Array<T>, channels: &Channels, grids: &Grids, is_one_each: bool) -> Array<T> {
    let shape = weights.strided.shape.clone();
    let strides = (1..=shape.len()).map(|k| shape[k..].iter().product::<usize>() as isize).collect();
    let mut memory = vec![T::default(); shape.iter().product()];
    for (k, (x, [_, _, output])) in weights.values().zip(positions(&shape, channels)).enumerate() {
        let grid = if is_one_each { output } else { 0 };
        grids.fake_quantize_along(&[x], grid as isize, 0, &mut memory[k..=k]);
    }
    let offsets = (0..memory.len() as isize).collect();
    Array { strided: Strided { shape, strides }, offsets, memory, first: 0 }
}

fn check_shift<T: Real>(weights: &Array<T>, quantized: &Array<T>, channels: &Channels, mean: &Mean, shift: &[f64]) {
    let mut expected = vec![[0.0, 0.0]; channels.outputs];
    let per_tap = mean.shape.len() > 1;
    for ((w, q), [tap, input, output]) in
        weights.values().zip(quantized.values()).zip(positions(&weights.strided.shape, channels))
    {
        let product = (w - q).widen() * mean.values[if per_tap { tap * channels.inputs + input } else { input }];
        expected[output] = [expected[output][0] + product, expected[output][1] + product.abs()];
    }
    assert_eq!(shift.len(), expected.len());
    for (&found, [sum, magnitude]) in shift.iter().zip(expected) {
        assert!(is_close(found, sum, magnitude * weights.memory.len() as f64), "{found}, expected {sum}");
    }
}

#[cfg(test)]
mod tests {
    /// Inputs that are no more than numbers in a row (xorshift), the same each time.
    #[test]
    fn kernels_survive_anything() {
        let mut state = 0x9E37_79B9_7F4A_7C15u64;
        for _ in 0..1000 {
            let mut input = Vec::new();
            for _ in 0..32 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                input.extend(state.to_le_bytes());
            }
            super::run(&input);
        }
    }
}
