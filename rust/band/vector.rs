//! Vector solver of the ordinary tokens.
//!
//! It solves the equation of `mod.rs` in double precision, one SIMD vector at a time. Bounds that it cannot certify are
//! left to the scalar solver: limits, far tails, bounds next to saturation, ill-conditioned ones, and those for
//! which the iteration is slow. A lane never depends on its neighbours.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::band::laws::{Law, Split, WithLaw, with_law};
use crate::band::limits::{
    BENIGN_CONDITION, FAR_REST, FAR_TAIL, MARGIN, MAX_LOG_LOSS, MAX_RADIUS, MIN_RADIUS,
};
use crate::band::side::Side;
use crate::band::text::{Text, TextSweep};
use crate::divergence::Generator;
use crate::simd::doubles::{Doubles, MAX_DOUBLES, Truth, Vector};
use crate::simd::{WithDoubles, run_doubles};

/// Min relative distance of `D` at the end of a side from the radius, at which double precision decides saturation.
pub(super) const CLEAR_OF_SATURATION: f64 = 1e-10;

/// Writes the bounds that are settled here. Calls `rest(index, side, rough)` for each of the others, with the
/// unpolished bound if there is one. `radii` are those of the generator, below and above.
pub(crate) fn log_bounds(
    generator: &Generator,
    radii: [&[f64]; 2],
    logp: &[f64],
    bounds: [&mut [f64]; 2],
    rest: &mut dyn FnMut(usize, Side, Option<f64>),
) {
    let count = logp.len();
    let arguments = Arguments { radii, logp, bounds, rest: &mut *rest };
    let done = match generator {
        Generator::Expression(expression) => {
            Text::of(expression).is_some_and(|text| run_doubles(TextSweep { arguments, text }))
        }
        generator => with_law(generator, arguments),
    };
    if !done {
        for index in 0..count {
            rest(index, Side::Lower, None);
            rest(index, Side::Upper, None);
        }
    }
}

/// Arguments of [`log_bounds`].
pub(super) struct Arguments<'a> {
    radii: [&'a [f64]; 2],
    logp: &'a [f64],
    bounds: [&'a mut [f64]; 2],
    rest: &'a mut dyn FnMut(usize, Side, Option<f64>),
}

impl Arguments<'_> {
    /// Number of tokens.
    pub(super) fn count(&self) -> usize {
        self.logp.len()
    }

    /// The vector of tokens from `start` on. The last one is padded with an ordinary token.
    #[inline(always)]
    pub(super) fn tokens<L: Doubles>(&self, lanes: L, start: usize) -> Vector<L> {
        padded(lanes, &self.logp[start..], -1.0)
    }

    /// Their radii on a side.
    #[inline(always)]
    pub(super) fn radii<L: Doubles>(&self, lanes: L, start: usize, upper: bool) -> Vector<L> {
        padded(lanes, &self.radii[usize::from(upper)][start..], 1.0)
    }

    /// Writes their bounds on a side, and leaves those that are not settled to the scalar solver.
    #[inline(always)]
    pub(super) fn take<L: Doubles>(&mut self, start: usize, upper: bool, found: &Found<L>) {
        let side = if upper { Side::Upper } else { Side::Lower };
        let taken = L::COUNT.min(self.logp.len() - start);
        let mut values = [0.0; MAX_DOUBLES];
        found.log_ratio.store(&mut values);
        self.bounds[usize::from(upper)][start..start + taken].copy_from_slice(&values[..taken]);
        let mut open = !found.settled.bits() & u32::MAX >> (u32::BITS as usize - taken);
        while open != 0 {
            let lane = open.trailing_zeros() as usize;
            let rough = (found.rough.bits() >> lane & 1 != 0).then_some(values[lane]);
            (self.rest)(start + lane, side, rough);
            open &= open - 1;
        }
    }
}

/// The first numbers as a vector, with `other` in place of those that lack.
#[inline(always)]
fn padded<L: Doubles>(lanes: L, numbers: &[f64], other: f64) -> Vector<L> {
    let taken = L::COUNT.min(numbers.len());
    let mut values = [other; MAX_DOUBLES];
    values[..taken].copy_from_slice(&numbers[..taken]);
    Vector::load(lanes, &values)
}

impl WithLaw for Arguments<'_> {
    /// True if the generator has a law and the processor its vectors.
    type Output = bool;
    fn run(self, law: impl Law) -> bool {
        run_doubles(Sweep { arguments: self, law })
    }
    fn scalar(self) -> bool {
        false
    }
}

/// A call of [`log_bounds`] under the law of its divergence.
struct Sweep<'a, W> {
    arguments: Arguments<'a>,
    law: W,
}

