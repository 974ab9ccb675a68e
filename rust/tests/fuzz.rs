//! Random and damaged input, by a seed: texts of expressions and specs, table files, and images of tables.
//!
//! A reader returns a value or an error, and what it accepts can be used. `cargo test` runs a small part;
//! `BANDPO_FUZZ_CASES` and `BANDPO_FUZZ_SEED` select more. Each test prints the number of its cases.

use std::time::{Duration, Instant};

use crate::band::Band;
use crate::divergence::Divergence;
use crate::error::Error;
use crate::image::Image;
use crate::loss::table_log_bounds;
use crate::spec;
use crate::table::BandTable;

/// `SplitMix64` (Steele, Lea and Flood, OOPSLA 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// A whole number below a count above 0.
    fn below(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }

    fn choice<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len())]
    }
}

/// Cases of a test: so many by default, and in a long run a share of `BANDPO_FUZZ_CASES`.
fn cases(default: u64, share: u64) -> u64 {
    let long: Option<u64> = variable("BANDPO_FUZZ_CASES");
    long.map_or(default, |cases| cases / share)
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn random(stream: u64) -> Random {
    Random(variable("BANDPO_FUZZ_SEED").unwrap_or(20_260_304).wrapping_add(stream << 32))
}

fn report(what: &str, cases: u64, accepted: u64, longest: Duration) {
    println!("fuzzed {what}: {cases} cases, {accepted} accepted, {} us", longest.as_micros());
}

const EXPRESSIONS: &str = include_str!("../../tests/data/corpus/expressions.txt");
const SPECS: &str = include_str!("../../tests/data/corpus/specs.txt");

/// Parts of either grammar, numbers at the ends of their range, and characters that no grammar has.
const TOKENS: [&str; 64] = [
    "u",
    "1",
    "0",
    "2.5",
    "1e3",
    "1e308",
    "1e-320",
    "4.9e-324",
    "1e999",
    ".5",
    "2.",
    "+",
    "-",
    "*",
    "/",
    "^",
    "**",
    "(",
    ")",
    "((",
    "))",
    ",",
    "ln(",
    "log(",
    "exp(",
    "sqrt(",
    "abs(",
    "sin(",
    "cos(",
    "min(",
    "max(",
    "(u-1)",
    "^2",
    "-1",
    "u*ln(u)",
    " ",
    "\n",
    "\t",
    "v",
    "\u{e9}",
    "\u{2212}",
    "\u{1f600}",
    "\0",
    "kl",
    "tv",
    "clip",
    "dapo",
    "preset:",
    "price:",
    "sides(",
    "@",
    "|",
    "&",
    ".cap(",
    ".at_least(",
    "\"",
    "'",
    ":",
    "alpha:",
    "nan",
    "inf",
    "-inf",
    "kl@0.1",
    "renyi:2@",
];

/// A text of the corpus with some changes, or a text of tokens alone.
fn text(random: &mut Random, corpus: &[&str]) -> String {
    let mut characters: Vec<char> = match random.below(8) {
        0 => Vec::new(),
        1 => random.choice(corpus).repeat(1 + random.below(40)).chars().collect(),
        _ => random.choice(corpus).chars().collect(),
    };
    let changes = if characters.is_empty() { random.below(60) } else { random.below(5) };
    for _ in 0..changes {
        let place = random.below(characters.len() + 1);
        match random.below(4) {
            0 if place < characters.len() => {
                let end = (place + 1 + random.below(8)).min(characters.len());
                characters.drain(place..end);
            }
            1 => {
                let other = random.choice(corpus);
                characters.splice(place..place, other.chars());
            }
            2 => {
                let character = char::from_u32(random.below(0x300) as u32).unwrap_or(' ');
                characters.insert(place, character);
            }
            _ => {
                let token = random.choice(&TOKENS);
                characters.splice(place..place, token.chars());
            }
        }
    }
    characters.into_iter().collect()
}

#[test]
fn an_expression_is_refused_or_has_ordered_bounds() {
    let corpus: Vec<&str> = EXPRESSIONS.lines().collect();
    let (mut random, cases) = (random(1), cases(1500, 60));
    let (mut accepted, mut longest) = (0, Duration::ZERO);
    for _ in 0..cases {
        let text = text(&mut random, &corpus);
        let start = Instant::now();
        let read = Divergence::from_expression(&text, None, None);
        longest = longest.max(start.elapsed());
        let divergence = match read {
            Ok(divergence) => divergence,
            Err(Error::Expression { .. } | Error::Generator { .. }) => continue,
            Err(other) => panic!("{text:?}: {other}"),
        };
        accepted += 1;
        let band = Band::new(divergence, 0.05, 0.3).unwrap();
        for logp in [-1e-9, -0.7, -700.0] {
            let (lower, upper) = band.log_bounds(logp);
            assert!(lower <= 0.0 && 0.0 <= upper && upper <= -logp, "{text:?} {lower} {upper}");
        }
    }
    report("expressions", cases, accepted, longest);
    assert!(accepted > cases / 100, "the texts have too little of a formula");
}

#[test]
fn a_spec_is_refused_or_gives_a_tree() {
    let corpus: Vec<&str> = SPECS.lines().collect();
    let (mut random, cases) = (random(2), cases(20_000, 1));
    let (mut accepted, mut longest) = (0, Duration::ZERO);
    for _ in 0..cases {
        let text = text(&mut random, &corpus);
        let start = Instant::now();
        let read = spec::parse(&text);
        longest = longest.max(start.elapsed());
        match read {
            Ok(tree) => {
                accepted += 1;
                assert!(serde_json::from_str::<serde_json::Value>(&tree).is_ok(), "{text:?}");
            }
            Err(Error::Spec { column, .. }) => {
                assert!((1..=text.chars().count() + 1).contains(&column), "{text:?} {column}");
            }
            Err(other) => panic!("{text:?}: {other}"),
        }
    }
    report("specs", cases, accepted, longest);
    assert!(accepted > cases / 100, "the texts have too little of a spec");
}

fn tables() -> Vec<BandTable> {
    [("kl", 0.05, 0.05), ("tv", 0.01, 0.3), ("renyi:2", 1e-4, 1.0)]
        .map(|(name, low, high)| {
            let band = Band::new(Divergence::parse(name).unwrap(), low, high).unwrap();
            BandTable::of_band(&band).unwrap()
        })
        .to_vec()
}

#[test]
fn a_damaged_table_file_is_refused() {
    let files: Vec<Vec<u8>> = tables().iter().map(|table| table.to_bytes().unwrap()).collect();
    let (mut random, cases) = (random(3), cases(3000, 8));
    let (mut accepted, mut longest) = (0, Duration::ZERO);
    for _ in 0..cases {
        let whole = &files[random.below(files.len())];
        let mut file = whole.clone();
        // Half of the changes are to the header, which is a tenth of the file.
        let places = if random.below(2) == 0 { file.len() } else { 900 };
        for _ in 0..=random.below(3) {
            let place = random.below(places.min(file.len()).max(1));
            match random.below(6) {
                0 => file.truncate(place),
                1 => file.splice(place..place, [random.next() as u8; 3]).for_each(drop),
                2 => file[..8].copy_from_slice(&(random.next() >> random.below(64)).to_le_bytes()),
                3 => drop(file.drain(place..(place + random.below(20)).min(file.len()))),
                4 => {
                    let part = whole[..random.below(whole.len())].to_vec();
                    file.extend(part);
                }
                _ => {
                    if let Some(byte) = file.get_mut(place) {
                        *byte ^= 1 << random.below(8);
                    }
                }
            }
            if file.len() < 8 {
                break;
            }
        }
        let start = Instant::now();
        let read = BandTable::from_bytes(&file);
        longest = longest.max(start.elapsed());
        match read {
            Ok(_) => {
                accepted += 1;
                assert!(files.contains(&file), "another file was accepted");
            }
            Err(Error::TableFile { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    report("table files", cases, accepted, longest);
}

#[test]
fn lookups_stay_inside_an_image_that_is_accepted() {
    let tables = tables();
    let (mut random, cases) = (random(4), cases(20_000, 1));
    let mut accepted = 0;
    let start = Instant::now();
    for _ in 0..cases {
        let mut words = tables[random.below(tables.len())].words().to_vec();
        for _ in 0..=random.below(3) {
            // Most changes are to rows of the header, the others to entries and nodes.
            let places = if random.below(4) == 0 { words.len() } else { 300 };
            let place = random.below(places);
            words[place] = match random.below(5) {
                0 => random.next() as u32,
                1 => words[random.below(words.len())],
                2 => words[place].wrapping_add(random.below(3) as u32).wrapping_sub(1),
                3 => random.choice(&[&0, &1, &u32::MAX, &0x7f80_0000, &0x7fc0_0000]).to_owned(),
                _ => words[place] ^ 1 << random.below(32),
            };
        }
        if random.below(8) == 0 {
            words.truncate(random.below(words.len()));
        }
        let Ok(image) = Image::new(&words) else { continue };
        accepted += 1;
        let logp: Vec<f32> = (0..33)
            .map(|place| match place {
                0 => f32::NAN,
                1 => f32::NEG_INFINITY,
                2 => -0.0,
                _ => f32::from_bits(random.next() as u32 | 1 << 31),
            })
            .collect();
        // The vectorised lookup reads without checks; the scalar one would panic.
        let (mut lower, mut upper) = (vec![0.0; 33], vec![0.0; 33]);
        table_log_bounds(image, &logp, &mut lower, &mut upper).unwrap();
        for (place, &logp) in logp.iter().enumerate() {
            let y = Image::y(logp);
            let expected = [f64::from(image.log_upper(y)), f64::from(image.lower(y)).ln()];
            for (found, expected) in [upper[place], lower[place]].into_iter().zip(expected) {
                // A damaged node may be NaN, which only the scalar lookup passes on.
                let same = found == expected || expected.is_nan();
                assert!(same, "logp {logp}: {found}, one at a time {expected}");
            }
        }
    }
    report("images", cases, accepted, start.elapsed());
    assert!(accepted > cases / 10, "too few images are accepted");
}
