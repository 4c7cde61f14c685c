//! Virtual machines without a daemon: each reads its system from one base that
//! all share, and is kept by the init that containers have too. Prints a line of
//! JSON for each, waits for the end of its input, and removes all.
//!
//! As root: `cargo run --release --example vm -- --image DIR|FILE [--template] [--count N] [--memory MIB]`
//!
//! `DIR` is a file tree, for instance one that an image was exported to; `FILE`
//! is such a tree as an EROFS, or a disk of any system, raw or qcow2, which is
//! booted by a BIOS, or with `--uefi` by UEFI; with `--says TEXT` until its console
//! says that. A tree without a kernel boots the one below `--kernel DIR`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example shows what it does")]

use std::{
    fs::{self, File},
    io::Read as _,
    os::{
        fd::AsFd as _,
        unix::{fs::PermissionsExt as _, net::UnixListener},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use qvd::core::{Bytes, DesktopId, Instance, UidRange};
use qvd::guest::{
    Base, BootConfig, Carrier, Channel, ExecRequest, Identity, InitConfig, Link, Reply, Request, SessionConfig,
    SessionState, Stats, VERSION, Writable,
};
use qvd::storage::{is_guest_base, make_guest_base};
use qvd::virt::{
    Runtime,
    vm::{
        BaseDevice, BaseSpec, Boot, DiskFormat, DiskSpec, GuestKernel, HostMemory, Qemu, StopLimits, Template, Vm,
        VmSpec, VmState,
    },
};
use serde_json::{Value, json};

/// Longer than an emulated guest takes on a busy host.
const BOOTS_WITHIN: Duration = Duration::from_secs(300);
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);

struct Options {
    image: PathBuf,
    kernel: Option<PathBuf>,
    init: Option<PathBuf>,
    block: bool,
    uefi: bool,
    says: Option<String>,
    template: bool,
    count: u32,
    memory: Bytes,
}

/// What machines are made with.
struct Bed {
    qemu: Qemu,
    work: tempfile::TempDir,
    image: Image,
    options: Options,
}

enum Image {
    /// A tree that our init runs, and the kernel to boot.
    Tree { base: PathBuf, size: Bytes, kernel: GuestKernel, session: Option<SessionConfig> },
    /// A disk with a system of its own.
    Disk { file: PathBuf, qcow2: bool },
}

/// A machine, and the thread that carries what is said to its init.
struct Running {
    vm: Vm,
    carrier: Option<Carrier>,
    control: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let work = tempfile::tempdir()?;
    fs::set_permissions(work.path(), fs::Permissions::from_mode(0o700))?;
    let qemu = Qemu::find(Arc::new(Runtime::new(Instance::new(0xc0de))?))?;
    let image = Image::open(&options, work.path())?;
    let bed = Bed { qemu, work, image, options };
    let mut running = Vec::new();
    let template = if bed.options.template { Some(bed.template()?) } else { None };
    for number in 1..=bed.options.count {
        let id = DesktopId::new(number)?;
        let (machine, line) = match &template {
            Some(template) => bed.clone(id, template)?,
            None => bed.boot(id)?,
        };
        running.push((machine, line));
    }
    // Once all are there: what several have in common counts for each in part.
    for (machine, line) in &mut running {
        let HostMemory { proportional, private } = machine.vm.host_memory()?;
        line["pss_mib"] = json!(mib(proportional.get()));
        line["private_mib"] = json!(mib(private.get()));
    }
    if template.is_some() {
        for (machine, line) in &mut running {
            line["identity"] = machine.identity()?;
        }
        // And once a program has been run in each.
        for (machine, line) in &mut running {
            line["pss_used_mib"] = json!(mib(machine.vm.host_memory()?.proportional.get()));
        }
    }
    for (_, line) in &running {
        println!("{line}");
    }
    std::io::stdin().read_to_end(&mut Vec::new())?;
    for (machine, _) in &mut running {
        machine.close()?;
    }
    Ok(())
}

impl Image {
    fn open(options: &Options, work: &Path) -> Result<Self> {
        let path = options.image.canonicalize().with_context(|| format!("image `{}`", options.image.display()))?;
        if path.is_file() && !is_guest_base(&path)? {
            let mut magic = [0; 4];
            let read = File::open(&path)?.read(&mut magic)?;
            return Ok(Self::Disk { file: path, qcow2: read == 4 && &magic == b"QFI\xfb" });
        }
        let init = options.init()?;
        // The image's own kernel if it has one; else one that is named or around.
        let around = [PathBuf::from("target/bed"), PathBuf::from("/")];
        let places = options.kernel.iter().cloned().chain([path.clone()]).chain(around);
        let kernel = places.filter(|place| place.is_dir()).find_map(|place| GuestKernel::find(&place, &init).ok());
        let kernel = kernel.context("there is no kernel with its modules: name a directory with `--kernel`")?;
        let session = session_of(&path);
        let (base, size) = if path.is_dir() {
            let base = work.join("base");
            let size = make_guest_base(&path, &base)?;
            (base, size)
        } else {
            let size = Bytes::new(path.metadata()?.len());
            (path, size)
        };
        Ok(Self::Tree { base, size, kernel, session })
    }
}

/// The session of a tree that has what a desktop needs.
fn session_of(tree: &Path) -> Option<SessionConfig> {
    let has = |name: &str| tree.join("usr/bin").join(name).exists();
    let managers = ["x-session-manager", "icewm-session", "icewm", "startlxde", "xfce4-session", "x-window-manager"];
    let manager = managers.into_iter().find(|name| has(name)).filter(|_| has("nxagent"))?;
    let users = fs::read_to_string(tree.join("etc/passwd")).ok()?;
    let user = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next()?, fields.nth(1)?.parse::<u32>().ok()?);
        let (gid, home) = (fields.next()?.parse().ok()?, fields.nth(1)?);
        (uid == 1000).then(|| (name.to_owned(), uid, gid, home.to_owned()))
    });
    let (user, uid, gid, home) = user.unwrap_or_else(|| ("root".to_owned(), 0, 0, "/root".to_owned()));
    Some(SessionConfig {
        user,
        uid,
        gid,
        home,
        command: vec![manager.to_owned()],
        autostart: Vec::new(),
        geometry: "1280x800".parse().ok()?,
        head_linger_s: 0,
        attach_within_s: 100,
    })
}

