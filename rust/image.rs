//! The words of a table: their layout, the scalar lookup, and the check that keeps every lookup inside.
//!
//! A table is one flat array of 32-bit words, the same in a file, in a tensor and on a GPU. With
//! `y = max(-logp, 0)` in float32 it has two *sides*: side 0 holds `log_upper`; side 1 holds `lower`, the
//! ratio, because its logarithm is neither smooth nor bounded.
//!
//! A side has up to eight *pieces*. Most rows of the header hold a word for each piece: piece `k` of side `s`
//! is lane `8 s + k`. A row is thus one AVX-512 register, and permuting it replaces a gather:
//!
//! | words | type | meaning |
//! |---|---|---|
//! | 0..16 | f32 | `start` of each piece: 0 for the first of a side, +inf for unused ones |
//! | 16..32 | f32 | `origin` from which the piece's grid is graded |
//! | 32..48 | f32 | `scale`: `z = abs(y - origin) * scale` |
//! | 48..64 | i32 | index of the word that is the entry of biased exponent 0 |
//! | 64..80 | u32 | bits of the grid's min `z` |
//! | 80..96 | u32 | bits of the grid's max `z` |
//! | 96, 97 | f32 | value of each side at `y = 0` |
//! | 98, 99 | f32 | value of each side for `y >= 128` |
//! | 100..104 | f32 | `log_upper` is at least this times `y`, for `y` in each of [`REACH_RANGES`] |
//! | 104..108 | f32 | `ln lower` is at most this, in the same ranges |
//! | 108..112 | f32 | slope, bend, floor and end of saturation of [`NEAR`] |
//!
//! Unused pieces repeat the grid of the last used one, so a lookup may take any lane.
//!
//! Octave entries `node << 4 | b` follow from word 112 on. An octave is divided into `2^b` cells. Its first node
//! is at words `2 node` (value) and `2 node + 1` (slope in `z`). Two neighbouring nodes are four words and make
//! a cell: a cubic Hermite polynomial.
//!
//! A lookup finds the piece by comparisons. The exponent of `z` picks the octave, the top `b` bits of its
//! mantissa pick the cell, and the other bits are the fraction. It takes no exponential, logarithm, division
//! or search. The result stays in the simplex: `log_upper` in `[0, y]`, `lower` at least 0.
//!
//! `docs/table-format.md` describes the same words for readers in other languages.

use std::ops::RangeInclusive;

use crate::error::{Error, Result};

/// Max pieces of a side.
pub(crate) const MAX_PIECES: usize = 8;
/// Words of a header row: a lane for each piece of each side.
pub(crate) const ROW: usize = 2 * MAX_PIECES;

// Header rows, by their first word. Those before `ENDS` have a lane for each piece.
pub(crate) const START: usize = 0;
pub(crate) const ORIGIN: usize = ROW;
pub(crate) const SCALE: usize = 2 * ROW;
pub(crate) const ENTRY_BASE: usize = 3 * ROW;
pub(crate) const MIN_BITS: usize = 4 * ROW;
pub(crate) const MAX_BITS: usize = 5 * ROW;
pub(crate) const ENDS: usize = 6 * ROW;

// Words of the row `ENDS`.
/// `log_upper` and `lower` at `y = 0`.
pub(crate) const AT_ZERO: usize = ENDS;
/// `log_upper` and `lower` for `y >= FAR`.
pub(crate) const AT_FAR: usize = ENDS + 2;
/// `log_upper` is at least this times `y`, in each of [`REACH_RANGES`].
pub(crate) const UPPER_REACH: usize = ENDS + 4;
/// `ln lower` is at most this, in each of [`REACH_RANGES`].
pub(crate) const LOWER_REACH: usize = ENDS + 8;

/// Four numbers for readers that skip whole groups of tokens, see `docs/table-format.md`.
pub(crate) const NEAR: usize = ENDS + 12;

/// First octave entry.
pub(crate) const ENTRIES: usize = 7 * ROW;
/// Low bits of an octave entry: its halvings. The other bits are its first node.
pub(crate) const HALVINGS_BITS: u32 = 4;
/// Mask of [`HALVINGS_BITS`].
pub(crate) const HALVINGS_MASK: u32 = (1 << HALVINGS_BITS) - 1;
/// Max halvings of an octave.
pub(crate) const MAX_HALVINGS: u32 = 8;
/// Max bytes of an image.
pub(crate) const MAX_BYTES: usize = 32 * 1024;
/// `y` from which a side is constant.
pub(crate) const FAR: f64 = 128.0;

