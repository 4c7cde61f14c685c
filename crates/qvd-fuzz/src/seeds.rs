//! Inputs to begin with: some of each kind that a target takes.

use qvd_core::Instance;
use qvd_net::Mac;
use qvd_storage::{
    ImageConfig,
    repository::{Commit, Content, Entry, Meta, Node, Tree},
};

use crate::{World, exchange, parts::join, store, world::FLAVOUR};

/// The seeds of a target, the first of them one that it takes. They are the same
/// in each world.
///
/// # Panics
/// There is no such target.
#[must_use]
pub fn seeds(target: &str, world: &World) -> Vec<Vec<u8>> {
    match target {
        "archive" => archives(),
        "blocks" => blocks(world),
        "commit" => commits(world),
        "frames" => vec![discover()],
        "guest" => guests(),
        "keys" => vec![PUBLIC_KEY.into(), SECRET_KEY.into()],
        "log" => vec![logged()],
        "names" => ["icewm", "icewm:default", "icewm@01ab", "sha256:00", "tiny@sha256:0123456789"]
            .map(|name| name.as_bytes().to_vec())
            .into(),
        "oci" => oci(),
        "packages" => vec![DPKG_STATUS.into(), b"qvd-packages-1 dpkg\nlibc6:amd64 2.36\nbase:all 1:2~3\n".to_vec()],
        "pull" => vec![exchange::recorded(world)],
        "qcow2" => disks(),
        "qmp" => vec![QMP.into()],
        "question" => questions(world),
        "receive" => vec![exchange::offered(world)],
        "recipe" => vec![
            include_bytes!("../../../recipes/icewm.toml").to_vec(),
            include_bytes!("../../../recipes/lxde.toml").to_vec(),
            RECIPE.into(),
        ],
        // Made once by SQLite, by RPM's own code and by Berkeley DB, of two packages.
        "rpm" => [
            include_bytes!("../seeds/rpm.sqlite").as_slice(),
            include_bytes!("../seeds/rpm.ndb"),
            include_bytes!("../seeds/rpm.bdb"),
        ]
        .map(<[u8]>::to_vec)
        .into(),
        "signature" => vec![SIGNATURE.into()],
        "store" => store::seeds(world),
        "tags" => tags(world),
        "told" => told(),
        "tree" => trees(world),
        other => panic!("there is no target `{other}`"),
    }
}

const RECIPE: &str = r#"
name = "tiny"
description = "one line"
locale = "de_DE.UTF-8"
packages = ["busybox"]
exclude = ["/usr/share/doc/*"]
remove = ["/boot/*"]
run = [["true", "-x"]]
services = [["cron", "-f"]]
limits = { size = "1GiB", entries = 10 }
base = { distribution = "debian", suite = "bookworm", components = ["main"] }
user = { name = "user", uid = 1000, gid = 1000 }
session = { command = ["x"], autostart = [["y"]], geometry = "1280x800", env = { A = "b" } }
defaults = { root = "volatile", limits = { memory = "1GiB", cpu = 2000, pids = 10 }, net = { port = true } }
[[files]]
path = "/etc/motd"
mode = "0644"
owner = "1:2"
content = "x"
"#;

const DPKG_STATUS: &str = "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9\nDescription: x\n y\n\n\
    Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\nPackage: all\nStatus: install ok installed\nVersion: 1:2~3\n";

const QMP: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \"package\": \"x\"}, \"capabilities\": []}}\r\n\
    {\"return\": {}, \"id\": 0}\r\n{\"event\": \"STOP\", \"data\": {\"a\": [1]}, \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\r\n\
    {\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 1}\r\n";

/// Made for this, and good for nothing else.
const PUBLIC_KEY: &str = include_str!("../seeds/public.key");
const SECRET_KEY: &str = include_str!("../seeds/secret.key");
const SIGNATURE: &str = include_str!("../seeds/signature");

