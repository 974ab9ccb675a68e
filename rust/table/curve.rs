//! Curves that a table is built from.

use rayon::prelude::*;

use crate::band::price::PriceBand;
use crate::band::root::last_inside;
use crate::band::{Band, Side};
use crate::error::{Error, Result};
use crate::image::FAR;

/// Min tokens that a thread solves at a time.
const MIN_PART: usize = 32;

/// Bound of one side over a stretch of `y = -logp`.
pub enum Curve<'a> {
    /// The same ratio for every token.
    Constant(f64),
    /// The bound of a band, or of the region of a price.
    Band(&'a dyn Solved),
    /// A smooth function.
    Sampled(&'a Sampler<'a>),
}

/// A region whose bounds are solved for, and their slopes.
pub trait Solved: Sync {
    /// The log bound of a side.
    fn log_bound(&self, logp: f64, side: Side) -> f64;
    /// `d log bound / d logp` at a log bound.
    fn slope_at(&self, logp: f64, log_bound: f64) -> f64;
}

impl Solved for Band {
    fn log_bound(&self, logp: f64, side: Side) -> f64 {
        self.bound(logp, side).log_ratio
    }
    fn slope_at(&self, logp: f64, log_bound: f64) -> f64 {
        self.log_slope(logp, log_bound)
    }
}

impl Solved for PriceBand {
    fn log_bound(&self, logp: f64, side: Side) -> f64 {
        self.bound(logp, side).log_ratio
    }
    fn slope_at(&self, logp: f64, log_bound: f64) -> f64 {
        self.log_slope(logp, log_bound)
    }
}

/// A function from old log-probabilities to log bounds and their slopes in `logp`.
pub type Sampler<'a> = dyn Fn(Side, &[f64]) -> Result<Vec<(f64, f64)>> + Sync + 'a;

/// A function from old log-probabilities to exact `(log_lower, log_upper)`.
pub type Exact<'a> = dyn Fn(&[f64]) -> Result<(Vec<f64>, Vec<f64>)> + 'a;

/// Curves, each with the `y` it begins at. The first begins at 0, and kinks are where curves meet.
pub type Stretches<'a> = Vec<(f64, Curve<'a>)>;

impl Curve<'_> {
    /// Tabulated values of a side (`log_upper` or `lower`) and their slopes in `y`.
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
                .with_min_len(MIN_PART)
                .map(|&y| {
                    let log_bound = band.log_bound(-y, side);
                    tabulated(log_bound, band.slope_at(-y, log_bound))
                })
                .collect()),
            Self::Sampled(sampler) => {
                let logp: Vec<f64> = ys.iter().map(|y| -y).collect();
                let sampled = sampler(side, &logp)?;
                Error::check_length("the samples of a curve", sampled.len(), ys.len())?;
                Ok(sampled.into_iter().map(|(bound, slope)| tabulated(bound, slope)).collect())
            }
        }
    }

    /// The `y` up to which (upper side) or from which (lower side) everything is allowed.
    pub(super) fn saturation(&self, side: Side) -> Result<Option<f64>> {
        let allows_everything = |y: f64| -> Result<bool> {
            Ok(match (self, side) {
                (Self::Constant(_), _) => false,
                (Self::Band(band), Side::Upper) => band.log_bound(-y, side) >= y,
                (Self::Band(band), Side::Lower) => band.log_bound(-y, side) == f64::NEG_INFINITY,
                (Self::Sampled(sampler), _) => {
                    let bound = sampler(side, &[-y])?.first().map_or(f64::NAN, |bound| bound.0);
                    if side == Side::Upper { bound >= y } else { bound == f64::NEG_INFINITY }
                }
            })
        };
        let min = f64::from(f32::from_bits(1));
        let (near, far) = (allows_everything(min)?, allows_everything(FAR)?);
        Ok(match side {
            Side::Upper if !near => None,
            Side::Upper if far => Some(FAR),
            Side::Lower if near => Some(0.0),
            Side::Lower if !far => None,
            _ => {
                let mut failure = None;
                let edge = last_inside(min, FAR, |y| match allows_everything(y) {
                    Ok(allows) => allows == near,
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
