//! The boundary: Python objects in, checked views to the kernels, arrays out.

mod detach;
mod views;

use numpy::{Element as NumpyElement, PyArray1, PyArrayDyn, PyArrayMethods, PyUntypedArray};
use pyo3::exceptions::{PyImportError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyFloat, PyInt, PyList, PySequence};

use crate::accumulate::{Compensated, Element};
use crate::channel_mean::AxisWindow;
use crate::error::Error;
use crate::fake_quantize::{self, Grids, Quantized, Real};
use crate::quantization_range::{self as ranges, Quantizer, Range};
use crate::weight_error::{FakeQuantized, GridAxes, Mean, weight_error as shift_of};
use crate::weights::{Channels, Tensor};
use crate::{memory, parallel, simd};
use detach::{check_signals, detached};
use views::{AnyView, Reals, Sums, View, array_of, as_float64, channel_axis_of, is_f32, native, wrong_dtype, zeros};

/// Integer sums (or None), f64 sums and their errors as (2, C) (or None).
type PySums<'py> = (Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>);

fn into_python<'py>(py: Python<'py>, sums: Sums) -> PyResult<PySums<'py>> {
    let integers = (!sums.integers.is_empty()).then(|| integers_into_python(py, &sums.integers)).transpose()?;
    let reals = (!sums.reals.is_empty()).then(|| reals_into_python(py, &sums.reals)).transpose()?;
    Ok((integers, reals))
}

/// int64, or Python integers where the sums outgrow it.
fn integers_into_python<'py>(py: Python<'py>, totals: &[i128]) -> PyResult<Bound<'py, PyAny>> {
    let narrow: Result<Vec<i64>, _> = totals.iter().map(|&total| i64::try_from(total)).collect();
    match narrow {
        Ok(narrow) => Ok(array_of(py, narrow.into_iter())),
        Err(_) => py.import("numpy")?.call_method1("array", (PyList::new(py, totals)?, "object")),
    }
}

fn reals_into_python<'py>(py: Python<'py>, totals: &[Compensated]) -> PyResult<Bound<'py, PyAny>> {
    let sums_then_errors = totals.iter().map(|t| t.sum).chain(totals.iter().map(|t| t.error));
    Ok(PyArray1::from_iter(py, sums_then_errors.collect::<Vec<_>>()).reshape([2, totals.len()])?.into_any())
}

/// What samples come to: their sums, the positions summed over, whether any was float64.
struct Summed {
    sums: Sums,
    positions: usize,
    wide: bool,
}

/// Samples that are borrowed at a time: rust-numpy compares each view of an array with all others of it that are borrowed.
const BORROWED: usize = 256;

/// `first` is the number that errors give the first sample, `channels` what they must agree with, if anything.
fn summed(
    samples: &Bound<'_, PySequence>, channel_axis: isize, first: usize, channels: Option<usize>,
) -> PyResult<Summed> {
    let mut sums = channels.map(Sums::new);
    let (mut positions, mut wide) = (0, false);
    let samples = samples.to_tuple()?; // what is made an array may change the sequence
    let len = samples.len();
    for start in (0..len).step_by(BORROWED) {
        check_signals(samples.py())?;
        let numbers = start..len.min(start + BORROWED);
        let array = |k: usize| native(&samples.get_item(k)?, &|| format!("samples[{}]", first + k));
        let arrays = numbers.clone().map(array).collect::<PyResult<Vec<_>>>()?;
        let mut views = Vec::with_capacity(arrays.len());
        for (k, array) in numbers.zip(&arrays) {
            let view = AnyView::new(array, first + k)?;
            let expected = sums.as_ref().map(|sums| sums.channels);
            let found = checked_channels(view.shape(), channel_axis, first + k, expected)?;
            sums.get_or_insert_with(|| Sums::new(found));
            positions += view.shape().iter().product::<usize>() / found;
            wide |= matches!(view, AnyView::F64(_));
            views.push(view);
        }
        if let Some(sums) = &mut sums {
            AnyView::add_channel_sums(samples.py(), &views, channel_axis, sums)?;
        }
    }
    Ok(Summed { sums: sums.filter(|_| len > 0).ok_or(Error::NoSamples)?, positions, wide })
}