/// A tar of files.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let members: Vec<_> = files.iter().map(|(name, content)| (*name, b'0', "", *content)).collect();
    tar_of(&members)
}

fn tar_of(members: &[(&str, u8, &str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (path, kind, link, content) in members {
        let mut block = [0; 512];
        let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
        put(0, path.as_bytes());
        put(100, b"0000644\x000000000\x000000000\0");
        put(124, format!("{:011o}", content.len()).as_bytes());
        put(136, b"00000000000");
        put(148, b"        ");
        put(156, &[*kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend(block);
        archive.extend(*content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.extend([0; 1024]);
    archive
}

fn archives() -> Vec<Vec<u8>> {
    let plain = tar_of(&[
        ("etc/", b'5', "", b""),
        ("etc/motd", b'0', "", b"welcome\n"),
        ("etc/link", b'2', "motd", b""),
        ("etc/again", b'1', "etc/motd", b""),
        ("pipe", b'6', "", b""),
        ("p", b'x', "", b"29 SCHILY.xattr.user.x=1 2 3\n18 path=long/name\n"),
        ("short", b'0', "", b"x"),
        ("p", b'L', "", b"even/longer/name\0"),
        ("short", b'0', "", b"y"),
    ]);
    let zstd = zstd::encode_all(plain.as_slice(), 3).unwrap();
    // Made once by the programs of these names, of a tar of one empty file.
    let made = [
        include_bytes!("../seeds/tar.gz").as_slice(),
        include_bytes!("../seeds/tar.xz"),
        include_bytes!("../seeds/tar.bz2"),
    ];
    [plain, zstd].into_iter().chain(made.map(<[u8]>::to_vec)).collect()
}

fn told() -> Vec<Vec<u8>> {
    const SAME: &str = "f 8 8 0.0000000000 0.0000000000 etc/motd";
    let list =
        ["d 7 0 1.0 1.0 ", "d 7 0 1.0 1.0 etc", SAME, "l 8 4 9.5 9.5 etc/new", "f 8 1 9.5 9.5 etc/machine-id", ""];
    let list: String = list.iter().map(|record| format!("{record}\0")).collect();
    let packed = tar_of(&[("./", b'5', "", b""), ("./etc", b'5', "", b""), ("./etc/new", b'2', "motd", b"")]);
    vec![[list.into_bytes(), packed].concat()]
}

fn oci() -> Vec<Vec<u8>> {
    let layer = tar(&[("etc/a", b"1"), ("etc/b", b"2")]);
    let upper = tar(&[("etc/.wh.a", b""), ("etc/.wh..wh..opq", b"")]);
    let manifest = br#"{"schemaVersion":2,"config":{"mediaType":"c","digest":"$2","size":#2},"layers":[{"mediaType":"l","digest":"$0","size":#0},{"digest":"$1","size":#1}]}"#;
    let nested = br#"{"manifests":[{"mediaType":"m","digest":"$3","size":#3,"platform":{"os":"linux","architecture":"amd64"}},{"digest":"$3","size":#3}]}"#;
    let index = br#"{"manifests":[{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"$4","size":#4}]}"#;
    let parts: [(u8, &[u8]); 6] =
        [(b'l', &layer), (b'l', &upper), (b'j', b"{}"), (b'j', manifest), (b'j', nested), (b'j', index)];
    vec![join(parts)]
}

fn blocks(world: &World) -> Vec<Vec<u8>> {
    let zeroes = [vec![0, 0, 2, 0], vec![0; 64]].concat();
    let object = [9_u32.to_le_bytes().as_slice(), world.object.digest().bytes()].concat();
    vec![zeroes, object]
}

fn commits(world: &World) -> Vec<Vec<u8>> {
    let blocks = world.object;
    let disk = Content::Disk { blocks, block_bytes: 65536, size_bytes: 1 << 20 };
    let mut other = Commit::new(disk, ImageConfig::plain(FLAVOUR.parse().unwrap()), "ana", std::time::UNIX_EPOCH);
    other.recipe = Some(RECIPE.to_owned());
    other.parents.push(world.commit);
    other.packages = Some(world.object);
    vec![world.repository.commit(world.commit).unwrap().encode().unwrap().1, other.encode().unwrap().1]
}

fn trees(world: &World) -> Vec<Vec<u8>> {
    let kept = world.repository.tree_of(&world.repository.commit(world.commit).unwrap()).unwrap();
    let entry =
        |path: &str, node: Node| Entry { path: path.into(), meta: Meta { mode: 0o755, ..Meta::default() }, node };
    let file = |link| Node::File { object: Some(world.object), size_bytes: 9000, link };
    let mut attributes = entry("a/x", file(0));
    attributes.meta.xattrs.insert(b"user.x".to_vec(), b"1".to_vec());
    attributes.meta.xattrs.insert(b"security.capability".to_vec(), vec![7; 20]);
    let many = Tree::new(vec![
        entry("", Node::Directory),
        entry("a", Node::Directory),
        attributes,
        entry("a/y", file(1)),
        entry("b", file(1)),
        entry("c", Node::CharDevice(1, 3)),
        entry("d", Node::BlockDevice(8, 0)),
        entry("e", Node::File { object: None, size_bytes: 0, link: 0 }),
        entry("l", Node::Symlink("../../etc/shadow".into())),
        entry("p", Node::Fifo),
        entry("s", Node::Socket),
    ]);
    vec![kept.encode().1, many.unwrap().encode().1]
}

fn tags(world: &World) -> Vec<Vec<u8>> {
    let id = world.commit;
    let first = format!(r#"{{"from":null,"to":"{id}","time_unix_s":0,"who":"ana","why":"first"}}"#);
    let second = format!(r#"{{"from":"{id}","to":null,"time_unix_s":1,"who":"ana","why":"gone"}}"#);
    let log = format!("{first}\n{second}\n{first}\n");
    let cut = log.get(..log.len() - 9).unwrap_or_default();
    vec![
        join([(b't', first.as_bytes()), (b'l', log.as_bytes()), (b'r', b"{}".as_slice())]),
        join([(b't', second.as_bytes()), (b'l', cut.as_bytes())]),
    ]
}

fn questions(world: &World) -> Vec<Vec<u8>> {
    let commit = world.repository.commit(world.commit).unwrap();
    let Content::Tree { id: tree, .. } = commit.content else { return Vec::new() };
    let (id, object) = (world.commit, world.object);
    [
        r#""flavours""#.to_owned(),
        r#"{"tags":"tiny"}"#.to_owned(),
        format!(r#"{{"commit":"{id}"}}"#),
        format!(r#"{{"signatures":["{id}"]}}"#),
        format!(r#"{{"tree":{{"id":"{tree}","like":"{tree}"}}}}"#),
        format!(r#"{{"objects":["{object}","{object}"]}}"#),
    ]
    .map(String::into_bytes)
    .into()
}

/// A qcow2 of 1 MiB of which one cluster is written, plain and compressed.
fn disks() -> Vec<Vec<u8>> {
    const CLUSTER: usize = 4096;
    let disk = |version: u32, entry: u64| {
        let mut file = vec![0; CLUSTER * 6];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb");
        put(4, &version.to_be_bytes());
        put(20, &12_u32.to_be_bytes());
        put(24, &(1_u64 << 20).to_be_bytes());
        put(36, &1_u32.to_be_bytes());
        put(40, &(CLUSTER as u64).to_be_bytes());
        // One cluster of the table of counts, and one of counts.
        put(48, &(3 * CLUSTER as u64).to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        if version == 3 {
            put(96, &4_u32.to_be_bytes());
            put(100, &104_u32.to_be_bytes());
        }
        put(CLUSTER, &((2 * CLUSTER as u64) | (1 << 63)).to_be_bytes());
        put(2 * CLUSTER, &entry.to_be_bytes());
        put(3 * CLUSTER, &(4 * CLUSTER as u64).to_be_bytes());
        (0..6).for_each(|cluster| put(4 * CLUSTER + cluster * 2, &1_u16.to_be_bytes()));
        // A block of deflate that holds itself as it is, and is a cluster of sevens otherwise.
        put(5 * CLUSTER, &[7; CLUSTER]);
        file
    };
    let plain = (5 * CLUSTER as u64) | (1 << 63);
    vec![disk(3, plain), disk(2, plain), disk(3, 1), disk(3, (1 << 62) | (5 * CLUSTER as u64))]
}

fn guests() -> Vec<Vec<u8>> {
    let message = |text: &str| [u32::try_from(text.len()).unwrap().to_le_bytes().as_slice(), text.as_bytes()].concat();
    let frame = |kind: u8, stream: u32, body: &[u8]| {
        let head = [[kind, 0, 0, 0], stream.to_le_bytes(), u32::try_from(body.len()).unwrap().to_le_bytes()];
        [head.as_flattened(), body].concat()
    };
    let status = r#"{"status":{"version":1,"session":"ready","session_ready_ms":7}}"#;
    let exec = r#"{"exec":{"argv":["ls"],"env":{"A":"b"},"root":false,"tty":[24,80]}}"#;
    let boot = r#"{"identity":{"hostname":"d","machine_id":"0","time_ns":1,"seed":"00","network":null},"base":"disk","writable":"disk","home":null,"init":{"version":1,"env":{},"services":[],"session":null}}"#;
    vec![
        message(status),
        message(exec),
        [frame(1, 0, &[7; 16]), frame(3, 0, boot.as_bytes()), frame(7, 2, exec.as_bytes()), frame(8, 3, b"data")]
            .concat(),
        boot.as_bytes().to_vec(),
    ]
}

/// A machine asks for an address.
fn discover() -> Vec<u8> {
    let mac = Mac::of(Instance::new(1), [10, 66, 0, 7].into()).octets();
    let mut dhcp = vec![1, 1, 6, 0, 0, 0, 0, 77, 0, 0, 0, 0];
    dhcp.resize(28, 0);
    dhcp.extend(mac);
    dhcp.resize(236, 0);
    dhcp.extend([99, 130, 83, 99, 53, 1, 1, 61, 7, 1, 2, 3, 4, 5, 6, 7, 55, 2, 1, 3, 255]);
    let length = |more: usize| u16::try_from(dhcp.len() + more).unwrap().to_be_bytes();
    let mut frame = Vec::new();
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(length(28));
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    frame.extend([0, 68, 0, 67]);
    frame.extend(length(8));
    frame.extend([0, 0]);
    frame.extend(dhcp);
    frame
}

/// A dropped frame in the kernel's log.
fn logged() -> Vec<u8> {
    let attribute = |kind: u16, value: &[u8]| {
        let mut bytes = u16::try_from(value.len() + 4).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let packet = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 66, 0, 9, 10, 66, 0, 1, 0x13, 0x88, 0, 53, 0, 8, 0, 0];
    let attributes = [
        attribute(1, &[8, 0, 1, 0]),
        attribute(2, &[0, 0, 0, 7]),
        attribute(6, &[0, 0, 0, 3]),
        attribute(16, &[2, 2, 2, 2, 2, 2, 6, 6, 6, 6, 6, 6, 8, 0]),
        attribute(9, &packet),
    ]
    .concat();
    let mut message = u32::try_from(20 + attributes.len()).unwrap().to_ne_bytes().to_vec();
    message.extend((4_u16 << 8).to_ne_bytes());
    message.extend([0; 10]);
    message.extend([7, 0, 0, 0]);
    message.extend(attributes);
    message
}
