//! The next version of an image, from a desktop that runs it.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
    ffi::CStr,
    io,
    os::{fd::BorrowedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use qvd_core::{FlavourName, Missing, Tag, UidRange};
use rustix::fs::{AtFlags, Stat, StatxFlags, statx};
use serde::{Deserialize, Serialize, Serializer};

use super::{
    Commit, CommitId, Content, Entry, Meta, Node, Repository, Staging, Tree, archive::IMPORT_MAX_BYTES, packages,
};
use crate::{Error, glob};

/// What stays with the desktop and is in no image: secrets, what tells one desktop
/// from another, and what is of no use elsewhere. A name ends a pattern with all
/// that is below it.
pub const LEFT_OUT: &[&str] = &[
    "etc/machine-id",
    "etc/hostname",
    "etc/ssh/ssh_host_*",
    "etc/shadow",
    "etc/shadow-",
    "etc/gshadow",
    "etc/gshadow-",
    "etc/passwd-",
    "etc/group-",
    "etc/ssl/private/*",
    "etc/NetworkManager/system-connections/*",
    "etc/wpa_supplicant/*",
    "etc/krb5.keytab",
    "home/*",
    "root/*",
    "run/*",
    "tmp/*",
    "var/tmp/*",
    "var/log/*",
    "var/mail/*",
    "var/spool/mail/*",
    "var/spool/cron/*",
    "var/lib/dbus/machine-id",
    "var/lib/dhcp/*",
    "var/lib/systemd/random-seed",
    "var/lib/sudo/*",
    "var/cache/apt/archives/*",
];

/// Names that are left out wherever they are.
const LEFT_OUT_NAMES: &[&str] = &[".Xauthority", ".ICEauthority", ".bash_history", "id_rsa", "id_ed25519", "id_ecdsa"];

/// How many paths that were left out are told one by one.
const TOLD: usize = 1000;
/// How many of them the commit's own message names.
const IN_MESSAGE: usize = 20;

/// Distinguishes groups of hard links that were there before from those that
/// are found.
pub(crate) const OLD_LINKS: u32 = 1 << 31;

/// How a desktop becomes a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVersion {
    /// Of which flavour; that of the desktop's image if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flavour: Option<FlavourName>,
    /// Who makes it.
    pub author: String,
    /// Why.
    pub message: String,
    /// Whether desktops are to follow it: moves `default` besides `head`.
    #[serde(default)]
    pub publish: bool,
}

fn lossy<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

/// What became of a desktop's root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Flavour that it is the head of now.
    pub flavour: FlavourName,
    /// The commit.
    pub id: CommitId,
    /// Entries in it.
    pub entries: u64,
    /// Files that were read: the others are as in the version before.
    pub files_read: u64,
    /// What stayed behind, as far as it differs from the version before; a
    /// thousand of them at most. Written down, what is no UTF-8 in them is replaced.
    #[serde(serialize_with = "lossy")]
    pub left_out: Vec<PathBuf>,
    /// How many there were.
    pub left_out_count: u64,
}

/// What a walk through a live root holds against the version before.
pub(crate) struct Past<'a> {
    base: HashMap<&'a Path, &'a Entry>,
    ids: Option<UidRange>,
    mount: u64,
    left_out: RefCell<(Vec<PathBuf>, u64)>,
    read: RefCell<u64>,
    /// Where something else is mounted.
    covered: RefCell<Vec<PathBuf>>,
}

/// What was found in a root.
pub(crate) struct Found {
    pub(crate) entries: Vec<Entry>,
    /// Where something else is mounted.
    pub(crate) covered: Vec<PathBuf>,
    /// What stays behind, and how many of these there are.
    pub(crate) left_out: (Vec<PathBuf>, u64),
    pub(crate) files_read: u64,
}

/// What is to be done about an entry.
pub(crate) enum Look {
    /// It is as it was.
    Same(Entry),
    /// It stays behind; what is below a directory may have to be told all the same.
    LeaveOut,
    /// Something else is mounted there.
    Elsewhere,
    /// It is to be looked at.
    Read,
}

