use super::*;
use crate::band::Band;
use crate::divergence::Divergence;
use crate::image::Image;
use crate::table::BandTable;

fn table(spec: &str, delta: f64) -> BandTable {
    let band = Band::new(Divergence::parse(spec).unwrap(), delta, delta).unwrap();
    BandTable::of_band(&band).unwrap()
}

fn both<'a, T>(losses: &'a mut [T], gradient: &'a mut [T]) -> Outputs<'a, T> {
    Outputs { per_token: Some(losses), gradient, weight: 1.0 }
}

/// Loss, gradient and totals of tokens `(old, new, advantage)`, all valid.
fn run<T: Float>(
    tokens: &[(T, T, T)],
    bounds: &BoundSource<'_, T>,
    surrogate: Surrogate,
) -> (Vec<T>, Vec<T>, Totals) {
    let column = |pick: fn(&(T, T, T)) -> T| tokens.iter().map(pick).collect::<Vec<T>>();
    let (old, new, advantage) =
        (column(|token| token.0), column(|token| token.1), column(|token| token.2));
    let mut per_token = vec![T::ZERO; tokens.len()];
    let mut gradient = vec![T::ZERO; tokens.len()];
    let tokens = Tokens {
        old_log_prob: &old,
        log_prob: &new,
        log_ratio: None,
        anchor_log_prob: None,
        advantages: Advantages::PerToken(&advantage),
        mask: &vec![1; old.len()],
    };
    let totals =
        policy_loss(&tokens, bounds, surrogate, true, both(&mut per_token, &mut gradient)).unwrap();
    (per_token, gradient, totals)
}

const MIN_CLIP: Surrogate = Surrogate::MinClip { dual_clip: None };

const fn dual(c: f64) -> Surrogate {
    Surrogate::MinClip { dual_clip: Some(c) }
}

#[test]
fn bounds_without_limit_allow_a_new_probability_of_1() {
    let table = table("tv", 0.3);
    let tokens: Vec<(f64, f64, f64)> =
        (0..1000).map(|i| (-f64::from(i) / 3000.0, 0.0, 1.0)).collect();
    let (loss, gradient, totals) = run(&tokens, &BoundSource::Table(table.image()), MIN_CLIP);
    assert_eq!((loss, totals.clipped_high), (gradient, 0));
}

#[test]
fn min_clip_stops_the_gradient_only_on_the_side_of_the_advantage() {
    let (lower, upper, c) = (0.8_f64, 1.28_f64, 3.0_f64);
    let bounds = BoundSource::Constant { log_lower: lower.ln(), log_upper: upper.ln() };
    let case = |log_ratio: f64, advantage: f64| {
        let (loss, gradient, totals) =
            run(&[(-1.0, -1.0 + log_ratio, advantage)], &bounds, dual(c));
        (loss[0], gradient[0], totals)
    };
    let near = |a: f64, b: f64| assert!((a - b).abs() <= 1e-14 * b.abs(), "{a} {b}");

    let (loss, gradient, totals) = case(0.5, 2.0);
    near(loss, -2.0 * upper);
    assert_eq!((gradient, totals.clipped_high, totals.clipped_low), (0.0, 1, 0));

    let (loss, gradient, totals) = case(-0.5, 2.0);
    near(loss, -2.0 * (-0.5_f64).exp());
    assert_eq!((gradient, totals.clipped_high, totals.clipped_low), (loss, 0, 0));

    let (loss, gradient, totals) = case(-0.5, -2.0);
    near(loss, 2.0 * lower);
    assert_eq!((gradient, totals.clipped_high, totals.clipped_low), (0.0, 0, 1));

    let (loss, gradient, totals) = case(2.0, -2.0);
    near(loss, 2.0 * c);
    assert_eq!((gradient, totals.limited, totals.clipped_low), (0.0, 1, 0));

    let (loss, gradient, _) = case(1.0, -2.0);
    near(loss, 2.0 * 1.0_f64.exp());
    assert_eq!(gradient, loss);
}

#[test]
fn gradient_passes_at_a_bound_but_not_at_the_dual_clip() {
    let bounds = BoundSource::Constant { log_lower: -0.25, log_upper: 0.25 };
    let (loss, gradient, totals) =
        run(&[(0.0, 0.25, 1.0), (0.0, -0.25, -1.0), (0.0, 3.0_f64.ln(), -1.0)], &bounds, dual(3.0));
    assert_eq!(loss[..2], gradient[..2]);
    assert_eq!((gradient[2], loss[2]), (0.0, 3.0));
    assert_eq!((totals.clipped_high, totals.clipped_low, totals.limited), (0, 0, 1));
}

