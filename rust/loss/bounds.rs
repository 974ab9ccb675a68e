//! Where the bounds of tokens come from.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::image::Image;
use crate::loss::Float;
use crate::loss::columns::load;
use crate::simd::LossLanes;

/// Where the bounds come from.
#[derive(Debug, Clone, Copy)]
pub enum BoundSource<'a, T> {
    /// The same log bounds for every token.
    Constant {
        /// At most 0.
        log_lower: T,
        /// At least 0.
        log_upper: T,
    },
    /// A table.
    Table(Image<'a>),
    /// The log bounds of every token.
    PerToken {
        /// At most 0 each.
        log_lower: &'a [T],
        /// At least 0 each.
        log_upper: &'a [T],
    },
}

/// Where the bounds of tokens are. `lower` says of which side: where it is true, the lower one.
pub(super) trait Bounds<T>: Sync {
    /// Whether lower bounds are ratios. All others are log-ratios.
    const LOWER_IS_RATIO: bool;

    /// What the bounds are found by, of the tokens from `index` on.
    ///
    /// # Safety
    /// As of [`load`].
    unsafe fn keys<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
        old_log_prob: L::Float,
        lower: L::Mask,
    ) -> L::Float;

    /// The log-ratio up to which a token is surely not beyond its bound, of at least 0 or at most 0.
    fn reach<L: LossLanes<Scalar = T>>(&self, lanes: L, keys: L::Float, lower: L::Mask)
    -> L::Float;

    /// The bounds for such keys.
    fn find<L: LossLanes<Scalar = T>>(&self, lanes: L, keys: L::Float, lower: L::Mask) -> L::Float;
}

pub(super) struct Constant {
    pub(super) log_lower: f64,
    pub(super) log_upper: f64,
}

impl<T> Bounds<T> for Constant {
    const LOWER_IS_RATIO: bool = false;

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
        // SAFETY: as the caller says.
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
