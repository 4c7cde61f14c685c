//! Frames of a program's input and output, after `101 Switching Protocols`
//! with `Upgrade: qvd-exec/1`.
//!
//! One byte of kind, a little-endian `u32` length of at most [`MAX_PAYLOAD`],
//! and that many bytes:
//!
//! | Kind | From | Payload |
//! |---|---|---|
//! | 0 | client | standard input; empty: its end |
//! | 1 | server | standard output, or all of a terminal |
//! | 2 | server | standard error |
//! | 3 | client | the terminal's new size: rows, columns, each a little-endian `u16` |
//! | 4 | client | a signal for the program: little-endian `i32` |
//! | 5 | server | how it ended, JSON of [`Exit`]; the last frame |
//! | 6 | server | why that is not known, JSON of [`ErrorInfo`]; the last frame |

use std::io;

use qvd_guest::Exit;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::dto::ErrorInfo;

/// The protocol's name in the `Upgrade` header.
pub const PROTOCOL: &str = "qvd-exec/1";

/// Longest payload, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Frame {
    /// For the program's standard input; empty means its end.
    Stdin(Vec<u8>),
    /// From the program's standard output, or from its terminal.
    Stdout(Vec<u8>),
    /// From the program's standard error.
    Stderr(Vec<u8>),
    /// The terminal's new size.
    Resize {
        /// Rows of text.
        rows: u16,
        /// Columns of text.
        columns: u16,
    },
    /// A signal for the program.
    Signal(i32),
    /// How the program ended.
    Exit(Exit),
    /// Why its end is not known.
    Failed(ErrorInfo),
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Reads one frame; `None` when the stream ended between two.
///
/// # Errors
/// The stream failed or ended within a frame, or what came is no frame.
pub async fn read<R: AsyncRead + Unpin>(from: &mut R) -> io::Result<Option<Frame>> {
    let mut kind = [0];
    if from.read(&mut kind).await? == 0 {
        return Ok(None);
    }
    let length = usize::try_from(from.read_u32_le().await?).map_err(|_| bad("a frame longer than memory"))?;
    if length > MAX_PAYLOAD {
        return Err(bad("a frame longer than its protocol allows"));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload).await?;
    let frame = match kind[0] {
        0 => Frame::Stdin(payload),
        1 => Frame::Stdout(payload),
        2 => Frame::Stderr(payload),
        3 => match payload.as_slice() {
            &[r0, r1, c0, c1] => {
                Frame::Resize { rows: u16::from_le_bytes([r0, r1]), columns: u16::from_le_bytes([c0, c1]) }
            }
            _ => return Err(bad("a terminal's size that is not four bytes")),
        },
        4 => Frame::Signal(i32::from_le_bytes(payload.try_into().map_err(|_| bad("a signal that is not four bytes"))?)),
        5 => Frame::Exit(serde_json::from_slice(&payload)?),
        6 => Frame::Failed(serde_json::from_slice(&payload)?),
        _ => return Err(bad("a frame of an unknown kind")),
    };
    Ok(Some(frame))
}

/// Writes one frame and flushes.
///
/// # Errors
/// The stream failed, or the payload is longer than [`MAX_PAYLOAD`].
pub async fn write<W: AsyncWrite + Unpin>(to: &mut W, frame: &Frame) -> io::Result<()> {
    let owned;
    let (kind, payload) = match frame {
        Frame::Stdin(bytes) => (0, bytes.as_slice()),
        Frame::Stdout(bytes) => (1, bytes.as_slice()),
        Frame::Stderr(bytes) => (2, bytes.as_slice()),
        Frame::Resize { rows, columns } => {
            owned = [rows.to_le_bytes(), columns.to_le_bytes()].concat();
            (3, owned.as_slice())
        }
        Frame::Signal(signal) => {
            owned = signal.to_le_bytes().to_vec();
            (4, owned.as_slice())
        }
        Frame::Exit(exit) => {
            owned = serde_json::to_vec(exit)?;
            (5, owned.as_slice())
        }
        Frame::Failed(info) => {
            owned = serde_json::to_vec(info)?;
            (6, owned.as_slice())
        }
    };
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= MAX_PAYLOAD)
        .ok_or_else(|| bad("a frame longer than its protocol allows"))?;
    let mut whole = Vec::with_capacity(5 + payload.len());
    whole.push(kind);
    whole.extend_from_slice(&length.to_le_bytes());
    whole.extend_from_slice(payload);
    to.write_all(&whole).await?;
    to.flush().await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn all() -> Vec<Frame> {
        let info = ErrorInfo {
            code: "timeout".into(),
            message: "m".into(),
            cause: vec!["c".into()],
            id: "i".into(),
            retry_after_s: None,
        };
        vec![
            Frame::Stdin(vec![]),
            Frame::Stdout(vec![0xff; MAX_PAYLOAD]),
            Frame::Stderr(b"x".to_vec()),
            Frame::Resize { rows: 24, columns: 300 },
            Frame::Signal(-1),
            Frame::Exit(Exit::Signal(9)),
            Frame::Failed(info),
        ]
    }

    #[tokio::test]
    async fn every_frame_arrives_as_it_was_sent_and_none_when_cut() {
        for frame in all() {
            let mut wire = Vec::new();
            write(&mut wire, &frame).await.unwrap();
            assert_eq!(read(&mut wire.as_slice()).await.unwrap(), Some(frame));
            for cut in (1..wire.len()).take(64) {
                assert!(read(&mut &wire[..cut]).await.is_err(), "{cut}");
            }
        }
        assert_eq!(read(&mut [].as_slice()).await.unwrap(), None);
    }

    #[tokio::test]
    async fn what_is_no_frame_is_refused() {
        for bad in [
            &[0, 0xff, 0xff, 0xff, 0xff][..],
            &[9, 0, 0, 0, 0],
            &[3, 3, 0, 0, 0, 1, 2, 3],
            &[4, 0, 0, 0, 0],
            &[5, 1, 0, 0, 0, b'{'],
        ] {
            assert!(read(&mut &*bad).await.is_err(), "{bad:?}");
        }
        assert!(write(&mut Vec::new(), &Frame::Stdin(vec![0; MAX_PAYLOAD + 1])).await.is_err());
    }
}