impl Bed {
    fn spec(&self, id: DesktopId) -> Result<VmSpec> {
        let dir = self.work.path().join(id.to_string());
        fs::create_dir(&dir)?;
        let ids = UidRange::of_slot(id.number())?;
        let mut spec = match &self.image {
            Image::Tree { base, size, kernel, .. } => {
                let mut spec = VmSpec::of_kernel(id, ids, kernel, dir)?;
                let device = if self.options.block { BaseDevice::Block } else { BaseDevice::Pmem };
                spec.base = Some(BaseSpec { file: File::open(base)?.into(), size: *size, device });
                spec
            }
            Image::Disk { file, qcow2 } => {
                // What the guest writes goes to an overlay that is forgotten.
                let boot = if self.options.uefi { Boot::uefi()? } else { Boot::Bios };
                let mut spec = VmSpec::new(id, ids, boot, dir.clone());
                spec.disks.push(overlay(&dir, file, *qcow2)?);
                spec.screen = true;
                spec
            }
        };
        spec.limits.memory = self.options.memory;
        Ok(spec)
    }

    /// Starts a machine and waits for its init and its session.
    fn boot(&self, id: DesktopId) -> Result<(Running, Value)> {
        let spec = self.spec(id)?;
        let control = spec.dir.join("control.sock");
        let began = Instant::now();
        let mut vm = self.qemu.start(spec)?;
        let mut line = json!({ "id": id, "pid": vm.pid(), "cloned": false, "qmp_ms": ms(began) });
        vm.resume()?;
        let mut running = Running { vm, carrier: None, control };
        if let Image::Tree { session, .. } = &self.image {
            let booted = running.become_desktop(&self.boot_config(id, session.clone())?);
            let direct = booted.with_context(|| running.console())?;
            line["boot_ms"] = json!(ms(began));
            line["direct"] = json!(direct);
            running.wait_session().with_context(|| running.console())?;
            line["session_ms"] = json!(ms(began));
            let memory = running.stats()?.memory.unwrap_or_default();
            line["guest_cached_mib"] = json!(mib(memory.cached));
            line["guest_free_mib"] = json!(mib(memory.free));
        } else if let Some(text) = &self.options.says {
            line["says"] = json!(running.wait_words(text)?);
            line["boot_ms"] = json!(ms(began));
        }
        Ok((running, line))
    }

