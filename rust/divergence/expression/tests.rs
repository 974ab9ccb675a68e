//! Tests of generators given as text: reading, judging, evaluating.

use super::evaluate::{evaluate, widened};
use super::*;
use crate::divergence::point::Point;

fn refused(text: &str) -> String {
    match Expression::parse(text, None, None) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{text} was accepted"),
    }
}

fn value(text: &str, u: f64) -> f64 {
    evaluate(&read(text).unwrap(), Point::from_ratio(u)).value
}

#[test]
fn precedence_is_that_of_mathematics() {
    assert_eq!(value("-u^2", 3.0), -9.0);
    assert_eq!(value("2^3^2", 1.0), 512.0);
    assert_eq!(value("u^-2", 2.0), 0.25);
    assert_eq!(value("2*u**2 - 6/3*u - -1", 3.0), 13.0);
    assert_eq!(value("1e-3*u + .5 + 2.", 1000.0), 3.5);
    assert_eq!(value("min(u, 2) + max(u, 2) - abs(-u)", 3.0), 2.0);
    assert!((value("sin(u)^2 + cos(u)^2", 3.0) - 1.0).abs() < 1e-15);
}

#[test]
fn logarithms_are_exact_where_u_underflows() {
    let at = Point::from_log(-1e6);
    let of = |text: &str| evaluate(&read(text).unwrap(), at).value;
    assert_eq!(of("ln(u)"), -1e6);
    assert_eq!(of("u*ln(u)"), 0.0);
    assert_eq!(of("ln(3*u^2/u)"), -1e6 + 3f64.ln());
    assert_eq!(of("u^2*u^-2"), 1.0);
    assert!(of("(u-u^2)/u").is_nan(), "out of range");
    let wide = evaluate(&read("(u-u^2)/u").unwrap(), widened(at));
    assert_eq!(wide.value.to_f64(), 1.0);
}

#[test]
fn slopes_agree_with_differences() {
    for text in ["u*ln(u)", "u^2.5", "sqrt(u)*exp(-u)", "u^u", "1/(1+u)", "sin(u)*cos(u)", "2^u"] {
        let node = read(text).unwrap();
        for t in [-2.0, -0.3, 0.4, 1.7] {
            let at = |t: f64| evaluate(&node, Point::from_log(t));
            let measured = (at(t + 1e-6).value - at(t - 1e-6).value) / 2e-6;
            assert!((at(t).slope - measured).abs() < 1e-7 * (1.0 + measured.abs()), "{text} {t}");
        }
    }
}

#[test]
fn errors_point_at_the_column() {
    assert!(refused("u*ln(v)").contains("column 6: \"v\" is not known"));
    assert!(refused("u*lnn(u)").contains("column 3: function \"lnn\" is not known"));
    assert!(refused("u*(u-1").contains("column 7"));
    assert!(refused("u**").contains("column 4"));
    assert!(refused("max(u)").contains("column 1: max takes 2 arguments, got 1"));
    assert!(refused("2 u").contains("column 3"));
    assert!(refused("").contains("column 1"));
    assert!(refused("1e999*u").contains("not a finite number"));
    assert!(refused(&"(".repeat(100)).contains("parentheses inside each other"));
    assert!(refused(&"u+".repeat(5000)).contains("longer than"));
}

#[test]
fn functions_that_break_a_condition_are_refused() {
    assert!(refused("u^2").contains("f(1) must be 0, it is 1"));
    assert!(refused("(u-1)^3").contains("f must be convex"));
    assert!(refused("-abs(u-1)").contains("f must be convex"));
    assert!(refused("sin(u-1)").contains("f must be convex"));
    assert!(refused("3*(u-1)").contains("linear"));
    assert!(refused("1/(u-2)^2 - 1").contains("convex"));
    assert!(refused("ln(0.5) - ln(u-0.5)").contains("finite on (0, inf), it is NaN at u = 0.49"));
}

#[test]
fn limits_are_determined_or_required() {
    let found = |text: &str| {
        let f = Expression::parse(text, None, None).unwrap();
        (f.at_zero.to_f64(), f.slope_at_infinity, f.curvature)
    };
    let (zero, slope, curvature) = found("u*ln(u)");
    assert!((zero - 1.0).abs() < 1e-15 && slope == f64::INFINITY);
    assert!((curvature.unwrap() - 1.0).abs() < 1e-9);
    let (zero, slope, _) = found("-ln(u)");
    assert!(zero == f64::INFINITY && (slope - 1.0).abs() < 1e-15);
    assert_eq!(found("abs(u-1)/2"), (0.5, 0.5, None));
    assert_eq!(found("max(u-1.3, 0)"), (0.0, 1.0, None));
    let slow = "1 - u^1e-14";
    assert!(refused(slow).contains("f(0) cannot be determined"));
    assert!(Expression::parse(slow, Some(1.0), Some(0.0)).is_ok());
}

#[test]
fn random_text_is_evaluated_or_refused_without_panic() {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};
    let token = prop::sample::select(
        [
            "u", "1", "2.5", "1e3", "+", "-", "*", "/", "^", "**", "(", ")", ",", "ln", "exp(",
            "max(", "sqrt(", "abs(", " ", "v", "\u{e9}", ".",
        ]
        .as_slice(),
    );
    let mut runner = TestRunner::new(Config { cases: 20_000, ..Config::default() });
    runner
        .run(&prop::collection::vec(token, 0..40), |tokens| {
            if let Ok(node) = read(&tokens.concat()) {
                let _ = evaluate(&node, Point::from_log(Dd::of(0.3)));
            }
            Ok(())
        })
        .unwrap();
}
