//! The networks of a host: one of the installation's own, and one of each
//! further tenant that has desktops here.

use std::{
    collections::BTreeMap,
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use qvd_core::{DesktopId, NetPolicy, TenantName};
use qvd_net::{NetConfig, Network, SiteRange, TenantPools, forget_address};

use crate::{
    HostError, HostErrorKind, NodeConfig,
    desktop::{failed, net},
    net_watch::NetWatch,
};

/// What the tenants of a host get, and what they may reach.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Tenants {
    /// Most that any desktop may reach, whoever's it is.
    pub all: NetPolicy,
    /// Addresses of the tenants beside `default`, who has the network of
    /// [`NodeConfig::network`]. Without them there is no other.
    pub range: Option<SiteRange>,
    /// Most that the desktops of a tenant may reach, whatever their own policies
    /// say. Who is not named here may reach everything.
    pub policies: BTreeMap<TenantName, NetPolicy>,
}

impl Default for Tenants {
    /// One tenant, who may reach everything.
    fn default() -> Self {
        Self { all: NetPolicy::unlimited(), range: None, policies: BTreeMap::new() }
    }
}

/// One network and what watches over it, which ends first.
#[derive(Debug)]
struct Watched {
    watch: NetWatch,
    network: Network,
}

impl Watched {
    fn open(config: NetConfig, addresses: &std::path::Path) -> Result<Self, HostError> {
        let network = Network::open_keeping(config, addresses).map_err(net("cannot make the network"))?;
        let watch = NetWatch::open(&network).map_err(net("cannot watch the rules"))?;
        Ok(Self { watch, network })
    }

    fn close(&mut self) -> Result<(), HostError> {
        self.watch.close().map_err(net("cannot end the watch over the rules"))?;
        self.network.close().map_err(net("cannot remove the network"))
    }
}

/// Opened when they are needed, and closed together.
#[derive(Debug)]
pub(crate) struct Networks {
    /// The installation's own, which `default` has.
    own: NetConfig,
    tenants: Tenants,
    /// Of who has which addresses.
    directory: PathBuf,
    pools: Option<Mutex<TenantPools>>,
    /// `None` once they were closed.
    open: Mutex<Option<BTreeMap<TenantName, Watched>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Networks {
    /// Opens the installation's own, and takes over those of tenants that an earlier
    /// node left.
    ///
    /// # Errors
    /// One cannot be opened, or the tenants have no range any more that they had.
    pub(crate) fn open(config: &NodeConfig) -> Result<Self, HostError> {
        let directory = config.root.join("network");
        let what = || format!("cannot keep addresses below `{}`", directory.display());
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        made.map_err(failed(HostErrorKind::Failed, what()))?;
        let file = directory.join("tenants");
        let pools = match config.tenants.range {
            Some(range) => {
                Some(TenantPools::open(&file, range, config.network).map_err(net("cannot give networks to tenants"))?)
            }
            None if file.exists() => {
                let what = format!("tenants have addresses by `{}`: their range has to be named", file.display());
                return Err(HostError::new(HostErrorKind::Invalid, what));
            }
            None => None,
        };
        let known: Vec<_> = pools.iter().flat_map(|pools| pools.tenants().cloned()).collect();
        let networks = Self {
            own: config.network,
            tenants: config.tenants.clone(),
            directory,
            pools: pools.map(Mutex::new),
            open: Mutex::new(Some(BTreeMap::new())),
        };
        // The first, so that it is the one that knows what the host forwarded before.
        networks.with(&TenantName::default(), |_| Ok(()))?;
        for tenant in known {
            let instance = networks.config_of(&tenant)?.instance;
            if Network::is_left(instance).map_err(net(format!("cannot look for the network of tenant {tenant}")))? {
                networks.with(&tenant, |_| Ok(()))?;
            }
        }
        Ok(networks)
    }

    fn config_of(&self, tenant: &TenantName) -> Result<NetConfig, HostError> {
        if *tenant == TenantName::default() {
            return Ok(self.own);
        }
        let no_range = || {
            let what = format!("tenant {tenant} has no network: this host has no range of addresses for tenants");
            HostError::new(HostErrorKind::Unsupported, what)
        };
        let mut pools = lock(self.pools.as_ref().ok_or_else(no_range)?);
        pools.network_of(tenant).map_err(net(format!("tenant {tenant} gets no network")))
    }

    fn addresses_of(&self, tenant: &TenantName) -> PathBuf {
        self.directory.join(format!("addresses.{tenant}"))
    }

    /// Does something with a tenant's network, which is opened if it is not.
    pub(crate) fn with<T>(
        &self,
        tenant: &TenantName,
        f: impl FnOnce(&Network) -> Result<T, HostError>,
    ) -> Result<T, HostError> {
        let mut open = lock(&self.open);
        let open = open.as_mut().ok_or_else(closing)?;
        if let Some(there) = open.get(tenant) {
            return f(&there.network);
        }
        let opened = Watched::open(self.config_of(tenant)?, &self.addresses_of(tenant))?;
        f(&open.entry(tenant.clone()).or_insert(opened).network)
    }

    /// Does something with every network that is open.
    pub(crate) fn each(&self, f: impl Fn(&Network) -> Result<(), qvd_net::Error>) -> Result<(), qvd_net::Error> {
        lock(&self.open).iter().flat_map(BTreeMap::values).try_for_each(|there| f(&there.network))
    }

    /// What a desktop reaches needs the permission of its tenant and of the
    /// installation, and whatever is routed the host's.
    pub(crate) fn allowed(&self, tenant: &TenantName, policy: &NetPolicy) -> NetPolicy {
        let of_tenant = self.tenants.policies.get(tenant);
        let allowed = of_tenant.map_or_else(|| policy.clone(), |most| policy.within(most)).within(&self.tenants.all);
        if self.own.internet {
            return allowed;
        }
        let NetPolicy { services, down_kbit_s, multicast, addresses, .. } = allowed;
        NetPolicy { port: allowed.port, services, down_kbit_s, multicast, addresses, ..NetPolicy::none() }
    }

    /// Keeps no address for a desktop that will not come again.
    pub(crate) fn forget(&self, id: DesktopId) -> Result<(), HostError> {
        let open = lock(&self.open);
        // Once this host has shut down, only what is kept on disk is left of them.
        let open: Vec<_> = open.iter().flatten().collect();
        let mut known = vec![TenantName::default()];
        known.extend(self.pools.iter().flat_map(|pools| lock(pools).tenants().cloned().collect::<Vec<_>>()));
        let closed = known.iter().filter(|tenant| open.iter().all(|(there, _)| there != tenant));
        let closed = closed.map(|tenant| forget_address(&self.addresses_of(tenant), id));
        let forgotten = open.iter().map(|(_, there)| there.network.forget(id)).chain(closed).collect::<Result<(), _>>();
        forgotten.map_err(net(format!("cannot give back the address of desktop {id}")))
    }

    /// Removes them all; what is removed stays so when another cannot be.
    pub(crate) fn close(&self) -> Result<(), HostError> {
        let mut open = lock(&self.open);
        let Some(networks) = open.as_mut() else { return Ok(()) };
        // The installation's own last: see `open`.
        let own = TenantName::default();
        let others: Vec<_> = networks.keys().filter(|tenant| **tenant != own).cloned().collect();
        for tenant in others.into_iter().chain([own]) {
            if let Some(network) = networks.get_mut(&tenant) {
                network.close()?;
                networks.remove(&tenant);
            }
        }
        *open = None;
        Ok(())
    }
}

fn closing() -> HostError {
    HostError::new(HostErrorKind::Busy, "this host is shutting down")
}
