//! Health at the engine's edge: what counts as a fault, and the known-answer requests that end one.

mod world;

use glm_engine::{Fault, SequenceError, SubmitError, TokenEvent};
use world::{ERROR, HANG, LONG, NAN, PLAIN, World, config, last, request, start, until};

#[tokio::test]
async fn nan_fails_its_sequence_only_and_a_probe_works_through_the_fault() {
    let World { handle, .. } = start(config());
    let mut healthy = handle.submit(request(PLAIN, 20, 200)).unwrap();
    let mut sick = handle.submit(request(NAN, 8, 10)).unwrap();
    let end = last(&mut sick).await;
    assert_eq!(end, TokenEvent::Failed(SequenceError::NonFiniteLogits { position: 7 }));
    let (fault, seen) = handle.fault().unwrap();
    assert_eq!((fault, handle.status().fault), (Fault::NonFiniteLogits, Some(fault)));
    let mut probe = handle.submit_probe(request(PLAIN, 20, 3)).unwrap();
    assert!(matches!(last(&mut probe).await, TokenEvent::Finished { .. }));
    assert_eq!(handle.status().fault, Some(Fault::NonFiniteLogits));
    assert!(handle.clear_fault(seen));
    assert!(matches!(last(&mut healthy).await, TokenEvent::Finished { .. }));
    assert_eq!(handle.status().fault, None);
}

#[tokio::test]
async fn only_errors_in_a_row_are_a_fault() {
    let World { handle, .. } = start(config());
    for (token, count) in [(ERROR, 0), (ERROR, 0), (PLAIN, 0), (ERROR, 0), (ERROR, 0), (ERROR, 3), (ERROR, 4)]
    {
        let end = last(&mut handle.submit(request(token, 5, 1)).unwrap()).await;
        assert_eq!(matches!(end, TokenEvent::Failed(SequenceError::Run(_))), token == ERROR, "{end:?}");
        let is_set = || handle.status().fault == Some(Fault::RepeatedRunErrors { count });
        until("the fault is as expected", || {
            if count == 0 { handle.status().fault.is_none() } else { is_set() }
        })
        .await;
    }
    assert!(matches!(
        last(&mut handle.submit_probe(request(PLAIN, 5, 1)).unwrap()).await,
        TokenEvent::Finished { .. }
    ));
    let (_, seen) = handle.fault().unwrap();
    assert!(handle.clear_fault(seen));
    assert_eq!(handle.status().fault, None);
}

/// The known answer that a fault asked for says nothing about what went wrong after its last step.
#[tokio::test]
async fn a_fault_after_the_known_answer_is_not_cleared_by_it() {
    let World { handle, .. } = start(config());
    let sick = || handle.submit(request(NAN, 8, 10)).unwrap();
    last(&mut sick()).await;
    let (_, seen) = handle.fault().unwrap();
    let mut probe = handle.submit_probe(request(PLAIN, 20, 3)).unwrap();
    assert!(matches!(last(&mut probe).await, TokenEvent::Finished { .. }));
    last(&mut sick()).await;
    assert!(!handle.clear_fault(seen));
    let (fault, seen) = handle.fault().unwrap();
    assert_eq!(fault, Fault::NonFiniteLogits);
    assert!(handle.clear_fault(seen));
    assert_eq!(handle.fault(), None);
}

#[tokio::test]
async fn a_probe_passes_a_full_queue_and_there_is_one_at_a_time() {
    let World { handle, release, .. } = start(config());
    let users: Vec<_> = (0..4).map(|_| handle.submit(request(HANG, 20, 1900)).unwrap()).collect();
    let full = handle.submit(request(PLAIN, 1, 1)).unwrap_err();
    assert!(matches!(full, SubmitError::QueueFull { num_requests: 4, .. }), "{full}");
    let mut probe = handle.submit_probe(request(PLAIN, 20, 5)).unwrap();
    let second = handle.submit_probe(request(PLAIN, 1, 1)).unwrap_err();
    assert!(matches!(second, SubmitError::QueueFull { num_requests: 5, .. }), "{second}");
    // Steps that no user's request can end within.
    (0..100).for_each(|_| release.send(()).unwrap());
    let end = tokio::time::timeout(LONG, last(&mut probe)).await.unwrap();
    assert!(matches!(end, TokenEvent::Finished { num_generated_tokens: 5, .. }));
    assert_eq!(handle.status().num_requests, 4);
    assert!(handle.submit_probe(request(PLAIN, 1, 1)).is_ok());
    drop(users);
}
