//! A home in a file system of its own.

use qvd_core::{Bytes, DesktopSpec, FlavourName, Tag};
use qvd_node::{Exit, Host as _};
use qvd_storage::{
    HomeKind, HomeOptions, Quota, Repository,
    repository::{CommitId, Expect, Keep, NewCommit},
};

use super::{SOON, on_a_host, run};

/// The same image, whose recipe asks for such homes.
fn with_homes(repository: &Repository, of: CommitId, flavour: &FlavourName, home: HomeOptions) -> CommitId {
    let commit = repository.commit(of).unwrap();
    let mut config = commit.config.clone();
    (config.flavour, config.defaults.home) = (flavour.clone(), home);
    let new = NewCommit {
        config,
        author: "ana".to_owned(),
        message: "with homes that are limited".to_owned(),
        time: commit.time(),
        recipe: None,
        publish: false,
    };
    let staging = repository.stage().unwrap();
    repository.commit_tree(&staging, &repository.tree_of(&commit).unwrap(), new).unwrap()
}

#[test]
fn a_home_in_a_file_system_of_its_own_is_limited_outlives_a_stop_and_goes_with_its_desktop() {
    on_a_host(|host| {
        let node = host.open();
        let repository = node.repository().unwrap();
        let flavour: FlavourName = format!("homes-{}", std::process::id()).parse().unwrap();
        let home =
            HomeOptions { kind: HomeKind::Loop, quota: Quota { bytes: Some(Bytes::mib(24)), inodes: Some(200) } };
        let commit = with_homes(&repository, CommitId::new(host.image.digest), &flavour, home);
        let spec = DesktopSpec { image: commit.digest(), ..host.spec(9) };
        node.ensure_running(&spec, &mut drop).unwrap();
        let user = |script: &str| run(&node, spec.id, false, script);
        let (_, said) = user("stat -f -c %T ~; touch ~/kept && echo mine > ~/kept && sync && id -u && stat -c %u ~");
        assert_eq!(said, "ext2/ext3\n1000\n1000\n");

        // No more than it may hold, in bytes and in files, and nothing is lost by that.
        let (exit, said) = user("LC_ALL=C dd if=/dev/zero of=$HOME/much bs=1M count=64 conv=fsync 2>&1");
        assert!(exit != Exit::Code(0) && said.contains("No space left on device"), "{exit:?}: {said}");
        assert_eq!(user("cat ~/kept; rm ~/much").1, "mine\n");
        let (exit, said) =
            user("mkdir ~/many && cd ~/many && for i in $(seq 1000); do LC_ALL=C touch $i || exit 1; done 2>&1");
        assert!(exit == Exit::Code(1) && said.contains("No space left on device"), "{exit:?}: {said}");
        let (_, files) = user("ls ~/many | wc -l");
        assert!((100..=200).contains(&files.trim().parse::<u32>().unwrap()), "{files}");
        assert_eq!(user("rm -r ~/many; echo again > ~/more; cat ~/kept ~/more").1, "mine\nagain\n");

        // The root is forgotten at a stop, the home is not.
        node.stop(spec.id, SOON).unwrap();
        node.ensure_running(&spec, &mut drop).unwrap();
        assert_eq!(run(&node, spec.id, false, "cat ~/kept ~/more").1, "mine\nagain\n");
        node.remove(spec.id).unwrap();
        for tag in [Tag::head(), Tag::default_tag()] {
            repository.move_tag(&flavour, &tag, Expect::Anything, None, ("ana", "done")).unwrap();
        }
        repository.gc(&Keep { reflog: std::time::Duration::ZERO, commits: Vec::new() }, false).unwrap();
        node.shut_down(std::time::Duration::ZERO).unwrap();
    });
}
