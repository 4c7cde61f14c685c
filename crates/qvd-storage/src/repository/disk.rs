//! Disks: images of block devices, cut into blocks of one length.

use std::io::Read;

use qvd_core::Digest;

use super::{ObjectId, Repository};
use crate::Error;

impl Repository {
    /// The blocks of a disk in order; none stands for one of zeroes.
    pub(crate) fn disk_blocks(&self, list: ObjectId) -> Result<Vec<Option<ObjectId>>, Error> {
        let mut bytes = Vec::new();
        self.object(list)?.read_to_end(&mut bytes).map_err(Error::io("read", self.objects.path(list)))?;
        if bytes.len() % 32 != 0 {
            let reason = "it is no list of blocks".to_owned();
            return Err(Error::DamagedPart { what: format!("object {list}"), reason });
        }
        let id = |id: &[u8]| <[u8; 32]>::try_from(id).ok().filter(|id| *id != [0; 32]);
        Ok(bytes.chunks_exact(32).map(|block| id(block).map(|id| ObjectId::new(Digest::new(id)))).collect())
    }
}
