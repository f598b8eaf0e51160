"""Questions to a chat model: asks crossed with topics, those of the test set apart from those of training."""

from __future__ import annotations

import random

ASKS = (
    "Write a story about {}.",
    "Explain {} to a child.",
    "What should I know about {}?",
    "Write a short essay about {}.",
    "Give me five facts about {}.",
    "Write a poem about {}.",
    "Write a letter to a friend about {}.",
    "What are the advantages and disadvantages of {}?",
    "Describe {} in two paragraphs.",
    "Write a dialogue between a teacher and a student about {}.",
    "List ten ideas for a lesson about {}.",
    "How has {} changed over the last hundred years?",
    "Write a news article about {}.",
    "Why does {} matter?",
    "Make a step-by-step plan for someone who wants to learn about {}.",
    "Summarise what is known about {}.",
)

SUBJECTS = """rain|volcanoes|the moon|honey bees|bread|chess|bicycles|the Roman Empire|photosynthesis|electric cars
gardening|whales|coffee|the human heart|mountain climbing|recycling|painting|the Silk Road|robots|tea|pottery|dinosaurs
public libraries|the ocean floor|jazz|solar power|sleep|the printing press|wolves|friendship|money|healthy food|trains
the Sahara desert|vaccines|football|a lonely robot|a king without a crown|a talking cat|the first day of school|glaciers
stars|a haunted house|time travel|a lost key|the immune system|maps|ancient Egypt|a small island|fishing|swimming|salt
machine learning|computer programming|a broken clock|a brave mouse|an old sailor|winter|the stock market|democracy|owls
earthquakes|working from home|meditation|a magic mirror|the internet|smartphones|a long journey|the Amazon rainforest
running a small business|travelling by train|learning a language|playing the piano|the Great Wall of China|gravity|ants
black holes|the water cycle|cooking rice|caring for a dog|job interviews|climate change|the French Revolution|penguins
a friendly ghost|two sisters|a hidden treasure|a wise farmer|camping|photography|wind power|the periodic table|elephants
writing a novel|good manners|planning a wedding|saving energy|tomatoes|cheese|river floods|the alphabet|shadows|silk
a train that never stops|the last tree|a boy who could fly|the history of medicine|bridges|castles|lightning|mirrors
paper|museums|dreams|memory|fear|happiness|teamwork|leadership|stress|exercise|fractions|probability|triangles|zero""".replace(
    "\n", "|"
).split("|")

UNSEEN = """a lighthouse keeper|two rival bakers|a lost satellite|a village without clocks|the last library|a shy dragon
a night train|a garden on the moon|coral reefs|beekeeping|the violin|electric trains|the Vikings|sourdough|chess clocks
deserts|a clumsy wizard|the human eye|sailing|satellites|winter sports|the wheel|an honest thief|bamboo""".replace(
    "\n", "|"
).split("|")
"""Subjects that no training prompt has."""


def training(count: int) -> list[str]:
    """`count` different prompts, always the same ones.

    Raises:
        ValueError: if there are not so many.
    """
    every: list[str] = [ask.format(subject) for ask in ASKS for subject in SUBJECTS]
    if count > len(every):
        raise ValueError(f"train_draft: `rows` must be at most {len(every)}, the prompts there are, got {count}")
    random.Random(0).shuffle(every)
    return every[:count]


def unseen(count: int) -> list[str]:
    """`count` prompts on subjects that training had nothing of; the asks come in turns."""
    return [ASKS[i % len(ASKS)].format(UNSEEN[i * 7 % len(UNSEEN)]) for i in range(count)]
