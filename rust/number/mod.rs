//! Number types of formulas: `f64` for speed, [`Dd`] where its digits do not suffice.
//!
//! A generator is written once, over [`Real`], and runs in both. [`Dd`] (about 31 digits) decides
//! whether a bound is inside and polishes bounds whose condition number is large.

mod dd;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod wide;

use std::ops::{Add, Div, Mul, Neg, Sub};

pub use dd::Dd;
pub(crate) use dd::{INVERSE_FACTORIAL, LN_2_PARTS};

/// Max argument of the series of differences that would cancel. They are exact to 31 digits up to it, and a difference
/// loses two digits there.
const MAX_SERIES: f64 = 0.01;

/// Operations that formulas of a generator take from a number.
pub trait Real:
    Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// The number with the value of a double.
    fn of(value: f64) -> Self;
    /// The nearest double. A number that is neither 0 nor infinite stays so.
    fn to_f64(self) -> f64;
    /// The nearest double-double.
    fn to_dd(self) -> Dd;
    /// `e^x`.
    #[must_use]
    fn exp(self) -> Self;
    /// `e^x - 1`, accurate near 0.
    #[must_use]
    fn exp_m1(self) -> Self;
    /// `ln x`.
    #[must_use]
    fn ln(self) -> Self;
    /// `ln(1 + x)`, accurate near 0.
    #[must_use]
    fn ln_1p(self) -> Self;
    /// `sqrt x`.
    #[must_use]
    fn sqrt(self) -> Self;
    /// `x^y` for `x >= 0`.
    #[must_use]
    fn powf(self, exponent: Self) -> Self;
    /// `sin x`.
    #[must_use]
    fn sin(self) -> Self;
    /// `cos x`.
    #[must_use]
    fn cos(self) -> Self;
    /// The nearest number of this type to a double-double.
    fn of_dd(value: Dd) -> Self;
    /// `|x|`.
    #[must_use]
    fn abs(self) -> Self {
        if self.to_f64() < 0.0 { -self } else { self }
    }
    /// `x - ln(1 + x) >= 0`, about `x^2/2` near 0 and relatively accurate there.
    #[must_use]
    fn excess_over_ln_1p(self) -> Self {
        if self.to_f64().abs() > MAX_SERIES {
            return self - self.ln_1p();
        }
        // With z = x/(2+x): x - ln(1+x) = z (x - 2 z^2 (1/3 + z^2/5 + z^4/7 + ...)).
        let z = self / (Self::of(2.0) + self);
        let square = z * z;
        let mut tail = Self::of(0.0);
        for odd in (3..=15).rev().step_by(2) {
            tail = tail * square + Self::of(1.0) / Self::of(f64::from(odd));
        }
        z * (self - Self::of(2.0) * square * tail)
    }
    /// `e^x - 1 - x >= 0`, with the accuracy of [`Self::excess_over_ln_1p`].
    #[must_use]
    fn exp_excess(self) -> Self {
        if self.to_f64().abs() > MAX_SERIES {
            return self.exp_m1() - self;
        }
        let mut series = Self::of(0.0);
        for coefficient in INVERSE_FACTORIAL.iter().rev() {
            series = series * self + Self::of_dd(*coefficient);
        }
        self * self * series
    }
    /// `e^(x y) - 1`, without the rounding error of the product.
    #[must_use]
    fn product_exp_m1(self, other: Self) -> Self {
        (self * other).exp_m1()
    }
}

impl Real for f64 {
    fn of(value: f64) -> Self {
        value
    }
    fn to_f64(self) -> f64 {
        self
    }
    fn to_dd(self) -> Dd {
        Dd::of(self)
    }
    fn exp(self) -> Self {
        f64::exp(self)
    }
    fn exp_m1(self) -> Self {
        f64::exp_m1(self)
    }
    fn ln(self) -> Self {
        f64::ln(self)
    }
    fn ln_1p(self) -> Self {
        f64::ln_1p(self)
    }
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    fn powf(self, exponent: Self) -> Self {
        f64::powf(self, exponent)
    }
    fn sin(self) -> Self {
        f64::sin(self)
    }
    fn cos(self) -> Self {
        f64::cos(self)
    }
    fn of_dd(value: Dd) -> Self {
        value.to_f64()
    }

    fn product_exp_m1(self, other: Self) -> Self {
        let Dd { hi, lo } = Dd::product(self, other);
        let power = f64::exp_m1(hi);
        if power.is_finite() { lo.mul_add(power + 1.0, power) } else { power }
    }

    fn excess_over_ln_1p(self) -> Self {
        if !(-0.4..0.6).contains(&self) {
            return self - f64::ln_1p(self);
        }
        // With z = x/(2+x): ln(1+x) = 2 atanh z and x - 2z = z x, so
        // x - ln(1+x) = z (x - 2 z^2 (1/3 + z^2/5 + z^4/7 + ...)), |z| <= 1/4.
        let z = self / (2.0 + self);
        let square = z * z;
        let mut tail = 1.0 / 29.0;
        for odd in (3..=27).rev().step_by(2) {
            tail = tail * square + 1.0 / f64::from(odd);
        }
        z * (self - 2.0 * square * tail)
    }

    fn exp_excess(self) -> Self {
        if !(-1.0..1.0).contains(&self) {
            return f64::exp_m1(self) - self;
        }
        // Taylor: x^2 (1/2! + x/3! + x^2/4! + ...), by Horner's scheme.
        let mut tail = 1.0;
        for n in (3..=19).rev() {
            tail = 1.0 + tail * self / f64::from(n);
        }
        0.5 * self * self * tail
    }
}