/// Sums per channel of all samples, the positions summed over, and whether any sample was float64.
#[pyfunction]
#[pyo3(signature = (samples, channel_axis, first, channels))]
fn channel_sums<'py>(
    py: Python<'py>, samples: &Bound<'py, PySequence>, channel_axis: isize, first: usize, channels: Option<usize>,
) -> PyResult<(PySums<'py>, usize, bool)> {
    let Summed { sums, positions, wide } = summed(samples, channel_axis, first, channels)?;
    Ok((into_python(py, sums)?, positions, wide))
}

/// One value for all channels, or a sequence of one each.
enum PerChannel {
    All(f64),
    Each(Vec<f64>),
}

impl<'a, 'py> FromPyObject<'a, 'py> for PerChannel {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let number = object.is_instance_of::<PyFloat>() || object.is_instance_of::<PyInt>();
        Ok(if number { PerChannel::All(object.extract()?) } else { PerChannel::Each(object.extract()?) })
    }
}

impl PerChannel {
    fn checked(&self, name: &'static str, channels: usize) -> Result<(), Error> {
        match self {
            PerChannel::Each(values) if values.len() != 1 && values.len() != channels => {
                Err(Error::PerChannel { name, found: values.len(), expected: channels })
            }
            _ => Ok(()),
        }
    }

    fn at(&self, channel: usize) -> f64 {
        match self {
            PerChannel::All(value) => *value,
            PerChannel::Each(values) => values[if values.len() == 1 { 0 } else { channel }],
        }
    }
}

/// The mean per channel of all samples, (sum / count - zero_point) / scale, as float64 if any sample is, else float32.
#[pyfunction]
#[pyo3(signature = (samples, channel_axis, scale, zero_point))]
fn channel_mean<'py>(
    py: Python<'py>, samples: &Bound<'py, PySequence>, channel_axis: isize, scale: PerChannel, zero_point: PerChannel,
) -> PyResult<Bound<'py, PyAny>> {
    let Summed { sums, positions, wide } = summed(samples, channel_axis, 0, None)?;
    scale.checked("scale", sums.channels)?;
    zero_point.checked("zero_point", sums.channels)?;
    let means = (0..sums.channels).map(|c| (sums.mean(c, positions) - zero_point.at(c)) / scale.at(c));
    if wide { Ok(array_of(py, means)) } else { Ok(array_of(py, means.map(|mean| mean as f32))) }
}

fn checked_channels(shape: &[usize], axis: isize, index: usize, expected: Option<usize>) -> Result<usize, Error> {
    if shape.is_empty() {
        return Err(Error::ZeroDimensional { index });
    }
    let rank = shape.len() as isize;
    if !(-rank..rank).contains(&axis) {
        return Err(Error::ChannelAxis { index, rank: shape.len(), axis });
    }
    if shape.contains(&0) {
        return Err(Error::EmptySample { index, shape: shape.to_vec() });
    }
    let found = shape[channel_axis_of(shape, axis)];
    match expected {
        Some(expected) if expected != found => Err(Error::Channels { index, found, expected }),
        _ => Ok(found),
    }
}

/// Sums per tap and channel of one sample, (*K * C) in C order, and whether it is float64.
///
/// `windows` has (taps, stride, dilation, pad, outputs) for each spatial axis.
#[pyfunction]
#[pyo3(signature = (sample, channel_axis, windows))]
fn tap_sums<'py>(
    py: Python<'py>, sample: &Bound<'py, PyAny>, channel_axis: isize, windows: Vec<(usize, usize, usize, isize, usize)>,
) -> PyResult<(PySums<'py>, bool)> {
    let view = AnyView::new(&native(sample, &|| "sample".to_owned())?, 0)?;
    let channels = checked_channels(view.shape(), channel_axis, 0, None)?;
    if channel_axis_of(view.shape(), channel_axis) == 0 {
        return Err(Error::ChannelAxis { index: 0, rank: view.shape().len(), axis: channel_axis }.into());
    }
    if windows.is_empty() || windows.len() + 2 != view.shape().len() {
        let (axes, shape) = (windows.len(), view.shape());
        return Err(PyValueError::new_err(format!("windows: {axes} for a sample of shape {shape:?}")));
    }
    let window = |(taps, stride, dilation, pad, outputs)| AxisWindow { taps, stride, dilation, pad, outputs };
    let windows: Vec<AxisWindow> = windows.into_iter().map(window).collect();
    if windows.iter().any(|w| w.taps == 0 || w.stride == 0 || w.dilation == 0) {
        return Err(PyValueError::new_err("windows: taps, strides and dilations are at least 1"));
    }
    let mut sums = Sums::new(memory::product(windows.iter().map(|window| window.taps)).saturating_mul(channels));
    view.add_tap_sums(py, channel_axis, &windows, &mut sums)?;
    Ok((into_python(py, sums)?, matches!(view, AnyView::F64(_))))
}

