//! Nodes of a grid, and the cubics between them.

use crate::LOG_RATIO_LIMIT;

/// A value and its derivative in `z`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) z: f64,
    pub(super) value: f64,
    pub(super) slope: f64,
}

impl Sample {
    /// The cubic through two samples, at any `z`.
    pub(super) fn cubic(self, other: Self, z: f64) -> Self {
        let width = other.z - self.z;
        let t = (z - self.z) / width;
        let (m0, m1) = (self.slope * width, other.slope * width);
        let rise = other.value - self.value;
        let (bend, twist) = (3.0 * rise - 2.0 * m0 - m1, m0 + m1 - 2.0 * rise);
        Self {
            z,
            value: self.value + t * (m0 + t * (bend + t * twist)),
            slope: (m0 + t * (2.0 * bend + 3.0 * t * twist)) / width,
        }
    }

    /// How far the cubic through two samples is off between them, seen from this one near their middle.
    ///
    /// An error of fourth order is greatest in the middle; one of fifth order vanishes there and is seen
    /// in the slope: `t^2 (1-t)^2 (t-1/2)` is at most 0.143 of its slope at `t = 1/2`.
    pub(super) fn misfit(self, left: Self, right: Self) -> f64 {
        let cubic = left.cubic(right, self.z);
        let tilt = (cubic.slope - self.slope) * (right.z - left.z);
        let error = (cubic.value - self.value).abs() + 0.143 * tilt.abs();
        // A NaN is an error without measure, not none.
        if error.is_nan() { f64::INFINITY } else { error }
    }
}

/// The ends of a cell so that its cubic is the one through the ends of a part of it.
pub(super) fn extended(part: [Sample; 2], cell: [Sample; 2]) -> [Sample; 2] {
    let [a, b] = part;
    let width = b.z - a.z;
    // In the cubic of a small part the noise of its slopes would be magnified by the ratio squared, and
    // nodes far from the bound are rounded accordingly.
    let small = width < (cell[1].z - cell[0].z) / 1024.0;
    let bend = (b.slope - a.slope) / width;
    let at = |z: f64| {
        if small {
            let step = z - a.z;
            let value = a.value + step * (a.slope + 0.5 * bend * step);
            Sample { z, value, slope: a.slope + bend * step }
        } else {
            a.cubic(b, z)
        }
    };
    let [left, right] = cell;
    [if left.z == a.z { a } else { at(left.z) }, if right.z == b.z { b } else { at(right.z) }]
}

/// About what float32 adds to the error of a cell beyond an ulp of the bound: it computes the rise, which
/// may exceed the bound at its start. Nothing where the loss clamps.
pub(super) fn rounding(left: f64, right: f64) -> f64 {
    if left.min(right) > LOG_RATIO_LIMIT {
        0.0
    } else {
        f64::from(f32::EPSILON) / 2.0 * (right - left).abs()
    }
}

/// The samples of a curve at the two ends of a piece, where its grid goes on beyond them.
#[derive(Clone, Copy, Default)]
pub(super) struct Ends {
    pub(super) low: Option<Sample>,
    pub(super) high: Option<Sample>,
}

impl Ends {
    /// The part of a cell that lies in the piece.
    pub(super) fn clip(&self, cell: [Sample; 2]) -> Option<[Sample; 2]> {
        let [mut left, mut right] = cell;
        if let Some(low) = self.low {
            if right.z <= low.z {
                return None;
            }
            if left.z < low.z {
                left = low;
            }
        }
        if let Some(high) = self.high {
            if left.z >= high.z {
                return None;
            }
            if right.z > high.z {
                right = high;
            }
        }
        Some([left, right])
    }

    pub(super) fn holds(&self, z: f64) -> bool {
        self.low.is_none_or(|low| z >= low.z) && self.high.is_none_or(|high| z <= high.z)
    }
}
