//! Runs kernels once each, on one thread, for callgrind to count the instructions of `measured`.
//!
//! `instructions (<case> <elements>)...` prints for each the CPU tier and the number of elements that the kernel took, about as
//! many as asked for; `instructions --list` prints the cases. `tests/instructions.py` runs them all.

use std::collections::BTreeMap;
use std::hint::black_box;

use biascorr::accumulate::{Element, SumOf};
use biascorr::channel_mean::{AxisWindow, Sample, channel_sums, tap_sums};
use biascorr::error::Error;
use biascorr::fake_quantize::{Grids, dequantize, fake_quantize, quantize};
use biascorr::layout::Elements;
use biascorr::quantization_range::{Quantizer, quantization_range};
use biascorr::weight_error::{FakeQuantized, GridAxes, Mean, weight_error};
use biascorr::weights::Tensor;
use biascorr::{parallel, simd};
use half::{bf16, f16};

/// Runs a kernel over about as many elements as asked for; returns how many.
type Run = Box<dyn Fn(usize) -> Result<usize, Error>>;

/// A [`Run`] of samples of a shape, with a channel axis.
type RunOnSample = fn(&[usize], usize, usize) -> Result<usize, Error>;

/// Samples of 192 to 512 Ki elements, by the place of their channels (axis 1) in memory and the length of their runs.
const SAMPLES: [(&str, &[usize]); 5] = [
    ("last/3", &[1 << 16, 3]),
    ("last/64", &[1 << 12, 64]),
    ("last/2048", &[1 << 8, 2048]),
    ("first/49", &[80, 64, 49]),
    ("first/3136", &[2, 64, 3136]),
];

/// Samples whose taps are summed, and their channel axis; axis 0 grows.
const TAPPED: [(&str, &[usize], usize); 2] = [("last/64", &[1, 28, 28, 64], 3), ("first/28", &[1, 64, 28, 28], 1)];

/// Weights by layout; the axis of length 1 grows.
const WEIGHTS: [(&str, &[usize]); 4] =
    [("HWIO", &[3, 3, 1, 512]), ("OIHW", &[1, 512, 3, 3]), ("IO", &[1, 4096]), ("OI", &[1, 4096])];

/// Channels, on the last axis, with a grid each.
const GRIDS: [(&str, usize); 2] = [("per_tensor", 1), ("per_channel", 512)];

/// Ways to the range of channels of 512 weights each: whether it is asymmetric, whether it is searched.
const RANGES: [(&str, bool, bool); 3] =
    [("tf", false, false), ("tf_enhanced", false, true), ("tf_enhanced/asymmetric", true, true)];

/// A function at each type, with the type's name.
macro_rules! at_each_type {
    ($function:ident: $($element:ident),*) => {
        [$((stringify!($element), $function::<$element> as RunOnSample)),*]
    };
}

fn cases() -> BTreeMap<String, Run> {
    let mut cases: BTreeMap<String, Run> = BTreeMap::new();
    for (dtype, run) in at_each_type!(run_channel_sums: i8, u8, i16, f16, bf16, f32, f64) {
        for (name, shape) in SAMPLES {
            cases.insert(format!("channel_sums/{dtype}/{name}"), Box::new(move |elements| run(shape, 1, elements)));
        }
    }
    for (dtype, run) in at_each_type!(run_tap_sums: i8, f32) {
        for (name, shape, axis) in TAPPED {
            cases.insert(format!("tap_sums/{dtype}/{name}"), Box::new(move |elements| run(shape, axis, elements)));
        }
    }
    for (layout, shape) in WEIGHTS {
        for fused in [false, true] {
            let name = if fused { "weight_error_from_grids" } else { "weight_error" };
            let run = move |elements| run_weight_error(layout, shape, elements, fused);
            cases.insert(format!("{name}/f32/{layout}"), Box::new(run));
        }
    }
    for (name, grids) in GRIDS {
        let run = move |elements| run_map(quantize::<f32, i8>, grids, elements);
        cases.insert(format!("quantize/f32/{name}"), Box::new(run));
        let run = move |elements| run_map(dequantize::<i8, f32>, grids, elements);
        cases.insert(format!("dequantize/i8/{name}"), Box::new(run));
        let run = move |elements| run_map(fake_quantize::<f32>, grids, elements);
        cases.insert(format!("fake_quantize/f32/{name}"), Box::new(run));
    }
    for (name, asymmetric, search) in RANGES {
        let quantizer = Quantizer { bits: 8, asymmetric, search };
        let run = move |elements| run_quantization_range(quantizer, elements);
        cases.insert(format!("quantization_range/f32/{name}"), Box::new(run));
    }
    cases
}

