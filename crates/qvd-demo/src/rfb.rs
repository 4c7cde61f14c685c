//! The RFB protocol as far as a picture, a key and the clipboard need it.
//!
//! Source: RFC 6143; the numbers of messages and encodings are its. Written
//! against any byte stream, so that it runs over a WebSocket as noVNC does.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Raw pixels: RFC 6143, section 7.7.1.
const RAW: i32 = 0;
/// Copy of another rectangle of the screen: section 7.7.2.
const COPY_RECT: i32 = 1;
/// Pseudo-encoding by which the server tells a new screen size: section 7.8.2.
const DESKTOP_SIZE: i32 = -223;
/// The same, and the permission to ask for one with `SetDesktopSize`
/// (registered with IANA; used by TigerVNC and noVNC).
const EXTENDED_DESKTOP_SIZE: i32 = -308;

/// Largest screen taken, in pixels: four times 4K. A server cannot make us
/// reserve more than this allows.
const MAX_PIXELS: usize = 4 * 3840 * 2160;

/// A connection past its handshake, and the screen as last drawn.
#[derive(Debug)]
pub struct Rfb<S> {
    stream: S,
    width: u16,
    height: u16,
    /// One pixel after another, row by row, each 0x00RRGGBB little-endian.
    pixels: Vec<u8>,
    /// Text the desktop put into its clipboard last.
    pub clipboard: Option<String>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Rfb<S> {
    /// Shakes hands (version 3.8, no authentication: the gateway has done
    /// that) and asks for 32-bit true colour in encodings that lose nothing.
    ///
    /// # Errors
    /// The server is none, wants a password, or its screen is absurd.
    pub async fn handshake(mut stream: S) -> anyhow::Result<Self> {
        let mut version = [0; 12];
        stream.read_exact(&mut version).await.context("cannot read the server's version")?;
        ensure!(version.starts_with(b"RFB 003.00"), "not an RFB server: {:?}", String::from_utf8_lossy(&version));
        stream.write_all(b"RFB 003.008\n").await?;
        let count = stream.read_u8().await?;
        let mut kinds = vec![0; usize::from(count)];
        stream.read_exact(&mut kinds).await?;
        ensure!(kinds.contains(&1), "the server offers security types {kinds:?}, not 1 (none)");
        stream.write_u8(1).await?;
        ensure!(stream.read_u32().await? == 0, "the server refused the connection");
        stream.write_u8(1).await?; // shared
        let (width, height) = (stream.read_u16().await?, stream.read_u16().await?);
        stream.read_exact(&mut [0; 16]).await?;
        let name = stream.read_u32().await?;
        discard(&mut stream, u64::from(name)).await?;
        let mut this = Self { stream, width: 0, height: 0, pixels: Vec::new(), clipboard: None };
        this.resize(width, height)?;

        let mut setup = vec![0, 0, 0, 0];
        // 32 bits a pixel, depth 24, little-endian, true colour, 8 bits each.
        setup.extend([32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0]);
        let encodings = [COPY_RECT, RAW, DESKTOP_SIZE, EXTENDED_DESKTOP_SIZE];
        setup.extend([2, 0, 0, u8::try_from(encodings.len())?]);
        setup.extend(encodings.iter().flat_map(|e| e.to_be_bytes()));
        this.stream.write_all(&setup).await?;
        Ok(this)
    }

    /// Width and height of the screen in pixels.
    #[must_use]
    pub const fn size(&self) -> (u16, u16) {
        (self.width, self.height)
    }

    /// Colour at a place on the screen, as `0xRRGGBB`.
    #[must_use]
    pub fn pixel(&self, x: u16, y: u16) -> Option<u32> {
        let range = self.row(x, y, 1).ok()?;
        let bytes = self.pixels.get(range)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes) & 0x00ff_ffff)
    }

    /// How many different colours the screen shows. An empty one shows one.
    #[must_use]
    pub fn colours(&self) -> usize {
        self.pixels.chunks_exact(4).collect::<std::collections::HashSet<_>>().len()
    }

    /// Asks for the screen (`incremental`: only what changed) and draws what
    /// comes until an update has arrived.
    ///
    /// # Errors
    /// The connection ended or the server broke the protocol.
    pub async fn update(&mut self, mut incremental: bool) -> anyhow::Result<()> {
        loop {
            let mut request = vec![3, u8::from(incremental), 0, 0, 0, 0];
            request.extend(self.width.to_be_bytes());
            request.extend(self.height.to_be_bytes());
            self.stream.write_all(&request).await?;
            // A server may answer with the screen's size alone; what was asked
            // for is still due then, and asking for all again would start over.
            let drawn = loop {
                if let Some(drawn) = self.message().await? {
                    break drawn;
                }
            };
            if drawn {
                return Ok(());
            }
            incremental = true;
        }
    }

    /// Presses or releases a key, given as an X11 keysym.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn key(&mut self, keysym: u32, down: bool) -> anyhow::Result<()> {
        let mut event = vec![4, u8::from(down), 0, 0];
        event.extend(keysym.to_be_bytes());
        Ok(self.stream.write_all(&event).await?)
    }

    /// Types ASCII text as a US keyboard does, Shift included; a line feed is
    /// the Return key.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn type_text(&mut self, text: &str) -> anyhow::Result<()> {
        /// Keysyms of the keys that print nothing (X11 `keysymdef.h`).
        const RETURN: u32 = 0xff0d;
        const SHIFT: u32 = 0xffe1;
        for byte in text.bytes() {
            // Latin-1 keysyms equal their character.
            let keysym = if byte == b'\n' { RETURN } else { u32::from(byte) };
            let shifted = byte.is_ascii_uppercase() || b"~!@#$%^&*()_+{}|:\"<>?".contains(&byte);
            if shifted {
                self.key(SHIFT, true).await?;
            }
            self.key(keysym, true).await?;
            self.key(keysym, false).await?;
            if shifted {
                self.key(SHIFT, false).await?;
            }
        }
        Ok(())
    }

    /// Moves the pointer to `x`, `y` and, with `button`, clicks its first button.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn pointer(&mut self, x: u16, y: u16, button: bool) -> anyhow::Result<()> {
        for mask in if button { &[0, 1, 0][..] } else { &[0][..] } {
            let mut event = vec![5, *mask];
            event.extend(x.to_be_bytes());
            event.extend(y.to_be_bytes());
            self.stream.write_all(&event).await?;
        }
        Ok(())
    }

    /// Waits for the text that the desktop puts into its clipboard next.
    ///
    /// # Errors
    /// The connection ended or the server broke the protocol.
    pub async fn next_clipboard(&mut self) -> anyhow::Result<String> {
        self.clipboard = None;
        loop {
            self.message().await?;
            if let Some(text) = &self.clipboard {
                return Ok(text.clone());
            }
        }
    }

    /// Puts text into the desktop's clipboard, as the protocol has it without
    /// extensions: only what Latin-1 can write.
    ///
    /// # Errors
    /// The text has other characters, or the connection ended.
    pub async fn set_clipboard(&mut self, text: &str) -> anyhow::Result<()> {
        let latin1: Vec<u8> = text.chars().map(u8::try_from).collect::<Result<_, _>>().context("not Latin-1")?;
        let mut message = vec![6, 0, 0, 0];
        message.extend(u32::try_from(latin1.len())?.to_be_bytes());
        message.extend(latin1);
        Ok(self.stream.write_all(&message).await?)
    }

    /// Asks the desktop to take another screen size.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn set_size(&mut self, width: u16, height: u16) -> anyhow::Result<()> {
        let mut request = vec![251, 0];
        request.extend(width.to_be_bytes());
        request.extend(height.to_be_bytes());
        request.extend([1, 0]);
        // One screen: id 0 at 0,0.
        request.extend([0; 8]);
        request.extend(width.to_be_bytes());
        request.extend(height.to_be_bytes());
        request.extend([0; 4]);
        Ok(self.stream.write_all(&request).await?)
    }

    /// Writes the screen to a PNG file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save_png(&self, path: &Path) -> anyhow::Result<()> {
        let file = std::fs::File::create(path).with_context(|| format!("cannot create `{}`", path.display()))?;
        let mut encoder =
            png::Encoder::new(std::io::BufWriter::new(file), u32::from(self.width), u32::from(self.height));
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let rgb: Vec<u8> = self.pixels.chunks_exact(4).flat_map(|p| [p[2], p[1], p[0]]).collect();
        encoder.write_header()?.write_image_data(&rgb)?;
        Ok(())
    }

    /// Reads one message. If it was an update: whether there were pixels in it.
    async fn message(&mut self) -> anyhow::Result<Option<bool>> {
        match self.stream.read_u8().await? {
            0 => {
                self.stream.read_u8().await?;
                let mut drawn = false;
                for _ in 0..self.stream.read_u16().await? {
                    drawn |= self.rectangle().await?;
                }
                Ok(Some(drawn))
            }
            1 => {
                discard(&mut self.stream, 3).await?;
                let colours = self.stream.read_u16().await?;
                discard(&mut self.stream, 6 * u64::from(colours)).await?;
                Ok(None)
            }
            2 => Ok(None),
            3 => {
                discard(&mut self.stream, 3).await?;
                let length = self.stream.read_u32().await?;
                ensure!(length <= 1 << 20, "a clipboard of {length} bytes");
                let mut text = vec![0; usize::try_from(length)?];
                self.stream.read_exact(&mut text).await?;
                // Latin-1, says RFC 6143, section 7.6.4.
                self.clipboard = Some(text.into_iter().map(char::from).collect());
                Ok(None)
            }
            other => bail!("unknown message {other} from the server"),
        }
    }

    async fn rectangle(&mut self) -> anyhow::Result<bool> {
        let mut head = [0; 8];
        self.stream.read_exact(&mut head).await?;
        let number = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let (x, y, width, height) = (number(0), number(2), number(4), number(6));
        match self.stream.read_i32().await? {
            RAW => {
                for row in 0..height {
                    let range = self.row(x, y + row, width)?;
                    self.stream.read_exact(&mut self.pixels[range]).await?;
                }
                Ok(true)
            }
            COPY_RECT => {
                let (from_x, from_y) = (self.stream.read_u16().await?, self.stream.read_u16().await?);
                let mut copied = Vec::new();
                for row in 0..height {
                    copied.extend_from_slice(&self.pixels[self.row(from_x, from_y + row, width)?]);
                }
                for (row, line) in (0..height).zip(copied.chunks_exact(usize::from(width.max(1)) * 4)) {
                    let range = self.row(x, y + row, width)?;
                    self.pixels[range].copy_from_slice(line);
                }
                Ok(true)
            }
            DESKTOP_SIZE => self.resize(width, height).map(|()| false),
            EXTENDED_DESKTOP_SIZE => {
                let screens = self.stream.read_u8().await?;
                discard(&mut self.stream, 3 + 16 * u64::from(screens)).await?;
                // `y` is a status code: other than 0, a refused request.
                if y == 0 {
                    self.resize(width, height)?;
                }
                Ok(false)
            }
            other => bail!("the server used encoding {other}, which was not asked for"),
        }
    }

    /// Where a part of a row lies in `pixels`, if it is on the screen.
    fn row(&self, x: u16, y: u16, width: u16) -> anyhow::Result<std::ops::Range<usize>> {
        ensure!(
            u32::from(x) + u32::from(width) <= u32::from(self.width) && y < self.height,
            "a rectangle outside the screen"
        );
        let start = (usize::from(y) * usize::from(self.width) + usize::from(x)) * 4;
        Ok(start..start + usize::from(width) * 4)
    }

    fn resize(&mut self, width: u16, height: u16) -> anyhow::Result<()> {
        let pixels = usize::from(width) * usize::from(height);
        ensure!((1..=MAX_PIXELS).contains(&pixels), "a screen of {width}x{height} pixels");
        if (width, height) != (self.width, self.height) {
            (self.width, self.height) = (width, height);
            self.pixels = vec![0; pixels * 4];
        }
        Ok(())
    }
}

async fn discard<S: AsyncRead + Unpin>(stream: &mut S, bytes: u64) -> anyhow::Result<()> {
    let copied = tokio::io::copy(&mut stream.take(bytes), &mut tokio::io::sink()).await?;
    ensure!(copied == bytes, "the server closed the connection");
    Ok(())
}
