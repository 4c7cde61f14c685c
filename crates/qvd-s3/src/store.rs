//! A prefix of a bucket, and how things are put into it and got out of it.

use std::{
    fmt,
    future::Future,
    io::{self, Read, Write},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use futures_util::StreamExt;
use object_store::{
    BackoffConfig, Certificate, ClientOptions, GetResult, MultipartUpload, ObjectStoreExt, PutPayload, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    path::Path,
};
use qvd_storage::Error;
use tokio::runtime::{self, Runtime};

use crate::{Access, OpenError};

/// How long a connection may take to be made, and how long it may be silent.
const CONNECT: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(60);
/// How often a request is made again after a cut, and for how long.
const RETRIES: usize = 4;
const RETRY: Duration = Duration::from_secs(60);
/// Length of a part of a large object, and so what one that is brought takes of
/// memory. Source: S3 takes no part below 5 MiB, and at most 10,000 of them.
const PART_BYTES: usize = 16 << 20;
/// Region that stores which have none take.
const REGION: &str = "us-east-1";

/// Something, and which version of it that is, if the store says it.
pub(crate) type Versioned<T> = (T, Option<String>);

/// A prefix of a bucket of a store that speaks the protocol of S3.
pub struct Store {
    pub(crate) name: String,
    client: AmazonS3,
    prefix: Path,
    runtime: Runtime,
    pub(crate) received: AtomicU64,
    pub(crate) sent: AtomicU64,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens `s3://BUCKET[/PREFIX]`. Nothing is asked of it yet.
    ///
    /// # Errors
    /// It is no such address, or the client cannot be made.
    pub fn open(address: &str, access: &Access) -> Result<Self, OpenError> {
        let wrong = || OpenError::Address(address.to_owned());
        let rest = address.strip_prefix("s3://").ok_or_else(wrong)?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        // Source: names of buckets in the documentation of S3.
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        if !(3..=63).contains(&bucket.len()) || !bucket.chars().all(plain) {
            return Err(wrong());
        }
        let prefix = Path::parse(prefix.trim_matches('/')).map_err(|_| wrong())?;
        let name = format!("s3://{bucket}/{prefix}").trim_end_matches('/').to_owned();
        let mut options = ClientOptions::new()
            .with_timeout_disabled()
            .with_connect_timeout(CONNECT)
            .with_read_timeout(SILENCE)
            .with_http1_only();
        if let Some(pem) = &access.trusted_pem {
            for certificate in Certificate::from_pem_bundle(pem).map_err(|e| OpenError::Certificates(e.into()))? {
                options = options.with_root_certificate(certificate);
            }
            options = options.with_no_system_certificates(true);
        }
        let retry = RetryConfig { backoff: BackoffConfig::default(), max_retries: RETRIES, retry_timeout: RETRY };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_access_key_id(&access.key_id)
            .with_secret_access_key(&access.secret_key)
            .with_region(access.region.as_deref().unwrap_or(REGION))
            .with_retry(retry);
        if let Some(token) = &access.session_token {
            builder = builder.with_token(token);
        }
        if let Some(endpoint) = &access.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
            // Who names such an address means it; the key itself never travels.
            options = options.with_allow_http(endpoint.starts_with("http://"));
        }
        let failed =
            |source: Box<dyn std::error::Error + Send + Sync>| OpenError::Client { name: name.clone(), source };
        let client = builder.with_client_options(options).build().map_err(|error| failed(error.into()))?;
        let runtime = runtime::Builder::new_multi_thread().worker_threads(2).thread_name("s3").enable_all().build();
        let runtime = runtime.map_err(|error| failed(error.into()))?;
        Ok(Self { name, client, prefix, runtime, received: AtomicU64::new(0), sent: AtomicU64::new(0) })
    }

    /// Where something is.
    pub(crate) fn at(&self, parts: &[&str]) -> Path {
        parts.iter().fold(self.prefix.clone(), |path, part| path.join(*part))
    }

    pub(crate) const fn client(&self) -> &AmazonS3 {
        &self.client
    }

    /// Waits for something that the client does.
    pub(crate) fn wait<F: Future>(&self, work: F) -> F::Output {
        self.runtime.block_on(work)
    }

    /// What went wrong, with our verb and what it was about.
    pub(crate) fn failed(&self, op: &'static str, key: &Path, error: object_store::Error) -> Error {
        let root = self.name.split('/').take(3).collect::<Vec<_>>().join("/");
        Error::Io { op, path: format!("{root}/{key}").into(), source: cause(error) }
    }

    /// Something that has at most so many bytes; none if it is not there.
    pub(crate) fn get(&self, key: &Path, max: u64) -> Result<Option<Versioned<Vec<u8>>>, Error> {
        match self.wait(self.fetch(key, max)) {
            Ok(found) => Ok(Some(found)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("get", key, error)),
        }
    }

    async fn fetch(&self, key: &Path, max: u64) -> object_store::Result<Versioned<Vec<u8>>> {
        let found = self.client.get(key).await?;
        if found.meta.size > max {
            let what = format!("it has {} bytes, more than {max}", found.meta.size);
            return Err(object_store::Error::Generic { store: "S3", source: what.into() });
        }
        let tag = found.meta.e_tag.clone();
        let bytes = found.bytes().await?;
        self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok((bytes.into(), tag))
    }

    /// Puts something, whole or not at all.
    pub(crate) fn put(&self, key: &Path, bytes: Vec<u8>) -> Result<(), Error> {
        let len = bytes.len() as u64;
        self.wait(self.client.put(key, PutPayload::from(bytes))).map_err(|error| self.failed("put", key, error))?;
        self.sent.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    /// Something as it arrives.
    pub(crate) fn body(&self, found: GetResult) -> impl Read + '_ {
        Body { store: self, stream: found.into_stream(), chunk: PutPayload::default().into(), at: 0 }
    }

    /// A writer whose bytes are put under a name when it is finished, and never
    /// otherwise.
    pub(crate) fn upload<'a>(&'a self, key: &'a Path) -> Upload<'a> {
        Upload { store: self, key, gathered: Vec::new(), parts: None }
    }
}