/// The shift of each output channel, as float64 if `wide`, else float32.
#[pyfunction]
#[pyo3(signature = (weights, fake_quantized_weights, mean, groups, layout, wide))]
fn weight_error<'py>(
    py: Python<'py>, weights: &Bound<'py, PyAny>, fake_quantized_weights: &Bound<'py, PyAny>, mean: &Bound<'py, PyAny>,
    groups: usize, layout: &str, wide: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let w = native(weights, &|| "weights".to_owned())?;
    let q = native(fake_quantized_weights, &|| "fake_quantized_weights".to_owned())?;
    let shift = if is_f32(&w) && is_f32(&q) {
        shift_of_pair::<f32>(&w, &q, mean, groups, layout)?
    } else {
        shift_of_pair::<f64>(&as_float64(&w)?, &as_float64(&q)?, mean, groups, layout)?
    };
    Ok(as_array(py, shift, wide))
}

fn shift_of_pair<'py, T: Real + Element>(
    w: &Bound<'py, PyUntypedArray>, q: &Bound<'py, PyUntypedArray>, mean: &Bound<'py, PyAny>, groups: usize,
    layout: &str,
) -> PyResult<Vec<f64>> {
    let w_view = View::<T>::new(w, &|| "weights".to_owned())?;
    let q_view = View::<T>::new(q, &|| "fake_quantized_weights".to_owned())?;
    let given = FakeQuantized::Given(q_view.tensor());
    shift_from(&w_view.tensor(), &given, mean, groups, layout)
}

fn shift_from<T: Real>(
    weights: &Tensor<T>, fake_quantized: &FakeQuantized<T>, mean: &Bound<'_, PyAny>, groups: usize, layout: &str,
) -> PyResult<Vec<f64>> {
    let view = View::<f64>::of(mean, "mean")?;
    let mean = Mean { values: view.slice("mean")?, shape: view.shape().to_vec() };
    let bytes = memory::product([2, size_of::<T>(), weights.len()]);
    detached(view.py(), bytes, || shift_of(weights, fake_quantized, &mean, groups, layout))
}

fn as_array(py: Python<'_>, values: Vec<f64>, wide: bool) -> Bound<'_, PyAny> {
    if wide {
        return array_of(py, values.into_iter());
    }
    array_of(py, values.into_iter().map(|value| value as f32))
}

/// The grids that weights are quantized on: scales, zero points, bits, and how many grids an element of each axis is from the
/// next, with the axis whose steps are blocks and their length; None where there is one for each output channel.
type PyWeightGrids<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, u32, Option<Vec<isize>>, Option<(usize, usize)>);

/// The shift of each output channel of float32 or float64 weights that are moved to a grid.
#[pyfunction]
#[pyo3(signature = (weights, grids, mean, groups, layout))]
fn weight_error_from_grids<'py>(
    py: Python<'py>, weights: &Bound<'py, PyAny>, grids: PyWeightGrids<'py>, mean: &Bound<'py, PyAny>, groups: usize,
    layout: &str,
) -> PyResult<Bound<'py, PyAny>> {
    let (scale, zero_point, bits, strides, blocks) = &grids;
    let typed = Grids::of_python(scale, zero_point, *bits, None, 1)?;
    let axes = match (strides, blocks) {
        (None, _) => GridAxes::OutputChannels,
        (Some(strides), None) => GridAxes::Strides(strides),
        (Some(strides), Some((axis, size))) => GridAxes::Blocks(strides, *axis, *size),
    };
    Ok(match Reals::new(weights, "weights")? {
        Reals::F32(weights) => {
            let computed = FakeQuantized::Computed(&typed, axes);
            as_array(py, shift_from(&weights.tensor(), &computed, mean, groups, layout)?, false)
        }
        Reals::F64(weights) => {
            let computed = FakeQuantized::Computed(&typed, axes);
            as_array(py, shift_from(&weights.tensor(), &computed, mean, groups, layout)?, true)
        }
    })
}