    /// Boots a machine once, to a waiting session, and saves it.
    fn template(&self) -> Result<Template> {
        let Image::Tree { session, .. } = &self.image else { bail!("only a tree with our init can be a template") };
        let id = DesktopId::new(self.options.count + 1)?;
        let spec = self.spec(id)?;
        let control = spec.dir.join("control.sock");
        let began = Instant::now();
        let (mut vm, mold) = self.qemu.start_template(spec, "example")?;
        vm.resume()?;
        let mut running = Running { vm, carrier: None, control };
        let booted = running.become_desktop(&self.boot_config(id, session.clone())?);
        booted.with_context(|| running.console())?;
        let boot_ms = ms(began);
        running.wait_session().with_context(|| running.console())?;
        let session_ms = ms(began);
        running.wait_rest()?;
        let HostMemory { proportional, private } = running.vm.host_memory()?;
        // Nobody holds the line while it is saved.
        drop(running.carrier.take());
        let saving = Instant::now();
        let template = mold.save(running.vm)?;
        let memory_mib = mib(template.memory_used()?.get());
        let line = json!({
            "template": true, "boot_ms": boot_ms, "session_ms": session_ms, "save_ms": ms(saving),
            "memory_mib": memory_mib, "pss_mib": mib(proportional.get()), "private_mib": mib(private.get()),
        });
        eprintln!("{line}");
        Ok(template)
    }

    /// Starts a clone and has it become another.
    fn clone(&self, id: DesktopId, template: &Template) -> Result<(Running, Value)> {
        let spec = self.spec(id)?;
        let control = spec.dir.join("control.sock");
        let began = Instant::now();
        let mut vm = self.qemu.start_clone(spec, template, "example")?;
        let qmp_ms = ms(began);
        vm.resume()?;
        let boot_ms = ms(began);
        let link = Link::reconnect(vm.link(), BOOTS_WITHIN)?;
        let mut running = Running { vm, carrier: None, control };
        running.carry(link)?;
        match running.ask(&Request::Identify(Identity::fresh(format!("vm-{id}"), None)?))?.recv(BOOTS_WITHIN)?.0 {
            Reply::Done => {}
            other => bail!("the init answered {other:?}"),
        }
        running.wait_session()?;
        let session_ms = ms(began);
        let memory = running.stats()?.memory.unwrap_or_default();
        let line = json!({
            "id": id, "pid": running.vm.pid(), "cloned": true, "qmp_ms": qmp_ms, "boot_ms": boot_ms,
            "session_ms": session_ms, "guest_cached_mib": mib(memory.cached), "guest_free_mib": mib(memory.free),
        });
        Ok((running, line))
    }

    fn boot_config(&self, id: DesktopId, session: Option<SessionConfig>) -> Result<BootConfig> {
        Ok(BootConfig {
            identity: Identity::fresh(format!("vm-{id}"), None)?,
            base: if self.options.block { Base::Disk } else { Base::Memory },
            writable: Writable::Memory { bytes: self.options.memory.get() / 2 },
            home: None,
            init: InitConfig {
                version: VERSION,
                env: Default::default(),
                services: Vec::new(),
                session,
                name_servers: Vec::new(),
            },
        })
    }
}

