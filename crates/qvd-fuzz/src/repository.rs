//! What a repository keeps, as somebody may have written it.

use std::{fs, time::SystemTime};

use qvd_core::{Digest, FlavourName, Tag};
use qvd_storage::{
    ImageConfig,
    repository::{
        Commit, Content, DISK_BLOCK_BYTES, Due, Expect, Packages, Policy, Reference, SigningKey, Tree, VerifyingKey,
    },
};

use crate::{
    World,
    parts::{of, split},
    world::FLAVOUR,
};

/// A commit.
pub(crate) fn commit(_: &World, bytes: &[u8]) -> bool {
    Commit::decode(bytes).is_ok_and(|(id, commit)| {
        assert_eq!(id, Commit::id_of(bytes));
        let (canonical, encoded) = commit.encode().unwrap();
        assert_eq!(Commit::decode(&encoded).unwrap(), (canonical, commit));
        true
    })
}

/// The list of entries of a tree, and the EROFS that is made of it.
pub(crate) fn tree(world: &World, bytes: &[u8]) -> bool {
    let Ok((id, tree)) = Tree::decode(bytes) else { return false };
    assert_eq!(tree.encode(), (id, bytes.to_vec()));
    let staging = world.repository.stage().unwrap();
    // Its contents may be missing: only then it is refused.
    if let Err(error) = staging.tree(&tree) {
        assert!(error.to_string().contains("is damaged"), "{error}");
    }
    true
}

/// The list of blocks of a disk, behind the length of the disk.
pub(crate) fn blocks(world: &World, bytes: &[u8]) -> bool {
    let Some((size, list)) = bytes.split_first_chunk::<4>() else { return false };
    let size_bytes = u64::from(u32::from_le_bytes(*size)) % (64 << 20);
    let staging = world.repository.stage().unwrap();
    let (Some(blocks), _) = staging.put_bytes(list).unwrap() else { return false };
    let content = Content::Disk { blocks, block_bytes: DISK_BLOCK_BYTES, size_bytes };
    let config = ImageConfig::plain(FLAVOUR.parse().unwrap());
    let Ok(id) = staging.commit(&Commit::new(content, config, "ana", SystemTime::UNIX_EPOCH)) else { return false };
    drop(staging);
    let to = world.at("disk.raw");
    let written = world.repository.materialise(id, &to).is_ok();
    assert_eq!(written, to.exists());
    if written {
        assert_eq!(fs::metadata(&to).unwrap().len(), size_bytes);
        fs::remove_file(to).unwrap();
    }
    written
}

/// Names that people and other hosts give.
pub(crate) fn names(_: &World, bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let plain = |name: &str| assert!(!name.contains(['/', '\0']) && !matches!(name, "" | "." | ".."), "{name:?}");
    let flavour = text.parse::<FlavourName>().inspect(|name| plain(name.as_str())).is_ok();
    let tag = text.parse::<Tag>().inspect(|name| plain(name.as_str())).is_ok();
    let digest = text.parse::<Digest>().inspect(|digest| assert_eq!(digest.hex().len(), 64)).is_ok();
    let reference = text.parse::<Reference>().inspect(|found| {
        assert_eq!(found.to_string().parse::<Reference>().as_ref(), Ok(found));
    });
    flavour || tag || digest || reference.is_ok()
}

/// A tag, its reflog and its rollout.
pub(crate) fn tags(world: &World, bytes: &[u8]) -> bool {
    let parts = split(bytes);
    let (flavour, tag) = (FLAVOUR.parse().unwrap(), Tag::default_tag());
    let dir = world.repository.dir().join("flavours").join(FLAVOUR);
    let mut kept = Vec::new();
    for (kind, name) in [(b't', "tags"), (b'l', "reflog"), (b'r', "rollout")] {
        let path = dir.join(name).join(tag.as_str());
        kept.push((path.clone(), fs::read(&path).ok()));
        if let Some(part) = of(&parts, kind).first() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, part).unwrap();
        }
    }
    let repository = &world.repository;
    drop(repository.tags(&flavour));
    if let Ok(followed) = repository.followed(&flavour, &tag) {
        // Whoever runs what it would get has nothing to expect.
        let due = followed.due("1", followed.commit("1"), SystemTime::now());
        assert_eq!(due, Due::Nothing);
    }
    drop(repository.reflog(&flavour, &tag));
    drop(repository.fsck(None));
    let taken = repository.tagged(&flavour, &tag).is_ok();
    let moved = repository.move_tag(&flavour, &tag, Expect::Anything, Some(world.commit), ("ana", "again"));
    assert_eq!(moved.is_ok(), taken, "{moved:?}");
    if taken {
        assert_eq!(repository.tagged(&flavour, &tag).unwrap(), Some(world.commit));
        assert_eq!(repository.reflog(&flavour, &tag).unwrap().last().unwrap().to, Some(world.commit));
    }
    for (path, content) in kept {
        match content {
            Some(content) => fs::write(path, content).unwrap(),
            None => drop(fs::remove_file(path)),
        }
    }
    taken
}

/// Keys, as `minisign` writes them.
pub(crate) fn keys(_: &World, bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let public =
        VerifyingKey::read(text).inspect(|key| assert_eq!(VerifyingKey::read(&key.to_line()).as_ref().ok(), Some(key)));
    public.is_ok() || SigningKey::read(text, None).is_ok()
}

/// A signature of a commit that nobody signed: whatever it says, the commit
/// stays refused.
pub(crate) fn signature(world: &World, bytes: &[u8]) -> bool {
    let repository = &world.repository;
    let (_, demanded, _) = SigningKey::generate().unwrap();
    let dir = repository.dir().join("signatures");
    fs::create_dir_all(&dir).unwrap();
    let path = dir.join(format!("{}.0123456789ABCDEF", world.commit.hex()));
    fs::write(&path, bytes).unwrap();
    repository.set_policy(Some(&Policy { keys: vec![demanded] })).unwrap();
    let read = repository.signers(world.commit).is_ok_and(|signers| !signers.is_empty());
    repository.base(world.commit).unwrap_err();
    repository.set_policy(None).unwrap();
    fs::remove_file(path).unwrap();
    read
}

/// A database of RPM, in each of its forms.
pub(crate) fn rpm(_: &World, bytes: &[u8]) -> bool {
    let list =
        Packages::of_rpm(bytes).inspect(|list| assert_eq!(Packages::decode(&list.encode()).as_ref(), Some(list)));
    list.is_some_and(|list| !list.versions.is_empty())
}

/// Lists of packages: dpkg's, and ours.
pub(crate) fn packages(_: &World, bytes: &[u8]) -> bool {
    let status = Packages::of_dpkg(&String::from_utf8_lossy(bytes));
    assert_eq!(Packages::decode(&status.encode()).as_ref(), Some(&status));
    let ours =
        Packages::decode(bytes).inspect(|list| assert_eq!(Packages::decode(&list.encode()).as_ref(), Some(list)));
    ours.is_some() || !status.versions.is_empty()
}