impl<W: Law> WithDoubles for Sweep<'_, W> {
    #[inline(always)]
    fn run<L: Doubles>(self, lanes: L) {
        let Self { mut arguments, law } = self;
        let mut start = 0;
        while start < arguments.count() {
            let both = Both::new(arguments.tokens(lanes, start));
            for upper in [false, true] {
                let found = both.bound(law, arguments.radii(lanes, start, upper), upper);
                arguments.take(start, upper, &found);
            }
            start += L::COUNT;
        }
    }
}

/// True for radii that keep the digits of `D`.
#[inline(always)]
pub(super) fn is_ordinary<L: Doubles>(radius: Vector<L>) -> Truth<L> {
    radius.constant(MIN_RADIUS).less(radius) & radius.less(radius.constant(MAX_RADIUS))
}

/// A vector of bounds and their status.
pub(super) struct Found<L: Doubles> {
    pub(super) log_ratio: Vector<L>,
    /// True where `log_ratio` is the bound.
    pub(super) settled: Truth<L>,
    /// True where it is a bound to be polished.
    pub(super) rough: Truth<L>,
}

/// Both outcomes of each token.
pub(super) struct Both<L: Doubles> {
    pub(super) logp: Vector<L>,
    /// True where no factor leaves the range of a double.
    pub(super) ordinary: Truth<L>,
    token: Vector<L>,
    pub(super) others: Vector<L>,
}

impl<L: Doubles> Both<L> {
    #[inline(always)]
    pub(super) fn new(logp: Vector<L>) -> Self {
        let ordinary = logp.constant(FAR_TAIL).less(logp) & logp.less(logp.constant(-FAR_REST));
        let logp = ordinary.select(logp, logp.constant(-1.0));
        let power = logp.exponential();
        Self { logp, ordinary, token: power.u, others: -power.excess }
    }

    /// The outcomes by what they do on the way to an end.
    #[inline(always)]
    pub(super) fn split(&self, upper: bool) -> Split<L> {
        let (shrinking, growing) =
            if upper { (self.others, self.token) } else { (self.token, self.others) };
        Split { shrinking, growing, odds: shrinking / growing }
    }

