//! Signatures on commits, and whose are demanded.
//!
//! Keys and signatures are those of `minisign` (ed25519): what is signed is the
//! encoding of a commit, which is the file of its name below `commits`.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{self, Cursor},
    path::PathBuf,
};

use minisign::{KeyPair, PublicKey, SecretKeyBox, SignatureBox};
use serde::{Deserialize, Serialize};

use super::{CommitId, Repository, ids, lock::Lock};
use crate::{Error, fsio};

/// Largest signature that is kept, in bytes: it is four lines.
const SIGNATURE_MAX_BYTES: usize = 4 << 10;
/// Most signatures of one commit that are taken from elsewhere.
pub(crate) const SIGNATURES_MAX: usize = 16;
const POLICY: &str = "policy.json";

/// Signatures of commits, as texts.
pub type Signatures = BTreeMap<CommitId, Vec<String>>;

/// A key that signatures are verified with.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VerifyingKey(PublicKey);

impl VerifyingKey {
    /// Reads a key: the file that `minisign -G` writes, or its last line alone.
    ///
    /// # Errors
    /// It is no such key.
    pub fn read(text: &str) -> Result<Self, Error> {
        let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
        let key = PublicKey::from_base64(line.trim());
        key.map(Self).map_err(|error| Error::Refused(format!("it is no public key of minisign: {error}")))
    }

    /// The line that [`VerifyingKey::read`] reads.
    #[must_use]
    pub fn to_line(&self) -> String {
        self.0.to_base64()
    }

    /// The id that `minisign` shows for it.
    #[must_use]
    pub fn id(&self) -> String {
        key_id(self.0.keynum())
    }
}

impl fmt::Debug for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VerifyingKey({})", self.id())
    }
}

impl TryFrom<String> for VerifyingKey {
    type Error = Error;
    fn try_from(text: String) -> Result<Self, Error> {
        Self::read(&text)
    }
}

impl From<VerifyingKey> for String {
    fn from(key: VerifyingKey) -> Self {
        key.to_line()
    }
}

/// A key that signs.
pub struct SigningKey {
    key: minisign::SecretKey,
}

impl SigningKey {
    /// Makes a pair, and the text of the secret one, without a password:
    /// whoever keeps it protects it.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn generate() -> Result<(Self, VerifyingKey, String), Error> {
        let make = || {
            let KeyPair { pk, sk } = KeyPair::generate_unencrypted_keypair()?;
            let text = sk.to_box(Some("key of a QVD repository"))?.into_string();
            Ok((Self { key: sk }, VerifyingKey(pk), text))
        };
        make().map_err(|error: minisign::PError| Error::Refused(format!("cannot make a key: {error}")))
    }

    /// Reads a secret key: one with a password as `minisign -G` writes it, or one
    /// that [`SigningKey::generate`] made.
    ///
    /// # Errors
    /// It is none, or the password is wrong. A key of `minisign -G -W` has no
    /// checksum, so it is taken for damaged.
    pub fn read(text: &str, password: Option<&str>) -> Result<Self, Error> {
        let refused = |error: minisign::PError| Error::Refused(format!("cannot use the secret key: {error}"));
        let boxed = SecretKeyBox::from_string(text).map_err(refused)?;
        let key = match password {
            Some(password) => boxed.into_secret_key(Some(password.to_owned())),
            None => boxed.into_unencrypted_secret_key(),
        };
        key.map(|key| Self { key }).map_err(refused)
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey(..)")
    }
}

/// Whose commits a repository gives out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// A commit needs a signature by one of these.
    pub keys: Vec<VerifyingKey>,
}

impl Repository {
    /// Signs a commit.
    ///
    /// # Errors
    /// There is no such commit, or the signature cannot be written.
    pub fn sign(&self, id: CommitId, key: &SigningKey) -> Result<(), Error> {
        let _keep = Lock::shared(&self.lock_path())?;
        // Nobody signs what is damaged.
        let commit = self.commit(id)?;
        let bytes = self.commit_bytes(id)?;
        let trusted = format!("commit {} of {}", id.hex(), commit.flavour());
        let signature = minisign::sign(None, &key.key, Cursor::new(bytes), Some(&trusted), Some("signed by qvd"));
        let signature = signature.map_err(|error| Error::Refused(format!("cannot sign commit {id}: {error}")))?;
        let path = self.signature_path(id, &key_id(signature.keynum()));
        let write = || {
            fsio::ensure_private_dir(&self.signatures_dir())?;
            fsio::replace(&path, signature.to_string().as_bytes())
        };
        write().map_err(Error::io("write", &path))
    }

