//! Tests of the table against the exact bounds and of its file.

use std::collections::HashMap;

use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};

use super::file::{FORMAT, TENSOR, VERSION_WITHOUT_NEAR};
use super::verify::in_each_cell;
use super::*;
use crate::divergence::{ALL, Divergence};
use crate::error::Error;
use crate::image::{
    ENTRIES, ENTRY_BASE, FAR, LOWER_REACH, MANTISSA_BITS, MAX_BITS, MAX_BYTES, MAX_PIECES,
    MIN_BITS, NEAR, ORIGIN, REACH_RANGES, SCALE, START, UPPER_REACH,
};

fn band(spec: &str, low: f64, high: f64) -> Band {
    Band::new(Divergence::parse(spec).unwrap(), low, high).unwrap()
}

fn table(spec: &str, low: f64, high: f64) -> BandTable {
    BandTable::of_band(&band(spec, low, high)).unwrap()
}

/// Max errors at `count` evenly spaced floats.
fn max_error_evenly(table: &BandTable, band: &Band, count: u64) -> MaxError {
    table.errors_between(0, count, count, &|logp| Ok(band.log_bounds_of_many(logp))).unwrap()
}

/// Max error of a table, including what samples of its cells can miss.
const MAX_ERROR: f64 = 1e-6;

/// Parameters at the ends of their ranges and between them, beside those of [`ALL`].
const MORE: [&str; 22] = [
    "alpha:-3",
    "alpha:-1",
    "alpha:-0.5",
    "alpha:0.01",
    "alpha:0.99",
    "alpha:1.01",
    "alpha:1.5",
    "alpha:3",
    "alpha:4",
    "renyi:0.1",
    "renyi:0.5",
    "renyi:0.99",
    "renyi:3.5",
    "vajda:1",
    "vajda:1.2",
    "vajda:3",
    "vajda:4",
    "bwcs:0",
    "bwcs:0.99",
    "bwcs:1",
    "hockey-stick:1",
    "hockey-stick:4",
];

/// Max errors in each cell and evenly over all floats.
fn max_error_everywhere(table: &BandTable, band: &Band, count: u64) -> MaxError {
    let exact = |logp: &[f64]| Ok(band.log_bounds_of_many(logp));
    let in_cells = table.errors_in_cells(4, &exact).unwrap();
    max_error_evenly(table, band, count).merge(in_cells)
}

#[test]
fn tables_of_built_in_divergences_meet_the_max_error() {
    // Evenly spaced logarithms from 1e-4 to 1, then irregular values.
    let deltas = (0..9).map(|i| 10f64.powf(f64::from(i) / 2.0 - 4.0));
    let deltas: Vec<f64> = deltas.chain([2.347e-4, 0.0513, 0.69]).collect();
    let specs = ALL.iter().chain(&MORE);
    let grid = specs.flat_map(|&spec| deltas.iter().map(move |&delta| (spec, delta)));
    // Twice the saturation point lies in the last 2e-6, and in the last tenths, of an octave.
    let cut = [("bhattacharyya", 0.999_998_893_475_190_2), ("hellinger", 0.973_145_335_136_083_3)];
    for (spec, delta) in grid.chain(cut) {
        let band = band(spec, delta, delta);
        let table = BandTable::of_band(&band).unwrap();
        assert!(table.nbytes() <= MAX_BYTES, "{spec} {delta}: {}", table.nbytes());
        let error = max_error_everywhere(&table, &band, 5_000).merge(table.max_error());
        let worst = error.log_upper.max(error.lower);
        assert!(worst <= MAX_ERROR, "{spec} {delta}: {error:?}");
    }
}