#[test]
fn clamp_acts_only_beyond_its_limit() {
    let unlimited =
        BoundSource::Constant { log_lower: f64::NEG_INFINITY, log_upper: f64::INFINITY };
    let (loss, gradient, totals) = run(
        &[(0.0, -20.0, 1.0), (-20.0, 0.0, 1.0), (-21.0, 0.0, 1.0), (0.0, -800.0, 1.0)],
        &unlimited,
        MIN_CLIP,
    );
    assert_eq!(loss[..2], gradient[..2]);
    assert_eq!((loss[2], gradient[2]), (-(20.0_f64.exp()), 0.0));
    assert_eq!((loss[3], gradient[3]), (-((-20.0_f64).exp()), 0.0));
    assert_eq!((totals.log_ratio_min, totals.log_ratio_max), (-20.0, 20.0));
}

#[test]
fn nan_affects_only_its_token_and_a_masked_nan_none() {
    let nan = f32::NAN;
    let table = table("kl", 0.05);
    let bounds = BoundSource::Table(table.image());
    let (loss, gradient, totals) = run(
        &[(nan, -1.0, 1.0), (-1.0, nan, -1.0), (-1.0, -1.0, nan), (-1.0, -1.0, 1.0)],
        &bounds,
        MIN_CLIP,
    );
    assert!(loss[..3].iter().chain(&gradient[..3]).all(|value| value.is_nan()));
    assert_eq!((loss[3], gradient[3], totals.nonfinite, totals.valid), (-1.0, -1.0, 3, 4));
    assert!(totals.log_ratio_min.is_nan() && totals.log_ratio_max.is_nan() && totals.kl.is_nan());

    let tokens = Tokens {
        old_log_prob: &[nan, -1.0],
        log_prob: &[f32::INFINITY, -1.5],
        log_ratio: None,
        anchor_log_prob: None,
        advantages: Advantages::PerToken(&[nan, 1.0]),
        mask: &[0, 1],
    };
    let (mut loss, mut gradient) = ([nan; 2], [nan; 2]);
    let totals =
        policy_loss(&tokens, &bounds, MIN_CLIP, true, both(&mut loss, &mut gradient)).unwrap();
    assert_eq!((loss[0], gradient[0], totals.valid, totals.nonfinite), (0.0, 0.0, 1, 0));
    assert_eq!((totals.kl, totals.log_ratio_min), (0.5, -0.5));
}

#[test]
fn totals_are_sums_of_parts_on_any_number_of_threads() {
    let count = 3 * PARALLEL_FROM + 17;
    let table = table("kl", 0.05);
    let bounds = BoundSource::Table(table.image());
    let wave = |i: usize, frequency: f64| (i as f64 * frequency).sin();
    let tokens: Vec<(f64, f64, f64)> = (0..count)
        .map(|i| {
            let old = -5.0 - 5.0 * wave(i, 0.37);
            (old, old + wave(i, 0.11), wave(i, 0.73))
        })
        .collect();
    let (loss, gradient, totals) = run(&tokens, &bounds, dual(2.0));
    let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let again = single.install(|| run(&tokens, &bounds, dual(2.0)));
    assert_eq!((&loss, &gradient, totals), (&again.0, &again.1, again.2));

    let cut = CHUNK + 5;
    let (first, second) = tokens.split_at(cut);
    let (first, second) = (run(first, &bounds, dual(2.0)), run(second, &bounds, dual(2.0)));
    assert_eq!((&loss[..cut], &loss[cut..]), (&first.0[..], &second.0[..]));
    let parts = first.2.merge(&second.2);
    let counts = |totals: &Totals| {
        let Totals { valid, clipped_low, clipped_high, limited, by_probability, .. } = *totals;
        (valid, clipped_low, clipped_high, limited, by_probability)
    };
    assert_eq!(counts(&totals), counts(&parts));
    assert!(totals.clipped_low > 0 && totals.clipped_high > 0 && totals.limited > 0);
    assert_eq!(totals.by_probability.iter().map(|bin| bin.valid).sum::<u64>(), totals.valid);
    assert!((totals.kl_k3 - parts.kl_k3).abs() < 1e-12 * totals.kl_k3);
    let (sum, size) = loss.iter().fold((0.0, 0.0), |(sum, size), l| (sum + l, size + l.abs()));
    assert!((totals.loss - sum).abs() < 1e-12 * size && sum.abs() > 1e-3 * size);
}

