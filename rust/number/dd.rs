//! [`Dd`]: a double-double, the unevaluated sum of two doubles with about 31 digits.
//!
//! Only +, *, fused multiply-add and correctly rounded division are used for its arithmetic, so its
//! results do not depend on the platform.
//!
//! Sources: T. J. Dekker, *A floating-point technique for extending the available precision*,
//! Numer. Math. 18 (1971); M. Joldes, J.-M. Muller, V. Popescu, *Tight and rigorous error bounds
//! for basic building blocks of double-word arithmetic*, ACM TOMS 44 (2017).

use std::ops::{Add, Div, Mul, Neg, Sub};
use std::sync::LazyLock;

use crate::number::Real;

/// A double-double: the exact sum `hi + lo` with `|lo| <= ulp(hi)/2`.
///
/// ```
/// use bandpo::number::{Dd, Real};
///
/// let sum = Dd::of(1.0) + Dd::of(1e-20);
/// assert_eq!((sum - Dd::of(1.0)).to_f64(), 1e-20);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dd {
    /// The leading double.
    pub hi: f64,
    /// The remainder.
    pub lo: f64,
}

/// `ln 2` in three parts, by `tools/make_constants.py`. The first has 33 bits, because its product with an exponent
/// has to be exact.
pub(crate) const LN_2_PARTS: [f64; 3] =
    [0.6931471804855391, 7.440617110012397e-11, -1.3124698417785255e-27];

/// `pi/2` in three parts, like [`LN_2_PARTS`].
const HALF_PI_PARTS: [f64; 3] = [1.5707963267341256, 6.077100506506192e-11, 3.5215598651832e-27];

/// `1/n!` for n = 2..=12, by `tools/make_constants.py`.
pub(crate) const INVERSE_FACTORIAL: [Dd; 11] = [
    Dd { hi: 0.5, lo: 0.0 },
    Dd { hi: 0.16666666666666666, lo: 9.25185853854297e-18 },
    Dd { hi: 0.041666666666666664, lo: 2.3129646346357427e-18 },
    Dd { hi: 0.008333333333333333, lo: 1.1564823173178714e-19 },
    Dd { hi: 0.001388888888888889, lo: -5.300543954373577e-20 },
    Dd { hi: 0.0001984126984126984, lo: 1.7209558293420705e-22 },
    Dd { hi: 2.48015873015873e-05, lo: 2.1511947866775882e-23 },
    Dd { hi: 2.7557319223985893e-06, lo: -1.858393274046472e-22 },
    Dd { hi: 2.755731922398589e-07, lo: 2.3767714622250297e-23 },
    Dd { hi: 2.505210838544172e-08, lo: -1.448814070935912e-24 },
    Dd { hi: 2.08767569878681e-09, lo: -1.20734505911326e-25 },
];

impl Dd {
    /// The exact sum of two doubles.
    #[must_use]
    pub fn sum(a: f64, b: f64) -> Self {
        let hi = a + b;
        if !hi.is_finite() {
            return Self { hi, lo: 0.0 }; // the remainder of an infinity would be NaN
        }
        let from_b = hi - a;
        Self { hi, lo: (a - (hi - from_b)) + (b - from_b) }
    }

    /// The exact product of two doubles.
    #[must_use]
    pub fn product(a: f64, b: f64) -> Self {
        let hi = a * b;
        if !hi.is_finite() {
            return Self { hi, lo: 0.0 };
        }
        Self { hi, lo: a.mul_add(b, -hi) }
    }

    /// `hi + lo`, for `|hi| >= |lo|`.
    fn ordered(hi: f64, lo: f64) -> Self {
        let sum = hi + lo;
        if !sum.is_finite() {
            return Self { hi: sum, lo: 0.0 };
        }
        Self { hi: sum, lo: lo - (sum - hi) }
    }

    /// `self * 2^exponent`.
    pub(crate) fn scaled_by_power_of_two(self, exponent: i32) -> Self {
        // Two steps, because 2^exponent itself may leave the range of a double.
        let half = exponent / 2;
        let (first, second) = (2f64.powi(half), 2f64.powi(exponent - half));
        Self { hi: self.hi * first * second, lo: self.lo * first * second }
    }

