//! Routines on fixed tokens, whose instructions `tools/count_instructions.py` counts.
//!
//! `instructions` lists the routines, `instructions NAME REPEATS` runs one. The difference between two numbers of
//! repeats is the cost of a repeat, without start and preparation.

use std::env;
use std::hint::black_box;
use std::process::ExitCode;

use bandpo::band::{Band, Delta, log_bounds};
use bandpo::divergence::Divergence;
use bandpo::loss::{Advantages, BoundSource, Float, Outputs, Tokens, policy_loss};
use bandpo::surrogate::Surrogate;
use bandpo::table::{BandTable, Image};

/// Tokens of a repeat: a multiple of any vector and of a part of a batch.
const TOKENS: usize = 1 << 14;

/// Tokens of a repeat of the solver, which takes hundreds of instructions a token.
const SOLVED: usize = 1 << 10;

const DELTA: f64 = 0.05;

struct Routine {
    name: &'static str,
    /// Tokens of a repeat.
    tokens: usize,
    run: fn(u32),
}

const fn routine(name: &'static str, tokens: usize, run: fn(u32)) -> Routine {
    Routine { name, tokens, run }
}

const ROUTINES: [Routine; 9] = [
    routine("solver kl", SOLVED, |repeats| solver("kl", repeats)),
    routine("solver reverse-kl", SOLVED, |repeats| solver("reverse-kl", repeats)),
    routine("solver jensen-shannon", SOLVED, |repeats| solver("jensen-shannon", repeats)),
    routine("table lookup", TOKENS, lookup),
    routine("loss min-clip float32", TOKENS, |repeats| {
        loss(|x| x as f32, Surrogate::MinClip { dual_clip: None }, repeats);
    }),
    routine("loss min-clip float64", TOKENS, |repeats| {
        loss(|x| x, Surrogate::MinClip { dual_clip: None }, repeats);
    }),
    routine("loss mask float32", TOKENS, |repeats| {
        loss(|x| x as f32, Surrogate::Mask { truncation: Some(20.0), symmetric: false }, repeats);
    }),
    routine("loss weight float32", TOKENS, |repeats| {
        loss(|x| x as f32, Surrogate::Weight, repeats);
    }),
    routine("loss gradient-preserving float32", TOKENS, |repeats| {
        let surrogate = Surrogate::GradientPreserving { beta_low: 1.0, beta_high: 1.0 };
        loss(|x| x as f32, surrogate, repeats);
    }),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).filter(|text| text != "--bench").collect();
    match arguments.as_slice() {
        [] => {
            for Routine { name, tokens, .. } in ROUTINES {
                println!("{tokens} {name}");
            }
            ExitCode::SUCCESS
        }
        [name, repeats] => {
            let routine = ROUTINES.iter().find(|routine| routine.name == name);
            let (Some(routine), Ok(repeats)) = (routine, repeats.parse()) else {
                eprintln!("instructions: there is no {name} to run {repeats} times");
                return ExitCode::from(2);
            };
            // A second thread would wait in loops of random length.
            rayon::ThreadPoolBuilder::new()
                .num_threads(1)
                .use_current_thread()
                .build_global()
                .expect("no pool was made before");
            (routine.run)(repeats);
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: instructions [NAME REPEATS]");
            ExitCode::from(2)
        }
    }
}

/// Numbers spread evenly over [0, 1): multiples of an irrational, modulo 1.
fn spread(count: usize, irrational: f64) -> impl Iterator<Item = f64> {
    (0..count).map(move |i| (i as f64 * irrational).fract())
}

/// Log-probs with logits spread evenly over [-6, 12].
fn log_probs(count: usize) -> impl Iterator<Item = f64> {
    spread(count, 0.618_033_988_749_895).map(|at| -(6.0 - 18.0 * at).exp().ln_1p())
}

fn divergence(spec: &str) -> Divergence {
    Divergence::parse(spec).expect("a built-in")
}

fn table() -> BandTable {
    let band = Band::new(divergence("kl"), DELTA, DELTA).expect("a radius");
    BandTable::of_band(&band).expect("a table")
}

fn solver(spec: &str, repeats: u32) {
    let divergence = divergence(spec);
    let logp: Vec<f64> = log_probs(SOLVED).collect();
    let (mut lower, mut upper) = (vec![0.0; SOLVED], vec![0.0; SOLVED]);
    let delta = Delta::Same(DELTA);
    for _ in 0..repeats {
        log_bounds(&divergence, delta, delta, black_box(&logp), &mut lower, &mut upper)
            .expect("equal lengths");
        black_box((&lower, &upper));
    }
}

fn lookup(repeats: u32) {
    let table = table();
    let image = table.image();
    let y: Vec<f32> = log_probs(TOKENS).map(|logp| Image::y(logp as f32)).collect();
    let mut bounds = vec![(0.0, 0.0); TOKENS];
    for _ in 0..repeats {
        for (bound, &y) in bounds.iter_mut().zip(black_box(&y)) {
            *bound = (image.log_upper(y), image.lower(y));
        }
        black_box(&bounds);
    }
}

fn loss<T: Float>(of: impl Fn(f64) -> T, surrogate: Surrogate, repeats: u32) {
    let table = table();
    let column = |values: &mut dyn Iterator<Item = f64>| values.map(&of).collect::<Vec<T>>();
    let steps = || spread(TOKENS, 0.414_213_562_373_095).map(|at| 0.8 * at - 0.4);
    let old_log_prob = column(&mut log_probs(TOKENS));
    let log_prob = column(&mut log_probs(TOKENS).zip(steps()).map(|(old, by)| (old + by).min(0.0)));
    let advantages = column(&mut spread(TOKENS, 0.732_050_807_568_877).map(|at| 2.0 * at - 1.0));
    let mask: Vec<u8> = (0..TOKENS).map(|i| u8::from(i % 1024 < 768)).collect();
    let (mut per_token, mut gradient) = (vec![of(0.0); TOKENS], vec![of(0.0); TOKENS]);
    let bounds = BoundSource::Table(table.image());
    for _ in 0..repeats {
        let tokens = Tokens {
            old_log_prob: black_box(&old_log_prob),
            log_prob: &log_prob,
            log_ratio: None,
            anchor_log_prob: None,
            advantages: Advantages::PerToken(&advantages),
            mask: &mask,
        };
        let outputs =
            Outputs { per_token: Some(&mut per_token), gradient: &mut gradient, weight: 1.0 };
        let totals =
            policy_loss(&tokens, &bounds, surrogate, false, outputs).expect("equal lengths");
        black_box((totals, &per_token, &gradient));
    }
}
