//! Owns the answer to "whose is it" where room is shared out: bytes of bodies, kept replies, replies without a
//! reader, connections.
//!
//! Invariant: it decides shares only, never what somebody may read; that is the [`Owner`]'s alone.

use std::net::{IpAddr, SocketAddr};

use crate::stream::store::Owner;

/// Bytes of an IPv6 address that name a network; its owner has all the addresses in it.
const NETWORK_BYTES: usize = 8;

/// A client as a network sees it: an IPv4 address, or the /64 network of an IPv6 address. All clients behind
/// one proxy are one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer(IpAddr);

impl Peer {
    /// The peer that has this address.
    pub fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => {
                let mut octets = address.octets();
                octets[NETWORK_BYTES..].fill(0);
                IpAddr::from(octets)
            }
            address => address,
        })
    }
}

/// Who has a share: an API key or, where none is needed, a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Client {
    /// The holder of a key, wherever its requests come from.
    Key(Owner),
    /// A peer; `None` where the socket can't say.
    Peer(Option<Peer>),
}

impl Client {
    /// Who sent a request with this owner from this address.
    pub fn of(owner: Owner, address: Option<SocketAddr>) -> Self {
        match owner {
            Owner::ANYBODY => Self::Peer(address.map(|address| Peer::of(address.ip()))),
            owner => Self::Key(owner),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_goes_before_an_address_and_an_ipv6_network_is_one_peer() {
        let peer = |text: &str| Client::of(Owner::ANYBODY, Some(SocketAddr::new(text.parse().unwrap(), 1)));
        assert_eq!(peer("10.0.0.1"), peer("::ffff:10.0.0.1"));
        assert_ne!(peer("10.0.0.1"), peer("10.0.0.2"));
        assert_eq!(peer("2001:db8:1:2::1"), peer("2001:db8:1:2:ffff::9"));
        assert_ne!(peer("2001:db8:1:2::1"), peer("2001:db8:1:3::1"));
        let key = Owner::of("key");
        assert_eq!(Client::of(key, None), Client::of(key, "10.0.0.1:1".parse().ok()));
        assert_ne!(Client::of(key, None), Client::of(Owner::ANYBODY, None));
    }
}