    /// `(k, e^r - 1)` with `x = k ln 2 + r` and `|r| <= ln(2)/2`.
    pub(crate) fn reduced_exp_m1(self) -> (f64, Self) {
        let mut r = self;
        let mut whole = 0.0;
        // A large x takes two turns, because rounding moves its k by more than 1. A third would change nothing.
        for _ in 0..3 {
            let k = (r.hi / std::f64::consts::LN_2).round();
            if k == 0.0 {
                break;
            }
            let [first, second, third] = LN_2_PARTS.map(|part| Self::product(-k, part));
            r = r + first + second + third;
            whole += k;
        }
        let k = whole;
        let nearest = (r.hi * GRID).round().clamp(-LAST_ON_GRID, LAST_ON_GRID);
        let e = (r + Self::of(-nearest / GRID)).small_exp_m1();
        if nearest == 0.0 {
            return (k, e);
        }
        let at_nearest = EXP_M1_ON_GRID[(nearest + LAST_ON_GRID) as usize];
        // (1 + a)(1 + e) - 1
        (k, at_nearest + (e + at_nearest * e))
    }

    /// `e^r - 1` for `|r| <= 2^-7`.
    fn small_exp_m1(self) -> Self {
        // A double has enough digits for the powers from the seventh on: they are 2^-54 of the sum.
        let mut tail = INVERSE_FACTORIAL[10].hi;
        for coefficient in INVERSE_FACTORIAL[5..10].iter().rev() {
            tail = tail * self.hi + coefficient.hi;
        }
        let mut series = Self::of(tail);
        for coefficient in INVERSE_FACTORIAL[..5].iter().rev() {
            series = series * self + *coefficient;
        }
        self + self * self * series
    }
}

/// Points of [`EXP_M1_ON_GRID`] in an interval of length 1.
const GRID: f64 = 64.0;

/// Last point of the grid, times [`GRID`]. It lies beyond `ln(2)/2`.
const LAST_ON_GRID: f64 = 23.0;

/// `e^(j/64) - 1` for j from -23 to 23.
static EXP_M1_ON_GRID: LazyLock<[Dd; 47]> = LazyLock::new(|| {
    std::array::from_fn(|index| {
        let mut e = Dd::of((index as f64 - LAST_ON_GRID) / (64.0 * GRID)).small_exp_m1();
        for _ in 0..6 {
            e = e * e + e + e; // e^(2r) - 1 from e^r - 1
        }
        e
    })
});

impl Dd {
    /// The quadrant `k mod 4` and `sin r`, `cos r` with `x = k pi/2 + r`, `|r| <= pi/4`.
    ///
    /// The absolute error is 1e-31 times `|k|`, or a double's where `k` is huge.
    fn reduced_sin_cos(self) -> (u8, Self, Self) {
        if self.hi.abs() > 1e14 {
            return (0, Self::of(self.hi.sin()), Self::of(self.hi.cos()));
        }
        let k = (self.hi / std::f64::consts::FRAC_PI_2).round();
        let [first, second, third] = HALF_PI_PARTS.map(|part| Self::product(-k, part));
        let r = self + first + second + third;
        let square = -(r * r);
        let (mut sin, mut cos) = (Self::of(1.0), Self::of(1.0));
        for n in (1..=14).rev() {
            let (even, odd) = (f64::from(2 * n * (2 * n - 1)), f64::from(2 * n * (2 * n + 1)));
            cos = Self::of(1.0) + square * cos / Self::of(even);
            sin = Self::of(1.0) + square * sin / Self::of(odd);
        }
        (k.rem_euclid(4.0) as u8, r * sin, cos)
    }
}

impl Add for Dd {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let s = Self::sum(self.hi, other.hi);
        let t = Self::sum(self.lo, other.lo);
        let u = Self::ordered(s.hi, s.lo + t.hi);
        Self::ordered(u.hi, u.lo + t.lo)
    }
}

