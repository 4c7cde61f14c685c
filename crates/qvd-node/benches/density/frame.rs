//! A client of a display that wants one whole picture.
//!
//! Source: RFC 6143, The Remote Framebuffer Protocol.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use crate::Outcome;

const LIMIT: Duration = Duration::from_secs(30);
const SECURITY_NONE: u8 = 1;
const UPDATE: u8 = 0;
const BELL: u8 = 2;
const CUT_TEXT: u8 = 3;

/// Shakes hands, asks for all of the picture uncompressed, and reads it.
pub(crate) fn read_whole(mut stream: &UnixStream) -> Outcome<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    let bytes = |count: usize| -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; count];
        (&*stream).read_exact(&mut bytes)?;
        Ok(bytes)
    };
    bytes(12)?;
    stream.write_all(b"RFB 003.008\n")?;
    let kinds = bytes(1)?[0];
    if !bytes(kinds.into())?.contains(&SECURITY_NONE) {
        return Err("the display wants to know who we are".into());
    }
    stream.write_all(&[SECURITY_NONE])?;
    if bytes(4)? != [0; 4] {
        return Err("the display refuses us".into());
    }
    stream.write_all(&[1])?;
    let server = bytes(24)?;
    let (width, height) = (number(&server[0..2]), number(&server[2..4]));
    let pixel_bytes = usize::from(server[4]) / 8;
    bytes(number(&server[20..24]))?;
    // One encoding: raw.
    stream.write_all(&[2, 0, 0, 1, 0, 0, 0, 0])?;
    let mut request = vec![3, 0, 0, 0, 0, 0];
    request.extend(&server[0..4]);
    stream.write_all(&request)?;

    let mut missing = width * height;
    while missing > 0 {
        match bytes(1)?[0] {
            UPDATE => {
                let rectangles = number(&bytes(3)?[1..3]);
                for _ in 0..rectangles {
                    let head = bytes(12)?;
                    let area = number(&head[4..6]) * number(&head[6..8]);
                    bytes(area * pixel_bytes)?;
                    missing = missing.saturating_sub(area);
                }
            }
            BELL => {}
            CUT_TEXT => {
                let length = number(&bytes(7)?[3..7]);
                bytes(length)?;
            }
            other => return Err(format!("the display says {other}, which it should not").into()),
        }
    }
    Ok(())
}

/// A number of up to four bytes, the most significant first.
fn number(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |number, &byte| number << 8 | usize::from(byte))
}