#[test]
fn advantage_of_a_row_equals_one_for_each_token() {
    let (old, new) = ([-1.0_f32; 6], [-1.1, -1.0, -0.9, -1.1, -1.0, -0.9]);
    let bounds = BoundSource::Constant { log_lower: -0.05, log_upper: 0.05 };
    let with = |advantages| {
        let (mut loss, mut gradient) = ([0.0; 6], [0.0; 6]);
        let tokens = Tokens {
            old_log_prob: &old,
            log_prob: &new,
            log_ratio: None,
            anchor_log_prob: None,
            advantages,
            mask: &[1; 6],
        };
        policy_loss(&tokens, &bounds, MIN_CLIP, false, both(&mut loss, &mut gradient)).unwrap();
        (loss, gradient)
    };
    let each = with(Advantages::PerToken(&[2.0, 2.0, 2.0, -3.0, -3.0, -3.0]));
    assert_eq!(each, with(Advantages::PerRow { values: &[2.0, -3.0], row_length: 3 }));
}

/// Compares every surrogate in float32, with holes in the mask, to a loss of each token alone.
#[test]
fn loss_of_a_token_is_independent_of_its_neighbours() {
    let count = BLOCK + CHUNK + 45;
    let table = table("kl", 0.05);
    let wave = |i: usize, frequency: f64| (i as f64 * frequency).sin() as f32;
    let old: Vec<f32> = (0..count).map(|i| -2.0 - 2.0 * wave(i, 0.37)).collect();
    let new: Vec<f32> = (0..count).map(|i| old[i] + wave(i, 0.11)).collect();
    let advantages: Vec<f32> = (0..count).map(|i| wave(i, 0.73)).collect();
    let mask: Vec<u8> = (0..count).map(|i| u8::from(i % 100 < 40 || wave(i, 1.9) > 0.0)).collect();
    let (low, high): (Vec<f32>, Vec<f32>) =
        (0..count).map(|i| (-0.3 - 0.2 * wave(i, 0.5), 0.4 + 0.3 * wave(i, 0.6))).unzip();
    let of = |from: usize, to: usize, per_token: bool, surrogate: Surrogate| {
        let tokens = Tokens {
            old_log_prob: &old[from..to],
            log_prob: &new[from..to],
            log_ratio: None,
            anchor_log_prob: None,
            advantages: Advantages::PerToken(&advantages[from..to]),
            mask: &mask[from..to],
        };
        let bounds = if per_token {
            BoundSource::PerToken { log_lower: &low[from..to], log_upper: &high[from..to] }
        } else {
            BoundSource::Table(table.image())
        };
        let (mut loss, mut gradient) = (vec![7.0; to - from], vec![7.0; to - from]);
        let outputs = both(&mut loss, &mut gradient);
        let totals = policy_loss(&tokens, &bounds, surrogate, true, outputs).unwrap();
        (loss, gradient, totals)
    };
    for surrogate in [
        dual(1.3),
        Surrogate::Mask { truncation: Some(1.2), symmetric: false },
        Surrogate::Weight,
        Surrogate::GradientPreserving { beta_low: 0.5, beta_high: 0.25 },
    ] {
        for per_token in [false, true] {
            let (loss, gradient, totals) = of(0, count, per_token, surrogate);
            let mut sum = Totals::default();
            for i in 0..count {
                let single = of(i, i + 1, per_token, surrogate);
                assert_eq!((loss[i], gradient[i]), (single.0[0], single.1[0]), "{surrogate:?} {i}");
                sum = sum.merge(&single.2);
            }
            let extremes = |totals: &Totals| (totals.log_ratio_min, totals.log_ratio_max);
            let counts = |totals: &Totals| {
                let Totals { valid, clipped_low, clipped_high, limited, .. } = *totals;
                (valid, clipped_low, clipped_high, limited, totals.by_probability)
            };
            assert_eq!(counts(&totals), counts(&sum));
            assert_eq!(extremes(&totals), extremes(&sum));
            // Up to 64 tokens are added up in float32.
            let close = |a: f64, b: f64, scale: f64| (a - b).abs() <= 64.0 * 2e-7 * scale;
            assert!(close(totals.loss, sum.loss, sum.gradient_unclipped * 8.0));
            assert!(close(totals.kl, sum.kl, totals.valid as f64));
            assert!(close(totals.kl_k3, sum.kl_k3, sum.kl_k3));
            assert!(close(totals.entropy, sum.entropy, sum.entropy));
            assert!(close(
                totals.gradient_unclipped,
                sum.gradient_unclipped,
                sum.gradient_unclipped
            ));
            assert!(close(totals.gradient_removed, sum.gradient_removed, sum.gradient_removed));
        }
    }
}