/// What a client's error says, without the text of the answer around it.
fn cause(error: object_store::Error) -> io::Error {
    use object_store::Error as E;
    let kind = match &error {
        E::NotFound { .. } => io::ErrorKind::NotFound,
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::Other,
    };
    let text = qvd_core::causes(&error).join(": ");
    // The store's own words, which stand in XML.
    let word = |name: &str| {
        let from = text.find(&format!("<{name}>"))? + name.len() + 2;
        Some(text.get(from..)?.split('<').next().unwrap_or_default().to_owned())
    };
    let said = match (word("Code"), word("Message")) {
        (Some(code), Some(message)) if !message.is_empty() => format!("the store says {code}: {message}"),
        (Some(code), _) => format!("the store says {code}"),
        _ if kind == io::ErrorKind::NotFound => "the store does not have it".to_owned(),
        _ if kind == io::ErrorKind::PermissionDenied => "the store does not let this key do it".to_owned(),
        _ => text.split_whitespace().collect::<Vec<_>>().join(" "),
    };
    io::Error::new(kind, said)
}

type Chunks = futures_util::stream::BoxStream<'static, object_store::Result<Chunk>>;
type Chunk = <PutPayload as IntoIterator>::Item;

struct Body<'a> {
    store: &'a Store,
    stream: Chunks,
    chunk: Chunk,
    at: usize,
}

impl Read for Body<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.at >= self.chunk.len() {
            let Some(next) = self.store.wait(self.stream.next()) else { return Ok(0) };
            (self.chunk, self.at) = (next.map_err(cause)?, 0);
            self.store.received.fetch_add(self.chunk.len() as u64, Ordering::Relaxed);
        }
        let rest = self.chunk.get(self.at..).unwrap_or_default();
        let len = rest.len().min(to.len());
        to.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        self.at += len;
        Ok(len)
    }
}

/// Bytes on their way to a name: at once if they are few, in parts if not.
pub(crate) struct Upload<'a> {
    store: &'a Store,
    key: &'a Path,
    gathered: Vec<u8>,
    parts: Option<Box<dyn MultipartUpload>>,
}

impl Upload<'_> {
    fn part(&mut self) -> object_store::Result<()> {
        let bytes = std::mem::take(&mut self.gathered);
        let len = bytes.len() as u64;
        let parts = match &mut self.parts {
            Some(parts) => parts,
            none => none.insert(self.store.wait(self.store.client.put_multipart(self.key))?),
        };
        self.store.wait(parts.put_part(PutPayload::from(bytes)))?;
        self.store.sent.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    /// Gives what was written its name.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        if self.parts.is_none() {
            return self.store.put(self.key, std::mem::take(&mut self.gathered));
        }
        let failed = |error| self.store.failed("put", self.key, error);
        if !self.gathered.is_empty() {
            self.part().map_err(failed)?;
        }
        let Some(parts) = &mut self.parts else { return Ok(()) };
        self.store.wait(parts.complete()).map_err(failed)?;
        self.parts = None;
        Ok(())
    }
}

impl Write for Upload<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(PART_BYTES - self.gathered.len());
        self.gathered.extend_from_slice(bytes.get(..len).unwrap_or_default());
        if self.gathered.len() == PART_BYTES {
            self.part().map_err(cause)?;
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        // Parts of what never became whole cost room that nobody sees.
        if let Some(parts) = &mut self.parts
            && let Err(error) = self.store.wait(parts.abort())
        {
            tracing::warn!(key = %self.key, %error, "parts of an object were left behind");
        }
    }
}
