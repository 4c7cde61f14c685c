//! `DHCPv6` (RFC 8415), the server's side for addresses that are known
//! beforehand.

use std::net::{IpAddr, Ipv6Addr};

use dhcproto::{
    Decodable as _, Decoder, Encodable as _,
    v6::{DhcpOption, DhcpOptions, IAAddr, IANA, IAPD, Message, MessageType, OptionCode, Status, StatusCode},
};

use super::{Guest, Site, frame};

/// Longest identifier of a client that is given back (RFC 8415, 11.1).
const DUID_MAX_OCTETS: usize = 130;

/// The crate subtracts from lengths that it did not look at, and where
/// overflow is checked for that panics. A guest must not end the thread that
/// answers all.
fn decode(message: &[u8]) -> Option<Message> {
    std::panic::catch_unwind(|| Message::decode(&mut Decoder::new(message)).ok()).ok().flatten()
}

pub(super) fn answer(site: &Site, guest: &Guest, from: Ipv6Addr, message: &[u8]) -> Option<Vec<u8>> {
    use MessageType::{
        Advertise, Confirm, Decline, InformationRequest, Rebind, Release, Renew, Reply, Request, Solicit,
    };
    let address = guest.ipv6?;
    let asked = decode(message)?;
    let client = match asked.opts().get(OptionCode::ClientId) {
        Some(DhcpOption::ClientId(client)) if client.len() <= DUID_MAX_OCTETS => Some(client.clone()),
        Some(_) => return None,
        None => None,
    };
    let server = server_id(site);
    let meant = match asked.opts().get(OptionCode::ServerId) {
        Some(DhcpOption::ServerId(meant)) => Some(*meant == server),
        _ => None,
    };
    let kind = asked.msg_type();
    // Which messages name a server and which must not (RFC 8415, 16).
    match (kind, meant) {
        (Solicit | Confirm | Rebind, None) | (Request | Renew | Release | Decline, Some(true)) if client.is_some() => {}
        (InformationRequest, None | Some(true)) => {}
        _ => return None,
    }
    let rapid = kind == Solicit && asked.opts().get(OptionCode::RapidCommit).is_some();
    let mut said = Message::new_with_id(if kind == Solicit && !rapid { Advertise } else { Reply }, asked.xid());
    let options = said.opts_mut();
    options.insert(DhcpOption::ServerId(server));
    if let Some(client) = client {
        options.insert(DhcpOption::ClientId(client));
    }
    if rapid {
        options.insert(DhcpOption::RapidCommit);
    }
    match kind {
        Solicit | Request | Renew | Rebind => associate(site, address, asked.opts(), options),
        Confirm => options.insert(DhcpOption::StatusCode(confirmed(address, asked.opts()))),
        Release | Decline => options.insert(status(Status::Success, "")),
        _ => {}
    }
    let servers: Vec<_> = site
        .name_servers
        .iter()
        .filter_map(|server| match server {
            IpAddr::V6(server) => Some(*server),
            IpAddr::V4(_) => None,
        })
        .collect();
    if !servers.is_empty() && !matches!(kind, Release | Decline | Confirm) {
        options.insert(DhcpOption::DomainNameServers(servers));
    }
    frame::dhcp6(site, guest, from, &said.to_vec().ok()?)
}

/// Link-layer identifier of the bridge (RFC 8415, 11.4). Written out here: the
/// crate's own puts sixteen octets where the MAC's six belong.
fn server_id(site: &Site) -> Vec<u8> {
    [&[0, 3, 0, 1][..], &site.gateway_mac.octets()].concat()
}

fn status(status: Status, text: &str) -> DhcpOption {
    DhcpOption::StatusCode(StatusCode { status, msg: text.to_owned() })
}

/// The first association for an address gets it; all else gets nothing.
fn associate(site: &Site, address: Ipv6Addr, asked: &DhcpOptions, said: &mut DhcpOptions) {
    let lease_s = site.lease_s();
    let given = || IAAddr { addr: address, preferred_life: lease_s, valid_life: lease_s, opts: DhcpOptions::new() };
    let mut is_given = false;
    for option in asked.iter() {
        match option {
            DhcpOption::IANA(association) => {
                let mut opts = DhcpOptions::new();
                if is_given {
                    opts.insert(status(Status::NoAddrsAvail, "one address is all there is"));
                } else {
                    opts.insert(DhcpOption::IAAddr(given()));
                    is_given = true;
                    forget_others(address, &association.opts, &mut opts);
                }
                let (t1, t2) = (lease_s / 2, lease_s / 5 * 4);
                said.insert(DhcpOption::IANA(IANA { id: association.id, t1, t2, opts }));
            }
            DhcpOption::IAPD(delegation) => {
                let mut opts = DhcpOptions::new();
                opts.insert(status(Status::NoPrefixAvail, "no prefix is given away"));
                said.insert(DhcpOption::IAPD(IAPD { id: delegation.id, t1: 0, t2: 0, opts }));
            }
            _ => {}
        }
    }
}

/// Addresses that the guest thinks are its own last no longer.
fn forget_others(address: Ipv6Addr, asked: &DhcpOptions, said: &mut DhcpOptions) {
    for option in asked.iter() {
        if let DhcpOption::IAAddr(other) = option
            && other.addr != address
        {
            let gone = IAAddr { addr: other.addr, preferred_life: 0, valid_life: 0, opts: DhcpOptions::new() };
            said.insert(DhcpOption::IAAddr(gone));
        }
    }
}

fn confirmed(address: Ipv6Addr, asked: &DhcpOptions) -> StatusCode {
    let others = asked.iter().any(|option| match option {
        DhcpOption::IANA(association) => {
            association.opts.iter().any(|option| matches!(option, DhcpOption::IAAddr(a) if a.addr != address))
        }
        _ => false,
    });
    let status = if others { Status::NotOnLink } else { Status::Success };
    StatusCode { status, msg: String::new() }
}
