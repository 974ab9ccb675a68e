//! A generator given as text, such as `u*ln(u) - u + 1`: read, judged, evaluated, differentiated.
//!
//! The grammar: the variable `u`, numbers, `+ - * /`, `^` or `**` (right-associative, tighter than a
//! sign), parentheses, and the functions `ln` (`log`), `exp`, `sqrt`, `abs`, `min`, `max`, `sin`, `cos`.
//! Evaluation carries the logarithm of every product of powers of `u`, so that `ln(u)` is exact where
//! `u` itself underflows; derivatives are carried along (forward mode).

mod evaluate;
mod grammar;
mod judge;
#[cfg(test)]
mod tests;

use crate::error::{Error, Result};
use crate::number::{Dd, Real};

pub(crate) use evaluate::Expression;
use grammar::read;

impl Expression {
    /// Reads and judges `text`; `at_zero` and `slope_at_infinity` are `f(0)` and `f'(inf)` where the
    /// user knows them.
    ///
    /// # Errors
    /// [`Error::Expression`] with the column, [`Error::Generator`] with what is wrong with the function.
    pub(crate) fn parse(
        text: &str,
        at_zero: Option<f64>,
        slope_at_infinity: Option<f64>,
    ) -> Result<Self> {
        let mut expression = Self {
            node: read(text)?,
            slope_at_one: Dd::of(0.0),
            at_zero: Dd::of(0.0),
            slope_at_infinity: 0.0,
            curvature: None,
        };
        expression
            .judge(at_zero, slope_at_infinity)
            .map_err(|reason| Error::Generator { text: text.to_owned(), reason })?;
        Ok(expression)
    }
}
