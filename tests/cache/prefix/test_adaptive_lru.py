from kvjax.cache.prefix import Access, AdaptiveLru, Lru, replay


def at(time, *path):
    return Access(path, float(time), len(path))


def test_what_was_used_twice_outlives_a_scan():
    trace = [at(0, 1), at(1, 1)] + [at(2 + i, 100 + i) for i in range(20)] + [at(30, 1)]
    assert list(replay(AdaptiveLru(), 5, trace))[-1] == 1
    assert list(replay(Lru(), 5, trace))[-1] == 0


def test_the_target_follows_what_left_too_early():
    policy = AdaptiveLru()
    state = policy.init(4)
    for access in (at(0, 1), at(1, 2), at(2, 3)):
        state = policy.touch(state, access)
    block, state = policy.victim(state)
    assert block == 1 and state.target == 0.0
    state = policy.touch(state, at(3, 1))
    assert state.target == 1.0 and list(state.often) == [1] and not state.once_left
    for _ in range(2):
        block, state = policy.victim(state)
    assert block == 1  # one block may stay that was touched once, so the one touched often went before it
