//! Tests on every register that this processor has.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

mod lanes {
    use std::fmt::Debug;

    use crate::band::Band;
    use crate::divergence::Divergence;
    use crate::image::Image;
    use crate::simd::exp_log::ExpAndGap;
    use crate::simd::lanes::MAX_LANES;
    use crate::simd::portable::Portable;
    use crate::simd::{AnyDoubles, AnyLanes, LossLanes, WithLanes};
    use crate::table::BandTable;

    /// Bits of exp, gap, `log_upper` and `lower` of each number.
    struct Each<'a> {
        x: &'a [f32],
        image: Image<'a>,
    }

    impl WithLanes<f32> for Each<'_> {
        type Output = Vec<[u32; 4]>;

        fn run<L: LossLanes<Scalar = f32>>(self, lanes: L) -> Self::Output {
            let mut out = Vec::new();
            for chunk in self.x.chunks_exact(MAX_LANES) {
                for part in chunk.chunks_exact(L::COUNT) {
                    let x = lanes.load(part);
                    let within = lanes.select(lanes.less(lanes.abs(x), lanes.splat(20.0)), x, {
                        lanes.splat(20.0)
                    });
                    let ExpAndGap { exp, gap } = lanes.exp_and_gap(within);
                    let upper = lanes.look_up(self.image, x, lanes.less(x, x));
                    let lower = lanes.look_up(self.image, x, lanes.less_or_equal(x, x));
                    let mut columns = [[0.0; MAX_LANES]; 4];
                    for (column, values) in columns.iter_mut().zip([exp, gap, upper, lower]) {
                        lanes.store(values, column);
                    }
                    out.extend(
                        (0..L::COUNT).map(|lane| columns.map(|column| column[lane].to_bits())),
                    );
                }
            }
            out
        }
    }

    fn kinds(x: &[f32], image: Image<'_>) -> Vec<(AnyLanes, Vec<[u32; 4]>)> {
        let on = |lanes: AnyLanes| (lanes, lanes.run(Each { x, image }));
        AnyLanes::all().into_iter().map(on).collect()
    }

    /// Log-probs of every size and sign, and numbers that are none.
    fn numbers() -> Vec<f32> {
        let mut numbers: Vec<f32> = (0..1 << 16)
            .map(|i: u32| f32::from_bits(i << 16 | i.wrapping_mul(40503) & 0xffff))
            .collect();
        numbers.extend((0..1 << 16).map(|i| -(i as f32) * 1e-3));
        numbers
    }

    #[test]
    fn all_registers_give_the_bits_of_the_scalar_lookup() {
        let numbers = numbers();
        for (spec, delta) in [("kl", 0.05), ("reverse-kl", 0.3), ("tv", 0.1), ("jeffreys", 1e-4)] {
            let band = Band::new(Divergence::parse(spec).unwrap(), delta, delta).unwrap();
            let table = BandTable::of_band(&band).unwrap();
            let kinds = kinds(&numbers, table.image());
            for (name, found) in &kinds {
                assert_eq!(found.len(), numbers.len());
                for ((&x, found), portable) in numbers.iter().zip(found).zip(&kinds[0].1) {
                    let y = Image::y(x);
                    let scalar = [table.image().log_upper(y), table.image().lower(y)];
                    for (vector, scalar) in found[2..].iter().zip(scalar) {
                        let vector = f32::from_bits(*vector);
                        assert!(
                            vector == scalar || x.is_nan(),
                            "{spec} {name:?} {x:e}: {vector:e} {scalar:e}"
                        );
                    }
                    if !x.is_nan() {
                        assert_eq!(found[..2], portable[..2], "{name:?} {x:e}");
                    }
                }
            }
        }
    }

    /// Asserts that no token within its reach is beyond its bound.
    struct Reaches<'a> {
        logp: &'a [f32],
        image: Image<'a>,
    }

    impl WithLanes<f32> for Reaches<'_> {
        /// Tokens whose reach is not 0, of each side.
        type Output = [usize; 2];

        fn run<L: LossLanes<Scalar = f32>>(self, lanes: L) -> [usize; 2] {
            let mut useful = [0; 2];
            for part in
                self.logp.chunks_exact(MAX_LANES).flat_map(|part| part.chunks_exact(L::COUNT))
            {
                let logp = lanes.load(part);
                for (side, lower) in [lanes.less(logp, logp), lanes.less_or_equal(logp, logp)]
                    .into_iter()
                    .enumerate()
                {
                    let (mut reach, mut bound, mut ratio) =
                        ([0.0; MAX_LANES], [0.0; MAX_LANES], [0.0; MAX_LANES]);
                    let reached = lanes.reach(self.image, logp, lower);
                    lanes.store(reached, &mut reach);
                    lanes.store(lanes.look_up(self.image, logp, lower), &mut bound);
                    let within = lanes.clamp_max(20.0, lanes.clamp_min(-20.0, reached));
                    lanes.store(lanes.exp_and_gap(within).exp, &mut ratio);
                    for lane in 0..L::COUNT {
                        let (logp, reach) = (part[lane], reach[lane]);
                        let holds = if side == 0 {
                            (0.0..=bound[lane]).contains(&reach.min(20.0))
                        } else {
                            reach <= 0.0 && (reach <= -20.0 || ratio[lane] >= bound[lane])
                        };
                        assert!(holds, "side {side} logp {logp:e} {reach:e} {:e}", bound[lane]);
                        useful[side] += usize::from(reach != 0.0);
                    }
                }
            }
            useful
        }
    }

    #[test]
    fn log_ratio_within_reach_is_within_bounds() {
        let logp: Vec<f32> = numbers().into_iter().filter(|logp| *logp <= 0.0).collect();
        for delta in [1e-4, 0.05, 1.0] {
            for spec in ["kl", "reverse-kl", "tv", "jeffreys", "hockey-stick:1.2", "renyi:3.5"] {
                let band = Band::new(Divergence::parse(spec).unwrap(), delta, delta).unwrap();
                let table = BandTable::of_band(&band).unwrap();
                let work = || Reaches { logp: &logp, image: table.image() };
                let useful = work().run(Portable);
                assert!(useful[0] > logp.len() / 2 && useful[1] > 0, "{spec} {useful:?}");
                for lanes in AnyLanes::all() {
                    assert_eq!(lanes.run(work()), useful);
                }
            }
        }
    }

    /// Compresses and expands by every mask of eight neighbours.
    struct Packed;

    impl WithLanes<f32> for Packed {
        type Output = ();

        fn run<L: LossLanes<Scalar = f32>>(self, lanes: L) {
            check_packing(lanes);
        }
    }

    impl WithLanes<f64> for Packed {
        type Output = ();

        fn run<L: LossLanes<Scalar = f64>>(self, lanes: L) {
            check_packing(lanes);
        }
    }

    fn check_packing<L: LossLanes>(lanes: L)
    where
        L::Scalar: From<f32> + PartialEq + Debug,
    {
        let number = L::Scalar::from;
        for pattern in 0..256_u32 {
            let bytes: [u8; MAX_LANES] =
                std::array::from_fn(|lane| (pattern >> (lane % 8) & 1) as u8 * 3);
            let numbers: [L::Scalar; MAX_LANES] =
                std::array::from_fn(|lane| number(1.0 + lane as f32));
            let mask = lanes.load_mask(&bytes);
            assert_eq!(lanes.bits(lanes.mask_of(lanes.bits(mask))), lanes.bits(mask));
            let chosen: Vec<L::Scalar> =
                (0..L::COUNT).filter(|&lane| bytes[lane] > 0).map(|lane| numbers[lane]).collect();
            let mut packed = [number(-1.0); MAX_LANES];
            lanes.compress(mask, lanes.load(&numbers), &mut packed);
            assert_eq!(packed[..chosen.len()], chosen[..], "{pattern:b}");
            let mut spread = [number(-1.0); MAX_LANES];
            lanes.store(lanes.expand(mask, &packed), &mut spread);
            for lane in 0..L::COUNT {
                let expected = if bytes[lane] > 0 { numbers[lane] } else { number(0.0) };
                assert_eq!(spread[lane], expected, "{pattern:b} {lane}");
            }
        }
    }

    #[test]
    fn compress_and_expand_follow_the_mask_on_all_registers() {
        for lanes in AnyLanes::all() {
            lanes.run(Packed);
        }
        for doubles in AnyDoubles::all() {
            doubles.run_loss(Packed);
        }
    }

    /// In double precision.
    fn exact(x: f64) -> ExpAndGap<f64> {
        // A series where the difference cancels. The next term is 3e-15 of the sum.
        let gap = if x.abs() < 1e-3 {
            x * x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0))))
        } else {
            x.exp_m1() - x
        };
        ExpAndGap { exp: x.exp(), gap }
    }

    /// Errors stated in docs/numerics.md.
    #[test]
    fn exponentials_are_as_accurate_as_documented() {
        let x: Vec<f32> =
            (0..1 << 20).map(|i| (i - (1 << 19)) as f32 * (20.0 / (1 << 19) as f32)).collect();
        let small: Vec<f32> = (0..1 << 16)
            .flat_map(|i| [1.0, -1.0].map(|s| s * f32::from_bits((70 << 23) + (i << 12))))
            .collect();
        let band = Band::new(Divergence::parse("kl").unwrap(), 0.05, 0.05).unwrap();
        let table = BandTable::of_band(&band).unwrap();
        let (mut worst_exp, mut worst_gap) = (0.0_f64, 0.0_f64);
        for x in [x, small] {
            for (&x, found) in x.iter().zip(Each { x: &x, image: table.image() }.run(Portable)) {
                if x.abs() >= 20.0 {
                    continue;
                }
                let [exp, gap] = [found[0], found[1]].map(|bits| f64::from(f32::from_bits(bits)));
                let exact = exact(f64::from(x));
                let ulp = f64::from((exact.exp as f32).next_up()) - f64::from(exact.exp as f32);
                worst_exp = worst_exp.max((exp - exact.exp).abs() / ulp);
                // Below 2^-126 float32 has no digits left.
                if exact.gap > f64::from(f32::MIN_POSITIVE) {
                    worst_gap = worst_gap.max((gap - exact.gap).abs() / exact.gap);
                }
            }
        }
        assert!(worst_exp <= 1.2, "{worst_exp}");
        assert!(worst_gap <= 1e-6, "{worst_gap}");
    }
}

