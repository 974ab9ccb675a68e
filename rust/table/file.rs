//! Table files: safetensors with one tensor of words, and metadata under a checksum.
//!
//! `docs/table-format.md` is the specification.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use super::verify::MaxError;
use super::write::write_near;
use super::{BandTable, Verification};
use crate::error::{Error, Result};
use crate::image::{ENTRIES, Image, NEAR};

pub(super) const FORMAT: &str = "bandpo-table";
pub(super) const VERSION: &str = "2";
/// The version before, whose images have zeros in place of the words from [`NEAR`] on.
pub(super) const VERSION_WITHOUT_NEAR: &str = "1";
pub(super) const TENSOR: &str = "words";

/// Max bytes of a file. An image has 32 KiB, and the rest is the description of its region.
const MAX_FILE_BYTES: u64 = 1 << 20;

impl BandTable {
    /// The bytes of the table's file. Equal tables give equal bytes.
    ///
    /// # Errors
    /// [`Error::TableFile`] if safetensors cannot serialize the table.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.to_bytes_of(VERSION)
    }

    /// The bytes of a file of a version of the format.
    pub(super) fn to_bytes_of(&self, version: &str) -> Result<Vec<u8>> {
        let data: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut metadata = self.metadata_of(version);
        let digest = checksum(&metadata, &data);
        metadata.push(("checksum", digest));
        let metadata: HashMap<String, String> =
            metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let view = TensorView::new(Dtype::U32, vec![self.words.len()], &data)
            .map_err(|error| Error::TableFile { reason: error.to_string() })?;
        canonical(
            &safetensors::serialize([(TENSOR, view)], Some(metadata))
                .map_err(|error| Error::TableFile { reason: error.to_string() })?,
        )
    }

    /// Everything but the words and the checksum, in the order in which the checksum covers it.
    #[must_use]
    pub fn metadata(&self) -> Vec<(&'static str, String)> {
        self.metadata_of(VERSION)
    }

    fn metadata_of(&self, version: &str) -> Vec<(&'static str, String)> {
        vec![
            ("format", FORMAT.to_owned()),
            ("format_version", version.to_owned()),
            ("region", self.region.clone()),
            ("grid", "cubic Hermite, octaves of float32 -log p".to_owned()),
            ("max_error_log_upper", format!("{:?}", self.max_error.log_upper)),
            ("max_error_lower", format!("{:?}", self.max_error.lower)),
            (
                "verification",
                match self.verification {
                    Verification::Sampled => "sampled",
                    Verification::Exhaustive => "exhaustive",
                }
                .to_owned(),
            ),
        ]
    }

    /// The table of a file's bytes. Only bytes that [`Self::to_bytes`] would write, or would have written in version 1
    /// of the format, are accepted.
    ///
    /// # Errors
    /// [`Error::TableFile`] with the reason.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let refuse = |reason: &str| Error::TableFile { reason: reason.to_owned() };
        let (_, header) = SafeTensors::read_metadata(bytes)
            .map_err(|error| refuse(&format!("not a whole safetensors file ({error})")))?;
        let metadata = header
            .metadata()
            .as_ref()
            .filter(|metadata| metadata.get("format").is_some_and(|format| format == FORMAT))
            .ok_or_else(|| refuse("a safetensors file, but not of a bandpo table"))?;
        let text =
            |key: &str| metadata.get(key).ok_or_else(|| refuse(&format!("metadata has no {key}")));
        let version = text("format_version")?;
        if version != VERSION && version != VERSION_WITHOUT_NEAR {
            return Err(refuse(&format!(
                "format version {version:?}, this version of bandpo reads {VERSION_WITHOUT_NEAR:?} and {VERSION:?}"
            )));
        }
        let tensors =
            SafeTensors::deserialize(bytes).map_err(|error| refuse(&error.to_string()))?;
        let tensor =
            tensors.tensor(TENSOR).map_err(|_| refuse(&format!("no tensor named {TENSOR:?}")))?;
        if tensor.dtype() != Dtype::U32 || tensor.shape().len() != 1 {
            return Err(refuse("its tensor is not one-dimensional U32"));
        }
        let number = |key: &str| {
            text(key)?
                .parse::<f64>()
                .map_err(|_| refuse(&format!("metadata {key} is not a number")))
        };
        let mut table = Self {
            words: tensor
                .data()
                .chunks_exact(4)
                .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                .collect(),
            region: text("region")?.clone(),
            max_error: MaxError {
                log_upper: number("max_error_log_upper")?,
                lower: number("max_error_lower")?,
            },
            verification: match text("verification")?.as_str() {
                "sampled" => Verification::Sampled,
                "exhaustive" => Verification::Exhaustive,
                _ => return Err(refuse("metadata verification is unknown")),
            },
        };
        if text("checksum")? != &checksum(&table.metadata_of(version), tensor.data()) {
            return Err(refuse("its checksum does not match: the file was altered"));
        }
        // The checksum does not cover padding, the order of keys, and white space.
        if table.to_bytes_of(version)? != bytes {
            return Err(refuse("it is not byte for byte as its version is written"));
        }
        Image::new(&table.words)?;
        if version == VERSION_WITHOUT_NEAR {
            if table.words[NEAR..ENTRIES].iter().any(|word| *word != 0) {
                return Err(refuse("its image has words that version 1 leaves 0"));
            }
            write_near(&mut table.words);
        }
        Ok(table)
    }

    /// Writes the table to a file atomically.
    ///
    /// ```
    /// use bandpo::band::Band;
    /// use bandpo::divergence::Divergence;
    /// use bandpo::table::BandTable;
    ///
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("kl.safetensors");
    ///
    /// let table = BandTable::of_band(&Band::new(Divergence::parse("kl")?, 0.05, 0.05)?)?;
    /// table.save(&path)?;
    /// assert_eq!(BandTable::load(&path)?, table);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes = self.to_bytes()?;
        let fail = |error: std::io::Error| Error::file(path, "write", &error);
        // A link stays, and its target is replaced. A device or a pipe is refused, otherwise a file would
        // replace it.
        let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if target.is_dir() {
            return Err(fail(std::io::ErrorKind::IsADirectory.into()));
        }
        if target.exists() && !target.is_file() {
            return Err(fail(std::io::Error::other("it is not a regular file")));
        }
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".bandpo-table-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // The permissions of any new file: tempfile's default is readable by its owner alone.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let mut file = builder.tempfile_in(folder).map_err(fail)?;
        file.write_all(&bytes).map_err(fail)?;
        file.as_file().sync_all().map_err(fail)?;
        file.persist(&target).map_err(|error| fail(error.error))?;
        Ok(())
    }

    /// Reads a table that [`Self::save`] wrote.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read, is no regular file or has more than 1 MiB, [`Error::TableFile`] if
    /// it holds no valid table.
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_bytes(&read(path).map_err(|error| Error::file(path, "read", &error))?).map_err(
            |error| match error {
                Error::TableFile { reason } => {
                    Error::TableFile { reason: format!("{}: {reason}", path.display()) }
                }
                other => other,
            },
        )
    }
}

