//! `D` in double-double arithmetic.

use crate::band::split::{gone, weighted};
use crate::divergence::{Generator, Point};
use crate::number::{Dd, Real};

/// `D` with about 30 digits.
pub(super) fn exact_divergence(generator: &Generator, logp: f64, log_ratio: f64) -> Dd {
    ExactSplit::new(logp).divergence(generator, log_ratio)
}

/// The probabilities of the token and of everything else with about 30 digits, and their odds.
pub(super) struct ExactSplit {
    logp: f64,
    token: Dd,
    others: Dd,
    odds: Dd,
}

impl ExactSplit {
    pub(super) fn new(logp: f64) -> Self {
        let minus = Dd::of(logp).exp_m1();
        // A small p would cancel as 1 - (1 - p).
        let token = if minus.hi < -0.5 { Dd::of(logp).exp() } else { minus + Dd::of(1.0) };
        Self { logp, token, others: -minus, odds: token / -minus }
    }

    /// `D` with about 30 digits.
    pub(super) fn divergence(&self, generator: &Generator, log_ratio: f64) -> Dd {
        let (token, others) = if log_ratio == f64::NEG_INFINITY {
            (gone(), Point::from_ratio(Dd::of(1.0) / self.others))
        } else {
            let token = Point::from_log(Dd::of(log_ratio));
            let lost = self.odds * token.excess;
            let others = if lost.hi > 0.5 {
                // Next to saturation the ratio of the others is computed without cancellation.
                let left = -Dd::sum(self.logp, log_ratio).exp_m1() / self.others;
                if left.hi <= 0.0 { gone() } else { Point::from_ratio(left) }
            } else {
                Point::from_excess(-lost)
            };
            (token, others)
        };
        weighted(generator, self.token, token) + weighted(generator, self.others, others)
    }
}
