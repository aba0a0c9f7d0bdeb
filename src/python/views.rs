//! numpy arrays as checked views.
//!
//! First all objects become arrays that a kernel can read, which may run code of their own; then all of these are borrowed, which
//! runs none. An array whose dtype a kernel knows, aligned and in native byte order, is borrowed as it is, whatever its strides.
//! Anything else goes once through `biascorr.reference.native`, which copies it into such an array or raises TypeError.

use std::mem::discriminant;

use half::{bf16, f16};
use numpy::ndarray::ArrayView1;
use numpy::{
    Element as NumpyElement, PyArray1, PyArrayDescr, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArray1,
    PyUntypedArray, PyUntypedArrayMethods, dtype,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyTuple, PyWeakrefReference};

use super::detach::{called, detached};
use crate::accumulate::{Compensated, Element, Int4, SumOf, Total, UInt4};
use crate::channel_mean::{AxisWindow, Sample, channel_sums, tap_sums};
use crate::layout::Elements;
use crate::memory;
use crate::weights::Tensor;

/// A borrowed array: where its elements are, and what keeps them there.
///
/// Whoever shares the array may give it another shape or dtype at any time; the borrow is of a view that nobody else knows, so that
/// it is given back as it was taken.
pub struct View<'py, E> {
    py: Python<'py>,
    base: *const E,
    shape: Vec<usize>,
    strides: Vec<isize>,
    /// Read-only, of every byte from the first element to the last; None where there are no elements.
    _borrow: Option<PyReadonlyArray1<'py, u8>>,
    /// numpy resizes no array that something refers to weakly, not even with `refcheck=False`.
    _pin: Bound<'py, PyWeakrefReference>,
}

impl<'py, E: Element> View<'py, E> {
    /// `array` is of a dtype that has the bits of `E`.
    pub fn new(array: &Bound<'py, PyUntypedArray>, name: &dyn Fn() -> String) -> PyResult<Self> {
        if array.dtype().itemsize() != size_of::<E>() || !fits(array) {
            return Err(PyValueError::new_err(format!("{}: misaligned or byte-swapped", name())));
        }
        let pin = pinned(array)?; // before its memory is looked at
        let (shape, bytes) = (array.shape().to_vec(), array.strides());
        let strides = bytes.iter().map(|bytes| bytes / size_of::<E>() as isize).collect();
        #[expect(unsafe_code, reason = "numpy owns the memory")]
        // SAFETY: only the address is read, which arrays of all dtypes have in one place.
        let base = unsafe { array.cast_unchecked::<PyArrayDyn<u8>>() }.data().cast::<E>().cast_const();
        let mut borrow = None;
        if !shape.contains(&0) {
            let reach = |(&len, &stride): (&usize, &isize)| (len as isize - 1).wrapping_mul(stride);
            let (before, after) =
                shape.iter().zip(bytes).map(reach).fold((0isize, 0isize), |(before, after), reach| {
                    (before.saturating_add(reach.min(0)), after.saturating_add(reach.max(0)))
                });
            let len = after.saturating_sub(before).saturating_add(size_of::<E>() as isize) as usize;
            #[expect(unsafe_code, reason = "as above")]
            // SAFETY: numpy says that elements are that far from the first one; the view keeps the array alive, and is only
            // ever asked for its address.
            let view = unsafe {
                let bytes = ArrayView1::from_shape_ptr(len, base.cast::<u8>().wrapping_offset(before));
                PyArray1::borrow_from_array(&bytes, array.clone().into_any())
            };
            borrow = Some(view.try_readonly().map_err(|_| {
                PyValueError::new_err(format!("{}: borrowed for writing by another extension module", name()))
            })?);
        }
        Ok(View { py: array.py(), base, shape, strides, _borrow: borrow, _pin: pin })
    }

    fn elements(&self) -> Elements<'_, E> {
        #[expect(unsafe_code, reason = "numpy owns the memory")]
        // SAFETY: `new` has checked size, byte order, alignment and strides, as they were when it took the pointer; the array is
        // alive and its memory pinned as long as `self` is, and unchanged as far as users of rust-numpy go; all bit patterns
        // of an `Element` are values.
        unsafe {
            Elements::from_raw(self.base, &self.shape, &self.strides)
        }
    }

    pub fn py(&self) -> Python<'py> {
        self.py
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The array as a sample with channels along `channel_axis`, counted from the end where negative.
    pub fn sample(&self, channel_axis: isize) -> Sample<'_, E> {
        let channel_axis = channel_axis_of(self.shape(), channel_axis);
        Sample { elements: self.elements(), shape: self.shape(), strides: &self.strides, channel_axis }
    }

    pub fn tensor(&self) -> Tensor<'_, E> {
        Tensor { elements: self.elements(), shape: self.shape(), strides: &self.strides }
    }

    /// All elements in C order, where they lie so.
    pub fn slice(&self, name: &str) -> PyResult<&[E]> {
        let mut expected = 1;
        for (&len, &stride) in self.shape.iter().zip(&self.strides).rev() {
            if len != 1 && stride != expected && self.len() != 0 {
                return Err(PyValueError::new_err(format!("{name}: not contiguous, expected C order")));
            }
            expected *= len as isize;
        }
        Ok(self.elements().run(0, self.len()))
    }
}

