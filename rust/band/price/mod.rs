//! The equal-price region: every log-ratio whose *price* is at most a given one.
//!
//! A token of old probability p that moves to the ratio r leaves the ratio `c = (1 - p r)/(1 - p)` to everything
//! else. The price of that move is what the divergence costs for the next bit of probability:
//!
//! ```text
//! dD_f/dq = f'(r) - f'(c),   q = p r
//! ```
//!
//! It is 0 at r = 1 and rises with r. A budget of divergence that is split between tokens so that the first-order
//! gain is largest gives each the same price for the same advantage; docs/numerics.md has the proof.
//!
//! # One problem for both sides
//!
//! As for a band, one outcome shrinks by `e^-m` and the other grows. The price of the side is
//! `f'(grown) - f'(shrunk)`, two terms of one sign, and Newton's method runs on its logarithm against `ln m`.
//! Bounds and their promise are those of a band: inside always, and polished in double-double arithmetic where
//! the condition number asks for it. `p upper(p) + (1-p) lower(1-p) = 1` holds here too.
//!
//! # Kinks
//!
//! At a jump of f' the price is that of the last step inwards of it, so that the region is closed: it ends
//! at the largest ratio whose price is at most the given one. For tv and vajda:1 the price of every move is the
//! same, 1 and 2: a smaller price allows none and any other one all.

mod equation;
mod polish;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use self::equation::{Equation, Excess, Places};
use self::polish::{exact_residual, last_inside_exactly, polish};
use crate::band::limits::{BENIGN_CONDITION, CHUNK, MARGIN};
use crate::band::root::MAX_EVALUATIONS;
use crate::band::side::{Bound, Side, Status, bracket};
use crate::band::split::Split;
use crate::band::tails::is_far;
use crate::divergence::{Divergence, Generator, Point};
use crate::error::{Error, Result};
use crate::number::{Dd, Real};

/// Relative distance of the price at the end of a side beyond which double precision tells whether it is reached.
const CLEAR_OF_END: f64 = 1e-10;

/// Relative distance of a price from the given one beyond which double precision decides membership.
const CLEAR_OF_PRICE: f64 = 64.0 * f64::EPSILON;

/// Bounds below this are next to the smallest doubles, whose digits are lost.
const TINY: f64 = 1e-290;

/// Relative move inwards of those.
const TINY_MARGIN: f64 = 1e-10;

/// The region `-low <= f'(r) - f'(c) <= high`, inside the simplex.
#[derive(Debug, Clone, PartialEq)]
pub struct PriceBand {
    divergence: Divergence,
    low: Equation,
    high: Equation,
}

impl PriceBand {
    /// The region of the price `low` below and `high` above a ratio of 1.
    ///
    /// # Errors
    /// [`Error::Argument`] if a price is not a finite number above 0.
    pub fn new(divergence: Divergence, low: f64, high: f64) -> Result<Self> {
        for price in [low, high] {
            if !(price > 0.0 && price.is_finite()) {
                return Err(Error::Argument {
                    argument: "price",
                    value: price.to_string(),
                    allowed: "a finite number above 0",
                });
            }
        }
        let [low, high] = [low, high].map(|price| Equation::new(&divergence.generator, price));
        Ok(Self { divergence, low, high })
    }

    /// The divergence.
    #[must_use]
    pub fn divergence(&self) -> &Divergence {
        &self.divergence
    }

    /// The price of a side.
    #[must_use]
    pub fn price(&self, side: Side) -> f64 {
        self.equation(side).price
    }

    fn equation(&self, side: Side) -> &Equation {
        side.pick(&self.low, &self.high)
    }

    /// `(log_lower, log_upper)` of one token.
    #[must_use]
    pub fn log_bounds(&self, logp: f64) -> (f64, f64) {
        (self.bound(logp, Side::Lower).log_ratio, self.bound(logp, Side::Upper).log_ratio)
    }

