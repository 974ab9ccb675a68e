//! The words of a table: their layout, the scalar lookup, and the check that no lookup leads outside.
//!
//! # The image
//!
//! A table is one flat array of 32-bit words, the same on a disk, in a tensor and on a GPU. With
//! `y = max(-logp, 0)` in float32 there are two *sides*: 0 holds `log_upper`, 1 holds `lower` (the
//! ratio, which stays smooth and bounded where its logarithm does not). A side has up to eight pieces;
//! the header is six rows of 16 words, one for each piece `k` of side `s` in lane `8 s + k`, so that a
//! row is one AVX-512 register and a permutation of it replaces a gather:
//!
//! | words | type | meaning |
//! |---|---|---|
//! | 0..16 | f32 | `start` of each piece, the first of a side 0, unused ones +inf |
//! | 16..32 | f32 | `origin` that the piece's grid is graded from |
//! | 32..48 | f32 | `scale`: `z = abs(y - origin) * scale` |
//! | 48..64 | i32 | word index of the entry of the octave with biased exponent 0 |
//! | 64..80 | u32 | bits of the smallest `z` of the grid |
//! | 80..96 | u32 | bits of the greatest `z` of the grid |
//! | 96, 97 | f32 | the value of each side at `y = 0` |
//! | 98, 99 | f32 | the value of each side for `y >= 128` |
//! | 100..104 | f32 | `log_upper` is at least this times `y`, for `y` in each of [`REACH_RANGES`] |
//! | 104..108 | f32 | `ln lower` is at most this, likewise |
//! | 108..112 | | 0 |
//!
//! Unused pieces repeat the grid of the last one, so that whatever piece a lookup takes is sound.
//!
//! From word 112 on come octave entries, `node << 4 | b`: the octave is divided into `2^b` cells, and
//! its first node is at words `2 node` (value) and `2 node + 1` (slope in `z`): the four words of two
//! neighbouring nodes are a cell, a cubic Hermite polynomial. A lookup picks the piece by comparisons;
//! the exponent of `z` picks the octave, the top `b` bits of its mantissa the cell, the remaining bits
//! are the fraction. There is no exponential, logarithm, division or search in it. The result is kept
//! in the simplex: `log_upper` at most `y`, `lower` at least 0.

use crate::error::{Error, Result};

/// Max pieces of a side.
pub(crate) const MAX_PIECES: usize = 8;
/// Words of a header row: a lane for each piece of each side.
pub(crate) const ROW: usize = 2 * MAX_PIECES;

// First words of the header's rows.
pub(crate) const START: usize = 0;
pub(crate) const ORIGIN: usize = ROW;
pub(crate) const SCALE: usize = 2 * ROW;
pub(crate) const ENTRY_BASE: usize = 3 * ROW;
pub(crate) const MIN_BITS: usize = 4 * ROW;
pub(crate) const MAX_BITS: usize = 5 * ROW;
/// The row that has no lane for each piece: values at both ends of a side, and its reaches.
pub(crate) const ENDS: usize = 6 * ROW;

// Words of that row.
/// `log_upper` and `lower` at `y = 0`.
pub(crate) const AT_ZERO: usize = ENDS;
/// `log_upper` and `lower` for `y >= FAR`.
pub(crate) const AT_FAR: usize = ENDS + 2;
/// `log_upper` is at least this times `y`, in each of [`REACH_RANGES`].
pub(crate) const UPPER_REACH: usize = ENDS + 4;
/// `ln lower` is at most this, in each of [`REACH_RANGES`].
pub(crate) const LOWER_REACH: usize = ENDS + 8;

/// First octave entry.
pub(crate) const ENTRIES: usize = 7 * ROW;
/// Low bits of an octave entry, which hold its halvings; the others hold its first node.
pub(crate) const HALVINGS_BITS: u32 = 4;
/// Mask of those bits.
pub(crate) const HALVINGS_MASK: u32 = (1 << HALVINGS_BITS) - 1;
/// Max halvings of an octave.
pub(crate) const MAX_HALVINGS: u32 = 8;
/// Max bytes of an image.
pub(crate) const MAX_BYTES: usize = 32 * 1024;
/// `y` from which a side is constant.
pub(crate) const FAR: f64 = 128.0;

/// First `y` of each range that has reaches of its own. A range is two octaves, so the high bits of a float,
/// less [`FIRST_REACH_RANGE`], number its range.
pub(crate) const REACH_RANGES: [f32; 4] = [0.0, 0.125, 0.5, 2.0];
/// The upper 8 bits of floats in the first range. Floats below it count as the first range, those above
/// the last range as the last.
pub(crate) const FIRST_REACH_RANGE: u32 = 61;

/// Bits of a float32's mantissa.
pub(crate) const MANTISSA_BITS: u32 = f32::MANTISSA_DIGITS - 1;
/// Mask of a float32's mantissa.
pub(crate) const MANTISSA: u32 = (1 << MANTISSA_BITS) - 1;
/// Bits of 1.
pub(crate) const ONE: u32 = 1_f32.to_bits();

/// The words of a table, to look bounds up in. No lookup leads outside them.
#[derive(Debug, Clone, Copy)]
pub struct Image<'a>(pub(crate) &'a [u32]);

impl<'a> Image<'a> {
    /// Takes words for an image, whoever wrote them.
    ///
    /// # Errors
    /// [`Error::TableFile`] if a lookup could lead outside them.
    pub fn new(words: &'a [u32]) -> Result<Self> {
        check_image(words)?;
        Ok(Self(words))
    }

