//! Tests of bounds against 60-digit references, identities, closed forms and each other.

use std::io::Read;
use std::sync::LazyLock;

use proptest::prelude::*;

use super::exact::exact_divergence;
use super::membership::is_inside;
use super::root::last_inside;
use super::*;
use crate::divergence::{ALL, Generator};
use crate::number::tests::hex_float;
use crate::number::{Dd, Real};

/// `D - delta` with about 30 digits, rounded once.
fn exact_residual(generator: &Generator, logp: f64, log_ratio: f64, radius: Dd) -> f64 {
    (exact_divergence::<Dd>(generator, logp, log_ratio) - radius).to_f64()
}

/// `tests/data/band_*.csv.gz`: 60-digit references, see the header of each.
struct Reference {
    spec: String,
    logp: f64,
    delta: f64,
    /// The nearest double, the remainder, and the condition number, of `[lower, upper]`.
    bounds: [(f64, f64, f64); 2],
}

fn references() -> Vec<Reference> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");
    let mut references = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let stem = name.strip_prefix("band_").and_then(|name| name.strip_suffix(".csv.gz"));
        let Some(spec) = stem.map(|spec| spec.replacen('_', ":", 1)) else {
            continue;
        };
        let mut text = String::new();
        let file = std::fs::File::open(&path).unwrap();
        flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
        let rows = text.lines().filter(|line| !line.starts_with('#')).skip(1);
        for row in rows {
            let columns: Vec<&str> = row.split(',').collect();
            let number = |i: usize| hex_float(columns[i]);
            let kappa = |i: usize| columns[i].parse::<f64>().unwrap();
            references.push(Reference {
                spec: spec.clone(),
                logp: number(0),
                delta: number(1),
                bounds: [(number(2), number(4), kappa(6)), (number(3), number(5), kappa(7))],
            });
        }
    }
    assert!(references.len() > 25_000, "{}", references.len());
    references
}

/// Relative error of a log bound.
const RELATIVE: f64 = 1e-14;

/// Condition number above which a bound may have its `D` near delta instead.
const ILL_CONDITIONED: f64 = 20.0;

/// Distance of that `D` from delta, in ulp of delta.
const BACKWARD: f64 = 2.0;

/// Asserts the contract of a bound: it is not outside the exact one, and within [`RELATIVE`] or one ulp of it. If its
/// condition number exceeds [`ILL_CONDITIONED`], `D` within [`BACKWARD`] ulp of delta suffices.
fn assert_accurate(reference: &Reference, side: Side, bound: f64) {
    let Reference { spec, logp, delta, bounds } = reference;
    let (exact, rest, kappa) = bounds[usize::from(side == Side::Upper)];
    let place = format!("{spec} logp={logp:e} delta={delta:e} {side:?} {bound:e}");
    if exact.is_infinite() || exact == 0.0 {
        assert_eq!(bound, exact, "{place}");
        return;
    }
    let error = (bound - exact) - rest; // the difference of neighbours is exact
    let relative = error / exact;
    // The references have 60 digits.
    assert!(relative <= 1e-60, "{place} is outside by {relative:e}");
    let ulp = exact.abs() - exact.abs().next_down();
    if relative >= -RELATIVE || error.abs() <= ulp {
        return;
    }
    assert!(kappa > ILL_CONDITIONED, "{place} is off by {relative:e}");
    let divergence = Divergence::parse(spec).unwrap();
    let radius = divergence.generator_radius::<Dd>(*delta);
    let missing = exact_residual(&divergence.generator, *logp, bound, radius).abs();
    // The change of the generator's radius by one ulp of delta is the unit.
    let next = divergence.generator_radius::<Dd>(delta.next_up());
    assert!(missing <= BACKWARD * (next - radius).to_f64(), "{place}: {missing:e}");
}

#[test]
fn bounds_are_accurate_and_inside() {
    for reference in references() {
        let band = band(&reference.spec, reference.delta);
        for side in [Side::Lower, Side::Upper] {
            assert_accurate(&reference, side, band.bound(reference.logp, side).log_ratio);
        }
    }
}