impl<'a> Past<'a> {
    fn new(base: &'a Tree, top: BorrowedFd<'_>, ids: Option<UidRange>) -> io::Result<Self> {
        Ok(Self {
            base: base.entries().iter().map(|entry| (entry.path.as_path(), entry)).collect(),
            ids,
            mount: mount_of(top, c".")?,
            left_out: RefCell::default(),
            read: RefCell::default(),
            covered: RefCell::default(),
        })
    }

    pub(crate) fn look(&self, dir: BorrowedFd<'_>, name: &CStr, path: &Path, stat: &Stat) -> io::Result<Look> {
        if mount_of(dir, name)? != self.mount {
            self.covered.borrow_mut().push(path.to_owned());
            return Ok(Look::Elsewhere);
        }
        let same = self.base.get(path).filter(|entry| is_untouched(entry, stat));
        if is_left_out(path) {
            if same.is_none() {
                note_left_out(&mut self.left_out.borrow_mut(), path);
            }
            return Ok(Look::LeaveOut);
        }
        match same {
            Some(entry) => {
                let mut entry = (*entry).clone();
                if let Node::File { link: link @ 1.., .. } = &mut entry.node {
                    *link |= OLD_LINKS;
                }
                Ok(Look::Same(entry))
            }
            None => {
                *self.read.borrow_mut() += u64::from(rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file());
                Ok(Look::Read)
            }
        }
    }

    /// Owners as they are inside.
    pub(crate) fn inside(&self, mut meta: Meta) -> Meta {
        let Some(ids) = self.ids else { return meta };
        meta.uid = inside(ids, meta.uid);
        meta.gid = inside(ids, meta.gid);
        let attributes = std::mem::take(&mut meta.xattrs);
        meta.xattrs = attributes
            .into_iter()
            .filter_map(|(name, value)| {
                let value = match &*name {
                    b"security.capability" => capability_inside(ids, &value)?,
                    b"system.posix_acl_access" | b"system.posix_acl_default" => acl_inside(ids, value),
                    _ => value,
                };
                Some((name, value))
            })
            .collect();
        meta
    }
}

/// Counts a path that stays behind, and keeps it as long as there are not too many.
pub(crate) fn note_left_out((told, count): &mut (Vec<PathBuf>, u64), path: &Path) {
    *count += 1;
    if told.len() < TOLD {
        told.push(path.to_owned());
    }
}

