//! A client of a display, as much as is needed to see pictures and to type.
//!
//! Source: RFC 6143, The Remote Framebuffer Protocol.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use crate::Outcome;

const LIMIT: Duration = Duration::from_secs(30);
const SECURITY_NONE: u8 = 1;
const KEY_EVENT: u8 = 4;
const UPDATE: u8 = 0;
const BELL: u8 = 2;
const CUT_TEXT: u8 = 3;

/// A display that a client is connected to; pictures come uncompressed.
pub(crate) struct Screen<'a> {
    stream: &'a UnixStream,
    /// Width and height, as the display sent them.
    size: [u8; 4],
    pixel_bytes: usize,
}

impl<'a> Screen<'a> {
    /// Shakes hands.
    pub(crate) fn open(mut stream: &'a UnixStream) -> Outcome<Self> {
        stream.set_read_timeout(Some(LIMIT))?;
        let mut screen = Self { stream, size: [0; 4], pixel_bytes: 0 };
        screen.bytes(12)?;
        stream.write_all(b"RFB 003.008\n")?;
        let kinds = screen.bytes(1)?[0];
        if !screen.bytes(kinds.into())?.contains(&SECURITY_NONE) {
            return Err("the display wants to know who we are".into());
        }
        stream.write_all(&[SECURITY_NONE])?;
        if screen.bytes(4)? != [0; 4] {
            return Err("the display refuses us".into());
        }
        stream.write_all(&[1])?;
        let server = screen.bytes(24)?;
        screen.size.copy_from_slice(&server[..4]);
        screen.pixel_bytes = usize::from(server[4]) / 8;
        screen.bytes(number(&server[20..24]))?;
        // One encoding: raw.
        stream.write_all(&[2, 0, 0, 1, 0, 0, 0, 0])?;
        Ok(screen)
    }

    /// Asks for all of the picture, and reads it.
    pub(crate) fn read_whole(&mut self) -> Outcome<()> {
        self.ask(false)?;
        let mut missing = number(&self.size[..2]) * number(&self.size[2..]);
        while missing > 0 {
            let kind = self.bytes(1)?[0];
            missing = missing.saturating_sub(self.message(kind)?);
        }
        Ok(())
    }

    /// Asks for what differs from now on, once. Each question has one answer.
    pub(crate) fn ask_for_changes(&mut self) -> Outcome<()> {
        self.ask(true)
    }

    /// Whether a change comes within a limit; it is read then.
    pub(crate) fn changes_within(&mut self, limit: Duration) -> Outcome<bool> {
        self.stream.set_read_timeout(Some(limit))?;
        let mut kind = [0];
        let came = loop {
            match self.stream.read_exact(&mut kind) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break false,
                read => read?,
            }
            self.stream.set_read_timeout(Some(LIMIT))?;
            if self.message(kind[0])? > 0 {
                break true;
            }
            self.stream.set_read_timeout(Some(limit))?;
        };
        self.stream.set_read_timeout(Some(LIMIT))?;
        Ok(came)
    }

    /// Presses a key and lets go of it.
    pub(crate) fn press(&mut self, symbol: u32) -> Outcome<()> {
        let mut events = Vec::new();
        for down in [1, 0] {
            events.extend([KEY_EVENT, down, 0, 0]);
            events.extend(symbol.to_be_bytes());
        }
        Ok(self.stream.write_all(&events)?)
    }

    fn ask(&self, only_changes: bool) -> Outcome<()> {
        let mut request = vec![3, u8::from(only_changes), 0, 0, 0, 0];
        request.extend(self.size);
        let mut stream = self.stream;
        Ok(stream.write_all(&request)?)
    }

    /// Reads the rest of a message of this kind; how many pixels it brought.
    fn message(&mut self, kind: u8) -> Outcome<usize> {
        let mut pixels = 0;
        match kind {
            UPDATE => {
                let rectangles = number(&self.bytes(3)?[1..3]);
                for _ in 0..rectangles {
                    let head = self.bytes(12)?;
                    let area = number(&head[4..6]) * number(&head[6..8]);
                    self.bytes(area * self.pixel_bytes)?;
                    pixels += area;
                }
            }
            BELL => {}
            CUT_TEXT => {
                let length = number(&self.bytes(7)?[3..7]);
                self.bytes(length)?;
            }
            other => return Err(format!("the display says {other}, which it should not").into()),
        }
        Ok(pixels)
    }

    fn bytes(&mut self, count: usize) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// A number of up to four bytes, the most significant first.
fn number(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |number, &byte| number << 8 | usize::from(byte))
}