#[test]
fn batched_bounds_are_accurate_and_inside() {
    for references in references().chunk_by(|a, b| a.spec == b.spec) {
        let divergence = Divergence::parse(&references[0].spec).unwrap();
        let logp: Vec<f64> = references.iter().map(|reference| reference.logp).collect();
        let deltas: Vec<f64> = references.iter().map(|reference| reference.delta).collect();
        let (lower, upper) = many(&divergence, Delta::Each(&deltas), &logp);
        for ((reference, lower), upper) in references.iter().zip(lower).zip(upper) {
            assert_accurate(reference, Side::Lower, lower);
            assert_accurate(reference, Side::Upper, upper);
        }
    }
}

fn many(divergence: &Divergence, delta: Delta<'_>, logp: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut lower, mut upper) = (vec![0.0; logp.len()], vec![0.0; logp.len()]);
    log_bounds(divergence, delta, delta, logp, &mut lower, &mut upper).unwrap();
    (lower, upper)
}

/// Compares 10^5 points of each divergence within the accuracy of the contract.
#[test]
fn batched_bounds_agree_with_single_ones_and_are_inside() {
    const COUNT: usize = 100_003; // not a whole number of vectors
    let mut state = 0_u64;
    let mut uniform = |low: f64, high: f64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        low + (high - low) * (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    let logp: Vec<f64> = (0..COUNT)
        .map(|index| match index % 8 {
            0 => uniform(-750.0, 0.0),
            1 => -uniform(-750.0, 0.0).exp(),
            2 if index % 64 == 2 => [0.0, 1.0, f64::NAN, f64::NEG_INFINITY][index / 64 % 4],
            _ => -(-uniform(-30.0, 30.0)).exp().ln_1p(),
        })
        .collect();
    let each: Vec<f64> = (0..COUNT).map(|_| uniform(-18.4, 2.3).exp()).collect();
    for spec in SPECS.iter().copied().chain(["alpha:-1", "vajda:2"]) {
        let divergence = Divergence::parse(spec).unwrap();
        let few = &logp[..COUNT / 20];
        for (delta, logp) in [(Delta::Each(&each), &logp[..]), (Delta::Same(0.05), few)] {
            let (lower, upper) = many(&divergence, delta, logp);
            let diagnosed =
                diagnose(&divergence, delta.part(0, few.len()), few, Side::Upper).unwrap();
            for (diagnosed, upper) in diagnosed.iter().zip(&upper) {
                assert_eq!(diagnosed.log_ratio.to_bits(), upper.to_bits(), "{spec}");
            }
            logp.par_iter().enumerate().for_each(|(index, &logp)| {
                let radius = delta.at(index);
                for (side, found) in [(Side::Lower, lower[index]), (Side::Upper, upper[index])] {
                    let alone = bound(&divergence, logp, radius, side).log_ratio;
                    let place = format!("{spec} {logp:e} {radius:e} {side:?}");
                    if logp.is_nan() {
                        assert!(found.is_nan(), "{place}: {found:e}");
                        continue;
                    }
                    let same = found == alone || (found - alone).abs() <= RELATIVE * alone.abs();
                    assert!(same, "{place}: {found:e} {alone:e}");
                    assert!(is_inside(&divergence, logp, found, radius), "{place}: {found:e}");
                }
            });
        }
    }
}

/// [`ALL`], and other parameters at the ends of their ranges and between them.
static SPECS: LazyLock<Vec<&str>> = LazyLock::new(|| {
    let more = [
        "alpha:-3",
        "alpha:-0.5",
        "alpha:0.999",
        "alpha:1.5",
        "alpha:4",
        "renyi:0.5",
        "vajda:1",
        "vajda:4",
        "hockey-stick:1",
    ];
    ALL.iter().copied().chain(more).collect()
});

fn band(spec: &str, delta: f64) -> Band {
    Band::new(Divergence::parse(spec).unwrap(), delta, delta).unwrap()
}

/// Logarithm of a probability other than 0 and 1, with a fair share of both ends.
fn log_probability() -> impl Strategy<Value = f64> {
    prop_oneof![
        (-690.0..-0.7_f64),
        (-36.0..-0.7_f64).prop_map(|log_rest: f64| (-log_rest.exp()).ln_1p()),
        (1e-6..0.999_f64).prop_map(f64::ln),
    ]
}

fn radius() -> impl Strategy<Value = f64> {
    (-18.4..2.3_f64).prop_map(f64::exp)
}

fn any_spec() -> impl Strategy<Value = &'static str> {
    prop::sample::select(SPECS.as_slice())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// p upper(p) + (1-p) lower(1-p) = 1, for probabilities whose complement is exact.
    #[test]
    fn mirror_identity_holds(spec in any_spec(), delta in radius(), p in 1e-3..0.999_f64) {
        let p = (p * 1048576.0).round() / 1048576.0;
        let band = band(spec, delta);
        // ln p is rounded: the identity holds to the effect of that on both bounds.
        let (_, log_upper) = band.log_bounds(p.ln());
        let (log_lower, _) = band.log_bounds((-p).ln_1p());
        let (up, down) = (p * log_upper.exp(), (1.0 - p) * log_lower.exp());
        let inwards = if down == 0.0 { 0.0 } else { -log_lower * down } + log_upper * up;
        let slack = MARGIN * inwards + 2e-15;
        prop_assert!((up + down - 1.0).abs() <= slack, "{:e}", up + down - 1.0);
    }

    #[test]
    fn bounds_enclose_one_inside_the_simplex(
        spec in any_spec(), delta in radius(), logp in log_probability()
    ) {
        let (lower, upper) = band(spec, delta).log_bounds(logp);
        prop_assert!(lower <= 0.0 && 0.0 <= upper && upper <= -logp, "{lower} {upper}");
    }

    /// The upper bound does not rise, and the lower one does not fall.
    #[test]
    fn bounds_are_monotone_in_p(
        spec in any_spec(), delta in radius(), a in log_probability(), b in log_probability()
    ) {
        let (small, large) = (a.min(b), a.max(b));
        let band = band(spec, delta);
        let ((low_small, up_small), (low_large, up_large)) =
            (band.log_bounds(small), band.log_bounds(large));
        // Bounds are within RELATIVE of a monotone function, but not monotone in their last bits.
        prop_assert!(up_large <= up_small * (1.0 + 2.0 * RELATIVE), "{up_small} {up_large}");
        prop_assert!(low_large >= low_small * (1.0 + 2.0 * RELATIVE), "{low_small} {low_large}");
    }

    #[test]
    fn bounds_are_nested_in_delta(
        spec in any_spec(), delta in radius(), more in 1.0..100.0_f64, logp in log_probability()
    ) {
        let (lower, upper) = band(spec, delta).log_bounds(logp);
        let (wider_lower, wider_upper) = band(spec, delta * more).log_bounds(logp);
        prop_assert!(wider_upper >= upper * (1.0 - 2.0 * RELATIVE), "{upper} {wider_upper}");
        prop_assert!(wider_lower <= lower * (1.0 - 2.0 * RELATIVE), "{lower} {wider_lower}");
    }

    /// A log-ratio 3 `RELATIVE` beyond a bound is outside.
    #[test]
    fn band_contains_its_bounds_and_nothing_beyond(
        spec in any_spec(), delta in radius(), logp in log_probability()
    ) {
        let divergence = Divergence::parse(spec).unwrap();
        let (lower, upper) = band(spec, delta).log_bounds(logp);
        for bound in [lower, upper] {
            prop_assert!(is_inside(&divergence, logp, bound, delta), "{bound}");
        }
        if lower > f64::NEG_INFINITY {
            prop_assert!(!is_inside(&divergence, logp, lower * (1.0 + 3.0 * RELATIVE), delta), "{lower}");
        }
        prop_assert!(!is_inside(&divergence, logp, upper * (1.0 + 3.0 * RELATIVE), delta), "{upper}");
    }

    /// The iterated bounds are polished. Saturated sides are skipped.
    #[test]
    fn closed_forms_agree_with_iteration(
        spec in prop::sample::select(CLOSED_FORMS.as_slice()),
        delta in radius(), logp in log_probability(), upper in any::<bool>()
    ) {
        let divergence = Divergence::parse(spec).unwrap();
        let generator = &divergence.generator;
        let side = if upper { Side::Upper } else { Side::Lower };
        let split = Split::new(logp, side);
        if is_inside(&divergence, logp, side.end(logp), delta * 1.01) {
            return Ok(());
        }
        let radius = divergence.generator_radius::<f64>(delta);
        let bound_of = |m| split.log_ratio(generator, m, side).0;
        let closed = bound_of(split.closed_form(generator, radius).unwrap());
        let rough = bound_of(split.iterated(generator, radius, &mut 0));
        let (general, _) = polish(&divergence, logp, delta, side, rough);
        prop_assert!((closed / general - 1.0).abs() < 1e-12, "{closed:e} {general:e}");
    }
}

