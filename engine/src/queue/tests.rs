//! The order of the queue: who is next, and who can leave.

use super::*;
use crate::request::Request;

fn queue(weights: &[u32]) -> WaitingQueue {
    WaitingQueue::new(&EngineConfig { tenant_weights: weights.to_vec(), ..EngineConfig::default() })
}

fn waiting(id: u64, tenant: u32, priority: i32, deadline_s: u64) -> WaitingSequence {
    let request = Request {
        prompt_token_ids: vec![1],
        priority,
        tenant: TenantId(tenant),
        deadline: Some(Duration::from_secs(deadline_s)),
        ..Request::default()
    };
    WaitingSequence(Sequence::new(RequestId(id), request, Duration::ZERO))
}

/// Ids in the order in which they are taken; each costs its tenant an input token.
fn drain(queue: &mut WaitingQueue) -> Vec<u64> {
    let taken = std::iter::from_fn(|| {
        let sequence = queue.pop()?.0;
        queue.charge(sequence.tenant, 1, 0);
        Some(sequence.id.0)
    });
    taken.collect()
}

#[test]
fn priority_then_the_least_served_tenant_then_the_deadline() {
    let mut queue = queue(&[1, 1]);
    for (id, tenant, priority, deadline) in
        [(0, 0, 0, 9), (1, 0, 0, 8), (2, 0, 0, 7), (3, 1, 0, 9), (4, 1, 5, 1), (5, 0, -1, 99)]
    {
        queue.push(waiting(id, tenant, priority, deadline));
    }
    assert_eq!(queue.in_order().iter().map(|s| s.id.0).collect::<Vec<_>>(), [5, 2, 3, 1, 0, 4]);
    assert_eq!(queue.check(), Ok(()));
    // 5 was the first tenant's turn.
    assert_eq!(drain(&mut queue), [5, 3, 2, 1, 0, 4]);
}

#[test]
fn a_tenant_who_comes_late_has_saved_nothing_up_and_weights_count() {
    let mut queue = queue(&[1, 3]);
    queue.charge(TenantId(0), 1_000, 0);
    (0..40).for_each(|id| queue.push(waiting(id, 0, 0, id)));
    (100..160).for_each(|id| queue.push(waiting(id, 1, 0, id)));
    assert_eq!(queue.service(TenantId(1)), queue.service(TenantId(0)));
    let taken: Vec<u64> = drain(&mut queue).into_iter().take(40).collect();
    let num_second = taken.iter().filter(|&&id| id >= 100).count();
    assert!((29..=31).contains(&num_second), "{num_second} of 40 at three times the weight");
}

#[test]
fn one_in_eight_takes_no_notice_of_priority() {
    let mut queue = queue(&[1]);
    (0..40).for_each(|id| queue.push(waiting(id, 0, -1, 50 + id)));
    (100..104).for_each(|id| queue.push(waiting(id, 0, 1, id - 100)));
    let taken = drain(&mut queue);
    let places: Vec<usize> = (0..44).filter(|&index| taken[index] >= 100).collect();
    assert_eq!(places, [7, 15, 23, 31]);
}

#[test]
fn probes_and_the_preempted_go_first_and_anybody_can_leave() {
    let mut queue = queue(&[1]);
    let with = |id, is_probe, admission| {
        let mut waiting = waiting(id, 0, 0, id);
        (waiting.0.is_probe, waiting.0.admission) = (is_probe, admission);
        waiting
    };
    for waiting in [
        with(1, false, None),
        with(2, false, None),
        with(3, false, Some(9)),
        with(4, true, None),
        with(5, false, Some(8)),
    ] {
        queue.push(waiting);
    }
    assert!(queue.remove(RequestId(2)).is_some() && queue.remove(RequestId(2)).is_none());
    assert_eq!((queue.len(), queue.check()), (4, Ok(())));
    assert_eq!(drain(&mut queue), [4, 5, 3, 1]);
    assert!(queue.is_empty());
}

#[test]
fn detached_ones_come_last_until_their_time_is_over() {
    let mut queue = queue(&[1, 1]);
    let preempted = |id, until_s| {
        let mut waiting = waiting(id, 0, 0, id);
        waiting.0.admission = Some(id);
        waiting.0.yields_until = Duration::from_secs(until_s);
        waiting
    };
    let fill = |queue: &mut WaitingQueue| {
        (1..=3).for_each(|id| queue.push(preempted(id, 10 * id)));
        queue.push(waiting(4, 1, 9, 50));
        for id in [1, 2] {
            assert!(queue.set_detached(RequestId(id), true));
        }
        assert_eq!(queue.check(), Ok(()));
    };
    fill(&mut queue);
    assert!(!queue.promote(Duration::from_secs(9)));
    assert_eq!(queue.in_order().iter().map(|s| s.id.0).collect::<Vec<_>>(), [3, 4, 1, 2]);
    assert_eq!(drain(&mut queue), [3, 4, 1, 2]);
    fill(&mut queue);
    assert!(queue.promote(Duration::from_secs(10)));
    assert_eq!(queue.check(), Ok(()));
    assert_eq!(drain(&mut queue), [1, 3, 4, 2]);
    fill(&mut queue);
    // Somebody reads it again.
    assert!(queue.set_detached(RequestId(2), false) && !queue.set_detached(RequestId(9), false));
    assert!(queue.remove(RequestId(1)).is_some());
    assert_eq!((drain(&mut queue), queue.check()), (vec![2, 3, 4], Ok(())));
}