/// Output and input channels of weights of a shape, over all groups.
#[pyfunction]
fn channel_counts(shape: Vec<usize>, layout: &str, groups: usize) -> PyResult<(usize, usize)> {
    let channels = Channels::new(&shape, groups, layout)?;
    Ok((channels.outputs, channels.inputs))
}

fn ranges_of<'py, T: Real + Element>(
    py: Python<'py>, weights: &View<'py, T>, quantizer: Quantizer,
) -> PyResult<Bound<'py, PyAny>> {
    /// Bytes for each channel: a row, its range three times, and whether that could be found.
    const OF_CHANNEL: usize = 128;
    let xs = weights.slice("weights")?;
    let channels = weights.shape().first().copied().unwrap_or(1);
    memory::check(channels, OF_CHANNEL)?;
    let mut found: Vec<Range> = vec![[0.0; 2]; channels];
    let work = ranges::work(size_of_val(xs), found.len(), quantizer);
    detached(py, work, || ranges::quantization_range(xs, quantizer, &mut found))?;
    Ok(PyArray1::from_vec(py, found.into_flattened()).reshape([channels, 2])?.into_any())
}

/// The least and the greatest value of a grid for each row of contiguous float32 or float64 weights, (C, 2).
#[pyfunction]
#[pyo3(signature = (weights, bits, asymmetric, search))]
fn quantization_range<'py>(
    py: Python<'py>, weights: &Bound<'py, PyAny>, bits: u32, asymmetric: bool, search: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let quantizer = Quantizer { bits, asymmetric, search };
    match Reals::new(weights, "weights")? {
        Reals::F32(weights) => ranges_of(py, &weights, quantizer),
        Reals::F64(weights) => ranges_of(py, &weights, quantizer),
    }
}

/// The grids that quantize along an axis of an array: scales, zero points, bits, channels, elements per channel step.
type PyGrids<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, u32, usize, usize);

impl Grids {
    /// `channels` None: as many as there are scales or zero points.
    fn of_python(
        scale: &Bound<'_, PyAny>, zero_point: &Bound<'_, PyAny>, bits: u32, channels: Option<usize>, inner: usize,
    ) -> PyResult<Grids> {
        let (scale, zero_point) = (View::<f64>::of(scale, "scale")?, View::<f64>::of(zero_point, "zero_point")?);
        let channels = channels.unwrap_or(scale.len().max(zero_point.len()));
        memory::check(channels, 2 * size_of::<f64>())?;
        Ok(Grids::new(scale.slice("scale")?, zero_point.slice("zero_point")?, bits, channels, inner)?)
    }
}

fn grids_of((scale, zero_point, bits, channels, inner): &PyGrids<'_>) -> PyResult<Grids> {
    Grids::of_python(scale, zero_point, *bits, Some(*channels), *inner)
}

/// What a kernel writes to an array of the same shape, element by element.
fn mapped<'py, X: Element, Y: NumpyElement + Send>(
    py: Python<'py>, array: &View<'py, X>, kernel: impl Send + FnOnce(&[X], &mut [Y]) -> Result<(), Error>,
) -> PyResult<Bound<'py, PyAny>> {
    let xs = array.slice("array")?;
    let out = zeros::<Y>(py, array.shape())?;
    {
        let mut borrow = out.try_readwrite()?;
        let ys = borrow.as_slice_mut()?;
        detached(py, size_of_val(xs), || kernel(xs, ys))?;
    }
    Ok(out.into_any())
}

fn quantize_real<'py, T: Real + Element>(
    py: Python<'py>, array: &View<'py, T>, grids: &Grids, bits: u32,
) -> PyResult<Bound<'py, PyAny>> {
    fn to<'py, T: Real + Element, Q: Quantized + NumpyElement>(
        py: Python<'py>, array: &View<'py, T>, grids: &Grids,
    ) -> PyResult<Bound<'py, PyAny>> {
        mapped(py, array, |xs, qs: &mut [Q]| fake_quantize::quantize(xs, grids, qs))
    }
    match bits {
        ..=8 => to::<T, i8>(py, array, grids),
        9..=16 => to::<T, i16>(py, array, grids),
        _ => to::<T, i32>(py, array, grids),
    }
}

