//! Generators given as text, such as `u*ln(u) - u + 1`: grammar, judgement, value and slope.
//!
//! The grammar has the variable `u`, numbers, `+ - * /`, `^` or `**` (right-associative, tighter than a
//! sign), parentheses, and the functions `ln` (`log`), `exp`, `sqrt`, `abs`, `min`, `max`, `sin`, `cos`.
//! Evaluation carries the logarithm of every product of powers of `u`, so that `ln(u)` is exact where
//! `u` itself underflows. It also carries derivatives (forward mode).

mod curvature;
mod derivative;
mod evaluate;
mod grammar;
mod judge;
mod tape;
#[cfg(test)]
mod tests;

use crate::error::{Error, Result};
use crate::number::{Dd, Real};

pub(crate) use evaluate::Expression;
use grammar::read;
pub(crate) use tape::{Step, Tape};

impl Expression {
    /// Reads and judges `text`. `at_zero` and `slope_at_infinity` are the user's `f(0)` and `f'(inf)`, if any.
    ///
    /// # Errors
    /// [`Error::Expression`] with the column, [`Error::Generator`] with the condition that the function breaks.
    pub(crate) fn parse(
        text: &str,
        at_zero: Option<f64>,
        slope_at_infinity: Option<f64>,
    ) -> Result<Self> {
        let mut expression = Self {
            node: read(text)?,
            tape: None,
            slope_at_one: Dd::of(0.0),
            at_zero: Dd::of(0.0),
            slope_at_infinity: Dd::of(0.0),
            curvature: None,
            size: 1.0,
            relative_size: 1.0,
        };
        expression
            .judge(at_zero, slope_at_infinity)
            .map_err(|reason| Error::Generator { text: text.to_owned(), reason })?;
        // After the judgement, which refuses a text of too many operations.
        expression.tape = Tape::of(&expression.node);
        Ok(expression)
    }
}
