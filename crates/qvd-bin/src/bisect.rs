//! Finds the commit that a fault came with: each candidate is tried in a fresh
//! desktop of a running daemon.

use std::{fs::File, process::ExitCode};

use anyhow::Context;
use clap::Args;
use qvd_core::{FlavourName, RootPolicy, Tag, TenantName, UserName};
use qvd_farm::OwnedDesktops;
use qvd_gateway::api::{
    Client, ExecOutput,
    dto::{AddUser, CreateDesktop},
};
use qvd_guest::{ExecRequest, Exit as Ended};
use qvd_storage::{
    Repository,
    repository::{Bisect, CommitId, Diff, Expect, Logged, Verdict},
};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    failure::{Exit, Refusal},
    history::{author, existing, short, show_diff, target},
    output::{Output, one_line},
    password,
    paths::Paths,
    remote,
};

/// Whose desktops the candidates run in, and the tag that these follow. Names that
/// stay the same: what a killed command left is found by the next.
const USER: &str = "qvd-bisect";
const TAG: &str = "bisecting";

/// Exit status of a program that cannot tell. Source: git-bisect(1).
const CANNOT_TELL: i32 = 125;

/// How many of the files and packages that came with the fault are shown.
const SHOWN: usize = 20;

/// What is searched, and how one tells.
#[derive(Debug, Args)]
pub(crate) struct Search {
    /// Flavour
    flavour: FlavourName,
    /// Commit without the fault: an id or a tag; may be given several times
    #[arg(long, value_name = "ID", required = true)]
    good: Vec<String>,
    /// Commit with the fault: an id or a tag
    #[arg(long, value_name = "ID", default_value = "head")]
    bad: String,
    /// As root inside, instead of the desktop's user
    #[arg(long)]
    as_root: bool,
    /// Program inside that tells: its status is 0 for good, 125 if it cannot tell, another for bad
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    program: Vec<String>,
}

/// A commit that was tried.
#[derive(Debug, Serialize)]
struct Tried {
    commit: CommitId,
    verdict: Verdict,
    /// Exit status of the program, or why there is none.
    because: String,
}

/// What the search came to.
#[derive(Debug, Serialize)]
struct Found {
    /// The first bad commit; none if several may be.
    first_bad: Option<Logged>,
    /// Those that may be the first bad one.
    suspects: Vec<CommitId>,
    tried: Vec<Tried>,
    /// Files and packages that differ from the commit before.
    changed: Option<Diff>,
}

/// Carries out the search.
pub(crate) async fn run(paths: &Paths, client: &Client, search: Search, output: &Output) -> anyhow::Result<ExitCode> {
    let flavour = &search.flavour;
    let cannot = || format!("cannot search the history of {flavour}");
    let repository = existing(&paths.root.join("images")).with_context(cannot)?;
    let resolve = |text: &String| -> anyhow::Result<CommitId> { Ok(repository.resolve(&target(flavour, text)?)?) };
    let good = search.good.iter().map(resolve).collect::<anyhow::Result<Vec<_>>>().with_context(cannot)?;
    let bad = resolve(&search.bad).with_context(cannot)?;
    let bisect = repository.bisect(&good, bad).with_context(cannot)?;
    let bisect = bisect.map_err(|error| Refusal::new(Exit::Usage, format!("{}: {error}", cannot())))?;
    // Whoever holds it searches; it goes with the process.
    let lock = paths.root.join("bisect.lock");
    let held = File::create(&lock).with_context(|| format!("cannot open `{}`", lock.display()))?;
    if flock(&held, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Err(Refusal::new(Exit::Busy, format!("{}: another search is under way", cannot())).into());
    }
    let bench = Bench { repository: &repository, client, search: &search, user: USER.parse()?, tag: TAG.parse()? };
    bench.clear().await.with_context(cannot)?;
    let mut interrupt = signal(SignalKind::interrupt()).with_context(cannot)?;
    let mut terminate = signal(SignalKind::terminate()).with_context(cannot)?;
    let found = tokio::select! {
        found = bench.find(bisect, output) => found,
        _ = interrupt.recv() => Err(Refusal::new(Exit::Failed, "it was interrupted").into()),
        _ = terminate.recv() => Err(Refusal::new(Exit::Failed, "it was ended").into()),
    };
    let cleared = bench.clear().await;
    let found = found.with_context(cannot)?;
    cleared.with_context(cannot)?;
    output.result(&found, show)?;
    Ok(ExitCode::SUCCESS)
}

/// Where candidates are tried.
struct Bench<'a> {
    repository: &'a Repository,
    client: &'a Client,
    search: &'a Search,
    user: UserName,
    tag: Tag,
}