/// A dense run may find a tenth more than the build's samples, and half an ulp of a ratio near 1, because a
/// few floats in millions are rounded worse than any sample.
#[test]
fn stated_error_is_close_to_that_of_a_dense_run() {
    for (spec, delta) in [
        ("kl", 0.05),
        ("jeffreys", 0.07),
        ("renyi:3.5", 1e-4),
        ("alpha:0.5", 6.8e-4),
        ("vajda:1.5", 0.0147),
        ("hellinger", 0.68),
    ] {
        let band = band(spec, delta, delta);
        let table = BandTable::of_band(&band).unwrap();
        let (stated, found) = (table.max_error(), max_error_everywhere(&table, &band, 1_000_000));
        for (stated, found) in [(stated.log_upper, found.log_upper), (stated.lower, found.lower)] {
            assert!(
                found <= 1.1 * stated + f64::from(f32::EPSILON) / 4.0,
                "{spec} {delta}: stated {stated:e}, found {found:e}"
            );
        }
    }
}

#[test]
fn tables_of_expressions_meet_the_max_error() {
    for (text, what) in [
        ("u*ln(u) - u + 1 + (u-1)^2/3", "smooth"),
        ("(u-1)^4 + (u-1)^2", "smooth"),
        ("abs(u-1) + max(u-1.3, 0)", "a kink above 1"),
        ("(u-1)^2 + max(0.8-u, 0) + max(u-1.5, 0)", "kinks on both sides of 1"),
        ("max((u-1)^2, 2*abs(u-1) - 0.5)", "two convex functions, equal slopes where they meet"),
        ("max(-ln(u) + u - 1, 3*(u-1))", "two convex functions"),
        ("max(u - 1.2, 0)", "a hockey stick"),
        ("max(abs(u-1) - 0.2, 0)", "a flat bottom"),
        ("max(u - 1.1, 0)^2 + max(0.9 - u, 0)^2", "a flat bottom without a kink"),
    ] {
        for delta in [1e-3, 0.05, 0.4] {
            let divergence = Divergence::from_expression(text, None, None).unwrap();
            let band = Band::new(divergence, delta, delta).unwrap();
            let table = BandTable::of_band(&band).unwrap();
            assert!(table.nbytes() <= MAX_BYTES, "{text} {delta}: {}", table.nbytes());
            let error = max_error_everywhere(&table, &band, 5_000).merge(table.max_error());
            let worst = error.log_upper.max(error.lower);
            assert!(worst <= MAX_ERROR, "{text} ({what}), {delta}: {error:?}");
        }
    }
}

#[test]
fn log_bounds_hold_limits_and_keep_nan() {
    let table = table("kl", 0.05, 0.05);
    assert_eq!(table.image().log_upper(0.0), 0.0);
    assert!((table.image().lower(0.0) - (-0.05_f32).exp()).abs() < 1e-7, "the limit for p -> 1");
    assert_eq!(table.image().log_upper(f32::INFINITY), f32::INFINITY);
    assert_eq!(table.image().lower(f32::INFINITY), 0.0);
    assert!(table.image().log_upper(f32::NAN).is_nan() && table.image().lower(f32::NAN).is_nan());
    assert_eq!(table.log_bounds(0.5), table.log_bounds(0.0), "a logp above 0 counts as 0");
    assert!(table.log_bounds(f64::NAN).0.is_nan());
}

#[test]
fn each_side_uses_its_own_delta() {
    let (low, high) = (table("kl", 0.01, 0.2), table("kl", 0.2, 0.01));
    for y in [0.01_f32, 0.7, 3.0] {
        assert!(
            low.image().log_upper(y) > high.image().log_upper(y)
                && low.image().lower(y) > high.image().lower(y),
            "{y}"
        );
    }
}

#[test]
fn file_round_trip_keeps_the_table_and_the_bytes() {
    let table = table("alpha:0.5", 0.01, 0.2);
    let error = max_error_evenly(&table, &band("alpha:0.5", 0.01, 0.2), 5000);
    let table = table.verified(5000, error);
    let bytes = table.to_bytes().unwrap();
    let again = BandTable::from_bytes(&bytes).unwrap();
    assert_eq!(again, table);
    assert_eq!(again.to_bytes().unwrap(), bytes);
}

