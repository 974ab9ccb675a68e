//! Loss and gradient of a token, given its ratio and its bounds.
//!
//! `x = new - old` is the log-ratio (unless one is given), clamped to
//! `±`[`LOG_RATIO_LIMIT`](crate::LOG_RATIO_LIMIT), and `r = e^x`. A token is *beyond* its bound if `A > 0` and
//! `r > upper`, or if `A < 0` and `r < lower`. `sg` stops the gradient:
//!
//! | surrogate | loss | gradient with respect to `new` |
//! |---|---|---|
//! | min-clip (PPO; dual clip c: arXiv 1912.09729) | `-A min(r, upper)` for `A > 0`, `min(-A max(r, lower), -A c)` for `A < 0` | `-A r`; 0 beyond, where `A < 0` and `r >= c`, and where the clamp acts |
//! | mask (DPPO, arXiv 2602.04879) | `-A sg(min(r, c)) new`; 0 beyond | `-A min(r, c)`; 0 beyond |
//! | weight (CISPO, arXiv 2506.13585) | `-A sg(clip(r, lower, upper)) new` | `-A clip(r, lower, upper)` |
//! | gradient-preserving (CE-GPPO, arXiv 2509.20712) | `-A r`; beyond `-A beta bound r/sg(r)` | `-A r` but 0 where the clamp acts; beyond `-A beta bound` |
//!
//! A token at its bound is not beyond it. Only one side of each token is looked up: the side that the sign of the
//! advantage selects, or for weight the sign of `x`.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::error::{Error, Result};
use crate::simd::lanes::Lanes;

/// Rule that makes a loss of a token's ratio and bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Surrogate {
    /// PPO's.
    MinClip {
        /// Max ratio for `A < 0`, above 1.
        dual_clip: Option<f64>,
    },
    /// DPPO's.
    Mask {
        /// Max weight, above 1.
        truncation: Option<f64>,
    },
    /// CISPO's.
    Weight,
    /// CE-GPPO's.
    GradientPreserving {
        /// Factor of the gradient below the lower bound, finite and at least 0.
        beta_low: f64,
        /// Factor of the gradient above the upper bound, finite and at least 0.
        beta_high: f64,
    },
}

impl Surrogate {
    /// The surrogate of a name, with its parameters in the order of its fields; an optional one may be missing.
    ///
    /// ```
    /// use bandpo::surrogate::Surrogate;
    ///
    /// assert_eq!(Surrogate::new("mask", &[5.0])?, Surrogate::Mask { truncation: Some(5.0) });
    /// assert!(Surrogate::new("mask", &[0.5]).is_err());
    /// # Ok::<(), bandpo::error::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Argument`] if no surrogate has this name and number of parameters, or if a parameter is out of
    /// range.
    pub fn new(name: &str, parameters: &[f64]) -> Result<Self> {
        let optional = parameters.first().copied();
        let surrogate = match (name, parameters) {
            ("min-clip", [] | [_]) => Self::MinClip { dual_clip: optional },
            ("mask", [] | [_]) => Self::Mask { truncation: optional },
            ("weight", []) => Self::Weight,
            ("gradient-preserving", &[beta_low, beta_high]) => {
                Self::GradientPreserving { beta_low, beta_high }
            }
            _ => {
                return Err(Error::Argument {
                    argument: "surrogate",
                    value: format!("{name} with {} parameters", parameters.len()),
                    allowed: "min-clip, mask, weight or gradient-preserving with its parameters",
                });
            }
        };
        surrogate.check()?;
        Ok(surrogate)
    }

    /// Each parameter's name, value and range.
    fn parameters(self) -> [Option<(&'static str, f64, Range)>; 2] {
        let above_one = |name, value: Option<f64>| value.map(|value| (name, value, ABOVE_ONE));
        match self {
            Self::MinClip { dual_clip } => [above_one("dual_clip", dual_clip), None],
            Self::Mask { truncation } => [above_one("truncation", truncation), None],
            Self::Weight => [None, None],
            Self::GradientPreserving { beta_low, beta_high } => {
                [Some(("beta_low", beta_low, FACTOR)), Some(("beta_high", beta_high, FACTOR))]
            }
        }
    }

    pub(crate) fn check(self) -> Result<()> {
        for (argument, value, Range { allowed, contains }) in
            self.parameters().into_iter().flatten()
        {
            if !contains(value) {
                return Err(Error::Argument { argument, value: value.to_string(), allowed });
            }
        }
        Ok(())
    }
}

/// Range of a parameter. None contains NaN.
struct Range {
    allowed: &'static str,
    contains: fn(f64) -> bool,
}

const ABOVE_ONE: Range = Range { allowed: "above 1", contains: |value| value > 1.0 };
const FACTOR: Range = Range {
    allowed: "finite and at least 0",
    contains: |value| (0.0..f64::INFINITY).contains(&value),
};

/// Formulas of a surrogate.
pub(crate) trait Rule: Copy + Sync {
    /// True if the sign of the log-ratio selects a token's bound, false if that of the advantage does.
    const BY_LOG_RATIO: bool;

