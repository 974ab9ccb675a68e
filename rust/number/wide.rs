//! [`Wide`]: a number of any size, with a bound of its rounding error.
//!
//! Expressions are judged in these numbers, and evaluated in them after an overflow, for two reasons:
//!
//! - a term of `(u^4 + 1)/u^3` overflows long before the quotient does;
//! - a slope that falls by 1e-20 either breaks convexity or is a rounding error. The size of the terms that
//!   cancelled decides which.

use std::ops::{Add, Div, Mul, Neg, Sub};

use crate::number::dd::LN_2_PARTS;
use crate::number::{Dd, Real};

/// Relative rounding error of one operation in double-double arithmetic, rounded up.
pub(crate) const ROUNDING: f64 = 1e-30;

/// Max exponent. A number beyond it is infinite, and below its negative 0 with an error. Up to it a double holds the
/// whole number nearest to `x/ln 2`.
const MAX_EXPONENT: i64 = 1 << 50;

/// Max magnitude of the exponent for which both parts of the number surely fit into doubles.
const MAX_DOUBLE_EXPONENT: i64 = 900;

/// `(digits +- error) 2^exponent`, by running error analysis (N. J. Higham, *Accuracy and Stability of
/// Numerical Algorithms*, 2nd ed., SIAM 2002, section 3.3). The larger of digits and error is in [1, 2).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wide {
    digits: Dd,
    error: f64,
    exponent: i64,
}

impl Wide {
    /// A number too small to be held: 0 with an error.
    const UNDERFLOW: Self =
        Self { digits: Dd { hi: 0.0, lo: 0.0 }, error: 1.0, exponent: -MAX_EXPONENT };

    fn new(digits: Dd, error: f64, exponent: i64) -> Self {
        let size = digits.hi.abs().max(error);
        if !size.is_finite() || digits.hi.is_nan() {
            // A number with an infinite error is unknown.
            let hi = if digits.hi.is_infinite() { digits.hi } else { f64::NAN };
            return Self { digits: Dd { hi, lo: 0.0 }, error: 0.0, exponent: 0 };
        }
        if size == 0.0 {
            return Self { digits, error, exponent: 0 };
        }
        if size < f64::MIN_POSITIVE {
            return Self::new(
                digits.scaled_by_power_of_two(500),
                error * 2f64.powi(500),
                exponent - 500,
            );
        }
        let shift = (size.to_bits() >> 52) as i32 - 1023;
        let exponent = exponent + i64::from(shift);
        if exponent < -MAX_EXPONENT {
            return Self::UNDERFLOW;
        }
        if exponent > MAX_EXPONENT {
            let hi = f64::INFINITY.copysign(digits.hi);
            return Self { digits: Dd { hi, lo: 0.0 }, error: 0.0, exponent: 0 };
        }
        let digits = digits.scaled_by_power_of_two(-shift);
        Self { digits, error: Dd::of(error).scaled_by_power_of_two(-shift).hi, exponent }
    }

    /// A function's value with its absolute error, to which rounding is added.
    fn of_function(value: Dd, error: f64) -> Self {
        Self::new(value, error + ROUNDING * value.hi.abs(), 0)
    }

    /// True if the number exceeds 0 by more than `times` its rounding error.
    pub(crate) fn is_above_error(self, times: f64) -> bool {
        self.digits.hi > times * self.error
    }

    /// `times` the rounding error.
    pub(crate) fn error_times(self, times: f64) -> Self {
        Self::new(Dd::of(self.error * times), 0.0, self.exponent)
    }

    /// The rounding error in [`ROUNDING`].
    pub(crate) fn roundings(self) -> f64 {
        self.absolute_error() / ROUNDING
    }

    /// True if the number is neither infinite nor unknown.
    pub(crate) fn is_finite(self) -> bool {
        self.digits.hi.is_finite()
    }

    /// The same number with the error of one more rounding.
    pub(crate) fn rounded(self) -> Self {
        Self { error: self.error + ROUNDING * self.digits.hi.abs(), ..self }
    }

    /// True for 0 without an error.
    pub(crate) fn is_zero(self) -> bool {
        self.digits.hi == 0.0 && self.error == 0.0
    }

    /// True for 1 without an error.
    pub(crate) fn is_one(self) -> bool {
        self.is_exact_double() && self.digits.hi == 1.0 && self.exponent == 0
    }

    /// True for a double without an error, up to its exponent.
    fn is_exact_double(self) -> bool {
        self.digits.lo == 0.0 && self.error == 0.0
    }

    /// The sum. That of two doubles has no error, which `+` adds as the error of a decimal.
    pub(crate) fn plus_exact(self, other: Self) -> Self {
        let sum = self + other;
        let (gap, overflow) = self.exponent.overflowing_sub(other.exponent);
        let near = self.is_zero() || other.is_zero() || !overflow && gap.abs() < 300;
        let is_exact = near && self.is_exact_double() && other.is_exact_double();
        if is_exact { Self { error: 0.0, ..sum } } else { sum }
    }

