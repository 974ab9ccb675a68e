//! The steps that a block of tokens is taken through, and what each leaves for the next.

use std::marker::PhantomData;

use crate::loss::apply::Apply;
use crate::loss::bounds::{Bounds, Constant, PerToken};
use crate::loss::clip::{Find, Stop};
use crate::loss::collect::Collect;
use crate::loss::columns::Columns;
use crate::loss::surrogate::Rule;
use crate::loss::{BLOCK, BoundSource, CHUNK, Float, Outputs, PARALLEL_FROM, Tokens, Totals};
use crate::simd::Number;
use crate::simd::lanes::MAX_LANES;
use crate::threads::map_parts;

/// What is done to which tokens, apart from how.
pub(super) struct Batch<'a, T> {
    pub(super) tokens: &'a Tokens<'a, T>,
    pub(super) by_probability: bool,
    pub(super) outputs: Outputs<'a, T>,
}

impl<T: Float> Batch<'_, T> {
    pub(super) fn under<R: Rule>(self, rule: R, bounds: &BoundSource<'_, T>) -> Totals {
        match *bounds {
            BoundSource::Constant { log_lower, log_upper } => {
                let [log_lower, log_upper] = [log_lower, log_upper].map(Number::to_f64);
                self.run(rule, &Constant { log_lower, log_upper })
            }
            BoundSource::Table(image) => self.run(rule, &image),
            BoundSource::PerToken { log_lower, log_upper } => {
                self.run(rule, &PerToken { log_lower, log_upper })
            }
        }
    }

    /// All chunks, on several threads if there are many; totals are merged in the order of the tokens.
    fn run<R: Rule>(self, rule: R, bounds: &impl Bounds<T>) -> Totals {
        let Self { tokens, by_probability, outputs } = self;
        let parallel = outputs.gradient.len() >= PARALLEL_FROM;
        let chunks = outputs.parts(CHUNK).enumerate();
        let one = |(number, chunk): (usize, Outputs<'_, T>)| {
            let mut block = Block::new();
            let mut totals = Totals::default();
            let mut start = number * CHUNK;
            for outputs in chunk.parts(BLOCK) {
                let count = outputs.gradient.len();
                let task = Task { rule, bounds, tokens, start, count, by_probability };
                block.run(&task, outputs, &mut totals);
                start += count;
            }
            totals
        };
        let totals: Vec<Totals> =
            if parallel { map_parts(chunks.collect(), one) } else { chunks.map(one).collect() };
        totals.iter().fold(Totals::default(), Totals::merge)
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

/// The tokens from `start` on, `count` of them, and what is done to them.
struct Task<'a, T, R, B> {
    rule: R,
    bounds: &'a B,
    tokens: &'a Tokens<'a, T>,
    start: usize,
    count: usize,
    by_probability: bool,
}

/// What each step over some tokens leaves for the next. Vectors may reach beyond the last of them.
#[repr(align(64))] // so that no vector lies across two lines of a cache
struct Block<T> {
    /// Not clamped; 0 where a token does not count.
    log_ratio: [T; BLOCK + MAX_LANES],
    /// Minus the advantage, likewise.
    cost: [T; BLOCK + MAX_LANES],
    moved: Moved<T>,
    /// Where they are one a row.
    advantages: [T; BLOCK],
    /// Where nobody wants them.
    losses: [T; BLOCK],
}

/// The tokens of a block that have moved so far towards the bound that holds for them that they may be beyond
/// it, one after the other: they are few, and bounds are found much faster side by side.
#[repr(align(64))]
pub(super) struct Moved<T> {
    /// What their bounds are found by; then their bounds; and then where their ratios stop: at the bound if
    /// they are beyond it, at 0, where no bound is that a ratio could be beyond, if they are not.
    pub(super) bounds: [T; BLOCK + MAX_LANES],
    /// Clamped; negative where the lower bound holds.
    pub(super) log_ratio: [T; BLOCK + MAX_LANES],
    pub(super) count: usize,
    /// Which tokens they are, a bit each, vector by vector.
    pub(super) who: [u32; BLOCK],
}

impl<T: Float> Block<T> {
    fn new() -> Self {
        let zeros = [T::ZERO; BLOCK + MAX_LANES];
        let moved = Moved { bounds: zeros, log_ratio: zeros, count: 0, who: [0; BLOCK] };
        let [advantages, losses] = [[T::ZERO; BLOCK]; 2];
        Self { log_ratio: zeros, cost: zeros, moved, advantages, losses }
    }

    fn run<R: Rule, B: Bounds<T>>(
        &mut self,
        task: &Task<'_, T, R, B>,
        outputs: Outputs<'_, T>,
        totals: &mut Totals,
    ) {
        let Self { log_ratio, cost, moved, advantages, losses } = self;
        let &Task { rule, bounds, tokens, start, count, by_probability } = task;
        let here = start..start + count;
        let columns = Columns {
            old_log_prob: &tokens.old_log_prob[here.clone()],
            log_prob: &tokens.log_prob[here.clone()],
            given: tokens.log_ratio.map(|given| &given[here.clone()]),
            advantages: tokens.advantages.block(start, &mut advantages[..count]),
            mask: &tokens.mask[here],
        };
        T::run(Collect::<T, R, B> {
            rule: PhantomData,
            bounds,
            start,
            columns,
            log_ratio,
            cost,
            moved,
            totals,
        });
        T::run(Find { bounds, moved });
        if B::LOWER_IS_RATIO {
            T::run(Stop::<T, true> { moved });
        } else {
            T::run(Stop::<T, false> { moved });
        }
        let Outputs { per_token, gradient, weight } = outputs;
        T::run(Apply {
            rule,
            columns,
            by_probability,
            log_ratio,
            cost,
            moved,
            weight,
            per_token: per_token.unwrap_or(&mut losses[..count]),
            gradient,
            totals,
        });
    }
}