    /// One end of the band.
    #[inline(always)]
    fn bound(&self, law: impl Law, radius: Vector<L>, upper: bool) -> Found<L> {
        let split = self.split(upper);
        let one = radius.constant(1.0);
        let max_divergence = law.max_divergence(&split);
        let (saturated, clear, solvable) = match max_divergence {
            Some(max_divergence) => {
                let doubt = (max_divergence + law.cancelled(&split)) * CLEAR_OF_SATURATION;
                (
                    (max_divergence + doubt).less(radius),
                    radius.less(max_divergence - doubt),
                    radius.less(max_divergence).select(radius, max_divergence * 0.25),
                )
            }
            // An infinite max never saturates.
            None => (one.less(one), !one.less(one), radius),
        };
        let ordinary = self.ordinary & is_ordinary(radius);
        let solution = law.solve(&split, solvable);
        let log_left = solution.log_left;
        let (edge, rough, condition) = if upper {
            let log_growth = solution.log_growth;
            let chain = solution.left * split.odds / (solution.growth * log_growth);
            (-self.logp, log_growth, chain * solution.condition)
        } else {
            let end = one.constant(f64::NEG_INFINITY);
            (end, log_left, (solution.condition / log_left).abs())
        };
        let mut exact = ordinary & clear & solution.found;
        if max_divergence.is_some() {
            exact = exact & one.constant(-MAX_LOG_LOSS).less(log_left);
        }
        let benign = condition.less(one.constant(BENIGN_CONDITION));
        let inside = rough * (1.0 - MARGIN);
        let inside = if upper {
            inside.min(edge.next_inwards())
        } else {
            inside.max(one.constant(-f64::MAX))
        };
        Found {
            log_ratio: saturated.select(edge, benign.select(inside, rough)),
            settled: ordinary & saturated | exact & benign,
            rough: exact,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::divergence::{ALL, Divergence};
    use crate::simd::AnyDoubles;

    type Bounds = (Vec<u64>, Vec<u64>, Vec<(usize, Side)>);

    /// Bounds on each kind of vector, under a law.
    fn kinds(law: impl Law, radii: &[f64], logp: &[f64]) -> Vec<(AnyDoubles, Bounds)> {
        kinds_of(&|doubles, arguments| doubles.run(Sweep { arguments, law }), radii, logp)
    }

    /// Bounds on each kind of vector, by the work that `run` does there.
    fn kinds_of(
        run: &dyn Fn(AnyDoubles, Arguments<'_>),
        radii: &[f64],
        logp: &[f64],
    ) -> Vec<(AnyDoubles, Bounds)> {
        let with = |run: &dyn Fn(Arguments<'_>)| {
            let (mut lower, mut upper) = (vec![0.0; logp.len()], vec![0.0; logp.len()]);
            let mut open = Vec::new();
            run(Arguments {
                radii: [radii, radii],
                logp,
                bounds: [&mut lower, &mut upper],
                rest: &mut |index, side, _| open.push((index, side)),
            });
            open.sort_unstable_by_key(|&(index, side)| (index, side == Side::Upper));
            for &(index, side) in &open {
                let bounds = if side == Side::Upper { &mut upper } else { &mut lower };
                bounds[index] = 0.0; // not settled
            }
            let bits = |bounds: Vec<f64>| bounds.into_iter().map(f64::to_bits).collect();
            (bits(lower), bits(upper), open)
        };
        let on = |doubles: AnyDoubles| with(&|arguments| run(doubles, arguments));
        AnyDoubles::all().into_iter().map(|doubles| (doubles, on(doubles))).collect()
    }

    /// Compares the kinds of vectors, which have to settle a share of the bounds.
    fn compare(
        name: &str,
        share: f64,
        kinds: impl Fn(&[f64], &[f64]) -> Vec<(AnyDoubles, Bounds)>,
    ) {
        let logp: Vec<f64> = (0..2003)
            .map(|index| -(-f64::from(index - 1000) * 0.03).exp().ln_1p())
            .chain([f64::NAN, 0.0, 1.0, f64::NEG_INFINITY, -1e-320, -1e4])
            .collect();
        let radii: Vec<f64> =
            (0..logp.len()).map(|index| (-(index as f64 * 1.7) % 18.0 + 2.0).exp()).collect();
        let found = kinds(&radii, &logp);
        let (_, whole) = &found[0];
        let settled = 2 * logp.len() - whole.2.len();
        assert!(settled as f64 > share * 2.0 * logp.len() as f64, "{name}: {settled} bounds");
        for (kind, found) in &found {
            assert!(found == whole, "{name} in {kind:?}");
        }
        // A bound does not depend on its place either.
        for index in (0..logp.len()).step_by(97) {
            let (_, alone) = &kinds(&radii[index..=index], &logp[index..=index])[0];
            assert_eq!((alone.0[0], alone.1[0]), (whole.0[index], whole.1[index]), "{name}");
        }
    }

    /// Compares the kinds of vectors, for a divergence by name.
    struct Compare(&'static str);

    impl WithLaw for Compare {
        type Output = ();
        fn run(self, law: impl Law) {
            let name = self.0;
            assert!(!SCALAR.contains(&name), "{name} has a vector law and is in SCALAR");
            compare(name, 0.95, |radii, logp| kinds(law, radii, logp));
        }
        fn scalar(self) {
            assert!(SCALAR.contains(&self.0), "{} has no vector law and is not in SCALAR", self.0);
        }
    }

    /// Divergences without a vector law.
    const SCALAR: [&str; 3] = ["alpha:100", "alpha:1e-9", "vajda:100"];

    /// Orders that [`ALL`] lacks, of every formula.
    const ORDERS: [&str; 10] = [
        "vajda:1",
        "vajda:2",
        "vajda:4",
        "alpha:-1",
        "alpha:2",
        "alpha:-3",
        "alpha:0.3",
        "alpha:0.7",
        "alpha:1.37",
        "renyi:3.5",
    ];

    /// Texts with every operation of vectors.
    const TEXTS: [&str; 9] = [
        "-ln(u) + u - 1",
        "u*ln(u) - u + 1",
        "(sqrt(u)-1)^2",
        "0.3*(u*ln(u)-u+1) + 0.7*(u-1)^2",
        "max((u-1)^2, abs(u-1))",
        "u^1.3 - 1 - 1.3*(u-1)",
        "exp(u-1) - u",
        "max(u-1.25, 0)",
        "(u*ln(u) - (u+1)*ln((u+1)/2))/2",
    ];

    #[test]
    fn bounds_of_text_are_independent_of_vector_width_and_neighbours() {
        for name in TEXTS {
            let divergence = Divergence::from_expression(name, None, None).unwrap();
            let Generator::Expression(expression) = &divergence.generator else {
                panic!("{name} is text");
            };
            let text = Text::of(expression).unwrap();
            let run = |doubles: AnyDoubles, arguments: Arguments<'_>| {
                doubles.run(TextSweep { arguments, text });
            };
            compare(name, 0.75, |radii, logp| kinds_of(&run, radii, logp));
        }
    }

    #[test]
    fn bounds_are_independent_of_vector_width_and_neighbours() {
        for &name in ALL.iter().chain(&ORDERS).chain(&SCALAR) {
            with_law(&Divergence::parse(name).unwrap().generator, Compare(name));
        }
    }
}
