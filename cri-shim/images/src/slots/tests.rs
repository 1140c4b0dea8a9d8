//! Unit tests of the slots.

use futures_util::FutureExt as _;

use super::*;

fn slot(slots: &Arc<Slots>, pull: u64) -> Slot {
    slots.slot(pull, "a layer".to_owned())
}

/// Returns whether the slot is granted immediately.
fn enters(slot: &Slot, host: &str) -> bool {
    slot.at(host).now_or_never().is_some()
}

#[tokio::test]
async fn one_host_never_has_all_slots() {
    let slots = Slots::new(3, 2);
    let all: Vec<Slot> = (0..4).map(|_| slot(&slots, 1)).collect();
    assert!(enters(&all[0], "a"));
    assert!(enters(&all[1], "a"));
    assert!(!enters(&all[2], "a"));
    assert!(enters(&all[3], "b"));
}

#[tokio::test]
async fn waiting_fetches_get_a_free_slot_in_the_order_of_their_arrival() {
    let slots = Slots::new(2, 1);
    let (first, second, third) = (slot(&slots, 1), slot(&slots, 2), slot(&slots, 3));
    assert!(enters(&first, "a"));
    let mut second_waits = Box::pin(second.at("a"));
    assert!((&mut second_waits).now_or_never().is_none());
    let mut third_waits = Box::pin(third.at("a"));
    assert!((&mut third_waits).now_or_never().is_none());
    drop(first);
    assert!((&mut third_waits).now_or_never().is_none());
    assert!((&mut second_waits).now_or_never().is_some());
    // A slot is not granted to a waiter that was dropped.
    drop(third_waits);
    drop(second_waits);
    drop(second);
    assert!(enters(&slot(&slots, 4), "a"));
}

#[tokio::test]
async fn a_redirected_fetch_counts_towards_the_limit_of_its_new_host() {
    let slots = Slots::new(3, 1);
    let (first, second) = (slot(&slots, 1), slot(&slots, 2));
    assert!(enters(&first, "a"));
    assert!(enters(&second, "b"));
    assert!(
        !second.moves_to("a"),
        "a second fetch from the host `a` was allowed, although the limit is one fetch per host"
    );
    assert!(second.gave_way());
    // `second` no longer has a slot, so `third` gets a slot immediately.
    let third = slot(&slots, 3);
    assert!(enters(&third, "b"));
    assert!(third.moves_to("c"));
    assert!(enters(&second, "b"));
    // After MAX_MOVES redirections, the layer keeps its slot although the host's limit is
    // reached.
    for _ in 1..MAX_MOVES {
        assert!(!second.moves_to("a"));
        assert!(enters(&second, "b"));
    }
    assert!(second.moves_to("a"));
}

#[tokio::test]
async fn a_stalled_fetch_gives_its_slot_to_a_waiting_pull() {
    let slots = Slots::new(2, 1);
    let (stalled, other) = (slot(&slots, 1), slot(&slots, 1));
    assert!(enters(&stalled, "a"));
    assert!(enters(&other, "b"));
    assert!(
        !stalled.gives_way(true),
        "the stalled fetch gave up its slot although no other fetch waits"
    );
    let sibling = slot(&slots, 1);
    let mut sibling_waits = Box::pin(sibling.at("b"));
    assert!((&mut sibling_waits).now_or_never().is_none());
    assert!(
        !other.gives_way(true),
        "the fetch gave up its slot to a layer of the same image"
    );
    let waiter = slot(&slots, 2);
    let mut waits = Box::pin(waiter.at("b"));
    assert!((&mut waits).now_or_never().is_none());
    assert!(
        !stalled.gives_way(true),
        "the stalled fetch gave up its slot for the host `a`, but the waiting fetch needs a slot for the host `b`"
    );
    assert!(
        !other.gives_way(false),
        "a fetch that receives bytes gave up its slot before the end of its turn"
    );
    assert!(other.gives_way(true) && other.gave_way());
    // The image of the layer `sibling` still has a slot. The waiting layer of the other image
    // therefore gets the slot before `sibling`.
    assert!((&mut waits).now_or_never().is_some());
    assert!((&mut sibling_waits).now_or_never().is_none());
}

#[tokio::test]
async fn the_slowest_fetch_gives_its_slot_to_another_pull_after_its_turn() {
    let slots = Slots::new(2, 2);
    let (slow, fast) = (slot(&slots, 1), slot(&slots, 1));
    assert!(enters(&slow, "a"));
    assert!(enters(&fast, "a"));
    slow.count_received(1000);
    fast.count_received(100_000);
    let sibling = slot(&slots, 1);
    let mut sibling_waits = Box::pin(sibling.at("b"));
    assert!((&mut sibling_waits).now_or_never().is_none());
    let must = |slot: &Slot, after| must_leave(slot, Instant::now() + after);
    assert!(
        !must(&slow, SHORT_TURN),
        "a fetch would lose its slot to a layer of the same image"
    );
    let extra = slot(&slots, 3);
    assert!(enters(&extra, "c"));
    let other = slot(&slots, 2);
    let mut other_waits = Box::pin(other.at("b"));
    assert!((&mut other_waits).now_or_never().is_none());
    set_time(&other, SHORT_TURN);
    assert!(!must(&slow, SHORT_TURN / 2));
    assert!(must(&slow, SHORT_TURN));
    assert!(!must(&fast, SHORT_TURN));
    slow.begins_at(LARGE_REPLAY_BYTES);
    assert!(
        !must(&slow, SHORT_TURN),
        "a fetch with many bytes from earlier turns would lose its slot after a short turn"
    );
    assert!(must(&slow, LONG_TURN));
}

