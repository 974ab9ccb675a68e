//! What becomes of a token, given its ratio and its bounds.
//!
//! With the log-ratio `x = new - old` (or one that is given) clamped to `±`[`LOG_RATIO_LIMIT`](crate::loss::LOG_RATIO_LIMIT),
//! `r = e^x`, and the bounds of the token, `beyond` means `A > 0` and `r > upper`, or `A < 0` and
//! `r < lower`; `sg` stops the gradient:
//!
//! | surrogate | loss | gradient with respect to `new` |
//! |---|---|---|
//! | min-clip (PPO; dual clip c: arXiv 1912.09729) | `-A min(r, upper)` for `A > 0`, `min(-A max(r, lower), -A c)` for `A < 0` | `-A r`; 0 beyond, where `A < 0` and `r >= c`, and where the clamp acts |
//! | mask (DPPO, arXiv 2602.04879) | `-A sg(min(r, c)) new`; 0 beyond | `-A min(r, c)`; 0 beyond |
//! | weight (CISPO, arXiv 2506.13585) | `-A sg(clip(r, lower, upper)) new` | `-A clip(r, lower, upper)` |
//! | gradient-preserving (CE-GPPO, arXiv 2509.20712) | `-A r`; beyond `-A beta bound r/sg(r)` | `-A r` but 0 where the clamp acts; beyond `-A beta bound` |
//!
//! At `r` equal to a bound a token is not beyond it. Only one side of each token is looked up: the one
//! that the sign of the advantage selects, and for weight the one that the sign of `x` selects.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::error::{Error, Result};
use crate::simd::lanes::Lanes;

/// What a token's loss is, given its ratio and its bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Surrogate {
    /// PPO's.
    MinClip {
        /// Greatest ratio for `A < 0`, above 1.
        dual_clip: Option<f64>,
    },
    /// DPPO's.
    Mask {
        /// Greatest weight, above 1.
        truncation: Option<f64>,
    },
    /// CISPO's.
    Weight,
    /// CE-GPPO's.
    GradientPreserving {
        /// Factor of the gradient below the lower bound, finite and at least 0.
        beta_low: f64,
        /// Factor above the upper bound, likewise.
        beta_high: f64,
    },
}

impl Surrogate {
    pub(crate) fn check(self) -> Result<()> {
        let refuse = |argument, value: f64, allowed| {
            Err(Error::Argument { argument, value: value.to_string(), allowed })
        };
        match self {
            Self::MinClip { dual_clip: Some(c) } if c.is_nan() || c <= 1.0 => {
                refuse("dual_clip", c, "above 1")
            }
            Self::Mask { truncation: Some(c) } if c.is_nan() || c <= 1.0 => {
                refuse("truncation", c, "above 1")
            }
            Self::GradientPreserving { beta_low, beta_high } => {
                for (argument, beta) in [("beta_low", beta_low), ("beta_high", beta_high)] {
                    if !(0.0..f64::INFINITY).contains(&beta) {
                        return refuse(argument, beta, "finite and at least 0");
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// What becomes of tokens that are beyond their bound.
pub(crate) trait Rule: Copy + Sync {
    /// Whether the sign of the log-ratio says which bound holds for a token, and not that of the advantage.
    const BY_LOG_RATIO: bool;

    /// Losses, gradients, and where the rule limits what is not beyond its bound. The ratios are beyond it
    /// where `stop`, which is the bound there, is not 0.
    fn apply<L: Lanes>(self, lanes: L, tokens: &Vector<L>, stop: L::Float) -> Applied<L>;
}

/// What a rule is told of a vector of tokens. Where one does not count, its numbers are 0, its ratio 1.
pub(crate) struct Vector<L: Lanes> {
    pub log_prob: L::Float,
    /// Minus the advantage.
    pub cost: L::Float,
    pub log_ratio: L::Float,
    pub ratio: L::Float,
    /// The product of both.
    pub free: L::Float,
    /// Where the log-ratio was beyond what is exponentiated.
    pub clamped: L::Mask,
    pub beyond: L::Mask,
    /// Where the lower bound holds.
    pub down: L::Mask,
}

pub(crate) struct Applied<L: Lanes> {
    pub loss: L::Float,
    pub slope: L::Float,
    pub limited: L::Mask,
}

#[derive(Clone, Copy)]
pub(crate) struct MinClip {
    pub dual_clip: Option<f64>,
}

impl Rule for MinClip {
    const BY_LOG_RATIO: bool = false;

    #[inline(always)]
    fn apply<L: Lanes>(self, lanes: L, tokens: &Vector<L>, stop: L::Float) -> Applied<L> {
        let &Vector { cost, log_ratio, ratio, free, clamped, beyond, down, .. } = tokens;
        let stopped = lanes.select(beyond, stop, ratio);
        let (limited, stopped) = match self.dual_clip {
            None => (lanes.and_not(beyond, beyond), stopped),
            Some(c) => {
                let reached = lanes.less_or_equal(lanes.splat(c.ln()), log_ratio);
                let limited = lanes.and(down, reached);
                (limited, lanes.select(limited, lanes.splat(c), stopped))
            }
        };
        let flat = lanes.or(clamped, lanes.or(beyond, limited));
        let slope = lanes.select(flat, lanes.splat(0.0), free);
        Applied { loss: lanes.mul(cost, stopped), slope, limited }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Mask {
    pub truncation: Option<f64>,
}

impl Rule for Mask {
    const BY_LOG_RATIO: bool = false;

    #[inline(always)]
    fn apply<L: Lanes>(self, lanes: L, tokens: &Vector<L>, _: L::Float) -> Applied<L> {
        let &Vector { log_prob, cost, ratio, beyond, .. } = tokens;
        let zero = lanes.splat(0.0);
        let (limited, weight) = match self.truncation {
            None => (lanes.and_not(beyond, beyond), ratio),
            Some(c) => {
                let c = lanes.splat(c);
                let limited = lanes.and_not(lanes.less(c, ratio), beyond);
                (limited, lanes.select(limited, c, ratio))
            }
        };
        let slope = lanes.mul(cost, weight);
        let loss = lanes.select(beyond, zero, lanes.mul(slope, log_prob));
        Applied { loss, slope: lanes.select(beyond, zero, slope), limited }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Weight;

impl Rule for Weight {
    const BY_LOG_RATIO: bool = true;

    #[inline(always)]
    fn apply<L: Lanes>(self, lanes: L, tokens: &Vector<L>, stop: L::Float) -> Applied<L> {
        let &Vector { log_prob, cost, ratio, beyond, .. } = tokens;
        let slope = lanes.mul(cost, lanes.select(beyond, stop, ratio));
        let limited = lanes.and_not(beyond, beyond);
        Applied { loss: lanes.mul(slope, log_prob), slope, limited }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct GradientPreserving {
    pub beta_low: f64,
    pub beta_high: f64,
}

impl Rule for GradientPreserving {
    const BY_LOG_RATIO: bool = false;

    #[inline(always)]
    fn apply<L: Lanes>(self, lanes: L, tokens: &Vector<L>, stop: L::Float) -> Applied<L> {
        let &Vector { cost, ratio, clamped, beyond, down, .. } = tokens;
        let beta = lanes.select(down, lanes.splat(self.beta_low), lanes.splat(self.beta_high));
        let kept = lanes.select(beyond, lanes.mul(beta, stop), ratio);
        let loss = lanes.mul(cost, kept);
        let flat = lanes.and_not(clamped, beyond);
        let slope = lanes.select(flat, lanes.splat(0.0), loss);
        Applied { loss, slope, limited: lanes.and_not(beyond, beyond) }
    }
}
