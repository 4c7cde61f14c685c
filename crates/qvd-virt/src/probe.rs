//! What this host can do for containers, found by doing it.

use std::{io, os::fd::AsFd, time::Duration};

use qvd_core::{Calls, Missing, Support};
use qvd_sys::{
    mount::{FsContext, Restrictions, restrict},
    process::{Event, LandlockRules, Namespaces, Op, Plan, SpawnError, spawn},
};

use rustix::fs::{Mode, OFlags};

use crate::{
    cgroup::{Controller, Hierarchy, Kernel, find},
    seccomp,
};

const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Asks the host, by trying, for everything a container needs. Nothing is
/// left of the trials.
///
/// # Errors
/// A trial failed for a reason that says nothing about the host, such as no
/// memory.
pub fn probe() -> io::Result<Vec<(&'static str, Support)>> {
    let mut answers =
        vec![("new mount calls", answer(mounts(), "the mount calls of Linux 5.12, fsopen to mount_setattr")?)];
    let namespaces = [
        ("user namespaces", Namespaces::USER),
        ("mount namespaces", Namespaces::MOUNT),
        ("process namespaces", Namespaces::PID),
        ("network namespaces", Namespaces::NET),
        ("host name namespaces", Namespaces::UTS),
        ("ipc namespaces", Namespaces::IPC),
    ];
    for (name, namespace) in namespaces {
        answers.push((name, child(namespace, Plan::new(), name)?));
    }
    let mut filtered = Plan::new();
    filtered.step("load a filter", Op::Seccomp(seccomp::filter(Calls::Desktop, false)));
    answers.push(("system call filters", child(Namespaces::USER, filtered, "seccomp filters")?));
    answers.push((
        "Landlock",
        match self::landlock()? {
            Some(_) => Support::Yes,
            None => Support::No(Missing::Kernel("Landlock of Linux 5.19, or it is switched off".to_owned())),
        },
    ));
    let hierarchies = find(&Kernel, &std::fs::read_to_string("/proc/thread-self/mountinfo")?);
    for controller in Controller::ALL {
        answers.push((controller.limit(), limited(&hierarchies, controller)));
    }
    Ok(answers)
}

impl Controller {
    const fn limit(self) -> &'static str {
        match self {
            Self::Memory => "memory limits",
            Self::Cpu => "processor limits",
            Self::Pids => "process limits",
            Self::Io => "limits of reading and writing",
            Self::Freezer => "freezing of idle desktops",
        }
    }
}

/// The version of Landlock that holds here: a child keeps to its rules and tries to
/// break them.
pub(crate) fn landlock() -> io::Result<Option<u32>> {
    let Some(version) = LandlockRules::version()? else { return Ok(None) };
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut plan = Plan::new();
    let rules = plan.own(LandlockRules::new(version, root.as_fd())?.into())?;
    plan.step("keep to rules of Landlock", Op::Landlock(rules));
    plan.step("try to break them", Op::TryLandlock);
    let held = child(Namespaces::USER, plan, "Landlock")?;
    Ok(held.is_yes().then_some(version))
}

/// Whether all pages of a container can be offered for merging.
pub(crate) fn merging() -> io::Result<Support> {
    let mut plan = Plan::new();
    plan.step("offer its memory for merging", Op::OfferMemory);
    child(Namespaces::USER, plan, "merging of all pages of a process")
}

fn limited(hierarchies: &[Hierarchy], controller: Controller) -> Support {
    let found = |h: &Hierarchy| h.controllers.contains(&controller) || (controller == Controller::Freezer && h.unified);
    if hierarchies.iter().any(found) {
        Support::Yes
    } else {
        Support::No(Missing::Kernel(format!("a mounted cgroup controller `{}`", controller.name())))
    }
}

fn mounts() -> io::Result<()> {
    let fs = FsContext::open("tmpfs").map_err(|e| copy(e.io()))?;
    let mount = fs.mount(Restrictions::default()).map_err(|e| copy(e.io()))?;
    restrict(mount.as_fd(), Restrictions { nodev: true, ..Restrictions::default() }, None)
}

fn copy(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

/// Makes a child in a namespace, lets it do what is planned, and hears whether it got on.
fn child(namespace: Namespaces, mut plan: Plan, what: &str) -> io::Result<Support> {
    plan.step("report", Op::Ready);
    let tried = spawn(plan, namespace, None).and_then(|mut child| {
        let event = child.event(ANSWER_WITHIN);
        child.process_mut().wait(ANSWER_WITHIN).map_err(SpawnError::Control)?;
        event
    });
    let result = match tried {
        Ok(Event::Ready { .. }) => Ok(()),
        Ok(Event::Closed) => Err(io::ErrorKind::BrokenPipe.into()),
        Err(SpawnError::Clone(source) | SpawnError::Step { source, .. } | SpawnError::Control(source)) => Err(source),
        Err(error) => Err(io::Error::other(error)),
    };
    answer(result, what)
}

/// Only what means "cannot" is a no; anything else would be remembered as a
/// property of the host.
fn answer(result: io::Result<()>, what: &str) -> io::Result<Support> {
    let Err(error) = result else { return Ok(Support::Yes) };
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL | libc::ENODEV | libc::EOPNOTSUPP) => {
            Ok(Support::No(Missing::Kernel(what.to_owned())))
        }
        // User namespaces switched off by user.max_user_namespaces.
        Some(libc::ENOSPC) => Ok(Support::No(Missing::Kernel(format!("{what}: their sysctl allows none")))),
        Some(libc::EPERM | libc::EACCES) => Ok(Support::No(Missing::Privilege(format!("use {what}; run as root")))),
        _ => Err(error),
    }
}
