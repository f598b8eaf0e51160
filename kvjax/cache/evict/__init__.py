"""Caches that evict: scores of what a token is worth, budgets a layer and a head, and the strategy that uses them."""

from kvjax.cache.evict.budgets import adaptive, pyramid
from kvjax.cache.evict.entropy import attention_entropy
from kvjax.cache.evict.evicting import Evicting
from kvjax.cache.evict.score import Score
from kvjax.cache.evict.scores import SCORES
from kvjax.cache.evict.turning import turn

__all__ = ["SCORES", "Evicting", "Score", "adaptive", "attention_entropy", "pyramid", "turn"]
