//! What a port is sent at most: a token bucket on the host's end of its link.

use std::num::NonZeroU32;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};

use crate::{
    access::{burst_bytes, bytes_per_s},
    links::Request,
};

/// Options of a token bucket.
///
/// Source: Linux `include/uapi/linux/pkt_sched.h`, `TCA_TBF_PARMS`, `TCA_TBF_RATE64`, `TCA_TBF_BURST`.
const PARMS: u16 = 1;
const RATE64: u16 = 4;
const BURST: u16 = 6;

/// Length of `struct tc_tbf_qopt`, and where in it are the link layer of the
/// rate, the rate, and the limit. Source: as above.
const PARMS_LEN: usize = 36;
const LINK_LAYER_AT: usize = 1;
const RATE_AT: usize = 8;
const LIMIT_AT: usize = 24;

/// Frames are Ethernet's, so that no table of times is asked for. Source: as
/// above, `TC_LINKLAYER_ETHERNET`.
const ETHERNET: u8 = 1;

/// What waits at most, as a part of a second.
const QUEUE_PER_S: u64 = 10;

/// Limits what leaves a link, or replaces such a limit.
pub(crate) fn shape(index: u32, rate: NonZeroU32) -> Request {
    let (burst, rate) = (burst_bytes(rate), bytes_per_s(rate));
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let mut parms = vec![0; PARMS_LEN];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(room) = parms.get_mut(at..at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
    };
    put(LINK_LAYER_AT, &[ETHERNET]);
    put(RATE_AT, &word(rate).to_ne_bytes());
    put(LIMIT_AT, &word(burst + rate / QUEUE_PER_S).to_ne_bytes());
    let option = |kind, value| TcOption::Other(DefaultNla::new(kind, value));
    let options = vec![
        option(PARMS, parms),
        option(RATE64, rate.to_ne_bytes().into()),
        option(BURST, word(burst).to_ne_bytes().into()),
    ];
    let mut message = root(index);
    message.attributes.push(TcAttribute::Kind("tbf".to_owned()));
    message.attributes.push(TcAttribute::Options(options));
    Request::new(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Takes such a limit away.
pub(crate) fn unshape(index: u32) -> Request {
    Request::new(RouteNetlinkMessage::DelQueueDiscipline(root(index)), 0)
}

fn root(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(index).unwrap_or_default();
    message.header.parent = TcHandle::ROOT;
    message
}
