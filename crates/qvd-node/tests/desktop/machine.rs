//! The same image as a virtual machine: what a container promises, it keeps too.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId, DesktopSpec, DesktopState, NetPolicy, RootPolicy, StartStep, Virtualizer};
use qvd_net::{DropReason, NetConfig};
use qvd_node::{AccelChoice, EndReason, Exit, Host as _, HostErrorKind, Node, NodeConfig, StockReport};
use qvd_storage::repository::Expect;
use qvd_testkit::{Need, bed_directory, privileged};

use super::{
    Host, RFB,
    full::{Small, fill, with_own_tags, with_small_homes},
    greeting, on_a_host, run, stands_still,
    told::{expect_none_of_the_dead, expect_version},
    wait_for_rest,
};

/// Port of the host that machines may talk to.
const SERVICE: u16 = 7007;

fn config(host: &Host) -> NodeConfig {
    let mut config = host.config.clone();
    config.vm.kernel = Some(bed_directory().unwrap());
    config.vm.accel = AccelChoice::Tcg;
    config
}

fn machine(host: &Host, number: u32) -> DesktopSpec {
    let net = NetPolicy { services: vec![format!("tcp {SERVICE}").parse().unwrap()], ..NetPolicy::host_only() };
    DesktopSpec { virtualizer: Virtualizer::Qemu, root: RootPolicy::Persistent, net, ..host.spec(number) }
}

