//! Loss and gradient of a token, given its ratio and its bounds.
//!
//! `x = new - old` is the log-ratio (unless one is given), and `r = e^x`. A token is *beyond* its bound if `A > 0`
//! and `r > upper`, or if `A < 0` and `r < lower`. In losses and gradients, logarithms of `r` and of its bounds are
//! clamped to `±`[`LOG_RATIO_LIMIT`](crate::LOG_RATIO_LIMIT). `sg` stops the gradient:
//!
//! | surrogate | loss | gradient with respect to `new` |
//! |---|---|---|
//! | min-clip (PPO; dual clip c: arXiv 1912.09729) | `-A min(r, upper)` for `A > 0`, `min(-A max(r, lower), -A c)` for `A < 0` | `-A r`; 0 beyond, where `A < 0` and `r >= c`, and where the clamp acts |
//! | mask (DPPO, arXiv 2602.04879) | `-A sg(min(r, c)) new`; 0 beyond | `-A min(r, c)`; 0 beyond |
//! | weight (CISPO, arXiv 2506.13585) | `-A sg(clip(r, lower, upper)) new` | `-A clip(r, lower, upper)` |
//! | mask, symmetric (IPO) | as mask, with beyond on either side whatever the sign of `A` | likewise |
//! | gradient-preserving (CE-GPPO, arXiv 2509.20712) | `-A r`; beyond `-A beta bound r/sg(r)` | `-A r` but 0 where the clamp acts; beyond `-A beta bound` |
//! | soft-gate (SAPO, arXiv 2511.20347) | `-A (2/t + 2w/t tanh(z/2))`, `z = t (r - 1)/w` | `-A r sech^2(z/2)`; 0 where the clamp acts |
//! | quadratic (SPO, arXiv 2401.16025) | `-A r + abs(A) (r - 1)^2/(2w)` | `-A r (1 - sign(A) (r - 1)/w)`; 0 where the clamp acts |
//!
//! `w` is the width of the region on the side of `r`, `upper - 1` or `1 - lower`, at least [`MIN_WIDTH`]; `t` is
//! `tau_positive` for `A > 0`, otherwise `tau_negative`.
//!
//! A token at its bound is not beyond it. Only one side of each token is looked up: the side that the sign of the
//! advantage selects, or for weight, the symmetric mask and the two rules with a width the sign of `x`.
//!
//! With an anchor the bounds limit `v = e^(new - anchor)` in place of r. The clipped ratio is the bound times
//! anchor/old. The two rules with a width take `v - 1` for `r - 1`, and their loss is multiplied by r/v. So the
//! gradient is still `-A r` times a factor.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use std::marker::PhantomData;

use crate::error::{Error, Result};
use crate::loss::nan::dropped;
use crate::simd::LossLanes;
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
        /// Whether a token outside on either side is dropped, whatever the sign of its advantage.
        symmetric: bool,
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
    /// SAPO's.
    SoftGate {
        /// Sharpness for `A > 0`, finite and above 0.
        tau_positive: f64,
        /// Sharpness for other advantages, finite and above 0.
        tau_negative: f64,
    },
    /// SPO's.
    Quadratic,
}

