//! The command line.

mod image;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use clap::{ArgAction, Args, Parser, Subcommand, ValueHint};
use qvd_core::{Bytes, Calls, DesktopId, Device, FlavourName, Limits, MilliCpu, Tag, TenantName, UserName};

pub(crate) use image::{Access, Image, Import, Transfer};

use crate::{
    machines::{Doctor, Kind, Machines},
    memory::Memory,
};

/// Port of the gateway unless told otherwise: QVD's own since its first release.
const DEFAULT_LISTEN: &str = "0.0.0.0:8443";

/// Linux desktops on a farm of servers, in a browser.
#[derive(Debug, Parser)]
#[command(name = "qvd", version, propagate_version = true, subcommand_required = true)]
#[command(after_help = "Exit status: 0 done, 1 failed, 2 usage, 3 this host cannot, 4 not found, 5 busy.")]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Global {
    /// Print JSON, for programs
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// State directory of the installation
    #[arg(long, global = true, value_name = "DIR", default_value = "/var/lib/qvd", env = "QVD_ROOT", hide_env_values = true, value_hint = ValueHint::DirPath)]
    pub(crate) root: PathBuf,
    /// Unix socket of the daemon, unless it is that of --root
    #[arg(long, global = true, value_name = "SOCKET", env = "QVD_SERVER", hide_env_values = true, value_hint = ValueHint::FilePath)]
    pub(crate) server: Option<PathBuf>,
    /// Say more on standard error; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run everything on this machine, until SIGINT or SIGTERM
    Up(Up),
    /// Try what this host can do
    Doctor(Doctor),
    /// Images
    #[command(subcommand)]
    Image(Image),
    /// Desktops
    #[command(subcommand)]
    Desktop(Desktop),
    /// Networks of desktops
    #[command(subcommand)]
    Net(Net),
    /// Show the host's memory, who has it, and what merging equal pages costs and wins
    Memory,
    /// Users
    #[command(subcommand)]
    User(User),
    /// What new desktops of a flavour get
    #[command(subcommand)]
    Flavour(Flavour),
    /// Print a completion script
    Completions {
        /// Shell to complete for
        shell: clap_complete::Shell,
    },
    /// Write man pages
    Man {
        /// Directory that gets them
        #[arg(value_hint = ValueHint::DirPath)]
        directory: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Address and port of browsers and clients; port 0 takes a free one
    #[arg(long, value_name = "ADDR:PORT", default_value = DEFAULT_LISTEN)]
    pub(crate) listen: SocketAddr,
    /// Certificate in PEM, with its chain; without one, a self-signed one is made
    #[arg(long, value_name = "FILE", requires = "tls_key", value_hint = ValueHint::FilePath)]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its private key in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert", value_hint = ValueHint::FilePath)]
    pub(crate) tls_key: Option<PathBuf>,
    /// Name that browsers may address this gateway by; any, unless given
    #[arg(long, value_name = "NAME", value_parser = host_name)]
    pub(crate) host: Vec<String>,
    /// Keep users and desktops in this PostgreSQL database, and not in a file of SQLite; the password stands in the file that PGPASSFILE names
    #[arg(long, value_name = "postgres://USER@HOST/DATABASE")]
    pub(crate) database: Option<String>,
    /// Stop every desktop at the end; otherwise they keep running
    #[arg(long)]
    pub(crate) ephemeral: bool,
    /// Route desktops whose policy asks for it to other networks
    #[arg(help_heading = "Network of desktops", long)]
    pub(crate) internet: bool,
    /// The site's name server, for desktops that may ask no other; one per family
    #[arg(help_heading = "Network of desktops", long, value_name = "ADDR")]
    pub(crate) name_server: Vec<IpAddr>,
    /// Longest packet of the desktops' network, where the way out takes no longer ones
    #[arg(help_heading = "Network of desktops", long, value_name = "OCTETS")]
    pub(crate) mtu: Option<u16>,
    /// File with the most that any desktop may reach, in TOML
    #[arg(help_heading = "Network of desktops", long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) tenant_policy: Option<PathBuf>,
    /// File with the addresses that tenants get and the most that the desktops of each may reach, in TOML
    #[arg(help_heading = "Network of desktops", long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) tenants: Option<PathBuf>,
    /// The static qvd-init to run desktops with, unless the one beside this program or in ../lib/qvd
    #[arg(long, value_name = "FILE", env = "QVD_INIT", hide_env_values = true, value_hint = ValueHint::FilePath)]
    pub(crate) init: Option<PathBuf>,
    /// Swap what idle desktops give back to compressed memory, up to SIZE of it, if this host has no swap
    #[arg(help_heading = "Memory", long, value_name = "SIZE")]
    pub(crate) zram: Option<qvd_core::Bytes>,
    #[command(flatten)]
    pub(crate) memory: Memory,
    #[command(flatten)]
    pub(crate) machines: Machines,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Desktop {
    /// Create a desktop and print its number
    Create(Create),
    /// List desktops
    Ls {
        /// Only those of this user
        #[arg(long)]
        user: Option<UserName>,
    },
    /// Show all about a desktop
    Show {
        /// Its number
        id: DesktopId,
    },
    /// Show the memory and processes of a running desktop, and its clients
    Stats {
        /// Its number
        id: DesktopId,
    },
    /// Start a desktop and wait until its session is ready
    Start {
        /// Its number
        id: DesktopId,
    },
    /// Stop a desktop
    Stop {
        /// Its number
        id: DesktopId,
    },
    /// Stop a desktop and delete it, its root and its home
    Rm {
        /// Its number
        id: DesktopId,
    },
    /// Run a program inside a running desktop; its exit status is ours
    Exec(Exec),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Net {
    /// Show the port of a running desktop, and what it may reach
    Show {
        /// Its number
        id: DesktopId,
    },
    /// Show what went through the ports of all running desktops, or of one
    Counters {
        /// Its number
        id: Option<DesktopId>,
    },
    /// Tell what would become of frames that a running desktop sent, and which rule decides; nothing is sent
    Explain {
        /// Its number
        id: DesktopId,
        /// Each from its Ethernet header on, in base 16; without one, they are read line by line from the input
        #[arg(value_name = "FRAME")]
        frames: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Whose desktop it is
    pub(crate) user: UserName,
    /// The line of images it runs
    pub(crate) flavour: FlavourName,
    /// Name among the user's desktops, and host name inside
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Version of the flavour that it follows
    #[arg(long)]
    pub(crate) tag: Option<Tag>,
    /// What it runs in: namespaces on the host's kernel, or QEMU with a kernel of its own; the same image does for both
    #[arg(long, value_enum, default_value_t = Kind::Container)]
    pub(crate) virtualizer: Kind,
    #[command(flatten)]
    pub(crate) limits: Limited,
    /// Device of the host beside those of its image: fuse, dri, sound, camera
    #[arg(long = "device", value_name = "KIND")]
    pub(crate) devices: Vec<Device>,
    /// Which system calls its programs may make: desktop or application
    #[arg(long, value_name = "SET")]
    pub(crate) calls: Option<Calls>,
    /// Keep its root from one start to the next
    #[arg(long)]
    pub(crate) persistent: bool,
    /// Give it no network
    #[arg(long, conflicts_with_all = ["isolated", "address"])]
    pub(crate) no_network: bool,
    /// Give it a port that leads nowhere but to the host's bridge
    #[arg(long)]
    pub(crate) isolated: bool,
    /// File with its network policy in TOML, as a recipe's `[defaults.net]`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["isolated", "no_network"], value_hint = ValueHint::FilePath)]
    pub(crate) net_policy: Option<PathBuf>,
    /// Its own IPv4 address
    #[arg(long)]
    pub(crate) address: Option<Ipv4Addr>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Flavour {
    /// List flavours and what new desktops of each get
    Ls,
    /// Show what new desktops of a flavour get
    Show {
        /// The line of images
        flavour: FlavourName,
    },
    /// Set what new desktops of a flavour get, instead of what the recipe of its image says
    Set(SetFlavour),
    /// Let new desktops get again what the recipe of the flavour's image says
    Reset {
        /// The line of images
        flavour: FlavourName,
    },
}

/// What is left out stays as it is. Desktops that there are already keep theirs.
#[derive(Debug, Args)]
#[group(id = "changes", required = true, multiple = true, args = ["memory", "cpu", "pids", "io", "root_policy", "net_policy"])]
pub(crate) struct SetFlavour {
    /// The line of images
    pub(crate) flavour: FlavourName,
    #[command(flatten)]
    pub(crate) limits: Limited,
    /// What becomes of a root when its desktop stops
    #[arg(long, value_enum, value_name = "POLICY")]
    pub(crate) root_policy: Option<Roots>,
    /// File with the network policy in TOML, as a recipe's `[defaults.net]`
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) net_policy: Option<PathBuf>,
}

/// What becomes of a root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Roots {
    /// It is made anew at each start
    Volatile,
    /// It is kept
    Persistent,
}

/// How much a desktop may use.
#[derive(Debug, Args)]
pub(crate) struct Limited {
    /// Memory, such as 512M or 2G
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<Bytes>,
    /// Processor time in thousandths of a core
    #[arg(long, value_name = "MILLICORES")]
    pub(crate) cpu: Option<u32>,
    /// Processes and threads at once
    #[arg(long, value_name = "COUNT")]
    pub(crate) pids: Option<u32>,
    /// Most that it reads, and writes, in a second on each disk, such as 50M
    #[arg(long, value_name = "SIZE")]
    pub(crate) io: Option<Bytes>,
}

impl Limited {
    /// `limits` with what was said instead; none if nothing was.
    pub(crate) fn over(&self, limits: Limits) -> Option<Limits> {
        let is_said = self.memory.is_some() || self.cpu.is_some() || self.pids.is_some() || self.io.is_some();
        is_said.then(|| Limits {
            memory: self.memory.unwrap_or(limits.memory),
            cpu: self.cpu.map_or(limits.cpu, MilliCpu),
            pids: self.pids.unwrap_or(limits.pids),
            io: self.io.or(limits.io),
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Number of the desktop
    pub(crate) id: DesktopId,
    /// As root inside, instead of the desktop's user
    #[arg(long)]
    pub(crate) as_root: bool,
    /// On a terminal; the default where ours is one
    #[arg(short, long, conflicts_with = "no_tty")]
    pub(crate) tty: bool,
    /// Not on a terminal
    #[arg(short = 'T', long)]
    pub(crate) no_tty: bool,
    /// Variable added to the environment
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    pub(crate) env: Vec<(String, String)>,
    /// Program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

fn host_name(text: &str) -> Result<String, &'static str> {
    let known = |c: char| c.is_ascii_alphanumeric() || ".-_:[]".contains(c);
    match !text.is_empty() && text.chars().all(known) {
        true => Ok(text.to_owned()),
        false => Err("write a name such as desktops.example, without `https://` and without a path"),
    }
}

fn variable(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE"),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum User {
    /// Add a user
    Add {
        /// Name at sign-in
        name: UserName,
        /// Let the user administer the farm
        #[arg(long)]
        admin: bool,
        /// Tenant whose user it is
        #[arg(long, value_name = "NAME", default_value_t)]
        tenant: TenantName,
        #[command(flatten)]
        password: PasswordSource,
    },
    /// List users
    Ls,
    /// Let a user administer the farm, or no more
    Admin {
        /// Name of the user
        name: UserName,
        /// No more
        #[arg(long)]
        revoke: bool,
    },
    /// Remove a user
    Rm {
        /// Name of the user
        name: UserName,
        /// Remove the user's desktops and homes too
        #[arg(long)]
        with_desktops: bool,
    },
    /// Set a user's password
    Passwd {
        /// Name of the user
        name: UserName,
        #[command(flatten)]
        password: PasswordSource,
    },
}

/// Where a password comes from. Never from an argument: every user of the
/// machine can read those. Without a choice it is asked for.
#[derive(Debug, Args)]
pub(crate) struct PasswordSource {
    /// Read the password from the first line of standard input
    #[arg(long, conflicts_with = "generate")]
    pub(crate) password_stdin: bool,
    /// Make a password and print it, this once
    #[arg(long)]
    pub(crate) generate: bool,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::{CommandFactory, error::ErrorKind};

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_stand_anywhere() {
        for line in ["qvd --json --root /x desktop ls", "qvd desktop ls --json --root /x"] {
            let cli = parse(line).unwrap();
            assert!(cli.global.json && cli.global.root.as_os_str() == "/x", "{line}");
        }
    }

    #[test]
    fn exec_leaves_the_program_its_own_options() {
        let Command::Desktop(Desktop::Exec(exec)) = parse("qvd desktop exec 7 -T -- ls --json -T").unwrap().command
        else {
            unreachable!()
        };
        assert_eq!(exec.command, ["ls", "--json", "-T"]);
        assert!(exec.no_tty && !exec.tty);
        let without_dashes = parse("qvd desktop exec 7 ls -l --json").unwrap();
        assert!(!without_dashes.global.json, "an option of `ls` was taken for ours");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for line in [
            "qvd",
            "qvd desktop start 0",
            "qvd desktop start -1",
            "qvd desktop create ../root icewm",
            "qvd desktop create ana icewm --memory lots",
            "qvd desktop create ana icewm --no-network --address 10.0.0.1",
            "qvd user add ana --password secret",
            "qvd user add ana --password-stdin --generate",
            "qvd up --listen nowhere",
            "qvd up --tls-cert cert.pem",
            "qvd up --memory much",
            "qvd up --memory-promise 0",
            "qvd up --host https://desktops.example",
            "qvd desktop exec 7",
            "qvd desktop exec 7 -e =x true",
        ] {
            let error = parse(line).unwrap_err();
            assert!(!matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion), "{line}");
        }
    }

    #[test]
    fn no_option_takes_a_secret() {
        fn visit(command: &clap::Command) {
            for arg in command.get_arguments().filter(|arg| arg.get_action().takes_values()) {
                let name = arg.get_id().as_str();
                for word in ["password", "passwd", "secret", "token"] {
                    assert!(!name.contains(word), "`{}` takes `{name}` on the command line", command.get_name());
                }
            }
            command.get_subcommands().for_each(visit);
        }
        visit(&Cli::command());
    }
}