/// A volatile disk on `file`, made by the storage layer's own writer.
fn overlay(dir: &Path, file: &Path, qcow2: bool) -> Result<DiskSpec> {
    use qvd::storage::{BaseDisk, DiskBackend as _, DiskFormat as Kind, Place, Qcow2};
    let kind = if qcow2 { Kind::Qcow2 } else { Kind::Raw };
    let base = BaseDisk::new(qvd::core::Digest::new([0; 32]), file, kind);
    let disks = Qcow2::new(Place::for_disks(dir)?);
    let disk = disks.create(&base, &"root".parse()?, &qvd::core::RootPolicy::Volatile.into())?;
    let device = disk.attach()?;
    let backing = qvd::virt::vm::BackingSpec { file: File::open(file)?.into(), qcow2 };
    Ok(DiskSpec {
        serial: "root".to_owned(),
        file: File::options().read(true).write(true).open(&device.path)?.into(),
        format: DiskFormat::Qcow2 { backing: Some(Box::new(backing)) },
    })
}

impl Running {
    /// Says to the guest what it is to be; whether it reads its base directly.
    fn become_desktop(&mut self, config: &BootConfig) -> Result<bool> {
        let mut link = Link::connect(self.vm.link(), BOOTS_WITHIN)?;
        let booted = link.boot(config, BOOTS_WITHIN)?;
        self.carry(link)?;
        Ok(booted.direct)
    }

    fn carry(&mut self, link: Link) -> Result<()> {
        self.carrier = Some(link.carry(UnixListener::bind(&self.control)?.into())?);
        Ok(())
    }

    fn ask(&self, request: &Request) -> Result<Channel> {
        let mut channel = Channel::new(std::os::unix::net::UnixStream::connect(&self.control)?.into());
        channel.send(request, &[])?;
        Ok(channel)
    }

    /// What tells the machine from others, as a program inside sees it; nothing
    /// in a tree without `cat`.
    fn identity(&self) -> Result<Value> {
        const NAMES: [(&str, &str); 3] = [
            ("machine_id", "/etc/machine-id"),
            ("hostname", "/proc/sys/kernel/hostname"),
            ("random", "/proc/sys/kernel/random/uuid"),
        ];
        let argv = ["cat"].into_iter().chain(NAMES.map(|(_, path)| path)).map(str::to_owned).collect();
        let (input, _) = std::io::pipe()?;
        let (mut output, theirs) = std::io::pipe()?;
        let mut channel = Channel::new(std::os::unix::net::UnixStream::connect(&self.control)?.into());
        let request = Request::Exec(ExecRequest { argv, env: Default::default(), root: true, tty: None });
        channel.send(&request, &[input.as_fd(), theirs.as_fd(), theirs.as_fd()])?;
        drop(theirs);
        let Reply::Started { .. } = channel.recv(ANSWERS_WITHIN)?.0 else { return Ok(Value::Null) };
        let mut said = String::new();
        output.read_to_string(&mut said)?;
        Ok(NAMES.iter().zip(said.lines()).map(|((name, _), line)| (*name, line)).collect())
    }

