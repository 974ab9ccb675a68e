//! Bounds of a price against the closed form of kl, the mirror identity, the exact price and membership; the 60-digit
//! references are those of `tests/band/test_price.py`.

use proptest::prelude::*;

use super::polish::exact_residual;
use super::*;
use crate::divergence::ALL;

/// Relative error that the margin and two units in the last place make.
const RELATIVE: f64 = 1e-14;

fn region(spec: &str, price: f64) -> PriceBand {
    PriceBand::new(Divergence::parse(spec).unwrap(), price, price).unwrap()
}

fn log_probs() -> impl Strategy<Value = f64> {
    prop_oneof![
        (-690.0..-1e-3_f64),
        (-16.0..0.0_f64).prop_map(|exponent| -10f64.powf(exponent)),
        (0.0..4.0_f64).prop_map(|exponent| -10f64.powf(exponent)),
        Just(-1e-305),
        Just(-f64::MAX),
    ]
}

fn prices() -> impl Strategy<Value = f64> {
    prop_oneof![
        (-6.0..1.0_f64).prop_map(|exponent| 10f64.powf(exponent)),
        prop::sample::select(vec![0.5, 1.0, 1.5, 2.0, 4.0]),
    ]
}

/// The root of `w p r^2 + (1-w) r - 1 = 0`, `w < 0` below, without cancellation.
fn kl(p: f64, w: f64) -> f64 {
    let root = ((1.0 - w).powi(2) + 4.0 * w * p).sqrt();
    if w < 1.0 { 2.0 / ((1.0 - w) + root) } else { ((w - 1.0) + root) / (2.0 * w * p) }
}

proptest! {
    #[test]
    fn kl_has_its_closed_form(logp in -600.0..-0.1_f64, price in 0.01..5.0_f64) {
        let (log_lower, log_upper) = region("kl", price).log_bounds(logp);
        let p = logp.exp();
        for (bound, w) in [(log_lower, -price), (log_upper, price)] {
            let ratio = kl(p, w);
            prop_assert!((bound.exp() - ratio).abs() <= 1e-11 * ratio, "{bound} {w} {ratio}");
        }
    }

    #[test]
    fn bounds_are_inside_next_to_the_edge_and_in_order(
        spec in prop::sample::select(ALL), logp in log_probs(), price in prices(),
    ) {
        let price_band = region(spec, price);
        let generator = &price_band.divergence.generator;
        for side in [Side::Lower, Side::Upper] {
            let Bound { log_ratio, outside, status, .. } = price_band.bound(logp, side);
            let place = format!("{side:?} {log_ratio:e} {outside:e} {status:?}");
            prop_assert!(price_band.contains(logp, log_ratio), "{}", place);
            let sign = if side == Side::Lower { -1.0 } else { 1.0 };
            prop_assert!(log_ratio * sign >= 0.0 && log_ratio <= -logp, "{}", place);
            if status == Status::Saturated || generator.jump().is_some() {
                continue;
            }
            let equation = price_band.equation(side);
            if log_ratio != 0.0 {
                let (residual, doubt) =
                    exact_residual(generator, equation, &Places::new(logp), side, log_ratio);
                prop_assert!(residual <= doubt, "{}: {residual:e}", place);
            }
            // A price that is a limit of f' leaves terms that may be below the smallest double there.
            let limits = [equation.at_infinity.hi, -equation.at_zero.hi];
            let lost = is_far(logp) && limits.contains(&price);
            if log_ratio.abs() > TINY && outside < -logp && !lost {
                prop_assert!((outside / log_ratio - 1.0).abs() <= RELATIVE, "{}", place);
                // At the root itself the price is the given one, which is inside.
                let beyond = outside * (1.0 + 2.0 * f64::EPSILON);
                prop_assert!(beyond > -logp || !price_band.contains(logp, beyond), "{}", place);
            }
        }
    }

    #[test]
    fn sides_mirror_each_other(
        spec in prop::sample::select(ALL), logp in -8.0..-1e-3_f64, price in prices(),
    ) {
        let price_band = region(spec, price);
        let mirrored = (-logp.exp_m1()).ln();
        let upper = price_band.bound(logp, Side::Upper).log_ratio;
        let lower = price_band.bound(mirrored, Side::Lower).log_ratio;
        let sum = (logp + upper).exp() + (mirrored + lower).exp();
        prop_assert!((sum - 1.0).abs() <= 1e-9, "{sum}");
    }

    #[test]
    fn slopes_are_those_of_the_bounds(
        spec in prop::sample::select(ALL), logp in -12.0..-0.05_f64, price in 0.01..0.4_f64,
    ) {
        let price_band = region(spec, price);
        let step = 1e-5;
        for side in [Side::Lower, Side::Upper] {
            let [below, here, above] = [-step, 0.0, step]
                .map(|step| price_band.bound(logp + step, side).log_ratio);
            let slope = price_band.log_slope(logp, here);
            let difference = (above - below) / (2.0 * step);
            let bend = (above - 2.0 * here + below).abs() / step;
            if bend.is_finite() && difference.is_finite() {
                prop_assert!(
                    (slope - difference).abs() <= 1e-6 + 2.0 * bend,
                    "{side:?} {here} {slope} {difference}"
                );
            }
        }
    }
}