mod wide {
    use crate::band::Band;
    use crate::divergence::Divergence;
    use crate::image::Image;
    use crate::number::{Dd, Real};
    use crate::simd::exp_log::ExpAndGap;
    use crate::simd::lanes::MAX_LANES;
    use crate::simd::{AnyDoubles, LossLanes, WithLanes};
    use crate::table::BandTable;

    /// `[exp, gap]` of each number, clamped to the range of log-ratios, then `[log_upper, lower]` and the reaches.
    struct Each<'a> {
        x: &'a [f64],
        image: Image<'a>,
    }

    impl WithLanes<f64> for Each<'_> {
        type Output = Vec<[f64; 6]>;

        fn run<L: LossLanes<Scalar = f64>>(self, lanes: L) -> Self::Output {
            let mut out = Vec::new();
            for part in self.x.chunks_exact(L::COUNT) {
                let x = lanes.load(part);
                let within = lanes.clamp_max(20.0, lanes.clamp_min(-80.0, x));
                let ExpAndGap { exp, gap } = lanes.exp_and_gap(within);
                let (every, none) = (lanes.less_or_equal(x, x), lanes.less(x, x));
                let found = [
                    exp,
                    gap,
                    lanes.look_up(self.image, x, none),
                    lanes.look_up(self.image, x, every),
                    lanes.reach(self.image, x, none),
                    lanes.reach(self.image, x, every),
                ];
                let mut columns = [[0.0; MAX_LANES]; 6];
                for (column, values) in columns.iter_mut().zip(found) {
                    lanes.store(values, column);
                }
                out.extend((0..L::COUNT).map(|lane| columns.map(|column| column[lane])));
            }
            out
        }
    }

    fn kinds(x: &[f64], image: Image<'_>) -> Vec<(AnyDoubles, Vec<[f64; 6]>)> {
        let on = |doubles: AnyDoubles| (doubles, doubles.run_loss(Each { x, image }));
        AnyDoubles::all().into_iter().map(on).collect()
    }

    fn table(spec: &str, delta: f64) -> BandTable {
        let band = Band::new(Divergence::parse(spec).unwrap(), delta, delta).unwrap();
        BandTable::of_band(&band).unwrap()
    }

    /// Log-probs of every size down to the smallest float32, floats themselves and neighbours of them, and 0.
    fn log_probs() -> Vec<f64> {
        let floats = (0..1 << 16).map(|i: u32| f64::from(-f32::from_bits(i * 33_000)));
        let mut found: Vec<f64> = floats
            .filter(|logp| logp.is_finite())
            .flat_map(|logp| [logp, logp * (1.0 + 3e-8), logp * (1.0 - 2e-8), logp * 0.999])
            .chain([0.0, -0.0, -1e-320, -1e-60, -1e60, f64::NEG_INFINITY, 0.25])
            .collect();
        found.resize(found.len().next_multiple_of(MAX_LANES), -1.0);
        found
    }

    #[test]
    fn all_registers_give_the_bits_of_the_scalar_lookup() {
        for (spec, delta) in [("kl", 0.05), ("reverse-kl", 0.3), ("tv", 0.1), ("jeffreys", 1e-4)] {
            let table = table(spec, delta);
            let image = table.image();
            let x = log_probs();
            let kinds = kinds(&x, image);
            for (name, found) in &kinds {
                for ((&logp, found), portable) in x.iter().zip(found).zip(&kinds[0].1) {
                    let y = Image::y(logp as f32);
                    let tabulated = image.log_upper(y);
                    let upper =
                        if tabulated >= y && logp <= 0.0 { -logp } else { f64::from(tabulated) };
                    assert_eq!(
                        found[2..4],
                        [upper, f64::from(image.lower(y))],
                        "{spec} {name:?} {logp:e}"
                    );
                    assert_eq!(found.map(f64::to_bits), portable.map(f64::to_bits));
                }
            }
        }
    }

    #[test]
    fn log_ratio_within_reach_is_within_bounds() {
        for delta in [1e-4, 0.05, 1.0] {
            for spec in ["kl", "reverse-kl", "tv", "jeffreys", "hockey-stick:1.2", "renyi:3.5"] {
                let table = table(spec, delta);
                let x = log_probs();
                let mut useful = [0; 2];
                for (logp, found) in x.iter().zip(&kinds(&x, table.image())[0].1) {
                    let [_, _, upper, lower, reach_up, reach_down] = *found;
                    assert!(
                        (0.0..=upper).contains(&reach_up.min(20.0)),
                        "{spec} {logp:e} {found:?}"
                    );
                    let inside =
                        reach_down <= 0.0 && (reach_down <= -20.0 || reach_down.exp() >= lower);
                    assert!(inside, "{spec} {logp:e} {found:?}");
                    useful[0] += usize::from(reach_up > 0.0);
                    useful[1] += usize::from(reach_down < 0.0);
                }
                assert!(useful[0] > x.len() / 2 && useful[1] > 0, "{spec} {useful:?}");
            }
        }
    }

    /// Errors stated in docs/numerics.md.
    #[test]
    fn exponentials_are_as_accurate_as_documented() {
        let dense =
            (0..1 << 17).map(|i| f64::from(i - (100 << 10)) * (80.0 / f64::from(100 << 10)));
        let small = (0..1 << 12).flat_map(|i| {
            let size = (-f64::from(i) * 0.006 - 0.5).exp();
            [size, -size]
        });
        let x: Vec<f64> = dense.chain(small).filter(|x| *x <= 20.0).collect();
        let x = &x[..x.len() / MAX_LANES * MAX_LANES];
        let (mut worst_exp, mut worst_gap) = (0.0_f64, 0.0_f64);
        for (&x, found) in x.iter().zip(&kinds(x, table("kl", 0.05).image())[0].1) {
            let (wide, [exp, gap]) = (Dd::of(x), [found[0], found[1]]);
            let (exact_exp, exact_gap) = (wide.exp(), wide.exp_m1() - wide);
            let ulp = exact_exp.to_f64().next_up() - exact_exp.to_f64();
            worst_exp = worst_exp.max((Dd::of(exp) - exact_exp).to_f64().abs() / ulp);
            worst_gap = worst_gap.max(((Dd::of(gap) - exact_gap) / exact_gap).to_f64().abs());
        }
        println!("exp within {worst_exp} ulp, gap within {worst_gap:e}");
        assert!(worst_exp <= 1.0, "{worst_exp}");
        assert!(worst_gap <= 2e-15, "{worst_gap}");
    }
}