/// The bytes of a regular file that may hold a table. A pipe would wait, and a device might never end.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let refuse = |reason: &str| std::io::Error::other(reason.to_owned());
    // Before it is opened, because opening a pipe waits for its writer.
    if !std::fs::metadata(path)?.is_file() {
        return Err(if path.is_dir() {
            std::io::ErrorKind::IsADirectory.into()
        } else {
            refuse("it is not a regular file")
        });
    }
    let mut bytes = Vec::new();
    // One byte more than allowed, because a file may grow after its size was read.
    std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(refuse("it has more than 1 MiB, and is no table"));
    }
    Ok(bytes)
}

/// SHA-256 over the metadata, each text after its length, and the words.
fn checksum(metadata: &[(&'static str, String)], data: &[u8]) -> String {
    let mut digest = Sha256::new();
    for (key, value) in metadata {
        for text in [*key, value.as_str()] {
            digest.update((text.len() as u64).to_le_bytes());
            digest.update(text.as_bytes());
        }
    }
    digest.update(data);
    digest.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // never fails on a String
        text
    })
}

/// The same safetensors bytes with sorted keys in the header. The serializer writes the metadata in the order
/// of a hash map, which differs from run to run.
fn canonical(bytes: &[u8]) -> Result<Vec<u8>> {
    let refuse = |error: serde_json::Error| Error::TableFile { reason: error.to_string() };
    let (header_len, _) = SafeTensors::read_metadata(bytes)
        .map_err(|error| Error::TableFile { reason: error.to_string() })?;
    // The map of serde_json is sorted by key.
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&bytes[8..8 + header_len]).map_err(refuse)?;
    let mut text = serde_json::to_vec(&header).map_err(refuse)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut out = Vec::with_capacity(8 + text.len() + bytes.len());
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
    out.extend(&bytes[8 + header_len..]);
    Ok(out)
}