/// Which mount a name is on.
fn mount_of(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    Ok(statx(dir, name, flags, StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// Whether a file shows the very inode of the image. That has one time, of the
/// file's content; whatever is done to a file, the kernel sets the time of its
/// change to now, and nobody inside can set it to anything else.
fn is_untouched(entry: &Entry, stat: &Stat) -> bool {
    let Node::File { size_bytes, .. } = entry.node else { return false };
    let mtime = entry.meta.mtime_unix_s;
    rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file()
        && (stat.st_ctime, stat.st_ctime_nsec) == (mtime, 0)
        && (stat.st_mtime, stat.st_mtime_nsec) == (mtime, 0)
        && u64::try_from(stat.st_size) == Ok(size_bytes)
}

pub(crate) fn is_left_out(path: &Path) -> bool {
    let names: Vec<&[u8]> = path.iter().map(OsStrExt::as_bytes).collect();
    let listed = LEFT_OUT.iter().any(|pattern| {
        let mut parts = pattern.split('/').enumerate();
        parts.all(|(at, part)| names.get(at).is_some_and(|name| glob::matches(part.as_bytes(), name)))
    });
    listed || names.iter().any(|name| LEFT_OUT_NAMES.iter().any(|left| left.as_bytes() == *name))
}

/// An id of the host as it is inside; those of nobody inside are nobody's.
///
/// Source: Linux `include/linux/highuid.h`, `DEFAULT_OVERFLOWUID`.
const fn inside(ids: UidRange, id: u32) -> u32 {
    const NOBODY: u32 = 65_534;
    match id.checked_sub(ids.base()) {
        Some(inside) if inside < UidRange::LEN => inside,
        _ => NOBODY,
    }
}

/// Capabilities of a file as an image has them: whose root they are for is said
/// by the image's mount. Those of another namespace's root are nobody's here.
///
/// Source: Linux `include/uapi/linux/capability.h`, `vfs_ns_cap_data`.
fn capability_inside(ids: UidRange, value: &[u8]) -> Option<Vec<u8>> {
    const REVISION_2: u8 = 2;
    const REVISION_3: u8 = 3;
    match (value.len(), value.get(3)) {
        (20, Some(&REVISION_2)) => Some(value.to_vec()),
        (24, Some(&REVISION_3)) => {
            let root = u32::from_le_bytes(value.get(20..24)?.try_into().ok()?);
            let mut plain = value.get(..20)?.to_vec();
            *plain.get_mut(3)? = REVISION_2;
            (root == ids.base()).then_some(plain)
        }
        _ => None,
    }
}

/// An access control list with ids as they are inside.
///
/// Source: Linux `include/uapi/linux/posix_acl_xattr.h`: a version, then entries
/// of tag, permissions and id; ids count for named users (2) and groups (8).
fn acl_inside(ids: UidRange, mut value: Vec<u8>) -> Vec<u8> {
    for entry in value.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
        let (head, id) = entry.split_at_mut(4);
        if matches!(head, [2 | 8, 0, ..])
            && let Ok(host) = <[u8; 4]>::try_from(&*id)
        {
            id.copy_from_slice(&inside(ids, u32::from_le_bytes(host)).to_le_bytes());
        }
    }
    value
}

impl Repository {
    /// Makes a version of what a root on the commit `base` holds now: `top` is its
    /// directory, whose owners are shifted by `ids`. Nothing in it may change
    /// meanwhile, or the version is of no one moment. Files that are as in `base`
    /// are not read; [`LEFT_OUT`] stays behind, and is as in `base`. Mounts are not entered.
    ///
    /// # Errors
    /// [`Error::TagMoved`] when the flavour's head is another commit than `base`:
    /// a version of this root would undo that one's changes. Or something cannot be
    /// read, or cannot be in a tree.
    pub fn capture(
        &self,
        base: CommitId,
        top: BorrowedFd<'_>,
        ids: Option<UidRange>,
        new: &NewVersion,
    ) -> Result<Version, Error> {
        let what = Path::new("the desktop's root");
        self.capture_by(base, new, |staging, before| {
            let past = Past::new(before, top, ids).map_err(Error::io("read", what))?;
            let entries = staging.scan_live(what, top, &past, IMPORT_MAX_BYTES)?;
            let left_out = past.left_out.take();
            Ok(Found { entries, covered: past.covered.take(), left_out, files_read: past.read.take() })
        })
    }

    /// Makes a version of what `find` finds beside the version before.
    pub(crate) fn capture_by(
        &self,
        base: CommitId,
        new: &NewVersion,
        find: impl FnOnce(&Staging<'_>, &Tree) -> Result<Found, Error>,
    ) -> Result<Version, Error> {
        let old = self.whole(base)?;
        let Content::Tree { id, .. } = old.content else {
            let missing = Missing::Design("a disk's history is made of disks".to_owned());
            return Err(Error::Unsupported { op: "make a version of a root", missing });
        };
        let flavour = new.flavour.clone().unwrap_or_else(|| old.config.flavour.clone());
        let head = self.tagged(&flavour, &Tag::head())?;
        if flavour == old.config.flavour && head != Some(base) {
            return Err(Error::TagMoved { flavour, tag: Tag::head() });
        }
        let before = self.tree(id)?;
        let staging = self.stage()?;
        let Found { mut entries, covered, left_out: (left_out, left_out_count), files_read } = find(&staging, &before)?;
        restore(&mut entries, &before, &covered);
        let tree = Tree::new(entries)?;

        let tree_id = staging.tree(&tree)?;
        let content =
            Content::Tree { id: tree_id, entries: tree.entries().len() as u64, size_bytes: tree.size_bytes() };
        staging.settle()?;
        let mut config = old.config;
        config.flavour = flavour.clone();
        let mut commit = Commit::new(content, config, new.author.clone(), SystemTime::now());
        // What it was made from, and what it follows in another flavour.
        commit.parents = head.into_iter().chain((head != Some(base)).then_some(base)).collect();
        commit.message = message(&new.message, &left_out, left_out_count);
        if let Some(list) = packages::read(self, &tree)? {
            commit.packages = staging.put_bytes(&list.encode()).map_err(Error::io("write below", self.dir()))?.0;
            staging.settle()?;
        }
        let id = staging.commit(&commit)?;
        let by = (new.author.as_str(), new.message.as_str());
        self.advance(&flavour, head, id, new.publish, by)?;
        let entries = tree.entries().len() as u64;
        Ok(Version { flavour, id, entries, files_read, left_out, left_out_count })
    }
}

/// Puts back what the version before had in the places of what was left out and
/// below mounts, as far as the directory is still there.
fn restore(entries: &mut Vec<Entry>, before: &Tree, covered: &[PathBuf]) {
    let mut there: BTreeSet<PathBuf> = entries.iter().map(|entry| entry.path.clone()).collect();
    let directories = entries.iter().filter(|entry| matches!(entry.node, Node::Directory));
    let mut directories: BTreeSet<PathBuf> = directories.map(|entry| entry.path.clone()).collect();
    for entry in before.entries() {
        let in_place = entry.path.parent().is_some_and(|parent| directories.contains(parent));
        let unseen = is_left_out(&entry.path) || covered.iter().any(|mount| entry.path.starts_with(mount));
        if !unseen || !in_place || !there.insert(entry.path.clone()) {
            continue;
        }
        let mut entry = entry.clone();
        match &mut entry.node {
            Node::Directory => drop(directories.insert(entry.path.clone())),
            Node::File { link: link @ 1.., .. } => *link |= OLD_LINKS,
            _ => {}
        }
        entries.push(entry);
    }
}

fn message(said: &str, left_out: &[PathBuf], count: u64) -> String {
    if left_out.is_empty() {
        return said.to_owned();
    }
    let plain = |path: &PathBuf| path.to_string_lossy().replace(char::is_control, "?");
    let mut lines: Vec<_> = left_out.iter().take(IN_MESSAGE).map(|path| format!("  /{}", plain(path))).collect();
    if count > lines.len() as u64 {
        lines.push(format!("  and {} more", count - lines.len() as u64));
    }
    format!("{said}\n\nLeft out:\n{}", lines.join("\n"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_left_out_and_their_neighbours_are_not() {
        for path in [
            "etc/machine-id",
            "etc/ssh/ssh_host_ed25519_key",
            "var/log/apt/term.log",
            "home/ana/notes",
            "root/.ssh/id_rsa",
            "srv/app/.bash_history",
            "tmp/x/y",
        ] {
            assert!(is_left_out(path.as_ref()), "{path}");
        }
        for path in ["etc", "etc/ssh/sshd_config", "var/log", "home", "tmp", "etc/machine-identity", "usr/bin/sh", ""] {
            assert!(!is_left_out(path.as_ref()), "{path}");
        }
    }

    #[test]
    fn owners_capabilities_and_lists_are_those_of_inside() {
        let ids = UidRange::of_slot(3).unwrap();
        assert_eq!((inside(ids, ids.base()), inside(ids, ids.base() + 1000)), (0, 1000));
        assert_eq!((inside(ids, 0), inside(ids, ids.base() + UidRange::LEN)), (65_534, 65_534));

        let mut namespaced = vec![1, 0, 0, 3];
        namespaced.extend([0; 16]);
        namespaced.extend(ids.base().to_le_bytes());
        let plain = capability_inside(ids, &namespaced).unwrap();
        assert_eq!((plain.len(), &plain[..4]), (20, &[1, 0, 0, 2][..]));
        namespaced[20] ^= 1;
        assert_eq!(capability_inside(ids, &namespaced), None, "of another root");

        let entry = |tag: u8, id: u32| [&[tag, 0, 6, 0][..], &id.to_le_bytes()].concat();
        let list = |id: u32| [&[2, 0, 0, 0][..], &entry(1, u32::MAX), &entry(2, id)].concat();
        assert_eq!(acl_inside(ids, list(ids.base() + 7)), list(7));
    }
}
