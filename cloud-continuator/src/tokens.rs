//! Tokens of edges: what `cloud-continuator token` writes, and what is checked when an edge calls.
//!
//! A token is `segue_ID_SECRET` with 256 random bits in the secret. The file holds the SHA-256 of the whole token; a slow hash would protect
//! guessable passwords, and there is nothing to guess here.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::{MetadataExt, OpenOptionsExt, fchown},
    path::Path,
    time::{Duration, SystemTime},
};

use rand::{TryRngCore, rngs::OsRng};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use thiserror::Error;

const HEAD: &str = "# Tokens of edges, made by `cloud-continuator token`. Their secrets are not in here, only the SHA-256 of each.\n\n";
/// Random bytes of an id and of a secret.
const BYTES: (usize, usize) = (4, 32);

/// The file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    /// The tokens, oldest first.
    #[serde(default)]
    pub token: Vec<Entry>,
}

/// One token.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its name in logs.
    pub id: String,
    /// The device that may use it.
    pub device: String,
    /// SHA-256 of the token, hexadecimal.
    pub sha256: String,
    /// When it was made.
    #[serde(with = "humantime_serde")]
    pub created: SystemTime,
    /// When it ends to be valid.
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub expires: Option<SystemTime>,
    /// When it was revoked.
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub revoked: Option<SystemTime>,
}

/// Why a file of tokens cannot be used or changed.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be read or written.
    #[error("the tokens {0}: {1}")]
    Io(String, std::io::Error),
    /// It is no file of tokens.
    #[error("the tokens {0}: {1}")]
    Syntax(String, String),
    /// There is no token with that id.
    #[error("there is no token {0}; `cloud-continuator token list` shows them")]
    Unknown(String),
    /// That is no name for a device.
    #[error("{0:?} is no name for a device: it must have 1 to 128 printable characters without spaces")]
    Device(String),
}

/// Why a caller is not let in. The texts say nothing that helps to guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum Denied {
    /// No token came.
    #[error("a token is required: send `authorization: Bearer TOKEN` (edge-agent --token-file)")]
    Missing,
    /// The token is none of ours.
    #[error("the token is not known here")]
    Unknown,
    /// The token is too old.
    #[error("the token has expired; ask for a new one")]
    Expired,
    /// The token was revoked.
    #[error("the token was revoked; ask for a new one")]
    Revoked,
}

/// A token that was accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct Grant {
    /// The token's id.
    pub id: String,
    /// The device that may use it.
    pub device: String,
    /// When it ends to be valid.
    pub expires: Option<SystemTime>,
}

impl Tokens {
    /// Reads a file.
    ///
    /// # Errors
    /// [`FileError::Io`] or [`FileError::Syntax`].
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| FileError::Io(name.clone(), e))?;
        let tokens: Self = toml::from_str(&text).map_err(|e| FileError::Syntax(name.clone(), e.to_string()))?;
        match tokens.token.iter().find(|entry| hash_of(entry).is_none()) {
            Some(entry) => Err(FileError::Syntax(name, format!("token {} has no SHA-256", entry.id))),
            None => Ok(tokens),
        }
    }

    /// Changes a file (which need not exist yet), one process at a time and whole or not at all.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn change<T>(path: &Path, change: impl FnOnce(&mut Self) -> Result<T, FileError>) -> Result<T, FileError> {
        let io = |e| FileError::Io(path.display().to_string(), e);
        // Behind a link stands the file that is changed.
        let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        // The folder stands for the file, which is another one after each change.
        let folder = File::open(folder.unwrap_or(Path::new("."))).map_err(io)?;
        folder.lock().map_err(io)?;
        let mut tokens = if path.exists() {
            Self::read(path)?
        } else {
            Self::default()
        };
        let result = change(&mut tokens)?;
        let text =
            toml::to_string(&tokens).map_err(|e| FileError::Syntax(path.display().to_string(), e.to_string()))?;
        let mut new = path.file_name().unwrap_or_default().to_owned();
        new.push(".new");
        let new = path.with_file_name(new);
        let written = replace(path, &new, &format!("{HEAD}{text}"));
        if written.is_err() {
            let _ = std::fs::remove_file(&new);
        }
        written.map_err(io)?;
        // If this fails, the change is there all the same, unless the power fails too.
        let _ = folder.sync_all();
        Ok(result)
    }

    /// Makes a token for `device`; it is shown this once.
    ///
    /// # Errors
    /// [`FileError::Device`]
    pub fn issue(&mut self, device: &str, now: SystemTime, valid: Option<Duration>) -> Result<String, FileError> {
        let printable = device.chars().all(|c| !c.is_whitespace() && !c.is_control());
        if device.is_empty() || device.len() > 128 || !printable {
            return Err(FileError::Device(device.to_owned()));
        }
        let id = loop {
            let id = random(BYTES.0);
            if self.token.iter().all(|entry| entry.id != id) {
                break id;
            }
        };
        let token = format!("segue_{id}_{}", random(BYTES.1));
        self.token.push(Entry {
            id,
            device: device.to_owned(),
            sha256: hex(&Sha256::digest(&token)),
            created: whole_seconds(now),
            expires: valid.map(|valid| whole_seconds(now + valid)),
            revoked: None,
        });
        Ok(token)
    }

    /// Revokes a token; a second time changes nothing.
    ///
    /// # Errors
    /// [`FileError::Unknown`]
    pub fn revoke(&mut self, id: &str, now: SystemTime) -> Result<(), FileError> {
        let entry = self.token.iter_mut().find(|entry| entry.id == id);
        let entry = entry.ok_or_else(|| FileError::Unknown(id.to_owned()))?;
        entry.revoked.get_or_insert(whole_seconds(now));
        Ok(())
    }

    /// Checks what a caller sent. Takes as long for a wrong secret as for the right one.
    ///
    /// # Errors
    /// [`Denied`]
    pub fn check(&self, token: &str, now: SystemTime) -> Result<Grant, Denied> {
        let hash = Sha256::digest(token);
        let mut found = None;
        for entry in &self.token {
            let same = hash_of(entry).is_some_and(|known| bool::from(known[..].ct_eq(&hash[..])));
            if same {
                found = Some(entry);
            }
        }
        let entry = found.ok_or(Denied::Unknown)?;
        entry.valid(now)?;
        Ok(Grant {
            id: entry.id.clone(),
            device: entry.device.clone(),
            expires: entry.expires,
        })
    }

    /// Whether a token that was accepted before still is.
    ///
    /// # Errors
    /// [`Denied`]
    pub fn recheck(&self, grant: &Grant, now: SystemTime) -> Result<(), Denied> {
        let entry = self.token.iter().find(|entry| entry.id == grant.id);
        entry
            .filter(|entry| entry.device == grant.device)
            .ok_or(Denied::Unknown)?
            .valid(now)
    }
}

