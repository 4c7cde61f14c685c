//! What a hostile desktop does.

use std::collections::BTreeMap;

use qvd_node::ExecRequest;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Attack {
    ForkBomb,
    MemoryHog,
    DiskFiller,
    NetworkFlood,
}

impl Attack {
    pub(crate) const ALL: [Self; 4] = [Self::ForkBomb, Self::MemoryHog, Self::DiskFiller, Self::NetworkFlood];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::ForkBomb => "fork bomb",
            Self::MemoryHog => "memory hog",
            Self::DiskFiller => "disk filler",
            Self::NetworkFlood => "network flood",
        }
    }

    /// Each goes on for as long as its desktop does.
    const fn script(self) -> &'static str {
        match self {
            // None of them ends when it may not fork, as shells do.
            Self::ForkBomb => "exec perl -e 'while (1) { fork }'",
            // From the start again whenever one of them was killed.
            Self::MemoryHog => {
                "for _ in 1 2 3 4; do
                    while :; do perl -e 'while (1) { push @a, \"x\" x 1048576 }'; done &
                done; wait"
            }
            Self::DiskFiller => {
                "for i in 1 2; do
                    while :; do dd if=/dev/zero of=\"$HOME/fill$i\" bs=1M count=1024 conv=fsync; done &
                done; wait"
            }
            // To the gateway's discard port: what it does with it is its matter.
            Self::NetworkFlood => {
                "set -- $(ip route show default); exec 3>\"/dev/udp/$3/9\"
                for _ in 1 2 3 4; do
                    while :; do dd if=/dev/zero bs=1400 >&3; done &
                done; wait"
            }
        }
    }

    pub(crate) fn request(self) -> ExecRequest {
        let argv = ["bash", "-c", self.script()].map(str::to_owned).to_vec();
        ExecRequest { argv, env: BTreeMap::new(), root: false, tty: None }
    }
}