#[tokio::test]
async fn several_hosts_can_not_occupy_the_slots_of_another_host() {
    let slots = Slots::new(4, 3);
    let held: Vec<Slot> = (0..5).map(|_| slot(&slots, 1)).collect();
    for (slot, host) in held.iter().zip(["a", "a", "a", "b"]) {
        assert!(enters(slot, host));
    }
    assert!(
        !enters(&held[4], "c"),
        "a pull with a slot got an extra slot"
    );
    let extra: Vec<Slot> = (2..6).map(|pull| slot(&slots, pull)).collect();
    assert!(
        !enters(&extra[3], "b"),
        "a fetch got an extra slot although its host has a slot"
    );
    for (slot, host) in extra.iter().zip(["c", "d", "e"]) {
        assert!(enters(slot, host));
    }
    assert!(!enters(&extra[3], "f"), "the extra slots have no limit");
    // A free normal slot is granted although extra slots are in use.
    held[3].leave();
    assert!(enters(&extra[3], "b"));
}

#[tokio::test]
async fn a_fast_fetch_gives_its_slot_to_a_pull_without_a_slot_after_a_short_turn() {
    let slots = Slots::new(1, 1);
    let fast = slot(&slots, 1);
    assert!(enters(&fast, "a"));
    let other = slot(&slots, 2);
    let mut waits = Box::pin(other.at("b"));
    assert!((&mut waits).now_or_never().is_none());
    set_time(&other, SHORT_TURN);
    fast.count_received(1 << 40);
    let second = Duration::from_secs(1);
    assert!(!must_leave_after(&fast, SHORT_TURN - second));
    assert!(must_leave_after(&fast, SHORT_TURN));
    assert!((&mut waits).now_or_never().is_some());
    // The turns of three fetches are over. A fetch from the host with the most slots leaves.
    let slots = Slots::new(3, 2);
    let held = [1, 1, 2].map(|pull| slot(&slots, pull));
    for (slot, host) in held.iter().zip(["a", "a", "b"]) {
        assert!(enters(slot, host));
    }
    held[0].count_received(20_000);
    held[1].count_received(10_000);
    let other = slot(&slots, 3);
    let mut waits = Box::pin(other.at("b"));
    assert!((&mut waits).now_or_never().is_none());
    let after = Instant::now() + SHORT_TURN;
    let leaves = held.each_ref().map(|slot| must_leave(slot, after));
    assert_eq!(leaves, [false, true, false]);
}

/// Sets the slot time that the pull of `slot` has had.
fn set_time(slot: &Slot, had: Duration) {
    let mut state = lock(&slot.slots.state);
    if let Some(time) = state.pulls.get_mut(&slot.pull) {
        time.had = had;
    }
}

/// Returns whether the fetch must give up its slot at the time `now`.
fn must_leave(slot: &Slot, now: Instant) -> bool {
    let mut state = lock(&slot.slots.state);
    for holder in &mut state.holders {
        holder.checked = now;
    }
    slot.slots.must_leave(&state, slot.id, false, now)
}

/// Returns whether the fetch gives up its slot to another pull after it has had the slot for
/// `held`.
fn must_leave_after(slot: &Slot, held: Duration) -> bool {
    let mut state = lock(&slot.slots.state);
    for holder in state.holders.iter_mut().filter(|h| h.id == slot.id) {
        holder.since = Instant::now().checked_sub(held).unwrap_or(holder.since);
    }
    drop(state);
    slot.gives_way(false)
}

#[tokio::test]
async fn turns_without_progress_become_longer_up_to_a_limit() {
    let slots = Slots::new(1, 1);
    let small = slot(&slots, 1);
    let second = Duration::from_secs(1);
    let mut turn = FIRST_TURN;
    for _ in 0..12 {
        small.begin_turn();
        assert!(enters(&small, "a"));
        let other = slot(&slots, 2);
        let mut waits = Box::pin(other.at("a"));
        assert!((&mut waits).now_or_never().is_none());
        assert!(!must_leave_after(&small, turn - second), "{turn:?}");
        assert!(must_leave_after(&small, turn), "{turn:?}");
        small.end_turn(0);
        turn = (turn * 2).min(MAX_TURN);
    }
    assert_eq!(turn, MAX_TURN);
}

