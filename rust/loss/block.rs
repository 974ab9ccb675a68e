//! The order of the steps, block by block.

use std::marker::PhantomData;

use crate::loss::apply::Apply;
use crate::loss::bounds::{Bounds, Constant, PerToken};
use crate::loss::clip::{ClipRatios, FindBounds, FindWidths, SharedWidths};
use crate::loss::collect::Collect;
use crate::loss::columns::Columns;
use crate::loss::scratch::Scratch;
use crate::loss::surrogate::{Rule, Selection};
use crate::loss::{
    BLOCK, BoundSource, CHUNK, Float, GROUP, Outputs, PARALLEL_FROM, Tokens, Totals,
};
use crate::simd::Number;
use crate::threads::map_parts;

/// All tokens and what is to be written of them. After a group of chunks, `proceed` decides on the next one.
pub(super) struct Batch<'a, T> {
    pub(super) tokens: &'a Tokens<'a, T>,
    pub(super) bounds: &'a BoundSource<'a, T>,
    pub(super) by_probability: bool,
    pub(super) outputs: Outputs<'a, T>,
    pub(super) proceed: &'a mut dyn FnMut() -> bool,
}

impl<T: Float> Batch<'_, T> {
    /// Writes the outputs of all tokens under a rule and returns their totals.
    pub(super) fn run<R: Rule>(self, rule: R) -> Totals {
        match *self.bounds {
            BoundSource::Constant { log_lower, log_upper } => {
                let [log_lower, log_upper] = [log_lower, log_upper].map(Number::to_f64);
                let widths = T::run(SharedWidths { log_lower, log_upper });
                self.run_with(rule, &Constant { log_lower, log_upper, widths })
            }
            BoundSource::Table(ref image) => self.run_with(rule, image),
            BoundSource::PerToken { log_lower, log_upper } => {
                self.run_with(rule, &PerToken { log_lower, log_upper })
            }
        }
    }

    fn run_with<R: Rule, B: Bounds<T>>(self, rule: R, bounds: &B) -> Totals {
        let Self { tokens, by_probability, outputs, proceed, .. } = self;
        if tokens.anchor_log_prob.is_some() {
            Task::<T, R, B, true> { rule, bounds, tokens, by_probability }.run(outputs, proceed)
        } else {
            Task::<T, R, B, false> { rule, bounds, tokens, by_probability }.run(outputs, proceed)
        }
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
    fn run(self, outputs: Outputs<'_, T>, proceed: &mut dyn FnMut() -> bool) -> Totals {
        let parallel = outputs.gradient.len() >= PARALLEL_FROM;
        let mut chunks = outputs.parts(CHUNK).enumerate().peekable();
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
        let mut totals = Totals::default();
        loop {
            let group = chunks.by_ref().take(GROUP);
            let found: Vec<Totals> =
                if parallel { map_parts(group.collect(), &one) } else { group.map(one).collect() };
            totals = found.iter().fold(totals, Totals::merge);
            if chunks.peek().is_none() || !proceed() {
                return totals;
            }
        }
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
        T::run(Collect::<T, R::Selection, B, ANCHORED> {
            selection: PhantomData,
            bounds,
            start,
            columns,
            log_ratio,
            neg_advantage,
            candidates,
            totals,
        });
        if !R::Selection::NEEDS_WIDTH || bounds.shared_widths().is_none() {
            T::run(FindBounds { bounds, candidates });
            match (R::Selection::NEEDS_WIDTH, B::LOWER_IS_RATIO) {
                (true, true) => T::run(FindWidths::<T, true> { candidates }),
                (true, false) => T::run(FindWidths::<T, false> { candidates }),
                (false, true) => T::run(ClipRatios::<T, true, ANCHORED> { candidates }),
                (false, false) => T::run(ClipRatios::<T, false, ANCHORED> { candidates }),
            }
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
