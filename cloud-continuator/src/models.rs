//! Models by name: a path, or a file of a Hugging Face repository, which is fetched once.

use std::{
    fs::File,
    io::{IsTerminal, Read},
    path::{Path, PathBuf},
};

use hf_hub::{
    Cache, Repo,
    api::{
        Progress,
        sync::{ApiBuilder, ApiError},
    },
};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// What names of Hugging Face files begin with.
const HUB: &str = "hf:";

/// Why there is no file for a name.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The name.
    #[error("{0:?} names no file of the hub; write it like hf:OWNER/REPO/FILE.gguf")]
    Name(String),
    /// The download.
    #[error(
        "{0} cannot be fetched: {1}; check the name and the network (HF_ENDPOINT for a mirror, HF_TOKEN for gated models), or name a local GGUF file"
    )]
    Download(String, String),
    /// What came is not what the hub announced.
    #[error("{0} arrived damaged: its SHA-256 is {1}, but the hub says {2}; it was deleted, so try again")]
    Damaged(String, String, String),
}

/// The local file for `name`; fetches it if it is a hub's and not in the cache (`HF_HOME`). Blocks.
///
/// # Errors
/// [`ModelError`]
pub fn resolve(name: &str) -> Result<PathBuf, ModelError> {
    let Some(rest) = name.strip_prefix(HUB) else {
        return Ok(name.into());
    };
    let (repo, file) = split(rest).ok_or_else(|| ModelError::Name(name.to_owned()))?;
    let cache = Cache::from_env();
    let path = match cache.repo(Repo::model(repo.to_owned())).get(file) {
        Some(path) => path,
        None => fetch(&cache, name, repo, file)?,
    };
    verify(name, &path)?;
    Ok(path)
}

fn split(rest: &str) -> Option<(&str, &str)> {
    let slash = rest.match_indices('/').nth(1)?.0;
    let (repo, file) = (&rest[..slash], &rest[slash + 1..]);
    let (owner, name) = repo.split_once('/')?;
    let parts = [owner, name].into_iter().chain(file.split('/'));
    // A name must not lead out of the cache.
    let sound = |part: &str| !part.is_empty() && part != ".." && part != "." && !part.contains('\\');
    parts.into_iter().all(sound).then_some((repo, file))
}

fn fetch(cache: &Cache, name: &str, repo: &str, file: &str) -> Result<PathBuf, ModelError> {
    let failed = |e: ApiError| ModelError::Download(name.to_owned(), e.to_string());
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
    let api = ApiBuilder::from_env()
        .with_token(token.or_else(|| cache.token()))
        .with_retries(3)
        .build()
        .map_err(failed)?;
    let repo = api.model(repo.to_owned());
    tracing::info!(model = name, "fetching the model");
    let path = if std::io::stderr().is_terminal() {
        repo.download(file)
    } else {
        repo.download_with_progress(file, Logged::default())
    };
    path.map_err(failed)
}

/// Compares a file with the hash that the hub keeps it under (the name of the blob that the cache's link leads to), once: a mark beside
/// the blob says that it was done.
fn verify(name: &str, path: &Path) -> Result<(), ModelError> {
    let failed = |e: std::io::Error| ModelError::Download(name.to_owned(), e.to_string());
    let blob = std::fs::canonicalize(path).map_err(failed)?;
    let wanted = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if wanted.len() != 64 || !wanted.chars().all(|c| c.is_ascii_hexdigit()) {
        // Small files have git's hash; a model of that size is none.
        tracing::warn!(
            model = name,
            "the hub keeps no SHA-256 of this file: it was not checked"
        );
        return Ok(());
    }
    let mark = blob.with_file_name(format!("{wanted}.verified"));
    if mark.exists() {
        return Ok(());
    }
    let found = sha256(&blob).map_err(failed)?;
    if found == wanted.to_lowercase() {
        tracing::info!(model = name, sha256 = found, "the model is as the hub has it");
        // Without it the model is read once more the next time, which does no harm.
        let _ = File::create(mark);
        return Ok(());
    }
    let _ = std::fs::remove_file(path);
    let _ = std::fs::remove_file(&blob);
    Err(ModelError::Damaged(name.to_owned(), found, wanted))
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// Progress for logs: a line for every tenth.
#[derive(Default)]
struct Logged {
    size: usize,
    done: usize,
    tenths: usize,
}

impl Progress for Logged {
    fn init(&mut self, size: usize, _: &str) {
        *self = Self {
            size: size.max(1),
            ..Self::default()
        };
    }

    fn update(&mut self, bytes: usize) {
        self.done += bytes;
        let tenths = self.done * 10 / self.size;
        if tenths > self.tenths {
            self.tenths = tenths;
            tracing::info!(percent = tenths * 10, of_mb = self.size / 1_000_000, "fetching");
        }
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(resolve("a/b.gguf").unwrap(), PathBuf::from("a/b.gguf"));
        assert_eq!(split("o/r/f.gguf"), Some(("o/r", "f.gguf")));
        assert_eq!(split("o/r/sub/f.gguf"), Some(("o/r", "sub/f.gguf")));
        for bad in [
            "hf:",
            "hf:o/r",
            "hf:o/r/",
            "hf:/r/f",
            "hf:o//f",
            "hf:o/../f",
            "hf:o/r/../../f",
        ] {
            assert!(matches!(resolve(bad), Err(ModelError::Name(_))), "{bad}");
        }
    }
}
