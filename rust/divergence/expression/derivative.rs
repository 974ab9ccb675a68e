//! The derivative of a text, and its limit at 0.

use super::evaluate::{Expression, FARTHEST, evaluate, widened};
use crate::divergence::point::Point;
use crate::number::wide::Wide;
use crate::number::{Dd, Real};

/// How far from 1, in `|ln u|`, double-double numbers hold a text.
const IN_RANGE: f64 = 600.0;

/// Relative change of f' over a doubling of `ln u` below which it has reached its limit.
const SETTLED: f64 = 1e-12;

impl Expression {
    /// `f'(u)` of the normalised f.
    pub(crate) fn derivative(&self, at: Point<Dd>) -> Dd {
        let t = at.log.to_f64();
        if t.abs() < IN_RANGE {
            let slope = evaluate(&self.node, at).slope / at.u - self.slope_at_one;
            if slope.to_f64().is_finite() {
                return slope;
            }
        }
        let at = if t.abs() < FARTHEST {
            widened(at)
        } else {
            Point::from_log(Wide::of(FARTHEST.copysign(t)))
        };
        (self.wide(at).slope / at.u).to_dd()
    }

    /// `f'(0)`: `-inf` unless f' no longer changes where texts end.
    pub(crate) fn derivative_at_zero(&self) -> Dd {
        let [near, far] =
            [0.5, 1.0].map(|share| self.derivative(Point::from_log(Dd::of(-share * FARTHEST))));
        let change = (far - near).to_f64().abs();
        if change <= SETTLED * far.to_f64().abs() { far } else { Dd::of(f64::NEG_INFINITY) }
    }
}
