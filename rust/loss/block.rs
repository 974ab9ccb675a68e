//! The order of the steps, block by block.

use std::marker::PhantomData;

use crate::loss::apply::Apply;
use crate::loss::bounds::{Bounds, Constant, PerToken};
use crate::loss::clip::{ClipRatios, FindBounds, FindWidths};
use crate::loss::collect::Collect;
use crate::loss::columns::Columns;
use crate::loss::scratch::Scratch;
use crate::loss::surrogate::Rule;
use crate::loss::{BLOCK, BoundSource, CHUNK, Float, Outputs, PARALLEL_FROM, Tokens, Totals};
use crate::simd::Number;
use crate::threads::map_parts;

/// Writes the outputs of all tokens under a rule and returns their totals.
pub(super) fn run<T: Float, R: Rule>(
    rule: R,
    tokens: &Tokens<'_, T>,
    bounds: &BoundSource<'_, T>,
    by_probability: bool,
    outputs: Outputs<'_, T>,
) -> Totals {
    match *bounds {
        BoundSource::Constant { log_lower, log_upper } => {
            let [log_lower, log_upper] = [log_lower, log_upper].map(Number::to_f64);
            let bounds = &Constant { log_lower, log_upper };
            run_with(rule, bounds, tokens, by_probability, outputs)
        }
        BoundSource::Table(ref image) => run_with(rule, image, tokens, by_probability, outputs),
        BoundSource::PerToken { log_lower, log_upper } => {
            let bounds = &PerToken { log_lower, log_upper };
            run_with(rule, bounds, tokens, by_probability, outputs)
        }
    }
}

fn run_with<T: Float, R: Rule, B: Bounds<T>>(
    rule: R,
    bounds: &B,
    tokens: &Tokens<'_, T>,
    by_probability: bool,
    outputs: Outputs<'_, T>,
) -> Totals {
    if tokens.anchor_log_prob.is_some() {
        Task::<T, R, B, true> { rule, bounds, tokens, by_probability }.run(outputs)
    } else {
        Task::<T, R, B, false> { rule, bounds, tokens, by_probability }.run(outputs)
    }
}

/// All tokens, their bounds and the rule that they are under. Without an anchor, the steps are compiled without
/// what only an anchor needs, because a test for it in every vector costs a fourteenth of the time.
struct Task<'a, T, R, B, const ANCHORED: bool> {
    rule: R,
    bounds: &'a B,
    tokens: &'a Tokens<'a, T>,
    by_probability: bool,
}

impl<T: Float, R: Rule, B: Bounds<T>, const ANCHORED: bool> Task<'_, T, R, B, ANCHORED> {
    /// Runs all chunks, on several threads if there are many. Totals are merged in the order of the tokens.
    fn run(self, outputs: Outputs<'_, T>) -> Totals {
        let parallel = outputs.gradient.len() >= PARALLEL_FROM;
        let chunks = outputs.parts(CHUNK).enumerate();
        let one = |(number, chunk): (usize, Outputs<'_, T>)| {
            let mut scratch = Scratch::new();
            let mut totals = Totals::default();
            let mut start = number * CHUNK;
            for outputs in chunk.parts(BLOCK) {
                let count = outputs.gradient.len();
                self.run_block(start, outputs, &mut scratch, &mut totals);
                start += count;
            }
            totals
        };
        let totals: Vec<Totals> =
            if parallel { map_parts(chunks.collect(), one) } else { chunks.map(one).collect() };
        totals.iter().fold(Totals::default(), Totals::merge)
    }

    /// Takes the tokens from `start` on through every step, as many as there are outputs.
    fn run_block(
        &self,
        start: usize,
        outputs: Outputs<'_, T>,
        scratch: &mut Scratch<T>,
        totals: &mut Totals,
    ) {
        let &Self { rule, bounds, tokens, by_probability } = self;
        let Scratch { log_ratio, neg_advantage, candidates, advantages, losses } = scratch;
        let Outputs { per_token, gradient, weight } = outputs;
        let count = gradient.len();
        let columns = Columns::new(tokens, start, &mut advantages[..count]);
        T::run(Collect::<T, R, B, ANCHORED> {
            rule: PhantomData,
            bounds,
            start,
            columns,
            log_ratio,
            neg_advantage,
            candidates,
            totals,
        });
        T::run(FindBounds { bounds, candidates });
        match (R::NEEDS_WIDTH, B::LOWER_IS_RATIO) {
            (true, true) => T::run(FindWidths::<T, true> { candidates }),
            (true, false) => T::run(FindWidths::<T, false> { candidates }),
            (false, true) => T::run(ClipRatios::<T, true, ANCHORED> { candidates }),
            (false, false) => T::run(ClipRatios::<T, false, ANCHORED> { candidates }),
        }
        T::run(Apply::<T, R, ANCHORED> {
            rule,
            columns,
            by_probability,
            log_ratio,
            neg_advantage,
            candidates,
            weight,
            per_token: per_token.unwrap_or(&mut losses[..count]),
            gradient,
            totals,
        });
    }
}

impl<T: Float> Outputs<'_, T> {
    fn parts(self, size: usize) -> impl Iterator<Item = Self> {
        let Self { per_token, gradient, weight } = self;
        let mut per_token = per_token.map(|losses| losses.chunks_mut(size));
        gradient.chunks_mut(size).map(move |gradient| Self {
            per_token: per_token.as_mut().and_then(Iterator::next),
            gradient,
            weight,
        })
    }
}
