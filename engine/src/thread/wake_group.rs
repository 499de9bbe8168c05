//! Owns the waking of tasks that wait for events: one wake-up of another thread for many of them.
//!
//! Invariant: no wake-up is lost. What the group's task cannot take is woken directly.
//!
//! To wake a task that runs on another thread costs a system call. A step sends a token to each running request, and the
//! tasks that wait for them share a few threads. Through a group, the first token of a step wakes the group's task,
//! which wakes the others from within their thread.

use std::sync::Arc;
use std::task::{Wake, Waker};

use tokio::sync::mpsc;

/// Tasks of one thread that are woken together. Cheap to clone.
#[derive(Debug, Clone)]
pub struct WakeGroup {
    wakers: mpsc::Sender<Waker>,
}

impl WakeGroup {
    /// A group with room for this many tasks, and the future that wakes them: spawn it where they run. It ends when
    /// the group is dropped. Tasks beyond the room, and all of them after the future is dropped, are woken directly.
    pub fn new(capacity: usize) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (wakers, receiver) = mpsc::channel(capacity.max(1));
        let pending = Pending(receiver);
        (Self { wakers }, pending.wake_all(capacity.max(1)))
    }

    /// A waker that wakes the same task through the group.
    pub(super) fn waker(&self, task: &Waker) -> Waker {
        Waker::from(Arc::new(Member { group: self.wakers.clone(), task: task.clone() }))
    }
}

/// Tasks to wake.
struct Pending(mpsc::Receiver<Waker>);

impl Pending {
    async fn wake_all(mut self, capacity: usize) {
        let mut batch = Vec::with_capacity(capacity);
        while self.0.recv_many(&mut batch, capacity).await > 0 {
            batch.drain(..).for_each(Waker::wake);
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.close();
        while let Ok(task) = self.0.try_recv() {
            task.wake();
        }
    }
}

/// A task of a group.
struct Member {
    group: mpsc::Sender<Waker>,
    task: Waker,
}

impl Wake for Member {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Err(error) = self.group.try_send(self.task.clone()) {
            error.into_inner().wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Context;

    use super::*;

    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Counter {
        fn count(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn tasks(count: usize) -> Vec<Arc<Counter>> {
        (0..count).map(|_| Arc::default()).collect()
    }

    fn counts(tasks: &[Arc<Counter>]) -> Vec<usize> {
        tasks.iter().map(|task| task.count()).collect()
    }

    #[test]
    fn the_first_of_many_wakes_the_group_and_the_group_wakes_each() {
        let (group, future) = WakeGroup::new(8);
        let (mut future, thread) = (pin!(future), Arc::new(Counter::default()));
        let waker = Waker::from(Arc::clone(&thread));
        let mut context = Context::from_waker(&waker);
        let tasks = tasks(3);
        let wakers: Vec<Waker> =
            tasks.iter().map(|task| group.waker(&Waker::from(Arc::clone(task)))).collect();
        for round in 1..=2 {
            assert!(future.as_mut().poll(&mut context).is_pending());
            wakers.iter().for_each(Waker::wake_by_ref);
            assert_eq!((thread.count(), counts(&tasks)), (round, vec![round - 1; 3]));
            assert!(future.as_mut().poll(&mut context).is_pending());
            assert_eq!(counts(&tasks), [round; 3]);
        }
    }

    #[test]
    fn what_has_no_room_is_woken_directly() {
        let (group, _future) = WakeGroup::new(1);
        let tasks = tasks(2);
        tasks.iter().for_each(|task| group.waker(&Waker::from(Arc::clone(task))).wake());
        assert_eq!(counts(&tasks), [0, 1]);
    }

    #[test]
    fn a_future_that_is_dropped_wakes_what_is_left() {
        let (group, future) = WakeGroup::new(4);
        let tasks = tasks(2);
        group.waker(&Waker::from(Arc::clone(&tasks[0]))).wake();
        drop(future);
        group.waker(&Waker::from(Arc::clone(&tasks[1]))).wake();
        assert_eq!(counts(&tasks), [1, 1]);
    }
}