#[test]
fn weight_scales_only_the_gradient_and_losses_are_optional() {
    let count = CHUNK + 46;
    let wave = |i: usize, frequency: f64| (i as f64 * frequency).sin() as f32;
    let old: Vec<f32> = (0..count).map(|i| -2.0 - 2.0 * wave(i, 0.37)).collect();
    let new: Vec<f32> = (0..count).map(|i| old[i] + wave(i, 0.11)).collect();
    let advantages = Advantages::PerRow { values: &[1.0, -1.0, 0.5], row_length: count / 3 };
    assert_eq!(count % 3, 0);
    let mask: Vec<u8> = (0..count).map(|i| (i % 7) as u8).collect();
    let tokens = Tokens {
        old_log_prob: &old,
        log_prob: &new,
        log_ratio: None,
        anchor_log_prob: None,
        advantages,
        mask: &mask,
    };
    let bounds = BoundSource::Constant { log_lower: -0.2, log_upper: 0.3 };
    let (mut loss, mut gradient) = (vec![7.0; count], vec![7.0; count]);
    let totals =
        policy_loss(&tokens, &bounds, MIN_CLIP, true, both(&mut loss, &mut gradient)).unwrap();
    let mut weighted = vec![7.0; count];
    let outputs = Outputs { per_token: None, gradient: &mut weighted, weight: 1.0 / 3.0 };
    assert_eq!(policy_loss(&tokens, &bounds, MIN_CLIP, true, outputs).unwrap(), totals);
    let expected: Vec<f32> = gradient.iter().map(|gradient| gradient * (1.0 / 3.0)).collect();
    assert_eq!(weighted, expected);
    assert_eq!(count_valid(&mask) as u64, totals.valid);
    assert_eq!(count_valid(&[]), 0);
}

#[test]
fn a_long_call_may_be_ended_between_groups_and_their_number_changes_no_bit() {
    let count = 2 * GROUP * CHUNK + 3;
    let old: Vec<f32> = (0..count).map(|i| -2.0 - 2.0 * (i as f32 * 0.37).sin()).collect();
    let new: Vec<f32> = (0..count).map(|i| old[i] + (i as f32 * 0.11).sin()).collect();
    let tokens = Tokens {
        old_log_prob: &old,
        log_prob: &new,
        log_ratio: None,
        anchor_log_prob: None,
        advantages: Advantages::PerRow { values: &[1.0], row_length: count },
        mask: &vec![1; count],
    };
    let bounds = BoundSource::Constant { log_lower: -0.2, log_upper: 0.3 };
    let call = |gradient: &mut [f32], last: usize| {
        let mut calls = 0;
        let outputs = Outputs { per_token: None, gradient, weight: 1.0 };
        let totals = policy_loss_in_groups(&tokens, &bounds, MIN_CLIP, true, outputs, || {
            calls += 1;
            if calls <= last {
                Ok(())
            } else {
                Err(Error::check_length("tokens", 0, 1).unwrap_err())
            }
        });
        (totals, calls)
    };
    let mut gradient = vec![7.0; count];
    let (totals, calls) = call(&mut gradient, 2);
    assert_eq!(calls, 2);

    let mut expected = Totals::default();
    for start in (0..count).step_by(CHUNK) {
        let part = start..count.min(start + CHUNK);
        let mut alone = vec![7.0; part.len()];
        let tokens = Tokens {
            old_log_prob: &old[part.clone()],
            log_prob: &new[part.clone()],
            advantages: Advantages::PerRow { values: &[1.0], row_length: part.len() },
            mask: &vec![1; part.len()],
            ..tokens
        };
        let outputs = Outputs { per_token: None, gradient: &mut alone, weight: 1.0 };
        let found = policy_loss(&tokens, &bounds, MIN_CLIP, true, outputs).unwrap();
        expected = expected.merge(&found);
        assert_eq!(alone, gradient[part]);
    }
    assert_eq!(totals, Ok(expected));

    let mut ended = vec![7.0; count];
    assert_eq!(call(&mut ended, 0), (Err(Error::check_length("tokens", 0, 1).unwrap_err()), 1));
    let (first, rest) = ended.split_at(GROUP * CHUNK);
    assert_eq!(first, &gradient[..first.len()]);
    assert!(rest.iter().all(|&gradient| gradient == 7.0));
}

