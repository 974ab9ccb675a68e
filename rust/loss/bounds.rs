//! Sources of bounds, and how the steps of a loss read them.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::image::Image;
use crate::loss::Float;
use crate::loss::columns::load;
use crate::simd::LossLanes;

/// Source of the tokens' bounds.
#[derive(Debug, Clone, Copy)]
pub enum BoundSource<'a, T> {
    /// Same log bounds for every token.
    Constant {
        /// At most 0.
        log_lower: T,
        /// At least 0.
        log_upper: T,
    },
    /// Table that the bounds are looked up in.
    Table(Image<'a>),
    /// Log bounds of every token.
    PerToken {
        /// At most 0 each.
        log_lower: &'a [T],
        /// At least 0 each.
        log_upper: &'a [T],
    },
}

/// Bounds of one side of each token: the lower side where `lower` is true.
pub(super) trait Bounds<T>: Sync {
    /// True if lower bounds are ratios. All other bounds are log-ratios.
    const LOWER_IS_RATIO: bool;

    /// Widths of the region below and above a ratio of 1, if all tokens share them. They are then the keys of a rule
    /// that needs no more.
    #[inline(always)]
    fn shared_widths(&self) -> Option<[f64; 2]> {
        None
    }

    /// Numbers that [`Self::find`] finds the bounds by, for the tokens from `index` on.
    ///
    /// # Safety
    /// As for [`load`].
    unsafe fn keys<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
        old_log_prob: L::Float,
        lower: L::Mask,
    ) -> L::Float;

    /// Safe distance: a log-ratio between 0 and this is not beyond its bound.
    fn reach<L: LossLanes<Scalar = T>>(&self, lanes: L, keys: L::Float, lower: L::Mask)
    -> L::Float;

    /// Bounds of the keys.
    fn find<L: LossLanes<Scalar = T>>(&self, lanes: L, keys: L::Float, lower: L::Mask) -> L::Float;
}

pub(super) struct Constant {
    pub(super) log_lower: f64,
    pub(super) log_upper: f64,
    pub(super) widths: [f64; 2],
}

impl<T> Bounds<T> for Constant {
    const LOWER_IS_RATIO: bool = false;

    #[inline(always)]
    fn shared_widths(&self) -> Option<[f64; 2]> {
        Some(self.widths)
    }

    #[inline(always)]
    unsafe fn keys<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &self,
        lanes: L,
        _: usize,
        _: L::Float,
        lower: L::Mask,
    ) -> L::Float {
        lanes.select(lower, lanes.splat(self.log_lower), lanes.splat(self.log_upper))
    }

    #[inline(always)]
    fn reach<L: LossLanes<Scalar = T>>(&self, _: L, keys: L::Float, _: L::Mask) -> L::Float {
        keys
    }

    #[inline(always)]
    fn find<L: LossLanes<Scalar = T>>(&self, _: L, keys: L::Float, _: L::Mask) -> L::Float {
        keys
    }
}

pub(super) struct PerToken<'a, T> {
    pub(super) log_lower: &'a [T],
    pub(super) log_upper: &'a [T],
}

impl<T: Float> Bounds<T> for PerToken<'_, T> {
    const LOWER_IS_RATIO: bool = false;

    #[inline(always)]
    unsafe fn keys<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
        _: L::Float,
        lower: L::Mask,
    ) -> L::Float {
        // SAFETY: required of the caller.
        let (low, high) = unsafe {
            (
                load::<WHOLE, L>(lanes, self.log_lower, index),
                load::<WHOLE, L>(lanes, self.log_upper, index),
            )
        };
        lanes.select(lower, low, high)
    }

    #[inline(always)]
    fn reach<L: LossLanes<Scalar = T>>(&self, _: L, keys: L::Float, _: L::Mask) -> L::Float {
        keys
    }

    #[inline(always)]
    fn find<L: LossLanes<Scalar = T>>(&self, _: L, keys: L::Float, _: L::Mask) -> L::Float {
        keys
    }
}

impl<T> Bounds<T> for Image<'_> {
    const LOWER_IS_RATIO: bool = true;

    #[inline(always)]
    unsafe fn keys<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &self,
        _: L,
        _: usize,
        old_log_prob: L::Float,
        _: L::Mask,
    ) -> L::Float {
        old_log_prob
    }

    #[inline(always)]
    fn reach<L: LossLanes<Scalar = T>>(
        &self,
        lanes: L,
        keys: L::Float,
        lower: L::Mask,
    ) -> L::Float {
        lanes.reach(*self, keys, lower)
    }

    #[inline(always)]
    fn find<L: LossLanes<Scalar = T>>(&self, lanes: L, keys: L::Float, lower: L::Mask) -> L::Float {
        lanes.look_up(*self, keys, lower)
    }
}
