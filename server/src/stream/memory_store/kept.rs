//! Owns the order in which ended replies are forgotten: after their time, or when the memory for them is short.
//!
//! Invariants: what is kept fits; when it is short, the client that holds most gives first, so nobody loses a
//! reply to another one who holds more; of one client's replies the promised ones go last, the older ones first.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tokio::time::Instant;

use crate::principal::Client;
use crate::stream::names::StreamId;

/// An ended reply.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) id: StreamId,
    pub(super) client: Client,
    pub(super) num_bytes: usize,
    /// A client was told to fetch it.
    pub(super) is_promised: bool,
    pub(super) expires: Instant,
}

/// Ended replies, by age.
#[derive(Debug, Default)]
pub(super) struct KeptReplies {
    next: u64,
    by_age: BTreeMap<u64, Kept>,
    clients: HashMap<Client, Holding>,
    num_bytes: usize,
}

/// What one client holds.
#[derive(Debug, Default)]
struct Holding {
    num_bytes: usize,
    promised: BTreeSet<u64>,
    others: BTreeSet<u64>,
}

impl KeptReplies {
    /// Bytes of all.
    pub(super) fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Keeps one more within `max_bytes`; returns those that are forgotten for it, which may be itself.
    pub(super) fn insert(&mut self, kept: Kept, max_bytes: usize) -> Vec<StreamId> {
        let mut forgotten = Vec::new();
        while self.num_bytes + kept.num_bytes > max_bytes {
            let Some(victim) = self.victim(&kept) else {
                forgotten.push(kept.id);
                return forgotten;
            };
            forgotten.extend(self.remove(victim));
        }
        let holding = self.clients.entry(kept.client).or_default();
        holding.num_bytes += kept.num_bytes;
        let place = if kept.is_promised { &mut holding.promised } else { &mut holding.others };
        place.insert(self.next);
        self.num_bytes += kept.num_bytes;
        self.by_age.insert(self.next, kept);
        self.next += 1;
        forgotten
    }

    /// Forgets the oldest if its time is over.
    pub(super) fn expire(&mut self, now: Instant) -> Option<StreamId> {
        let (&age, _) = self.by_age.first_key_value().filter(|(_, kept)| kept.expires <= now)?;
        self.remove(age)
    }

    /// What has to go for a new one; `None` if that is the new one itself.
    fn victim(&self, new: &Kept) -> Option<u64> {
        let mine = self.clients.get(&new.client).map_or(0, |holding| holding.num_bytes) + new.num_bytes;
        let largest = self.clients.iter().filter(|(client, _)| **client != new.client);
        let largest = largest.map(|(_, holding)| holding).max_by_key(|holding| holding.num_bytes);
        match largest.filter(|largest| largest.num_bytes > mine) {
            Some(largest) => largest.others.first().or(largest.promised.first()),
            None => {
                let mine = self.clients.get(&new.client)?;
                mine.others.first().or(mine.promised.first().filter(|_| new.is_promised))
            }
        }
        .copied()
    }

    fn remove(&mut self, age: u64) -> Option<StreamId> {
        let kept = self.by_age.remove(&age)?;
        self.num_bytes -= kept.num_bytes;
        if let Some(holding) = self.clients.get_mut(&kept.client) {
            holding.num_bytes -= kept.num_bytes;
            holding.promised.remove(&age);
            holding.others.remove(&age);
            if holding.num_bytes == 0 {
                self.clients.remove(&kept.client);
            }
        }
        Some(kept.id)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::principal::Owner;

    fn kept(client: &str, name: &str, num_bytes: usize, is_promised: bool, expires: Instant) -> Kept {
        let client = Client::Key(Owner::of(client));
        Kept { id: StreamId::given(name), client, num_bytes, is_promised, expires }
    }

    /// Names of what is forgotten when these are kept one after another within 100 bytes.
    fn forgotten(replies: &[(&str, &str, usize, bool)]) -> Vec<String> {
        let mut all = KeptReplies::default();
        let mut forgotten = Vec::new();
        for &(client, name, num_bytes, is_promised) in replies {
            let reply = kept(client, name, num_bytes, is_promised, Instant::now());
            forgotten.extend(all.insert(reply, 100).iter().map(StreamId::to_string));
            assert!(all.num_bytes() <= 100);
            let sum: usize = all.by_age.values().map(|kept| kept.num_bytes).sum();
            assert_eq!(all.num_bytes(), sum);
        }
        forgotten
    }

    #[test]
    fn who_holds_most_gives_first_and_nobody_is_evicted_by_a_larger_one() {
        let flood = ["1", "2", "3", "4", "5", "6"].map(|name| ("flood", name, 30, false));
        let other = ("other", "o", 20, true);
        assert_eq!(forgotten(&[&[other], flood.as_slice()].concat()), ["1", "2", "3", "4"]);
        assert_eq!(forgotten(&[flood.as_slice(), &[other]].concat()), ["1", "2", "3", "4"]);
        // One that is larger than what others leave is not kept at their cost.
        let large = ("large", "l", 90, false);
        assert_eq!(forgotten(&[other, large]), ["l"]);
        assert_eq!(forgotten(&[large, other]), ["l"]);
    }

    #[test]
    fn of_one_clients_replies_the_promised_ones_go_last() {
        let promised = |name| ("a", name, 40, true);
        let plain = |name| ("a", name, 40, false);
        assert_eq!(forgotten(&[promised("p"), plain("1"), plain("2")]), ["1"]);
        assert_eq!(forgotten(&[promised("p"), promised("q"), plain("1")]), ["1"]);
        assert_eq!(forgotten(&[promised("p"), promised("q"), promised("r")]), ["p"]);
        // To another client that holds less they go too.
        assert_eq!(forgotten(&[promised("p"), promised("q"), ("b", "1", 30, false)]), ["p"]);
    }

    #[test]
    fn the_oldest_expires_first() {
        let start = Instant::now();
        let mut all = KeptReplies::default();
        for (i, name) in ["first", "second"].into_iter().enumerate() {
            let expires = start + Duration::from_secs(i as u64 + 1);
            assert!(all.insert(kept("a", name, 1, false, expires), 100).is_empty());
        }
        assert_eq!(all.expire(start), None);
        assert_eq!(all.expire(start + Duration::from_secs(1)), Some(StreamId::given("first")));
        assert_eq!(all.expire(start + Duration::from_secs(1)), None);
        assert_eq!(all.expire(start + Duration::from_secs(2)), Some(StreamId::given("second")));
        assert!(all.num_bytes() == 0 && all.clients.is_empty());
    }
}
