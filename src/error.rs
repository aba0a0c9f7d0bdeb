//! Everything that can be wrong with a kernel's input, one variant each.

use thiserror::Error;

/// What was found and what is allowed. The messages name the argument as the Python caller knows it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// There was nothing to average.
    #[error("samples: none given, at least one is needed")]
    NoSamples,
    /// A sample without a channel axis.
    #[error("samples[{index}]: 0-dimensional, expected an array whose last axis is the channel axis")]
    ZeroDimensional {
        /// Position of the sample in the sequence.
        index: usize,
    },
    /// A channel axis that the sample does not have, or that counts the batch.
    #[error("samples[{index}]: {rank} axes, none of which is channel axis {axis}")]
    ChannelAxis {
        /// Position of the sample in the sequence.
        index: usize,
        /// Number of its axes.
        rank: usize,
        /// The axis asked for.
        axis: isize,
    },
    /// A sample with a zero-size axis has no mean.
    #[error("samples[{index}]: shape {shape:?} has no elements")]
    EmptySample {
        /// Position of the sample in the sequence.
        index: usize,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Samples must agree in their number of channels.
    #[error("samples[{index}]: {found} channels, expected {expected} as in samples[0]")]
    Channels {
        /// Position of the sample in the sequence.
        index: usize,
        /// Channels of this sample.
        found: usize,
        /// Channels of the first sample.
        expected: usize,
    },
    /// The two weight tensors are compared element by element, without broadcasting.
    #[error("fake_quantized_weights: shape {found:?}, expected {expected:?} as weights")]
    WeightShape {
        /// Shape of the fake-quantized weights.
        found: Vec<usize>,
        /// Shape of the weights.
        expected: Vec<usize>,
    },
    /// The layout must name every axis of the weights.
    #[error("weights: {found} axes, the layout {layout:?} names {expected}")]
    LayoutRank {
        /// Rank of the weights.
        found: usize,
        /// Letters in the layout.
        expected: usize,
        /// The layout.
        layout: String,
    },
    /// A letter that is no axis, stands twice, or the output axis is missing.
    #[error(
        "layout: {layout:?} is not understood, expected each axis once: O or M (output channels), I (input channels), \
         G or C (groups), and D, H, W (space)"
    )]
    Layout {
        /// The layout.
        layout: String,
    },
    /// The groups must divide the axis that counts all of them.
    #[error("groups: {groups} does not fit weights of shape {shape:?} in layout {layout:?}")]
    Groups {
        /// Number of groups asked for.
        groups: usize,
        /// Shape of the weights.
        shape: Vec<usize>,
        /// The layout.
        layout: String,
    },
    /// The mean must have one value per input channel, or per tap and input channel.
    #[error("input_mean: shape {found:?}, expected {per_channel:?} or {per_tap:?}")]
    MeanShape {
        /// Shape of the mean.
        found: Vec<usize>,
        /// The shape of a mean per channel.
        per_channel: Vec<usize>,
        /// The shape of a mean per tap.
        per_tap: Vec<usize>,
    },
    /// A per-channel parameter must have the length of its axis.
    #[error("{name}: {found} values, expected 1 or {expected}, the number of channels")]
    PerChannel {
        /// Name of the parameter.
        name: &'static str,
        /// Its length.
        found: usize,
        /// Length of the channel axis.
        expected: usize,
    },
    /// An integer cannot hold nan.
    #[error("array: contains nan, which has no quantized value")]
    Nan,
    /// No range spans nan or an infinity.
    #[error("weights: contains nan or inf, expected finite numbers")]
    NotFinite,
    /// At least one thread is needed, and no more than a machine can have.
    #[error("num_threads: {found}, expected 1 to {limit}")]
    Threads {
        /// The most that is allowed.
        limit: usize,
        /// The number asked for.
        found: isize,
    },
    /// Whoever asked for the work had it stopped.
    #[error("stopped")]
    Stopped,
    /// There is no room for what would be computed.
    #[error("no memory for {bytes} bytes")]
    Memory {
        /// How many are needed, about.
        bytes: usize,
    },
    /// An instruction set that no CPU of this architecture has.
    #[error("BIASCORR_MAX_ISA: {found:?}, expected one of {known}")]
    Isa {
        /// What the environment says.
        found: String,
        /// What it may say.
        known: String,
    },
    /// A position in the weights has no grid.
    #[error("grids: {found} along the strides {strides:?}, too few for weights of shape {shape:?}")]
    GridStrides {
        /// Number of grids.
        found: usize,
        /// Grids per step of each axis.
        strides: Vec<isize>,
        /// Shape of the weights.
        shape: Vec<usize>,
    },
    /// The operating system refused to start the pool.
    #[error("cannot start {threads} threads: {reason}")]
    ThreadPool {
        /// Number of threads asked for.
        threads: usize,
        /// What the system said.
        reason: String,
    },
}
