//! Request heads of the QVD wire protocol, from bytes to values.

use std::borrow::Cow;

/// Longest request head in bytes. The original's clients send some 1.5 KB.
pub(crate) const HEAD_MAX: usize = 16 * 1024;
/// Most header lines in a head.
const HEADERS_MAX: usize = 64;

/// One request's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    /// `GET`, or what else was sent.
    pub(crate) method: String,
    /// Path and query as sent.
    pub(crate) target: String,
    /// Whether it is HTTP/1.1.
    pub(crate) http_1_1: bool,
    headers: Vec<(String, Vec<u8>)>,
    /// Bytes that the head takes.
    pub(crate) length: usize,
}

/// Why bytes are no request head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeadError {
    #[error("the request's head is longer than {HEAD_MAX} bytes")]
    TooLarge,
    #[error("the request's head has more than {HEADERS_MAX} lines")]
    TooManyHeaders,
    #[error("only HTTP/1.1 is spoken here")]
    Version,
    #[error("this is not an HTTP request")]
    Malformed,
}

impl Head {
    /// Reads a head from the start of `bytes`; `None` while it is incomplete.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Self>, HeadError> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        let length = match request.parse(bytes) {
            Ok(httparse::Status::Complete(length)) if length <= HEAD_MAX => length,
            Ok(httparse::Status::Partial) if bytes.len() < HEAD_MAX => return Ok(None),
            Ok(_) => return Err(HeadError::TooLarge),
            Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyHeaders),
            Err(httparse::Error::Version) => return Err(HeadError::Version),
            Err(_) => return Err(HeadError::Malformed),
        };
        let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
            return Err(HeadError::Malformed);
        };
        let headers = request.headers.iter().map(|h| (h.name.to_owned(), h.value.to_vec())).collect();
        let http_1_1 = version == 1;
        Ok(Some(Self { method: method.to_owned(), target: target.to_owned(), http_1_1, headers, length }))
    }

    /// The value of a header that must not stand twice; `None` if it does.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        match (values.next(), values.next()) {
            (Some((_, value)), None) => std::str::from_utf8(value).ok().map(str::trim),
            _ => None,
        }
    }

    /// All headers, in order.
    pub(crate) fn headers(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.headers.iter().map(|(name, value)| (name.as_str(), value.as_slice()))
    }

    /// Whether a comma-separated header holds `token`.
    pub(crate) fn has_token(&self, name: &str, token: &str) -> bool {
        self.headers
            .iter()
            .filter(|(n, _)| n.eq_ignore_ascii_case(name))
            .filter_map(|(_, value)| std::str::from_utf8(value).ok())
            .flat_map(|value| value.split(','))
            .any(|word| word.trim().eq_ignore_ascii_case(token))
    }

    /// Whether a body follows, which no request of this protocol has.
    pub(crate) fn announces_body(&self) -> bool {
        self.headers.iter().any(|(name, value)| {
            name.eq_ignore_ascii_case("transfer-encoding")
                || (name.eq_ignore_ascii_case("content-length") && value.trim_ascii() != b"0")
        })
    }

    /// The target's path.
    pub(crate) fn path(&self) -> &str {
        self.target.split_once('?').map_or(&*self.target, |(path, _)| path)
    }

    /// The target's query, decoded, in order.
    pub(crate) fn query(&self) -> Result<Vec<(String, String)>, QueryError> {
        self.target.split_once('?').map_or_else(|| Ok(Vec::new()), |(_, query)| parse_query(query))
    }
}

/// Why a query is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the query is not percent-encoded UTF-8 text")]
pub(crate) struct QueryError;

/// Splits `a=1&b=2` and decodes both sides.
fn parse_query(query: &str) -> Result<Vec<(String, String)>, QueryError> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decode(key)?, decode(value)?))
        })
        .collect()
}

