//! The client's half of a program inside a desktop.

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use qvd_guest::Exit;
use tokio::io::{ReadHalf, WriteHalf};

use super::ClientError;
use crate::api::frame::{self, Frame, MAX_PAYLOAD};

type Stream = TokioIo<Upgraded>;

/// What goes to the program. Dropping both halves hangs up on it.
#[derive(Debug)]
pub struct ExecWriter {
    to: WriteHalf<Stream>,
}

/// What comes from the program.
#[derive(Debug)]
pub struct ExecReader {
    from: ReadHalf<Stream>,
}

/// News of the program.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExecOutput {
    /// It wrote to its standard output or its terminal.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It ended; nothing follows.
    Exit(Exit),
}

pub(super) fn split(stream: Stream) -> (ExecWriter, ExecReader) {
    let (from, to) = tokio::io::split(stream);
    (ExecWriter { to }, ExecReader { from })
}

impl ExecWriter {
    /// Sends bytes to the program's standard input.
    ///
    /// # Errors
    /// The connection is gone, normally because the program ended.
    pub async fn stdin(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            self.send(&Frame::Stdin(chunk.to_vec())).await?;
        }
        Ok(())
    }

    /// Ends the program's standard input.
    ///
    /// # Errors
    /// As [`ExecWriter::stdin`].
    pub async fn end_stdin(&mut self) -> Result<(), ClientError> {
        self.send(&Frame::Stdin(Vec::new())).await
    }

    /// Tells the program's terminal its new size.
    ///
    /// # Errors
    /// As [`ExecWriter::stdin`].
    pub async fn resize(&mut self, rows: u16, columns: u16) -> Result<(), ClientError> {
        self.send(&Frame::Resize { rows, columns }).await
    }

    /// Sends a signal to the program.
    ///
    /// # Errors
    /// As [`ExecWriter::stdin`].
    pub async fn signal(&mut self, signal: i32) -> Result<(), ClientError> {
        self.send(&Frame::Signal(signal)).await
    }

    async fn send(&mut self, frame: &Frame) -> Result<(), ClientError> {
        frame::write(&mut self.to, frame).await.map_err(|e| ClientError::protocol("write to")(e.into()))
    }
}

impl ExecReader {
    /// Waits for the program's next news. A program may be silent for ever, so
    /// this has no deadline. Not to be cancelled half-way: run it in a task of
    /// its own, or keep its future across a `select`.
    ///
    /// # Errors
    /// The connection ended before the program did, or the daemon lost it.
    pub async fn next(&mut self) -> Result<ExecOutput, ClientError> {
        match frame::read(&mut self.from).await {
            Ok(Some(Frame::Stdout(bytes))) => Ok(ExecOutput::Stdout(bytes)),
            Ok(Some(Frame::Stderr(bytes))) => Ok(ExecOutput::Stderr(bytes)),
            Ok(Some(Frame::Exit(exit))) => Ok(ExecOutput::Exit(exit)),
            Ok(Some(Frame::Failed(info))) => {
                Err(ClientError::Refused { status: axum::http::StatusCode::BAD_GATEWAY, info })
            }
            Ok(Some(_)) => Err(ClientError::protocol("understand")("a frame that only a client sends".into())),
            Ok(None) => {
                Err(ClientError::protocol("hear the end from")("the connection ended before the program".into()))
            }
            Err(e) => Err(ClientError::protocol("read from")(e.into())),
        }
    }
}
