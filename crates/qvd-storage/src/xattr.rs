//! Extended attributes by path.

use std::{io, path::Path};

use rustix::fs::{lgetxattr, llistxattr};

/// Extended attributes of a path, not of what it may link to.
pub(crate) fn xattrs(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    // Source: Linux `include/uapi/linux/limits.h`, XATTR_LIST_MAX and
    // XATTR_SIZE_MAX are both 65536.
    const MAX: usize = 65536;
    let mut names = vec![0; MAX];
    let len = match llistxattr(path, &mut names) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        len => len?,
    };
    names.truncate(len);
    let mut found = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; MAX];
        let len = lgetxattr(path, name, &mut value)?;
        value.truncate(len);
        found.push((name.to_vec(), value));
    }
    Ok(found)
}
