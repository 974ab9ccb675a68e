//! Arguments of a generator.

use crate::number::Real;

/// An argument of a generator: `u > 0` given by both `ln u` and `u - 1`.
///
/// Near `u = 1` neither can be recovered from `u`. Far from 1, `u` overflows or underflows first.
#[derive(Debug, Clone, Copy)]
pub struct Point<T> {
    /// `ln u`
    pub log: T,
    /// `u - 1`
    pub excess: T,
    /// `u`
    pub u: T,
}

impl<T: Real> Point<T> {
    /// The point with the given `ln u`.
    #[must_use]
    pub fn from_log(log: T) -> Self {
        if log.to_f64() < -0.7 {
            let u = log.exp(); // below 1/2, so u - 1 loses no digits
            return Self { log, excess: u - T::of(1.0), u };
        }
        let excess = log.exp_m1();
        Self { log, excess, u: excess + T::of(1.0) }
    }

    /// The point with the given `u - 1 > -1`.
    #[must_use]
    pub fn from_excess(excess: T) -> Self {
        Self { log: excess.ln_1p(), excess, u: excess + T::of(1.0) }
    }

    /// The point with the given `u`, which has to be so far from 1 that `u - 1` loses no digits.
    #[must_use]
    pub fn from_ratio(u: T) -> Self {
        Self { log: u.ln(), excess: u - T::of(1.0), u }
    }
}