/// Starts of the ranges of `y` that have a reach each. Inner ranges are two octaves, so that the upper
/// 8 bits of a float, less [`FIRST_REACH_RANGE`], number its range.
pub(crate) const REACH_RANGES: [f32; 4] = [0.0, 0.125, 0.5, 2.0];
/// Upper 8 bits of the largest floats in the first range. Smaller floats are in the first range too, and all
/// floats above the last start are in the last range.
pub(crate) const FIRST_REACH_RANGE: u32 = 61;

/// Bits of a float32's mantissa.
pub(crate) const MANTISSA_BITS: u32 = f32::MANTISSA_DIGITS - 1;
/// Mask of a float32's mantissa.
pub(crate) const MANTISSA: u32 = (1 << MANTISSA_BITS) - 1;
/// Bits of 1.
pub(crate) const ONE: u32 = 1_f32.to_bits();

/// Side that holds `log_upper`.
pub(crate) const UPPER: usize = 0;
/// Side that holds `lower`.
pub(crate) const LOWER: usize = 1;

/// Cells of an octave.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// First node.
    pub(crate) node: usize,
    /// Binary logarithm of the number of cells.
    pub(crate) halvings: u32,
}

impl Entry {
    fn from_word(word: u32) -> Self {
        Self { node: (word >> HALVINGS_BITS) as usize, halvings: word & HALVINGS_MASK }
    }

    pub(crate) fn to_word(self) -> u32 {
        (self.node as u32) << HALVINGS_BITS | self.halvings
    }
}

/// Words of a table that bounds are looked up in. No lookup reads outside them.
///
/// ```
/// use bandpo::band::Band;
/// use bandpo::divergence::Divergence;
/// use bandpo::table::{BandTable, Image};
///
/// let band = Band::new(Divergence::parse("kl")?, 0.05, 0.05)?;
/// let table = BandTable::of_band(&band)?;
/// let image = Image::new(table.words())?;
///
/// let y = Image::y(-1.5);
/// let (log_lower, log_upper) = band.log_bounds(-1.5);
/// assert!((f64::from(image.log_upper(y)) - log_upper).abs() < 1e-6);
/// assert!((f64::from(image.lower(y)) - log_lower.exp()).abs() < 1e-6);
///
/// assert!(Image::new(&table.words()[1..]).is_err());
/// # Ok::<(), bandpo::error::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Image<'a>(&'a [u32]);

impl<'a> Image<'a> {
    /// Checks words of any origin.
    ///
    /// # Errors
    /// [`Error::TableFile`] if a lookup could read outside them.
    pub fn new(words: &'a [u32]) -> Result<Self> {
        check_image(words)?;
        Ok(Self(words))
    }

    /// Takes words that [`Self::new`] would accept. Otherwise vectorised lookups may read outside them.
    pub(crate) fn trusted(words: &'a [u32]) -> Self {
        Self(words)
    }