mod doubles {
    use crate::number::{Dd, Real};
    use crate::simd::doubles::{Doubles, MAX_DOUBLES, Vector};
    use crate::simd::{AnyDoubles, WithDoubles};

    /// `[u, excess, gap]` of the exponential and `[log, gap]` of the logarithm of each number.
    struct Each<'a> {
        x: &'a [f64],
        found: &'a mut Vec<[f64; 5]>,
    }

    impl WithDoubles for Each<'_> {
        #[inline(always)]
        fn run<L: Doubles>(self, lanes: L) {
            for part in self.x.chunks_exact(L::COUNT) {
                let x = Vector::load(lanes, part);
                let (power, log) = (x.exponential(), x.log_1p());
                let mut columns = [[0.0; MAX_DOUBLES]; 5];
                power.u.store(&mut columns[0]);
                power.excess.store(&mut columns[1]);
                power.gap.store(&mut columns[2]);
                log.log.store(&mut columns[3]);
                log.gap.store(&mut columns[4]);
                for lane in 0..L::COUNT {
                    self.found.push(columns.map(|column| column[lane]));
                }
            }
        }
    }

    fn kinds(x: &[f64]) -> Vec<(AnyDoubles, Vec<[f64; 5]>)> {
        let on = |doubles: AnyDoubles| {
            let mut found = Vec::new();
            doubles.run(Each { x, found: &mut found });
            (doubles, found)
        };
        AnyDoubles::all().into_iter().map(on).collect()
    }

    /// Numbers of every size up to `max`, of both signs, and densely up to 3.
    fn numbers(max: f64) -> Vec<f64> {
        let sizes = (0..1 << 13).map(|i| (f64::from(i) * 0.173 - 700.0).exp()).filter(|x| *x < max);
        let dense = (1..1 << 14).map(|i| f64::from(i) * (3.0 / f64::from(1 << 14)));
        let mut numbers: Vec<f64> = sizes.chain(dense).flat_map(|x| [x, -x]).collect();
        numbers.resize(numbers.len().next_multiple_of(MAX_DOUBLES), 1.0);
        numbers
    }

    /// Errors stated in docs/numerics.md, in units of 2^-53.
    #[test]
    fn elementary_functions_are_as_accurate_as_documented() {
        let mut worst = [0.0_f64; 5];
        let mut compare = |column: usize, found: f64, exact: Dd| {
            let error = ((Dd::of(found) - exact) / exact).abs().to_f64();
            worst[column] = worst[column].max(error / (0.5 * f64::EPSILON));
        };
        let x = numbers(708.0);
        for (&x, found) in x.iter().zip(&kinds(&x)[0].1) {
            let wide = Dd::of(x);
            compare(0, found[0], wide.exp());
            compare(1, found[1], wide.exp_m1());
            // 31 digits that cancel have 16 left above this.
            if x.abs() > 1e-12 {
                compare(2, found[2], wide.exp_m1() - wide);
            }
        }
        let x = numbers(1e300);
        for (&x, found) in x.iter().zip(&kinds(&x)[0].1).filter(|(x, _)| **x > -1.0) {
            let wide = Dd::of(x);
            compare(3, found[3], wide.ln_1p());
            if x.abs() > 1e-12 {
                compare(4, found[4], wide - wide.ln_1p());
            }
        }
        for (column, stated) in [2.0, 2.0, 4.0, 2.0, 6.0].into_iter().enumerate() {
            assert!(worst[column] <= stated, "{worst:?}");
        }
    }

    #[test]
    fn all_registers_give_the_same_bits() {
        let x = numbers(708.0);
        let kinds = kinds(&x);
        for (name, found) in &kinds {
            for ((x, found), portable) in x.iter().zip(found).zip(&kinds[0].1) {
                let same = found.map(f64::to_bits) == portable.map(f64::to_bits);
                assert!(same || *x <= -1.0, "{name:?} {x:e}: {found:?} {portable:?}");
            }
        }
    }
}