#[test]
fn sizes_and_metadata_are_those_of_the_table() {
    let table = table("kl", 0.05, 0.05);
    assert_eq!(table.nbytes(), 4 * table.words().len());
    // 104 is 1.625 * 2^6.
    assert_eq!(BandTable::checkable(), ((127 + 6) << 23) + (5 << 20) + 1);
    let metadata: HashMap<_, _> = table.metadata().into_iter().collect();
    assert_eq!(metadata["region"], table.region());
    assert_eq!(metadata["verification"], "sampled");
    assert_eq!(metadata["max_error_lower"], format!("{:?}", table.max_error().lower));
}

#[test]
fn a_file_of_version_1_gets_the_words_that_it_lacks() {
    let table = table("kl", 0.05, 0.05);
    let mut old = table.clone();
    old.words[NEAR..ENTRIES].fill(0);
    let bytes = old.to_bytes_of(VERSION_WITHOUT_NEAR).unwrap();
    assert_eq!(BandTable::from_bytes(&bytes).unwrap(), table);
    let bytes = table.to_bytes_of(VERSION_WITHOUT_NEAR).unwrap();
    let Err(Error::TableFile { reason }) = BandTable::from_bytes(&bytes) else {
        panic!("words that version 1 leaves 0");
    };
    assert!(reason.contains("version 1 leaves 0"), "{reason}");
}

/// A little less than `ln(2) / 2`.
const MAX_NEAR: f64 = 0.3466;

/// Tables whose sides saturate, are steep, flat or apart.
fn tables() -> Vec<(String, BandTable)> {
    let mut specs: Vec<(String, f64, f64)> = Vec::new();
    for spec in ALL {
        for delta in [1e-3, 0.05, 0.4] {
            specs.push(((*spec).to_owned(), delta, delta));
        }
    }
    specs.push(("kl".to_owned(), 0.2, 1e-4));
    specs.push(("tv".to_owned(), 1e-4, 0.3));
    specs.into_iter().map(|(spec, low, high)| (spec.clone(), table(&spec, low, high))).collect()
}

/// Values of `-log p` over every octave from 2^-30 on, its ends included, and beyond [`FAR`].
fn spread() -> impl Iterator<Item = f64> {
    (-30..9).flat_map(|octave: i32| {
        (0..=64).map(move |i| f64::from(octave).exp2() * (1.0 + f64::from(i) / 64.0))
    })
}

#[test]
fn reaches_are_the_extremes_of_the_bounds() {
    for (name, table) in tables() {
        for (range, &start) in REACH_RANGES.iter().enumerate() {
            let end = REACH_RANGES.get(range + 1).map_or(f64::INFINITY, |&end| f64::from(end));
            let of = |first: usize| f64::from(table.image().float(first + range));
            let (share, log) = (of(UPPER_REACH), of(LOWER_REACH));
            let (mut min_share, mut max_log) = (1.0_f64, f64::NEG_INFINITY);
            let first = std::iter::once(f64::from(start));
            for y in first.chain(spread()).filter(|&y| y >= f64::from(start) && y <= end) {
                let (lower, upper) = table.log_bounds(-y);
                min_share = min_share.min(if y > 0.0 { upper / y.min(FAR) } else { 1.0 });
                max_log = max_log.max(lower);
                assert!(
                    y > FAR || upper >= share * y && lower <= log,
                    "{name} {y}: {upper} {lower}"
                );
            }
            // A cell takes the extremes of its control points.
            assert!(share >= 0.45 * min_share && log <= 0.4 * max_log + 2e-6, "{name} {start}");
        }
    }
}

#[test]
fn ratios_that_are_near_are_inside_the_bounds() {
    for (name, table) in tables() {
        let of = |index: usize| f64::from(table.image().float(NEAR + index));
        let (slope, bend, floor, end) = (of(0), of(1), of(2), of(3));
        let mut closest = f64::INFINITY;
        let (mut min_room, mut saturated) = (-table.log_bounds(0.0).0, 0.0);
        for y in spread() {
            let (lower, upper) = table.log_bounds(-y);
            let c = y.min(1.5);
            let near = c * (slope - bend * c);
            let room = upper.min(-lower);
            assert!(near <= room && near < MAX_NEAR, "{name} {y}: {near} {room}");
            closest = closest.min(room / near);
            if y < end {
                assert!(upper >= y && -lower >= floor, "{name} {y}");
                min_room = min_room.min(-lower);
            }
            if upper >= y && saturated >= 0.98 * y - 1e-9 {
                saturated = y;
            }
        }
        let is_limited = 1.5 * (slope - 1.5 * bend) > 0.3464;
        assert!(is_limited || closest < 1.6, "{name}: {closest}");
        let is_tight = floor >= 0.98 * min_room.min(0.3465) - 3e-6 || end == 0.0;
        assert!(is_tight && floor >= 0.0, "{name}: {floor} {min_room}");
        assert!(end >= 0.3 * saturated.min(0.3465) - 1e-9, "{name}: {end} {saturated}");
    }
}