    fn apply<L: Lanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L>;
}

/// A vector of tokens. Tokens that do not count have numbers of 0 and a ratio of 1.
pub(crate) struct TokenVector<L: Lanes> {
    pub log_prob: L::Float,
    pub neg_advantage: L::Float,
    /// Clamped.
    pub log_ratio: L::Float,
    pub ratio: L::Float,
    /// Gradient without the rule: `neg_advantage * ratio`.
    pub unclipped: L::Float,
    /// Bound as a ratio where the token is beyond it, otherwise 0.
    pub clipped_ratio: L::Float,
    /// Tokens whose log-ratio was clamped.
    pub clamped: L::Mask,
    /// Tokens beyond their bound.
    pub beyond: L::Mask,
    /// Tokens that the lower bound holds for.
    pub lower: L::Mask,
}

/// Result of a rule.
pub(crate) struct Outcome<L: Lanes> {
    pub loss: L::Float,
    /// With respect to `log_prob`.
    pub gradient: L::Float,
    /// Tokens within their bound whose ratio the rule limits.
    pub limited: L::Mask,
}

#[derive(Clone, Copy)]
pub(crate) struct MinClip {
    pub dual_clip: Option<f64>,
}

impl Rule for MinClip {
    const BY_LOG_RATIO: bool = false;

    #[inline(always)]
    fn apply<L: Lanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L> {
        let &TokenVector { neg_advantage, log_ratio, unclipped, clamped, beyond, lower, .. } =
            tokens;
        let ratio = lanes.select(beyond, tokens.clipped_ratio, tokens.ratio);
        let (limited, ratio) = match self.dual_clip {
            None => (lanes.and_not(beyond, beyond), ratio),
            Some(c) => {
                let reached = lanes.less_or_equal(lanes.splat(c.ln()), log_ratio);
                let limited = lanes.and(lower, reached);
                (limited, lanes.select(limited, lanes.splat(c), ratio))
            }
        };
        let flat = lanes.or(clamped, lanes.or(beyond, limited));
        let gradient = lanes.select(flat, lanes.splat(0.0), unclipped);
        Outcome { loss: lanes.mul(neg_advantage, ratio), gradient, limited }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Mask {
    pub truncation: Option<f64>,
}

impl Rule for Mask {
    const BY_LOG_RATIO: bool = false;

    #[inline(always)]
    fn apply<L: Lanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L> {
        let &TokenVector { log_prob, neg_advantage, ratio, beyond, .. } = tokens;
        let zero = lanes.splat(0.0);
        let (limited, weight) = match self.truncation {
            None => (lanes.and_not(beyond, beyond), ratio),
            Some(c) => {
                let c = lanes.splat(c);
                let limited = lanes.and_not(lanes.less(c, ratio), beyond);
                (limited, lanes.select(limited, c, ratio))
            }
        };
        let gradient = lanes.mul(neg_advantage, weight);
        let loss = lanes.select(beyond, zero, lanes.mul(gradient, log_prob));
        Outcome { loss, gradient: lanes.select(beyond, zero, gradient), limited }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Weight;

impl Rule for Weight {
    const BY_LOG_RATIO: bool = true;

    #[inline(always)]
    fn apply<L: Lanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L> {
        let &TokenVector { log_prob, neg_advantage, ratio, clipped_ratio, beyond, .. } = tokens;
        let gradient = lanes.mul(neg_advantage, lanes.select(beyond, clipped_ratio, ratio));
        let limited = lanes.and_not(beyond, beyond);
        Outcome { loss: lanes.mul(gradient, log_prob), gradient, limited }
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
    fn apply<L: Lanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L> {
        let &TokenVector { neg_advantage, ratio, clipped_ratio, clamped, beyond, lower, .. } =
            tokens;
        let beta = lanes.select(lower, lanes.splat(self.beta_low), lanes.splat(self.beta_high));
        let kept = lanes.select(beyond, lanes.mul(beta, clipped_ratio), ratio);
        let loss = lanes.mul(neg_advantage, kept);
        let flat = lanes.and_not(clamped, beyond);
        let gradient = lanes.select(flat, lanes.splat(0.0), loss);
        Outcome { loss, gradient, limited: lanes.and_not(beyond, beyond) }
    }
}
