"""Counting compiles by the name of the jitted function, from JAX's own log."""

import logging
import re


class Compiles(logging.Handler):
    """`with Compiles() as compiles: …`, then `compiles.of("decode_step")`."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.names: list[str] = []
        self.log = logging.getLogger("jax._src.interpreters.pxla")

    def emit(self, record):
        if found := re.search(r"Compiling (?:jit\()?(\w+)", record.getMessage()):
            self.names.append(found[1])

    def __enter__(self):
        self.before = self.log.level, self.log.propagate
        self.log.addHandler(self)
        self.log.setLevel(logging.DEBUG)
        self.log.propagate = False
        return self

    def __exit__(self, *_):
        self.log.removeHandler(self)
        self.log.setLevel(self.before[0])
        self.log.propagate = self.before[1]

    def of(self, name: str) -> int:
        return self.names.count(name)
