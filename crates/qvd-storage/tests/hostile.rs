//! Archives that were made to do harm.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{Cursor, Read, Seek, SeekFrom, Write},
    path::Path,
    process::Command,
    time::SystemTime,
};

use qvd_storage::{
    Error, ImageConfig, Repository,
    repository::{CommitId, NewCommit, NewVersion, Node, Tree, Version},
};
use sha2::{Digest, Sha256};

/// A member, as a header says it.
#[derive(Clone, Copy)]
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
    refused_beyond(archive, 1 << 30)
}

/// The same where so many bytes are allowed.
fn refused_beyond(archive: &[u8], max_bytes: u64) -> String {
    let (dir, repository) = repository();
    let path = dir.path().join("archive");
    fs::write(&path, archive).unwrap();
    let staging = repository.stage().unwrap();
    let error = staging.import(&path, max_bytes).unwrap_err();
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

/// The archive of a large file of zeroes, compressed by `program`: its start, then
/// the same piece as often as it takes, as each of these formats allows.
fn bomb(program: &str, args: &[&str]) -> Vec<u8> {
    let packed = |bytes: &[u8]| {
        let mut plain = tempfile::tempfile().unwrap();
        plain.write_all(bytes).unwrap();
        plain.rewind().unwrap();
        let packed = Command::new(program).args(args).stdin(plain).output().unwrap();
        assert!(packed.status.success(), "{program}");
        packed.stdout
    };
    let piece = packed(&[0; 8 << 20]);
    [packed(&header(&file("bomb", b""), 7 << 30)), piece.repeat(40)].concat()
}

#[test]
fn a_directory_of_endless_files_is_refused_before_they_are_read() {
    let (dir, repository) = repository();
    let tree = dir.path().join("tree/etc");
    fs::create_dir_all(&tree).unwrap();
    fs::File::create(tree.join("endless")).unwrap().set_len(1 << 42).unwrap();
    let staging = repository.stage().unwrap();
    let error = staging.import(&dir.path().join("tree"), 64 << 20).unwrap_err();
    let error = qvd_core::causes(&error).join(": ");
    assert!(error.contains("tree/etc/endless") && error.contains("more than 67108864 bytes"), "{error}");
}

#[test]
fn bombs_are_refused_before_they_fill_anything() {
    for (program, args) in [("gzip", ["-9c"].as_slice()), ("xz", &["-1c"]), ("bzip2", &["-9c"])] {
        let bomb = bomb(program, args);
        assert!(bomb.len() < 1 << 20, "{program}: {}", bomb.len());
        let reason = refused_beyond(&bomb, 20 << 20);
        assert!(reason.contains("`bomb` it has more than the 20971520 bytes"), "{program}: {reason}");
    }
    let zeroes = zstd::encode_all([0; 8 << 20].as_slice(), 1).unwrap().repeat(40);
    let zst = [zstd::encode_all(header(&file("bomb", b""), 7 << 30).as_slice(), 1).unwrap(), zeroes].concat();
    let reason = refused(&zst);
    assert!(reason.contains("`bomb` it expands to more than 100 times its size"), "{reason}");
    // One that asks for more memory than it may: a window of 1 GiB. Source: RFC 8878, 3.1.1.1.2.
    let window = [&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa0][..], &[0; 64]].concat();
    assert!(refused(&window).contains("emory"), "{}", refused(&window));
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

/// An archive of as many members as somebody reads, whose names have `len` bytes,
/// in parts of `part` each.
struct Endless {
    len: usize,
    part: usize,
    next: u64,
    member: Cursor<Vec<u8>>,
}

impl Endless {
    fn new(len: usize, part: usize) -> Self {
        Self { len, part, next: 0, member: Cursor::default() }
    }
}

impl Read for Endless {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        if self.member.position() == self.member.get_ref().len() as u64 {
            // It counts up from its first part on.
            let digits = format!("{:<width$}", format!("{:09}", self.next), width = self.len).replace(' ', "x");
            let mut parts = Vec::new();
            let mut rest = digits.as_str();
            while !rest.is_empty() {
                let len = if parts.is_empty() { 9 } else { self.part };
                let (part, behind) = rest.split_at(len.min(rest.len()));
                parts.push(part);
                rest = behind;
            }
            let path = parts.join("/");
            let mut member = Vec::new();
            if path.len() > 99 {
                member.extend(header(&Member { path: "l", kind: b'L', link: "", content: b"" }, path.len() as u64));
                member.extend(path.as_bytes());
                member.resize(member.len().next_multiple_of(512), 0);
            }
            member.extend(header(&file(&path[..path.len().min(99)], b""), 0));
            self.member = Cursor::new(member);
            self.next += 1;
        }
        self.member.read(to)
    }
}

impl Seek for Endless {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        assert_eq!(to, SeekFrom::Start(0));
        *self = Self::new(self.len, self.part);
        Ok(0)
    }
}

/// Most memory that this process has had, in bytes. Source: proc_pid_status(5).
fn memory_peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Imports it, and says why that was refused and how much memory it took.
fn endless(len: usize, part: usize) -> (String, u64) {
    let (_dir, repository) = repository();
    let staging = repository.stage().unwrap();
    let before = memory_peak();
    let error = staging.import_archive(&mut Endless::new(len, part), u64::MAX).unwrap_err();
    let taken = memory_peak() - before;
    assert_eq!(fs::read_dir(repository.dir().join("objects")).unwrap().count(), 0);
    (std::error::Error::source(&error).unwrap().to_string(), taken)
}