#[test]
fn bad_arguments_are_refused_before_anything_is_written() {
    let tokens = Tokens {
        old_log_prob: &[-1.0, -1.0],
        log_prob: &[-1.0_f64],
        log_ratio: None,
        anchor_log_prob: None,
        advantages: Advantages::PerToken(&[1.0]),
        mask: &[1],
    };
    let bounds = BoundSource::Constant { log_lower: -0.1, log_upper: 0.1 };
    let (mut loss, mut gradient) = ([7.0], [7.0]);
    let mut refused = |tokens: &Tokens<'_, f64>, surrogate| {
        policy_loss(tokens, &bounds, surrogate, false, both(&mut loss, &mut gradient))
            .unwrap_err()
            .to_string()
    };
    assert_eq!(refused(&tokens, MIN_CLIP), "old_log_prob has 2 elements, expected 1");
    let tokens = Tokens { old_log_prob: &[-1.0], ..tokens };
    assert_eq!(refused(&tokens, dual(1.0)), "dual_clip must be above 1, got 1");
    assert_eq!(refused(&tokens, dual(f64::NAN)), "dual_clip must be above 1, got NaN");
    assert_eq!((loss, gradient), ([7.0], [7.0]));
}

#[test]
fn every_slice_of_another_length_is_refused_by_its_name() {
    let (one, two) = ([-1.0_f64], [-1.0_f64; 2]);
    let fit = Tokens {
        old_log_prob: &two,
        log_prob: &two,
        log_ratio: Some(&two),
        anchor_log_prob: Some(&two),
        advantages: Advantages::PerToken(&two),
        mask: &[1, 1],
    };
    let rows = Advantages::PerRow { values: &two, row_length: 2 };
    let bounds = |log_lower, log_upper| BoundSource::PerToken { log_lower, log_upper };
    let short = [
        ("old_log_prob", Tokens { old_log_prob: &one, ..fit }, bounds(&two, &two)),
        ("log_ratio", Tokens { log_ratio: Some(&one), ..fit }, bounds(&two, &two)),
        ("anchor_log_prob", Tokens { anchor_log_prob: Some(&one), ..fit }, bounds(&two, &two)),
        (
            "advantages",
            Tokens { advantages: Advantages::PerToken(&one), ..fit },
            bounds(&two, &two),
        ),
        ("advantages", Tokens { advantages: rows, ..fit }, bounds(&two, &two)),
        ("mask", Tokens { mask: &[1], ..fit }, bounds(&two, &two)),
        ("log_lower", fit, bounds(&one, &two)),
        ("log_upper", fit, bounds(&two, &one)),
    ];
    let call = |tokens: &Tokens<'_, f64>, bounds: &BoundSource<'_, f64>, sizes: [usize; 2]| {
        let [mut losses, mut gradient] = sizes.map(|size| vec![7.0; size]);
        let result = policy_loss(tokens, bounds, MIN_CLIP, false, both(&mut losses, &mut gradient));
        assert!(result.is_ok() || losses.iter().chain(&gradient).all(|&number| number == 7.0));
        result.map_err(|error| error.to_string())
    };
    for (name, tokens, bounds) in short {
        let actual = if matches!(tokens.advantages, Advantages::PerRow { .. }) { 4 } else { 1 };
        let message = format!("{name} has {actual} elements, expected 2");
        assert_eq!(call(&tokens, &bounds, [2, 2]), Err(message));
    }
    for (name, sizes) in [("per_token", [1, 2]), ("gradient", [2, 1])] {
        let message = format!("{name} has 1 elements, expected 2");
        assert_eq!(call(&fit, &bounds(&two, &two), sizes), Err(message));
    }
    assert!(call(&fit, &bounds(&two, &two), [2, 2]).is_ok());
}

#[test]
fn log_probs_above_the_limit_are_counted_where_tokens_count() {
    // Enough tokens for whole vectors and a part of one.
    let count = 37;
    let at = |places: &[usize], value: f64| {
        let mut log_probs = vec![-1.0; count];
        for &place in places {
            log_probs[place] = value;
        }
        log_probs
    };
    let old = at(&[0, 5, 36], 0.5);
    let new = at(&[5, 17, 20], MAX_LOG_PROB.next_up());
    let mut mask = vec![1; count];
    mask[20] = 0;
    let limit = at(&[1, 2, 3], MAX_LOG_PROB);
    for (old, new, expected) in [(&old, &new, 4), (&limit, &limit, 0)] {
        let tokens = Tokens {
            old_log_prob: old,
            log_prob: new,
            log_ratio: None,
            anchor_log_prob: None,
            advantages: Advantages::PerRow { values: &[1.0], row_length: count },
            mask: &mask,
        };
        let bounds = BoundSource::Constant { log_lower: -0.2, log_upper: 0.2 };
        let mut gradient = vec![0.0; count];
        let outputs = Outputs { per_token: None, gradient: &mut gradient, weight: 1.0 };
        let totals = policy_loss(&tokens, &bounds, MIN_CLIP, false, outputs).unwrap();
        assert_eq!(totals.positive, expected);
    }
}

