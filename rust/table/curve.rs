//! Curves that a table is built from.

use rayon::prelude::*;

use crate::band::{Band, Side};
use crate::error::{Error, Result};
use crate::image::FAR;

/// Where the bound of one side comes from over a stretch of `y`.
pub enum Curve<'a> {
    /// The same ratio for every token.
    Constant(f64),
    /// A band.
    Band(&'a Band),
    /// Anything smooth: from old log-probabilities to log bounds and their slopes in logp.
    Sampled(&'a Sampler<'a>),
}

/// See [`Curve::Sampled`].
pub type Sampler<'a> = dyn Fn(Side, &[f64]) -> Result<Vec<(f64, f64)>> + Sync + 'a;

/// From old log-probabilities to exact `(log_lower, log_upper)`.
pub type Exact<'a> = dyn Fn(&[f64]) -> Result<(Vec<f64>, Vec<f64>)> + 'a;

/// Curves with the `y` where each begins, the first at 0: kinks are where one follows another.
pub type Stretches<'a> = Vec<(f64, Curve<'a>)>;

impl Curve<'_> {
    /// The tabulated values of a side at each `y`, and their derivatives in `y`.
    pub(super) fn sample(&self, side: Side, ys: &[f64]) -> Result<Vec<(f64, f64)>> {
        let tabulated = |log_bound: f64, log_slope: f64| match side {
            Side::Upper => (log_bound, -log_slope),
            Side::Lower => {
                let lower = log_bound.exp();
                (lower, if lower == 0.0 { 0.0 } else { -lower * log_slope })
            }
        };
        match self {
            Self::Constant(ratio) => {
                let value = if side == Side::Upper { ratio.ln() } else { *ratio };
                Ok(vec![(value, 0.0); ys.len()])
            }
            Self::Band(band) => Ok(ys
                .par_iter()
                .with_min_len(32)
                .map(|&y| {
                    let log_bound = band.bound(-y, side).log_ratio;
                    tabulated(log_bound, band.log_slope(-y, log_bound))
                })
                .collect()),
            Self::Sampled(sampler) => {
                let logp: Vec<f64> = ys.iter().map(|y| -y).collect();
                let sampled = sampler(side, &logp)?;
                if sampled.len() != ys.len() {
                    return Err(Error::Length {
                        argument: "the samples of a curve",
                        actual: sampled.len(),
                        expected: ys.len(),
                    });
                }
                Ok(sampled.into_iter().map(|(bound, slope)| tabulated(bound, slope)).collect())
            }
        }
    }

    /// Where the side stops (upper) or starts (lower) to allow everything, as `y`.
    pub(super) fn saturation(&self, side: Side) -> Result<Option<f64>> {
        let everything = |y: f64| -> Result<bool> {
            Ok(match (self, side) {
                (Self::Constant(_), _) => false,
                (Self::Band(band), Side::Upper) => band.bound(-y, side).log_ratio >= y,
                (Self::Band(band), Side::Lower) => {
                    band.bound(-y, side).log_ratio == f64::NEG_INFINITY
                }
                (Self::Sampled(sampler), _) => {
                    let bound = sampler(side, &[-y])?.first().map_or(f64::NAN, |bound| bound.0);
                    if side == Side::Upper { bound >= y } else { bound == f64::NEG_INFINITY }
                }
            })
        };
        let smallest = f64::from(f32::from_bits(1));
        // Everything is allowed next to p = 1 on the upper side, next to p = 0 on the lower.
        let (near, far) = (everything(smallest)?, everything(FAR)?);
        Ok(match side {
            Side::Upper if !near => None,
            Side::Upper if far => Some(FAR),
            Side::Lower if near => Some(0.0),
            Side::Lower if !far => None,
            _ => {
                let mut failure = None;
                let edge = crate::band::root::last_inside(smallest, FAR, |y| match everything(y) {
                    Ok(all) => all == near,
                    Err(error) => {
                        failure.get_or_insert(error);
                        false
                    }
                });
                if let Some(error) = failure {
                    return Err(error);
                }
                Some(edge.at)
            }
        })
    }
}