/// Undoes percent encoding and `+` for space; control characters are refused.
fn decode(text: &str) -> Result<String, QueryError> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).ok_or(QueryError);
                let value = digit()? * 16 + digit()?;
                u8::try_from(value).map_err(|_| QueryError)?
            }
            byte => byte,
        });
    }
    let text = String::from_utf8(decoded).map_err(|_| QueryError)?;
    if text.chars().any(char::is_control) { Err(QueryError) } else { Ok(text) }
}

/// Encodes `text` for a header or body: one line of printable characters.
pub(crate) fn one_line(text: &str) -> Cow<'_, str> {
    if text.chars().any(char::is_control) {
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().into()
    } else {
        text.into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CONNECT: &[u8] =
        b"GET /qvd/connect_to_vm?id=7&qvd.client.keyboard=pc105%2Fes&qvd.client.link=adsl HTTP/1.1\r\n\
        Authorization: Basic YTpi\r\nConnection: Upgrade\r\nUpgrade: QVD/1.0\r\n\r\nNXPROXY";

    #[test]
    fn a_head_cut_anywhere_is_incomplete_and_whole_it_is_itself() {
        let length = CONNECT.len() - b"NXPROXY".len();
        for cut in 0..length {
            assert_eq!(Head::parse(&CONNECT[..cut]), Ok(None), "cut at {cut}");
        }
        let head = Head::parse(CONNECT).unwrap().unwrap();
        assert_eq!(head.length, length);
        assert_eq!(head.path(), "/qvd/connect_to_vm");
        assert_eq!(head.query().unwrap()[1], ("qvd.client.keyboard".to_owned(), "pc105/es".to_owned()));
        assert!(head.http_1_1 && head.has_token("connection", "upgrade") && !head.announces_body());
        assert_eq!(head.header("upgrade"), Some("QVD/1.0"));
    }

    #[test]
    fn endless_heads_end() {
        let mut head = b"GET /qvd/ping HTTP/1.1\r\nA: ".to_vec();
        head.resize(HEAD_MAX, b'a');
        assert_eq!(Head::parse(&head), Err(HeadError::TooLarge));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(HEADERS_MAX + 1));
        assert_eq!(Head::parse(many.as_bytes()), Err(HeadError::TooManyHeaders));
    }

    #[test]
    fn versions_are_told_apart() {
        let version = |v: &str| Head::parse(format!("GET /qvd/ping HTTP/{v}\r\n\r\n").as_bytes());
        assert!(version("1.1").unwrap().unwrap().http_1_1);
        assert!(!version("1.0").unwrap().unwrap().http_1_1);
        assert_eq!(version("2.0"), Err(HeadError::Version));
    }

    #[test]
    fn a_header_that_stands_twice_counts_as_none() {
        let head = b"GET / HTTP/1.1\r\nAuthorization: a\r\nauthorization: b\r\n\r\n";
        assert_eq!(Head::parse(head).unwrap().unwrap().header("Authorization"), None);
    }

    #[test]
    fn queries_that_are_no_text_are_refused() {
        for bad in ["a=%", "a=%4", "a=%zz", "a=%ff", "a=%00", "a=%0a", "a=%+1"] {
            assert_eq!(parse_query(bad), Err(QueryError), "{bad}");
        }
        assert_eq!(parse_query("a&b=&&=c").unwrap().len(), 3);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic_or_read_beyond(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            if let Ok(Some(head)) = Head::parse(&bytes) {
                prop_assert!(head.length <= bytes.len());
                drop(head.query());
            }
        }

        #[test]
        fn what_was_encoded_is_what_is_read(pairs in prop::collection::vec(("[^\\p{C}]{1,12}", "[^\\p{C}]{0,12}"), 0..6)) {
            let encode = |text: &str| text.bytes().map(|b| format!("%{b:02X}")).collect::<String>();
            let query = pairs.iter().map(|(k, v)| format!("{}={}", encode(k), encode(v))).collect::<Vec<_>>().join("&");
            prop_assert_eq!(parse_query(&query).unwrap(), pairs);
        }
    }
}
