//! numpy arrays as checked views.
//!
//! An array whose dtype a kernel knows, aligned and in native byte order, is borrowed as it is, whatever its strides. Anything
//! else goes once through `biascorr.reference.native`, which copies it into such an array or raises TypeError.

use std::mem::discriminant;

use half::{bf16, f16};
use numpy::{
    Element as NumpyElement, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::IntoPyDict;

use super::detach::detached;
use crate::accumulate::{Compensated, Int4, SumOf, UInt4};
use crate::channel_mean::{AxisWindow, Sample, channel_sums, tap_sums};
use crate::layout::Elements;
use crate::weights::Tensor;

/// A borrowed array: the borrow, and what numpy does not have in elements.
pub struct View<'py, T: NumpyElement, E = T> {
    array: PyReadonlyArrayDyn<'py, T>,
    strides: Vec<isize>,
    element: std::marker::PhantomData<E>,
}

impl<'py, T: NumpyElement, E: Copy> View<'py, T, E> {
    /// `E` is `T`, or has its bits (a bfloat16 seen as u16).
    pub fn new(array: &Bound<'py, PyArrayDyn<T>>) -> PyResult<Self> {
        const { assert!(size_of::<T>() == size_of::<E>() && align_of::<T>() == align_of::<E>()) };
        let strides = array.strides().iter().map(|bytes| bytes / size_of::<T>() as isize).collect();
        let array = array.try_readonly().map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(View { array, strides, element: std::marker::PhantomData })
    }

    fn elements(&self) -> Elements<'_, E> {
        #[expect(unsafe_code, reason = "numpy owns the memory")]
        // SAFETY: `untyped` has checked dtype, byte order and alignment; the read-only borrow in `self` keeps the memory
        // alive and, among users of rust-numpy, unchanged; all bit patterns of E are values.
        unsafe {
            Elements::from_raw(self.array.data().cast::<E>(), self.array.shape(), &self.strides)
        }
    }

    pub fn shape(&self) -> &[usize] {
        self.array.shape()
    }

    /// The array as a sample with channels along `channel_axis`, counted from the end where negative.
    pub fn sample(&self, channel_axis: isize) -> Sample<'_, E> {
        let channel_axis = channel_axis_of(self.shape(), channel_axis);
        Sample { elements: self.elements(), shape: self.shape(), strides: &self.strides, channel_axis }
    }

    pub fn tensor(&self) -> Tensor<'_, E> {
        Tensor { elements: self.elements(), shape: self.shape(), strides: &self.strides }
    }
}

pub fn channel_axis_of(shape: &[usize], axis: isize) -> usize {
    axis.rem_euclid(shape.len().max(1) as isize) as usize
}

/// Sums of samples of any dtypes: exact for the integers among them, double-double for the rest. Empty where there were none.
pub struct Sums {
    pub channels: usize,
    pub integers: Vec<i128>,
    pub reals: Vec<Compensated>,
}

impl Sums {
    pub fn new(channels: usize) -> Self {
        Sums { channels, integers: Vec::new(), reals: Vec::new() }
    }

    /// Both sums of a channel together, rounded to f64.
    pub fn value(&self, channel: usize) -> f64 {
        // From i64 it is one instruction, from i128 a call.
        let rounded = |&sum: &i128| i64::try_from(sum).map_or_else(|_| sum as f64, |sum| sum as f64);
        let integer = self.integers.get(channel).map_or(0.0, rounded);
        integer + self.reals.get(channel).map_or(0.0, |sum| sum.value())
    }
}

/// The one of both sums that a total adds to.
trait InSums: Sized {
    fn of(sums: &mut Sums) -> &mut Vec<Self>;
}

impl InSums for i128 {
    fn of(sums: &mut Sums) -> &mut Vec<i128> {
        sums.integers.resize(sums.channels, 0);
        &mut sums.integers
    }
}

impl InSums for Compensated {
    fn of(sums: &mut Sums) -> &mut Vec<Compensated> {
        sums.reals.resize(sums.channels, Compensated::default());
        &mut sums.reals
    }
}

