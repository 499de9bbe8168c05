//! Owns the list of open connections, and the question whether what they were sent has arrived.
//!
//! Invariant: connections are listed and never kept open by the list.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::connection::Connection;

/// Fewer entries are not worth looking for closed ones among them.
const MIN_SWEPT: usize = 64;

/// The open connections of one server.
#[derive(Debug, Default)]
pub struct Connections(Mutex<List>);

#[derive(Debug, Default)]
struct List {
    connections: Vec<Weak<Connection>>,
    /// How many entries there may be before closed connections are looked for.
    sweep_at: usize,
}

impl Connections {
    /// Lists one more.
    pub fn add(&self, connection: &Arc<Connection>) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if list.connections.len() >= list.sweep_at {
            list.connections.retain(|connection| connection.strong_count() > 0);
            // Each entry is looked at a bounded number of times on average.
            list.sweep_at = (2 * list.connections.len()).max(MIN_SWEPT);
        }
        list.connections.push(Arc::downgrade(connection));
    }

    /// Whether every byte that was written to any connection has arrived at the other side. What the HTTP writer holds
    /// back is behind such bytes: it waits only where the kernel's buffer is full.
    pub fn have_arrived(&self) -> bool {
        let list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut open = list.connections.iter().filter_map(Weak::upgrade);
        open.all(|connection| connection.num_unacknowledged_bytes() == 0)
    }
}
