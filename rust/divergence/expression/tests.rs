//! Tests of generators given as text: reading, judging, evaluating.

use super::curvature::Curvature;
use super::evaluate::{evaluate, widened};
use super::*;
use crate::divergence::point::Point;
use crate::number::wide::Wide;

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
fn second_derivatives_agree_with_differences_of_slopes() {
    for text in [
        "u*ln(u)",
        "u^2.5",
        "sqrt(u)*exp(-u)",
        "u^u",
        "1/(1+u)",
        "sin(u)*cos(u)",
        "2^u",
        "u^-3",
        "(u-2)^2/(u+2)",
        "sqrt((u-1)^2+2)",
        "ln(1+exp(3*u))",
        "abs(u-9)^3",
        "max(u^3,1/u)",
        "(u-9)^4",
    ] {
        let node = read(text).unwrap();
        let curvature = Curvature::of(&node);
        for x in [0.1, 0.7, 1.3, 5.0] {
            let slope = |x: f64| evaluate(&node, Point::from_ratio(Wide::of(x))).slope.to_f64() / x;
            let measured = (slope(x + 1e-6) - slope(x - 1e-6)) / 2e-6;
            let bend = curvature.at(Wide::of(x)).to_f64();
            assert!((bend - measured).abs() < 1e-6 * (1.0 + measured.abs()), "{text} {x}: {bend}");
        }
    }
}

#[test]
fn second_derivatives_keep_their_digits_far_from_1() {
    // f'' in closed form, as c u^power.
    for (text, c, power) in [
        ("(u-2)^2/(u+2)", 32.0, -3.0),
        ("(u-2)^2/(u+2) - 1e-9*ln(u)", 1e-9, -2.0),
        ("3*u - 1e-9*ln(1+u)", 1e-9, -2.0),
        ("sqrt((u-1)^2+5)", 5.0, -3.0),
        ("(u^3+1)/(u^2+u)", 2.0, -3.0),
        ("(u-1)^2 - u^2 + 1/u", 2.0, -3.0),
        ("ln(1+exp(u)) + 1/u", 2.0, -3.0),
        ("u**1.0**0.5 + 1/u", 2.0, -3.0),
        ("abs(u-1) + max(u-3,0) + u*(1-1/u) + 1/u", 2.0, -3.0),
    ] {
        let curvature = Curvature::of(&read(text).unwrap());
        for log in [80.0, 300.0, 700.0, 1e6] {
            let u = Wide::of(log).exp();
            let expected = Wide::of(c) * Wide::of(power * log).exp();
            let ratio = (curvature.at(u) / expected).to_f64();
            assert!((ratio - 1.0).abs() < 1e-15, "{text} at e^{log}: {ratio}");
        }
    }
    let bend = |text: &str, u: f64| Curvature::of(&read(text).unwrap()).at(Wide::of(u));
    assert!(bend("2*(u-1)/3 - u*0.1 + abs(u-1)", 1e30).is_zero());
    assert!(!bend("abs(u-2)", 2.0).is_finite() && !bend("max(u,2)", 2.0).is_finite());
}

#[test]
fn nested_roots_and_logarithms_are_expanded_in_bounded_time() {
    for (before, after) in
        [("ln(1+exp(", "))"), ("sqrt(u^2+sqrt(", "))"), ("((u-2)^2+1/", ")/(u+2)")]
    {
        let text = format!("{}u{}", before.repeat(25), after.repeat(25));
        let node = read(&text).unwrap();
        let slope = |x: f64| {
            let at = Point::from_ratio(Wide::of(x));
            evaluate(&node, at).slope / at.u
        };
        let measured = ((slope(3.0 + 1e-6) - slope(3.0 - 1e-6)) / Wide::of(2e-6)).to_f64();
        let bend = Curvature::of(&node).at(Wide::of(3.0)).to_f64();
        assert!((bend / measured - 1.0).abs() < 1e-6, "{text}: {bend} {measured}");
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
fn terms_that_outweigh_the_rest_far_from_1_decide() {
    for concave in ["ln(u)", "sqrt(u)-1", "abs(ln(u)-1)-1", "ln(1+ln(1+u))-ln(1+ln(2))"] {
        for line in ["abs(u-1)", "(u-1)^2/(u+2)", "sqrt((u-1)^2+2)-sqrt(2)", "u^-1.5-1"] {
            let text = format!("{line} + 1e-9*({concave})");
            let reason = refused(&text);
            assert!(reason.contains("f must be convex, its slope falls"), "{text}: {reason}");
        }
    }
    for convex in ["ln(u)", "sqrt(u)-1", "ln(1+ln(1+u))-ln(1+ln(2))"] {
        let text = format!("(u-1)^2/(u+2) - 1e-9*({convex}) + abs(0.1*u+0.2*u-0.3)");
        assert!(Expression::parse(&text, None, None).is_ok(), "{text}");
    }
    // Beyond the doubles.
    assert!(refused("1/u - 1 + 1e-200*ln(u)").contains("slope falls at the rate"));
    // f is no line, though its slope is unknown at u = 1e-304.
    assert!(Expression::parse("u*(1/u) - 1e-3*sqrt(u) - 0.999", None, None).is_ok());
}

#[test]
fn limits_are_determined_or_required() {
    let found = |text: &str| {
        let f = Expression::parse(text, None, None).unwrap();
        (f.at_zero.to_f64(), f.slope_at_infinity.to_f64(), f.curvature)
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

#[test]
fn sizes_are_those_of_the_terms_that_cancel() {
    let size = |text: &str| Expression::parse(text, None, None).unwrap().size;
    for (text, min) in
        [("(u-1)^2", 1.0), ("abs(u-1)", 1.0), ("u*ln(u)-u+1", 1.0), ("1e20*(u*ln(u)-u+1)", 1e20)]
    {
        assert!((min..20.0 * min).contains(&size(text)), "{text}: {}", size(text));
    }
}