/// Divergences whose bounds have a closed form.
const CLOSED_FORMS: [&str; 14] = [
    "tv",
    "pearson-chi2",
    "neyman-chi2",
    "hellinger",
    "bhattacharyya",
    "le-cam",
    "vajda:1",
    "vajda:1.5",
    "vajda:4",
    "bwcs:0.3",
    "bwcs:0.99",
    "hockey-stick:1",
    "hockey-stick:1.2",
    "hockey-stick:4",
];

#[test]
fn every_closed_form_is_compared() {
    let family = |spec: &str| spec.split(':').next().unwrap().to_owned();
    for &spec in SPECS.iter() {
        let generator = Divergence::parse(spec).unwrap().generator;
        let has_one = Split::new(-1.0, Side::Lower).closed_form(&generator, 0.05).is_some();
        let compared = CLOSED_FORMS.iter().any(|other| family(other) == family(spec));
        assert_eq!(has_one, compared, "{spec}");
    }
}

#[test]
fn bounds_agree_with_values_of_the_paper() {
    let anchors = [
        (0.01, 0.002497386, 7.809846),
        (0.1, 0.3127840, 2.200786),
        (0.5, 0.6915157, 1.308484),
        (0.99, 0.9312137, 1.010076),
    ];
    for (p, lower, upper) in anchors {
        let (log_lower, log_upper) = band("kl", 0.05).log_bounds(f64::ln(p));
        assert!((log_lower.exp() / lower - 1.0).abs() < 4e-7, "{p}");
        assert!((log_upper.exp() / upper - 1.0).abs() < 4e-7, "{p}");
    }
}