impl Entry {
    /// Its state, for people.
    pub fn state(&self, now: SystemTime) -> String {
        let at = |time| humantime::format_rfc3339_seconds(time);
        match (self.valid(now), self.revoked, self.expires) {
            (_, Some(revoked), _) => format!("revoked {}", at(revoked)),
            (Err(_), _, Some(expires)) => format!("expired {}", at(expires)),
            (_, _, Some(expires)) => format!("valid until {}", at(expires)),
            (_, _, None) => "valid".into(),
        }
    }

    fn valid(&self, now: SystemTime) -> Result<(), Denied> {
        if self.revoked.is_some() {
            return Err(Denied::Revoked);
        }
        match self.expires {
            Some(expires) if expires <= now => Err(Denied::Expired),
            _ => Ok(()),
        }
    }
}

/// Writes `text` to `new` and puts it in `path`'s place.
fn replace(path: &Path, new: &Path, text: &str) -> std::io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(new)?;
    // Whoever could read the old one must be able to read this: a server that cannot would go on with what it knows.
    if let Ok(old) = std::fs::metadata(path) {
        let made = file.metadata()?;
        if (old.uid(), old.gid()) != (made.uid(), made.gid()) {
            fchown(&file, Some(old.uid()), Some(old.gid()))?;
        }
        file.set_permissions(old.permissions())?;
    }
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(new, path)
}

fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

fn random(bytes: usize) -> String {
    let mut buffer = vec![0; bytes];
    OsRng
        .try_fill_bytes(&mut buffer)
        .expect("the system has random numbers");
    hex(&buffer)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hash_of(entry: &Entry) -> Option<[u8; 32]> {
    let text = entry.sha256.as_bytes();
    if text.len() != 64 {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, pair) in hash.iter_mut().zip(text.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_token_opens_until_it_is_revoked_or_too_old() {
        let (mut tokens, now) = (Tokens::default(), SystemTime::now());
        let token = tokens.issue("kitchen", now, Some(HOUR)).unwrap();
        let grant = tokens.check(&token, now).unwrap();
        assert_eq!(grant.device, "kitchen");
        for wrong in [
            "",
            "segue",
            &token[1..],
            &token[..token.len() - 1],
            &token.replace('_', "-"),
            &format!("{token} "),
        ] {
            assert_eq!(tokens.check(wrong, now), Err(Denied::Unknown), "{wrong}");
        }
        assert_eq!(tokens.check(&token, now + 2 * HOUR), Err(Denied::Expired));
        assert_eq!(tokens.recheck(&grant, now + 2 * HOUR), Err(Denied::Expired));
        tokens.revoke(&grant.id, now).unwrap();
        assert_eq!(tokens.check(&token, now), Err(Denied::Revoked));
        assert_eq!(tokens.recheck(&grant, now), Err(Denied::Revoked));
        assert!(matches!(tokens.revoke("none", now), Err(FileError::Unknown(_))));
    }

    #[test]
    fn the_file_keeps_no_secret_and_comes_back_the_same() {
        let path = std::env::temp_dir().join(format!("segue-tokens-{}.toml", std::process::id()));
        let now = SystemTime::now();
        let token = Tokens::change(&path, |tokens| tokens.issue("küche", now, None)).unwrap();
        Tokens::change(&path, |tokens| tokens.issue("hall", now, Some(HOUR))).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains(token.rsplit('_').next().unwrap()), "{text}");
        let tokens = Tokens::read(&path).unwrap();
        assert_eq!(tokens.token.len(), 2);
        assert_eq!(tokens.check(&token, now).unwrap().device, "küche");
        for device in ["", "two words", "line\nbreak", &"x".repeat(129)] {
            let bad = Tokens::change(&path, |tokens| tokens.issue(device, now, None));
            assert!(matches!(bad, Err(FileError::Device(_))), "{device}");
        }
        assert_eq!(Tokens::read(&path).unwrap(), tokens);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_broken_file_is_refused() {
        let path = std::env::temp_dir().join(format!("segue-bad-tokens-{}.toml", std::process::id()));
        let entry = "[[token]]\nid = 'a'\ndevice = 'b'\ncreated = '2026-01-01T00:00:00Z'\n";
        for text in [
            "nonsense",
            "[[token]]\nid = 'a'\n",
            &format!("{entry}sha256 = 'abc'\n"),
            &format!("{entry}sha256 = '{}'\n", "ü".repeat(32)),
        ] {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(Tokens::read(&path), Err(FileError::Syntax(..))), "{text}");
        }
        std::fs::remove_file(path).unwrap();
    }
}
