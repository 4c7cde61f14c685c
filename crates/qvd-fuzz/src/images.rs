//! What images are made of: archives, disks, recipes.

use std::{fs, io::Cursor};

use qvd_storage::{
    DiskFormat, Recipe,
    qcow2::{self, BackingPolicy, Chain, Header, Image, Repair},
    repository::{NewVersion, Tree},
};
use sha2::{Digest, Sha256};

use crate::{World, parts::split, world::entries};

/// Most that an input may expand to, in bytes.
const MAX_BYTES: u64 = 4 << 20;

/// A tar, with or without compression, or an OCI archive.
pub(crate) fn archive(world: &World, bytes: &[u8]) -> bool {
    let taken = {
        let staging = world.repository.stage().unwrap();
        staging.import_archive(&mut Cursor::new(bytes), MAX_BYTES).is_ok_and(|tree| {
            let (id, encoded) = tree.encode();
            assert_eq!(Tree::decode(&encoded).unwrap(), (id, tree.clone()));
            // What it is mounted from can be made of whatever was taken.
            staging.tree(&tree).unwrap();
            true
        })
    };
    assert_eq!(entries(&world.repository.dir().join("incoming")), 0);
    taken
}

/// What a machine tells of its root, with what it packs behind it.
pub(crate) fn told(world: &World, bytes: &[u8]) -> bool {
    let new = NewVersion {
        flavour: Some("told".parse().unwrap()),
        author: "ana".to_owned(),
        message: "told".to_owned(),
        publish: false,
    };
    let made = world.repository.capture_told(world.commit, &mut &*bytes, std::io::sink(), MAX_BYTES, &new);
    assert_eq!(entries(&world.repository.dir().join("incoming")), 0);
    made.is_ok_and(|version| {
        let commit = world.repository.commit(version.id).unwrap();
        assert_eq!(world.repository.tree_of(&commit).unwrap().entries().len() as u64, version.entries);
        true
    })
}

/// The documents of an OCI archive, in the order in which one names the other:
/// `$0` in one is the digest of the first, `#0` its length. What is named stays
/// right, whatever becomes of the documents.
pub(crate) fn oci(world: &World, bytes: &[u8]) -> bool {
    let (mut files, mut named) = (Vec::new(), Vec::<(String, usize)>::new());
    for (kind, part) in split(bytes) {
        let mut part = part.to_vec();
        if kind == b'j' {
            let mut text = String::from_utf8_lossy(&part).into_owned();
            for (number, (digest, len)) in named.iter().enumerate() {
                text = text.replace(&format!("${number}"), &format!("sha256:{digest}"));
                text = text.replace(&format!("#{number}"), &len.to_string());
            }
            part = text.into_bytes();
        }
        let digest: String = Sha256::digest(&part).iter().map(|byte| format!("{byte:02x}")).collect();
        files.push((format!("blobs/sha256/{digest}"), part.clone()));
        named.push((digest, part.len()));
    }
    if let Some((name, _)) = files.last_mut() {
        "index.json".clone_into(name);
    }
    files.insert(0, ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    let files: Vec<_> = files.iter().map(|(name, content)| (name.as_str(), content.as_slice())).collect();
    archive(world, &crate::seeds::tar(&files))
}

/// A qcow2, read by both of its readers.
pub(crate) fn qcow2(world: &World, bytes: &[u8]) -> bool {
    let path = world.at("disk.qcow2");
    fs::write(&path, bytes).unwrap();
    let staging = world.repository.stage().unwrap();
    let taken = staging.import_disk(&path, MAX_BYTES).is_ok();
    drop(staging);
    drop(Header::parse(bytes, bytes.len() as u64));
    drop(qcow2::check(&path, Repair::Nothing));
    if let Ok(mut image) = Image::open(fs::File::open(&path).unwrap(), &path) {
        for at in [0, 1 << 16, 1 << 30] {
            drop(image.map(at));
        }
    }
    if let Ok(mut chain) = Chain::open(&path, DiskFormat::Qcow2, &BackingPolicy::nothing()) {
        drop(chain.read_at(&mut [0; 512], 0));
    }
    taken
}

/// A recipe.
pub(crate) fn recipe(_: &World, bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    match Recipe::parse(text) {
        Ok(recipe) => {
            assert_eq!(Recipe::parse(recipe.text()).unwrap().key(), recipe.key());
            true
        }
        Err(error) => {
            assert!(error.line >= 1 && error.line <= text.matches('\n').count() + 1, "{error}");
            assert!(error.column >= 1 && !error.to_string().contains('\n'), "{error}");
            false
        }
    }
}