#[test]
fn limits_are_those_of_rare_and_of_certain_tokens() {
    let close = |a: f64, b: f64| (a - b).abs() <= RELATIVE * b.abs();
    // 1/(1-w) and 1/(1+w) for p = 0; 1 and 1/w for p = 1.
    let (lower, upper) = region("kl", 0.25).log_bounds(f64::NEG_INFINITY);
    assert!(close(lower, -(1.25_f64.ln())) && close(upper, -(0.75_f64.ln())), "{lower} {upper}");
    assert_eq!(region("kl", 1.0).log_bounds(f64::NEG_INFINITY).1, f64::INFINITY);
    assert_eq!(region("kl", 0.25).log_bounds(0.0), (0.0, 0.0));
    let (lower, upper) = region("kl", 4.0).log_bounds(0.0);
    assert!(close(lower, -(4.0_f64.ln())) && upper == 0.0, "{lower}");
    // e^w and e^-w, and nothing where f'(inf) is infinite.
    let (lower, upper) = region("reverse-kl", 0.25).log_bounds(f64::NEG_INFINITY);
    assert!(close(lower, -0.25) && close(upper, 0.25), "{lower} {upper}");
    assert_eq!(region("reverse-kl", 9.0).log_bounds(0.0), (0.0, 0.0));
    assert!(region("kl", 0.1).log_bounds(f64::NAN).0.is_nan());
}

#[test]
fn each_side_has_its_price_and_a_token_without_probability_its_region() {
    let region = PriceBand::new(Divergence::parse("kl").unwrap(), 0.2, 0.25).unwrap();
    assert_eq!((region.price(Side::Lower), region.price(Side::Upper)), (0.2, 0.25));
    // The bounds of p = 0 are 1/(1+w) and 1/(1-w).
    let logp = f64::NEG_INFINITY;
    for (log_ratio, inside) in
        [(0.28, true), (0.29, false), (-0.18, true), (-0.19, false), (f64::INFINITY, false)]
    {
        assert_eq!(region.contains(logp, log_ratio), inside, "{log_ratio}");
    }
    let wide = PriceBand::new(Divergence::parse("kl").unwrap(), 1.0, 1.0).unwrap();
    assert!(wide.contains(logp, f64::INFINITY) && wide.contains(logp, 300.0));
    let many = wide.contains_many(&[logp, -1.0], &[f64::INFINITY, 1.5]).unwrap();
    assert_eq!(many, [true, false]);
}

#[test]
fn generators_that_are_linear_on_both_sides_allow_nothing_or_everything() {
    for (spec, jump) in [("tv", 1.0), ("vajda:1", 2.0)] {
        let below = region(spec, f64::next_down(jump));
        assert_eq!(below.log_bounds(-2.0), (0.0, 0.0), "{spec}");
        assert!(below.contains(-2.0, 0.0) && !below.contains(-2.0, 5e-324));
        let from = region(spec, jump);
        assert_eq!(from.log_bounds(-2.0), (f64::NEG_INFINITY, 2.0), "{spec}");
        assert!(from.contains(-2.0, 2.0) && !from.contains(-2.0, 2.0_f64.next_up()));
    }
}

#[test]
fn hockey_stick_is_a_clip_inside_the_simplex() {
    let clip = region("hockey-stick:1.25", 0.5);
    for logp in [-700.0, -50.0, -3.0, -0.3] {
        let (lower, upper) = clip.log_bounds(logp);
        assert!((upper - 1.25_f64.ln()).abs() < 1e-16, "{upper}");
        let p = f64::exp(logp);
        let least = (1.0 - 1.25 * (1.0 - p)) / p;
        if least > 0.0 {
            assert!((lower.exp() - least).abs() < 1e-15, "{lower}");
        } else {
            assert_eq!(lower, f64::NEG_INFINITY);
        }
    }
    assert_eq!(clip.log_bounds(-0.1).1, 0.1);
}

#[test]
fn expressions_agree_with_names_and_with_their_kinks() {
    for (text, spec) in [
        ("-ln(u) + u - 1", "kl"),
        ("u*ln(u)", "reverse-kl"),
        ("(u-1)^2", "pearson-chi2"),
        ("(u-1)^2/(2*(u+1))", "le-cam"),
        ("(sqrt(u)-1)^2/2", "hellinger"),
        ("max(u-1.25, 0)", "hockey-stick:1.25"),
    ] {
        let text = Divergence::from_expression(text, None, None).unwrap();
        for price in [1e-3, 0.3, 0.9, 1.7] {
            let by_name = region(spec, price);
            let by_text = PriceBand::new(text.clone(), price, price).unwrap();
            for logp in [-720.0, -300.0, -20.0, -2.0, -0.3, -1e-5, -1e-12, 0.0, f64::NEG_INFINITY] {
                let (a, b) = (by_text.log_bounds(logp), by_name.log_bounds(logp));
                for (a, b) in [(a.0, b.0), (a.1, b.1)] {
                    let equal = a == b || (a - b).abs() <= RELATIVE * b.abs();
                    assert!(equal, "{text:?} {price} {logp}: {a:e} {b:e}");
                }
            }
        }
    }
}

#[test]
fn prices_are_finite_and_above_0() {
    for price in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = PriceBand::new(Divergence::parse("kl").unwrap(), price, 1.0).unwrap_err();
        assert!(error.to_string().contains("price must be a finite number above 0"), "{error}");
    }
}
