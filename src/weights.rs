//! Weights as tensors: which axes count channels, on either side of the layer.
//!
//! A layout has a letter per axis: O or M output channels, I input channels, G or C groups, and D, H, W space. The channels of
//! all groups are counted through: output g*O+o, input g*I+i.

use crate::error::Error;
use crate::layout::Elements;

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

/// What an axis of a weight tensor counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Kernel taps.
    Space,
    /// Input channels of a group.
    Input,
    /// Groups.
    Group,
    /// Output channels of a group.
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

/// One loop over weights: an axis, or the groups or the channels of a group where an axis counts both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loop {
    /// The axis of the weights.
    pub axis: usize,
    /// What the loop counts.
    pub role: Role,
    /// Number of steps.
    pub len: usize,
    /// Elements along the axis per step.
    pub step: usize,
    /// Input channels per step.
    pub input: isize,
    /// Output channels per step.
    pub output: isize,
}

/// The loops over weights, and how many channels they have on either side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Channels {
    /// In the order of the axes.
    pub loops: Vec<Loop>,
    /// Input channels of all groups.
    pub inputs: usize,
    /// Output channels of all groups.
    pub outputs: usize,
}

impl Channels {
    /// `groups` is how many of them the axis O counts (I, where the layout starts with it); 1 where there is an axis of groups.
    pub fn new(shape: &[usize], groups: usize, layout: &str) -> Result<Self, Error> {
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
        let mut loops = Vec::with_capacity(shape.len() + 1);
        for (axis, (&role, &len)) in roles.iter().zip(shape).enumerate() {
            let (mut len, group) = (len, [inputs as isize, outputs as isize]);
            if role == shared && groups > 1 {
                len /= groups;
                let [input, output] = group;
                loops.push(Loop { axis, role: Role::Group, len: groups, step: len, input, output });
            }
            let [input, output] = match role {
                Role::Space => [0, 0],
                Role::Input => [1, 0],
                Role::Group => group,
                Role::Output => [0, 1],
            };
            loops.push(Loop { axis, role, len, step: 1, input, output });
        }
        Ok(Channels { loops, inputs: inputs * all_groups, outputs: outputs * all_groups })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_of_all_groups_is_two_loops() {
        let channels = Channels::new(&[6, 4, 3], 2, "OIW").unwrap();
        assert_eq!((channels.inputs, channels.outputs), (8, 6));
        let found: Vec<_> = channels.loops.iter().map(|l| (l.axis, l.len, l.step, l.input, l.output)).collect();
        assert_eq!(found, [(0, 2, 3, 4, 3), (0, 3, 1, 0, 1), (1, 4, 1, 1, 0), (2, 3, 1, 0, 0)]);
        let transposed = Channels::new(&[6, 4], 2, "IO").unwrap();
        assert_eq!((transposed.inputs, transposed.outputs), (6, 8));
        assert_eq!(transposed.loops[0], Loop { axis: 0, role: Role::Group, len: 2, step: 3, input: 3, output: 4 });
    }

    #[test]
    fn no_input_axis_is_one_channel_per_group() {
        let channels = Channels::new(&[3, 5, 2], 1, "HCM").unwrap();
        assert_eq!((channels.inputs, channels.outputs), (5, 10));
    }
}