/// Has root in a machine talk to the host by IPv6, from its own address and from another's.
fn talks_by_ipv6(node: &Node, config: &NodeConfig, id: DesktopId) {
    let NetConfig { subnet, subnet6, .. } = config.network;
    let host = subnet6.unwrap().gateway(subnet);
    let own = node.network(id, &[]).unwrap().unwrap().ipv6.unwrap();
    let listener = TcpListener::bind(("::", SERVICE)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let talk = |from: Ipv6Addr, limit_s: u32| {
        // Source: Linux `include/uapi/linux/in6.h`, `IPV6_FREEBIND` of level 41: any source address.
        let script = format!(
            r#"perl -MSocket=:all -e 'socket(my $s, AF_INET6, SOCK_STREAM, 0); setsockopt($s, 41, 78, 1) or die "free $!";
            sub place {{ pack_sockaddr_in6($_[1], inet_pton(AF_INET6, $_[0])) }}
            bind($s, place("{from}", 0)) or die "bind $!"; alarm {limit_s};
            connect($s, place("{host}", {SERVICE})) or die "connect $!"' 2>&1"#
        );
        run(node, id, true, &script)
    };
    assert_eq!(talk(own, 30), (Exit::Code(0), String::new()));
    assert_eq!(listener.accept().unwrap().1.ip(), IpAddr::V6(own));
    let spoofed = |node: &Node| node.network(id, &[]).unwrap().unwrap().drops.get(&DropReason::SourceAddress).copied();
    let before = spoofed(node).unwrap_or(0);
    let (exit, said) = talk(Ipv6Addr::from(u128::from(own) + 1), 3);
    assert_ne!(exit, Exit::Code(0), "{said}");
    assert!(spoofed(node).unwrap_or(0) > before, "{said}");
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

pub(crate) fn said(node: &Node, id: DesktopId, script: &str) -> String {
    let (exit, said) = run(node, id, false, script);
    assert_eq!(exit, Exit::Code(0), "{script}: {said}");
    said
}

fn with_machines(test: impl FnOnce(&Host) + Send) {
    privileged(&[Need::Bed], || on_a_host(test));
}

#[test]
fn the_same_image_runs_as_a_machine_is_adopted_and_keeps_its_home() {
    with_machines(|host| with_small_homes(host, |small| runs_and_is_adopted(host, small)));
}

fn runs_and_is_adopted(host: &Host, small: &Small) {
    let (mut config, spec) = (config(host), machine(host, 1));
    let id = spec.id;
    let node = Node::open(config.clone()).unwrap();
    let mut steps = Vec::new();
    node.ensure_running(&spec, &mut |step| steps.push(step)).unwrap();
    assert_eq!(steps.first(), Some(&StartStep::Root));
    assert_eq!(steps.last(), Some(&StartStep::Session));

    // The image's programs on a kernel of its own, as the image's user.
    let host_kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let about = said(&node, id, "id -u; hostname; uname -r; cat /sys/class/net/eth0/address; ls -A ~ | wc -l");
    let lines: Vec<_> = about.lines().collect();
    assert_eq!(lines[..2], ["1000", "desk-1"], "{about}");
    assert_ne!(lines[2], host_kernel);
    let port = node.network(id, &[]).unwrap().expect("it has a port");
    assert_eq!(lines[3], port.mac.to_string());
    assert!(lines[4].parse::<u32>().unwrap() > 0, "the skeleton is in the new home: {about}");
    let heard = said(&node, id, &format!("ip -4 -o addr show eth0 2>/dev/null || hostname -I; echo {}", port.ipv4));
    assert!(heard.contains(&port.ipv4.to_string()), "{heard}");
    talks_by_ipv6(&node, &config, id);
    let stats = node.stats(id).unwrap();
    assert!(stats.memory.is_some_and(|memory| memory.total > 900 << 20), "{stats:?}");

    let display = node.attach(id, RFB, &mut drop).unwrap();
    assert_eq!(greeting(display.stream()), "RFB 003.008\n");
    said(&node, id, "echo kept > ~/mark; echo here > /tmp/mark; sync");
    let (exit, _) = run(&node, id, true, "echo system > /etc/mark; sync");
    assert_eq!(exit, Exit::Code(0));

    drop(display);
    let node = fill(small, node, &config, id);
    expect_version(&node, &spec);

    // The node dies; the machine runs on, even at rest, and is taken over.
    drop(node);
    config.rest_after = Duration::ZERO;
    let node = Node::open(config.clone()).unwrap();
    assert_eq!(node.status(id).state, DesktopState::Running);
    assert_eq!(said(&node, id, "cat /tmp/mark"), "here\n");
    wait_for_rest(&node, id);
    assert!(stands_still(config.instance, id));
    drop(node);
    let node = Node::open(config).unwrap();
    assert_eq!(node.status(id).state, DesktopState::Running);
    let display = node.attach(id, RFB, &mut drop).unwrap();
    assert_eq!(greeting(display.stream()), "RFB 003.008\n");

    // What was written is there after a stop; what was in memory is not.
    node.stop(id, Duration::from_secs(10)).unwrap();
    assert_eq!(display.end_reason(), EndReason::Stopped);
    assert_eq!(node.status(id).state, DesktopState::Stopped);
    node.ensure_running(&spec, &mut |_| {}).unwrap();
    assert_eq!(said(&node, id, "cat ~/mark /etc/mark; test ! -e /tmp/mark"), "kept\nsystem\n");
    expect_none_of_the_dead(&node, id);
    node.stop(id, Duration::ZERO).unwrap();
    small.close();
    node.remove(id).unwrap();
    node.shut_down(Duration::ZERO).unwrap();
}

/// What tells a machine from others, as its programs see it, once it has its
/// place in the network.
fn who(node: &Node, id: DesktopId) -> Vec<String> {
    let script = "until hostname -I | grep -q ' [0-9a-f]*:'; do sleep 0.2; done; hostname -I; hostname; cat /etc/machine-id \
                  /proc/sys/kernel/random/uuid /sys/class/net/eth0/address";
    said(node, id, script).lines().map(|line| line.trim().to_owned()).collect()
}

/// Waits until so many clones stand ready.
fn wait_for_stock(node: &Node, ready: u32) -> StockReport {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let stock = node.memory().unwrap().stock;
        if stock.ready == ready {
            return stock;
        }
        assert!(Instant::now() < end, "{ready} are to stand ready: {stock:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Processes of the clones that stand ready: of those with a directory there.
fn standing(host: &Host) -> BTreeSet<u32> {
    let ids = std::fs::read_dir(host.config.run.join("ready")).unwrap();
    let group = host.config.instance.cgroup_name();
    let groups: Vec<_> = ids.map(|entry| format!("{group}/{}", entry.unwrap().file_name().display())).collect();
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: u32 = entry.unwrap().file_name().to_str()?.parse().ok()?;
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        groups.iter().any(|group| text.lines().any(|line| line.ends_with(group.as_str()))).then_some(pid)
    });
    processes.collect()
}

/// The process that the next node would take over as this desktop.
fn pid(host: &Host, id: DesktopId) -> u32 {
    let path = host.config.run.join(format!("desktops/{id}/record.json"));
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    record["machine"]["vm"]["container"]["pid"].as_u64().unwrap().try_into().unwrap()
}

fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn machines_born_from_a_template_are_others_and_have_homes_of_their_own() {
    with_machines(|host| with_own_tags(host, || born(host)));
}

fn born(host: &Host) {
    let mut config = config(host);
    (config.vm.templates, config.vm.pool) = (true, 2);
    // What they do here is not to wait until somebody wakes them.
    config.rest_after = Duration::from_secs(3600);
    (config.network.internet, config.network.name_server) = (true, Some(Ipv4Addr::new(192, 0, 2, 53)));
    let mut all = [1, 2, 3].map(|number| DesktopSpec { root: RootPolicy::Volatile, ..machine(host, number) });
    all[2].net.internet = true;
    let [one, other, third] = &all;
    let node = Node::open(config.clone()).unwrap();
    node.ensure_running(one, &mut |_| {}).unwrap();
    // The others have a template, no kernel boots; and clones that stand ready.
    let stock = wait_for_stock(&node, 2);
    assert_eq!(stock.templates, 1);
    assert!(stock.templates_memory > stock.ready_memory && stock.ready_memory > Bytes::mib(10), "{stock:?}");
    let stood = standing(host);
    assert_eq!(stood.len(), 2);
    for spec in [other, third] {
        node.ensure_running(spec, &mut |_| {}).unwrap();
        assert!(stood.contains(&pid(host, spec.id)), "it was taken from those that stood ready");
    }
    // They are replaced.
    wait_for_stock(&node, 2);
    assert!(standing(host).is_disjoint(&stood));
    for spec in &all {
        assert_eq!(said(&node, spec.id, "cat /sys/block/vd*/serial").trim(), "qvd-home", "its system is in its memory");
    }

    let seen = all.each_ref().map(|spec| who(&node, spec.id));
    for place in 0..seen[0].len() {
        let different: BTreeSet<_> = seen.iter().map(|about| &about[place]).collect();
        assert_eq!(different.len(), seen.len(), "{seen:?}");
    }
    for (spec, about) in all.iter().zip(&seen) {
        let port = node.network(spec.id, &[]).unwrap().expect("it has a port");
        let places = format!("{} {}", port.ipv4, port.ipv6.unwrap());
        assert_eq!(about[..2], [places, spec.hostname.to_string()], "{about:?}");
        assert_eq!(about[4], port.mac.to_string());
        let display = node.attach(spec.id, RFB, &mut drop).unwrap();
        assert_eq!(greeting(display.stream()), "RFB 003.008\n");
    }
    talks_by_ipv6(&node, &config, third.id);
    // Who gets out is told whom to ask for names.
    let names = all.each_ref().map(|spec| said(&node, spec.id, "cat /etc/resolv.conf"));
    let gateway = config.network.subnet.gateway();
    assert_eq!(names, ["", "", &format!("# by qvd-init\nnameserver {gateway}\n")]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    for spec in &all {
        let clock: u64 = said(&node, spec.id, "date +%s").trim().parse().unwrap();
        assert!(clock.abs_diff(now) < 60, "its clock says {clock}, the host's {now}");
    }

    // Programs of the session began in the home that is the desktop's own.
    let script = "home=$(stat -Lc %d:%i ~); for dir in /proc/[0-9]*; do [ \"$(cat $dir/comm 2>/dev/null)\" = icewm ] && \
                  stat -Lc %d:%i $dir/cwd; done | sort -u; echo $home; ls -A ~ | wc -l";
    let places = said(&node, third.id, script);
    let places: Vec<_> = places.lines().collect();
    assert_eq!(places[0], places[1], "{places:?}");
    assert_ne!(places[2], "0", "the skeleton is in the new home");

    // The node dies: a clone is taken over as well, of those that stood ready too.
    said(&node, third.id, "echo kept > ~/mark; echo here > /tmp/mark; sync");
    run(&node, third.id, true, "echo system > /etc/mark; sync");
    node.stop(one.id, Duration::from_secs(10)).unwrap();
    refuses_broken_disks(host, &node, one);
    wait_for_stock(&node, 2);
    let (runs, stood) = (pid(host, third.id), standing(host));
    assert_eq!(stood.len(), 2);
    config.memory.total = Some(with_room(&node, Bytes::mib(512)));
    config.memory.every = Duration::from_secs(1);
    drop(node);
    assert!(standing(host).is_empty() && stood.iter().all(|&pid| !is_alive(pid)), "nobody has them any more");
    let node = Node::open(config).unwrap();
    assert_eq!(pid(host, third.id), runs);
    assert_eq!(said(&node, third.id, "cat ~/mark /tmp/mark"), "kept\nhere\n");
    node.stop(third.id, Duration::from_secs(10)).unwrap();
    assert!(!is_alive(runs));
    node.ensure_running(third, &mut |_| {}).unwrap();
    assert_eq!(said(&node, third.id, "cat ~/mark; test ! -e /etc/mark; test ! -e /tmp/mark"), "kept\n");
    gives_up_what_stands_ready(host, &node, &[other.id, third.id]);
    ends_for_want_of_memory(host, &node, third);
    break_the_line(&node, [&other.id, &third.id].map(|&id| id));
    // Nobody gets any more what no tag leads to; what stands ready otherwise goes with the node.
    wait_for_stock(&node, 2);
    let repository = node.repository().unwrap();
    for tag in repository.tags(&host.image.flavour).unwrap().into_keys() {
        let gone = repository.move_tag(&host.image.flavour, &tag, Expect::Anything, None, ("test", "gone"));
        assert_eq!(gone.unwrap().to, None);
    }
    wait_for_stock(&node, 0);
    assert!(standing(host).is_empty());
    for spec in &all {
        node.remove(spec.id).unwrap();
    }
    node.shut_down(Duration::ZERO).unwrap();
}

/// What desktops have, what they are born from, and room for more, for a node that is to
/// have little.
fn with_room(node: &Node, room: Bytes) -> Bytes {
    let report = node.memory().unwrap();
    let desktops: u64 = report.desktops.iter().map(|one| one.resident.get()).sum();
    let StockReport { templates_memory, ready_memory, .. } = report.stock;
    Bytes::new(desktops + templates_memory.get() + ready_memory.get() + room.get())
}

/// A container takes nearly all that is left: what stands ready for nobody goes, nothing is
/// asked of those that run, and it comes back with the memory.
fn gives_up_what_stands_ready(host: &Host, node: &Node, running: &[DesktopId]) {
    let hungry = DesktopSpec { root: RootPolicy::Volatile, ..host.spec(4) };
    let runs: Vec<_> = running.iter().map(|&id| pid(host, id)).collect();
    node.ensure_running(&hungry, &mut |_| {}).unwrap();
    wait_for_stock(node, 2);
    let stood = standing(host);
    let report = node.memory().unwrap();
    let (total, available) = (report.total.get(), report.available.get());
    assert!(available > total / 10, "{report:?}");
    let takes = available - total / 50;
    let hold = r#"$x = "x"; $x x= shift; open(my $f, ">", "/tmp/holds"); sleep 600"#;
    said(node, hungry.id, &format!("setsid perl -e '{hold}' {takes} </dev/null >/dev/null 2>&1 &"));
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let report = node.memory().unwrap();
        for one in &report.desktops {
            assert_eq!(one.reclaimed, Bytes::new(0), "nothing was to be asked of anybody: {report:?}");
        }
        if report.stock.ready == 0 {
            break;
        }
        assert!(Instant::now() < end, "they stand ready still: {report:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(standing(host).is_empty() && stood.iter().all(|&pid| !is_alive(pid)));
    said(node, hungry.id, "until [ -e /tmp/holds ]; do sleep 0.1; done");
    for (&id, runs) in running.iter().zip(runs) {
        assert_eq!((node.status(id).state, pid(host, id)), (DesktopState::Running, runs));
        assert_eq!(said(node, id, "echo runs"), "runs\n");
    }
    assert_eq!(node.memory().unwrap().stock.ready, 0, "none is made while it is so");
    node.remove(hungry.id).unwrap();
    wait_for_stock(node, 2);
    assert!(standing(host).is_disjoint(&stood));
}

/// Files in which a desktop's limit on memory and what it has are, under whichever version
/// of cgroups this host has.
fn memory_files(group: &Path) -> [PathBuf; 2] {
    let v1 = Path::new("/sys/fs/cgroup/memory").join(group);
    if v1.is_dir() {
        return ["memory.limit_in_bytes", "memory.usage_in_bytes"].map(|file| v1.join(file));
    }
    ["memory.max", "memory.current"].map(|file| Path::new("/sys/fs/cgroup").join(group).join(file))
}

/// The kernel ends a machine that has no memory left: that is told, and it starts again.
fn ends_for_want_of_memory(host: &Host, node: &Node, spec: &DesktopSpec) {
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", pid(host, spec.id))).unwrap();
    let group = text.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        (controllers.is_empty() || controllers.split(',').any(|one| one == "memory")).then_some(path)
    });
    let [limit, used] = memory_files(Path::new(group.unwrap().trim_start_matches('/')));
    let used: u64 = std::fs::read_to_string(used).unwrap().trim().parse().unwrap();
    std::fs::write(limit, (used + (16 << 20)).to_string()).unwrap();
    let script = "head -c 100000000 /dev/zero > /tmp/much &";
    said(node, spec.id, &format!("{{ {script} }} </dev/null >/dev/null 2>&1"));
    let end = Instant::now() + Duration::from_secs(120);
    while node.status(spec.id).state != DesktopState::Stopped {
        assert!(Instant::now() < end, "{:?}", node.status(spec.id));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(node.status(spec.id).ended.unwrap(), "was ended by the kernel: memory was used up");
    node.ensure_running(spec, &mut |_| {}).unwrap();
    assert_eq!(node.status(spec.id).ended, None);
    assert_eq!(said(node, spec.id, "cat ~/mark"), "kept\n");
}

/// A home whose disk is gone or was cut while its desktop was stopped is refused by name, and
/// nobody makes another in its place.
fn refuses_broken_disks(host: &Host, node: &Node, spec: &DesktopSpec) {
    let disk = host.config.root.join(format!("home-disks/{}/disk.qcow2", spec.id));
    let whole = std::fs::read(&disk).unwrap();
    for left in [None, Some(0), Some(100)] {
        match left {
            None => std::fs::remove_file(&disk).unwrap(),
            Some(length) => std::fs::write(&disk, &whole[..length]).unwrap(),
        }
        let error = qvd_core::causes(&node.ensure_running(spec, &mut |_| {}).unwrap_err()).join(": ");
        assert!(error.contains(&disk.display().to_string()), "{left:?}: {error}");
        assert_eq!(node.status(spec.id).state, DesktopState::Stopped);
        assert_eq!(std::fs::metadata(&disk).ok().map(|about| about.len()), left.map(|length| length as u64));
    }
    std::fs::write(&disk, &whole).unwrap();
    node.ensure_running(spec, &mut |_| {}).unwrap();
    node.stop(spec.id, Duration::from_secs(10)).unwrap();
    assert_eq!(node.status(spec.id).ended, None, "it ended as it was asked to");
}

/// Has root in a guest get hold of its end of the line to the node and do something to
/// it, a moment after this has returned.
fn attack(node: &Node, id: DesktopId, what: &str) {
    let script = format!(
        r#"for fd in /proc/[0-9]*/fd/0; do case $(readlink $fd) in */vport*) pid=${{fd#/proc/}}; pid=${{pid%%/*}};; esac; done
        [ -n "$pid" ] && echo caught
        # Source: Linux unistd_64.h, pidfd_open and pidfd_getfd.
        setsid perl -e 'sleep 1; my $p = {what}; open(my $line, ">&=", syscall(438, syscall(434, $p, 0), 0, 0)) or die; syswrite($line, $said)' $pid \
            </dev/null >/dev/null 2>&1 &"#
    );
    let (exit, said) = run(node, id, true, &script);
    assert_eq!((exit, said.as_str()), (Exit::Code(0), "caught\n"));
}

/// What a hostile guest says, or does not, ends its machine and nothing else.
fn break_the_line(node: &Node, [talking, silent]: [DesktopId; 2]) {
    // A frame of a message that is longer than all memory.
    attack(node, talking, r#"shift() + 0; $said = pack("CxxxVV", 7, 1, 0xffffffff) . "x" x 5000000"#);
    let end = Instant::now() + Duration::from_secs(60);
    while node.status(talking).state != DesktopState::Stopped {
        assert!(Instant::now() < end, "{:?}", node.status(talking));
        std::thread::sleep(Duration::from_millis(100));
    }
    let why = node.status(talking).ended.unwrap();
    assert!(why.contains("broke the protocol: a frame that is too long"), "{why}");

    attack(node, silent, r#"shift() + 0; kill("STOP", $p)"#);
    let end = Instant::now() + Duration::from_secs(60);
    let error = loop {
        match node.stats(silent) {
            Err(error) => break error,
            Ok(_) => assert!(Instant::now() < end, "it answers still"),
        }
    };
    assert_eq!(error.kind(), HostErrorKind::Timeout, "{error:?}");
    node.stop(silent, Duration::from_secs(1)).unwrap();
    let status = node.status(silent);
    assert_eq!(status.state, DesktopState::Stopped);
    let why = status.ended.unwrap();
    assert!(why.starts_with("did not end when it was asked to") && why.ends_with("is lost"), "{why}");
}

fn mount_over(what: &Path, at: &Path) {
    let done = Command::new("mount").arg("--bind").args([what, at]).status().unwrap();
    assert!(done.success());
}

#[test]
fn a_machine_that_cannot_be_says_why_and_leaves_nothing() {
    with_machines(|host| {
        let spec = machine(host, 2);
        let refused = |config: NodeConfig, spec: &DesktopSpec| {
            let node = Node::open(config).unwrap();
            let error = node.ensure_running(spec, &mut |_| {}).unwrap_err();
            assert_eq!(node.status(spec.id).state, DesktopState::Stopped);
            node.remove(spec.id).unwrap();
            node.shut_down(Duration::ZERO).unwrap();
            (error.kind(), qvd_core::causes(&error).join(": "))
        };
        let home = tempfile::tempdir().unwrap();
        let elsewhere = DesktopSpec { home: Some(home.path().into()), ..spec.clone() };
        let (kind, error) = refused(config(host), &elsewhere);
        assert_eq!(kind, HostErrorKind::Unsupported, "{error}");
        assert!(error.contains("home on a disk of its own"), "{error}");

        let mut without = config(host);
        without.vm.kernel = Some(home.path().into());
        let (kind, error) = refused(without, &spec);
        assert_eq!(kind, HostErrorKind::Unsupported, "{error}");
        assert!(error.contains("--vm-kernel") && error.contains(&home.path().display().to_string()), "{error}");

        // No QEMU: that is said, at a start and by who looks at the host.
        let (kind, error) = qvd_sys::mount::in_private_namespace(|| {
            for binary in ["/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm"].map(Path::new) {
                if binary.exists() {
                    mount_over(Path::new("/dev/null"), binary);
                }
            }
            refused(config(host), &spec)
        })
        .unwrap();
        assert_eq!(kind, HostErrorKind::Unsupported, "{error}");
        assert!(error.contains("qemu-system-x86_64"), "{error}");

        // What is wished for falls back; what is required does not.
        let mut strict = config(host);
        strict.vm.accel = AccelChoice::Kvm;
        let node = Node::open(strict).unwrap();
        match node.ensure_running(&spec, &mut |_| {}) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), HostErrorKind::Unsupported, "{error}");
                let error = qvd_core::causes(&error).join(": ");
                assert!(error.contains("/dev/kvm"), "{error}");
            }
        }
        node.remove(spec.id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}
