//! Probability-aware clip bounds for policy-gradient ratios.
//!
//! PPO and GRPO clip every token's ratio `r = new/old` to one fixed interval. A *band* clips it to
//! the ratios for which an f-divergence trust region of radius `delta` still holds for the split
//! {this token, everything else}, given the token's old probability `p` (`BandPO`, arXiv 2603.04918):
//!
//! ```text
//! D_f(p, r) = p f(r) + (1-p) f((1 - r p)/(1-p)) <= delta
//! ```
//!
//! Data flows through the modules in this order:
//!
//! - [`divergence`]: the generator `f`;
//! - [`band`]: its exact bounds;
//! - [`table`]: the bounds as a lookup table;
//! - [`surrogate`]: the loss of a token, inside and outside its bounds;
//! - [`loss`]: the loss of a batch and its gradient in one pass.
//!
//! Formulas run on the types of [`number`]. [`KERNEL_SOURCE`] has the same rules for a GPU. Only the modules that are
//! compiled with the feature `python` depend on Python.

pub mod band;
pub mod divergence;
pub mod error;
#[cfg(test)]
#[path = "tests/fuzz.rs"]
mod fuzz;
mod image;
pub mod loss;
pub mod number;
mod simd;
#[cfg(any(feature = "python", test))]
mod spec;
pub mod table;
mod threads;

pub use loss::surrogate;
pub use number as real;

#[cfg(feature = "python")]
mod python;

/// Max magnitude of a log-ratio. Larger ones are clamped to it before they are exponentiated.
pub const LOG_RATIO_LIMIT: f64 = 20.0;

/// Joins files of `cuda/` to one string, in which `#line` keeps their names for messages of the compiler.
macro_rules! kernel_source {
    ($($file:literal),* $(,)?) => {
        concat!($("#line 1 \"", $file, "\"\n", include_str!(concat!("../cuda/", $file))),*)
    };
}

/// The CUDA kernels in one string without includes, because a compiler at run time has no headers.
pub const KERNEL_SOURCE: &str = kernel_source![
    "types.cuh",
    "math.cuh",
    "lookup.cuh",
    "rules.cuh",
    "generator.cuh",
    "solve.cuh",
    "batch.cuh",
    "totals.cuh",
    "loss.cu",
    "bounds.cu",
];