#[test]
fn advantages_of_rows_are_repeated_from_any_token_on() {
    let each = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 4.0, 4.0];
    let rows = Advantages::PerRow { values: &[1.0, 2.0, 3.0, 4.0], row_length: 3 };
    for start in 0..each.len() {
        for end in start..=each.len() {
            let mut buffers = [vec![7.0; end - start], vec![7.0; end - start]];
            let [of_rows, of_tokens] = &mut buffers;
            assert_eq!(rows.block(start, of_rows), &each[start..end]);
            assert_eq!(Advantages::PerToken(&each).block(start, of_tokens), &each[start..end]);
        }
    }
}

#[test]
fn each_surrogate_equals_its_formula() {
    // (x, A): inside, at a bound, beyond on the side of A and on the other, beyond the clamp.
    let cases = [
        (0.1, 2.0),
        (-0.2, -1.0),
        (0.3, 1.0),
        (0.3, -1.5),
        (-0.4, 1.0),
        (-0.4, -2.0),
        (4.0, 0.5),
        (4.0, -0.5),
        (-30.0, -1.0),
        (-30.0, 1.0),
        (0.5, 0.0),
    ];
    let (low, high, old) = (-0.2_f64, 0.25_f64, -5.0_f64);
    let bounds = BoundSource::Constant { log_lower: low, log_upper: high };
    for (x, advantage) in cases {
        let new = old + x;
        let x = (new - old).clamp(-20.0, 20.0);
        let (r, clamp_acts) = (x.exp(), (new - old).abs() > 20.0);
        let (below, above) = (advantage < 0.0 && x < low, advantage > 0.0 && x > high);
        let beyond = below || above;
        let edge = if below { low.exp() } else { high.exp() };
        let weight = r.min(3.0);
        let clipped = x.clamp(low, high).exp();
        let (beta_low, beta_high) = (0.75, 0.5);
        let beta = if below { beta_low } else { beta_high };
        let preserved = if beyond { beta * edge } else { r };
        let formulas = [
            (
                Surrogate::Mask { truncation: Some(3.0), symmetric: false },
                if beyond { 0.0 } else { -advantage * weight * new },
                if beyond { 0.0 } else { -advantage * weight },
            ),
            (Surrogate::Weight, -advantage * clipped * new, -advantage * clipped),
            (
                Surrogate::GradientPreserving { beta_low, beta_high },
                -advantage * preserved,
                if clamp_acts && !beyond { 0.0 } else { -advantage * preserved },
            ),
        ];
        for (surrogate, expected_loss, expected_gradient) in formulas {
            let (loss, gradient, totals) = run(&[(old, new, advantage)], &bounds, surrogate);
            let near = |a: f64, b: f64| (a - b).abs() <= 4e-16 * b.abs();
            assert!(near(loss[0], expected_loss), "{surrogate:?} {x} {loss:?} {expected_loss}");
            assert!(
                near(gradient[0], expected_gradient),
                "{surrogate:?} {x} {gradient:?} {expected_gradient}"
            );
            let removed = (-advantage * r - expected_gradient).abs();
            assert!((totals.gradient_removed - removed).abs() <= 4e-16 * (r * advantage).abs());
            let (low_count, high_count) = match surrogate {
                Surrogate::Weight => (x < low, x > high),
                _ => (below, above),
            };
            assert_eq!(
                (totals.clipped_low, totals.clipped_high),
                (u64::from(low_count), u64::from(high_count)),
                "{surrogate:?} {x} {advantage}"
            );
        }
    }
}

#[test]
fn given_log_ratio_replaces_that_of_the_token() {
    let bounds = BoundSource::Constant { log_lower: -0.1, log_upper: 0.1 };
    let tokens = Tokens {
        old_log_prob: &[-1.0, -1.0],
        log_prob: &[-1.5, -0.5],
        log_ratio: Some(&[0.05, 0.2]),
        anchor_log_prob: None,
        advantages: Advantages::PerToken(&[1.0, 1.0]),
        mask: &[1, 1],
    };
    let (mut loss, mut gradient) = ([0.0; 2], [0.0; 2]);
    policy_loss(&tokens, &bounds, MIN_CLIP, false, both(&mut loss, &mut gradient)).unwrap();
    assert_eq!(loss, [-0.05_f64.exp(), -0.1_f64.exp()]);
    assert_eq!(gradient, [-0.05_f64.exp(), 0.0]);
}

