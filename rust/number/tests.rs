//! Tests of the functions of each number type.

use super::*;

/// Reads a float as Python's `float.hex` writes it.
pub(crate) fn hex_float(text: &str) -> f64 {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text),
    };
    if digits == "inf" {
        return sign * f64::INFINITY;
    }
    let (mantissa, exponent) = digits.strip_prefix("0x").unwrap().split_once('p').unwrap();
    let exponent: i32 = exponent.parse().unwrap();
    let (whole, fraction) = mantissa.split_once('.').unwrap();
    let bits = u64::from_str_radix(&format!("{whole}{fraction}"), 16).unwrap() as f64;
    let shift = exponent - 4 * fraction.len() as i32;
    // Two steps, because 2^shift itself may be no double.
    sign * bits * 2f64.powi(shift / 2) * 2f64.powi(shift - shift / 2)
}

#[test]
fn double_double_functions_hold_thirty_digits() {
    let rows = include_str!("../../tests/data/real_functions.csv");
    let mut count = 0;
    for row in rows.lines().filter(|line| !line.starts_with('#')).skip(1) {
        let columns: Vec<&str> = row.split(',').collect();
        let [x, hi, lo] = [1, 2, 3].map(|i| hex_float(columns[i]));
        let actual = match columns[0] {
            "exp_m1" => Dd::of(x).exp_m1(),
            "ln_1p" => Dd::of(x).ln_1p(),
            "sqrt" => Dd::of(x).sqrt(),
            "sin" => Dd::of(x).sin(),
            "cos" => Dd::of(x).cos(),
            other => panic!("unknown function {other}"),
        };
        let error = ((actual.hi - hi) + (actual.lo - lo)).abs();
        assert!(error <= 4e-31 * hi.abs(), "{row}: error {error:e}");
        count += 1;
    }
    assert!(count > 80, "{count}");
}

#[test]
fn double_double_functions_take_their_limits_at_the_ends() {
    assert_eq!(Dd::of(-1e300).exp(), Dd::of(0.0));
    assert_eq!(Dd::of(-1e300).exp_m1().to_f64(), -1.0);
    assert_eq!(Dd::of(1e300).exp().hi, f64::INFINITY);
    assert_eq!(Dd::of(0.0).ln().hi, f64::NEG_INFINITY);
    assert_eq!(Dd::of(-1.0).ln_1p().hi, f64::NEG_INFINITY);
    assert_eq!(Dd::of(0.0).sqrt().hi, 0.0);
    assert_eq!(Dd::of(-5e-324).exp_m1(), Dd::of(-5e-324));
}

/// Covers powers whose inverse is not a normal double.
#[test]
fn logarithms_of_powers_of_two_hold_thirty_digits() {
    let ln_2 = Dd::of(2.0).ln();
    for power in [-1074, -1022, -900, -1, 1, 896, 1000, 1023] {
        let (half, rest) = (power / 2, power - power / 2);
        let exact = ln_2 * Dd::of(f64::from(power));
        let error = (Dd::of(2f64.powi(half) * 2f64.powi(rest)).ln() - exact).to_f64();
        assert!((error / exact.hi).abs() < 1e-30, "2^{power}: {error:e}");
    }
}

#[test]
fn excesses_agree_with_double_double_to_a_few_ulp() {
    let mut x = 1e-6;
    while x < 0.99 {
        for argument in [x, -x, 3.0 * x] {
            let exact = Dd::of(argument).excess_over_ln_1p().to_f64();
            if argument > -1.0 {
                let error = (argument.excess_over_ln_1p() - exact).abs() / exact;
                assert!(error <= 6.0 * f64::EPSILON, "excess_over_ln_1p({argument:e}): {error:e}");
            }
            let exact = Dd::of(argument).exp_excess().to_f64();
            let error = (argument.exp_excess() - exact).abs() / exact;
            assert!(error <= 6.0 * f64::EPSILON, "exp_excess({argument:e}): {error:e}");
        }
        x *= 1.07;
    }
}

/// Differences that would cancel, for any number with 30 digits.
fn assert_differences<T: Real>() {
    let of = T::of;
    let near = |a: T, b: T| ((a / b - of(1.0)).to_f64()).abs() < 4e-30;
    for x in [1e-100, 1e-40, -1e-40, 3e-9, -3e-9] {
        let (x, third, quarter) = (of(x), of(1.0) / of(3.0), of(0.25));
        let log = x * x * (of(0.5) - x * (third - x * (quarter - x * of(0.2))));
        assert!(near(x.excess_over_ln_1p(), log));
        let power = x
            * x
            * of(0.5)
            * (of(1.0) + x * third * (of(1.0) + x * quarter * (of(1.0) + x * of(0.2))));
        assert!(near(x.exp_excess(), power));
    }
    // The series, and the difference that loses few digits.
    for x in [0.0099, -0.0099, 0.0101, 0.2, -0.2, 0.2499, 0.2501, 3.0] {
        let x = of(x);
        let lost = 1e-30 / x.to_f64().abs();
        let close = |a: T, b: T| ((a / b - of(1.0)).to_f64()).abs() < 4.0 * lost;
        assert!(close(x.excess_over_ln_1p(), x - x.ln_1p()), "{}", x.to_f64());
        assert!(close(x.exp_excess(), x.exp_m1() - x), "{}", x.to_f64());
    }
}

#[test]
fn differences_keep_their_digits_next_to_0() {
    assert_differences::<Dd>();
    assert_differences::<crate::number::wide::Wide>();
}

#[test]
fn a_product_in_an_exponent_is_not_rounded() {
    for (x, y) in [(3.574_207_168_721_173, 79.3), (-0.95, 1e-3), (4.59, 78.605_743_227_208_62)] {
        let exact = (Dd::of(x) * Dd::of(y)).exp_m1().to_f64();
        assert!((x.product_exp_m1(y) / exact - 1.0).abs() < 4e-16, "{x} {y}");
    }
    assert_eq!(1e3_f64.product_exp_m1(1e3), f64::INFINITY);
    assert_eq!((-1e3_f64).product_exp_m1(1e3), -1.0);
}