/// The same sample again and again.
fn run_channel_sums<T: Element + TryFrom<u8>>(
    shape: &[usize], channel_axis: usize, elements: usize,
) -> Result<usize, Error> {
    let (len, strides) = (shape.iter().product(), strides_of(shape));
    let values: Vec<T> = pattern(len);
    let sample = Sample { elements: Elements::from_slice(&values), shape, strides: &strides, channel_axis };
    let samples = vec![sample; elements.div_ceil(len)];
    let mut totals = vec![SumOf::<T>::default(); shape[channel_axis]];
    measured(&mut || channel_sums(&samples, &mut totals))?;
    Ok(samples.len() * len)
}

fn run_tap_sums<T: Element + TryFrom<u8>>(
    shape: &[usize], channel_axis: usize, elements: usize,
) -> Result<usize, Error> {
    let shape = grown(shape, 0, elements);
    let values: Vec<T> = pattern(shape.iter().product());
    let (elements, strides) = (Elements::from_slice(&values), strides_of(&shape));
    let sample = Sample { elements, shape: &shape, strides: &strides, channel_axis };
    let window = AxisWindow { taps: 3, stride: 1, dilation: 1, pad: 1, outputs: shape[2] };
    measured(&mut || tap_sums(&sample, &[window; 2]).map(|sums| drop(black_box(sums))))?;
    Ok(values.len())
}

fn run_weight_error(layout: &str, shape: &[usize], elements: usize, fused: bool) -> Result<usize, Error> {
    let shape = grown(shape, shape.iter().position(|&len| len == 1).unwrap_or(0), elements);
    let values: Vec<f32> = pattern(shape.iter().product());
    let strides = strides_of(&shape);
    let tensor = Tensor { elements: Elements::from_slice(&values), shape: &shape, strides: &strides };
    let inputs = shape[layout.find('I').unwrap_or(0)];
    let mean = Mean { values: &pattern(inputs), shape: vec![inputs] };
    let grids = Grids::new(&[0.37], &[3.0], 8, 1, 1)?;
    let strides = vec![0; shape.len()];
    let computed = FakeQuantized::Computed(&grids, GridAxes::Strides(&strides));
    let fake_quantized = if fused { computed } else { FakeQuantized::Given(tensor) };
    measured(&mut || weight_error(&tensor, &fake_quantized, &mean, 1, layout).map(|shift| drop(black_box(shift))))?;
    Ok(values.len())
}

fn run_map<X: TryFrom<u8>, Y: Clone + Default>(
    kernel: impl Fn(&[X], &Grids, &mut [Y]) -> Result<(), Error>, grids: usize, elements: usize,
) -> Result<usize, Error> {
    let grids = Grids::new(&vec![0.37; grids], &[3.0], 8, grids, 1)?;
    let (xs, mut ys) = (pattern::<X>(elements), vec![Y::default(); elements]);
    measured(&mut || kernel(&xs, &grids, &mut ys))?;
    Ok(elements)
}

fn run_quantization_range(quantizer: Quantizer, elements: usize) -> Result<usize, Error> {
    let channels = elements.div_ceil(512);
    let (weights, mut ranges) = (pattern::<f32>(512 * channels), vec![[0.0; 2]; channels]);
    measured(&mut || quantization_range(&weights, quantizer, &mut ranges))?;
    Ok(weights.len())
}

/// What is counted: not inlined, so that callgrind finds its name.
#[inline(never)]
fn measured(kernel: &mut dyn FnMut() -> Result<(), Error>) -> Result<(), Error> {
    black_box(kernel())
}

/// 0, 1, ..., 100, 0, 1, ...
fn pattern<T: TryFrom<u8>>(len: usize) -> Vec<T> {
    (0..=100).cycle().filter_map(|x: u8| T::try_from(x).ok()).take(len).collect()
}

/// The shape with one axis so long that there are about so many elements.
fn grown(shape: &[usize], axis: usize, elements: usize) -> Vec<usize> {
    let mut shape = shape.to_vec();
    shape[axis] = elements.div_ceil(shape.iter().product());
    shape
}

/// Of an array in C order.
fn strides_of(shape: &[usize]) -> Vec<isize> {
    (1..=shape.len()).map(|k| shape[k..].iter().product::<usize>() as isize).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let cases = cases();
    if arguments == ["--list"] {
        cases.keys().for_each(|name| println!("{name}"));
        return Ok(());
    }
    parallel::set_num_threads(1)?;
    for pair in arguments.chunks(2) {
        let [name, elements] = pair else { return Err("usage: instructions --list | (<case> <elements>)...".into()) };
        let run = cases.get(name).ok_or("no such case")?;
        println!("{} {}", simd::tier().name(), run(elements.parse()?)?);
    }
    Ok(())
}