impl Surrogate {
    /// The surrogate of a name, with its parameters in the order of its fields. An optional one may be missing, or
    /// infinite for none; a flag is 0 or 1.
    ///
    /// ```
    /// use bandpo::surrogate::Surrogate;
    ///
    /// let mask = Surrogate::Mask { truncation: Some(5.0), symmetric: false };
    /// assert_eq!(Surrogate::new("mask", &[5.0])?, mask);
    /// assert!(Surrogate::new("mask", &[0.5]).is_err());
    /// # Ok::<(), bandpo::error::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Argument`] if no surrogate has this name and number of parameters, or if a parameter is out of
    /// range.
    pub fn new(name: &str, parameters: &[f64]) -> Result<Self> {
        let optional = parameters.first().copied().filter(|&limit| limit != f64::INFINITY);
        let surrogate = match (name, parameters) {
            ("min-clip", [] | [_]) => Self::MinClip { dual_clip: optional },
            ("mask", [] | [_] | [_, 0.0]) => Self::Mask { truncation: optional, symmetric: false },
            ("mask", [_, 1.0]) => Self::Mask { truncation: optional, symmetric: true },
            ("weight", []) => Self::Weight,
            ("gradient-preserving", &[beta_low, beta_high]) => {
                Self::GradientPreserving { beta_low, beta_high }
            }
            ("soft-gate", &[tau_positive, tau_negative]) => {
                Self::SoftGate { tau_positive, tau_negative }
            }
            ("quadratic", []) => Self::Quadratic,
            _ => {
                return Err(Error::Argument {
                    argument: "surrogate",
                    value: format!("{name} with parameters {parameters:?}"),
                    allowed: "min-clip, mask, weight, gradient-preserving, soft-gate or quadratic with its \
                              parameters",
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
            Self::Mask { truncation, .. } => [above_one("truncation", truncation), None],
            Self::Weight | Self::Quadratic => [None, None],
            Self::GradientPreserving { beta_low, beta_high } => {
                [Some(("beta_low", beta_low, FACTOR)), Some(("beta_high", beta_high, FACTOR))]
            }
            Self::SoftGate { tau_positive, tau_negative } => [
                Some(("tau_positive", tau_positive, POSITIVE)),
                Some(("tau_negative", tau_negative, POSITIVE)),
            ],
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
const POSITIVE: Range =
    Range { allowed: "finite and above 0", contains: |value| value > 0.0 && value < f64::INFINITY };

/// Min width of a region for the rules that divide by it. Where the old probability is 1 in its precision the upper
/// width is 0, and a log-prob that rounding puts above 0 must not make the loss infinite.
pub const MIN_WIDTH: f64 = 1e-6;

/// Part of a token's bounds that a rule needs. A type of its own, so that steps before the rule are compiled once for all
/// rules that need the same.
pub(crate) trait Selection: Copy + Sync {
    /// True if the sign of the log-ratio selects a token's bound, false if that of the advantage does.
    const BY_LOG_RATIO: bool;
    /// True if the width of the region at every token matters, not only which tokens are beyond their bound. Such
    /// a rule is by the log-ratio.
    const NEEDS_WIDTH: bool = false;
}

/// The bound on the side of the advantage's sign.
#[derive(Clone, Copy)]
pub(crate) struct ByAdvantage;

impl Selection for ByAdvantage {
    const BY_LOG_RATIO: bool = false;
}

/// The bound on the side of the log-ratio's sign.
#[derive(Clone, Copy)]
pub(crate) struct ByLogRatio;

impl Selection for ByLogRatio {
    const BY_LOG_RATIO: bool = true;
}

/// The width of the region on the side of the log-ratio's sign.
#[derive(Clone, Copy)]
pub(crate) struct Width;

impl Selection for Width {
    const BY_LOG_RATIO: bool = true;
    const NEEDS_WIDTH: bool = true;
}

/// Formulas of a surrogate.
pub(crate) trait Rule: Copy + Sync {
    type Selection: Selection;

    fn apply<L: LossLanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L>;
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
    /// Width of the region, at least [`MIN_WIDTH`].
    pub width: L::Float,
    /// `v - 1`, where v is the ratio that the bounds limit.
    pub excess: L::Float,
    /// `r/v`.
    pub loss_scale: L::Float,
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
    type Selection = ByAdvantage;

    #[inline(always)]
    fn apply<L: LossLanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L> {
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

/// A mask on the side of the advantage's sign, or on both sides.
#[derive(Clone, Copy)]
pub(crate) struct Mask<S> {
    pub truncation: Option<f64>,
    pub selection: PhantomData<S>,
}

impl<S: Selection> Rule for Mask<S> {
    type Selection = S;

    #[inline(always)]
    fn apply<L: LossLanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L> {
        let &TokenVector { log_prob, neg_advantage, ratio, beyond, .. } = tokens;
        let zero = lanes.splat(0.0);
        // A token beyond on the side of its advantage has a side, and so no NaN.
        let beyond = if S::BY_LOG_RATIO { dropped(lanes, beyond, neg_advantage) } else { beyond };
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
    type Selection = ByLogRatio;

    #[inline(always)]
    fn apply<L: LossLanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L> {
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
    type Selection = ByAdvantage;

    #[inline(always)]
    fn apply<L: LossLanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L> {
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

#[derive(Clone, Copy)]
pub(crate) struct SoftGate {
    pub tau_positive: f64,
    pub tau_negative: f64,
}

impl Rule for SoftGate {
    type Selection = Width;

    #[inline(always)]
    fn apply<L: LossLanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L> {
        let &TokenVector { neg_advantage, unclipped, width, excess, loss_scale, .. } = tokens;
        let (zero, one, two) = (lanes.splat(0.0), lanes.splat(1.0), lanes.splat(2.0));
        let gains = lanes.less(neg_advantage, zero);
        let tau =
            lanes.select(gains, lanes.splat(self.tau_positive), lanes.splat(self.tau_negative));
        let size = lanes.abs(lanes.div(lanes.mul(tau, excess), width));
        // tanh and sech^2 of half the size, from e^-size.
        let falling = lanes.sub(zero, lanes.clamp_max(CLOSED, size));
        let exponential = lanes.exp_and_gap(falling);
        let sum = lanes.add(one, exponential.exp);
        let tanh = lanes.div(lanes.sub(zero, lanes.add(exponential.gap, falling)), sum);
        let open = lanes.div(lanes.mul(lanes.splat(4.0), exponential.exp), lanes.mul(sum, sum));
        let gate = lanes.select(lanes.less(lanes.splat(CLOSED), size), zero, open);
        let moved = lanes.div(lanes.mul(lanes.mul(two, width), tanh), tau);
        let moved = lanes.select(lanes.less(excess, zero), lanes.sub(zero, moved), moved);
        let value = lanes.mul(loss_scale, lanes.add(lanes.div(two, tau), moved));
        Outcome {
            loss: lanes.mul(neg_advantage, value),
            gradient: lanes.select(tokens.clamped, zero, lanes.mul(unclipped, gate)),
            limited: lanes.and_not(gains, gains),
        }
    }
}

/// Argument from which a gate counts as closed: `sech^2` of its half is below the rounding error of 1.
const CLOSED: f64 = 40.0;

#[derive(Clone, Copy)]
pub(crate) struct Quadratic;

impl Rule for Quadratic {
    type Selection = Width;

    #[inline(always)]
    fn apply<L: LossLanes>(self, lanes: L, tokens: &TokenVector<L>) -> Outcome<L> {
        let &TokenVector { neg_advantage, unclipped, ratio, width, excess, loss_scale, .. } =
            tokens;
        let (zero, one) = (lanes.splat(0.0), lanes.splat(1.0));
        let gains = lanes.less(neg_advantage, zero);
        let share = lanes.div(excess, width);
        let share = lanes.select(gains, share, lanes.sub(zero, share));
        let half = lanes.mul(lanes.splat(0.5), lanes.mul(loss_scale, excess));
        let kept = lanes.sub(ratio, lanes.mul(half, share));
        let slope = lanes.mul(unclipped, lanes.sub(one, share));
        Outcome {
            loss: lanes.mul(neg_advantage, kept),
            gradient: lanes.select(tokens.clamped, zero, slope),
            limited: lanes.and_not(gains, gains),
        }
    }
}
