//! Numbers side by side: what the loss needs of a vector register, whatever its width.
//!
//! The rules of `loss.rs` are written once, over [`Lanes`], and know neither the width nor the
//! instructions. Comparisons with NaN are false, and a selection keeps the NaN that it selects.

use std::marker::PhantomData;

use crate::table::Image;

/// Numbers in the widest vector.
pub const MOST_LANES: usize = 16;

/// `e^x`, `e^x - 1` and `e^x - 1 - x`: each from the same reduction, none by cancellation.
#[derive(Clone, Copy)]
pub struct Exponentials<F> {
    pub exp: F,
    pub exp_m1: F,
    pub excess: F,
}

/// Vectors of [`Self::COUNT`] numbers, and what can be done with all of them at a time.
pub trait Lanes: Copy {
    /// One number.
    type Scalar: Copy;
    /// A vector of numbers.
    type Float: Copy;
    /// A vector of truths.
    type Mask: Copy;
    /// Numbers in a vector.
    const COUNT: usize;

    fn splat(self, value: f64) -> Self::Float;
    /// The first [`Self::COUNT`] elements.
    fn load(self, from: &[Self::Scalar]) -> Self::Float;
    /// The first [`Self::COUNT`] elements.
    fn store(self, values: Self::Float, to: &mut [Self::Scalar]);
    /// Which of the first [`Self::COUNT`] bytes are not 0.
    fn load_mask(self, from: &[u8]) -> Self::Mask;

    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn neg(self, a: Self::Float) -> Self::Float;
    fn abs(self, a: Self::Float) -> Self::Float;

    fn less(self, a: Self::Float, b: Self::Float) -> Self::Mask;
    fn less_or_equal(self, a: Self::Float, b: Self::Float) -> Self::Mask;
    fn is_nan(self, a: Self::Float) -> Self::Mask;
    fn and(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    fn or(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    fn not(self, a: Self::Mask) -> Self::Mask;
    /// `a` where `mask` is true, `b` elsewhere.
    fn select(self, mask: Self::Mask, a: Self::Float, b: Self::Float) -> Self::Float;
    /// One bit a lane, the first lane's lowest.
    fn bits(self, mask: Self::Mask) -> u32;

    /// For `x` within plus and minus 20; NaN gives NaN.
    fn exponentials(self, x: Self::Float) -> Exponentials<Self::Float>;
    /// The tabulated side of each token: `lower`, a ratio, where the mask is true, else `log_upper`.
    fn look_up(self, image: Image<'_>, old_log_prob: Self::Float, lower: Self::Mask)
    -> Self::Float;
}

/// A number that vectors are made of.
pub trait Number: Copy {
    /// 0
    const ZERO: Self;
    /// Does the work with the widest vectors that this processor has.
    fn run<W: Work<Self>>(work: W) -> W::Output;
    /// The same number.
    fn to_f64(self) -> f64;
}

impl Number for f32 {
    const ZERO: Self = 0.0;
    fn run<W: Work<Self>>(work: W) -> W::Output {
        work.run(One::<Self>(PhantomData))
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Number for f64 {
    const ZERO: Self = 0.0;
    fn run<W: Work<Self>>(work: W) -> W::Output {
        work.run(One::<Self>(PhantomData))
    }
    fn to_f64(self) -> f64 {
        self
    }
}

/// Work to be done with whatever vectors the processor has.
pub trait Work<T> {
    type Output;
    fn run<L: Lanes<Scalar = T>>(self, lanes: L) -> Self::Output;
}

/// One number at a time.
#[derive(Clone, Copy)]
pub struct One<T>(PhantomData<T>);

macro_rules! one_at_a_time {
    ($float:ty, $exponentials:expr, $look_up:expr) => {
        impl Lanes for One<$float> {
            type Scalar = $float;
            type Float = $float;
            type Mask = bool;
            const COUNT: usize = 1;

            fn splat(self, value: f64) -> $float {
                value as $float
            }
            fn load(self, from: &[$float]) -> $float {
                from[0]
            }
            fn store(self, value: $float, to: &mut [$float]) {
                to[0] = value;
            }
            fn load_mask(self, from: &[u8]) -> bool {
                from[0] != 0
            }
            fn add(self, a: $float, b: $float) -> $float {
                a + b
            }
            fn sub(self, a: $float, b: $float) -> $float {
                a - b
            }
            fn mul(self, a: $float, b: $float) -> $float {
                a * b
            }
            fn neg(self, a: $float) -> $float {
                -a
            }
            fn abs(self, a: $float) -> $float {
                a.abs()
            }
            fn less(self, a: $float, b: $float) -> bool {
                a < b
            }
            fn less_or_equal(self, a: $float, b: $float) -> bool {
                a <= b
            }
            fn is_nan(self, a: $float) -> bool {
                a.is_nan()
            }
            fn and(self, a: bool, b: bool) -> bool {
                a && b
            }
            fn or(self, a: bool, b: bool) -> bool {
                a || b
            }
            fn not(self, a: bool) -> bool {
                !a
            }
            fn select(self, mask: bool, a: $float, b: $float) -> $float {
                if mask { a } else { b }
            }
            fn bits(self, mask: bool) -> u32 {
                u32::from(mask)
            }
            fn exponentials(self, x: $float) -> Exponentials<$float> {
                $exponentials(x)
            }
            fn look_up(self, image: Image<'_>, old_log_prob: $float, lower: bool) -> $float {
                $look_up(image, old_log_prob, lower)
            }
        }
    };
}
one_at_a_time!(f32, exponentials_f32, look_up_f32);
one_at_a_time!(f64, exponentials_f64, look_up_f64);

/// In f64, where `e^x - 1 - x` keeps six digits for `x` as small as 1e-5, and is 0 to them below.
fn exponentials_f64(x: f64) -> Exponentials<f64> {
    let exp_m1 = x.exp_m1();
    let excess = if x.abs() < 1e-3 {
        let square = x * x;
        square * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0))))
    } else {
        exp_m1 - x
    };
    Exponentials { exp: x.exp(), exp_m1, excess }
}

fn exponentials_f32(x: f32) -> Exponentials<f32> {
    let Exponentials { exp, exp_m1, excess } = exponentials_f64(f64::from(x));
    Exponentials { exp: exp as f32, exp_m1: exp_m1 as f32, excess: excess as f32 }
}

fn look_up_f32(image: Image<'_>, old_log_prob: f32, lower: bool) -> f32 {
    let y = Image::y(old_log_prob);
    if lower { image.lower(y) } else { image.log_upper(y) }
}

fn look_up_f64(image: Image<'_>, old_log_prob: f64, lower: bool) -> f64 {
    let y = Image::y(old_log_prob as f32);
    if lower {
        return f64::from(image.lower(y));
    }
    let tabulated = image.log_upper(y);
    // Where everything is allowed, y in f32 could fall short of a new probability of 1.
    if tabulated >= y && old_log_prob <= 0.0 { -old_log_prob } else { f64::from(tabulated) }
}
