//! The rules of the table of the family bridge. With these rules, a pod can send packets only from
//! its own addresses. In the syntax of nft(8), the table is:
//!
//! ```text
//! table bridge rrun0 {
//!     set ports { type ifname }
//!     set sources4 { type ifname . ether_addr . ipv4_addr }
//!     set sources6 { type ifname . ether_addr . ipv6_addr }
//!     chain pods {
//!         type filter hook prerouting priority -310;
//!         iifname != "rr*" accept
//!         meta protocol ip iifname . ether saddr . ip saddr @sources4 accept
//!         meta protocol ip6 icmpv6 type nd-neighbor-advert
//!             iifname . ether saddr . icmpv6 taddr @sources6
//!             iifname . ether saddr . ip6 saddr @sources6 accept
//!         meta protocol ip6 icmpv6 type nd-neighbor-advert iifname @ports drop
//!         meta protocol ip6 iifname . ether saddr . ip6 saddr @sources6 accept
//!         meta protocol arp iifname . ether saddr . arp saddr ip @sources4
//!             iifname . arp saddr ether . arp saddr ip @sources4 accept
//!         iifname @ports drop
//!     }
//! }
//! ```
//!
//! The chain also gets the frames of other bridges. The first rule accepts these frames after one
//! comparison, because the names of the pods' bridge ports begin with `rr`. The chain has a lower
//! priority than the chains of other programs and than br_netfilter, so it runs first.
//!
//! A bridge usually processes frames to the addresses 01:80:c2:00:00:00 to 01:80:c2:00:00:0f without
//! running any chain. The pods' bridge ports are configured to forward these frames like other
//! frames ([`crate::link::FORWARDED_GROUPS`]), so that the rules apply to them.
//!
//! The second rule for neighbour advertisements also drops an advertisement whose target cannot be
//! read. The kernel ignores advertisements in fragments, see RFC 6980.

use super::expression::{IpFamily, Payload, Rule};
use super::sets::Set;
use super::{Chains, hook};
use crate::link::HOST_PREFIX;

const PODS: &str = "pods";
const NF_BR_PRE_ROUTING: u32 = 0;
/// The priority of the chain. The lowest priority of other programs is usually -300, which has the
/// name `dstnat` in nft(8).
const PRIORITY: i32 = -310;

pub(super) const CHAINS: Chains = &[(PODS, hook("filter", NF_BR_PRE_ROUTING, PRIORITY))];

const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
const IPPROTO_ICMPV6: u8 = 58;
const ND_NEIGHBOR_ADVERT: u8 = 136;

const ETHER_SOURCE: Payload = Payload::link(6, 6);
const ARP_ETHER_SOURCE: Payload = Payload::network(8, 6);
const ARP_IP_SOURCE: Payload = Payload::network(14, 4);
const ICMPV6_TYPE: Payload = Payload::transport(0, 1);
const ADVERTISED: Payload = Payload::transport(8, 16);

pub(super) fn rules() -> Vec<(&'static str, Rule)> {
    let of = |protocol| Rule::default().protocol(protocol);
    let advertisement = || {
        of(ETH_P_IPV6)
            .l4_protocol(IPPROTO_ICMPV6)
            .field(ICMPV6_TYPE, &[ND_NEIGHBOR_ADVERT])
    };
    let sources = |family: IpFamily| (Set::Sources(family), family.source_field());
    let (v4, source4) = sources(IpFamily::V4);
    let (v6, source6) = sources(IpFamily::V6);
    let from = |rule: Rule, set, address| rule.look_up_source(set, ETHER_SOURCE, address);
    let rules = vec![
        Rule::default()
            .interface_has_other_prefix(HOST_PREFIX)
            .accept(),
        from(of(ETH_P_IP), v4, source4).accept(),
        from(from(advertisement(), v6, ADVERTISED), v6, source6).accept(),
        advertisement().look_up_interface(Set::Ports).drop_packet(),
        from(of(ETH_P_IPV6), v6, source6).accept(),
        from(of(ETH_P_ARP), v4, ARP_IP_SOURCE)
            .look_up_source(v4, ARP_ETHER_SOURCE, ARP_IP_SOURCE)
            .accept(),
        Rule::default().look_up_interface(Set::Ports).drop_packet(),
    ];
    rules.into_iter().map(|rule| (PODS, rule)).collect()
}
