//! Time at the engine's edge: deadlines, estimates, progress, the watchdog.

mod world;

use std::sync::atomic::Ordering;
use std::time::Duration;

use glm_engine::{EngineConfig, EventReceiver, PrefixCaching, Request, Stage, SubmitError, TokenEvent};
use world::{HANG, PLAIN, World, config, last, request, start, teach, until};

#[tokio::test]
async fn a_deadline_that_cannot_be_met_is_refused_once_the_pace_is_known() {
    let World { handle, .. } = start(config());
    assert_eq!(handle.estimate(100), None);
    let urgent = Request { deadline: Some(Duration::from_millis(1)), ..request(PLAIN, 1000, 1) };
    let mut events = handle.submit(urgent.clone()).unwrap();
    last(&mut events).await;
    teach(&handle).await;
    // 1,000 tokens take 100 ms.
    let estimate = handle.estimate(1000).unwrap();
    assert!((100..125).contains(&estimate.as_millis()), "{estimate:?}");
    match handle.submit(urgent.clone()).unwrap_err() {
        SubmitError::DeadlineUnmeetable { estimate, retry_after } => {
            assert!(estimate > Duration::from_millis(50), "{estimate:?}");
            assert!(retry_after >= Duration::from_millis(100), "{retry_after:?}");
        }
        other => panic!("{other}"),
    }
    assert_eq!(handle.status().num_requests, 0);
    let patient = Request { deadline: Some(Duration::from_secs(20)), ..urgent.clone() };
    last(&mut handle.submit(patient).unwrap()).await;
    // Refusals teach nothing, so they don't go on for ever while nothing runs.
    let num_refusals = (0..1_000).take_while(|_| handle.submit(urgent.clone()).is_err()).count();
    assert!((5..1_000).contains(&num_refusals), "{num_refusals}");
}

#[tokio::test]
async fn a_prompt_that_is_cached_is_taken_where_another_one_is_refused() {
    let World { handle, .. } = start(EngineConfig { prefix_caching: PrefixCaching::Shared, ..config() });
    teach(&handle).await;
    last(&mut handle.submit(request(2, 1000, 1)).unwrap()).await;
    let deadline = handle.estimate(1000).unwrap() / 2;
    let urgent = |token| Request { deadline: Some(deadline), ..request(token, 1000, 1) };
    let mut cached = handle.submit(urgent(2)).unwrap();
    let expected = cached.progress().estimate.unwrap();
    assert!(expected < deadline, "{expected:?} of {deadline:?}");
    assert_eq!(cached.recv().await, Some(TokenEvent::Admitted { num_cached_tokens: 992 }));
    last(&mut cached).await;
    let refused = handle.submit(urgent(3)).unwrap_err();
    assert!(matches!(refused, SubmitError::DeadlineUnmeetable { .. }), "{refused}");
}

#[tokio::test]
async fn a_full_queue_says_when_it_will_have_room() {
    let world = start(config());
    let handle = &world.handle;
    let fill = || (0..4).map(|_| handle.submit(request(HANG, 20, 1900)).unwrap()).collect::<Vec<_>>();
    let full = || match handle.submit(request(PLAIN, 1, 1)).unwrap_err() {
        SubmitError::QueueFull { num_requests: 4, retry_after } => retry_after,
        other => panic!("{other}"),
    };
    let receivers = fill();
    world.hang();
    assert_eq!(full(), Duration::from_secs(1));
    drop(receivers);
    world.release.send(()).unwrap();
    until("empty", || handle.status().num_requests == 0).await;
    last(&mut handle.submit(request(PLAIN, 20, 400)).unwrap()).await;
    let _receivers = fill();
    world.hang();
    // 1,900 tokens at a bit more than 1 ms, two at a time: no reply has ended before its last token.
    let retry_after = full();
    assert!((2_000..2_500).contains(&retry_after.as_millis()), "{retry_after:?}");
    // Each who is refused is told another time: two replies end within it, one every half of it.
    let later = full() - retry_after;
    assert!((900..1_250).contains(&later.as_millis()), "{later:?}");
}

