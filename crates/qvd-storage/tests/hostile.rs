//! Archives that were made to do harm.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{Cursor, Read, Seek, SeekFrom, Write},
    path::Path,
};

use qvd_storage::{Error, Repository};
use sha2::{Digest, Sha256};

/// A member, as a header says it.
struct Member<'a> {
    path: &'a str,
    kind: u8,
    link: &'a str,
    content: &'a [u8],
}

const fn file<'a>(path: &'a str, content: &'a [u8]) -> Member<'a> {
    Member { path, kind: b'0', link: "", content }
}

const fn link<'a>(path: &'a str, kind: u8, link: &'a str) -> Member<'a> {
    Member { path, kind, link, content: b"" }
}

fn header(member: &Member<'_>, size: u64) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
    put(0, member.path.as_bytes());
    put(100, b"0000644\x000000000\x000000000\0");
    put(124, format!("{size:011o}").as_bytes());
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[member.kind]);
    put(157, member.link.as_bytes());
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn tar(members: &[Member<'_>]) -> Vec<u8> {
    let mut archive = Vec::new();
    for member in members {
        archive.extend(header(member, member.content.len() as u64));
        archive.extend(member.content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.extend([0; 1024]);
    archive
}

fn repository() -> (tempfile::TempDir, Repository) {
    let dir = tempfile::tempdir().unwrap();
    let repository = Repository::open(&dir.path().join("repository")).unwrap();
    (dir, repository)
}

/// Imports an archive and returns why it was refused, after a look at what is left.
fn refused(archive: &[u8]) -> String {
    let (dir, repository) = repository();
    let path = dir.path().join("archive");
    fs::write(&path, archive).unwrap();
    let staging = repository.stage().unwrap();
    let error = staging.import(&path, 1 << 30).unwrap_err();
    drop(staging);
    assert!(matches!(error, Error::Import { .. }), "{error:?}");
    assert_eq!(fs::read_dir(repository.dir().join("incoming")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(repository.dir().join("objects")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    error.to_string()
}

#[test]
fn what_leads_out_or_deceives_is_refused_by_name() {
    let x = b"x".as_slice();
    let cases: &[(&[Member<'_>], &str)] = &[
        (&[file("../evil", x)], "`../evil` leads out"),
        (&[file("a/../../evil", x)], "leads out"),
        (&[file("/etc/evil", x)], "`/etc/evil` is an absolute name"),
        (&[link("a", b'2', "/etc"), file("a/evil", x)], "`a/evil` goes through `a`"),
        (&[link("a", b'2', "../.."), file("a/b/evil", x)], "goes through `a`"),
        (&[link("evil", b'1', "/etc/shadow")], "hard link to `/etc/shadow`"),
        (&[link("evil", b'1', "../../etc/shadow")], "hard link to `../../etc/shadow`"),
        (&[link("evil", b'1', "later"), file("later", x)], "not in the archive before it"),
        (&[link("evil", b'3', "")], "`evil` is a device node"),
        (&[link("evil", b'4', "")], "device node"),
        (&[file("a", x), file("a", b"y")], "`a` is in the archive twice"),
        (&[file("a", x), link("a", b'2', "b")], "twice"),
        (&[file("a/b", x), file("a", x)], "something was in it before"),
        (&[file("a//b", x)], "no plain path"),
        (&[file("a", x), file("a/b", x)], "goes through `a`"),
        (&[link("a", b'S', "")], "sparse"),
        (&[link("a", b'V', "")], "unknown"),
        (&[Member { path: "p", kind: b'x', link: "", content: b"99 path=../evil\n" }], "not made of records"),
        (
            &[Member { path: "p", kind: b'x', link: "", content: b"16 path=../evil\n" }, file("a", x)],
            "`../evil` leads out",
        ),
        (&[Member { path: "p", kind: b'L', link: "", content: b"../evil\0" }, file("a", x)], "`../evil` leads out"),
        (&[Member { path: "p", kind: b'x', link: "", content: b"22 GNU.sparse.major=1\n" }, file("a", x)], "sparse"),
        (&[link("a", b'2', "")], "leads nowhere"),
    ];
    for (members, reason) in cases {
        let found = refused(&tar(members));
        assert!(found.contains(reason), "{found} instead of {reason}");
    }
}

#[test]
fn broken_archives_are_refused() {
    let whole = tar(&[file("a", &[7; 2000]), file("b", b"x")]);
    let mut sum = whole.clone();
    sum[0] = b'z';
    assert!(refused(&sum).contains("does not have the sum"), "{}", refused(&sum));
    for len in [100, 512, 513, 1500, 2559, 2600] {
        let found = refused(&whole[..len]);
        assert!(found.contains("ends in the middle"), "{len}: {found}");
    }
    // A length that nothing is behind, and extension headers that fill memory.
    let mut long = header(&file("a", b""), 0o77777777777).to_vec();
    long.extend([0; 512]);
    assert!(refused(&long).contains("ends in the middle"));
    for kind in [b'x', b'g', b'L', b'K'] {
        let huge = header(&Member { path: "p", kind, link: "", content: b"" }, 5 << 30);
        assert!(refused(&huge).contains("extension header has"), "{}", refused(&huge));
    }
    let mut negative = header(&file("a", b""), 0);
    negative[124..136].copy_from_slice(&[0xff; 12]);
    negative[148..156].copy_from_slice(b"        ");
    let sum: u32 = negative.iter().map(|b| u32::from(*b)).sum();
    negative[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert!(refused(&negative).contains("no number"), "{}", refused(&negative));
    assert!(refused(b"this is no archive at all, whatever its name is").contains("ends in the middle"));
}

#[test]
fn bombs_are_refused_before_they_fill_anything() {
    let bomb = || Cursor::new(header(&file("bomb", b""), 7 << 30)).chain(std::io::repeat(0)).take(900 << 20);
    let mut zst = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    std::io::copy(&mut bomb(), &mut zst).unwrap();
    let zst = zst.finish().unwrap();
    assert!(zst.len() < 1 << 20);
    assert!(refused(&zst).contains("times its size"), "{}", refused(&zst));
    // Not compressed, but sparse: more than is allowed.
    let (dir, repository) = repository();
    let mut sparse = fs::File::create(dir.path().join("sparse")).unwrap();
    sparse.write_all(&header(&file("bomb", b""), 6 << 30)).unwrap();
    sparse.seek(SeekFrom::Start(7 << 30)).unwrap();
    sparse.write_all(&[0; 1024]).unwrap();
    let staging = repository.stage().unwrap();
    let error = staging.import(&dir.path().join("sparse"), 64 << 20).unwrap_err();
    assert!(error.to_string().contains("more than the 67108864 bytes"), "{error}");
}

/// An OCI archive of one layer, with its digests as given.
fn oci(layer: &[u8], digest: Option<&str>, layers: usize) -> Vec<u8> {
    let of = |bytes: &[u8]| -> String { Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect() };
    let config = b"{}";
    let layer_digest = digest.map_or_else(|| format!("sha256:{}", of(layer)), str::to_owned);
    let one = format!(r#"{{"mediaType":"x","digest":"{layer_digest}","size":{}}}"#, layer.len());
    let manifest = format!(
        r#"{{"config":{{"digest":"sha256:{}","size":2}},"layers":[{}]}}"#,
        of(config),
        vec![one; layers].join(",")
    );
    let index = format!(
        r#"{{"manifests":[{{"mediaType":"m","digest":"sha256:{}","size":{}}}]}}"#,
        of(manifest.as_bytes()),
        manifest.len()
    );
    let blob = |bytes: &[u8]| format!("blobs/sha256/{}", of(bytes));
    tar(&[
        file(&blob(layer), layer),
        file(&blob(config), config),
        file(&blob(manifest.as_bytes()), manifest.as_bytes()),
        file("index.json", index.as_bytes()),
        file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
    ])
}

#[test]
fn an_oci_archive_is_what_its_digests_say_or_refused() {
    let layer = tar(&[file("a", b"x")]);
    let (dir, repository) = repository();
    let path = dir.path().join("archive");
    fs::write(&path, oci(&layer, None, 1)).unwrap();
    let tree = repository.stage().unwrap().import(&path, 1 << 30).unwrap();
    assert!(tree.get(Path::new("a")).is_some());
    let wrong = format!("sha256:{}", "0".repeat(64));
    assert!(refused(&oci(&layer, Some(&wrong), 1)).contains("has no blob"));
    for path in ["sha256:../../../../etc/shadow", "sha256:", "md5:00", "/etc/shadow"] {
        let found = refused(&oci(&layer, Some(path), 1));
        assert!(found.contains("sha256:"), "{found}");
    }
    // A blob that was changed after its name was given.
    let archive = oci(&layer, None, 1);
    let mut changed = archive.clone();
    // The content of `a`, two headers into the archive.
    changed[1024] = b'y';
    assert!(refused(&changed).contains("not what its digest"), "{}", refused(&changed));
    assert!(refused(&oci(&layer, None, 600)).contains("600 layers"));
}

#[test]
fn layers_take_away_what_is_below_them() {
    let of = |bytes: &[u8]| -> String { Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect() };
    let lower = tar(&[file("etc/a", b"1"), file("etc/b", b"2"), file("var/x", b"3"), file("gone/deep/f", b"4")]);
    let upper =
        tar(&[file("etc/.wh.a", b""), file("var/new", b"5"), file("var/.wh..wh..opq", b""), link("gone", b'2', "etc")]);
    let config = b"{}";
    let layer = |bytes: &[u8]| format!(r#"{{"digest":"sha256:{}","size":{}}}"#, of(bytes), bytes.len());
    let manifest = format!(
        r#"{{"config":{{"digest":"sha256:{}","size":2}},"layers":[{},{}]}}"#,
        of(config),
        layer(&lower),
        layer(&upper)
    );
    let index = format!(r#"{{"manifests":[{{"digest":"sha256:{}","size":1}}]}}"#, of(manifest.as_bytes()));
    let archive = tar(&[
        file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        file("index.json", index.as_bytes()),
        file(&format!("blobs/sha256/{}", of(&lower)), &lower),
        file(&format!("blobs/sha256/{}", of(&upper)), &upper),
        file(&format!("blobs/sha256/{}", of(config)), config),
        file(&format!("blobs/sha256/{}", of(manifest.as_bytes())), manifest.as_bytes()),
    ]);
    let (_dir, repository) = repository();
    let tree = repository.stage().unwrap().import_archive(&mut Cursor::new(archive), 1 << 30).unwrap();
    let paths: Vec<_> = tree.entries().iter().map(|entry| entry.path.to_str().unwrap()).collect();
    assert_eq!(paths, ["", "etc", "etc/b", "gone", "var", "var/new"]);
}