#[test]
fn table_bounds_equal_the_scalar_lookup() {
    let table = table("reverse-kl", 0.05);
    let old: Vec<f32> = (0..3 * PARALLEL_FROM + 7).map(|i| -(i as f32) * 2e-3).collect();
    let old = [old, vec![f32::NAN, 0.5, f32::NEG_INFINITY]].concat();
    let (mut lower, mut log_upper) = (vec![0.0; old.len()], vec![0.0; old.len()]);
    table_bounds(table.image(), &old, &mut lower, &mut log_upper).unwrap();
    for ((&old, &lower), &log_upper) in old.iter().zip(&lower).zip(&log_upper) {
        let y = Image::y(old);
        for (found, scalar) in
            [(lower, table.image().lower(y)), (log_upper, table.image().log_upper(y))]
        {
            assert!(found == scalar || found.is_nan() && old.is_nan(), "{old} {found} {scalar}");
        }
    }
    assert!(table_bounds(table.image(), &old, &mut lower[1..], &mut log_upper).is_err());

    let old: Vec<f64> = old.into_iter().map(|old| 1.000_000_01 * f64::from(old)).collect();
    let (mut log_lower, mut log_upper) = (vec![0.0; old.len()], vec![0.0; old.len()]);
    table_log_bounds(table.image(), &old, &mut log_lower, &mut log_upper).unwrap();
    for ((&old, lower), upper) in old.iter().zip(&log_lower).zip(&log_upper) {
        let scalar = table.log_bounds(old);
        if old.is_nan() {
            assert!(lower.is_nan() && upper.is_nan());
        } else {
            assert_eq!((*lower, *upper), scalar, "{old}");
        }
    }
    let (log_lower, log_upper) = (&mut log_lower[1..], &mut log_upper);
    assert!(table_log_bounds(table.image(), &old, log_lower, log_upper).is_err());
}

#[test]
fn empty_batch_has_default_totals() {
    let (_, _, totals) =
        run::<f32>(&[], &BoundSource::Constant { log_lower: -0.1, log_upper: 0.1 }, MIN_CLIP);
    assert_eq!(totals, Totals::default());
}

/// A batch that moves in both directions, with advantages of both signs.
fn spread_batch() -> Vec<(f64, f64, f64)> {
    (0..400)
        .map(|i| {
            let old = -0.001 * 1.02_f64.powi(i);
            let step = 1.7 * f64::from(i % 41 - 20) / 20.0;
            ((old), (old + step).min(0.0), if i % 3 == 0 { -1.5 } else { 0.75 })
        })
        .collect()
}

#[test]
fn symmetric_mask_drops_on_either_side_but_never_a_nan() {
    let bounds = BoundSource::Constant { log_lower: -0.25, log_upper: 0.5 };
    let mask = Surrogate::Mask { truncation: None, symmetric: true };
    for advantage in [2.0, -2.0] {
        for (log_ratio, kept) in
            [(-0.5, false), (-0.25, true), (0.0, true), (0.5, true), (0.75, false)]
        {
            let (_, gradient, totals) = run(&[(-1.0, -1.0 + log_ratio, advantage)], &bounds, mask);
            assert_eq!(gradient[0] != 0.0, kept, "{log_ratio} {advantage}");
            let sides = (totals.clipped_low, totals.clipped_high);
            assert_eq!(sides, (u64::from(log_ratio < -0.25), u64::from(log_ratio > 0.5)));
        }
    }
    let (loss, gradient, _) = run(&[(-1.0, -0.5, f64::NAN)], &bounds, mask);
    assert!(loss[0].is_nan() && gradient[0].is_nan());
}

#[test]
fn soft_gate_of_a_clip_of_1_is_the_gate_of_sapo() {
    let bounds = BoundSource::Constant { log_lower: f64::NEG_INFINITY, log_upper: 2.0_f64.ln() };
    let gate = Surrogate::SoftGate { tau_positive: 1.0, tau_negative: 1.05 };
    let tokens = spread_batch();
    let (loss, gradient, _) = run(&tokens, &bounds, gate);
    for (i, &(old, new, advantage)) in tokens.iter().enumerate() {
        let r = (new - old).exp();
        let tau = if advantage > 0.0 { 1.0 } else { 1.05 };
        let sigmoid = 1.0 / (1.0 + (-tau * (r - 1.0)).exp());
        let want =
            [-advantage * 4.0 / tau * sigmoid, -advantage * r * 4.0 * sigmoid * (1.0 - sigmoid)];
        for (got, want) in [loss[i], gradient[i]].into_iter().zip(want) {
            assert!(
                (got - want).abs() <= 1e-14 * want.abs(),
                "{old} {new} {advantage}: {got} {want}"
            );
        }
    }
}

