//! Errors, each with the offending value and the allowed ones.

use std::path::Path;
use std::{fmt, io};

/// Result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An input that cannot be used. An error is returned before anything is written or changed.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A trust-region radius that is not a positive finite number.
    Delta {
        /// The value given.
        value: f64,
        /// Its position, where an array of radii was given.
        index: Option<usize>,
    },
    /// A divergence name that is not built in.
    UnknownDivergence {
        /// The name given.
        spec: String,
        /// The names of the built-in divergences.
        known: String,
    },
    /// A parameter of a divergence that is missing, unreadable or out of range.
    DivergenceParameter {
        /// The specification given, such as `vajda:0.5`.
        spec: String,
        /// The allowed values.
        allowed: &'static str,
    },
    /// An expression that cannot be read.
    Expression {
        /// The text given.
        text: String,
        /// Number of the character at which reading failed, from 1.
        column: usize,
        /// The reason of the failure.
        reason: String,
    },
    /// A spec of a region that cannot be read.
    Spec {
        /// The text given.
        text: String,
        /// Number of the character at which reading failed, from 1.
        column: usize,
        /// The reason of the failure.
        reason: String,
    },
    /// A function that is no generator of a divergence.
    Generator {
        /// The text given.
        text: String,
        /// The condition that it breaks, with place and size of the violation.
        reason: String,
    },
    /// An array whose length differs from that of another.
    Length {
        /// The argument that has the wrong length.
        argument: &'static str,
        /// Its length.
        actual: usize,
        /// The length it should have.
        expected: usize,
    },
    /// An argument whose value is not allowed.
    Argument {
        /// The argument.
        argument: &'static str,
        /// The value given.
        value: String,
        /// The allowed values.
        allowed: &'static str,
    },
    /// A table file whose content is not a table that this version wrote or can read.
    TableFile {
        /// The reason why it is refused.
        reason: String,
    },
    /// A file that could not be read or written.
    File {
        /// The path given.
        path: String,
        /// The attempted action: `read` or `write`.
        action: &'static str,
        /// The operating system's reason.
        reason: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delta { value, index: None } => {
                write!(out, "delta must be a finite number above 0, got {value}")
            }
            Self::Delta { value, index: Some(index) } => {
                write!(out, "delta must be a finite number above 0, got {value} at index {index}")
            }
            Self::UnknownDivergence { spec, known } => {
                let spec = excerpt(spec, 1);
                write!(out, "divergence {spec:?} is not known; known are: {known}")
            }
            Self::DivergenceParameter { spec, allowed } => {
                write!(out, "divergence {:?}: {allowed}", excerpt(spec, 1))
            }
            Self::Expression { text, column, reason } => {
                write!(out, "{}: {reason}", located("expression", text, *column))
            }
            Self::Spec { text, column, reason } => {
                write!(out, "{}: {reason}", located("region", text, *column))
            }
            Self::Generator { text, reason } => {
                write!(out, "expression {:?}: {reason}", excerpt(text, 1))
            }
            Self::Length { argument, actual, expected } => {
                write!(out, "{argument} has {actual} elements, expected {expected}")
            }
            Self::Argument { argument, value, allowed } => {
                write!(out, "{argument} must be {allowed}, got {value}")
            }
            Self::TableFile { reason } => write!(out, "not a usable bandpo table: {reason}"),
            Self::File { path, action, reason } => {
                write!(out, "cannot {action} {path}: {reason}")
            }
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// Refuses an array whose length differs from that of another.
    pub(crate) fn check_length(
        argument: &'static str,
        actual: usize,
        expected: usize,
    ) -> Result<()> {
        if actual == expected { Ok(()) } else { Err(Self::Length { argument, actual, expected }) }
    }

    /// A file that could not be read or written, with the operating system's message.
    pub(crate) fn file(path: &Path, action: &'static str, error: &io::Error) -> Self {
        let reason = match (error.raw_os_error(), error.kind()) {
            (Some(number), _) => error.to_string().replace(&format!(" (os error {number})"), ""),
            // Their own text would name a temporary file.
            (None, io::ErrorKind::NotFound) => "No such file or directory".to_owned(),
            (None, io::ErrorKind::PermissionDenied) => "Permission denied".to_owned(),
            (None, io::ErrorKind::IsADirectory) => "Is a directory".to_owned(),
            (None, io::ErrorKind::Other) => error.to_string(),
            (None, kind) => kind.to_string(),
        };
        Self::File { path: path.display().to_string(), action, reason }
    }
}

/// A place in a text for a message: line, if there are several, and column.
pub(crate) fn located(what: &str, text: &str, column: usize) -> String {
    let before: Vec<char> = text.chars().take(column.saturating_sub(1)).collect();
    let lines = before.iter().filter(|&&character| character == '\n').count();
    let in_line = before.iter().rev().take_while(|&&c| c != '\n').count() + 1;
    let line = if text.trim_end().contains('\n') {
        format!("line {}, ", lines + 1)
    } else {
        String::new()
    };
    format!("{what} {:?}, {line}column {in_line}", excerpt(text, column))
}

/// Max characters of a text in a message.
const MAX_SHOWN: usize = 60;

/// The part of a text around a character, counted from 1, that fits into a message.
pub(crate) fn excerpt(text: &str, column: usize) -> String {
    let length = text.chars().count();
    if length <= MAX_SHOWN {
        return text.to_owned();
    }
    let start = column.saturating_sub(1 + MAX_SHOWN / 2).min(length - MAX_SHOWN);
    let shown: String = text.chars().skip(start).take(MAX_SHOWN).collect();
    let before = if start > 0 { "\u{2026}" } else { "" };
    let after = if start + MAX_SHOWN < length { "\u{2026}" } else { "" };
    format!("{before}{shown}{after}")
}