impl Neg for Dd {
    type Output = Self;
    fn neg(self) -> Self {
        Self { hi: -self.hi, lo: -self.lo }
    }
}

impl Sub for Dd {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Mul for Dd {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let p = Self::product(self.hi, other.hi);
        if !p.hi.is_finite() || p.hi == 0.0 {
            return p;
        }
        let cross = self.hi.mul_add(other.lo, self.lo * other.hi);
        Self::ordered(p.hi, p.lo + cross)
    }
}

impl Div for Dd {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let first = self.hi / other.hi;
        if !first.is_finite() || first == 0.0 || !other.hi.is_finite() {
            return Self::of(first);
        }
        let rest = self - other * Self::of(first);
        let second = rest.hi / other.hi;
        let rest = rest - other * Self::of(second);
        let quotient = Self::ordered(first, second);
        quotient + Self::of(rest.hi / other.hi)
    }
}

impl Real for Dd {
    fn of(value: f64) -> Self {
        Self { hi: value, lo: 0.0 }
    }
    fn to_f64(self) -> f64 {
        self.hi + self.lo
    }
    fn to_dd(self) -> Dd {
        self
    }

    fn exp(self) -> Self {
        if self.hi < -745.2 {
            return Self::of(0.0);
        }
        if self.hi > 709.78 {
            return Self::of(f64::INFINITY);
        }
        let (k, e) = self.reduced_exp_m1();
        (e + Self::of(1.0)).scaled_by_power_of_two(k as i32)
    }

    fn exp_m1(self) -> Self {
        if self.hi.abs() < 1e-40 {
            return self; // the next term, x^2/2, is below all digits
        }
        if self.hi.abs() < 0.34 {
            return self.reduced_exp_m1().1;
        }
        if self.hi > 709.78 {
            return Self::of(f64::INFINITY);
        }
        self.exp() - Self::of(1.0)
    }

    fn ln(self) -> Self {
        if self.hi <= 0.0 || !self.hi.is_finite() {
            return Self::of(self.hi.ln());
        }
        if !(1e-270..1e270).contains(&self.hi) {
            // Otherwise e^-y below would overflow or be denormal, as the low part of a tiny number is.
            let shift = if self.hi < 1.0 { 300 } else { -300 };
            let [first, second, third] =
                LN_2_PARTS.map(|part| Self::product(-f64::from(shift), part));
            return self.scaled_by_power_of_two(shift).ln() + first + second + third;
        }
        // One Newton step on e^y = x doubles the digits of the double-precision logarithm.
        let y = Self::of(self.hi.ln());
        let c = self * (-y).exp() - Self::of(1.0);
        y + (c - c * c * Self::of(0.5))
    }

    fn ln_1p(self) -> Self {
        if self.hi <= -1.0 || !self.hi.is_finite() {
            return (self + Self::of(1.0)).ln();
        }
        if self.hi.abs() > 0.5 {
            return (self + Self::of(1.0)).ln();
        }
        let y = Self::of(self.hi.ln_1p());
        let e = y.exp_m1();
        let c = (self - e) / (e + Self::of(1.0));
        y + (c - c * c * Self::of(0.5))
    }

    fn sqrt(self) -> Self {
        let root = self.hi.sqrt();
        if root == 0.0 || !root.is_finite() {
            return Self::of(root);
        }
        let rest = self - Self::product(root, root);
        Self::ordered(root, rest.hi / (2.0 * root))
    }

    fn of_dd(value: Dd) -> Self {
        value
    }

    fn sin(self) -> Self {
        let (quadrant, sin, cos) = self.reduced_sin_cos();
        match quadrant {
            0 => sin,
            1 => cos,
            2 => -sin,
            _ => -cos,
        }
    }

    fn cos(self) -> Self {
        let (quadrant, sin, cos) = self.reduced_sin_cos();
        match quadrant {
            0 => cos,
            1 => -sin,
            2 => -cos,
            _ => sin,
        }
    }

    fn powf(self, exponent: Self) -> Self {
        if self.hi == 0.0 {
            return Self::of(self.hi.powf(exponent.hi));
        }
        (self.ln() * exponent).exp()
    }
}