#[test]
fn quadratic_pulls_back_to_a_gradient_of_0_at_the_bound() {
    let (low, high) = (0.25_f64, 0.5_f64);
    let bounds = BoundSource::Constant { log_lower: (-low).ln_1p(), log_upper: high.ln_1p() };
    let tokens = spread_batch();
    let (loss, gradient, totals) = run(&tokens, &bounds, Surrogate::Quadratic);
    for (i, &(old, new, advantage)) in tokens.iter().enumerate() {
        let r = (new - old).exp();
        let width = if r > 1.0 { high } else { low };
        let want = [
            -advantage * r + advantage.abs() * (r - 1.0).powi(2) / (2.0 * width),
            -advantage * r * (1.0 - advantage.signum() * (r - 1.0) / width),
        ];
        for (got, want) in [loss[i], gradient[i]].into_iter().zip(want) {
            // The factor of the gradient cancels where r is at its bound.
            assert!((got - want).abs() <= 1e-14 * (want.abs() + r), "{old} {new}: {got} {want}");
        }
    }
    let outside = |beyond: fn(f64, f64) -> bool, bound: f64| {
        tokens.iter().filter(|(old, new, _)| beyond((new - old).exp(), bound)).count() as u64
    };
    assert_eq!(totals.clipped_low, outside(|r, bound| r < bound, 1.0 - low));
    assert_eq!(totals.clipped_high, outside(|r, bound| r > bound, 1.0 + high));
}

/// Bounds at an anchor are the bounds of a token's own ratio, shifted by anchor/old.
#[test]
fn anchor_shifts_the_bounds() {
    let table = table("kl", 0.05);
    let tokens = spread_batch();
    let column = |pick: fn(&(f64, f64, f64)) -> f64| tokens.iter().map(pick).collect::<Vec<_>>();
    let (old, new, advantage) = (column(|t| t.0), column(|t| t.1), column(|t| t.2));
    let anchor: Vec<f64> = old
        .iter()
        .enumerate()
        .map(|(i, old)| old * (1.0 + 0.1 * f64::from(i as i32 % 7 - 3)))
        .collect();
    let mut lower = vec![0.0; old.len()];
    let mut log_upper = vec![0.0; old.len()];
    table_bounds(table.image(), &anchor, &mut lower, &mut log_upper).unwrap();
    let shift = |i: usize| anchor[i] - old[i];
    let log_lower: Vec<f64> = lower.iter().enumerate().map(|(i, l)| l.ln() + shift(i)).collect();
    let log_upper: Vec<f64> = log_upper.iter().enumerate().map(|(i, u)| u + shift(i)).collect();
    let shifted = BoundSource::PerToken { log_lower: &log_lower, log_upper: &log_upper };
    let mask = vec![1; old.len()];
    let at = |anchor_log_prob, bounds: &BoundSource<'_, f64>, surrogate| {
        let tokens = Tokens {
            old_log_prob: &old,
            log_prob: &new,
            log_ratio: None,
            anchor_log_prob,
            advantages: Advantages::PerToken(&advantage),
            mask: &mask,
        };
        let (mut loss, mut gradient) = (vec![0.0; old.len()], vec![0.0; old.len()]);
        let outputs = both(&mut loss, &mut gradient);
        let totals = policy_loss(&tokens, bounds, surrogate, false, outputs).unwrap();
        (loss, gradient, totals)
    };
    // The symmetric mask and weight select a side by the sign of new/anchor, which the shifted bounds may not.
    for surrogate in [
        dual(3.0),
        Surrogate::Mask { truncation: Some(1.5), symmetric: false },
        Surrogate::GradientPreserving { beta_low: 0.5, beta_high: 1.0 },
    ] {
        let (loss, gradient, totals) =
            at(Some(&anchor), &BoundSource::Table(table.image()), surrogate);
        let (want_loss, want_gradient, want) = at(None, &shifted, surrogate);
        assert!(totals.clipped_low > 10 && totals.clipped_high > 10);
        assert_eq!(
            (totals.clipped_low, totals.clipped_high),
            (want.clipped_low, want.clipped_high)
        );
        for (got, want) in loss.iter().chain(&gradient).zip(want_loss.iter().chain(&want_gradient))
        {
            assert!((got - want).abs() <= 1e-13 * want.abs(), "{surrogate:?}: {got} {want}");
        }
    }
    // An anchor at the old policy changes nothing, to the bit.
    for surrogate in [
        MIN_CLIP,
        Surrogate::Mask { truncation: None, symmetric: true },
        Surrogate::Weight,
        Surrogate::SoftGate { tau_positive: 1.0, tau_negative: 1.05 },
        Surrogate::Quadratic,
    ] {
        let bounds = BoundSource::Table(table.image());
        assert_eq!(
            at(Some(&old), &bounds, surrogate),
            at(None, &bounds, surrogate),
            "{surrogate:?}"
        );
    }
}
