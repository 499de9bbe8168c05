//! Owns who sends a request: the principal that an API key stands for, and the client whose share of memory,
//! connections and kept replies the request takes.
//!
//! Invariant: what a client may read is decided by the [`Owner`] alone; a [`Client`] decides shares only.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use glm_engine::TenantId;
use sha2::{Digest, Sha256};

/// Bytes of an IPv6 address that name a network; its owner has all the addresses in it.
const NETWORK_BYTES: usize = 8;
/// Bytes of a hash that tell keys apart in a log.
const NAME_BYTES: usize = 4;

/// Whose a reply is: a hash of the API key, so that logs and replicas never see the key itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner([u8; 32]);

impl Owner {
    /// Everybody, where no key is asked for.
    pub const ANYBODY: Self = Self([0; 32]);

    /// Who holds this key.
    pub fn of(api_key: &str) -> Self {
        Self(Sha256::digest(api_key).into())
    }

    /// The hash.
    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Who is behind a request. Made once, by the guard in front of `/v1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Principal {
    /// Whose replies they are.
    pub owner: Owner,
    /// In whose turn the engine serves it: an index into the configured shares, which another key file may change.
    pub tenant: TenantId,
}

impl Principal {
    /// Everybody, where no key is asked for.
    pub const ANYBODY: Self = Self { owner: Owner::ANYBODY, tenant: TenantId(0) };
}

/// Its name in logs: the first digits of the key's hash, which stay when lines of the key file move.
impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.owner {
            Owner::ANYBODY => f.write_str("anybody"),
            Owner(hash) => hash[..NAME_BYTES].iter().try_for_each(|byte| write!(f, "{byte:02x}")),
        }
    }
}

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