/// At p = 1 `D` is `f(r) + (1-r) f'(inf)`: `1 - r` for tv, `1 - sqrt(r)` for hellinger.
#[test]
fn membership_of_a_certain_token_has_its_closed_form() {
    for delta in [1e-9_f64, 1e-3, 0.3, 0.9] {
        for (spec, log_lower) in [("tv", (-delta).ln_1p()), ("hellinger", 2.0 * (-delta).ln_1p())] {
            let divergence = Divergence::parse(spec).unwrap();
            assert!(is_inside(&divergence, 0.0, 0.0, delta), "{spec} {delta}");
            assert!(
                is_inside(&divergence, 0.0, log_lower * (1.0 - RELATIVE), delta),
                "{spec} {delta}"
            );
            assert!(
                !is_inside(&divergence, 0.0, log_lower * (1.0 + RELATIVE), delta),
                "{spec} {delta}"
            );
        }
    }
}

#[test]
fn bounds_are_defined_for_every_logp() {
    for &spec in SPECS.iter() {
        let saturates = Divergence::parse(spec).unwrap().generator.saturates();
        for delta in [1e-12, 1e-4, 0.05, 3.0, 1e6] {
            let band = band(spec, delta);
            let (lower, upper) = band.log_bounds(f64::NAN);
            assert!(lower.is_nan() && upper.is_nan());
            assert_eq!(band.log_bounds(7.5), band.log_bounds(0.0), "{spec}: above 0 is read as 0");
            assert_eq!(band.bound(7.5, Side::Lower).status, Status::ReadAsCertain);
            assert_eq!(band.log_bounds(0.0).1, 0.0, "{spec}");
            let (lower, upper) = band.log_bounds(f64::NEG_INFINITY);
            assert_eq!((lower, upper), (f64::NEG_INFINITY, f64::INFINITY), "{spec}");
            for logp in [-5e-324, -1e-310, -1e-30, -300.0, -700.0, -740.0, -1e4, -1e300] {
                let (lower, upper) = band.log_bounds(logp);
                assert!(lower <= 0.0 && upper >= 0.0 && upper <= -logp, "{spec} {delta} {logp}");
                if !saturates {
                    assert!(upper < -logp && lower >= -f64::MAX, "{spec} {delta} {logp}");
                }
            }
        }
    }
}