    fn wait_session(&self) -> Result<()> {
        let deadline = Instant::now() + BOOTS_WITHIN;
        let mut channel = self.ask(&Request::Watch)?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match channel.recv(left)?.0 {
                Reply::Status { session: SessionState::Ready | SessionState::None, .. } => return Ok(()),
                Reply::Status { .. } => {}
                other => bail!("the init answered {other:?}"),
            }
        }
    }

    /// Waits until it uses less than a tenth of a processor: what it would still do,
    /// every clone of it would do for itself.
    fn wait_rest(&self) -> Result<()> {
        const LOOKS_EVERY: Duration = Duration::from_secs(2);
        let deadline = Instant::now() + BOOTS_WITHIN;
        let mut before = self.vm.container().cpu_time()?;
        while Instant::now() < deadline {
            std::thread::sleep(LOOKS_EVERY);
            let used = self.vm.container().cpu_time()?;
            if used.saturating_sub(before) < LOOKS_EVERY / 10 {
                return Ok(());
            }
            before = used;
        }
        bail!("it does not come to rest within {BOOTS_WITHIN:?}")
    }

    fn stats(&self) -> Result<Stats> {
        match self.ask(&Request::Stats)?.recv(ANSWERS_WITHIN)?.0 {
            Reply::Stats(stats) => Ok(stats),
            other => bail!("the init answered {other:?}"),
        }
    }

    /// Waits until a line of the console has `text` in it; that line.
    fn wait_words(&mut self, text: &str) -> Result<String> {
        let deadline = Instant::now() + BOOTS_WITHIN;
        let mut said = String::new();
        loop {
            if let Some(line) = said.lines().find(|line| line.contains(text)) {
                return Ok(line.trim().to_owned());
            }
            ensure!(Instant::now() < deadline, "nothing says `{text}` within {BOOTS_WITHIN:?}, but: {said}");
            let state = self.vm.watch(Duration::from_millis(200))?;
            ensure!(!matches!(state, VmState::Down(_)), "the machine ended before it said `{text}`: {said}");
            said.push_str(&self.vm.console()?);
        }
    }

    /// What the guest's kernel said last, for an error.
    fn console(&mut self) -> String {
        let text = self.vm.console().unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        format!(
            "the console ended with: {}",
            lines.get(lines.len().saturating_sub(12)..).unwrap_or_default().join(" | ")
        )
    }

    fn close(&mut self) -> Result<()> {
        let asked =
            |request: &Request| self.ask(request).and_then(|mut channel| Ok(channel.recv::<Reply>(ANSWERS_WITHIN)?));
        let stopping = self.carrier.is_some() && asked(&Request::Stop { grace_ms: 1000 }).is_ok();
        let limits = StopLimits { guest: Duration::from_secs(20), button: Duration::ZERO };
        self.vm.stop(limits, || stopping)?;
        self.vm.wait(Duration::from_secs(20))?;
        if let Some(mut carrier) = self.carrier.take() {
            // The guest is gone: how the conversation ended says nothing.
            drop(carrier.close());
        }
        Ok(self.vm.close()?)
    }
}

fn ms(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 10_000.0).round() / 10.0
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

impl Options {
    fn parse() -> Result<Self> {
        let usage = "usage: vm --image DIR|FILE [--template] [--count N] [--memory MIB] [--block] [--uefi] \
                     [--says TEXT] [--kernel DIR] [--init FILE] [--json]";
        let mut options = Self {
            image: PathBuf::new(),
            kernel: None,
            init: None,
            block: false,
            uefi: false,
            says: None,
            template: false,
            count: 1,
            memory: Bytes::mib(256),
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("`{arg}` needs a value; {usage}"));
            match arg.as_str() {
                "--image" => options.image = value()?.into(),
                "--kernel" => options.kernel = Some(value()?.into()),
                "--init" => options.init = Some(value()?.into()),
                // As a disk: what a guest's own page cache costs.
                "--block" => options.block = true,
                "--uefi" => options.uefi = true,
                "--says" => options.says = Some(value()?),
                "--template" => options.template = true,
                "--count" => options.count = value()?.parse().context("`--count` is a number")?,
                "--memory" => options.memory = Bytes::mib(value()?.parse().context("`--memory` is a number of MiB")?),
                // Every line is JSON anyway.
                "--json" => {}
                _ => bail!("unknown argument `{arg}`; {usage}"),
            }
        }
        ensure!(options.image != Path::new(""), usage);
        Ok(options)
    }

    /// The static init: named, or where `make init` puts it.
    fn init(&self) -> Result<PathBuf> {
        let built = PathBuf::from("target/init/qvd-init");
        let init = self.init.clone().or_else(|| std::env::var_os("QVD_INIT").map(Into::into)).unwrap_or(built);
        ensure!(init.is_file(), "there is no init at `{}`: run `make init`, or name it with `--init`", init.display());
        Ok(init)
    }
}