impl<'py, E: Element + NumpyElement> View<'py, E> {
    /// Of an object that has to be an array of this dtype.
    pub fn of(object: &Bound<'py, PyAny>, name: &'static str) -> PyResult<Self> {
        match object.cast::<PyUntypedArray>() {
            Ok(array) if array.dtype().is_equiv_to(&dtype::<E>(object.py())) => View::new(array, &|| name.to_owned()),
            _ => Err(wrong_dtype(object, name, &dtype::<E>(object.py()).to_string())),
        }
    }
}

/// Names what an argument is instead of an array of one of some dtypes.
pub fn wrong_dtype(object: &Bound<'_, PyAny>, name: &str, expected: &str) -> PyErr {
    let found = match object.cast::<PyUntypedArray>() {
        Ok(array) => format!("dtype {}", array.dtype()),
        Err(_) => object.get_type().to_string(),
    };
    PyTypeError::new_err(format!("{name}: {found}, expected an array of {expected}"))
}

/// The name of an attribute, made by [`meet_numpy`].
static BASE: PyOnceLock<Py<PyString>> = PyOnceLock::new();

/// What keeps numpy from resizing the array that owns the elements of this one.
fn pinned<'py>(array: &Bound<'py, PyUntypedArray>) -> PyResult<Bound<'py, PyWeakrefReference>> {
    let py = array.py();
    let base_of =
        |array: &Bound<'py, PyAny>| array.getattr(BASE.get_or_init(py, || PyString::new(py, "base").unbind()));
    let (mut owner, mut base) = (array.clone().into_any(), base_of(array)?);
    while base.is_instance_of::<PyUntypedArray>() {
        let next = base_of(&base)?;
        owner = std::mem::replace(&mut base, next);
    }
    PyWeakrefReference::new(&owner)
}

/// Whether all elements are aligned, in native byte order, and a whole number of elements apart.
fn fits(array: &Bound<'_, PyUntypedArray>) -> bool {
    let dtype = array.dtype();
    let size = dtype.itemsize().max(1) as isize;
    let even = array.shape().iter().zip(array.strides()).all(|(&len, stride)| len <= 1 || stride % size == 0);
    even && array.is_aligned() && dtype.is_native_byteorder() != Some(false)
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

    /// Both sums of a channel together, divided by a count.
    pub fn mean(&self, channel: usize, count: usize) -> f64 {
        let mut sum = self.integers.get(channel).map_or_else(Compensated::default, |&sum| sum.into());
        if let Some(&reals) = self.reals.get(channel) {
            sum.merge(reals);
        }
        sum.divided_by(count as f64)
    }
}

