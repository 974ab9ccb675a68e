//! The two ends of a band: side, bound with its status, and delta.

use crate::error::{Error, Result};

/// An end of the band.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `log_lower <= 0`
    Lower,
    /// `log_upper >= 0`
    Upper,
}

/// Case by which a bound was determined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The bound solves `D = delta`.
    Converged = 0,
    /// The whole side is allowed. The bound is exactly `-inf` or `-logp`.
    Saturated = 1,
    /// `logp` is 0 or `-inf`. The bound is the limit.
    Limit = 2,
    /// `logp` is above 0 and was read as 0.
    ReadAsCertain = 3,
    /// `logp` is NaN, and so is the bound.
    NotANumber = 4,
}

/// One end of the band, and the solver's account of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// The log bound: inside the region, next to its edge.
    pub log_ratio: f64,
    /// A log-ratio beyond the edge; the bound itself where there is no edge.
    pub outside: f64,
    /// The case by which it was determined.
    pub status: Status,
    /// The scalar solver's evaluations of `D`, each of which evaluates the generator twice.
    pub evaluations: u32,
}

/// A delta for all elements, or one for each.
#[derive(Debug, Clone, Copy)]
pub enum Delta<'a> {
    /// One delta for all elements.
    Same(f64),
    /// One delta for each element.
    Each(&'a [f64]),
}

impl Delta<'_> {
    /// The deltas of `count` elements from `first` on.
    pub(super) fn part(self, first: usize, count: usize) -> Self {
        match self {
            Self::Same(_) => self,
            Self::Each(values) => Self::Each(&values[first..first + count]),
        }
    }

    /// The delta of an element.
    pub(super) fn at(&self, index: usize) -> f64 {
        match self {
            Self::Same(value) => *value,
            Self::Each(values) => values[index],
        }
    }

    /// Refuses a delta that is not a positive finite number, or another number of them than `expected`.
    pub(super) fn check(&self, argument: &'static str, expected: usize) -> Result<()> {
        match self {
            Self::Same(value) => check_delta(*value, None),
            Self::Each(values) => {
                if values.len() != expected {
                    return Err(Error::Length { argument, actual: values.len(), expected });
                }
                values
                    .iter()
                    .enumerate()
                    .try_for_each(|(index, value)| check_delta(*value, Some(index)))
            }
        }
    }
}

/// Refuses a delta that is not a positive finite number.
pub(super) fn check_delta(value: f64, index: Option<usize>) -> Result<()> {
    if value > 0.0 && value.is_finite() { Ok(()) } else { Err(Error::Delta { value, index }) }
}