/// Quantized values of a contiguous float32 or float64 array, in the smallest signed integers that hold them.
#[pyfunction]
#[pyo3(signature = (array, grids))]
fn quantize<'py>(py: Python<'py>, array: &Bound<'py, PyAny>, grids: PyGrids<'py>) -> PyResult<Bound<'py, PyAny>> {
    let typed = grids_of(&grids)?;
    match Reals::new(array, "array")? {
        Reals::F32(array) => quantize_real(py, &array, &typed, grids.2),
        Reals::F64(array) => quantize_real(py, &array, &typed, grids.2),
    }
}

fn dequantize_as<'py, Q: Quantized + Element, T: Real + NumpyElement>(
    py: Python<'py>, array: &View<'py, Q>, grids: &Grids,
) -> PyResult<Bound<'py, PyAny>> {
    mapped(py, array, |qs, xs: &mut [T]| fake_quantize::dequantize(qs, grids, xs))
}

/// Real values of a contiguous integer array: float32 for 8 and 16 bits, float64 for 32.
#[pyfunction]
#[pyo3(signature = (array, grids))]
fn dequantize<'py>(py: Python<'py>, array: &Bound<'py, PyAny>, grids: PyGrids<'py>) -> PyResult<Bound<'py, PyAny>> {
    let grids = grids_of(&grids)?;
    macro_rules! try_each {
        ($($integer:ty => $real:ty),*) => {$(
            if array.cast::<PyArrayDyn<$integer>>().is_ok() {
                return dequantize_as::<$integer, $real>(py, &View::of(array, "array")?, &grids);
            }
        )*};
    }
    try_each!(i8 => f32, u8 => f32, i16 => f32, u16 => f32, i32 => f64, u32 => f64);
    Err(wrong_dtype(array, "array", "integers of 8, 16 or 32 bits"))
}

/// A contiguous float32 or float64 array on its grid.
#[pyfunction]
#[pyo3(signature = (array, grids))]
fn fake_quantize_array<'py>(
    py: Python<'py>, array: &Bound<'py, PyAny>, grids: PyGrids<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let grids = grids_of(&grids)?;
    match Reals::new(array, "array")? {
        Reals::F32(array) => mapped(py, &array, |xs, ys: &mut [f32]| fake_quantize::fake_quantize(xs, &grids, ys)),
        Reals::F64(array) => mapped(py, &array, |xs, ys: &mut [f64]| fake_quantize::fake_quantize(xs, &grids, ys)),
    }
}

/// Sets the number of threads of this process.
#[pyfunction]
fn set_num_threads(num_threads: isize) -> PyResult<()> {
    Ok(parallel::set_num_threads(num_threads)?)
}

/// The number of threads that large work is spread over.
#[pyfunction]
fn get_num_threads() -> usize {
    parallel::num_threads()
}

/// From now on the calling thread does its work itself: it is one of several that share the CPUs among them.
#[pyfunction]
fn work_alone() {
    parallel::work_alone();
}

/// Version, CPU tier in use, build profile. Fails where the environment asks for a tier that there is not.
#[pyfunction]
fn build_info() -> PyResult<(&'static str, &'static str, &'static str)> {
    simd::check_limit()?;
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    Ok((env!("CARGO_PKG_VERSION"), simd::tier().name(), profile))
}

/// Raises ImportError in a subinterpreter: what is made once for a process belongs to the main one, here and in numpy.
fn check_interpreter(_: Python<'_>) -> PyResult<()> {
    #[expect(unsafe_code, reason = "calls functions of C")]
    // SAFETY: the GIL is held.
    let number = unsafe { ffi::PyInterpreterState_GetID(ffi::PyInterpreterState_Get()) };
    let refused = "biascorr cannot be imported in a subinterpreter, as numpy cannot; use threads or processes";
    if number == 0 { Ok(()) } else { Err(PyImportError::new_err(refused)) }
}

#[pymodule(gil_used = false)]
mod _kernels {
    use super::{Bound, PyModule, PyResult, check_interpreter, views};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        check_interpreter(module.py())?;
        views::meet_numpy(module.py())
    }

    #[pymodule_export]
    use super::{
        build_info, channel_counts, channel_mean, channel_sums, dequantize, fake_quantize_array, get_num_threads,
        quantization_range, quantize, set_num_threads, tap_sums, weight_error, weight_error_from_grids, work_alone,
    };
}
