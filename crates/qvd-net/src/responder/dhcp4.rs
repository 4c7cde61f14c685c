//! `DHCPv4` (RFC 2131), the server's side for addresses that are known
//! beforehand.

use std::net::{IpAddr, Ipv4Addr};

use dhcproto::{
    Encodable as _,
    v4::{DhcpOption, HType, Message, MessageType, Opcode, OptionCode, borrowed},
};

use super::{Guest, Site, frame};

/// Longest identifier of a client that is given back.
const CLIENT_ID_MAX_OCTETS: usize = 64;

/// What is read of a request. Options that nobody here needs stay undecoded:
/// where assertions are on, the crate panics at some that are malformed, such
/// as a network interface (option 94) that is not three octets long.
struct Asked {
    xid: u32,
    flags: dhcproto::v4::Flags,
    ciaddr: Ipv4Addr,
    kind: MessageType,
    server: Option<Ipv4Addr>,
    wish: Option<Ipv4Addr>,
    client: Option<DhcpOption>,
}

/// Reads what `guest` asks. Who asks for another's address asks through
/// another port; relays have no business on a bridge of desktops.
fn read(guest: &Guest, message: &[u8]) -> Option<Asked> {
    let asked = borrowed::Message::new(message).ok()?;
    // The length first: the crate trusts it.
    let is_from_guest = asked.opcode() == Opcode::BootRequest
        && asked.htype() == HType::Eth
        && asked.hlen() == 6
        && asked.chaddr() == guest.mac.octets()
        && asked.giaddr().is_unspecified();
    if !is_from_guest {
        return None;
    }
    let (mut kind, mut server, mut wish, mut client) = (None, None, None, None);
    for option in asked.opts() {
        let is_read = match option.code() {
            OptionCode::MessageType | OptionCode::ServerIdentifier | OptionCode::RequestedIpAddress => true,
            OptionCode::ClientIdentifier => option.len() <= CLIENT_ID_MAX_OCTETS,
            _ => false,
        };
        if !is_read {
            continue;
        }
        match option.into_option().ok()? {
            DhcpOption::MessageType(it) => kind = Some(it),
            DhcpOption::ServerIdentifier(it) => server = Some(it),
            DhcpOption::RequestedIpAddress(it) => wish = Some(it),
            it => client = Some(it),
        }
    }
    Some(Asked { xid: asked.xid(), flags: asked.flags(), ciaddr: asked.ciaddr(), kind: kind?, server, wish, client })
}

pub(super) fn answer(site: &Site, guest: &Guest, message: &[u8]) -> Option<Vec<u8>> {
    let asked = read(guest, message)?;
    match asked.kind {
        MessageType::Discover => granted(site, guest, &asked, MessageType::Offer),
        MessageType::Request => match wish(site, &asked)? {
            wish if wish == guest.ipv4 => granted(site, guest, &asked, MessageType::Ack),
            _ => refused(site, guest, &asked),
        },
        MessageType::Inform => informed(site, guest, &asked),
        // Nothing was noted when it was given, so nothing is when it is back.
        _ => None,
    }
}

/// The address that a request is for; none when it is for another server.
fn wish(site: &Site, asked: &Asked) -> Option<Ipv4Addr> {
    if asked.server.is_some_and(|server| server != site.subnet.gateway()) {
        return None;
    }
    Some(asked.wish.unwrap_or(asked.ciaddr))
}

fn granted(site: &Site, guest: &Guest, asked: &Asked, kind: MessageType) -> Option<Vec<u8>> {
    let mut said = reply(site, guest, asked, kind);
    let lease_s = site.lease_s();
    said.set_yiaddr(guest.ipv4);
    said.opts_mut().insert(DhcpOption::AddressLeaseTime(lease_s));
    // The fractions of RFC 2131, 4.4.5.
    said.opts_mut().insert(DhcpOption::Renewal(lease_s / 2));
    said.opts_mut().insert(DhcpOption::Rebinding(lease_s / 8 * 7));
    configure(site, guest, &mut said);
    let to = if !asked.ciaddr.is_unspecified() {
        asked.ciaddr
    } else if asked.flags.broadcast() {
        Ipv4Addr::BROADCAST
    } else {
        guest.ipv4
    };
    // An address that is not the guest's is not written to.
    let to = if to == guest.ipv4 { to } else { Ipv4Addr::BROADCAST };
    frame::dhcp4(site, guest, to, &said.to_vec().ok()?)
}

fn informed(site: &Site, guest: &Guest, asked: &Asked) -> Option<Vec<u8>> {
    let mut said = reply(site, guest, asked, MessageType::Ack);
    configure(site, guest, &mut said);
    frame::dhcp4(site, guest, guest.ipv4, &said.to_vec().ok()?)
}

fn refused(site: &Site, guest: &Guest, asked: &Asked) -> Option<Vec<u8>> {
    let said = reply(site, guest, asked, MessageType::Nak);
    frame::dhcp4(site, guest, Ipv4Addr::BROADCAST, &said.to_vec().ok()?)
}

fn reply(site: &Site, guest: &Guest, asked: &Asked, kind: MessageType) -> Message {
    let mut said = Message::default();
    said.set_opcode(Opcode::BootReply)
        .set_htype(HType::Eth)
        .set_xid(asked.xid)
        .set_flags(asked.flags)
        .set_chaddr(&guest.mac.octets());
    if kind != MessageType::Nak {
        said.set_ciaddr(asked.ciaddr);
    }
    said.opts_mut().insert(DhcpOption::MessageType(kind));
    said.opts_mut().insert(DhcpOption::ServerIdentifier(site.subnet.gateway()));
    // RFC 6842: given back as it came.
    if let Some(id) = &asked.client {
        said.opts_mut().insert(id.clone());
    }
    said
}

fn configure(site: &Site, guest: &Guest, said: &mut Message) {
    let options = said.opts_mut();
    options.insert(DhcpOption::SubnetMask(site.subnet.netmask()));
    options.insert(DhcpOption::BroadcastAddr(site.subnet.broadcast()));
    options.insert(DhcpOption::InterfaceMtu(site.mtu_octets));
    if guest.way_out {
        options.insert(DhcpOption::Router(vec![site.subnet.gateway()]));
    }
    let servers: Vec<_> = site
        .name_servers
        .iter()
        .filter_map(|server| match server {
            IpAddr::V4(server) => Some(*server),
            IpAddr::V6(_) => None,
        })
        .collect();
    if !servers.is_empty() {
        options.insert(DhcpOption::DomainNameServer(servers));
    }
    if let Some(name) = &guest.name {
        options.insert(DhcpOption::Hostname(name.clone()));
    }
}
