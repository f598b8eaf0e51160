"""Any order of what can be done to a store and its pages: none is lost, none given twice, and each holds its text."""

import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import kvjax
from kvjax.cache import Paged, release
from kvjax.cache.attention import Mask
from kvjax.cache.prefix import POLICIES, find, keep, make_room, open_store, reuse
from tests.tiny import LLAMA

PAGE, POOL, BATCH, CAPACITY, WIDTH = 4, 8, 3, 24, 8
MODEL = kvjax.Transformer(replace(LLAMA, windows=(None,), heads=1, kv_heads=1))
ROW = st.integers(0, BATCH - 1)
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=11)

forked, released = jax.jit(kvjax.fork), jax.jit(release)


@jax.jit
def take_in(cache, values, lengths):
    """One step of a model without weights: a token's key is a number that stands for all tokens up to it."""
    start = cache.length
    cache, full = cache.opened(lengths)
    lengths = jnp.where(full, 0, lengths)
    offset = jnp.arange(WIDTH, dtype=jnp.int32)[None]
    key = jnp.broadcast_to(values[..., None, None], (BATCH, WIDTH, 1, 8))
    positions, valid = start[:, None] + offset, offset < lengths[:, None]
    *_, layer = cache.layers[0].attend(key, key, key, positions, valid, Mask(1.0))
    return cache.closed((layer,), lengths)


def value(text):
    return float(zlib.crc32(bytes(text)) % 2**20)


class Store(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(sorted(POLICIES)), most=st.sampled_from([3, POOL]))
    def begin(self, policy, most):
        self.cache = Paged(page=PAGE, pool=POOL).init(MODEL, batch=BATCH, capacity=CAPACITY)
        self.store = open_store(self.cache, POLICIES[policy], most)
        self.texts = [[] for _ in range(BATCH)]
        self.known = [[0, 1, 2] * 6]
        self.time = 0.0

    def write(self, row, tokens):
        """Take tokens in, as far as there are pages; says whether there were enough."""
        for start in range(0, len(tokens), WIDTH):
            chunk = tokens[start : start + WIDTH]
            values, lengths = np.zeros((BATCH, WIDTH), np.float32), np.zeros(BATCH, np.int32)
            values[row, : len(chunk)] = [value([*self.texts[row], *chunk[: i + 1]]) for i in range(len(chunk))]
            lengths[row] = len(chunk)
            self.cache = take_in(self.cache, values, lengths)
            if self.cache.shared.starved[row]:
                return False
            self.texts[row] = [*self.texts[row], *chunk]
        return True

    @rule(row=ROW, at=st.integers(0, 99), cut=st.integers(0, 24), more=TOKENS, answer=st.integers(0, 5))
    def serve(self, row, at, cut, more, answer):
        """A prompt that begins as an earlier text did."""
        self.let_go(row)
        prompt = ([*self.known[at % len(self.known)][:cut], *more])[: CAPACITY - answer]
        prompts: list[list[int]] = [[] for _ in range(BATCH)]
        prompts[row] = prompt
        _, covered = find(self.store, prompt)
        try:
            self.store, self.cache, rest = reuse(self.store, self.cache, prompts, room=answer)
        except ValueError as error:
            assert "even with nothing kept, need" in str(error)
            assert self.store.turn == self.store.turns.newest, "nothing was evicted in vain"
            others = sum(len(set(p[p >= 0].tolist())) for p in np.asarray(self.cache.shared.table))
            assert -(-(len(prompt) + answer) // PAGE) > POOL - others
            return
        assert self.cache.shared.hits[row] == covered == len(prompt) - len(rest[row])
        self.texts[row] = prompt[:covered]
        assert self.write(row, rest[row]), "room was made for the prompt"
        assert self.write(row, [1] * answer), "and for the answer"
        self.known.append(self.texts[row])

    @rule(row=ROW, tokens=TOKENS)
    def go_on(self, row, tokens):
        tokens = tokens[: CAPACITY - len(self.texts[row])]
        free = int(self.cache.shared.free)
        assert self.write(row, tokens) or free < -(-len(tokens) // PAGE) + 1

    @rule(rows=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
    def keep(self, rows):
        self.time += 1.0
        texts = [text if chosen else [] for text, chosen in zip(self.texts, rows, strict=True)]
        self.store, self.cache = keep(self.store, self.cache, texts, time=self.time)
        assert len(self.store.blocks) <= self.store.most

    @rule(row=ROW)
    def let_go(self, row):
        self.cache = released(self.cache, jnp.arange(BATCH) == row)
        self.texts[row] = []

    @rule(pages=st.integers(1, POOL))
    def evict(self, pages):
        """As many pages as an empty row asks for, if there can be as many."""
        row = next((row for row, text in enumerate(self.texts) if not text), None)
        if row is None:
            return
        lengths = np.where(np.arange(BATCH) == row, pages * PAGE, 0)
        try:
            self.store, self.cache = make_room(self.store, self.cache, lengths)
        except ValueError:
            return
        assert self.cache.shared.free >= pages

    @rule(rows=st.lists(ROW, min_size=BATCH, max_size=BATCH))
    def fork(self, rows):
        self.cache = forked(self.cache, jnp.array(rows))
        self.texts = [self.texts[row] for row in rows]

    @invariant()
    def pages_are_held_as_they_are_counted(self):
        pages, length = self.cache.shared, np.asarray(self.cache.length)
        np.testing.assert_array_equal(length, [len(text) for text in self.texts])
        table = np.asarray(pages.table)
        np.testing.assert_array_equal((table >= 0).sum(1), -(-length // PAGE))
        kept = sorted(block.page for block in self.store.blocks.values())
        assert np.flatnonzero(pages.kept).tolist() == kept, "a page a block, and no more"
        holders = np.bincount([*table[table >= 0], *kept], minlength=POOL)
        np.testing.assert_array_equal(pages.refs, holders)
        assert int(pages.stamp) == self.store.stamp

    @invariant()
    def rows_and_blocks_hold_their_texts(self):
        keys, table = np.asarray(self.cache.layers[0].k)[..., 0], np.asarray(self.cache.shared.table)
        for row, text in enumerate(self.texts):
            held = keys[np.maximum(table[row], 0)].reshape(-1)[: len(text)]
            np.testing.assert_array_equal(held, [value(text[: i + 1]) for i in range(len(text))])
        for block in self.store.blocks.values():
            before, up = list(block.tokens), block.parent
            while up:
                before = [*self.store.blocks[up].tokens, *before]
                up = self.store.blocks[up].parent
            wanted = [value(before[: len(before) - PAGE + i + 1]) for i in range(PAGE)]
            np.testing.assert_array_equal(keys[block.page], wanted)


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