    /// All words.
    pub(crate) fn words(self) -> &'a [u32] {
        self.0
    }

    /// The header row that begins at a word, such as [`ORIGIN`].
    pub(crate) fn row(self, first: usize) -> &'a [u32; ROW] {
        self.0[first..].first_chunk().expect("the header is there")
    }

    /// `-logp`, 0 where `logp` is above 0, NaN where it is.
    #[must_use]
    pub fn y(logp: f32) -> f32 {
        // Not f32::max, which would turn a NaN into 0.
        if logp > 0.0 { 0.0 } else { -logp }
    }

    /// `log_upper` at `y = -logp >= 0`.
    #[must_use]
    pub fn log_upper(self, y: f32) -> f32 {
        let value = self.value_at(0, y);
        // Never outside the simplex, nor below 0 by rounding; a NaN must not be lost in a minimum.
        let value = if value > y { y } else { value };
        if value < 0.0 { 0.0 } else { value }
    }

    /// `lower`, the ratio, at `y = -logp >= 0`.
    #[must_use]
    pub fn lower(self, y: f32) -> f32 {
        let value = self.value_at(1, y);
        // A cubic may dip below 0 by its error where the bound dies away.
        if value < 0.0 { 0.0 } else { value }
    }

    fn value_at(self, side: usize, y: f32) -> f32 {
        let words = self.0;
        let float = |index: usize| f32::from_bits(words[index]);
        if y.is_nan() {
            return y;
        }
        if y == 0.0 {
            return float(AT_ZERO + side);
        }
        if y >= FAR as f32 {
            return float(AT_FAR + side);
        }
        let first = MAX_PIECES * side;
        let lane = first
            + (1..MAX_PIECES).map(|k| usize::from(y >= float(START + first + k))).sum::<usize>();
        let z = (y - float(ORIGIN + lane)).abs() * float(SCALE + lane);
        let bits = z.to_bits().clamp(words[MIN_BITS + lane], words[MAX_BITS + lane]);
        let exponent = bits >> MANTISSA_BITS;
        let entry = words[words[ENTRY_BASE + lane].wrapping_add(exponent) as usize];
        let halvings = entry & HALVINGS_MASK;
        let cell = (bits & MANTISSA) >> (MANTISSA_BITS - halvings);
        let node = 2 * ((entry >> HALVINGS_BITS) + cell) as usize;
        // What is left of the mantissa becomes that of a float in [1, 2): exact.
        let t = f32::from_bits((bits << halvings) & MANTISSA | ONE) - 1.0;
        let width = f32::from_bits((exponent - halvings) << MANTISSA_BITS);
        let (v0, v1) = (float(node), float(node + 2));
        let (m0, m1) = (float(node + 1) * width, float(node + 3) * width);
        let rise = v1 - v0;
        v0 + t * (m0 + t * ((3.0 * rise - 2.0 * m0 - m1) + t * (m0 + m1 - 2.0 * rise)))
    }
}

/// Every index that a lookup can form must stay inside the image, whatever wrote it.
///
/// A lookup takes any of the 16 lanes, limits any bits (of a NaN, or an infinity) to `MIN_BITS..=MAX_BITS`
/// of that lane, as unsigned or, where a NaN has a sign, as signed numbers, and may do so before it
/// looks at whether `y` is special. So of every lane, used or not, all exponents between the two have
/// an entry, and all four words of all cells that the entry divides the octave into, up to
/// the greatest bits, are inside; halvings do not exceed the exponent, so that a width has one.
pub(crate) fn check_image(words: &[u32]) -> Result<()> {
    let refuse = |reason: &str| Error::TableFile { reason: reason.to_owned() };
    if words.len() < ENTRIES || 4 * words.len() > MAX_BYTES {
        return Err(refuse("its image has no header, or is larger than 32 KiB"));
    }
    for starts in words[START..START + ROW].chunks_exact(MAX_PIECES) {
        // The lookup counts the starts at or below y, so they have to ascend.
        let ascending = starts.windows(2).all(|pair| {
            let (a, b) = (f32::from_bits(pair[0]), f32::from_bits(pair[1]));
            a < b || (a == f32::INFINITY && b == f32::INFINITY)
        });
        if starts[0] != 0 || !ascending {
            return Err(refuse("the pieces of its image do not follow each other"));
        }
    }
    let grid =
        |lane: usize| [words[MIN_BITS + lane], words[MAX_BITS + lane], words[ENTRY_BASE + lane]];
    for lane in 0..ROW {
        if lane > 0 && grid(lane) == grid(lane - 1) {
            continue;
        }
        let (lowest, highest) = (words[MIN_BITS + lane], words[MAX_BITS + lane]);
        if lowest > highest || highest > f32::MAX.to_bits() {
            return Err(refuse("its image has a piece without a grid"));
        }
        for exponent in lowest >> MANTISSA_BITS..=highest >> MANTISSA_BITS {
            let at = words[ENTRY_BASE + lane].wrapping_add(exponent) as usize;
            let entry = words.get(at).copied().filter(|_| at >= ENTRIES);
            let inside = entry.is_some_and(|entry| {
                let (node, halvings) = ((entry >> HALVINGS_BITS) as usize, entry & HALVINGS_MASK);
                let last_bits = if exponent == highest >> MANTISSA_BITS {
                    highest & MANTISSA
                } else {
                    MANTISSA
                };
                halvings <= MAX_HALVINGS.min(exponent)
                    && 2 * node >= ENTRIES
                    && 2 * (node + (last_bits >> (MANTISSA_BITS - halvings)) as usize) + 3
                        < words.len()
            });
            if !inside {
                return Err(refuse("its image points outside itself"));
            }
        }
    }
    Ok(())
}
