//! Constants that the scalar and the vector solver share.

/// Max condition number of a log bound for which double precision suffices.
pub(super) const BENIGN_CONDITION: f64 = 3.0;

/// Max `m` for which the factor `e^-m` is a normal double.
pub(super) const MAX_LOG_LOSS: f64 = 708.0;

/// Relative move inwards that covers the error of double precision: 16 eps, 3.6e-15.
pub(super) const MARGIN: f64 = 16.0 * f64::EPSILON;

/// `ln` of the min p of the fast formulas. Below it products such as `p f(r)` leave the range of a double,
/// and the bits of the bound are halved instead.
pub(super) const FAR_TAIL: f64 = -690.9;

/// Min `1 - p` of the fast formulas, for the same reason as [`FAR_TAIL`].
pub(super) const FAR_REST: f64 = 1e-300;

/// Min radius of the solvers in doubles and double-doubles. Below it the digits of `D` are lost to underflow, and the
/// bits of the bound are halved in numbers of any size.
pub(super) const MIN_RADIUS: f64 = 1e-280;

/// Max radius of those solvers. A larger one takes powers of u whose exponent has lost digits of `D`.
pub(super) const MAX_RADIUS: f64 = 1e20;

/// Elements that a thread takes at a time.
pub(super) const CHUNK: usize = 1024;