mod pairs {
    use crate::number::{Dd, Real};
    use crate::simd::doubles::{Doubles, MAX_DOUBLES, Vector};
    use crate::simd::pairs::Pair;
    use crate::simd::{AnyDoubles, WithDoubles};

    /// Results of each operation on the numbers.
    struct Each<'a> {
        x: &'a [f64],
        found: &'a mut Vec<[Dd; 6]>,
    }

    impl WithDoubles for Each<'_> {
        const NARROW: bool = true;

        #[inline(always)]
        fn run<L: Doubles>(self, lanes: L) {
            for part in self.x.chunks_exact(L::COUNT) {
                let x = Vector::load(lanes, part);
                let power = Pair::of(x).exponential();
                let u = power.u;
                let log = u.ln(power.excess);
                let results = [u, power.excess, log, u / log, u * log, u.sqrt()];
                let mut columns = [[[0.0; MAX_DOUBLES]; 2]; 6];
                for (column, result) in columns.iter_mut().zip(results) {
                    result.high.store(&mut column[0]);
                    result.low.store(&mut column[1]);
                }
                for lane in 0..L::COUNT {
                    self.found
                        .push(columns.map(|[high, low]| Dd { hi: high[lane], lo: low[lane] }));
                }
            }
        }
    }

    fn kinds(x: &[f64]) -> Vec<(AnyDoubles, Vec<[Dd; 6]>)> {
        let on = |doubles: AnyDoubles| {
            let mut found = Vec::new();
            doubles.run(Each { x, found: &mut found });
            (doubles, found)
        };
        AnyDoubles::all().into_iter().map(on).collect()
    }

    /// Numbers of every size up to 560, of both signs.
    fn numbers() -> Vec<f64> {
        let sizes =
            (0..1 << 13).map(|i| (f64::from(i) * 0.00332 - 20.8).exp()).filter(|x| *x < 560.0);
        let mut numbers: Vec<f64> = sizes.flat_map(|x| [x, -x]).collect();
        numbers.resize(numbers.len().next_multiple_of(MAX_DOUBLES), 1.0);
        numbers
    }

    /// Relative error of an operation, rounded up. A tenth of that of the residual of a bound.
    const ERROR: f64 = 2e-31;

    #[test]
    fn operations_have_31_digits() {
        let x = numbers();
        for (&x, found) in x.iter().zip(&kinds(&x)[0].1) {
            let wide = Dd::of(x);
            let u = wide.exp();
            let exact = [u, wide.exp_m1(), wide, u / wide, u * wide, u.sqrt()];
            for (column, (found, exact)) in found.iter().zip(exact).enumerate() {
                let error = ((*found - exact) / exact).abs().to_f64();
                assert!(error < ERROR * (1.0 + x.abs()), "{column} at {x:e}: {error:e}");
            }
        }
    }

    #[test]
    fn all_registers_give_the_same_bits() {
        let x = numbers();
        let kinds = kinds(&x);
        for (name, found) in &kinds {
            assert!(found == &kinds[0].1, "{name:?}");
        }
    }
}