#[tokio::test]
async fn a_crowd_is_told_when_its_replies_will_end_before_the_engine_has_begun_with_them() {
    let config = EngineConfig { max_num_seqs: 8, max_num_waiting: 56, ..config() };
    let world = start(config);
    let handle = &world.handle;
    teach(handle).await;
    last(&mut handle.submit(request(PLAIN, 20, 400)).unwrap()).await;
    // The others come while the engine is in the first one's step.
    let _first = handle.submit(request(HANG, 20, 400)).unwrap();
    world.hang();
    let crowd: Vec<_> = (0..63).map(|_| handle.submit(request(PLAIN, 20, 400))).collect();
    assert!(crowd.iter().all(Result::is_ok));
    let refused: Vec<u128> = (0..20)
        .map(|_| match handle.submit(request(PLAIN, 1, 1)).unwrap_err() {
            SubmitError::QueueFull { retry_after, .. } => retry_after.as_millis(),
            other => panic!("{other}"),
        })
        .collect();
    // 400 tokens at one to three milliseconds a step, eight at a time: one ends every 50 to 150 ms.
    let mut gaps = refused.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(gaps.all(|gap| (50..150).contains(&gap)), "{refused:?}");
    drop(crowd);
    world.release.send(()).unwrap();
}

#[tokio::test]
async fn what_cannot_leave_the_queue_in_time_is_refused_and_told_when_it_could() {
    let world = start(EngineConfig { max_num_seqs: 1, max_num_waiting: 1_000, ..config() });
    let handle = &world.handle;
    let limited = |token, max_tokens, limit_ms| Request {
        max_queue_time: Some(Duration::from_millis(limit_ms)),
        ..request(token, 20, max_tokens)
    };
    // Nothing is refused before anything is known.
    let blind: Vec<_> = (0..3).map(|_| handle.submit(limited(HANG, 1_000, 1)).unwrap()).collect();
    world.hang();
    drop(blind);
    world.release.send(()).unwrap();
    until("empty", || handle.status().num_requests == 0).await;
    teach(handle).await;
    let _running = handle.submit(limited(HANG, 1_000, 1)).unwrap();
    world.hang();
    // 1,000 tokens at a bit more than 1 ms are before the first that waits, and before each one more.
    let mut accepted = vec![handle.submit(limited(PLAIN, 1_000, 3_600)).unwrap()];
    let mut retries = Vec::new();
    for _ in 0..6 {
        match handle.submit(limited(PLAIN, 1_000, 3_600)) {
            Ok(events) => accepted.push(events),
            Err(SubmitError::QueueTimeUnmeetable { estimate, limit, retry_after }) => {
                assert_eq!(limit, Duration::from_millis(3_600));
                assert!((4_200..5_200).contains(&estimate.as_millis()), "{estimate:?}");
                retries.push(retry_after.as_secs_f64());
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!((accepted.len(), retries.len()), (3, 4));
    // Each is asked to come when there will be room for it, not for all of them.
    let steps = retries.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(steps.clone().all(|step| (0.9..1.5).contains(&step)), "{retries:?}");
    assert!((0.5..1.6).contains(&retries[0]), "{retries:?}");
    // Whoever is willing to wait is not refused, and what goes first does not wait.
    assert!(handle.submit(limited(PLAIN, 1_000, 60_000)).is_ok());
    assert!(handle.submit(Request { priority: -1, ..limited(PLAIN, 1, 1_500) }).is_ok());
}

#[tokio::test]
async fn progress_moves_from_waiting_to_prefill_to_decode() {
    let max_step_time = Duration::from_millis(2);
    let world = start(EngineConfig { max_num_seqs: 1, max_step_time, ..config() });
    let handle = &world.handle;
    teach(handle).await;
    let [first, second, third] = [(20, 300), (20, 100), (400, 500)].map(|(num_prompt_tokens, max_tokens)| {
        handle.submit(request(HANG, num_prompt_tokens, max_tokens)).unwrap()
    });
    let mut third = third;
    let stage = |events: &EventReceiver| events.progress().stage;
    world.hang();
    world.step_until("one runs, two wait", || {
        stage(&first) == Stage::Decode
            && stage(&second) == Stage::Waiting { position: 0 }
            && stage(&third) == Stage::Waiting { position: 1 }
    });
    let estimates = [&first, &second, &third].map(|events| events.progress().estimate);
    assert!(estimates[0].is_none() && estimates[1] < estimates[2], "{estimates:?}");
    assert!(estimates[1].is_some(), "{estimates:?}");
    drop(first);
    world.step_until("the next moves up", || stage(&third) == Stage::Waiting { position: 0 });
    drop(second);
    let mut seen = Vec::new();
    world.step_until("the prompt is computed", || {
        if let Stage::Prefill { num_computed_tokens, num_tokens } = stage(&third) {
            assert_eq!(num_tokens, 400);
            seen.push(num_computed_tokens);
            assert!(third.progress().estimate.is_some());
        }
        stage(&third) == Stage::Decode
    });
    assert_eq!(third.recv().await, Some(TokenEvent::Admitted { num_cached_tokens: 0 }));
    // 10 tokens would take 2 ms; a block is the least.
    assert_eq!(seen, (0..400).step_by(16).collect::<Vec<_>>());
}

#[tokio::test]
async fn steps_are_no_longer_than_configured() {
    let max_step_time = Duration::from_millis(5);
    let World { handle, largest_step, .. } = start(EngineConfig { max_step_time, ..config() });
    teach(&handle).await;
    last(&mut handle.submit(request(PLAIN, 1900, 10)).unwrap()).await;
    // 1 ms, and 40 tokens in the other four.
    let largest = largest_step.load(Ordering::SeqCst);
    assert!((35..=45).contains(&largest), "{largest} tokens in a step");
}

#[tokio::test]
async fn a_hang_shows_while_it_lasts() {
    let stall_min = Duration::from_millis(30);
    let world = start(EngineConfig { stall_min, stall_factor: 3, ..config() });
    let handle = &world.handle;
    let unlearnt = handle.status();
    assert_eq!((unlearnt.stalled_for, unlearnt.stall_limit), (None, stall_min * 3));
    teach(handle).await;
    until("idle", || handle.status().stalled_for.is_none()).await;
    let mut events = handle.submit(request(HANG, 5, 1)).unwrap();
    world.hang();
    let limit = handle.status().stall_limit;
    assert_eq!(limit, stall_min, "a step is far shorter");
    // What the step itself takes has passed.
    let so_far = handle.status().stalled_for.unwrap();
    assert!(so_far < limit, "{so_far:?}");
    world.time.advance(limit);
    assert_eq!(handle.status().stalled_for, Some(so_far + limit));
    assert_eq!(handle.status().num_requests, 1);
    world.release.send(()).unwrap();
    last(&mut events).await;
    until("idle again", || handle.status().stalled_for.is_none()).await;
}

#[tokio::test]
async fn events_carry_the_time_of_their_step() {
    let World { handle, .. } = start(config());
    let mut events = handle.submit(request(PLAIN, 10, 3)).unwrap();
    let mut times = Vec::new();
    while let Some(timed) = events.recv_timed().await {
        times.push(timed.at);
    }
    let gaps: Vec<u128> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_micros()).collect();
    // The admission at the start of the prompt's step, a token at the end of each step, and the end with the last.
    assert_eq!(gaps, [2000, 1100, 1100, 0]);
    assert_eq!(events.elapsed(times[0]), Duration::from_micros(4200));
}

#[tokio::test]
async fn detached_requests_give_way_to_attached_ones() {
    // The prompts take 251 of 256 blocks.
    let config = EngineConfig { max_num_seqs: 3, watermark_permille: 0, ..config() };
    let world = start(config);
    let submit = |num_prompt_tokens, max_tokens| {
        world.handle.submit(request(HANG, num_prompt_tokens, max_tokens)).unwrap()
    };
    let detached = submit(1500, 400);
    detached.set_detached(true);
    let (attached, third) = (submit(1500, 400), submit(1000, 900));
    world.hang();
    world.step_until("all run", || third.progress().stage == Stage::Decode);
    let is_preempted = || matches!(detached.progress().stage, Stage::Waiting { .. });
    assert!(!is_preempted());
    world.step_until("the detached one is preempted", is_preempted);
    assert!(!matches!(attached.progress().stage, Stage::Waiting { .. }));
    assert!(!matches!(third.progress().stage, Stage::Waiting { .. }));
}
