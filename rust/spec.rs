//! Grammar of region specs such as `kl@0.01 | clip@0.2,0.28`, and the syntax tree it gives.
//!
//! ```text
//! union        = intersection ("|" intersection)*
//! intersection = chain ("&" chain)*
//! chain        = (sides | "(" union ")" | leaf) ("." name "(" number ("," number)? ")")*
//! sides        = "sides" "(" union "," union ")"
//! leaf         = ("price:"? quoted expression | word) ("@" number (("/" | ",") number)?)?
//! ```
//!
//! `&` binds tighter than `|`, as in Python. A word is a name with an optional parameter: `dapo`,
//! `alpha:0.5`, `preset:dapo`, `price:kl`. The meaning of words and methods is in `python/bandpo/spec.py`.

use pest::Parser as _;
use pest::error::InputLocation;
use pest::iterators::Pair;
use serde_json::{Value, json};

use crate::error::{Error, Result, located};

/// Max bytes of a spec.
const MAX_BYTES: usize = 4096;
/// Max nesting of parentheses, because the parser is recursive.
const MAX_NESTED: usize = 32;
/// Max leaves and methods, each of which is a region, because functions of the result are recursive.
const MAX_REGIONS: usize = 64;

#[derive(pest_derive::Parser)]
#[grammar_inline = r#"
WHITESPACE = _{ " " | "\t" | "\r" | "\n" | "\u{0B}" | "\u{0C}" }
whole = _{ SOI ~ union ~ EOI }
union = { intersection ~ ("|" ~ intersection)* }
intersection = { chain ~ ("&" ~ chain)* }
chain = { (sides | "(" ~ union ~ ")" | leaf) ~ method* }
sides = { "sides" ~ "(" ~ union ~ "," ~ union ~ ")" }
method = { "." ~ name ~ "(" ~ number ~ ("," ~ number)? ~ ")" }
leaf = { (price? ~ quoted | word) ~ ("@" ~ number ~ (separator ~ number)?)? }
price = { "price:" }
separator = { "/" | "," }
quoted = @{ "\"" ~ (!"\"" ~ ANY)* ~ "\"" | "'" ~ (!"'" ~ ANY)* ~ "'" }
word = @{ name ~ (":" ~ (!stop ~ ANY)+)? }
stop = _{ WHITESPACE | "@" | "|" | "&" | "(" | ")" | "," | "/" | "\"" | "'" | "." ~ ASCII_ALPHA }
name = @{ ASCII_ALPHA ~ (ASCII_ALPHANUMERIC | "-" | "_")* }
number = @{ ("+" | "-")? ~ (decimal | (^"inf" | ^"nan") ~ !ASCII_ALPHANUMERIC) }
decimal = _{ (ASCII_DIGIT+ ~ ("." ~ !ASCII_ALPHA ~ ASCII_DIGIT*)? | "." ~ ASCII_DIGIT+) ~ exponent? }
exponent = _{ ^"e" ~ ("+" | "-")? ~ ASCII_DIGIT+ }
"#]
struct Grammar;

