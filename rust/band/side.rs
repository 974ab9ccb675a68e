//! The two ends of a band: which, how one was found, and the delta that each is found for.

use crate::error::{Error, Result};

/// Which end of the band.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `log_lower <= 0`
    Lower,
    /// `log_upper >= 0`
    Upper,
}

/// How a bound came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The equation `D = delta` was solved.
    Converged = 0,
    /// The whole side is allowed: exactly `-inf` or `-logp`.
    Saturated = 1,
    /// `logp` is 0 or `-inf`: the limit.
    Limit = 2,
    /// `logp` is above 0 and was read as 0.
    ReadAsCertain = 3,
    /// `logp` is NaN, and so is the bound.
    NotANumber = 4,
}

/// One end of the band, and how it was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// The log bound: inside the region, next to its edge.
    pub log_ratio: f64,
    /// A log-ratio on the other side of the edge (or the bound itself where there is no edge).
    pub outside: f64,
    /// How it came about.
    pub status: Status,
    /// Evaluations of the divergence `D`, two of the generator each, that the scalar solver makes.
    pub evaluations: u32,
}

/// A radius, or one for every element.
#[derive(Debug, Clone, Copy)]
pub enum Delta<'a> {
    /// The same for all.
    Same(f64),
    /// One an element.
    Each(&'a [f64]),
}

impl Delta<'_> {
    pub(super) fn part(self, first: usize, count: usize) -> Self {
        match self {
            Self::Same(_) => self,
            Self::Each(values) => Self::Each(&values[first..first + count]),
        }
    }

    pub(super) fn at(&self, index: usize) -> f64 {
        match self {
            Self::Same(value) => *value,
            Self::Each(values) => values[index],
        }
    }

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

pub(super) fn check_delta(value: f64, index: Option<usize>) -> Result<()> {
    if value > 0.0 && value.is_finite() { Ok(()) } else { Err(Error::Delta { value, index }) }
}