#[test]
fn samples_are_in_each_cell() {
    const COUNT: u32 = 3;
    for (name, table) in tables() {
        let image = table.image();
        let mut ys = in_each_cell(image, COUNT);
        ys.sort_unstable_by(f32::total_cmp);
        let below = |y: f64| ys.partition_point(|&sample| f64::from(sample) <= y);
        let mut cells = 0;
        for lane in image.pieces() {
            let of = |first: usize| f64::from(image.float(first + lane));
            let (start, last) = (of(START), f64::from(image.end(lane).next_down()));
            let direction = if of(ORIGIN) > start { -1.0 } else { 1.0 };
            for exponent in image.exponents(lane) {
                let bottom = f64::from(f32::from_bits(exponent << MANTISSA_BITS));
                let count = 1_u32 << image.entry(lane, exponent).halvings;
                let ends = |cell: u32| {
                    let z = bottom * (1.0 + f64::from(cell) / f64::from(count));
                    of(ORIGIN) + direction * z / of(SCALE)
                };
                for cell in 0..count {
                    let (a, b) = (ends(cell), ends(cell + 1));
                    // A cell of a few floats has fewer of them.
                    let is_wide = (b - a).abs() > 1e-6 * a.max(b) && a.max(b) > 1e-30;
                    if is_wide && a.min(b) >= start && a.max(b) <= last {
                        let found = below(a.max(b)) - below(a.min(b));
                        assert!(found >= COUNT as usize, "{name}: {a} to {b}");
                        cells += 1;
                    }
                }
            }
            assert!(ys.contains(&image.float(START + lane)) && ys.contains(&(last as f32)));
        }
        assert!(cells > 20, "{name}: {cells}");
    }
}

#[test]
fn flipped_bits_and_truncations_are_refused() {
    let bytes = table("tv", 0.05, 0.05).to_bytes().unwrap();
    for place in 0..bytes.len() {
        let mut altered = bytes.clone();
        altered[place] ^= 1 << (place % 8);
        assert!(
            matches!(BandTable::from_bytes(&altered), Err(Error::TableFile { .. })),
            "byte {place}"
        );
    }
    for length in (0..bytes.len()).step_by(7) {
        assert!(BandTable::from_bytes(&bytes[..length]).is_err(), "{length}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(BandTable::from_bytes(&longer).is_err());
}

#[test]
fn foreign_and_newer_files_are_refused_with_their_reason() {
    let refused = |bytes: &[u8]| match BandTable::from_bytes(bytes) {
        Err(Error::TableFile { reason }) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(b"GIF89a").contains("not a whole safetensors file"));
    let data = [0_u8; 4];
    let view = || TensorView::new(Dtype::F32, vec![1], &data).unwrap();
    let foreign = safetensors::serialize([("weight", view())], None).unwrap();
    assert!(refused(&foreign).contains("not of a bandpo table"));
    let metadata = HashMap::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("format_version".to_owned(), "3".to_owned()),
    ]);
    let newer = safetensors::serialize([(TENSOR, view())], Some(metadata)).unwrap();
    assert!(refused(&newer).contains("format version \"3\""));
}