macro_rules! any_view {
    ($($name:ident($stored:ty, $element:ty): $($char:literal)|+;)*) => {
        /// A view of any dtype that [`crate::channel_mean`] sums.
        pub enum AnyView<'py> {
            $($name(View<'py, $stored, $element>),)*
        }

        impl<'py> AnyView<'py> {
            /// `index` is the number that errors give the sample.
            pub fn new(object: &Bound<'py, PyAny>, index: usize) -> PyResult<Self> {
                if let Some(view) = of_four_bits(object)? {
                    return Ok(view);
                }
                let array = untyped(object, || format!("samples[{index}]"))?;
                match array.dtype().char() {
                    $($($char)|+ => Ok(AnyView::$name(View::new(array.cast()?)?)),)*
                    _ => Ok(AnyView::BF16(bits_of(&array, "uint16")?)),
                }
            }

            pub fn shape(&self) -> &[usize] {
                match self {
                    $(AnyView::$name(view) => view.shape(),)*
                }
            }

            fn bytes(&self) -> usize {
                match self {
                    $(AnyView::$name(view) => view.array.len() * size_of::<$stored>(),)*
                }
            }

            /// Adds the sums per channel of each sample, in order.
            pub fn add_channel_sums<'a>(
                py: Python<'py>, views: &'a [Self], axis: isize, sums: &mut Sums,
            ) -> PyResult<()> {
                for alike in views.chunk_by(|a, b| discriminant(a) == discriminant(b)) {
                    let bytes = alike.iter().map(Self::bytes).sum();
                    match &alike[0] {
                        $(AnyView::$name(_) => {
                            let typed = |view: &'a Self| match view {
                                AnyView::$name(view) => Some(view.sample(axis)),
                                _ => None,
                            };
                            let samples: Vec<_> = alike.iter().filter_map(typed).collect();
                            let totals = SumOf::<$element>::of(sums);
                            detached(py, bytes, || channel_sums(&samples, totals))?;
                        })*
                    }
                }
                Ok(())
            }

            /// Adds the sums per tap and channel of this sample.
            pub fn add_tap_sums(
                &self, py: Python<'py>, axis: isize, windows: &[AxisWindow], sums: &mut Sums,
            ) -> PyResult<()> {
                match self {
                    $(AnyView::$name(view) => {
                        let sample = view.sample(axis);
                        *SumOf::<$element>::of(sums) = detached(py, self.bytes(), || tap_sums(&sample, windows))?;
                    })*
                }
                Ok(())
            }
        }
    };
}
// The dtypes of ml_dtypes are known by other means than a character that numpy would use.
any_view! {
    I8(i8, i8): b'b';
    U8(u8, u8): b'B';
    I16(i16, i16): b'h';
    U16(u16, u16): b'H';
    I32(i32, i32): b'i';
    U32(u32, u32): b'I';
    I64(i64, i64): b'l' | b'q';
    U64(u64, u64): b'L' | b'Q';
    F16(f16, f16): b'e';
    BF16(u16, bf16): b'\0';
    I4(u8, Int4): b'\x01';
    U4(u8, UInt4): b'\x02';
    F32(f32, f32): b'f';
    F64(f64, f64): b'd';
}

/// The object as a view where it holds 4-bit integers in a dtype of ml_dtypes.
fn of_four_bits<'py>(object: &Bound<'py, PyAny>) -> PyResult<Option<AnyView<'py>>> {
    let Ok(array) = object.cast_exact::<PyUntypedArray>() else { return Ok(None) };
    if KNOWN.contains(&array.dtype().char()) {
        return Ok(None);
    }
    match array.dtype().getattr("name")?.extract::<&str>()? {
        "int4" => Ok(Some(AnyView::I4(bits_of(array, "uint8")?))),
        "uint4" => Ok(Some(AnyView::U4(bits_of(array, "uint8")?))),
        _ => Ok(None),
    }
}

/// The dtypes of ml_dtypes have no type here; their bits do.
fn bits_of<'py, T: NumpyElement, E: Copy>(array: &Bound<'py, PyUntypedArray>, bits: &str) -> PyResult<View<'py, T, E>> {
    View::new(array.call_method1("view", (bits,))?.cast()?)
}

fn as_float64<'py>(array: &Bound<'py, PyUntypedArray>) -> PyResult<Bound<'py, PyAny>> {
    array.call_method("astype", ("float64",), Some(&[("copy", false)].into_py_dict(array.py())?))
}

/// Both weight tensors in the one type they are subtracted in.
pub enum Weights<'py> {
    F32([View<'py, f32>; 2]),
    F64([View<'py, f64>; 2]),
}

impl<'py> Weights<'py> {
    pub fn new(weights: &Bound<'py, PyAny>, fake_quantized: &Bound<'py, PyAny>) -> PyResult<Self> {
        let pair = [
            untyped(weights, || "weights".to_owned())?,
            untyped(fake_quantized, || "fake_quantized_weights".to_owned())?,
        ];
        if let [Ok(w), Ok(q)] = pair.each_ref().map(|array| array.cast::<PyArrayDyn<f32>>()) {
            return Ok(Weights::F32([View::new(w)?, View::new(q)?]));
        }
        let [w, q] = pair.map(|array| as_float64(&array));
        Ok(Weights::F64([View::new(w?.cast()?)?, View::new(q?.cast()?)?]))
    }
}

/// What numpy calls the dtypes that have a type here.
const KNOWN: &[u8] = b"bBhHiIlqLQefd";

/// The object as an array that is aligned, in native byte order, and of a dtype in the table above.
fn untyped<'py>(object: &Bound<'py, PyAny>, name: impl Fn() -> String) -> PyResult<Bound<'py, PyUntypedArray>> {
    if let Ok(array) = object.cast_exact::<PyUntypedArray>() {
        let dtype = array.dtype();
        let known = KNOWN.contains(&dtype.char());
        if known && array.is_aligned() && dtype.is_native_byteorder() != Some(false) {
            return Ok(array.clone());
        }
    }
    let native = object.py().import("biascorr.reference")?.call_method1("native", (object, name()))?;
    Ok(native.cast_into::<PyUntypedArray>()?)
}
