//! Constants that the scalar and the vector solver share.

/// Condition number of a log bound up to which double precision suffices.
pub(super) const BENIGN_CONDITION: f64 = 3.0;

/// Largest `m` for which the factor `e^-m` is a normal double.
pub(super) const MAX_LOG_LOSS: f64 = 708.0;

/// Relative move inwards that covers the error of double precision: 16 eps, 3.6e-15.
pub(super) const MARGIN: f64 = 16.0 * f64::EPSILON;

/// `ln` of the smallest p that the fast formulas take; below it products such as `p f(r)` leave the
/// range of a double, and the bits of the bound are halved instead.
pub(super) const FAR_TAIL: f64 = -690.9;

/// The smallest `1 - p` that they take, likewise.
pub(super) const FAR_REST: f64 = 1e-300;

/// Elements a thread takes at a time.
pub(super) const CHUNK: usize = 1024;
