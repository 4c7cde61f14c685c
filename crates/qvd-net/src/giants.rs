//! Frames longer than their link, which a machine may hand over: its network card leaves
//! cutting to the host. nf_tables sees a whole length alone and cannot tell what is still
//! to be cut into segments that fit; a program where the link's frames come in can.

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE, Nla as _};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};
use qvd_sys::bpf::Program;
use rustix::{fd::AsRawFd as _, io::Errno};

use crate::{
    Error, NetlinkError,
    links::Request,
    netlink::{Netlink, gone_is_done},
    network::Inner,
    rules::Protection,
};

/// Options of a classifier. Source: Linux `include/uapi/linux/pkt_cls.h`, `TCA_BPF_FD`,
/// `TCA_BPF_NAME`, `TCA_BPF_FLAGS`, `TCA_BPF_ID`.
const FD: u16 = 6;
const NAME: u16 = 7;
const FLAGS: u16 = 8;
const ID: u16 = 11;

/// What the program says is what is done. Source: as above, `TCA_BPF_FLAG_ACT_DIRECT`.
const DIRECT: u32 = 1;

/// The first classifier, for every protocol: `tcm_info` holds both.
/// Source: Linux `include/uapi/linux/if_ether.h`, `ETH_P_ALL`.
const FIRST_FOR_ALL: u32 = 1 << 16 | 3_u16.to_be() as u32;

impl Inner {
    /// Keeps frames longer than its link from a machine's.
    pub(crate) fn stop_giants(&self, index: u32, link: &str) -> Result<(), Error> {
        if self.without.contains(&Protection::Giants) {
            return Ok(());
        }
        let requests = stop(index, self.no_giants(link)?);
        let stopped = gone_is_done(self.route().batch(requests).map(drop));
        stopped.map_err(Error::netlink("limit the length of frames from", link))
    }

    /// Whether they are.
    pub(crate) fn giants_are_stopped(&self, index: u32, link: &str) -> Result<bool, Error> {
        if self.without.contains(&Protection::Giants) {
            return Ok(true);
        }
        let stopped = are_stopped(&mut self.route(), index, self.no_giants(link)?);
        stopped.map_err(Error::netlink("read back the limit of", link))
    }

    fn no_giants(&self, link: &str) -> Result<&Program, Error> {
        if let Some(loaded) = self.no_giants.get() {
            return Ok(loaded);
        }
        let loaded = Program::no_giants().map_err(Error::io("load what limits the length of frames from", link))?;
        Ok(self.no_giants.get_or_init(|| loaded))
    }
}

/// Requests that have `program` look at whatever comes in by a link, in place of what did.
pub(crate) fn stop(index: u32, program: &Program) -> Vec<Request> {
    let option = |kind, value: &[u8]| TcOption::Other(DefaultNla::new(kind, value.to_vec()));
    let mut filter = classifier(index);
    filter.attributes.push(TcAttribute::Options(vec![
        option(FD, &program.fd().as_raw_fd().to_ne_bytes()),
        option(NAME, b"no_giants\0"),
        option(FLAGS, &DIRECT.to_ne_bytes()),
    ]));
    vec![
        Request::new(RouteNetlinkMessage::NewQueueDiscipline(place(index)), NLM_F_CREATE | NLM_F_REPLACE),
        Request::new(RouteNetlinkMessage::NewTrafficFilter(filter), NLM_F_CREATE | NLM_F_REPLACE),
    ]
}

/// Whether it does.
pub(crate) fn are_stopped(route: &mut Netlink, index: u32, program: &Program) -> Result<bool, NetlinkError> {
    let asked = route.batch(vec![Request::new(RouteNetlinkMessage::GetTrafficFilter(classifier(index)), 0)]);
    match asked {
        Ok(answers) => Ok(answers.iter().any(|answer| is_of(answer, program.number()))),
        // What is gone sends nothing.
        Err(error) if error.is(Errno::NODEV) => Ok(true),
        // No classifier; no place for one.
        Err(error) if error.is(Errno::NOENT) || error.is(Errno::INVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes all that looks at the frames of a link away.
#[cfg(test)]
pub(crate) fn let_pass(index: u32) -> Request {
    Request::new(RouteNetlinkMessage::DelQueueDiscipline(place(index)), 0)
}

fn is_of(answer: &RouteNetlinkMessage, number: u32) -> bool {
    let RouteNetlinkMessage::NewTrafficFilter(message) = answer else { return false };
    let options = message.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let has = |kind, wanted: u32| {
        options.clone().flatten().any(|option| {
            let mut value = [0; size_of::<u32>()];
            let fits = option.kind() == kind && option.value_len() == value.len();
            if fits {
                option.emit_value(&mut value);
            }
            fits && value == wanted.to_ne_bytes()
        })
    };
    has(ID, number) && has(FLAGS, DIRECT)
}

fn message(index: u32, handle: TcHandle, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(index).unwrap_or_default();
    (message.header.handle, message.header.parent) = (handle, parent);
    message
}

/// Where classifiers of a link stand.
fn place(index: u32) -> TcMessage {
    let mut message = message(index, TcHandle { major: u16::MAX, minor: 0 }, TcHandle::CLSACT);
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    message
}

fn classifier(index: u32) -> TcMessage {
    let where_frames_come_in = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
    let mut message = message(index, TcHandle { major: 0, minor: 1 }, where_frames_come_in);
    message.header.info = FIRST_FOR_ALL;
    message.attributes.push(TcAttribute::Kind("bpf".to_owned()));
    message
}