    /// The product. That of two doubles has no error.
    pub(crate) fn times_exact(self, other: Self) -> Self {
        let product = self * other;
        let is_exact = self.is_exact_double() && other.is_exact_double();
        if is_exact { Self { error: 0.0, ..product } } else { product }
    }

    /// The quotient. That by a power of two has no error.
    pub(crate) fn over_exact(self, other: Self) -> Self {
        let is_exact = other.is_exact_double() && other.digits.hi.abs() == 1.0;
        if is_exact {
            let digits = self.digits * other.digits;
            Self::new(digits, self.error, self.exponent - other.exponent)
        } else {
            self / other
        }
    }

    /// True if a double-double holds all digits.
    fn is_double(self) -> bool {
        self.exponent.abs() < MAX_DOUBLE_EXPONENT
    }

    /// The rounding error as a double.
    fn absolute_error(self) -> f64 {
        Self { digits: Dd::of(self.error), ..self }.to_dd().hi
    }
}

impl Neg for Wide {
    type Output = Self;
    fn neg(self) -> Self {
        Self { digits: -self.digits, ..self }
    }
}

impl Add for Wide {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        if !self.is_finite() || !other.is_finite() {
            return Self::of(self.digits.hi + other.digits.hi);
        }
        let (big, small) =
            if self.exponent >= other.exponent { (self, other) } else { (other, self) };
        if big.digits.hi == 0.0 && big.error == 0.0 {
            return small;
        }
        // Digits that are shifted farther are a small part of the rounding error.
        let shift = (big.exponent - small.exponent).min(300) as i32;
        let digits = big.digits + small.digits.scaled_by_power_of_two(-shift);
        let error = big.error + small.error * 2f64.powi(-shift) + ROUNDING * digits.hi.abs();
        Self::new(digits, error, big.exponent)
    }
}

impl Sub for Wide {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Mul for Wide {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let digits = self.digits * other.digits;
        let (a, b) = (self.digits.hi.abs(), other.digits.hi.abs());
        let error = a * other.error + b * self.error + self.error * other.error;
        Self::new(digits, error + ROUNDING * digits.hi.abs(), self.exponent + other.exponent)
    }
}

impl Div for Wide {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let digits = self.digits / other.digits;
        let size = digits.hi.abs();
        let error = if self.error == 0.0 && other.error == 0.0 {
            0.0
        } else {
            (self.error + size * other.error) / (other.digits.hi.abs() - other.error).max(0.0)
        };
        Self::new(digits, error + ROUNDING * size, self.exponent - other.exponent)
    }
}

impl Real for Wide {
    fn of(value: f64) -> Self {
        Self::of_dd(Dd::of(value))
    }

    fn of_dd(value: Dd) -> Self {
        Self::new(value, 0.0, 0)
    }

    fn to_dd(self) -> Dd {
        let near = self.digits.scaled_by_power_of_two(self.exponent.clamp(-2000, 2000) as i32);
        if near.hi.is_finite() { near } else { Dd::of(near.hi) }
    }

    fn to_f64(self) -> f64 {
        let nearest = self.to_dd().to_f64();
        if nearest == 0.0 && self.digits.hi != 0.0 {
            f64::MIN_POSITIVE.copysign(self.digits.hi)
        } else if nearest.is_infinite() && self.is_finite() {
            f64::MAX.copysign(self.digits.hi)
        } else {
            nearest
        }
    }

    fn exp(self) -> Self {
        let x = self.to_dd();
        if x.hi.is_nan() {
            return self;
        }
        if x.hi.abs() > MAX_EXPONENT as f64 * std::f64::consts::LN_2 {
            return if x.hi < 0.0 { Self::UNDERFLOW } else { Self::of(f64::INFINITY) };
        }
        let (exponent, minus_one) = x.reduced_exp_m1();
        let digits = minus_one + Dd::of(1.0);
        // Subtracting the multiples of ln 2 has an error relative to x.
        let relative = (self.absolute_error() + ROUNDING * (1.0 + x.hi.abs())).exp_m1();
        Self::new(digits, relative * digits.hi, exponent as i64)
    }

    fn exp_m1(self) -> Self {
        let x = self.to_dd();
        if self.exponent < -MAX_DOUBLE_EXPONENT {
            self.rounded()
        } else if x.hi.abs() < 0.34 {
            Self::of_function(x.exp_m1(), 2.0 * self.absolute_error())
        } else {
            self.exp() - Self::of(1.0)
        }
    }

    fn ln(self) -> Self {
        if !(self.digits.hi > 0.0 && self.is_finite()) {
            return Self::of(self.digits.hi.ln());
        }
        let error = self.error / (self.digits.hi - self.error).max(0.0);
        let value = if self.is_double() {
            self.to_dd().ln()
        } else {
            let [first, second, third] =
                LN_2_PARTS.map(|part| Dd::product(self.exponent as f64, part));
            self.digits.ln() + first + second + third
        };
        Self::of_function(value, if self.error == 0.0 { 0.0 } else { error } + ROUNDING)
    }

