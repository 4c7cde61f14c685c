//! A browser keeps its own sandbox inside.

use std::{os::fd::AsFd as _, path::PathBuf};

use qvd_core::Bytes;
use qvd_sys::mount::{Restrictions, clone_tree, open_dir_path, restrict};
use qvd_testkit::{Need, privileged};
use qvd_virt::{ContainerMount, ContainerSpec, Exit};

use crate::bed::Bed;

/// Where Debian has the program itself; `/usr/bin/chromium` is a script.
const BROWSER: &str = "/usr/lib/chromium/chromium";

/// Shows a page without `--no-sandbox`, and meanwhile what the kernel says of the
/// process that draws it: it is not ours to confine, and has done that itself.
const SCRIPT: &str = r#"
    use strict;
    my @user = qw(setpriv --reuid=1000 --regid=1000 --clear-groups env HOME=/tmp);
    my $page = 'data:text/html,<p id=p>drawn</p><script>document.getElementById("p").textContent="by "+(40+2)</script>';
    pipe(my $out, my $in) or die;
    my $browser = fork // die;
    if (!$browser) {
        open(STDOUT, '>&', $in); open(STDERR, '>', '/tmp/errors');
        exec(@user, $ARGV[0], qw(--headless --disable-gpu --timeout=60000 --virtual-time-budget=3000 --dump-dom), $page);
        die;
    }
    close $in;
    my ($seen, %about) = ('');
    while (!$seen && kill(0, $browser)) {
        for my $dir (glob '/proc/[0-9]*') {
            open(my $cmd, '<', "$dir/cmdline") or next;
            next unless (<$cmd> // '') =~ /--type=renderer/;
            open(my $status, '<', "$dir/status") or next;
            %about = map { /^(\w+):\s*(.*)/ ? ($1 => $2) : () } <$status>;
            # It confines itself some time after it was born.
            next unless ($about{Seccomp_filters} // 0) > $ARGV[1] && $about{NoNewPrivs};
            my @depth = split ' ', $about{NSpid};
            my $own = (readlink("$dir/ns/user") // 'hidden') ne readlink('/proc/self/ns/user');
            $seen = sprintf "filters %d namespaces %d own users %d\n", $about{Seccomp_filters} - $ARGV[1], scalar @depth, $own;
            last;
        }
    }
    print $seen, <$out>;
    waitpid($browser, 0);
    if ($?) { open(my $errors, '<', '/tmp/errors'); print <$errors>; exit 1 }
"#;

/// Shows the host's directories read-only, as an image's would be.
fn with_programs_of_the_host(spec: &mut ContainerSpec) {
    for target in ["/usr", "/etc"].map(PathBuf::from) {
        let mount = clone_tree(open_dir_path(&target).unwrap().as_fd()).unwrap();
        let limited = Restrictions { read_only: true, nosuid: true, nodev: true, noexec: false };
        restrict(mount.as_fd(), limited, None).unwrap();
        spec.mounts.push(ContainerMount { target, mount });
    }
}

#[test]
fn chromium_draws_a_page_in_its_own_sandbox() {
    privileged(&[Need::Root, Need::UserNamespaces, Need::Cgroup, Need::Path(BROWSER)], || {
        let bed = Bed::new();
        let ours = bed.perl(1, "open(F, '/proc/self/status'); print map { /^Seccomp_filters:\\s*(\\d+)/ } <F>");
        let mut spec = bed.spec(1, &["/usr/bin/perl", "-e", SCRIPT, BROWSER, &ours]);
        with_programs_of_the_host(&mut spec);
        spec.limits.memory = Bytes::gib(2);
        spec.profile.tmp = Bytes::mib(512);
        spec.profile.shm = Bytes::mib(512);
        spec.profile.inodes = 65_536;
        let (exit, text) = bed.run_spec(spec);
        assert_eq!(exit, Exit::Code(0), "{text}");
        assert!(text.contains(r#"<p id="p">by 42</p>"#), "{text}");
        let sandbox: Vec<&str> = text.lines().next().unwrap().split(' ').collect();
        let ["filters", filters, "namespaces", depth, "own", "users", "1"] = sandbox[..] else { panic!("{text}") };
        assert!(filters.parse::<u32>().unwrap() >= 1, "{text}");
        assert!(depth.parse::<u32>().unwrap() >= 2, "{text}");
        bed.assert_empty();
    });
}