impl Bench<'_> {
    /// Removes what a search needs, this one's or that of a killed one.
    async fn clear(&self) -> anyhow::Result<()> {
        if self.client.users().await?.iter().any(|user| user.name == self.user) {
            self.client.remove_user(&self.user, OwnedDesktops::Remove).await?;
        }
        self.put(None)
    }

    fn put(&self, to: Option<CommitId>) -> anyhow::Result<()> {
        if to.is_none() && self.repository.tagged(&self.search.flavour, &self.tag)?.is_none() {
            return Ok(());
        }
        let by = (&*author(), "search for a fault");
        self.repository.move_tag(&self.search.flavour, &self.tag, Expect::Anything, to, by)?;
        Ok(())
    }

    async fn find(&self, mut bisect: Bisect<CommitId>, output: &Output) -> anyhow::Result<Found> {
        let password = password::generate();
        self.client
            .add_user(&AddUser { name: self.user.clone(), password, admin: false, tenant: TenantName::default() })
            .await?;
        let mut tried = Vec::new();
        let progress = output.progress();
        while let Some(commit) = bisect.next() {
            progress.say(&format!("{} of {} left: trying {}", self.search.flavour, bisect.left(), short(commit)));
            let (verdict, because) = self.attempt(commit).await?;
            progress.say(&format!("{} is {}: {because}", short(commit), word(verdict)));
            bisect.judge(commit, verdict);
            tried.push(Tried { commit, verdict, because });
        }
        drop(progress);
        let suspects = bisect.suspects();
        let first = match suspects.as_slice() {
            [first] => Some(self.repository.logged(*first)?),
            _ => None,
        };
        let changed = match first.as_ref().and_then(|first| Some((*first.parents.first()?, first.id))) {
            Some((before, after)) => {
                let (before, after) = (self.repository.commit(before)?, self.repository.commit(after)?);
                Some(self.repository.diff(&before, &after)?)
            }
            None => None,
        };
        Ok(Found { first_bad: first, suspects, tried, changed })
    }

    /// Runs the program in a fresh desktop of a commit.
    async fn attempt(&self, commit: CommitId) -> anyhow::Result<(Verdict, String)> {
        self.put(Some(commit))?;
        let mut new = CreateDesktop::new(Some(self.user.clone()), self.search.flavour.clone());
        (new.tag, new.root) = (Some(self.tag.clone()), Some(RootPolicy::Volatile));
        let desktop = self.client.create_desktop(&new).await?.id;
        let ended = match self.client.start(desktop, |_, _| ()).await {
            Ok(_) => self.tell(desktop).await?,
            // A version that does not even start says nothing about the fault.
            Err(error) => Err(qvd_core::causes(&error).join(": ")),
        };
        self.client.remove_desktop(desktop).await?;
        Ok(match ended {
            Ok(Ended::Code(0)) => (Verdict::Good, "status 0".to_owned()),
            Ok(Ended::Code(CANNOT_TELL)) => (Verdict::Unknown, format!("status {CANNOT_TELL}")),
            Ok(Ended::Code(code)) => (Verdict::Bad, format!("status {code}")),
            Ok(Ended::Signal(signal)) => (Verdict::Bad, format!("killed by signal {signal}")),
            Err(why) => (Verdict::Unknown, one_line(&why)),
        })
    }

    /// How the program ended, or why it did not begin. What it wrote is for the log.
    async fn tell(&self, desktop: qvd_core::DesktopId) -> anyhow::Result<Result<Ended, String>> {
        let argv = self.search.program.clone();
        let request = ExecRequest { argv, env: Default::default(), root: self.search.as_root, tty: None };
        let (mut writer, mut reader) = match self.client.exec(desktop, &request).await {
            Ok(halves) => halves,
            Err(error) => return Ok(Err(qvd_core::causes(&error).join(": "))),
        };
        // A program that has ended already need not be told.
        if let Err(error) = writer.end_stdin().await {
            tracing::debug!(%error, "no more input");
        }
        loop {
            match reader.next().await? {
                ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes) => {
                    tracing::info!(said = %one_line(&String::from_utf8_lossy(&bytes)), "program");
                }
                ExecOutput::Exit(exit) => return Ok(Ok(exit)),
                _ => {}
            }
        }
    }
}

const fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Good => "good",
        Verdict::Bad => "bad",
        Verdict::Unknown => "not known to be either",
    }
}

fn show(found: &Found) -> String {
    let Some(first) = &found.first_bad else {
        let suspects: Vec<_> = found.suspects.iter().copied().map(short).collect();
        return format!("it cannot be told which of these is the first bad one: {}", suspects.join(", "));
    };
    let mut lines = vec![
        format!("{} is the first bad commit", short(first.id)),
        format!("  {} by {}", one_line(&first.message), one_line(&first.author)),
    ];
    let changed = found.changed.as_ref().map(show_diff).unwrap_or_default();
    lines.extend(changed.lines().take(SHOWN).map(|line| format!("  {line}")));
    let more = changed.lines().count().saturating_sub(SHOWN);
    lines.extend((more > 0).then(|| format!("  and {more} more; `qvd image diff` shows them")));
    lines.join("\n")
}

/// Connects and searches.
pub(crate) fn search(
    paths: &Paths,
    server: Option<&std::path::Path>,
    search: Search,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    let client = remote::connect(paths, server)?;
    remote::wait(run(paths, &client, search, output))?
}