    /// The signatures of a commit, whether they are worth anything or not.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn signatures(&self, id: CommitId) -> Result<Vec<String>, Error> {
        let mut found = Vec::new();
        for (commit, path) in self.signature_files()? {
            if commit == id {
                found.push(fs::read_to_string(&path).map_err(Error::io("read", &path))?);
            }
        }
        Ok(found)
    }

    /// Ids of the keys that a commit is signed by, as the signatures say.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn signers(&self, id: CommitId) -> Result<Vec<String>, Error> {
        Ok(self.signatures(id)?.iter().filter_map(|text| parse(text).map(|s| key_id(s.keynum()))).collect())
    }

    /// Whose commits this repository gives out; none means everybody's.
    ///
    /// # Errors
    /// It cannot be read. Then nothing is given out.
    pub fn policy(&self) -> Result<Option<Policy>, Error> {
        let path = self.dir().join(POLICY);
        match fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map(Some).map_err(|error| Error::DamagedPart {
                what: "policy of the repository".to_owned(),
                reason: error.to_string(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path)(error)),
        }
    }

    /// Demands signatures from now on, or with none no longer.
    ///
    /// # Errors
    /// It cannot be written. A policy without keys would refuse everything, and
    /// is refused itself.
    pub fn set_policy(&self, policy: Option<&Policy>) -> Result<(), Error> {
        let path = self.dir().join(POLICY);
        let Some(policy) = policy else {
            return match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
                _ => fsio::sync_dir(self.dir()).map_err(Error::io("write", &path)),
            };
        };
        if policy.keys.is_empty() {
            return Err(Error::Refused("a policy without a key would let nothing be used".to_owned()));
        }
        let json = serde_json::to_vec_pretty(policy).map_err(io::Error::from);
        json.and_then(|json| fsio::replace(&path, &json)).map_err(Error::io("write", &path))
    }

    /// Refuses a commit that the policy does not let out: whoever mounts, writes
    /// or exports one asks here first.
    ///
    /// # Errors
    /// [`Error::Untrusted`] with what is missing.
    pub fn expect_trusted(&self, id: CommitId) -> Result<(), Error> {
        let Some(policy) = self.policy()? else { return Ok(()) };
        let bytes = self.commit_bytes(id)?;
        let mut reason = "it is not signed".to_owned();
        for text in self.signatures(id)? {
            let Some(signature) = parse(&text) else { continue };
            let signer = key_id(signature.keynum());
            let Some(key) = policy.keys.iter().find(|key| key.id() == signer) else {
                reason = format!("it is signed by key {signer}, which this repository does not know");
                continue;
            };
            match verify(key, &signature, &bytes) {
                Ok(()) => return Ok(()),
                Err(error) => reason = format!("its signature by key {signer} is wrong: {error}"),
            }
        }
        Err(Error::Untrusted { commit: id, reason })
    }

    /// Signatures whose key is known and that do not verify, or are none at all.
    pub(crate) fn wrong_signatures(&self) -> Result<Vec<(CommitId, PathBuf, String)>, Error> {
        let keys = self.policy()?.map_or_else(Vec::new, |policy| policy.keys);
        let mut wrong = Vec::new();
        for (id, path) in self.signature_files()? {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let named = path.extension().map(|name| name.to_string_lossy().into_owned());
            match parse(&text) {
                Some(signature) if Some(key_id(signature.keynum())) == named => {
                    let key = keys.iter().find(|key| Some(key.id()) == named);
                    let bytes = self.commit_bytes(id).unwrap_or_default();
                    if let Some(Err(reason)) = key.map(|key| verify(key, &signature, &bytes)) {
                        wrong.push((id, path, reason));
                    }
                }
                _ => wrong.push((id, path, "it was changed".to_owned())),
            }
        }
        Ok(wrong)
    }

    /// Where a signature from elsewhere is to be; none if it is no signature.
    pub(crate) fn place_for_signature(&self, id: CommitId, text: &str) -> Option<PathBuf> {
        let signature = (text.len() <= SIGNATURE_MAX_BYTES).then(|| parse(text)).flatten()?;
        Some(self.signature_path(id, &key_id(signature.keynum())))
    }

    /// Every signature: its commit and its file.
    pub(crate) fn signature_files(&self) -> Result<Vec<(CommitId, PathBuf)>, Error> {
        let dir = self.signatures_dir();
        if !dir.exists() {
            return Ok(Vec::new());
        }
        ids(&dir, |name| {
            let (hex, _key) = name.split_once('.')?;
            Some((CommitId::from_hex(hex)?, dir.join(name)))
        })
    }

    pub(crate) fn signatures_dir(&self) -> PathBuf {
        self.dir().join("signatures")
    }

    fn signature_path(&self, id: CommitId, key: &str) -> PathBuf {
        self.signatures_dir().join(format!("{}.{key}", id.hex()))
    }
}

fn parse(text: &str) -> Option<SignatureBox> {
    SignatureBox::from_string(text).ok()
}

fn verify(key: &VerifyingKey, signature: &SignatureBox, bytes: &[u8]) -> Result<(), String> {
    minisign::verify(&key.0, signature, Cursor::new(bytes), true, false, false).map_err(|error| error.to_string())
}

/// As `minisign` shows it: the number as hexadecimal digits.
fn key_id(number: &[u8]) -> String {
    number.iter().rev().map(|byte| format!("{byte:02X}")).collect()
}