    fn ln_1p(self) -> Self {
        if self.exponent < -MAX_DOUBLE_EXPONENT {
            self.rounded()
        } else if self.to_dd().hi.abs() < 0.5 {
            Self::of_function(self.to_dd().ln_1p(), 2.0 * self.absolute_error())
        } else {
            (self + Self::of(1.0)).ln()
        }
    }

    fn sqrt(self) -> Self {
        if !self.is_finite() || self.digits.hi < 0.0 {
            return Self::of(self.digits.hi.sqrt());
        }
        let odd = self.exponent.rem_euclid(2);
        let digits = self.digits.scaled_by_power_of_two(odd as i32);
        let (root, error) = (digits.sqrt(), self.error * 2.0);
        let error = if root.hi > error.sqrt() { error / root.hi } else { error.sqrt() };
        Self::new(root, error + ROUNDING * root.hi, (self.exponent - odd) / 2)
    }

    fn powf(self, exponent: Self) -> Self {
        if self.digits.hi == 0.0 {
            return Self::of(0.0_f64.powf(exponent.to_f64()));
        }
        (self.ln() * exponent).exp()
    }

    fn sin(self) -> Self {
        self.periodic(Dd::sin)
    }

    fn cos(self) -> Self {
        self.periodic(Dd::cos)
    }

    fn abs(self) -> Self {
        if self.digits.hi < 0.0 { -self } else { self }
    }
}

impl Wide {
    /// Sine or cosine, by the function of a double-double.
    fn periodic(self, function: fn(Dd) -> Dd) -> Self {
        let x = self.to_dd();
        let error = self.absolute_error() + ROUNDING * (1.0 + x.hi.abs());
        // The result for a huge angle is unknown, within [-1, 1].
        if error < 1e-10 {
            Self::of_function(function(x), error)
        } else {
            Self::new(Dd::of(0.0), 1.0, 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(value: f64) -> Wide {
        Wide::of(value)
    }

    #[test]
    fn numbers_beyond_the_range_of_a_double_keep_their_digits() {
        let huge = number(1e5).exp(); // 10^43429
        let back = huge.ln().to_dd() - Dd::of(1e5);
        assert!(back.to_f64().abs() < 1e-24, "{back:?}");
        assert_eq!((huge / huge - number(1.0)).to_f64().abs().max(1e-29), 1e-29);
        assert!((((huge + number(1.0)) / (huge * huge)) * huge).to_f64() - 1.0 < 1e-15);
        let tiny = (-number(1e5)).exp();
        assert!(tiny.to_f64() > 0.0 && (-tiny).to_f64() < 0.0 && huge.to_f64() == f64::MAX);
        assert!(((tiny * huge).to_f64() - 1.0).abs() < 1e-15);
        assert!(((tiny.sqrt() * huge.sqrt()).to_f64() - 1.0).abs() < 1e-15);
        assert!((tiny.exp_m1() / tiny).to_f64() == 1.0 && (tiny.ln_1p() / tiny).to_f64() == 1.0);
        assert!((huge.powf(number(-2.0)) * huge * huge).to_f64() - 1.0 < 1e-15);
        for x in [1e9, -3.7e13, 7.8e14] {
            let error = (number(x).exp().ln() - number(x)).abs();
            assert!(!error.is_above_error(1.0) && error.to_f64() < 1e-14, "{x}: {error:?}");
        }
        assert_eq!(number(1e30).exp().to_f64(), f64::INFINITY);
        assert_eq!(number(-1e30).exp().to_f64(), 0.0);
    }

    #[test]
    fn carried_error_contains_the_true_value_after_cancellation() {
        let one = number(1.0);
        for x in [1e-12, 1e-3, 0.3, 2.0, 50.0, 1e4] {
            let x = number(x);
            for rest in [
                (x.exp().ln() - x, "exp, ln"),
                (x.sqrt() * x.sqrt() - x, "sqrt"),
                ((one + x).ln() - x.ln_1p(), "ln_1p"),
                (x.exp_m1() + one - x.exp(), "exp_m1"),
                (x.sin() * x.sin() + x.cos() * x.cos() - one, "sin, cos"),
                (one / x * x - one, "/"),
                (x.powf(number(1.5)) / x / x.sqrt() - one, "powf"),
                ((x + number(1e20)) - number(1e20) - x, "+"),
            ] {
                let (rest, name) = rest;
                assert!(!rest.abs().is_above_error(1.0), "{name} {x:?}: {rest:?}");
                assert!((x + one).is_above_error(1e25), "{x:?}");
            }
        }
        assert!(!number(1e40).sin().abs().is_above_error(1.0));
        assert!(!(one / (one / number(3.0) * number(3.0) - one)).is_finite());
    }
}