/// Bytes for each channel that sums take, here and in the kernel, in a tile and in its lanes, and as an array: about eight times
/// two words.
const OF_CHANNEL: usize = 128;

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
    ($($name:ident($element:ty): $kind:pat,)*) => {
        /// A view of any dtype that [`crate::channel_mean`] sums.
        pub enum AnyView<'py> {
            $($name(View<'py, $element>),)*
        }

        impl<'py> AnyView<'py> {
            /// Of an array that [`native`] gave; `index` is the number that errors give the sample.
            pub fn new(array: &Bound<'py, PyUntypedArray>, index: usize) -> PyResult<Self> {
                let name = || format!("samples[{index}]");
                match kind(&array.dtype())? {
                    $($kind => Ok(AnyView::$name(View::new(array, &name)?)),)*
                    _ => Err(wrong_dtype(array, &name(), "integers, booleans or real numbers")),
                }
            }

            pub fn shape(&self) -> &[usize] {
                match self {
                    $(AnyView::$name(view) => view.shape(),)*
                }
            }

            fn bytes(&self) -> usize {
                match self {
                    $(AnyView::$name(view) => view.len() * size_of::<$element>(),)*
                }
            }

            /// Adds the sums per channel of each sample, in order.
            pub fn add_channel_sums<'a>(
                py: Python<'py>, views: &'a [Self], axis: isize, sums: &mut Sums,
            ) -> PyResult<()> {
                memory::check(sums.channels, OF_CHANNEL)?;
                for alike in views.chunk_by(|a, b| discriminant(a) == discriminant(b)) {
                    let bytes = alike.iter().map(Self::bytes).fold(0, usize::saturating_add);
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
                memory::check(sums.channels, OF_CHANNEL)?;
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
any_view! {
    I8(i8): Kind::Numpy(b'i', 1),
    U8(u8): Kind::Numpy(b'u', 1),
    I16(i16): Kind::Numpy(b'i', 2),
    U16(u16): Kind::Numpy(b'u', 2),
    I32(i32): Kind::Numpy(b'i', 4),
    U32(u32): Kind::Numpy(b'u', 4),
    I64(i64): Kind::Numpy(b'i', 8),
    U64(u64): Kind::Numpy(b'u', 8),
    F16(f16): Kind::Numpy(b'f', 2),
    F32(f32): Kind::Numpy(b'f', 4),
    F64(f64): Kind::Numpy(b'f', 8),
    BF16(bf16): Kind::Bfloat16,
    I4(Int4): Kind::Int4,
    U4(UInt4): Kind::UInt4,
}

/// What tells dtypes apart.
enum Kind {
    /// numpy's own: its kind, and the size of an element.
    Numpy(u8, usize),
    /// Those of ml_dtypes have numbers and characters that nobody else may rely on; their names are theirs.
    Bfloat16,
    Int4,
    UInt4,
    Other,
}

/// What numpy numbers its own dtypes below.
const NUMPY_TYPES: i32 = 24;

fn kind(dtype: &Bound<'_, PyArrayDescr>) -> PyResult<Kind> {
    if (0..NUMPY_TYPES).contains(&dtype.num()) {
        return Ok(Kind::Numpy(dtype.kind(), dtype.itemsize()));
    }
    let name = dtype.typeobj().name()?; // of the scalars; that of a dtype is found by code of Python
    Ok(match (name.to_str()?, dtype.itemsize()) {
        ("bfloat16", 2) => Kind::Bfloat16,
        ("int4", 1) => Kind::Int4,
        ("uint4", 1) => Kind::UInt4,
        _ => Kind::Other,
    })
}

/// The object as an array that [`AnyView::new`] takes; TypeError where its dtype is none of those.
pub fn native<'py>(object: &Bound<'py, PyAny>, name: &dyn Fn() -> String) -> PyResult<Bound<'py, PyUntypedArray>> {
    if let Ok(array) = object.cast_exact::<PyUntypedArray>() {
        let known = match kind(&array.dtype())? {
            Kind::Numpy(b'i' | b'u', 1..=8) | Kind::Numpy(b'f', 2 | 4 | 8) => true,
            Kind::Numpy(..) | Kind::Other => false,
            Kind::Bfloat16 | Kind::Int4 | Kind::UInt4 => true,
        };
        if known && fits(array) {
            return Ok(array.clone());
        }
    }
    let native = object.py().import("biascorr.reference")?.getattr("native")?;
    let array = called(&native, (object, name()))?.cast_into::<PyUntypedArray>()?;
    if fits(&array) { Ok(array) } else { Ok(called(&array.getattr("copy")?, ())?.cast_into::<PyUntypedArray>()?) }
}

pub fn is_f32(array: &Bound<'_, PyUntypedArray>) -> bool {
    matches!(kind(&array.dtype()), Ok(Kind::Numpy(b'f', 4)))
}

pub fn as_float64<'py>(array: &Bound<'py, PyUntypedArray>) -> PyResult<Bound<'py, PyUntypedArray>> {
    let as_array = array.py().import("numpy")?.getattr("asarray")?;
    Ok(called(&as_array, (array, "float64"))?.cast_into::<PyUntypedArray>()?)
}

/// A float32 or float64 array, as it is.
pub enum Reals<'py> {
    F32(View<'py, f32>),
    F64(View<'py, f64>),
}

impl<'py> Reals<'py> {
    pub fn new(object: &Bound<'py, PyAny>, name: &'static str) -> PyResult<Self> {
        let array = object.cast::<PyUntypedArray>().map_err(|_| wrong_dtype(object, name, "float32 or float64"))?;
        match kind(&array.dtype())? {
            Kind::Numpy(b'f', 4) => Ok(Reals::F32(View::new(array, &|| name.to_owned())?)),
            Kind::Numpy(b'f', 8) => Ok(Reals::F64(View::new(array, &|| name.to_owned())?)),
            _ => Err(wrong_dtype(object, name, "float32 or float64")),
        }
    }
}

/// Makes once what any view needs: the ways of rust-numpy to numpy, and to other modules that borrow arrays. At the first use,
/// another thread could fork meanwhile, and leave its child waiting for an end of it. (For the same reason, nothing here uses
/// `intern!`, which lets other threads run.)
pub fn meet_numpy(py: Python<'_>) -> PyResult<()> {
    View::<u8>::new(zeros::<u8>(py, &[1])?.as_untyped(), &String::new).map(drop)
}

/// A new array of zeros in C order. MemoryError where there is no room for it.
pub fn zeros<'py, T: NumpyElement>(py: Python<'py>, shape: &[usize]) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    let zeros = py.import("numpy")?.getattr("zeros")?;
    Ok(called(&zeros, (PyTuple::new(py, shape)?, dtype::<T>(py)))?.cast_into::<PyArrayDyn<T>>()?)
}

/// Values as an array of one axis.
pub fn array_of<T: NumpyElement>(py: Python<'_>, values: impl ExactSizeIterator<Item = T>) -> Bound<'_, PyAny> {
    /// Up to here an array that owns its memory is made faster than one around a `Vec`.
    const FEW: usize = 1024;
    let values: Vec<T> = values.collect();
    if values.len() <= FEW {
        PyArray1::from_slice(py, &values).into_any()
    } else {
        PyArray1::from_vec(py, values).into_any()
    }
}
