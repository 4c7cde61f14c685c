//! The listener's certificate.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{ServerConfig, crypto::aws_lc_rs};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _};

use crate::{GatewayError, TlsSource};

/// How long a certificate of our own is valid.
///
/// Source: Apple's platforms refuse any server certificate valid for more
/// than 825 days (support.apple.com/103769).
const VALID: Duration = days(820);
/// A certificate older than this is made anew at the next start.
const RENEW_AFTER: Duration = days(730);

const fn days(days: u64) -> Duration {
    Duration::from_secs(days * 86_400)
}

/// Makes the TLS side of the listener.
pub(crate) fn server_config(source: &TlsSource, listen: IpAddr) -> Result<Arc<ServerConfig>, GatewayError> {
    let (certificate, key) = match source {
        TlsSource::Files { certificate, key } => (certificate.clone(), key.clone()),
        TlsSource::SelfSigned { directory } => own_certificate(directory, listen)?,
    };
    let bad = |op, path: &Path, error| {
        let path = path.to_owned();
        match error {
            pem::Error::Io(source) => GatewayError::Io { op, path, source },
            pem::Error::NoItemsFound => GatewayError::Pem { op, path, source: "the file holds none in PEM".into() },
            error => GatewayError::Pem { op, path, source: error.into() },
        }
    };
    let chain = CertificateDer::pem_file_iter(&certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|source| bad("read the certificate", &certificate, source))?;
    let private = PrivateKeyDer::from_pem_file(&key).map_err(|source| bad("read the private key", &key, source))?;
    let unfit = |source: rustls::Error| GatewayError::Certificate { path: certificate.clone(), source: source.into() };
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unfit)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(unfit)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Finds the certificate and key of `directory`, or makes them.
fn own_certificate(directory: &Path, listen: IpAddr) -> Result<(PathBuf, PathBuf), GatewayError> {
    let (certificate, key) = (directory.join("cert.pem"), directory.join("key.pem"));
    let fresh = fs::metadata(&certificate)
        .and_then(|metadata| metadata.modified())
        .is_ok_and(|made| SystemTime::now().duration_since(made).is_ok_and(|age| age < RENEW_AFTER));
    if fresh && key.is_file() {
        return Ok((certificate, key));
    }
    let io = |op, path: &Path| {
        let path = path.to_owned();
        move |source| GatewayError::Io { op, path, source }
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io("make the directory", directory))?;
    let (certificate_pem, key_pem) =
        self_signed(&names(listen)).map_err(|error| GatewayError::MakeCertificate(error.into()))?;
    // The certificate goes first and comes last: it is there only beside the
    // key that belongs to it, whenever we are killed.
    match fs::remove_file(&certificate) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io("remove the old certificate", &certificate)(error));
        }
        _ => {}
    }
    write_secret(&key, &key_pem).map_err(io("write the private key", &key))?;
    write_secret(&certificate, &certificate_pem).map_err(io("write the certificate", &certificate))?;
    tracing::info!(path = %certificate.display(), "made a self-signed certificate");
    Ok((certificate, key))
}

/// Writes `path` whole or not at all, readable by its owner only.
fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    use io::Write as _;
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}

/// A certificate for `names` and its key, in PEM.
fn self_signed(names: &[String]) -> Result<(String, String), rcgen::Error> {
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::new(names.to_vec())?;
    let common = names.first().map_or("QVD", String::as_str);
    params.distinguished_name.push(rcgen::DnType::CommonName, common);
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "QVD gateway (self-signed)");
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    // A day early: clients' clocks differ from ours.
    let now = SystemTime::now();
    let (from, until) = (civil_date(now - days(1)), civil_date(now + VALID));
    params.not_before = rcgen::date_time_ymd(from.0, from.1, from.2);
    params.not_after = rcgen::date_time_ymd(until.0, until.1, until.2);
    let certificate = params.self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

/// Year, month and day of a time, in UTC.
///
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms",
/// `civil_from_days`, for days since 1970 only.
fn civil_date(time: SystemTime) -> (i32, u8, u8) {
    let unix_s = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let days = unix_s / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let small = |value: u64| u8::try_from(value).unwrap_or(1);
    (i32::try_from(year).unwrap_or(9999), small(month), small(day))
}

/// Names that people may reach this host by.
fn names(listen: IpAddr) -> Vec<String> {
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let hostname = hostname.trim();
    let mut names = Vec::new();
    if is_dns_name(hostname) {
        names.push(hostname.to_owned());
    }
    names.push("localhost".to_owned());
    let outgoing = [
        // Addresses reserved for documentation: connecting a datagram socket
        // sends nothing, it only asks the routing table for our address.
        outgoing_address((Ipv4Addr::UNSPECIFIED, 0), (Ipv4Addr::new(192, 0, 2, 1), 9)),
        outgoing_address((Ipv6Addr::UNSPECIFIED, 0), (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 9)),
    ];
    let fixed = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    let all = fixed.into_iter().chain(outgoing.into_iter().flatten()).chain([listen]);
    for address in all.filter(|address| !address.is_unspecified()) {
        let text = address.to_string();
        if !names.contains(&text) {
            names.push(text);
        }
    }
    names
}

fn outgoing_address<A: std::net::ToSocketAddrs>(from: A, to: A) -> Option<IpAddr> {
    let socket = UdpSocket::bind(from).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn is_dns_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text != "localhost"
        && text.split('.').all(|label| {
            (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn dates_are_right() {
        let at = |s| civil_date(SystemTime::UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), (1970, 1, 1));
        assert_eq!(at(951_782_400), (2000, 2, 29));
        assert_eq!(at(1_735_689_599), (2024, 12, 31));
        assert_eq!(at(4_102_444_800), (2100, 1, 1));
    }

    #[test]
    fn the_certificate_is_made_once_and_its_key_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let source = TlsSource::SelfSigned { directory: dir.path().join("tls") };
        let local = IpAddr::from(Ipv4Addr::LOCALHOST);
        server_config(&source, local).unwrap();
        let key = dir.path().join("tls/key.pem");
        let first = fs::read(&key).unwrap();
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(dir.path().join("tls")).unwrap().permissions().mode() & 0o777, 0o700);
        server_config(&source, local).unwrap();
        assert_eq!(fs::read(&key).unwrap(), first);
        // Killed between the two files: both are made again, and match.
        fs::remove_file(dir.path().join("tls/cert.pem")).unwrap();
        server_config(&source, local).unwrap();
        assert_ne!(fs::read(&key).unwrap(), first);
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (certificate, _) = self_signed(&["a.example".to_owned()]).unwrap();
        let (_, key) = self_signed(&["a.example".to_owned()]).unwrap();
        let (certificate_file, key_file) = (dir.path().join("c"), dir.path().join("k"));
        fs::write(&certificate_file, certificate).unwrap();
        fs::write(&key_file, key).unwrap();
        let source = TlsSource::Files { certificate: certificate_file, key: key_file };
        let error = server_config(&source, Ipv4Addr::LOCALHOST.into()).unwrap_err();
        assert!(matches!(error, GatewayError::Certificate { .. }), "{error}");
    }
}