/// The syntax tree of a spec as JSON.
///
/// A node is one of
/// - `{"union": [node, node]}`, or `intersection` or `sides` in place of `union`;
/// - `{"method": name, "of": node, "numbers": [text, ...], "place": text}`;
/// - `{"leaf": word, "quoted": bool, "separator": text or null, "numbers": ..., "place": text}`, with
///   the expression in place of the word if it was quoted, and `"price": true` if `price:` stood before it.
///
/// A `place` opens the message of an error at that node.
///
/// # Errors
/// [`Error::Spec`] with the column, if the text cannot be read, is longer than 4 KiB, nests more than 32
/// parentheses or has more than 64 regions.
pub fn parse(text: &str) -> Result<String> {
    let refuse = |place: usize, reason: String| Error::Spec {
        text: text.to_owned(),
        column: column_of(text, place),
        reason,
    };
    if text.len() > MAX_BYTES {
        let place = (0..=MAX_BYTES).rev().find(|&place| text.is_char_boundary(place)).unwrap_or(0);
        return Err(refuse(place, format!("longer than {MAX_BYTES} bytes")));
    }
    let unclosed = last_unclosed(text).map_err(|(place, reason)| refuse(place, reason))?;
    let mut pairs = Grammar::parse(Rule::whole, text).map_err(|error| {
        let (InputLocation::Pos(place) | InputLocation::Span((place, _))) = error.location;
        let rest = text[place..].trim_start();
        let place = text.len() - rest.len();
        let unclosed = unclosed.map(|place| column_of(text, place));
        refuse(place, unreadable(&text[..place], rest, unclosed))
    })?;
    let Some(union) = pairs.next() else {
        return Err(refuse(0, "empty".to_owned()));
    };
    let mut builder = Builder { text, regions: 0 };
    Ok(builder.node(union)?.to_string())
}

/// Number of the character at a byte, from 1.
fn column_of(text: &str, place: usize) -> usize {
    text[..place].chars().count() + 1
}

/// The last parenthesis that is never closed. The error is a quotation that is never closed, or the
/// first parenthesis beyond the depth that is read.
fn last_unclosed(text: &str) -> std::result::Result<Option<usize>, (usize, String)> {
    let mut open = Vec::new();
    let mut quote = None;
    for (place, character) in text.char_indices() {
        if let Some((_, mark)) = quote {
            quote = quote.filter(|_| character != mark);
            continue;
        }
        match character {
            '"' | '\'' => quote = Some((place, character)),
            '(' => open.push(place),
            ')' => drop(open.pop()),
            _ => {}
        }
        if open.len() > MAX_NESTED {
            return Err((place, format!("more than {MAX_NESTED} parentheses inside each other")));
        }
    }
    match quote {
        Some((place, mark)) => Err((place, format!("this {mark} is not closed"))),
        None => Ok(open.last().copied()),
    }
}

/// The reason why reading stopped between `before` and `rest`; `unclosed` is the column of the last
/// parenthesis that is never closed.
fn unreadable(before: &str, rest: &str, unclosed: Option<usize>) -> String {
    let before = before.trim_end();
    let after_region = before.ends_with(|c: char| c.is_ascii_alphanumeric() || ".)\"'".contains(c));
    let Some(found) = rest.chars().next() else {
        return match (before.chars().next_back(), unclosed) {
            (None, _) => "empty; write a region, as in kl@0.05".to_owned(),
            (Some('@' | '/'), _) => "a number is missing at the end".to_owned(),
            (_, Some(column)) if after_region => format!("the ( at column {column} is not closed"),
            _ => "a region is missing at the end".to_owned(),
        };
    };
    if before.ends_with(['@', '/']) {
        return format!("a number is missing before {found:?}");
    }
    if !after_region {
        let inside_method = before.ends_with([',', '(']) && before.contains('.');
        let missing = if inside_method { "a region or number" } else { "a region" };
        return format!("{missing} is missing before {found:?}");
    }
    match found {
        ')' if before.matches('(').count() <= before.matches(')').count() => {
            "there is no ( for this )".to_owned()
        }
        ')' => "sides takes two regions, as in sides(clip@0.2, kl@0.05)".to_owned(),
        ',' => "a comma may only stand between two widths or inside sides(...)".to_owned(),
        '(' => "only sides, .cap and .at_least take parentheses".to_owned(),
        '.' => "only cap(10) or at_least(0.1) may follow a point".to_owned(),
        '@' => "a region takes only one @".to_owned(),
        _ if rest.starts_with("cap") || rest.starts_with("at_least") => {
            "a point is missing, as in (kl@0.05).cap(10)".to_owned()
        }
        _ => format!("| (either region) or & (both regions) is missing before {found:?}"),
    }
}