    /// The same of many tokens, on all threads.
    #[must_use]
    pub fn log_bounds_of_many(&self, logp: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut lower, mut upper) = (vec![0.0; logp.len()], vec![0.0; logp.len()]);
        logp.par_chunks(CHUNK)
            .zip(lower.par_chunks_mut(CHUNK))
            .zip(upper.par_chunks_mut(CHUNK))
            .for_each(|((logp, lower), upper)| {
                // Many tokens were certain, and all of them have the same bounds.
                let mut of_certain = None;
                for (index, &logp) in logp.iter().enumerate() {
                    (lower[index], upper[index]) = if logp >= 0.0 {
                        *of_certain.get_or_insert_with(|| self.log_bounds(0.0))
                    } else {
                        self.log_bounds(logp)
                    };
                }
            });
        (lower, upper)
    }

    /// One end of the region, with how it was found; an evaluation is one of the price.
    #[must_use]
    pub fn bound(&self, logp: f64, side: Side) -> Bound {
        let found = self.found(logp, side);
        // Next to the smallest doubles, digits are lost in whatever was evaluated.
        if found.log_ratio == 0.0 || found.log_ratio.abs() >= TINY {
            return found;
        }
        let moved = (found.log_ratio.abs() * (1.0 - TINY_MARGIN)).to_bits().saturating_sub(16);
        Bound { log_ratio: f64::from_bits(moved).copysign(found.log_ratio), ..found }
    }

    fn found(&self, logp: f64, side: Side) -> Bound {
        let exactly = |log_ratio: f64, status| Bound {
            log_ratio,
            outside: log_ratio,
            status,
            evaluations: 0,
        };
        let (generator, equation) = (&self.divergence.generator, self.equation(side));
        if logp.is_nan() {
            return exactly(f64::NAN, Status::NotANumber);
        }
        let status = if logp > 0.0 {
            Status::ReadAsCertain
        } else if logp == 0.0 || logp == f64::NEG_INFINITY {
            Status::Limit
        } else {
            Status::Converged
        };
        if logp >= 0.0 && side == Side::Upper {
            return exactly(0.0, status);
        }
        let logp = logp.min(0.0);
        let end = side.end(logp);
        let saturated = |evaluations| Bound {
            evaluations,
            ..exactly(end, if status == Status::Converged { Status::Saturated } else { status })
        };
        if let Some(jump) = generator.jump() {
            return if equation.price >= jump {
                saturated(0)
            } else {
                exactly(side.zero(), status)
            };
        }
        let (at_end, mut evaluations) = self.reaches_end(logp, end, side);
        if at_end {
            return saturated(evaluations);
        }
        let found = |log_ratio: f64, evaluations| Bound {
            log_ratio,
            outside: side.outwards(log_ratio),
            status,
            evaluations,
        };
        if let Generator::HockeyStick(threshold) = *generator {
            return found(hockey_stick(threshold, logp, side), evaluations);
        }
        if is_far(logp) {
            let root = last_inside_exactly(generator, equation, logp, side);
            return found(root.at, evaluations + root.evaluations);
        }
        let split = Split::new(logp, side);
        let root = equation.magnitude(generator, &split);
        evaluations += root.evaluations + 1;
        let (rough, condition) = equation.log_ratio(generator, &split, root.at, side);
        let settled = condition <= BENIGN_CONDITION
            && !generator.cancels()
            && root.evaluations < MAX_EVALUATIONS
            && rough.abs() >= TINY;
        if settled {
            let (inside, outside) = bracket(rough, MARGIN);
            let log_ratio = side.nearer(inside, side.last_before_end(logp));
            return Bound { outside, ..found(log_ratio, evaluations) };
        }
        let (log_ratio, more) = polish(generator, equation, logp, side, rough);
        found(log_ratio, evaluations + more)
    }

    /// True if the price at the end of a side is at most the given one, with the evaluations made.
    fn reaches_end(&self, logp: f64, end: f64, side: Side) -> (bool, u32) {
        let (generator, equation) = (&self.divergence.generator, self.equation(side));
        if logp == f64::NEG_INFINITY && side == Side::Upper {
            // There is no end to reach; f' tends to its limit from below.
            return (equation.at_infinity.to_f64() <= equation.price, 0);
        }
        if equation.at_zero.to_f64() == f64::NEG_INFINITY {
            return (false, 0);
        }
        let (token, others) = Places::<f64>::new(logp).outcomes(end);
        let Excess { value, size } = equation.excess(generator, side, token, others);
        if !self.needs_digits() && (value == f64::INFINITY || value.abs() > CLEAR_OF_END * size) {
            return (value < 0.0, 1);
        }
        let (residual, doubt) = exact_residual(generator, equation, &Places::new(logp), side, end);
        (residual <= doubt, 2)
    }

    /// True if double precision cannot tell how far a price is from the given one: text cancels, and at a jump
    /// the price is far from it on both sides.
    fn needs_digits(&self) -> bool {
        let generator = &self.divergence.generator;
        generator.cancels() || matches!(generator, Generator::HockeyStick(_))
    }

    /// True if a log-ratio lies in the region; NaN does not.
    #[must_use]
    pub fn contains(&self, logp: f64, log_ratio: f64) -> bool {
        if logp.is_nan() || log_ratio.is_nan() {
            return false;
        }
        let logp = logp.min(0.0);
        if log_ratio > -logp {
            return false;
        }
        if log_ratio == 0.0 {
            return true;
        }
        let side = Side::of(log_ratio);
        let (generator, equation) = (&self.divergence.generator, self.equation(side));
        if let Some(jump) = generator.jump() {
            return equation.price >= jump;
        }
        if logp == f64::NEG_INFINITY && log_ratio == f64::INFINITY {
            return self.reaches_end(logp, log_ratio, side).0;
        }
        if !self.needs_digits() {
            let (token, others) = Places::<f64>::new(logp).outcomes(log_ratio);
            let Excess { value, size } = equation.excess(generator, side, token, others);
            let scale = size + sensitivity(generator, token) + sensitivity(generator, others);
            if value == f64::INFINITY || value.abs() > CLEAR_OF_PRICE * scale {
                return value < 0.0;
            }
        }
        let places = Places::new(logp);
        let (residual, doubt) = exact_residual(generator, equation, &places, side, log_ratio);
        let at_the_end = log_ratio == side.end(logp);
        residual <= if at_the_end { doubt } else { 0.0 }
    }

    /// [`Self::contains`] of many tokens, on all threads.
    ///
    /// # Errors
    /// [`Error::Length`].
    pub fn contains_many(&self, logp: &[f64], log_ratio: &[f64]) -> Result<Vec<bool>> {
        Error::check_length("log_ratio", log_ratio.len(), logp.len())?;
        Ok(logp
            .par_iter()
            .with_min_len(CHUNK)
            .zip(log_ratio)
            .map(|(&logp, &log_ratio)| self.contains(logp, log_ratio))
            .collect())
    }

    /// `d log bound / d logp`, from the implicit function theorem; 0 where the bound is saturated below, -1 where
    /// it is above.
    #[must_use]
    pub fn log_slope(&self, logp: f64, log_bound: f64) -> f64 {
        if logp >= 0.0 || log_bound == f64::NEG_INFINITY || log_bound == 0.0 {
            return 0.0;
        }
        if log_bound >= -logp {
            return -1.0;
        }
        let generator = &self.divergence.generator;
        if matches!(generator, Generator::HockeyStick(_)) && log_bound > 0.0 {
            return 0.0; // the constant g
        }
        let places = Places::<f64>::new(logp);
        let (token, others) = places.outcomes(log_bound);
        // How fast f' of the others changes with their ratio; where it jumps, that ratio is constant.
        let rate = generator.bend(others) / others.u;
        let own = if rate == 0.0 { 0.0 } else { generator.bend(token) / rate };
        others.excess / places.others / (own + places.odds * token.u)
    }
}

/// By how much f' moves where its argument moves by a rounding error of itself or of its distance from 1.
fn sensitivity(generator: &Generator, at: Point<f64>) -> f64 {
    let size = generator.bend(at) * (2.0 * at.excess.abs()).min(1.0);
    if size.is_finite() { size } else { 0.0 }
}

/// The last log-ratio at which neither outcome has grown beyond the threshold, where one can.
fn hockey_stick(threshold: f64, logp: f64, side: Side) -> f64 {
    /// Error of the logarithm below, relative, rounded up.
    const DOUBT: f64 = 1e-30;
    let gain = Dd::of(threshold) - Dd::of(1.0);
    let root = match side {
        Side::Upper => gain.ln_1p(),
        Side::Lower => (-(gain / Places::<Dd>::new(logp).odds)).ln_1p(),
    };
    if root.hi == 0.0 || root.hi.is_nan() {
        return side.zero();
    }
    let beyond = side.outward(root.lo);
    let inside = if beyond > DOUBT * root.hi.abs() { root.hi } else { side.inwards(root.hi) };
    side.nearer(inside, side.pick(-f64::MAX, -logp))
}