/// Built-in divergences as text, up to a multiple of u - 1.
const AS_TEXT: [(&str, &str); 13] = [
    ("kl", "-ln(u) + u - 1"),
    ("reverse-kl", "u*ln(u) - u + 1"),
    ("reverse-kl", "u*log(u)"),
    ("tv", "abs(u-1)/2"),
    ("pearson-chi2", "u^2 - 1"),
    ("neyman-chi2", "(u-1)**2/u"),
    ("hellinger", "1 - sqrt(u)"),
    ("le-cam", "(u-1)^2/(2*(u+1))"),
    ("jensen-shannon", "(u*ln(u) - (u+1)*ln((u+1)/2))/2"),
    ("jeffreys", "(u-1)*ln(u)"),
    ("alpha:3", "(u^3 - 1)/6"),
    ("alpha:-3", "(u^-3 - 1)/12"),
    ("hockey-stick:1.25", "max(u-1.25, 0)"),
];

#[test]
fn expressions_agree_with_built_ins() {
    for (spec, text) in AS_TEXT {
        let divergence = Divergence::from_expression(text, None, None).unwrap();
        for delta in [1e-8, 1e-5, 1e-3, 0.05, 0.7, 5.0] {
            let custom = Band::new(divergence.clone(), delta, delta).unwrap();
            let built_in = band(spec, delta);
            for step in 0..150 {
                let logp = -1e-16 * 1.33_f64.powi(step);
                for side in [Side::Lower, Side::Upper] {
                    let (a, b) = (custom.bound(logp, side), built_in.bound(logp, side));
                    let (a, b) = (a.log_ratio, b.log_ratio);
                    assert!(
                        a == b || (a / b - 1.0).abs() <= 2.0 * RELATIVE,
                        "{text} {delta:e} {logp:e} {side:?}: {a:e} {b:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn bounds_of_kinked_and_flat_bottomed_expressions_agree_with_halving() {
    for text in ["max((u-1)^2, abs(u-1))", "max(abs(u-1) - 0.1, 0)", "max(u-1.3, 0)"] {
        let divergence = Divergence::from_expression(text, None, None).unwrap();
        for delta in [1e-4, 0.05, 0.4] {
            let band = Band::new(divergence.clone(), delta, delta).unwrap();
            for p in [1e-6, 1e-3, 0.1, 0.4, 0.8, 0.99] {
                let logp = f64::ln(p);
                let radius = Dd::of(delta);
                let generator = &divergence.generator;
                for (side, outside) in [(Side::Lower, -1e3), (Side::Upper, -logp)] {
                    let actual = band.bound(logp, side).log_ratio;
                    let inside = |b| exact_residual(generator, logp, b, radius) <= 0.0;
                    if inside(outside) {
                        assert!(actual.abs() >= outside.abs(), "{text} {delta} {p} {side:?}");
                        continue;
                    }
                    let expected = last_inside(0.0_f64.copysign(outside), outside, inside).at;
                    assert!(
                        (actual / expected - 1.0).abs() < RELATIVE,
                        "{text} {delta} {p} {side:?}: {actual:e} {expected:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn bounds_of_certain_and_improbable_tokens_have_their_limits() {
    let delta = 0.05_f64;
    let lower_of_certain = [
        ("kl", (-delta).exp()),
        ("tv", 1.0 - delta),
        ("hellinger", (1.0 - delta).powi(2)),
        ("le-cam", (1.0 - delta) / (1.0 + delta)),
        ("neyman-chi2", 1.0 / (1.0 + delta)),
        ("jensen-shannon", 0.863003923),
        ("pearson-chi2", 1.0),
        ("reverse-kl", 1.0),
        ("jeffreys", 1.0),
    ];
    for (spec, limit) in lower_of_certain {
        let band = band(spec, delta);
        let lower = band.log_bounds(0.0).0.exp();
        assert!((lower - limit).abs() < 1e-9, "{spec}: {lower} {limit}");
        // p upper(p) -> 1 - limit for p -> 0
        let new_p = (band.log_bounds(-600.0).1 - 600.0).exp();
        let slow = limit == 1.0; // as sqrt(p) or delta/ln(1/p)
        assert!((new_p - (1.0 - limit)).abs() < if slow { 1e-3 } else { 1e-9 }, "{spec}: {new_p}");
    }
}

#[test]
fn saturation_is_exact() {
    for (spec, p, delta) in [("tv", 0.3, 0.8), ("reverse-kl", 0.02, 0.05), ("hellinger", 0.5, 1.5)]
    {
        let (lower, _) = band(spec, delta).log_bounds(f64::ln(p));
        assert_eq!(lower, f64::NEG_INFINITY, "{spec}");
        let logp = f64::ln(1.0 - p);
        assert_eq!(band(spec, delta).log_bounds(logp).1, -logp, "{spec}");
        assert_eq!(band(spec, delta).bound(logp, Side::Upper).status, Status::Saturated);
    }
    // D of tv at r = 0 is p. A delta of p, not rounded down, includes it; a smaller delta does not.
    let logp = -1.0_f64;
    let p = Dd::of(logp).exp();
    let (below, above) = if p.lo > 0.0 { (p.hi, p.hi.next_up()) } else { (p.hi.next_down(), p.hi) };
    assert!(band("tv", below).log_bounds(logp).0 > f64::NEG_INFINITY);
    assert_eq!(band("tv", above).log_bounds(logp).0, f64::NEG_INFINITY);
}

#[test]
fn evaluations_are_counted() {
    // One decides saturation, one gives the condition number; a saturated side has the first alone.
    let tv = band("tv", 0.05);
    assert_eq!(tv.bound(-1.0, Side::Lower).evaluations, 2);
    assert_eq!(tv.bound(-4.0, Side::Lower).evaluations, 1);
    let found = band("kl", 0.05).bound(-1.0, Side::Lower).evaluations;
    assert!((3..12).contains(&found), "{found}");
}

#[test]
fn membership_is_decided_for_each_token() {
    let delta = Delta::Same(0.05);
    let kl = Divergence::parse("kl").unwrap();
    let inside = contains(&kl, delta, delta, &[-2.0; 4], &[0.5, 1.0, -1.0, -0.5]).unwrap();
    assert_eq!(inside, [true, false, false, true]);
}

#[test]
fn equality_at_an_end_saturates() {
    // D is -c ln p at the end of the upper side, or less than f(0) + f'(inf).
    for (spec, logp, delta) in
        [("reverse-kl", -0.7, 0.7), ("renyi:3", -40.0, 40.0), ("bhattacharyya", -1.4, 0.7)]
    {
        let upper = |delta: f64| band(spec, delta).bound(logp, Side::Upper);
        assert_eq!((upper(delta).log_ratio, upper(delta).status), (-logp, Status::Saturated));
        assert!(upper(delta.next_down()).log_ratio < -logp, "{spec}");
        assert_eq!(upper(delta.next_down()).status, Status::Converged);
    }
    for (spec, sup) in [("tv", 1.0), ("le-cam", 1.0), ("hellinger", 1.0), ("alpha:0.5", 4.0)] {
        for logp in [-700.0, -100.0, -1.0, -1e-100, -1e-310] {
            assert_eq!(band(spec, sup).log_bounds(logp), (f64::NEG_INFINITY, -logp), "{spec}");
        }
    }
    // The rest of the probability is left at the end of the lower side.
    for (spec, c) in [("reverse-kl", 1.0), ("renyi:0.5", 1.0), ("bhattacharyya", 0.5)] {
        for logp in [-1e-3_f64, -0.5, -3.0, -40.0] {
            let loss =
                -c * (if logp < -0.7 { (-logp.exp()).ln_1p() } else { (-logp.exp_m1()).ln() });
            let lower = |delta: f64| band(spec, delta).log_bounds(logp).0;
            assert_eq!(lower(loss * (1.0 + 1e-14)), f64::NEG_INFINITY, "{spec} {logp}");
            assert!(lower(loss * (1.0 - 1e-14)) > f64::NEG_INFINITY, "{spec} {logp}");
        }
    }
}

#[test]
fn slopes_agree_with_differences_of_bounds() {
    for &spec in SPECS.iter() {
        let band = band(spec, 0.05);
        for p in [1e-6, 1e-3, 0.03, 0.3, 0.6, 0.9] {
            let logp = f64::ln(p);
            for side in [Side::Lower, Side::Upper] {
                let at = |logp: f64| band.bound(logp, side).log_ratio;
                let slope = band.log_slope(logp, at(logp));
                let (left, right) = (at(logp - 1e-6), at(logp + 1e-6));
                if left == f64::NEG_INFINITY || band.bound(logp, side).status == Status::Saturated {
                    continue;
                }
                let measured = (right - left) / 2e-6;
                assert!(
                    (slope - measured).abs() <= 1e-6 * (1.0 + measured.abs()) * 10.0,
                    "{spec} {p} {side:?}: {slope} {measured}"
                );
            }
        }
    }
}

#[test]
fn evaluations_are_at_most_the_stated_max() {
    let mut worst = 0;
    for &spec in SPECS.iter() {
        for delta in [1e-12, 1e-8, 1e-3, 0.05, 0.7, 10.0, 1e3] {
            let band = band(spec, delta);
            for step in 1..400 {
                let logp = -1e-17 * 1.11_f64.powi(step);
                for side in [Side::Lower, Side::Upper] {
                    let bound = band.bound(logp, side);
                    worst = worst.max(bound.evaluations);
                }
            }
        }
    }
    assert!(worst <= MAX_BOUND_EVALUATIONS, "{worst}");
}

/// The expected values were computed with 60 digits.
#[test]
fn bounds_in_the_far_tails_agree_with_references() {
    let le_cam = band("le-cam", 1.83e-10).log_bounds(-1.85e-313).0;
    assert!((le_cam / -3.66e-10 - 1.0).abs() < 1e-2, "{le_cam:e}");
    let le_cam = band("le-cam", 4.4457e-12).log_bounds(-725.62).1;
    assert!((le_cam - 700.18).abs() < 0.01, "{le_cam}");
    for spec in ["tv", "hellinger", "le-cam", "jensen-shannon", "alpha:0.5"] {
        for logp in [-1.44e30, -1e6, -800.0] {
            // Beyond the max value of the divergence everything is allowed.
            assert_eq!(band(spec, 4.1).log_bounds(logp), (f64::NEG_INFINITY, -logp), "{spec}");
        }
    }
}

#[test]
fn bad_deltas_are_refused_with_value_and_index() {
    let kl = Divergence::parse("kl").unwrap();
    for delta in [0.0, -1.0, f64::INFINITY, f64::NAN] {
        assert!(matches!(Band::new(kl.clone(), delta, 0.1), Err(Error::Delta { .. })));
    }
    let radii = [0.1, -2.0];
    let (mut lower, mut upper) = ([7.0; 2], [7.0; 2]);
    let each = Delta::Each(&radii);
    let refused = log_bounds(&kl, each, each, &[-1.0, -2.0], &mut lower, &mut upper);
    assert_eq!(refused, Err(Error::Delta { value: -2.0, index: Some(1) }));
    assert_eq!(lower, [7.0; 2], "nothing is written");
    let refused = log_bounds(&kl, each, each, &[-1.0], &mut lower[..1], &mut upper[..1]);
    assert!(matches!(refused, Err(Error::Length { argument: "delta_low", .. })));
}

#[test]
fn bounds_of_text_on_vectors_are_the_last_inside() {
    let mut settled = 0;
    let mut asked = 0;
    for references in references().chunk_by(|a, b| a.spec == b.spec) {
        let spec = references[0].spec.as_str();
        let Some((_, text)) = AS_TEXT.iter().find(|(name, _)| *name == spec) else {
            continue;
        };
        let divergence = Divergence::from_expression(text, None, None).unwrap();
        let logp: Vec<f64> = references.iter().map(|reference| reference.logp).collect();
        let radii: Vec<f64> = references.iter().map(|reference| reference.delta).collect();
        let mut bounds = [vec![0.0; logp.len()], vec![0.0; logp.len()]];
        let mut open = vec![[false; 2]; logp.len()];
        let [lower, upper] = &mut bounds;
        vector::log_bounds(
            &divergence.generator,
            [&radii, &radii],
            &logp,
            [lower, upper],
            &mut |index, side, _| open[index][usize::from(side == Side::Upper)] = true,
        );
        for (index, reference) in references.iter().enumerate() {
            for side in 0..2 {
                asked += 1;
                let found = bounds[side][index];
                let (exact, rest, _) = reference.bounds[side];
                if open[index][side] {
                    continue;
                }
                settled += 1;
                let place = format!("{text} logp={:e} delta={:e}", logp[index], radii[index]);
                if exact.is_infinite() {
                    assert_eq!(found, exact, "{place}");
                    continue;
                }
                if exact == reference.logp.abs() && rest.abs() < 1e-40 * exact {
                    // Saturated, or so near to it that the rest is noise of the reference.
                    let last =
                        if divergence.generator.saturates() { exact } else { exact.next_down() };
                    assert_eq!(found, last, "{place}");
                    continue;
                }
                // The last double inside is the nearest one, or the one before it. The first digits of a text
                // cancel, so that a smaller rest is not seen, and the one before is taken.
                let beyond = if side == 0 { -rest } else { rest };
                let seen = 1e-29 / radii[index] * exact.abs();
                let (nearest, before) = (exact.abs(), exact.abs().next_down());
                if rest.abs() < seen {
                    assert!([nearest, before].contains(&found.abs()), "{place} side {side}");
                    continue;
                }
                let expected = if beyond >= 0.0 { nearest } else { before };
                assert_eq!(found.abs(), expected, "{place} side {side}: {rest:e}");
            }
        }
    }
    assert!(10 * settled > 7 * asked, "{settled} of {asked}");
}

#[test]
fn bounds_of_text_are_inside_beside_kinks_and_where_slopes_overflow() {
    for (text, delta, logp) in [
        ("u^(-5)+5*u-6", 0.3, -36.0),
        ("max(u-1.25,0)*1e10", 1e-6, -0.1),
        ("max(u-1.25,0)*1e10", 1e-9, -0.31180656419511327),
        ("1e6*max(u-2,0)+1e6*max(0.5-u,0)", 1e-8, -0.43),
    ] {
        let divergence = Divergence::from_expression(text, None, None).unwrap();
        let radius = Dd::of(delta);
        let band = Band::new(divergence, delta, delta).unwrap();
        let generator = &band.divergence.generator;
        // One token is solved by scalars, many by vectors.
        let (lower, upper) = band.log_bounds_of_many(&[logp; 64]);
        let (lower_alone, upper_alone) = band.log_bounds(logp);
        for (side, bound) in [
            (Side::Lower, lower[0]),
            (Side::Lower, lower_alone),
            (Side::Upper, upper[0]),
            (Side::Upper, upper_alone),
        ] {
            let residual = |b: f64| (exact_divergence::<Dd>(generator, logp, b) - radius).to_f64();
            assert!(residual(bound) <= 0.0, "{text} {side:?} {bound:e}");
            let end = bound == side.end(logp);
            assert!(end || residual(bound * (1.0 + 1e-9)) > 0.0, "{text} {side:?} {bound:e}");
        }
    }
}