/// Builder of nodes from pairs of the grammar.
struct Builder<'a> {
    text: &'a str,
    regions: usize,
}

impl Builder<'_> {
    /// The node of any pair but a method.
    fn node(&mut self, pair: Pair<'_, Rule>) -> Result<Value> {
        let rule = pair.as_rule();
        match rule {
            Rule::leaf => self.leaf(pair),
            Rule::sides => {
                let parts: Vec<Value> =
                    pair.into_inner().map(|part| self.node(part)).collect::<Result<_>>()?;
                Ok(json!({ "sides": parts }))
            }
            _ => {
                let mut parts = pair.into_inner();
                let mut left = match parts.next() {
                    Some(first) => self.node(first)?,
                    None => Value::Null, // the grammar has no empty pair
                };
                for part in parts {
                    left = match rule {
                        Rule::union => json!({ "union": [left, self.node(part)?] }),
                        Rule::intersection => json!({ "intersection": [left, self.node(part)?] }),
                        _ => {
                            let mut method = self.method(part)?;
                            method["of"] = left;
                            method
                        }
                    };
                }
                Ok(left)
            }
        }
    }

    /// The node of a leaf.
    fn leaf(&mut self, pair: Pair<'_, Rule>) -> Result<Value> {
        let place = self.place(&pair)?;
        let (mut leaf, mut quoted, mut separator, mut numbers) = ("", false, None, Vec::new());
        let mut price = false;
        for part in pair.into_inner() {
            let text = part.as_str();
            match part.as_rule() {
                Rule::quoted => (leaf, quoted) = (&text[1..text.len() - 1], true),
                Rule::word => leaf = text,
                Rule::price => price = true,
                Rule::separator => separator = Some(text),
                _ => numbers.push(text),
            }
        }
        Ok(json!({
            "leaf": leaf, "quoted": quoted, "price": price, "separator": separator, "numbers": numbers,
            "place": place,
        }))
    }

    /// The node of a method, without the region that it is called on.
    fn method(&mut self, pair: Pair<'_, Rule>) -> Result<Value> {
        let place = self.place(&pair)?;
        let mut parts = pair.into_inner().map(|part| part.as_str());
        let name = parts.next();
        let numbers: Vec<&str> = parts.collect();
        Ok(json!({ "method": name, "numbers": numbers, "place": place }))
    }

    /// Start of an error message at a leaf or method, which is counted as a region.
    fn place(&mut self, pair: &Pair<'_, Rule>) -> Result<String> {
        let column = column_of(self.text, pair.as_span().start());
        self.regions += 1;
        if self.regions > MAX_REGIONS {
            let reason =
                format!("more than {MAX_REGIONS} regions, each .cap and .at_least counted");
            return Err(Error::Spec { text: self.text.to_owned(), column, reason });
        }
        Ok(located("region", self.text, column))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tree(text: &str) -> Value {
        serde_json::from_str(&parse(text).unwrap()).unwrap()
    }

    /// The tree in brackets, without places.
    fn shown(node: &Value) -> String {
        for (kind, sign) in [("union", "|"), ("intersection", "&"), ("sides", ",")] {
            if let Some(parts) = node[kind].as_array() {
                return format!("[{} {sign} {}]", shown(&parts[0]), shown(&parts[1]));
            }
        }
        let numbers: Vec<&str> =
            node["numbers"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
        if let Some(name) = node["method"].as_str() {
            return format!("[{} {name} {}]", shown(&node["of"]), numbers.join(","));
        }
        let leaf = node["leaf"].as_str().unwrap();
        format!("{leaf} {}", numbers.join(node["separator"].as_str().unwrap_or(" ")))
            .trim()
            .to_owned()
    }

    #[test]
    fn trees_follow_precedence() {
        for (text, expected) in [
            ("dapo", "dapo"),
            ("preset:dppo-kl", "preset:dppo-kl"),
            ("kl@0.01/0.1", "kl 0.01/0.1"),
            (" clip @ 0.2 , .28 ", "clip 0.2,.28"),
            ("alpha:-0.5@1e-3", "alpha:-0.5 1e-3"),
            ("price:kl@0.1/0.2", "price:kl 0.1/0.2"),
            ("price:'-ln(u)+u-1'@1", "-ln(u)+u-1 1"),
            ("a|b&c|d", "[[a | [b & c]] | d]"),
            ("(a|b)&c", "[[a | b] & c]"),
            ("kl@0.05.cap(10)", "[kl 0.05 cap 10]"),
            ("a|kl@1.cap(10).at_least(0.1,inf)", "[a | [[kl 1 cap 10] at_least 0.1,inf]]"),
            ("sides(clip@0.2,kl@0.01)", "[clip 0.2 , kl 0.01]"),
            ("sides(clip@0.2,0.3,kl@-1)", "[clip 0.2,0.3 , kl -1]"),
            ("\"u*ln(u) - u + 1\"@0.01", "u*ln(u) - u + 1 0.01"),
            ("'max(u-1, 0)|\"'@nan & sides", "[max(u-1, 0)|\" nan & sides]"),
        ] {
            assert_eq!(shown(&tree(text)), expected, "{text}");
        }
    }

    #[test]
    fn errors_have_the_column_and_the_reason() {
        for (text, expected) in [
            ("", "column 1: empty"),
            ("  ", "column 3: empty"),
            ("kl@", "column 4: a number is missing at the end"),
            ("kl@x", "column 4: a number is missing before 'x'"),
            ("kl@0.1/", "column 8: a number is missing at the end"),
            ("kl@0.1|", "column 8: a region is missing at the end"),
            ("|kl@0.1", "column 1: a region is missing before '|'"),
            ("(kl@0.1", "column 8: the ( at column 1 is not closed"),
            ("kl@0.1)", "column 7: there is no ( for this )"),
            ("(kl@0.1))", "column 9: there is no ( for this )"),
            ("sides(kl@0.1)", "column 13: sides takes two regions"),
            ("kl@0.05 cap 10", "column 9: a point is missing, as in (kl@0.05).cap(10)"),
            ("kl@0.05 clip@0.2", "column 9: | (either region) or & (both regions) is missing"),
            ("clip(0.2)", "column 5: only sides, .cap and .at_least take parentheses"),
            ("a\u{e9}|'u", "column 4: this ' is not closed"),
            ("ab,cd", "column 3: a comma may only stand between"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{text:?}: {message}");
        }
    }

    #[test]
    fn size_and_depth_are_limited() {
        let nested = |depth| "(".repeat(depth) + "a" + &")".repeat(depth);
        assert!(parse(&nested(MAX_NESTED)).is_ok());
        let message = parse(&nested(MAX_NESTED + 1)).unwrap_err().to_string();
        assert!(message.contains("column 33: more than 32 parentheses"), "{message}");
        assert!(parse(&vec!["a"; MAX_REGIONS].join("|")).is_ok());
        assert!(parse(&vec!["a"; MAX_REGIONS + 1].join("|")).is_err());
        assert!(parse(&("a".to_owned() + &".cap(2)".repeat(MAX_REGIONS))).is_err());
        assert!(parse(&" ".repeat(MAX_BYTES + 1)).unwrap_err().to_string().contains("longer than"));
        assert!(parse(&"\u{e9}".repeat(MAX_BYTES)).is_err());
    }

    proptest! {
        #[test]
        fn any_text_gives_a_tree_or_an_error_without_panic(
            text in prop_oneof![
                any::<String>(),
                "[a-c0-9.,:@/|&()'\" -]{0,60}",
                "(kl@0[.]1|sides[(]|[(|)&,]|[.]cap[(]2[)]|'u'){0,30}",
            ]
        ) {
            drop(parse(&text));
        }
    }
}
