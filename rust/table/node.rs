//! Nodes of a grid and the cubics between them.

use crate::LOG_RATIO_LIMIT;

/// A value of a curve and its slope in `z`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Node {
    pub(super) z: f64,
    pub(super) value: f64,
    pub(super) slope: f64,
}

impl Node {
    /// The cubic through two nodes, at any `z`.
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

    /// Max error of the cubic through two nodes, estimated from this node near their middle.
    ///
    /// The fourth-order error has its max in the middle. The fifth-order error is 0 there and shows in the
    /// slope: `t^2 (1-t)^2 (t-1/2)` is at most 0.143 times its slope at `t = 1/2`.
    pub(super) fn cubic_error(self, left: Self, right: Self) -> f64 {
        let cubic = left.cubic(right, self.z);
        let tilt = (cubic.slope - self.slope) * (right.z - left.z);
        let error = (cubic.value - self.value).abs() + 0.143 * tilt.abs();
        // Comparisons with NaN are false, so a NaN would pass for no error.
        if error.is_nan() { f64::INFINITY } else { error }
    }
}

/// Error that float32 adds to a cell's cubic beyond an ulp of the bound: the rise can be larger than the
/// bound at the start of the cell. It is 0 where the loss clamps log-ratios.
pub(super) fn rounding_error(left: f64, right: f64) -> f64 {
    if left.min(right) > LOG_RATIO_LIMIT {
        0.0
    } else {
        f64::from(f32::EPSILON) / 2.0 * (right - left).abs()
    }
}

/// Ends of a piece that lie inside its grid.
#[derive(Clone, Copy, Default)]
pub(super) struct Ends {
    pub(super) low: Option<Node>,
    pub(super) high: Option<Node>,
}

impl Ends {
    /// The part of a cell that lies in the piece.
    pub(super) fn clip(&self, cell: [Node; 2]) -> Option<[Node; 2]> {
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

    pub(super) fn contain(&self, z: f64) -> bool {
        self.low.is_none_or(|low| z >= low.z) && self.high.is_none_or(|high| z <= high.z)
    }
}

/// Nodes at the ends of a cell that give it the cubic of one of its parts.
pub(super) fn extrapolated(part: [Node; 2], cell: [Node; 2]) -> [Node; 2] {
    let [a, b] = part;
    let width = b.z - a.z;
    // A cubic multiplies the noise of its slopes by the squared ratio of the widths. The node far from the
    // bound would also be rounded in float32 by its own size. So a small part is extended by a parabola.
    let small = width < (cell[1].z - cell[0].z) / 1024.0;
    let bend = (b.slope - a.slope) / width;
    let at = |z: f64| {
        if small {
            let step = z - a.z;
            let value = a.value + step * (a.slope + 0.5 * bend * step);
            Node { z, value, slope: a.slope + bend * step }
        } else {
            a.cubic(b, z)
        }
    };
    let [left, right] = cell;
    [if left.z == a.z { a } else { at(left.z) }, if right.z == b.z { b } else { at(right.z) }]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A polynomial, by its coefficients from the constant on, at 1 + a distance.
    fn node(coefficients: [f64; 4], z: f64) -> Node {
        let [a, b, c, d] = coefficients;
        let x = z - 1.0;
        Node { z, value: a + x * (b + x * (c + x * d)), slope: b + x * (2.0 * c + x * 3.0 * d) }
    }

    fn assert_same(found: Node, expected: Node) {
        assert_eq!(found.z, expected.z);
        assert!((found.value - expected.value).abs() < 1e-12, "{found:?} {expected:?}");
        assert!((found.slope - expected.slope).abs() < 1e-12, "{found:?} {expected:?}");
    }

    #[test]
    fn a_cubic_is_the_one_of_its_nodes() {
        let of = |z: f64| node([0.3, -1.2, 0.7, 0.4], z);
        for z in [0.5, 1.0, 1.4, 1.75, 3.0] {
            assert_same(of(1.0).cubic(of(1.75), z), of(z));
        }
    }

    #[test]
    fn errors_of_a_cubic_are_those_of_higher_powers() {
        let of = |z: f64| node([0.3, -1.2, 0.7, 0.4], z);
        let (left, right) = (of(1.0), of(3.0));
        assert!(of(2.0).cubic_error(left, right) < 1e-14);
        // t^2 (1-t)^2 has the max 1/16 and is flat there.
        let fourth = Node { value: of(2.0).value + 1.0 / 16.0, ..of(2.0) };
        assert!((fourth.cubic_error(left, right) - 1.0 / 16.0).abs() < 1e-14);
        // t^2 (1-t)^2 (t - 1/2) has the slope 1/16 in t.
        let fifth = Node { slope: of(2.0).slope + 1.0 / 32.0, ..of(2.0) };
        assert!((fifth.cubic_error(left, right) - 0.143 / 16.0).abs() < 1e-14);
        let unknown = Node { value: f64::NAN, ..of(2.0) };
        assert_eq!(unknown.cubic_error(left, right), f64::INFINITY);
    }

    #[test]
    fn a_part_is_extended_by_its_cubic_or_its_parabola() {
        let cubic = |z: f64| node([0.3, -1.2, 0.7, 0.4], z);
        let cell = [cubic(0.0), cubic(3.0)];
        for part in [[1.25, 1.5], [1.0, 1.0 + 4.0 / 1024.0], [0.0, 1.0]] {
            for (found, end) in extrapolated(part.map(cubic), cell).into_iter().zip(cell) {
                assert!((found.value - end.value).abs() < 1e-6 && found.z == end.z, "{found:?}");
            }
        }
        let parabola = |z: f64| node([0.3, -1.2, 0.7, 0.0], z);
        let noisy = |z: f64| Node { slope: parabola(z).slope + 1e-9, ..parabola(z) };
        let [left, right] = extrapolated([noisy(1.0), noisy(1.0 + 1e-3)], cell);
        for found in [left, right] {
            assert!((found.value - parabola(found.z).value).abs() < 1e-8, "{found:?}");
            assert!((found.slope - parabola(found.z).slope).abs() < 1e-8, "{found:?}");
        }
    }

    #[test]
    fn ends_of_a_piece_cut_cells() {
        let of = |z: f64| node([0.0, 1.0, 0.0, 0.0], z);
        let ends = Ends { low: Some(of(1.0)), high: Some(of(2.0)) };
        let cut = |left: f64, right: f64| {
            ends.clip([of(left), of(right)]).map(|cell| cell.map(|node| node.z))
        };
        assert_eq!(cut(0.0, 1.0), None);
        assert_eq!(cut(2.0, 3.0), None);
        assert_eq!(cut(0.5, 1.5), Some([1.0, 1.5]));
        assert_eq!(cut(1.0, 2.0), Some([1.0, 2.0]));
        assert_eq!(cut(1.5, 2.5), Some([1.5, 2.0]));
        assert!(ends.contain(1.0) && ends.contain(2.0));
        assert!(!ends.contain(0.99) && !ends.contain(2.01));
        assert_eq!(rounding_error(1.0, 3.0), f64::from(f32::EPSILON));
        assert_eq!(rounding_error(LOG_RATIO_LIMIT + 1.0, LOG_RATIO_LIMIT + 2.0), 0.0);
        assert!(rounding_error(LOG_RATIO_LIMIT, LOG_RATIO_LIMIT + 2.0) > 0.0);
    }
}