#[test]
fn an_archive_of_long_names_is_refused_while_memory_lasts() {
    // Each implies two thousand directories, all with long paths.
    let (reason, taken) = endless(2000, 1);
    assert!(reason.contains("is one too many") && reason.contains("than their names may take"), "{reason}");
    assert!(taken < 1 << 30, "{taken}");
}

#[test]
#[ignore = "it reads two million headers, which takes a minute in a build that is not optimised"]
fn an_archive_that_does_not_end_is_refused_while_memory_lasts() {
    let (reason, taken) = endless(9, 9);
    // The root is the first of two millions.
    assert!(reason.contains("`001999999` is one too many: more than 2000000 entries"), "{reason}");
    assert!(taken < 1 << 30, "{taken}");
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

/// A machine's image of one file, as a repository has it.
fn machine() -> (tempfile::TempDir, Repository, CommitId) {
    let (dir, repository) = repository();
    let archive = tar(&[file("etc/motd", b"hello"), file("etc/machine-id", b"-")]);
    let staging = repository.stage().unwrap();
    let tree = staging.import_archive(&mut Cursor::new(archive), u64::MAX).unwrap();
    let new = NewCommit {
        config: ImageConfig::plain("tiny".parse().unwrap()),
        author: "ana".to_owned(),
        message: "first".to_owned(),
        time: SystemTime::UNIX_EPOCH,
        recipe: None,
        publish: false,
    };
    let id = repository.commit_tree(&staging, &tree, new).unwrap();
    drop(staging);
    (dir, repository, id)
}

/// What a machine tells of, with an archive behind it, becomes a version or not.
fn told(records: &[&str], archive: &[u8]) -> (Result<(Version, Tree), String>, Vec<u8>) {
    let (_dir, repository, base) = machine();
    let list: Vec<u8> = records.iter().flat_map(|record| [record.as_bytes(), b"\0"].concat()).collect();
    let mut said = Cursor::new([&list[..], archive].concat());
    let mut asked = Vec::new();
    let new = NewVersion { flavour: None, author: "ana".to_owned(), message: "told".to_owned(), publish: false };
    let made = repository.capture_told(base, &mut said, &mut asked, 1 << 20, &new);
    let head = repository.resolve(&"tiny".parse().unwrap()).unwrap();
    let made = match made {
        Ok(version) => {
            let tree = repository.tree_of(&repository.commit(version.id).unwrap()).unwrap();
            Ok((version, tree))
        }
        Err(error) => {
            assert_eq!(head, base, "nothing moved");
            assert_eq!(fs::read_dir(repository.dir().join("incoming")).unwrap().count(), 0);
            Err(qvd_core::causes(&error).join(": "))
        }
    };
    (made, asked)
}

#[test]
fn what_a_machine_tells_of_itself_is_not_trusted() {
    const END: &str = "";
    const ROOT: &str = "d 7 0 1.0 1.0 ";
    const ETC: &str = "d 7 0 1.0 1.0 etc";
    const SAME: &str = "f 8 5 0.0000000000 0.0000000000 etc/motd";
    let (root, etc) = (link("./", b'5', ""), link("./etc", b'5', ""));
    let tree = |more: &[Member<'_>]| tar(&[&[root, etc], more].concat());

    // What did not change is not asked for; what is not asked for is not taken.
    let new = "f 8 3 9.5 9.5 etc/new";
    let given = tree(&[file("./etc/new", b"new"), file("./etc/more", b"more")]);
    let (made, asked) = told(&[ROOT, ETC, SAME, new, "f 8 9 9.5 9.5 etc/machine-id", END], &given);
    let (version, after) = made.unwrap();
    assert_eq!(asked, b"./\0./etc\0./etc/new\0");
    assert_eq!((version.files_read, version.left_out_count, version.entries), (1, 1, 5));
    assert!(after.get(Path::new("etc/more")).is_none());
    let Node::File { size_bytes, .. } = after.get(Path::new("etc/machine-id")).unwrap().node else { panic!() };
    assert_eq!(size_bytes, 1, "as in the version before");

    let cases: &[(&[&str], &[u8], &str)] = &[
        (&[ROOT, ETC, new], b"", "it ended while it told"),
        (&[ROOT, "nonsense", END], b"", "it told `nonsense`"),
        (&[ROOT, ETC, new, END], &tree(&[]), "`/etc/new` was asked for and not given"),
        (&[ROOT, ETC, new, END], &tree(&[])[..700], "ends in the middle"),
        (&[ROOT, "f 8 1 9.5 9.5 ../evil", END], &tar(&[file("../evil", b"x")]), "leads out"),
        (&[ROOT, "f 8 1 9.5 9.5 /etc/evil", END], &tar(&[file("/etc/evil", b"x")]), "absolute name"),
        (&[ROOT, ETC, new, END], &tree(&[link("./etc/new", b'3', "")]), "device node"),
        (&[ROOT, ETC, new, END], &tree(&[link("./etc/new", b'1', "/etc/shadow")]), "hard link to `/etc/shadow`"),
        (&[ROOT, ETC, SAME, SAME, END], &tree(&[]), "twice"),
        (&[ROOT, ETC, new, END], &tree(&[file("./etc/new", &[7; 2 << 20])]), "ends in the middle"),
    ];
    for (records, archive, reason) in cases {
        let refused = told(records, archive).0.unwrap_err();
        assert!(refused.contains(reason), "{refused} instead of {reason}");
    }
}