#[tokio::test]
async fn the_turns_of_a_stalled_fetch_do_not_become_longer() {
    let slots = Slots::new(1, 1);
    let stalled = slot(&slots, 1);
    for _ in 0..3 {
        stalled.begin_turn();
        assert!(enters(&stalled, "a"));
        let other = slot(&slots, 2);
        let mut waits = Box::pin(other.at("a"));
        assert!((&mut waits).now_or_never().is_none());
        assert!(stalled.gives_way(true));
        stalled.end_turn(0);
    }
    assert_eq!(stalled.gauge.in_vain.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_fetch_can_queue_again_for_another_host_in_each_turn() {
    let slots = Slots::new(2, 1);
    let (first, second) = (slot(&slots, 1), slot(&slots, 2));
    assert!(enters(&first, "a"));
    for _ in 0..MAX_MOVES {
        assert!(enters(&second, "b"));
        assert!(!second.moves_to("a"));
    }
    assert!(enters(&second, "b"));
    let other = slot(&slots, 3);
    let mut waits = Box::pin(other.at("b"));
    assert!((&mut waits).now_or_never().is_none());
    assert!(second.gives_way(true));
    drop(waits);
    drop(other);
    assert!(enters(&second, "b"));
    assert!(
        !second.moves_to("a"),
        "a second fetch from the host `a` was allowed, although the limit is one fetch per host"
    );
}

#[tokio::test]
async fn a_new_pull_goes_before_pulls_that_have_had_much_slot_time() {
    let slots = Slots::new(2, 2);
    let old: Vec<Slot> = (0..30).map(|pull| slot(&slots, pull)).collect();
    // Two old pulls have the normal slots, one has the extra slot, and the others wait.
    let mut waiting = Vec::new();
    for (number, old) in old.iter().enumerate() {
        let mut waits = Box::pin(async move { old.at(&format!("host {number}")).await });
        assert_eq!((&mut waits).now_or_never().is_some(), number < 3);
        waiting.push(waits);
    }
    for old in &old {
        set_time(old, SHORT_TURN);
    }
    let new = slot(&slots, 99);
    let mut new_waits = Box::pin(new.at("new"));
    assert!((&mut new_waits).now_or_never().is_none());
    let second = Duration::from_secs(1);
    assert!(
        !old.iter()
            .any(|old| must_leave_after(old, FIRST_TURN - second))
    );
    assert!(
        old.iter().any(|old| must_leave_after(old, FIRST_TURN)),
        "no old pull gave up its slot to a new pull"
    );
    assert!(
        (&mut new_waits).now_or_never().is_some(),
        "a pull that had much slot time got a slot before a new pull"
    );
    // The new pull keeps its slot for a whole turn.
    assert!(!must_leave_after(&new, SHORT_TURN - second));
}

#[tokio::test]
async fn an_extra_slot_is_only_for_new_pulls() {
    let slots = Slots::new(2, 1);
    let held = [1, 2, 3].map(|pull| slot(&slots, pull));
    assert!(enters(&held[0], "a") && enters(&held[1], "b"));
    set_time(&held[2], SHORT_TURN);
    assert!(!enters(&held[2], "c"), "an old pull got an extra slot");
    set_time(&held[2], Duration::ZERO);
    assert!(enters(&held[2], "c"));
    let other = slot(&slots, 4);
    let mut waits = Box::pin(other.at("c"));
    assert!((&mut waits).now_or_never().is_none());
    // Neither the bytes from earlier turns nor turns in vain make a turn in an extra slot longer.
    held[2].begins_at(1 << 40);
    held[2].gauge.in_vain.store(5, Ordering::Relaxed);
    assert!(must_leave_after(&held[2], FIRST_TURN));
    assert!((&mut waits).now_or_never().is_some());
}

#[tokio::test]
async fn a_fetch_that_can_not_react_keeps_no_other_fetch_from_giving_way() {
    let slots = Slots::new(2, 2);
    let held = [1, 2].map(|pull| slot(&slots, pull));
    assert!(enters(&held[0], "a") && enters(&held[1], "a"));
    held[1].count_received(1000);
    let other = slot(&slots, 3);
    let mut waits = Box::pin(other.at("a"));
    assert!((&mut waits).now_or_never().is_none());
    let after = Instant::now() + FIRST_TURN;
    assert!(!must_leave(&held[1], after));
    // The slower fetch no longer checks whether it must leave.
    let mut state = lock(&slots.state);
    state.holders[1].checked = after;
    state.holders[0].checked = after - UNRESPONSIVE_TIME;
    assert!(slots.must_leave(&state, held[1].id, false, after));
}

#[tokio::test]
async fn one_of_several_equally_slow_fetches_gives_up_its_slot() {
    let slots = Slots::new(2, 2);
    let held = [1, 2].map(|pull| slot(&slots, pull));
    assert!(enters(&held[0], "a") && enters(&held[1], "a"));
    let other = slot(&slots, 3);
    let mut waits = Box::pin(other.at("a"));
    assert!((&mut waits).now_or_never().is_none());
    let after = Instant::now() + FIRST_TURN;
    // Each fetch checks just after it has received bytes.
    held[0].count_received(1000);
    assert!(!must_leave(&held[0], after));
    held[1].count_received(2000);
    assert!(
        must_leave(&held[1], after),
        "each fetch chose the other one"
    );
}