/// Forged files have a right checksum but an index that leads outside.
#[test]
fn image_that_points_outside_itself_is_refused() {
    let good = table("kl", 0.05, 0.05);
    let unused = MAX_PIECES - 1;
    for (place, word) in [
        (ENTRY_BASE, 1 << 20),
        (ENTRY_BASE + unused, 1 << 20),
        (MIN_BITS, u32::MAX),
        (MAX_BITS, u32::MAX),
        (MAX_BITS + unused, f32::INFINITY.to_bits()),
        (ENTRIES, u32::MAX),
    ] {
        let mut forged = good.clone();
        forged.words[place] = word;
        let bytes = forged.to_bytes().unwrap();
        assert!(BandTable::from_bytes(&bytes).is_err(), "word {place}");
    }
}

#[test]
fn failed_save_leaves_no_file() {
    let table = table("kl", 0.05, 0.05);
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing").join("table.safetensors");
    assert!(matches!(table.save(&missing), Err(Error::File { action: "write", .. })));
    assert!(matches!(table.save(folder.path()), Err(Error::File { action: "write", .. })));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let path = folder.path().join("table.safetensors");
    table.save(&path).unwrap();
    table.save(&path).unwrap();
    assert_eq!(BandTable::load(&path).unwrap(), table);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    assert!(matches!(BandTable::load(&missing), Err(Error::File { action: "read", .. })));
}

#[test]
fn verification_of_all_values_is_exhaustive() {
    let table = table("kl", 0.05, 0.05);
    assert_eq!(table.verification(), Verification::Sampled);
    let error = MaxError { log_upper: 1e-7, lower: 2e-7 };
    let verified = table.clone().verified(BandTable::checkable(), error);
    assert_eq!((verified.verification(), verified.max_error()), (Verification::Exhaustive, error));
    let sampled = table.verified(BandTable::checkable() - 1, error);
    assert_eq!(sampled.verification(), Verification::Sampled);
}

/// A constant cuts off the band, or the sampled curve, at both ends.
#[test]
fn curves_that_meet_in_kinks_meet_the_max_error() {
    let kl = band("kl", 0.05, 0.05);
    let sampler = |side: Side, logp: &[f64]| {
        Ok(logp
            .iter()
            .map(|&logp| {
                let bound = kl.bound(logp, side).log_ratio;
                (bound, kl.log_slope(logp, bound))
            })
            .collect())
    };
    // upper = max(1.28, min(band, 10)): the band crosses 1.28 and 10 at these y.
    let crosses = |ratio: f64| {
        crate::band::root::last_inside(1e-9, FAR, |y| kl.log_bounds(-y).1 <= ratio.ln()).at
    };
    let (low, high) = (crosses(1.28), crosses(10.0));
    let exact = |logp: &[f64]| {
        let (lower, upper) = kl.log_bounds_of_many(logp);
        let upper = upper.iter().map(|u| u.clamp(1.28_f64.ln(), 10_f64.ln())).collect();
        Ok((lower, upper))
    };
    for curve in [Curve::Band(&kl), Curve::Sampled(&sampler)] {
        let upper = vec![(0.0, Curve::Constant(1.28)), (low, curve), (high, Curve::Constant(10.0))];
        let lower = vec![(0.0, Curve::Sampled(&sampler))];
        let table = BandTable::build(&lower, &upper, "{}".to_owned(), &exact).unwrap();
        assert!(table.nbytes() < 6000, "{}", table.nbytes());
        let error = table.errors_between(0, 100_000, 100_000, &exact).unwrap();
        for error in [error, table.max_error()] {
            assert!(error.log_upper <= MAX_ERROR && error.lower <= MAX_ERROR, "{error:?}");
        }
        assert_eq!(table.image().log_upper(50.0), 10_f32.ln());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_deltas_meet_the_max_error(log_delta in -9.2..0.0_f64, y in prop::collection::vec(0.0..104.0_f32, 50)) {
        let band = band("reverse-kl", log_delta.exp(), log_delta.exp());
        let table = BandTable::of_band(&band).unwrap();
        let error = verify::errors_at(table.image(), &y, &|logp| Ok(band.log_bounds_of_many(logp))).unwrap();
        prop_assert!(error.log_upper <= MAX_ERROR && error.lower <= MAX_ERROR, "{:?}", error);
    }
}
