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

impl Side {
    /// Both sides.
    pub(super) const BOTH: [Self; 2] = [Self::Lower, Self::Upper];

    /// The side of a log-ratio. 0 is on the upper one.
    pub(super) fn of(log_ratio: f64) -> Self {
        if log_ratio < 0.0 { Self::Lower } else { Self::Upper }
    }

    /// The one of two values that belongs to the side.
    pub(super) fn pick<T>(self, lower: T, upper: T) -> T {
        match self {
            Self::Lower => lower,
            Self::Upper => upper,
        }
    }

    /// The outcome that shrinks on the way outwards, and the one that grows.
    pub(super) fn shrinking_and_growing<T>(self, token: T, others: T) -> (T, T) {
        match self {
            Self::Lower => (token, others),
            Self::Upper => (others, token),
        }
    }

    /// The last log-ratio in the simplex, at which the shrinking outcome vanishes.
    pub(super) fn end(self, logp: f64) -> f64 {
        self.pick(f64::NEG_INFINITY, -logp)
    }

    /// The last log-ratio before [`Self::end`].
    pub(super) fn last_before_end(self, logp: f64) -> f64 {
        // Not by `inwards`, because the lower one is a constant.
        match self {
            Self::Lower => f64::NEG_INFINITY.next_up(),
            Self::Upper => (-logp).next_down(),
        }
    }

    /// True if a log-ratio is on the side, from the first one beyond 0 to `last`.
    pub(super) fn spans(self, last: f64, log_ratio: f64) -> bool {
        match self {
            Self::Lower => log_ratio < 0.0 && log_ratio >= last,
            Self::Upper => log_ratio > 0.0 && log_ratio <= last,
        }
    }

    /// The log-ratio 0, with the sign of the side.
    pub(super) fn zero(self) -> f64 {
        self.outward(0.0)
    }

    /// A difference of log-ratios, counted positive outwards.
    pub(super) fn outward(self, difference: f64) -> f64 {
        self.pick(-difference, difference)
    }

    /// The next double towards 0.
    pub(super) fn inwards(self, log_ratio: f64) -> f64 {
        match self {
            Self::Lower => log_ratio.next_up(),
            Self::Upper => log_ratio.next_down(),
        }
    }

    /// The next double away from 0.
    pub(super) fn outwards(self, log_ratio: f64) -> f64 {
        match self {
            Self::Lower => log_ratio.next_down(),
            Self::Upper => log_ratio.next_up(),
        }
    }

    /// The one of two log-ratios that is nearer to 0.
    pub(super) fn nearer(self, a: f64, b: f64) -> f64 {
        match self {
            Self::Lower => a.max(b),
            Self::Upper => a.min(b),
        }
    }
}

/// A log-ratio moved inwards and outwards by a relative margin.
pub(super) fn bracket(log_ratio: f64, margin: f64) -> (f64, f64) {
    (log_ratio * (1.0 - margin), log_ratio * (1.0 + margin))
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
    pub(crate) fn part(self, first: usize, count: usize) -> Self {
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
    pub(crate) fn check(&self, argument: &'static str, expected: usize) -> Result<()> {
        match self {
            Self::Same(value) => check_delta(*value, None),
            Self::Each(values) => {
                Error::check_length(argument, values.len(), expected)?;
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