    pub(crate) fn words(self) -> &'a [u32] {
        self.0
    }

    /// The header row that begins at a word, such as [`ORIGIN`].
    pub(crate) fn row(self, first: usize) -> &'a [u32; ROW] {
        self.0[first..].first_chunk().expect("an image has a header")
    }

    /// The word at an index as a float32.
    pub(crate) fn float(self, index: usize) -> f32 {
        f32::from_bits(self.0[index])
    }

    /// Lanes of the pieces in use.
    pub(crate) fn pieces(self) -> impl Iterator<Item = usize> {
        (0..ROW).filter(move |lane| self.float(START + lane) < FAR as f32)
    }

    /// First `y` beyond a piece.
    pub(crate) fn end(self, lane: usize) -> f32 {
        let last = lane % MAX_PIECES == MAX_PIECES - 1;
        if last { FAR as f32 } else { self.float(START + lane + 1).min(FAR as f32) }
    }

    /// Biased exponents of a piece's octaves.
    pub(crate) fn exponents(self, lane: usize) -> RangeInclusive<u32> {
        self.0[MIN_BITS + lane] >> MANTISSA_BITS..=self.0[MAX_BITS + lane] >> MANTISSA_BITS
    }

    /// The entry of a piece's octave.
    pub(crate) fn entry(self, lane: usize, exponent: u32) -> Entry {
        let index = self.0[ENTRY_BASE + lane].wrapping_add(exponent);
        Entry::from_word(self.0[index as usize])
    }

    /// `max(-logp, 0)`, or NaN if `logp` is NaN.
    #[must_use]
    pub fn y(logp: f32) -> f32 {
        // f32::max would turn NaN into 0.
        if logp > 0.0 { 0.0 } else { -logp }
    }

    /// `log_upper` at `y = -logp >= 0`.
    #[must_use]
    pub fn log_upper(self, y: f32) -> f32 {
        let value = self.value_at(UPPER, y);
        // f32::min and f32::max would lose a NaN.
        let value = if value > y { y } else { value };
        if value < 0.0 { 0.0 } else { value }
    }

    /// `lower`, the ratio, at `y = -logp >= 0`.
    #[must_use]
    pub fn lower(self, y: f32) -> f32 {
        let value = self.value_at(LOWER, y);
        // The cubic can be below 0 by its error near a bound of 0.
        if value < 0.0 { 0.0 } else { value }
    }

    fn value_at(self, side: usize, y: f32) -> f32 {
        if y.is_nan() {
            return y;
        }
        if y == 0.0 {
            return self.float(AT_ZERO + side);
        }
        if y >= FAR as f32 {
            return self.float(AT_FAR + side);
        }
        let first = MAX_PIECES * side;
        let begun = (1..MAX_PIECES).map(|k| usize::from(y >= self.float(START + first + k)));
        let lane = first + begun.sum::<usize>();
        let z = (y - self.float(ORIGIN + lane)).abs() * self.float(SCALE + lane);
        let bits = z.to_bits().clamp(self.0[MIN_BITS + lane], self.0[MAX_BITS + lane]);
        let exponent = bits >> MANTISSA_BITS;
        let Entry { node, halvings } = self.entry(lane, exponent);
        let cell = (bits & MANTISSA) >> (MANTISSA_BITS - halvings);
        let left = 2 * (node + cell as usize);
        // The mantissa bits below the cell's become the mantissa of a float in [1, 2), which is exact.
        let t = f32::from_bits((bits << halvings) & MANTISSA | ONE) - 1.0;
        let width = f32::from_bits((exponent - halvings) << MANTISSA_BITS);
        let (v0, v1) = (self.float(left), self.float(left + 2));
        let (m0, m1) = (self.float(left + 1) * width, self.float(left + 3) * width);
        let rise = v1 - v0;
        v0 + t * (m0 + t * ((3.0 * rise - 2.0 * m0 - m1) + t * (m0 + m1 - 2.0 * rise)))
    }
}

/// Refuses words in which a lookup could form an index outside.
///
/// A vectorised lookup takes any of the 16 lanes and clamps any bits (those of NaN and infinity too) to
/// `MIN_BITS..=MAX_BITS` of that lane. It compares them as unsigned or as signed numbers, and may do all that
/// before it handles special `y`. The check therefore covers every lane, used or not:
///
/// - every exponent between the two bounds has an entry inside the image;
/// - all cells up to the max bits have their four words inside;
/// - halvings do not exceed the exponent, otherwise a cell's width would have no float32.
fn check_image(words: &[u32]) -> Result<()> {
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
        let [min_bits, max_bits, base] = grid(lane);
        if min_bits > max_bits || max_bits > f32::MAX.to_bits() {
            return Err(refuse("its image has a piece without a grid"));
        }
        let last_exponent = max_bits >> MANTISSA_BITS;
        for exponent in min_bits >> MANTISSA_BITS..=last_exponent {
            let index = base.wrapping_add(exponent) as usize;
            let entry = words.get(index).filter(|_| index >= ENTRIES);
            let inside = entry.is_some_and(|&word| {
                let Entry { node, halvings } = Entry::from_word(word);
                let mantissa =
                    if exponent == last_exponent { max_bits & MANTISSA } else { MANTISSA };
                halvings <= MAX_HALVINGS.min(exponent)
                    && 2 * node >= ENTRIES
                    && 2 * (node + (mantissa >> (MANTISSA_BITS - halvings)) as usize) + 3
                        < words.len()
            });
            if !inside {
                return Err(refuse("its image points outside itself"));
            }
        }
    }
    Ok(())
}
