from kvjax.cache.prefix import Access, Lru


def order(*paths):
    """All blocks, as they leave."""
    policy = Lru()
    state = policy.init(100)
    for time, path in enumerate(paths):
        state = policy.touch(state, Access(path, float(time), len(path)))
    left = []
    for _ in {block for path in paths for block in path}:
        block, state = policy.victim(state)
        left.append(block)
    return left


def test_the_longest_untouched_leaves_from_its_end():
    assert order((1, 2, 3), (4, 5), (1, 2, 6)) == [3, 5, 4, 6, 2, 1]
    assert order((1, 2), (3,), (1, 2)) == [3, 2, 1]
